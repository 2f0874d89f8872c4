"""The versions of one installed artifact, side by side, and the pointer to the one in service.

::

    root/1/…            an artifact, never changed once it is there
    root/1.sig          its signature, where it has one
    root/2/…
    root/latest         the one in service: a symlink to ``2``; where links are not to be had (Windows, FAT), a file
                        that says ``2``
    root/serving.yaml   how the server serves it, and labels.txt: the user's, left alone here
    root/.lock          held by whoever changes anything here, and let go by the system when that process ends

A version is made in a hidden folder and put in its place by one rename; the pointer is replaced by one rename. So at
any moment ``latest`` leads to a whole version, and who loads meanwhile gets the one before or the new one.

Versions above ``latest`` are not in service: they were rolled back from, or an install was cut off just before it
switched. The next install removes them once its own version has passed the self-test, so that no rollback leads there,
and goes on counting behind them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from runtimes.base import Error, InvalidArtifact

POINTER = "latest"
_LOCK = ".lock"
#: What is being made, and what is being removed; whoever holds the lock may clear both away.
_WORKING, _REMOVING = ".incoming-", ".removing-"
#: What a user may put beside the versions.
_BESIDE = ("serving.yaml", "labels.txt")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_ELSEWHERE = "name a folder that is there or can be made, and that you may write to"
#: What helps where the system does not let us write.
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EEXIST: "a file is in the way: name another folder",
    errno.ENOTDIR: "a file is in the way: name another folder",
}


class InstallFailed(Error):
    """A version could not be put into service; the one before still is."""


def installed(root: Path) -> list[int]:
    """The numbers of all versions in a folder, ascending. A numbered folder that holds no artifact is none."""
    try:
        names = os.listdir(root)
    except OSError:
        return []
    return sorted(int(name) for name in names if _is_version(root / name))


def current(root: Path) -> int | None:
    """The number of the version in service; None where the folder holds no installed artifact.

    Raises:
        InvalidArtifact: the pointer says something that is no version.
    """
    path = root / POINTER
    try:
        if path.is_symlink():
            text = os.readlink(path)
        else:
            with open(path, encoding="ascii") as file:
                text = file.read(64).strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArtifact(
            f"the pointer to the version in service cannot be read: {error}", where=str(path), hint=_repair(root)
        ) from None
    # Only a bare number is ours: a path such as ../other/1 leads to a version, but to one of another folder.
    if _NUMBER.fullmatch(text) is None or not _is_version(root / text):
        raise InvalidArtifact(
            f"the pointer says {text[:64]!r}, which is no version here", where=str(path), hint=_repair(root)
        )
    return int(text)


def in_service(root: Path) -> int | None:
    """``current``, or None too where the pointer is broken: for those who are about to mend it."""
    try:
        return current(root)
    except InvalidArtifact:
        return None


def _repair(root: Path) -> str:
    numbers = ", ".join(map(str, installed(root)))
    return f"rollback --to N puts one of these into service: {numbers}" if numbers else "install a bundle"


def _is_version(path: Path) -> bool:
    return _NUMBER.fullmatch(path.name) is not None and (path / "manifest.json").is_file()


def resolve(root: Path) -> Path:
    """The folder of the version in service, or the folder itself where it is no folder of versions."""
    if os.path.lexists(root / "manifest.json"):
        return root
    number = current(root)
    return root if number is None else root / str(number)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds a folder of versions, made if needed, and clears away what killed installs left.

    Raises:
        InstallFailed: another process holds it, or the folder holds something else.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        strange = sorted(name for name in os.listdir(root) if not _ours(root / name))
        # Its own step: what the block of a caller raises is no matter of the lock.
        file = open(root / _LOCK, "a+b") if not strange else None
    except OSError as error:
        raise refused(root, error) from error
    if file is None:
        raise InstallFailed(
            f"the folder holds something else: {strange[0]!r}", where=str(root), hint="install into a folder of its own"
        )
    with file:
        _lock(file.fileno(), root)
        for name in os.listdir(root):
            if name.startswith((_WORKING, _REMOVING, f".{POINTER}-")):
                _remove(root / name)
            elif name.endswith(".sig") and not (root / name[: -len(".sig")]).is_dir():
                _remove(root / name)
        yield


@contextlib.contextmanager
def working_folder(root: Path) -> Iterator[Path]:
    """An empty hidden folder in ``root``; what is left of it when the block ends is removed."""
    path = root / f"{_WORKING}{os.urandom(6).hex()}"
    path.mkdir()
    try:
        yield path
    finally:
        _remove(path)


def add(root: Path, folder: Path, signature: bytes | None) -> tuple[int, list[int]]:
    """Gives a finished working folder the next number, and removes the versions that are above the one in service.
    Where nothing says which is in service, all stay.

    Returns:
        The number, which is not in service yet, and those that were removed.

    Raises:
        InstallFailed: no number is left.
    """
    numbers = installed(root)
    number = max(numbers, default=0) + 1
    if not _NUMBER.fullmatch(str(number)):
        raise InstallFailed(
            f"after version {numbers[-1]} there is no number left", where=str(root), hint="a new folder"
        )
    serving = in_service(root)
    withdrawn = [] if serving is None else [one for one in numbers if one > serving]
    _retire(root, withdrawn)
    if signature is not None:
        write_through(root / f"{number}.sig", [signature])
    folder.rename(root / str(number))
    sync_folder(root)
    return number, withdrawn


def switch(root: Path, number: int) -> None:
    """Puts a version into service: one rename, on the disk when this returns."""
    temporary = root / f".{POINTER}-{os.urandom(6).hex()}"
    if not _link(str(number), temporary):
        write_through(temporary, [f"{number}\n".encode()])
    os.replace(temporary, root / POINTER)
    sync_folder(root)


def prune(root: Path, *, keep: int) -> list[int]:
    """Removes the oldest versions until ``keep`` are left. Returns which."""
    numbers = installed(root)
    gone = numbers[: max(len(numbers) - keep, 0)]
    _retire(root, gone)
    return gone


def _retire(root: Path, numbers: Iterable[int]) -> None:
    for number in numbers:
        # Out of sight first: a numbered folder is whole for as long as it is there.
        hidden = root / f"{_REMOVING}{os.urandom(6).hex()}"
        (root / str(number)).rename(hidden)
        _remove(hidden)
        _remove(root / f"{number}.sig")


def write_through(path: Path, pieces: Iterable[bytes]) -> None:
    """Writes a new file, on the disk when this returns."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, 0o644), "wb", buffering=0) as file:
        for piece in pieces:
            file.write(piece)
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Asks for the names in a folder to be on the disk. Windows has no such call: NTFS journals names."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ours(path: Path) -> bool:
    name = path.name
    return (
        name in (POINTER, _LOCK, *_BESIDE)
        or _is_version(path)
        or (name.endswith(".sig") and _NUMBER.fullmatch(name[: -len(".sig")]) is not None)
        or name.startswith((_WORKING, _REMOVING, f".{POINTER}-"))
    )


def _link(target: str, path: Path) -> bool:
    if os.name == "nt":  # a link to a folder cannot be replaced there in one step, and takes a privilege
        return False
    try:
        os.symlink(target, path)
    except OSError:  # a file system without links, such as FAT
        return False
    return True


def _remove(path: Path) -> None:
    """Removes a file or a folder. What cannot be removed now is in nobody's way, and the next install tries again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _lock(descriptor: int, root: Path) -> None:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InstallFailed(
            "another process is installing or rolling back here", where=str(root), hint="wait for it and try again"
        ) from None


def refused(root: Path, error: OSError) -> InstallFailed:
    """What to raise where the system does not let us write."""
    return InstallFailed(
        f"cannot write there: {error.strerror or error}; what was in service still is",
        where=str(error.filename or root),
        hint=_REMEDIES.get(error.errno or 0, _ELSEWHERE),
    )
