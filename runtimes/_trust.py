"""Whether native code may be loaded, and files that only this user can have written.

A TensorRT plan is native code: who deserialises one lets its maker do what this process can. So a plan is taken only
if it was built on this machine by this user, if it came in an artifact whose signature this user had checked, or if the
caller vouches for it. ``compile`` notes the SHA-256 of each plan that it writes, and ``install`` that of each whose
signature it checked, one small file for each in the user's cache; an artifact cannot bring such a note along.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from runtimes._digests import cache_root, is_ours

_MAX_OWN = 1 << 30


def note_built(sha256: str, what: str) -> bool:
    """Notes that a file of this digest was built here. Returns whether that could be written.

    Args:
        sha256: of the file, in lower-case hex.
        what: for a person who looks into the cache.
    """
    root = cache_root()
    return root is not None and write_own(_note(root, "built", sha256), f"{what}\n".encode())


def note_signed(sha256: str, who: str) -> bool:
    """Notes that a file of this digest came signed, and that the signature was checked. Returns whether that could be
    written.

    Args:
        sha256: of the file, in lower-case hex.
        who: whose signature it was, for a person who looks into the cache.
    """
    root = cache_root()
    return root is not None and write_own(_note(root, "signed", sha256), f"{who}\n".encode())


def refusal(sha256: str, *, trusted: bool) -> str | None:
    """Why native code of this digest may not be loaded; None where it may.

    This is the one place that decides.
    """
    if trusted:
        return None
    root = cache_root()
    if root is not None and any(read_own(_note(root, why, sha256)) is not None for why in ("built", "signed")):
        return None
    return (
        "it was not built on this machine, came with no signature that was checked here, and is native code that could "
        "do here whatever this process can"
    )


def _note(root: Path, why: str, sha256: str) -> Path:
    return root / why / sha256


def read_own(path: Path) -> bytes | None:
    """The content of a file of the cache; None where there is none, or where others could have written it."""
    try:
        if path.parent.is_symlink() or not is_ours(os.lstat(path.parent)):
            return None
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or not is_ours(status) or status.st_size > _MAX_OWN:
                return None
            return file.read()
    except OSError:
        # not there or not readable: to the caller the same
        return None


def write_own(path: Path, content: bytes) -> bool:
    """Writes a file of the cache, whole or not at all, readable by this user only. Returns whether it is there."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns():x}.tmp")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return False
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True
