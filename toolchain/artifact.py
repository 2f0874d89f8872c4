"""Writes the artifact: an ONNX Runtime model package, in the layout that ``runtimes/package.py`` describes."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import runtimes
from runtimes import package
from runtimes._manifest import SCHEMA
from toolchain.as_json import from_json
from toolchain.errors import StorageError
from toolchain.report import BuildReport
from toolchain.storage import replacing_directory, reported

#: Where the exported model lies in an artifact.
EXPORTED = "export/model.onnx"
#: Where the pruned float graph lies that the variants were made of, in an artifact of a model that was pruned.
PRUNED = "pruned/model.onnx"
#: Where the ranges are that its INT8 variants were made with.
CALIBRATION = "calibration.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One entry of the package: what was compiled, its precision, and the session options it asks for."""

    compiled: runtimes.Compiled
    precision: str
    session_options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Such as ``ort-cpu-fp32``; it names the folder too, so a device's colon and commas become dashes."""
        return f"{str(self.compiled.target).replace(':', '-').replace(',', '-')}-{self.precision}"


def check_destination(destination: Path) -> None:
    """Refuses to replace anything but an artifact of ours or an empty folder.

    Raises:
        StorageError: something else is there, or the current folder would be replaced.
    """
    path = Path(os.path.abspath(destination))
    hint = "choose another --output"
    if path == Path.cwd() or path in Path.cwd().parents:
        raise StorageError("the artifact would take the place of the current folder", where=str(path), hint=hint)
    if path.exists() and not path.is_dir():
        raise StorageError("cannot write the artifact: a file is in the way", where=str(path), hint=hint)
    if path.is_dir() and any(path.iterdir()):
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            ours = "toolchain" in manifest["additional_metadata"]
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise StorageError(
                "cannot write the artifact: the folder holds something else, and would be replaced whole",
                where=str(path),
                hint=hint,
            )


def write_artifact(
    destination: Path,
    *,
    name: str,
    version: str,
    variants: Sequence[Variant],
    exported: Path,
    pruned: Path | None = None,
    texts: Mapping[str, str | bytes],
    metadata: Mapping[str, Any],
) -> None:
    """Writes the package to a folder beside ``destination`` and puts it there in one step.

    Args:
        destination: the artifact's folder; an older one there is replaced whole.
        name: the package's name.
        version: the package's version.
        variants: best first: who loads takes the first that runs there.
        exported: the folder of the exported model, ``model.onnx`` and any external data.
        pruned: the folder of the pruned float graph, alike; None where nothing was cut.
        texts: further files by relative path (the recipe, the reports), as text or as bytes.
        metadata: our own data, readable as ``Package.metadata``.

    Raises:
        StorageError: the disk is full or not writable; what was there before is untouched.
    """
    check_destination(destination)
    with replacing_directory(destination, "the artifact") as root:
        copies = [pair for variant in variants for pair in _files(variant.compiled.directory, root / variant.name)]
        copies += _files(exported, root / Path(EXPORTED).parent, only="model.onnx*")
        if pruned is not None:
            copies += _files(pruned, root / Path(PRUNED).parent, only="model.onnx*")
        # Copying and hashing both leave the interpreter: two threads are nearly twice as fast as one.
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            hashed = list(pool.map(_copy_hashing, *zip(*copies, strict=True)))
        digests = {to.relative_to(root).as_posix(): digest for (_, to), digest in zip(copies, hashed, strict=True)}
        for relative, text in texts.items():
            path = root / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            content = text.encode() if isinstance(text, str) else text
            path.write_bytes(content)
            digests[relative] = hashlib.sha256(content).hexdigest()
        files = {path: {"sha256": sha, "size": (root / path).stat().st_size} for path, sha in sorted(digests.items())}
        manifest = {
            "schema_version": "1.0",
            "package_name": name,
            "package_version": version,
            "layout": "portable",
            "components": {"model": {"variants": {v.name: _variant_entry(v) for v in variants}}},
            "additional_metadata": {"toolchain": {"schema": SCHEMA, "files": files, **metadata}},
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (root / "manifest.json").write_text(text, encoding="utf-8")
        # Read back what the disk now holds, before the switch: afterwards another build may replace it. The receipt
        # of it survives the rename and saves the first load from reading it all again.
        package.write_receipt(root)


def _variant_entry(variant: Variant) -> dict[str, Any]:
    compiled = variant.compiled
    backend = runtimes.backend(compiled.target.runtime)
    executor_info: dict[str, Any] = {
        "toolchain": {
            **compiled.to_json(),
            "precision": variant.precision,
            "session_options": dict(variant.session_options),
        }
    }
    entry: dict[str, Any] = {"variant_directory": variant.name, "executor_info": executor_info}
    if backend.execution_provider is not None:
        # ONNX Runtime's own slot: any program on ONNX Runtime can open the portable form.
        executor_info["ort"] = {"model_file": compiled.model_file, "session_options": {}}
        entry["ep"] = backend.execution_provider
        if backend.device_class != "cpu":
            # A program that names no provider gets the CPU's without a device, and ONNX Runtime 1.31 would find that
            # none matches; a variant that asks for no device goes with every one of its provider.
            entry["device"] = backend.device_class
    return entry


def _files(source: Path, destination: Path, *, only: str = "*") -> list[tuple[Path, Path]]:
    """Each file below ``source``, with its place below ``destination``."""
    return [(file, destination / file.relative_to(source)) for file in sorted(source.rglob(only)) if file.is_file()]


def _copy_hashing(source: Path, destination: Path) -> str:
    """Copies a file and gives the SHA-256 of what passed through."""
    digest = hashlib.sha256()
    with reported(destination, destination.name):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as reader, destination.open("wb") as writer:
            while block := reader.read(1 << 20):
                digest.update(block)
                writer.write(block)
    return digest.hexdigest()


def read_report(artifact: Path, *, build_key: str) -> BuildReport | None:
    """The report of an artifact that is whole and was built with this key; None where it is not so.

    A damaged or foreign folder is not an error here: it is about to be replaced.
    """
    try:
        found = package.read_package(artifact)
        if found.metadata.get("build_key") != build_key:
            return None
        found.verify()
        return from_json(BuildReport, json.loads((artifact / "report.json").read_text(encoding="utf-8")))
    except (runtimes.InvalidArtifact, OSError, ValueError):
        return None
