"""Makes a bundle: what of an artifact runs on one kind of device, in one file, signed if asked.

A bundle unpacks to an artifact by itself: the manifest is written anew for the variants and files that go along, and
says which artifact it was made of (``bundle.made_of``, the digest of that manifest). What stays behind is the exported
model, which a device does not run, and every variant or prepared form that cannot fit; ``bundle.left_out`` has them
with the reason. What is added: ORT format where that is usual (``ort_format.py``), recipes for engines that have to be
built on the device (``to_compile``), and a bill of materials (``sbom.py``). Everything else that says where the model
comes from is carried over: source, weights and their digest, recipe, machine, packages.

``runtimes/_unpack.py`` draws the format. The same artifact gives the same bytes with the same versions of this
toolchain and of the compressor; ORT format has its own word on that, and a signature is random in itself.

Files are read once: each is packed while its digest is computed, and compared with the manifest at its end.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import runtimes
from runtimes._digests import FileEntry
from runtimes._selftest import KEY
from runtimes._unpack import (
    BLOCK,
    CHECKSUM,
    END,
    GZIP_START,
    MANIFEST,
    SIGNATURE,
    ZSTD_WINDOW_LOG,
    Limits,
    check_files,
    checksum,
    header,
    zstd,
)
from runtimes.package import Package, read_package
from toolchain import ort_format, sbom
from toolchain.errors import StorageError
from toolchain.platforms import Choice, Platform, build_options, choose, platform_named
from toolchain.progress import Status, silent
from toolchain.signing import SigningKey, sign
from toolchain.storage import reported, require_outside_artifacts

#: The exported model's folder in an artifact. Not from ``artifact.py``, which brings the whole line along: packing
#: takes less memory than importing that.
STAYS_BEHIND = "export/"
#: File name ending -> how it is compressed.
ENDINGS = (".tar.zst", ".tar.gz", ".tar")
_ZSTD_LEVEL = 3
_GZIP_LEVEL = 6
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Bundled:
    """What was written.

    Attributes:
        path: the bundle.
        size: of it, in bytes.
        unpacked: bytes of its files.
        digest: SHA-256 of the manifest inside, in hex: the name of what a device will have.
        platform: its name.
        choices: what happened to each variant.
        ort_format: the version of ONNX Runtime that ORT format is bound to; None where there is none.
        signed: whether it is signed.
    """

    path: Path
    size: int
    unpacked: int
    digest: str
    platform: str
    choices: tuple[Choice, ...]
    ort_format: str | None
    signed: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Content:
    """What goes into a bundle: the manifest, and for each of its files what it is and where it lies."""

    manifest: bytes
    files: Mapping[str, FileEntry]
    places: Mapping[str, Path]


def bundle(
    artifact: Path,
    output: Path,
    *,
    platform: str,
    key: SigningKey | None = None,
    with_ort_format: bool | None = None,
    on_status: Status = silent,
) -> Bundled:
    """Packs what of an artifact a kind of device can run.

    Args:
        artifact: the folder that a build wrote.
        output: the file to write, ``.tar.zst``, ``.tar.gz`` or ``.tar``; replaced whole or not at all.
        platform: a name of ``platforms.PLATFORMS``.
        key: what to sign with; None leaves it unsigned.
        with_ort_format: add ORT format; None where that is usual on the platform.
        on_status: is called with a word on what is going on.

    Raises:
        InvalidInput: an unknown platform, or a name with another ending.
        InvalidArtifact: the artifact is damaged, has no self-test, or nothing of it runs on the platform.
        SigningError: the key cannot be used.
        TargetUnavailable, CompileFailed: ORT format cannot be made.
        StorageError: the disk.
    """
    chosen = platform_named(platform)
    if not output.name.endswith(ENDINGS):
        raise runtimes.InvalidInput(f"a bundle is a {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]} file", where=str(output))
    if output.is_dir():
        raise StorageError("there is a folder of that name", where=str(output), hint="give another --output")
    require_outside_artifacts(output)
    if output.name.endswith(".zst"):
        zstd()  # whether it is here, before any work
    package = read_package(artifact)
    if "bundle" in package.metadata:
        # What it left behind is gone, so its bill and its list of what stayed out would be wrong for another platform.
        raise runtimes.InvalidArtifact(
            "this came out of a bundle, which is made of what a build wrote",
            where=str(artifact),
            hint="take the artifact that was built; the bundle itself can be copied and installed again",
        )
    if KEY not in package.metadata:
        raise runtimes.InvalidArtifact(
            "the artifact has no self-test, and no install would take it", where=str(artifact), hint="build it again"
        )
    choices = tuple(choose(variant, chosen) for variant in package.variants)
    if all(choice.fate == "left out" for choice in choices):
        raise runtimes.InvalidArtifact(
            f"nothing in it runs on {platform}: " + "; ".join(f"{c.variant.name}: {c.why}" for c in choices),
            where=str(artifact),
            hint=f"build it for one of: {', '.join(chosen.runtimes)}",
        )
    with tempfile.TemporaryDirectory(prefix="bundle-") as folder:
        wanted = chosen.ort_format if with_ort_format is None else with_ort_format
        content, version = _content(package, choices, chosen, Path(folder), wanted, on_status)
        limits = Limits()
        unpacked = check_files(content.files, str(output), limits=limits)
        if len(content.manifest) > limits.manifest:
            raise runtimes.InvalidArtifact(
                f"the manifest is larger than {limits.manifest >> 20} MiB, and no install would take it",
                where=str(artifact),
            )
        digest = hashlib.sha256(content.manifest).hexdigest()
        signature = None
        if key is not None:
            on_status("signing")
            digests = {MANIFEST: digest, **{name: entry.sha256 for name, entry in content.files.items()}}
            signature = sign(digests, key, name=package.name)
        on_status("packing")
        size = _write(output, content, signature)
    return Bundled(output, size, unpacked, digest, platform, choices, version, key is not None)


def _content(
    package: Package, choices: tuple[Choice, ...], platform: Platform, folder: Path, wanted: bool, on_status: Status
) -> tuple[_Content, str | None]:
    tree = json.loads((package.root / MANIFEST).read_text(encoding="utf-8"))
    variants: dict[str, Any] = tree["components"]["model"]["variants"]
    ours: dict[str, Any] = tree["additional_metadata"]["toolchain"]
    files = {name: entry for name, entry in package.files.items() if not name.startswith(STAYS_BEHIND)}
    places: dict[str, Path] = {}
    kept: dict[str, Any] = {}
    recipes: list[dict[str, Any]] = []
    for choice in choices:
        variant = choice.variant
        if choice.fate == "whole":
            kept[variant.name] = variants[variant.name]
            continue
        inside = variant.directory + "/"
        keep = set() if choice.fate == "left out" else set(package.needed(variant, variant.model_file or ""))
        files = {name: entry for name, entry in files.items() if not name.startswith(inside) or name in keep}
        if choice.fate == "portable":
            kept[variant.name] = _portable(variants[variant.name])
        elif choice.fate == "to compile":
            recipes.append(
                {
                    "variant": variant.name,
                    "target": str(variant.target),
                    "precision": variant.precision,
                    "model_file": variant.model_file,
                    "options": build_options(variant),
                    "session_options": dict(variant.session_options),
                }
            )
    version = None
    source = next(
        (c.variant for c in choices if c.variant.name in kept and c.variant.target.runtime == "ort-cpu"), None
    )
    if wanted and source is not None and source.model_file is not None:
        on_status("converting to ORT format")
        version = _add_ort_format(package, source, platform, folder, kept, ours, files, places)
    tree["components"]["model"]["variants"] = kept
    if recipes:
        ours["to_compile"] = recipes
    ours["bundle"] = {
        "platform": platform.name,
        "made_of": package.digest,
        "left_out": {c.variant.name: c.why for c in choices if c.fate in ("left out", "portable")},
        "command": f"toolchain bundle {package.name} --for {platform.name}",
    }
    _place(folder / sbom.FILE, sbom.bill(package, files), sbom.FILE, files, places)
    ours["files"] = {name: {"sha256": e.sha256, "size": e.size} for name, e in sorted(files.items())}
    text = json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return _Content(text.encode(), files, {name: places.get(name, package.root / name) for name in files}), version


def _portable(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's entry without its prepared form."""
    made = copy.deepcopy(dict(entry))
    made["executor_info"]["toolchain"] |= {"prepared_file": None, "fingerprint": {}}
    return made


def _add_ort_format(
    package: Package,
    source: Any,
    platform: Platform,
    folder: Path,
    kept: dict[str, Any],
    ours: dict[str, Any],
    files: dict[str, FileEntry],
    places: dict[str, Path],
) -> str:
    """Adds a variant in ORT format, last: who can read ONNX takes that. Returns ONNX Runtime's version."""
    name = f"{source.name}-ort"
    needed = package.needed(source, source.model_file)
    package.verify(needed)
    made = folder / name
    made.mkdir()
    version = ort_format.write_ort_format(
        package.root / source.directory / source.model_file,
        made,
        digests={file: package.files[file].sha256 for file in needed},
        arm=platform.arm,
    )
    for file in (ort_format.MODEL, ort_format.CONFIG):
        relative = f"{name}/{file}"
        places[relative] = made / file
        with open(made / file, "rb") as opened:
            files[relative] = FileEntry(hashlib.file_digest(opened, "sha256").hexdigest(), (made / file).stat().st_size)
    kept[name] = {
        "variant_directory": name,
        "ep": "CPUExecutionProvider",
        "executor_info": {
            "ort": {"model_file": ort_format.MODEL, "session_options": {}},
            "toolchain": {
                "target": "ort-cpu",
                "precision": source.precision,
                "model_file": ort_format.MODEL,
                "session_options": dict(source.session_options),
                "remarks": [
                    f"ORT format, written by ONNX Runtime {version}: read by that version and later ones, and by a "
                    f"reduced build of that version with {ort_format.CONFIG}"
                ],
            },
        },
    }
    tests = ours[KEY].get("variants", {})
    if source.name in tests:
        tests[name] = dict(tests[source.name])
    return version


def _place(path: Path, text: str, name: str, files: dict[str, FileEntry], places: dict[str, Path]) -> None:
    content = text.encode()
    path.write_bytes(content)
    files[name] = FileEntry(hashlib.sha256(content).hexdigest(), len(content))
    places[name] = path


def _write(output: Path, content: _Content, signature: bytes | None) -> int:
    output.parent.mkdir(parents=True, exist_ok=True)
    working = output.with_name(f".{output.name}.{os.urandom(6).hex()}")
    with reported(output, output.name):
        try:
            with open(working, "xb", buffering=0) as file, _packer(file, output.name) as packer:
                _pack_bytes(packer, MANIFEST, content.manifest)
                _pack_bytes(packer, CHECKSUM, checksum(content.manifest))
                if signature is not None:
                    _pack_bytes(packer, SIGNATURE, signature)
                for name, entry in sorted(content.files.items()):
                    _pack(packer, name, _read(content.places[name], name, entry), entry.size)
                packer.write(END)
            size = working.stat().st_size
            working.replace(output)
        finally:
            working.unlink(missing_ok=True)
    return size


def _pack_bytes(packer: _Packer, name: str, content: bytes) -> None:
    _pack(packer, name, iter([content]), len(content))


def _pack(packer: _Packer, name: str, pieces: Iterator[bytes | memoryview], size: int) -> None:
    packer.write(header(name, size))
    for piece in pieces:
        packer.write(piece)
    packer.write(bytes(-size % BLOCK))


def _read(path: Path, name: str, entry: FileEntry) -> Iterator[memoryview]:
    """A file in pieces. Raises InvalidArtifact where it is not what the manifest says."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    size = 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size += count
            if size > entry.size:
                break
            digest.update(buffer[:count])
            yield buffer[:count]
    if size != entry.size or digest.hexdigest() != entry.sha256:
        raise runtimes.InvalidArtifact(
            f"{name!r} is not the file that was built", where=str(path), hint="build or copy the artifact again"
        )


class _Packer(Protocol):
    """Takes the archive's bytes."""

    def write(self, data: bytes | memoryview, /) -> object: ...


@contextlib.contextmanager
def _packer(file: IO[bytes], name: str) -> Iterator[_Packer]:
    """What compresses as the file's name says. Whatever a compressor lets one choose is fixed here."""
    if name.endswith(".tar"):
        yield file
        return
    packer = _Gzip(file) if name.endswith(".gz") else _Zstd(file)
    yield packer
    packer.finish()


class _Zstd:
    """One frame, level 3, with a checksum. One thread: more of them split the work, and that shows in the bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        module = zstd()
        parameter = module.CompressionParameter
        self._file = file
        self._compressor = module.ZstdCompressor(
            options={
                parameter.compression_level: _ZSTD_LEVEL,
                parameter.window_log: ZSTD_WINDOW_LOG,
                parameter.checksum_flag: 1,
                parameter.content_size_flag: 0,
            }
        )

    def write(self, data: bytes | memoryview, /) -> None:
        self._file.write(self._compressor.compress(data))

    def finish(self) -> None:
        self._file.write(self._compressor.flush())


class _Gzip:
    """RFC 1952, with the ten bytes at its start that ``_unpack.py`` expects: zlib's own differ between systems."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._compressor = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, -15)
        self._crc = self._size = 0
        file.write(GZIP_START)

    def write(self, data: bytes | memoryview, /) -> None:
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        self._file.write(self._compressor.compress(data))

    def finish(self) -> None:
        self._file.write(self._compressor.flush() + struct.pack("<II", self._crc, self._size & 0xFFFFFFFF))
