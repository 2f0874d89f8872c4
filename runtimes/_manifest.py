"""Reads the manifest of an artifact; ``runtimes/package.py`` draws its layout.

Every key is checked before it is used: its type, its range, and that it is known at all. Complaints name it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from runtimes._digests import FileEntry
from runtimes.base import Error, InvalidArtifact, Target

SCHEMA = 1
_MAX_MANIFEST = 16 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: What ONNX Runtime itself forbids in a package: options that make it write files.
_WRITING_OPTIONS = frozenset(
    {
        "session.optimized_model_filepath",
        "session.enable_profiling",
        "session.debug_layout_transformation",
        "session.collect_node_memory_stats_to_file",
    }
)


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One compiled form of the model.

    Attributes:
        name: in the manifest.
        directory: relative to the package (POSIX).
        execution_provider: ONNX Runtime's, or None where it cannot run this.
        device_class: "cpu", "gpu", "npu" or None.
        target: what it was compiled for.
        precision: such as "fp32" or "int8".
        model_file, prepared_file, fingerprint, remarks: as in ``Compiled``.
        session_options: fields of the backend's options type, as JSON has them.
    """

    name: str
    directory: str
    execution_provider: str | None
    device_class: str | None
    target: Target
    precision: str
    model_file: str | None
    prepared_file: str | None
    fingerprint: Mapping[str, str]
    session_options: Mapping[str, Any]
    remarks: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says, each key checked; ``Package`` has the meaning of the fields."""

    name: str
    version: str
    description: str
    variants: tuple[Variant, ...]
    files: Mapping[str, FileEntry]
    metadata: Mapping[str, Any]
    content: bytes = dataclasses.field(repr=False)


def read_manifest(root: Path) -> Manifest:
    """Reads ``root/manifest.json``.

    Raises:
        InvalidArtifact: it is not there, no plain file, too large, or anything in it is wrong.
    """
    path = root / "manifest.json"
    return _Reader(str(path), _read(path)).manifest()


def _read(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise InvalidArtifact(
            f"not an artifact: its manifest cannot be opened ({error.strerror})",
            where=str(path),
            hint="give the directory that the build wrote, or an .onnx file",
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # open() takes no folder, and says so in its own words
        os.close(descriptor)
        raise InvalidArtifact("the manifest is not a plain file", where=str(path))
    with open(descriptor, "rb") as file:
        content = file.read(_MAX_MANIFEST + 1)
    if len(content) > _MAX_MANIFEST:
        raise InvalidArtifact(f"the manifest is larger than {_MAX_MANIFEST >> 20} MiB", where=str(path))
    return content


def _parse_json(content: bytes, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise InvalidArtifact(f"the manifest has the key {twice!r} twice in one place", where=where)
        return made

    def no_constant(text: str) -> Any:
        raise InvalidArtifact(f"the manifest has {text}, which JSON does not", where=where)

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: UTF-8, JSON, or a number of thousands of digits
        raise InvalidArtifact(
            f"the manifest is not JSON: {error}",
            where=where,
            hint="the file is truncated or damaged: build or copy the artifact again",
        ) from None


class _Reader:
    """Turns the bytes of a manifest into a Manifest. The key that is being read stands in each complaint."""

    def __init__(self, path: str, content: bytes) -> None:
        self._path = path
        self._content = content

    def manifest(self) -> Manifest:
        top = self._dict(_parse_json(self._content, self._path), "the manifest")
        self._version(top)
        self._keys(
            top,
            "the manifest",
            required={"schema_version", "layout", "components", "additional_metadata"},
            optional={"package_name", "package_version", "description"},
        )
        if top["layout"] != "portable":
            raise self._wrong("layout", "must be 'portable'")
        additional = self._dict(top["additional_metadata"], "additional_metadata")
        if "toolchain" not in additional:
            raise self._wrong("additional_metadata", "has no 'toolchain': no digests, so nothing to trust")
        ours = dict(self._dict(additional["toolchain"], "additional_metadata.toolchain"))
        schema = ours.pop("schema", None)
        if type(schema) is not int or schema < 1:
            raise self._wrong("additional_metadata.toolchain.schema", "must be a whole number")
        if schema > SCHEMA:
            raise self._newer(f"{schema}, this program reads up to {SCHEMA}")
        files = self._files(ours.pop("files", None))
        components = self._dict(top["components"], "components")
        if list(components) != ["model"]:
            raise self._wrong("components", f"must hold 'model' and nothing else, has {list(components)}")
        body = self._dict(components["model"], "components.model")
        self._keys(
            body,
            "components.model",
            required={"variants"},
            optional={"component_name", "additional_metadata"},
        )
        variants = tuple(
            self._variant(name, value, files)
            for name, value in self._dict(body["variants"], "components.model.variants").items()
        )
        return Manifest(
            name=self._text(top.get("package_name", ""), "package_name"),
            version=self._text(top.get("package_version", ""), "package_version"),
            description=self._text(top.get("description", ""), "description"),
            variants=variants,
            files=MappingProxyType(files),
            metadata=MappingProxyType(ours),
            content=self._content,
        )

    def _version(self, top: dict[str, Any]) -> None:
        version = top.get("schema_version")
        if not isinstance(version, str) or not re.fullmatch(r"\d{1,4}\.\d{1,4}", version):
            raise self._wrong("schema_version", f"must be a text like '1.0', is {version!r}")
        if int(version.partition(".")[0]) != 1:
            raise self._newer(f"package schema {version}, this program reads 1.x")

    def _files(self, value: Any) -> dict[str, FileEntry]:
        where = "additional_metadata.toolchain.files"
        files: dict[str, FileEntry] = {}
        for name, entry in self._dict(value, where).items():
            at = f"{where}[{name!r}]"
            self._relative(name, at)
            if name == "manifest.json":
                raise self._wrong(at, "the manifest cannot list itself")
            entry = self._dict(entry, at)
            self._keys(entry, at, required={"sha256", "size"}, optional=set())
            digest, size = entry["sha256"], entry["size"]
            if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
                raise self._wrong(at, "sha256 must be 64 lower-case hex digits")
            if type(size) is not int or size < 0:
                raise self._wrong(at, "size must be a number of bytes")
            files[name] = FileEntry(digest, size)
        return files

    def _variant(self, name: str, value: Any, files: Mapping[str, FileEntry]) -> Variant:
        where = f"variant {name!r}"
        if not _NAME.fullmatch(name):
            raise self._wrong(where, "the name must be letters, digits, '.', '_', '+' and '-'")
        body = self._dict(value, where)
        self._keys(
            body,
            where,
            required={"executor_info"},
            optional={"variant_directory", "ep", "device", "compatibility_string", "additional_metadata"},
        )
        directory = self._relative(body.get("variant_directory", name), f"{where}, variant_directory")
        executors = self._dict(body["executor_info"], f"{where}, executor_info")
        if "ort" in executors:
            self._check_ort(executors["ort"], directory, files, f"{where}, executor_info.ort")
        where = f"{where}, executor_info.toolchain"
        ours = self._dict(executors.get("toolchain"), where)
        self._keys(
            ours,
            where,
            required={"target", "precision"},
            optional={"model_file", "prepared_file", "fingerprint", "session_options", "remarks"},
        )
        paths: dict[str, str | None] = {}
        for key in ("model_file", "prepared_file"):
            paths[key] = ours.get(key)
            if paths[key] is not None:
                self._listed(ours[key], directory, files, f"{where}.{key}")
        if paths["model_file"] is None and paths["prepared_file"] is None:
            raise self._wrong(where, "has neither model_file nor prepared_file")
        fingerprint = self._dict(ours.get("fingerprint", {}), f"{where}.fingerprint")
        for key, text in fingerprint.items():
            self._text(text, f"{where}.fingerprint.{key}")
        remarks = ours.get("remarks", [])
        if not isinstance(remarks, list):
            raise self._wrong(f"{where}.remarks", "must be a list of texts")
        try:
            target = Target.parse(self._text(ours["target"], f"{where}.target"))
        except Error as error:
            raise self._wrong(f"{where}.target", error.what) from None
        return Variant(
            name=name,
            directory=directory,
            execution_provider=None if "ep" not in body else self._text(body["ep"], f"variant {name!r}, ep"),
            device_class=None if "device" not in body else self._text(body["device"], f"variant {name!r}, device"),
            target=target,
            precision=self._text(ours["precision"], f"{where}.precision"),
            model_file=paths["model_file"],
            prepared_file=paths["prepared_file"],
            fingerprint=MappingProxyType(fingerprint),
            session_options=MappingProxyType(self._dict(ours.get("session_options", {}), f"{where}.session_options")),
            remarks=tuple(self._text(text, f"{where}.remarks") for text in remarks),
        )

    def _check_ort(self, value: Any, directory: str, files: Mapping[str, FileEntry], where: str) -> None:
        """We do not use this slot, but ONNX Runtime would: it may lead it nowhere that we would not go."""
        body = self._dict(value, where)
        self._keys(body, where, required={"model_file"}, optional={"session_options", "provider_options"})
        self._listed(body["model_file"], directory, files, f"{where}.model_file")
        for key in ("session_options", "provider_options"):
            for option, text in self._dict(body.get(key, {}), f"{where}.{key}").items():
                self._text(text, f"{where}.{key}.{option}")
                if option in _WRITING_OPTIONS:
                    raise self._wrong(f"{where}.{key}.{option}", "makes ONNX Runtime write files")

    def _listed(self, value: Any, directory: str, files: Mapping[str, FileEntry], where: str) -> None:
        path = f"{directory}/{self._relative(value, where)}"
        if path not in files:
            raise self._wrong(where, f"{path!r} is not in the list of files")

    def _relative(self, value: Any, where: str) -> str:
        """A POSIX path in its one form: relative, no '.', '..', '//', backslash, drive, control character."""
        text = self._text(value, where)
        parts = text.split("/")
        if (
            not text.isprintable()
            or "\\" in text
            or ":" in text
            or len(text) > 1024
            or any(part in ("", ".", "..") for part in parts)
        ):
            raise self._wrong(where, f"{text[:200]!r} is not a plain relative POSIX path")
        return text

    def _dict(self, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(where, f"must be an object, is {_json_type(value)}")
        return value

    def _text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise self._wrong(where, f"must be a text, is {_json_type(value)}")
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise self._wrong(where, "has half of a surrogate pair, which cannot be written or printed")
        return value

    def _keys(self, body: Mapping[str, Any], where: str, *, required: set[str], optional: set[str]) -> None:
        missing = sorted(required - body.keys())
        if missing:
            raise self._wrong(where, f"has no {', '.join(map(repr, missing))}")
        unknown = sorted(body.keys() - required - optional)
        if unknown:
            raise self._wrong(where, f"has the unknown key {unknown[0]!r}")

    def _wrong(self, where: str, what: str) -> InvalidArtifact:
        return InvalidArtifact(
            f"{where}: {what}", where=self._path, hint="the artifact is damaged or not ours: build it again"
        )

    def _newer(self, what: str) -> InvalidArtifact:
        return InvalidArtifact(
            f"the artifact is of another schema: {what}",
            where=self._path,
            hint="upgrade onnx-toolchain, or build the artifact again",
        )


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "missing"}
    return names.get(type(value), "a number")
