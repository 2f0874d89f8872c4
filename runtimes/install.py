"""Puts a bundle into service on a device, and back: ``python -m runtimes install | rollback | verify``.

An install goes through these steps, and whatever ends it before the last one leaves the version before in service:

1. the signature, where one is asked for, over the manifest and all it lists; then the manifest, key by key;
2. every file, unpacked into a hidden folder with its digest compared on the way, and written through to the disk;
3. the self-test: every variant that runs here is loaded, in a process of its own, and has to give the outputs that the
   build stored;
4. the switch: the folder gets its number, and ``latest`` leads there.

``runtimes/_versions.py`` draws the folder, and ``runtimes/_unpack.py`` the bundle. The installing process holds no file
in memory, whatever its size; the model is loaded by the self-test's process alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from runtimes import _trust, _versions
from runtimes._digests import FileEntry
from runtimes._manifest import Manifest, read_manifest
from runtimes._selftest import Tested, selftest_apart
from runtimes._signature import Signer, check_signature
from runtimes._unpack import MANIFEST, BundleReader, Limits, check_files, open_bundle, unpack
from runtimes._versions import InstallFailed, write_through
from runtimes.base import Error, InvalidArtifact, InvalidInput
from runtimes.package import Package, read_package

__all__ = [
    "InstallFailed",
    "Installed",
    "Limits",
    "Signer",
    "Verified",
    "compile_here",
    "install",
    "rollback",
    "verify",
]

#: Versions that stay, with the one in service.
KEEP = 3
#: A self-test loads a model and runs it a few times.
SELFTEST_S = 600.0


@dataclasses.dataclass(frozen=True, slots=True)
class Installed:
    """What is in service now.

    Attributes:
        root: the folder of versions.
        version: the number of the one in service.
        name, digest: of the artifact; the digest is that of its manifest.
        signed_by: whose signature was checked; None where none was asked for.
        tested: what the self-test found of each variant.
        removed: the numbers of versions that were removed.
    """

    root: Path
    version: int
    name: str
    digest: str
    signed_by: str | None = None
    tested: tuple[Tested, ...] = ()
    removed: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Verified:
    """A bundle or an artifact whose every digest was compared.

    Attributes:
        name, digest: of the artifact.
        files, size: how many files and bytes.
        signed_by: whose signature was checked; None where none was asked for.
    """

    name: str
    digest: str
    files: int
    size: int
    signed_by: str | None


def install(
    bundle: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    signer: Signer | None = None,
    keep: int = KEEP,
    limits: Limits | None = None,
    timeout_s: float = SELFTEST_S,
) -> Installed:
    """Unpacks, tests and puts into service. Killed at any moment, it leaves the version before or the new one, whole.

    Args:
        bundle: what ``toolchain bundle`` wrote.
        root: the folder of versions; made if needed.
        signer: whose signature has to be there. Without one, the bundle is compared with itself alone: whoever could
            change it could change its digests too.
        keep: how many versions stay, with the new one; at least 2, so that there is one to go back to.
        limits: what is refused unseen.
        timeout_s: for the self-test.

    Raises:
        InvalidSignature: the signature is missing, another's, or of something else.
        InvalidArtifact: the bundle is damaged or unsafe, has no self-test, or nothing in it runs here.
        InstallFailed: the self-test failed, the disk is full, or another process is installing here.
        InvalidInput: ``keep`` is below 2.
    """
    root = Path(os.path.abspath(root))
    _check_keep(keep)
    with open_bundle(bundle, limits=limits) as reader, _versions.locked(root), _failing(root):
        with _versions.working_folder(root) as folder:
            manifest, who = _checked(reader, signer)
            _require_successor(root, manifest.name, signed=reader.signature is not None)
            _require_space(root, manifest)
            write_through(folder / MANIFEST, [reader.manifest])
            unpack(reader, manifest.files, folder)
            if who is not None:
                for variant in manifest.variants:
                    if plan := variant.fingerprint.get("plan_sha256"):
                        _trust.note_signed(plan, who)
            return _into_service(root, folder, manifest.name, reader.signature, who, keep=keep, timeout_s=timeout_s)


def _require_successor(root: Path, name: str, *, signed: bool) -> None:
    """Refuses what cannot follow the version in service: another model, or a bundle without a signature after one
    with it. Raises InstallFailed."""
    serving = _versions.in_service(root)
    if serving is None:
        return
    hint = "install it into a folder of its own"
    before = read_package(root / str(serving)).name
    if before != name:
        raise InstallFailed(f"the folder holds versions of {before!r}, this is {name!r}", where=str(root), hint=hint)
    # Any of them: what compile-on-device made of a signed version has no signature of its own.
    before_signed = [number for number in _versions.installed(root) if (root / f"{number}.sig").exists()]
    if not signed and before_signed:
        raise InstallFailed(
            f"version {before_signed[-1]}, which is installed there, is signed, and this bundle is not",
            where=str(root),
            hint=f"sign it; or {hint}",
        )


def rollback(root: str | os.PathLike[str], *, to: int | None = None) -> Installed:
    """Puts an older version back into service: the one before, or the one named. Its digests are compared first.

    The version that is left stays until the next install, so ``to`` also leads forward again.

    Raises:
        InvalidArtifact: nothing is installed there, or the version is damaged.
        InstallFailed: there is no such version, or none before; or another process is installing here.
    """
    root = Path(os.path.abspath(root))
    # A version that is named can be put into service whatever the pointer says, or where it is lost.
    serving = _versions.current(root) if to is None else _versions.in_service(root)
    if not _versions.installed(root):
        raise InvalidArtifact("nothing is installed there", where=str(root), hint="toolchain install BUNDLE --to ROOT")
    if serving is None and to is None:
        raise InvalidArtifact(
            "nothing says which version is in service",
            where=str(root),
            hint=f"--to N, of {', '.join(map(str, _versions.installed(root)))}",
        )
    with _versions.locked(root), _failing(root):
        numbers = _versions.installed(root)
        older = [number for number in numbers if serving is not None and number < serving]
        number = to if to is not None else max(older, default=None)
        if number is None or number not in numbers:
            raise InstallFailed(
                "there is no version before" if to is None else f"there is no version {to}",
                where=str(root),
                hint=f"there are: {', '.join(map(str, numbers))}; in service is {serving}",
            )
        package = read_package(root / str(number))
        package.verify(receipts=False)
        _versions.switch(root, number)
    return Installed(root, number, package.name, package.digest)


def verify(path: str | os.PathLike[str], *, signer: Signer | None = None, limits: Limits | None = None) -> Verified:
    """Compares every digest of a bundle, an artifact or what is installed, and checks the signature if asked.

    Nothing is written, and no receipt is believed.

    Raises:
        InvalidSignature, InvalidArtifact: as ``install``.
    """
    path = Path(path)
    if not path.is_dir():
        with open_bundle(path, limits=limits) as reader:
            manifest, who = _checked(reader, signer)
            unpack(reader, manifest.files, None)
            return _verified(manifest.name, reader.manifest, manifest.files, who)
    package = read_package(path)
    who = None
    if signer is not None:
        beside = package.root.with_name(f"{package.root.name}.sig")
        signature = beside.read_bytes() if beside.is_file() else None
        who = check_signature(signature, _digests(package.digest, package.files), signer, where=str(path))
    package.verify(receipts=False)
    return Verified(package.name, package.digest, len(package.files), sum(e.size for e in package.files.values()), who)


def compile_here(
    root: str | os.PathLike[str],
    *,
    keep: int = KEEP,
    timeout_s: float = SELFTEST_S,
    on_status: Callable[[str], None] = lambda text: None,
) -> Installed:
    """Builds here what a bundle brought as a graph and a recipe, such as TensorRT engines, as a new version.

    What is built goes first in the new version, because it is what a loader is to take. The new manifest is ours, so
    the signature of the old one does not cover it, and is not carried along.

    Args:
        root: a folder of versions.
        keep, timeout_s: as in ``install``.
        on_status: is called with a word on what is going on.

    Raises:
        InvalidArtifact: nothing is installed there, or nothing in it is to be built.
        TargetUnavailable, CompileFailed: it cannot be built here.
        InstallFailed: as ``install``.
    """
    import runtimes

    root = Path(os.path.abspath(root))
    _check_keep(keep)
    if _versions.current(root) is None:
        raise InvalidArtifact("nothing is installed there", where=str(root), hint="toolchain install BUNDLE --to ROOT")
    with _versions.locked(root), _failing(root), _versions.working_folder(root) as folder:
        package = read_package(root)
        recipes = recipes_of(package, str(package.root))
        if not recipes:
            raise InvalidArtifact(
                "nothing in it is to be built on a device",
                where=str(package.root),
                hint="it runs as it is; python -m runtimes doctor says which variants",
            )
        package.verify()
        for name in package.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            # Not a hard link: a version is whole by itself, and links are refused when a model is loaded.
            shutil.copyfile(package.root / name, folder / name)
        tree = json.loads((package.root / MANIFEST).read_text(encoding="utf-8"))
        made: dict[str, Any] = {}
        for recipe in recipes:
            on_status(f"building {recipe.variant}")
            made[recipe.variant] = _compile(runtimes, recipe, folder)
        variants = tree["components"]["model"]["variants"]
        tree["components"]["model"]["variants"] = {**made, **variants}
        ours = tree["additional_metadata"]["toolchain"]
        ours["compiled_from"] = package.digest
        del ours["to_compile"]
        ours["files"] = _files(folder)
        content = (json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
        write_through(folder / MANIFEST, [content])
        return _into_service(root, folder, package.name, None, None, keep=keep, timeout_s=timeout_s)


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """An entry of ``to_compile`` in the manifest: a graph in the folder of its name, and how to build it."""

    variant: str
    target: str
    precision: str
    model_file: str
    options: dict[str, Any]
    session_options: dict[str, Any]


def recipes_of(package: Package | Manifest, where: str) -> list[Recipe]:
    """What of an artifact, or of a bundle's manifest, is to be built on the device. Raises InvalidArtifact."""
    entries = package.metadata.get("to_compile") or []
    found = []
    try:
        for entry in entries:
            recipe = Recipe(**entry)
            texts = (recipe.variant, recipe.target, recipe.precision, recipe.model_file)
            # Files of the manifest have plain relative names, so a folder that has one of them is inside.
            if not all(isinstance(text, str) for text in texts) or "/" in recipe.variant:
                raise ValueError("a text is missing")
            if f"{recipe.variant}/{recipe.model_file}" not in package.files:
                raise ValueError(f"the graph of {recipe.variant} is not in the manifest")
            found.append(recipe)
    except (TypeError, ValueError) as error:
        raise InvalidArtifact(f"what is to be built is not said properly: {error}", where=where) from None
    return found


def _compile(runtimes: Any, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Builds one recipe in the place of its graph and gives the variant's entry in the manifest."""
    directory = folder / recipe.variant
    graph = folder / f".{recipe.variant}.graph"
    directory.rename(graph)
    compiled = runtimes.compile(graph / recipe.model_file, recipe.target, directory, options=recipe.options)
    shutil.rmtree(graph)
    entry = {**compiled.to_json(), "precision": recipe.precision, "session_options": recipe.session_options}
    return {"variant_directory": recipe.variant, "executor_info": {"toolchain": entry}}


def _files(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            with open(path, "rb") as file:
                found[name] = {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}
    return found


def _into_service(
    root: Path,
    folder: Path,
    name: str,
    signature: bytes | None,
    who: str | None,
    *,
    keep: int,
    timeout_s: float,
) -> Installed:
    try:
        tested = selftest_apart(folder, timeout_s=timeout_s)
    except InvalidArtifact:
        raise
    except Error as error:
        raise InstallFailed(
            f"the new version was not put into service: {error.what}", where=str(root), hint=error.hint
        ) from None
    digest = read_package(folder).digest
    number, withdrawn = _versions.add(root, folder, signature)
    _versions.switch(root, number)
    removed = (*withdrawn, *_versions.prune(root, keep=keep))
    return Installed(root, number, name, digest, who, tested, removed)


def bundle_manifest(reader: BundleReader) -> Manifest:
    """The manifest of a bundle, through the one reader of manifests, which reads a file."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_bytes(reader.manifest)
        try:
            return read_manifest(Path(folder))
        except InvalidArtifact as error:
            raise InvalidArtifact(error.what, where=reader.where, hint=error.hint) from None


def _checked(reader: BundleReader, signer: Signer | None) -> tuple[Manifest, str | None]:
    """The manifest of a bundle, and whose signature it has, before any file is read."""
    manifest = bundle_manifest(reader)
    check_files(manifest.files, reader.where, limits=reader.limits)
    if signer is None:
        return manifest, None
    digest = hashlib.sha256(reader.manifest).hexdigest()
    who = check_signature(reader.signature, _digests(digest, manifest.files), signer, where=reader.where)
    return manifest, who


def _digests(manifest: str, files: Mapping[str, FileEntry]) -> dict[str, str]:
    """What a signature covers: the manifest and all that it lists."""
    return {MANIFEST: manifest, **{name: entry.sha256 for name, entry in files.items()}}


def _verified(name: str, manifest: bytes, files: Mapping[str, FileEntry], who: str | None) -> Verified:
    digest = hashlib.sha256(manifest).hexdigest()
    return Verified(name, digest, len(files), sum(entry.size for entry in files.values()), who)


def _require_space(root: Path, manifest: Manifest) -> None:
    needed = sum(entry.size for entry in manifest.files.values())
    free = shutil.disk_usage(root).free
    if needed > free:
        raise InstallFailed(
            f"the new version needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free",
            where=str(root),
            hint="free some space",
        )


@contextlib.contextmanager
def _failing(root: Path) -> Iterator[None]:
    """Turns what the system refuses into InstallFailed, and says that nothing has changed."""
    try:
        yield
    except OSError as error:
        raise _versions.refused(root, error) from error


def _check_keep(keep: int) -> None:
    if type(keep) is not int or keep < 2:
        raise InvalidInput(f"keep is {keep!r}", where="option keep", hint="at least 2: one to go back to")
