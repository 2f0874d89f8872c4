"""Reads and checks an artifact: a directory that is a valid portable ONNX Runtime model package, schema 1.

The writer is ``toolchain/artifact.py``; what both agree on is this::

    root/manifest.json
        {"schema_version": "1.0", "package_name": …, "package_version": …, "description": …?,
         "layout": "portable",
         "components": {"model": {"variants": {                  best first: ONNX Runtime goes by order too
             "ort-cpu-fp32": {
                 "variant_directory": "ort-cpu-fp32",
                 "ep": "CPUExecutionProvider",                   and "device": "gpu" where it is one; neither
                                                                 where ONNX Runtime cannot run it
                 "executor_info": {
                     "ort": {"model_file": "model.onnx", "session_options": {}},
                     "toolchain": {"target": "ort-cpu", "precision": "fp32",
                                   "model_file": "model.onnx",            relative to the variant directory,
                                   "prepared_file": "prepared/model.onnx",     one of the two may be absent
                                   "fingerprint": {…}, "session_options": {…}, "remarks": […]}}}}}},
         "additional_metadata": {"toolchain": {"schema": 1,
             "files": {"ort-cpu-fp32/model.onnx": {"sha256": …64 hex…, "size": 123}, …},
             …anything else is handed on as Package.metadata…}}}
    root/ort-cpu-fp32/…, root/export/model.onnx, root/recipe.yaml, …

A folder that ``install`` made holds several of these under numbers, and is read as the one that is in service
(``runtimes/_versions.py``).

``files`` lists every file but the manifest, by POSIX path relative to the root. What is on disk and not in
the list is refused, and so are links, devices, absolute paths and ``..``. No byte of a file is parsed before
its SHA-256 was compared.

A digest that was compared once is not computed again while the file is the same one: a *receipt* in the
user's cache (``$TOOLCHAIN_CACHE``, else ``$XDG_CACHE_HOME/onnx-toolchain``, else ``~/.cache/onnx-toolchain``)
keeps device, inode, size, mtime and ctime. It lies outside the artifact, so an artifact cannot bring its own,
and it counts only where this user owns it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from runtimes._digests import TICK_NS, FileEntry, verify_files
from runtimes._manifest import Variant, read_manifest
from runtimes._versions import resolve
from runtimes.base import Availability, Compiled, Error, InvalidArtifact, Target, TargetUnavailable

_MAX_FILES = 100_000


@dataclasses.dataclass(frozen=True, slots=True)
class Package:
    """An artifact whose manifest and folder were checked. Digests are compared by ``verify``.

    Attributes:
        root: the real directory, links in the way to it resolved.
        name, version, description: as the manifest has them.
        variants: in the order of the manifest, best first.
        files: POSIX path relative to the root, to what it must be.
        metadata: the rest of the toolchain's data: recipe, reports, provenance.
        digest: SHA-256 of the manifest in hex. It names the artifact: the manifest holds every file's digest.
    """

    root: Path
    name: str
    version: str
    description: str
    variants: tuple[Variant, ...]
    files: Mapping[str, FileEntry]
    metadata: Mapping[str, Any]
    digest: str

    def compiled(self, variant: Variant) -> Compiled:
        """The variant as ``Backend.load`` takes it."""
        return Compiled(
            target=variant.target,
            directory=self.root / variant.directory,
            model_file=variant.model_file,
            prepared_file=variant.prepared_file,
            fingerprint=variant.fingerprint,
            remarks=variant.remarks,
        )

    def needed(self, variant: Variant, selected: str) -> tuple[str, ...]:
        """The files that loading ``selected`` (a file of the variant) may open: all of its variant's, except
        that a prepared file in a folder of its own needs nothing outside it, and nothing outside needs that.
        """
        everything = [name for name in self.files if name.startswith(variant.directory + "/")]
        folder, _, _ = (variant.prepared_file or "").rpartition("/")
        if not folder:
            return tuple(everything)
        inside = f"{variant.directory}/{folder}/"
        wanted = selected == variant.prepared_file
        return tuple(name for name in everything if name.startswith(inside) == wanted)

    def verify(self, files: Iterable[str] | None = None, *, receipts: bool = True) -> int:
        """Compares files with the manifest's SHA-256.

        Args:
            files: which; all where None.
            receipts: believe and write receipts.

        Returns:
            How many bytes had to be read; 0 where receipts spoke for everything.

        Raises:
            InvalidArtifact: a file is missing, is no plain file or is not what the manifest says.
        """
        names = self.files if files is None else files
        return verify_files(self.root, {name: self.files[name] for name in names}, receipts=receipts)


def read_package(root: str | os.PathLike[str]) -> Package:
    """Reads the manifest and checks it and the folder, without reading any other file.

    Args:
        root: the artifact's directory, or a symlink to it, or a folder that ``install`` made.

    Raises:
        InvalidArtifact: no artifact, or a damaged, unsafe or newer one.
    """
    try:
        real = Path(os.path.realpath(root, strict=True))
        if not real.is_dir():
            raise InvalidArtifact(
                "that is a file, and an artifact is a folder",
                where=str(root),
                hint="give the folder that a build wrote; a bundle is installed first: toolchain install",
            )
        real = resolve(real)
    except FileNotFoundError:
        raise InvalidArtifact("there is no such folder", where=str(root), hint="check the path") from None
    except (OSError, ValueError) as error:
        raise InvalidArtifact(f"there is no artifact: {error}", where=str(root), hint="check the path") from None
    manifest = read_manifest(real)
    package = Package(
        root=real,
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        variants=manifest.variants,
        files=manifest.files,
        metadata=manifest.metadata,
        digest=hashlib.sha256(manifest.content).hexdigest(),
    )
    _check_folder(package)
    return package


def is_package(path: Path) -> bool:
    """Whether a path is a directory with a manifest, or one of installed versions."""
    return path.is_dir() and os.path.lexists(resolve(path) / "manifest.json")


def choose_variant(
    package: Package,
    *,
    variant: str | None = None,
    target: str | None = None,
    can_run: Callable[[Target], Availability],
) -> tuple[Variant, str]:
    """Picks the variant to load, and says why.

    Args:
        package: what to choose from.
        variant: by name.
        target: by target; one without a device takes any device.
        can_run: says of a target whether it can be loaded here; raises Error for a runtime that nobody knows.

    Raises:
        InvalidArtifact: there is no such variant.
        TargetUnavailable: there is, but nothing asked for runs here.
    """
    offered = ", ".join(f"{v.name} ({v.target})" for v in package.variants)
    asked = [v for v in package.variants if variant in (None, v.name)]
    if target is not None:
        wanted = Target.parse(target)
        asked = [v for v in asked if v.target.runtime == wanted.runtime and wanted.device in (None, v.target.device)]
    words = " and ".join(
        f"{what} {value!r}" for what, value in (("variant", variant), ("target", target)) if value is not None
    )
    if not asked:
        raise InvalidArtifact(
            f"the artifact has nothing for {words}" if words else "the artifact has no variants",
            where=str(package.root),
            hint=_other(package, offered, target) if offered else None,
        )
    refused: list[str] = []
    remedies: list[str] = []
    for candidate in asked:
        try:
            state = can_run(candidate.target)
        except Error as error:
            refused.append(f"{candidate.name}: {error.what}")
            continue
        if state.available:
            why = f"asked for {words}" if words else "the first that runs here"
            return candidate, f"{why}; not {'; '.join(refused)}" if refused else why
        refused.append(f"{candidate.name}: {state.reason}")
        if state.remedy:
            remedies.append(state.remedy)
    raise TargetUnavailable(
        f"nothing that was asked for runs here: {'; '.join(refused)}",
        where=str(package.root),
        hint=f"run: {remedies[0]}" if remedies else f"the artifact has: {offered}",
    )


def _other(package: Package, offered: str, target: str | None) -> str:
    """What to do where an artifact has nothing for what was asked."""
    if target is None or "recipe.yaml" not in package.files:
        return f"it has: {offered}"
    recipe = shlex.quote(str(package.root / "recipe.yaml"))
    return f"it has: {offered}; for another run: toolchain build {recipe} --target {target} -o FOLDER"


def write_receipt(root: str | os.PathLike[str]) -> None:
    """Compares every digest of an artifact and notes that, so that the first load need not.

    For the writer, at the end of a build. Files written within the last 50 ms are waited for.

    Raises:
        InvalidArtifact: the artifact is not sound.
    """
    package = read_package(root)
    newest = max((os.lstat(package.root / name).st_ctime_ns for name in package.files), default=0)
    time.sleep(min(max(newest + TICK_NS + 1_000_000 - time.time_ns(), 0), 2 * TICK_NS) / 1e9)
    package.verify()


def _check_folder(package: Package) -> None:
    found: set[str] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        with os.scandir(package.root / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                where = str(package.root / name)
                if entry.is_symlink():
                    raise InvalidArtifact(f"{name!r} is a symlink", where=where, hint="copy it with cp -rL")
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name)
                    continue
                if not entry.is_file(follow_symlinks=False):
                    raise InvalidArtifact(f"{name!r} is no plain file", where=where)
                if name != "manifest.json" and name not in package.files:
                    raise InvalidArtifact(
                        f"{name!r} is not in the manifest", where=where, hint="remove it, or build again"
                    )
                found.add(name)
                if len(found) > _MAX_FILES:
                    raise InvalidArtifact(f"more than {_MAX_FILES:,} files", where=str(package.root))
    missing = sorted(package.files.keys() - found)
    if missing:
        raise InvalidArtifact(
            f"{missing[0]!r} is in the manifest but not there",
            where=str(package.root / missing[0]),
            hint="copy the whole directory, or build it again",
        )
