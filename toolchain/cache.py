"""Content-addressed results of stages, kept between builds.

An entry is a directory ``<root>/stages/<stage>-<key>/``; its key is the SHA-256 of everything that the
result depends on. It is written to a temporary directory and renamed, so that an entry is whole or not
there, and two builds that make the same one do not disturb each other. A build that reads an entry holds
a shared lock on it; eviction takes the lock exclusively and leaves what it cannot get.

``TOOLCHAIN_CACHE`` moves the root, ``TOOLCHAIN_CACHE_SIZE`` (such as ``20G``) sets the cap, 10 GB otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runtimes._digests import cache_root as runtimes_cache_root
from toolchain.errors import RecipeError, StorageError
from toolchain.storage import reported

DEFAULT_CAP = "10G"
_STAGE_DIR = re.compile(r"(?P<stage>[a-z]+)-(?P<key>[0-9a-f]{64})")
_LOCK = ".lock"


def cache_root() -> Path:
    """Where the cache is; see ``runtimes``, whose receipts lie there too. Raises StorageError without any place."""
    root = runtimes_cache_root()
    if root is None:
        raise StorageError("there is no home folder to keep a cache in", hint="set TOOLCHAIN_CACHE to a folder")
    return root


def cap_bytes() -> int:
    """The size cap in bytes. Raises RecipeError where ``TOOLCHAIN_CACHE_SIZE`` is not a size."""
    return parse_size(os.environ.get("TOOLCHAIN_CACHE_SIZE", DEFAULT_CAP), where="TOOLCHAIN_CACHE_SIZE")


def parse_size(text: str, *, where: str) -> int:
    """``500M`` or ``20G`` in bytes. Raises RecipeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise RecipeError(f"not a size: {text!r}", where=where, hint="write it as 500M or 20G")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def digest_of(parts: Mapping[str, Any]) -> str:
    """The key of a stage: SHA-256 over the parts as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _sizes(path: Path) -> dict[str, int]:
    return {
        str(file.relative_to(path)): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != _LOCK
    }


def _open_lock(path: Path) -> int | None:
    try:
        return os.open(path / _LOCK, os.O_RDONLY)
    except OSError:  # not there, or not readable: not an entry either way
        return None


def _is_whole(path: Path) -> bool:
    """Whether the entry's files have the sizes that were noted when it was finished."""
    try:
        return bool(_sizes(path) == json.loads((path / _LOCK).read_text()))
    except (OSError, ValueError):
        return False


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One kept result: its stage, key, size on disk in bytes, and when it was last used (seconds since 1970)."""

    stage: str
    key: str
    path: Path
    size: int
    used: float


class Cache:
    """The store. All methods may be called from several processes at once.

    Args:
        root: the folder; made when first written to.
        cap: size in bytes beyond which the least recently used entries go.
    """

    def __init__(self, root: Path | None = None, *, cap: int | None = None) -> None:
        self.root = root or cache_root()
        self.cap = cap_bytes() if cap is None else cap
        self._stages = self.root / "stages"

    @contextlib.contextmanager
    def reading(self, stage: str, key: str) -> Iterator[Path | None]:
        """Gives the entry's folder, kept safe from eviction for the length of the block, or None."""
        path = self._stages / f"{stage}-{key}"
        lock = _open_lock(path)
        if lock is None:
            yield None
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            # Gone: evicted between open and lock. Another size: the machine lost power before the data was written.
            if not _is_whole(path):
                yield None
                return
            with contextlib.suppress(OSError):  # a read-only cache still serves
                os.utime(path / _LOCK)
            yield path
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def writing(self, stage: str, key: str) -> Iterator[Path]:
        """Gives an empty folder to fill; it becomes the entry when the block ends without an error.

        Nothing is evicted here, or a build could lose what it has just written: it calls ``evict`` at its end.

        Raises:
            StorageError: the disk is full or read-only.
        """
        hint = "set TOOLCHAIN_CACHE to a place that can be written and has space"
        working = self._stages / f".writing-{uuid.uuid4().hex}"
        with reported(self._stages, "the cache", hint=hint):
            working.mkdir(parents=True)
        try:
            yield working
            with reported(self._stages, "the cache", hint=hint):
                (working / _LOCK).write_text(json.dumps(_sizes(working)))
                entry = self._stages / f"{stage}-{key}"
                if entry.exists() and not _is_whole(entry):
                    self._remove(entry)
                try:
                    working.rename(entry)
                except OSError as error:
                    # another build was first: its entry is the same
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
        finally:
            shutil.rmtree(working, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """All entries, least recently used first."""
        found = []
        for path in self._stages.iterdir() if self._stages.is_dir() else ():
            match = _STAGE_DIR.fullmatch(path.name)
            if match is None:
                continue
            try:
                size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                used = (path / _LOCK).stat().st_mtime
            except OSError:  # evicted by another process while we looked
                continue
            found.append(Entry(match["stage"], match["key"], path, size, used))
        return sorted(found, key=lambda entry: entry.used)

    def evict(self, *, cap: int | None = None) -> list[Entry]:
        """Removes the least recently used entries until the rest fits under the cap. Returns what went."""
        self._sweep_abandoned()
        limit = self.cap if cap is None else cap
        entries = self.entries()
        excess = sum(entry.size for entry in entries) - limit
        gone = []
        for entry in entries:
            if excess <= 0:
                break
            if self._remove(entry.path):
                excess -= entry.size
                gone.append(entry)
        return gone

    def clear(self) -> list[Entry]:
        """Removes every entry that no build is reading."""
        return self.evict(cap=-1)

    def _remove(self, path: Path) -> bool:
        lock = _open_lock(path)
        if lock is None:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            doomed = path.with_name(f".doomed-{uuid.uuid4().hex}")
            path.rename(doomed)
        except OSError:  # in use, or already gone
            return False
        finally:
            os.close(lock)
        shutil.rmtree(doomed, ignore_errors=True)
        return True

    def _sweep_abandoned(self) -> None:
        """Removes what killed builds left half-written, once it is a day old."""
        for path in self._stages.glob(".*-*") if self._stages.is_dir() else ():
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > 86_400:
                    shutil.rmtree(path, ignore_errors=True)
