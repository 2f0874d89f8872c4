"""The folder of a running server: sockets, and what its workers tell each other.

It is locked (flock(2)) by every process of the server, and the kernel lets go of the lock however a process ends. So a
server that begins can tell the folders of servers that were killed, which nobody else would remove, from those in use;
and systemd-tmpfiles, which removes what is old in ``/tmp``, leaves alone what is locked.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runtimes import Error

_PREFIX = "toolchain-serve-"
#: Of the path of a socket, bytes; Linux takes 107, macOS 103. The longest name in the folder has 15.
_MOST_PATH = 103 - 16


class NoFolder(Error):
    """There is no place for the server's folder."""


@contextlib.contextmanager
def made() -> Iterator[Path]:
    """A new folder, which only this user can open. It is removed at the end; first those of servers that were killed.

    Raises:
        NoFolder: the folder for temporary files cannot be written to, or its path is too long for a socket.
    """
    _sweep()
    with contextlib.ExitStack() as stack:
        folder = None
        while folder is None:
            try:
                folder = Path(tempfile.mkdtemp(prefix=_PREFIX))  # 0700
            except OSError as error:
                raise NoFolder(f"no folder for sockets can be made: {error}", hint="TMPDIR=FOLDER") from error
            with contextlib.suppress(FileNotFoundError):  # one that began as well took it for one that was left
                stack.enter_context(held(folder))
                continue
            folder = None
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if len(os.fsencode(folder)) > _MOST_PATH:
            raise NoFolder("the path is too long for sockets", where=str(folder), hint="TMPDIR=FOLDER, a shorter one")
        yield folder


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Marks a folder as in use. Raises FileNotFoundError."""
    with _opened(folder) as opened:
        if opened is not None:
            import fcntl

            fcntl.flock(opened, fcntl.LOCK_SH)
            if os.fstat(opened).st_nlink == 0:
                raise FileNotFoundError(str(folder))
        yield


def _sweep() -> None:
    """Removes the folders of this user's servers that no process has."""
    if sys.platform == "win32":
        return
    import fcntl

    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        # It is another user's, or goes just now, or a server has it.
        with contextlib.suppress(OSError), _opened(folder) as opened:
            if opened is not None and os.fstat(opened).st_uid == os.getuid():
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int | None]:
    """A descriptor of a folder that is no link; None on a system that has none."""
    if sys.platform == "win32":
        yield None
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield opened
    finally:
        os.close(opened)
