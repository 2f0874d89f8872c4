"""What OpenVINO made of models, kept in the user's own cache for the next load.

OpenVINO writes a compiled model into the folder that ``CACHE_DIR`` names, and takes it from there. Its parser trusts
the offsets in that file, so a folder is used only where nobody but this user can have written it. One belongs to one
model with one configuration on one machine. It is filled beside its place and renamed, so that nobody sees half of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtimes._digests import TICK_NS, cache_root, is_ours
from runtimes.model_file import ModelFile

#: The cache holds no more than this; the models used least recently go first.
_CAP = 4 << 30

#: Compiles the model with that folder as OpenVINO's ``CACHE_DIR``.
Compile = Callable[[Path], Any]


def find_place(core: Any, checked: ModelFile, config: Mapping[str, Any]) -> Path | None:
    """The folder of what OpenVINO makes of these files with this configuration on this machine.

    None where there is no cache, where the files are too large for it, or so young that they may change unnoticed.

    Args:
        core: an ``openvino.Core``.
        checked: the model, with the files that its weights are in.
        config: what it is compiled with.
    """
    root = cache_root()
    if root is None:
        return None
    files = [os.stat(path) for path in (checked.path, *checked.data_files)]
    newest = max(max(status.st_ctime_ns, status.st_mtime_ns) for status in files)
    if sum(status.st_size for status in files) > _CAP // 2 or time.time_ns() < newest + TICK_NS:
        return None
    identities = [[s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in files]
    parts = {
        "openvino": core.get_versions("CPU")["CPU"].build_number,
        "cpu": [core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")],
        "machine": platform.machine(),
        "path": str(checked.path.resolve()),
        "files": identities,
        "config": dict(config),
    }
    return root / "openvino" / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def take(place: Path, compile: Compile) -> tuple[Any, str] | None:
    """The model that lies in a place, and what the cache had to do with it; None where nothing does."""
    if not _holds_ours(place):
        return None
    made = compile(place)
    if not made.get_property("LOADED_FROM_CACHE"):
        return made, "it was damaged, and is written again"
    os.utime(place)
    return made, "used"


def open_folder(place: Path) -> Path:
    """A new folder beside a place, to be filled. Raises OSError where the cache cannot be written."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=place.parent, prefix="tmp-"))


def fill(place: Path, folder: Path, compile: Compile) -> tuple[Any, str]:
    """Compiles into a folder of ``open_folder`` and puts it in its place; and what the cache had to do with it."""
    try:
        made = compile(folder)
        if not os.listdir(folder):
            return made, "not used: OpenVINO could not write it"
        try:
            os.rename(folder, place)
        except OSError:
            return made, "written by another process meanwhile"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _evict(place)
    return made, "written"


def _holds_ours(place: Path) -> bool:
    """Whether a cached model is there and nobody but this user can have written it."""
    try:
        folders = [os.lstat(place), os.lstat(place.parent)]
    except OSError:
        return False
    return all(stat.S_ISDIR(status.st_mode) and is_ours(status) for status in folders)


def _evict(keep: Path) -> None:
    """Removes the models used least recently until the rest fits the cap."""
    found = []
    for place in keep.parent.iterdir():
        try:
            if place.name.startswith("tmp-") and place.stat().st_mtime > time.time() - 3600:
                continue  # another process is writing it; older ones were left by one that died
            size = sum(file.stat().st_size for file in place.iterdir())
            found.append((place.stat().st_mtime, size, place))
        except OSError:
            continue  # another process removed it
    total = sum(size for _, size, _ in found)
    for _, size, place in sorted(found):
        if total <= _CAP:
            return
        if place != keep:
            shutil.rmtree(place, ignore_errors=True)
            total -= size
