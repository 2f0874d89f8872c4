"""Digests of an artifact's files, and the receipts that save computing them again.

A receipt says that a digest was compared once and which file that was: device, inode, size, mtime and ctime.
The kernel sets ctime on every change and no program can set it back. Receipts lie in the user's own cache,
not in the artifact, and count only where nobody else can write them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runtimes.base import InvalidArtifact

#: A file that was changed this shortly before it was read may change again within one tick of its ctime.
TICK_NS = 50_000_000
_MAX_RECEIPT = 16 << 20
#: From this size on a second thread pays.
_LARGE = 8 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class FileEntry:
    """What the manifest says of a file: SHA-256 in lower-case hex, size in bytes."""

    sha256: str
    size: int


#: what makes a file the same file: device, inode, size, mtime, ctime
_Identity = tuple[int, int, int, int, int]


def _identity(status: os.stat_result) -> _Identity:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def verify_files(root: Path, files: Mapping[str, FileEntry], *, receipts: bool) -> int:
    """Compares files with their SHA-256. Returns how many bytes had to be read.

    Args:
        root: the real folder of the artifact.
        files: POSIX path relative to it, to what the file must be.
        receipts: believe and write receipts.

    Raises:
        InvalidArtifact: a file is missing, is no plain file or is not what it must be.
    """
    receipt_file = _receipt_file(root) if receipts else None
    known = _read_receipt(receipt_file) if receipt_file else {}
    pending: list[tuple[str, Path, FileEntry, _Identity]] = []
    for name, entry in files.items():
        path = root / name
        try:
            status = os.lstat(path)
        except OSError as error:
            raise _unreadable(name, path, error) from error
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArtifact(f"{name!r} is no plain file", where=str(path))
        if status.st_size != entry.size:
            raise _tampered(name, path, f"it has {status.st_size:,} bytes, not {entry.size:,}")
        if known.get(name) != [entry.sha256, *_identity(status)]:
            pending.append((name, path, entry, _identity(status)))
    started = time.time_ns()
    fresh: dict[str, list[Any]] = {}
    for (name, path, entry, identity), (digest, after) in zip(pending, _hashed(pending), strict=True):
        if after != identity:
            raise _tampered(name, path, "it changed while it was read")
        if digest != entry.sha256:
            raise _tampered(name, path, f"its SHA-256 is {digest}, not {entry.sha256}")
        if identity[-1] + TICK_NS < started:
            fresh[name] = [digest, *identity]
    if fresh and receipt_file:
        # Entries of files that are gone stay behind; a rebuilt artifact is a new folder with a new receipt.
        _write_receipt(receipt_file, {**known, **fresh})
    return sum(entry.size for _, _, entry, _ in pending)


def _hashed(pending: list[tuple[str, Path, FileEntry, _Identity]]) -> Iterator[tuple[str, _Identity]]:
    """SHA-256 and identity of each file. Hashing leaves the interpreter, so several large files share two threads."""

    def one(item: tuple[str, Path, FileEntry, _Identity]) -> tuple[str, _Identity]:
        try:
            return _sha256(item[1])
        except OSError as error:
            raise _unreadable(item[0], item[1], error) from error

    if sum(entry.size >= _LARGE for _, _, entry, _ in pending) < 2:
        yield from map(one, pending)
        return
    from concurrent.futures import ThreadPoolExecutor  # 5 ms that a load without it does not need

    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(one, pending)


def _unreadable(name: str, path: Path, error: OSError) -> InvalidArtifact:
    return InvalidArtifact(f"{name!r} cannot be read: {error.strerror}", where=str(path))


def _tampered(name: str, path: Path, what: str) -> InvalidArtifact:
    return InvalidArtifact(
        f"{name!r} is not the file that was built: {what}",
        where=str(path),
        hint="it was changed or damaged on the way: copy or build the artifact again",
    )


def _sha256(path: Path) -> tuple[str, _Identity]:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
        return digest.hexdigest(), _identity(os.fstat(descriptor))


def cache_root() -> Path | None:
    """``$TOOLCHAIN_CACHE``, or ``onnx-toolchain`` in the user's cache folder; None for a user without a home."""
    if own := os.environ.get("TOOLCHAIN_CACHE"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "onnx-toolchain"
    try:
        return Path.home() / ".cache" / "onnx-toolchain"
    except RuntimeError:  # no home
        return None


def _receipt_file(root: Path) -> Path | None:
    """Where the receipt of an artifact is kept. Named after the folder's inode, so that a rename keeps it."""
    cache = cache_root()
    if cache is None:
        return None
    status = os.stat(root)
    return cache / "receipts" / f"{status.st_dev:x}-{status.st_ino:x}.json"


def is_ours(status: os.stat_result) -> bool:
    """Whether only this user can have written it. Windows has no uid: there the profile's ACL has to do."""
    if not hasattr(os, "getuid"):
        return True
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _read_receipt(path: Path) -> dict[str, list[Any]]:
    """File name -> [sha256, *identity]. Empty where there is no receipt that can be trusted."""
    try:
        if not is_ours(os.lstat(path.parent)) or path.parent.is_symlink():
            return {}
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or not is_ours(status):
                return {}
            content = json.loads(file.read(_MAX_RECEIPT))
    except (OSError, ValueError, RecursionError):
        # No receipt, or a damaged one: the digests are computed again.
        return {}
    return content if isinstance(content, dict) else {}


def _write_receipt(path: Path, content: Mapping[str, list[Any]]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns():x}.tmp")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return  # a cache that cannot be written costs time, not correctness
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
