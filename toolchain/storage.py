"""Writing to disk so that what is there is whole: atomic files and folders, and a full disk as a typed error."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from toolchain.errors import StorageError

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "there is no permission to write there",
    errno.EPERM: "there is no permission to write there",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EIO: "the disk reported an input/output error",
    errno.ENOENT: "there is no such folder",
    errno.EISDIR: "there is a folder of that name",
    errno.EEXIST: "there is a file of that name",
    errno.EFBIG: "the file is larger than the file system takes",
    errno.ENAMETOOLONG: "the name is too long",
}


@contextlib.contextmanager
def reported(path: Path, what: str, *, hint: str | None = None) -> Iterator[None]:
    """Turns the operating system's refusal to write into a StorageError that names the place."""
    try:
        yield
    except OSError as error:
        reason = REASONS.get(error.errno or 0)
        if reason is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        next_step = hint or ("free some space or write elsewhere" if full else "write elsewhere")
        raise StorageError(
            f"cannot write {what}: {reason}", where=str(error.filename or path), hint=next_step
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file whole or not at all. Raises StorageError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Writes a file whole or not at all. Raises StorageError."""
    working = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with reported(path, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            working.write_bytes(content)
            working.replace(path)
        finally:
            working.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_directory(destination: Path, what: str) -> Iterator[Path]:
    """Gives an empty folder beside ``destination`` that takes its place when the block ends without an error.

    Whoever looks sees the old folder or the new one, whole, also when the process is killed: the two
    are exchanged in one system call where the system has it (Linux), else by two renames. What was in the old
    folder is gone afterwards: the caller makes sure that it may go.

    Raises:
        StorageError: the disk is full, read-only or not writable.
    """
    # abspath, not resolve: when the destination is a link, what it points to is replaced by a real folder.
    destination = Path(os.path.abspath(destination))
    with reported(destination, what):
        destination.parent.mkdir(parents=True, exist_ok=True)
        _sweep_abandoned(destination)
        working = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:12]}")
        working.mkdir()
        try:
            yield working
            _fsync_tree(working)
            try:
                working.rename(destination)
            except OSError as error:  # there is one, perhaps since a moment ago, from another build
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                _exchange(working, destination)
        finally:
            shutil.rmtree(working, ignore_errors=True)


def _sweep_abandoned(destination: Path) -> None:
    """Removes what killed writers of this folder left beside it, once it is a day old."""
    for path in destination.parent.glob(f".{glob.escape(destination.name)}.*"):
        if re.fullmatch(r"[0-9a-f]{12}", path.suffix[1:]) and time.time() - path.stat().st_mtime > 86_400:
            shutil.rmtree(path, ignore_errors=True)


def _fsync_tree(root: Path) -> None:
    """Asks for the names to be on disk before the switch; file contents are left to the system's own pace."""
    if os.name != "posix":
        return
    fd = os.open(root, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders; afterwards ``new`` names the former ``old``."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        renameat2 = getattr(libc, "renameat2", None)
        if renameat2 is not None:
            at_fdcwd, rename_exchange = -100, 2
            if renameat2(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(old), rename_exchange) == 0:
                return
            if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):  # those: the filesystem cannot swap
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(old))
    aside = old.with_name(f".{old.name}.{uuid.uuid4().hex[:12]}")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def require_outside_artifacts(path: Path) -> None:
    """Refuses to write into an artifact: what is not in its manifest makes it unsound.

    Raises:
        StorageError: the file would lie in one.
    """
    for folder in list(Path(os.path.abspath(path)).parents)[:3]:
        if (folder / "manifest.json").is_file():
            raise StorageError(
                f"{path.name} would lie in an artifact, which holds only what its manifest lists",
                where=str(folder),
                hint="write elsewhere",
            )


def require_other(output: Path, *inputs: Path) -> None:
    """Refuses a file to be written that is a folder or one of the inputs, or lies in an artifact.

    Raises:
        StorageError: it is, or does.
    """
    if output.is_dir():
        raise StorageError("there is a folder of that name", where=str(output), hint="name a file")
    require_outside_artifacts(output)
    for path in inputs:
        if path.exists() and output.exists() and os.path.samefile(path, output):
            raise StorageError("the output would replace an input", where=str(output), hint="write elsewhere")
