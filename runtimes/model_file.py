"""Checks an ONNX file from anywhere before a parser or a runtime opens it. Needs no onnx.

An ONNX file is one protobuf ``ModelProto``; a tensor of it may name a second file (``external_data``:
location, offset, length) that runtimes then open in the user's name. ONNX Runtime follows hard links and
knows magic locations that stand for memory addresses, so every location is judged here first.

The scan walks the wire format (https://protobuf.dev/programming-guides/encoding/) over a memory map. It
descends only into messages that can hold a tensor, and steps over payloads by their length, so the weights
themselves are never read. A small message that nowhere contains the bytes ``location`` cannot name a file
and is stepped over whole.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from runtimes.base import InvalidModel

_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
#: Fields of GraphProto.
_INPUT, _OUTPUT = 11, 12

#: message -> field number -> message, for every path from ModelProto to a TensorProto or an opset. The tests
#: hold it against onnx's own descriptors, so a tensor field that a newer ONNX adds does not go unseen.
CHILDREN: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 8: "OperatorSetIdProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}

#: What a scan may cost: protobuf's own nesting limit, and about two seconds of fields.
_MAX_DEPTH = 100
_MAX_FIELDS = 5_000_000
#: Below this size a search for b"location" is cheaper than walking the message.
_SEARCHED_WHOLE = 1 << 16

_NOT_ONNX = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself", "run: git lfs pull"),
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint or an .npz is one)", "export it to ONNX first"),
    (b"\x93NUMPY", "a numpy array", None),
    (b"\x1f\x8b", "gzip-compressed", "decompress it first"),
    (b"<", "text that looks like HTML or XML, such as a download page", "download the file itself"),
    (b"{", "text that looks like JSON", None),
)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFile:
    """An ONNX file whose shell was checked.

    Attributes:
        path: the file, as it was given.
        data_files: the external-data files that it names, each once, in the order of first use; all are
            regular files below the model's folder.
        opset_imports: operator domain ("" is ONNX's own) to version.
        ir_version: of the file format.
        producer: the name of the program that wrote it, "" where it says none.
        shapes: inputs and outputs of the graph that are tensors, with the shape that they declare, as in
            ``TensorSpec``; runtimes forget the names of dimensions, or take no shape for a scalar's.
        element_types: the same tensors, with ONNX's number of their element type; 0 where none is declared.
        inputs, outputs: which of them go in and come out, in the order of the graph. Below IR version 4 the inputs
            are those with initializers too.
    """

    path: Path
    data_files: tuple[Path, ...]
    opset_imports: dict[str, int]
    ir_version: int
    producer: str
    shapes: dict[str, tuple[int | str | None, ...] | None]
    element_types: dict[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def unranked(self) -> frozenset[str]:
        """Inputs and outputs whose type states no shape at all."""
        return frozenset(name for name, shape in self.shapes.items() if shape is None)


def check_model_file(path: str | os.PathLike[str]) -> ModelFile:
    """Checks that a file is an ONNX model and that all it refers to is its own.

    It reads the outer structure only: whether the graph makes sense is the runtime's to say.

    Args:
        path: an ONNX file. It may itself be a symlink; what it refers to is looked for beside the link.

    Raises:
        InvalidModel: no such file; empty, truncated, or not protobuf (with the byte); no graph or IR
            version; external data at an absolute path, above the model's folder, behind a symlink, a hard
            link, not a regular file, or shorter than the model says.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InvalidModel("not a regular file", where=str(path))
            if status.st_size == 0:
                raise InvalidModel("the file is empty", where=f"{path}, byte 0", hint="export or download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Scan(path, data).model()
    except FileNotFoundError:
        raise InvalidModel(
            "there is no such file", where=str(path), hint="give an .onnx file, or the folder of an artifact"
        ) from None
    except IsADirectoryError:
        raise InvalidModel(
            "it is a folder", where=str(path), hint="give an .onnx file; an artifact has the exported one in export/"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL, a file that shrank meanwhile
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidModel(f"the file cannot be read: {reason}", where=str(path)) from error


def copy_model(model: ModelFile, directory: Path, *, name: str = "model.onnx") -> None:
    """Copies a checked model and its external data to ``directory/name``, each data file where it is named.

    Raises:
        InvalidModel: a data file is called as ``name`` is.
        OSError: the disk.
    """
    base = model.path.parent
    directory.mkdir(parents=True, exist_ok=True)
    for data_file in model.data_files:
        relative = data_file.relative_to(base)
        if relative.parts[0] in (name, "prepared"):
            raise InvalidModel(
                f"its external data is called {relative.as_posix()!r}, which the artifact uses itself",
                where=str(model.path),
                hint="save the model again with its data under another name",
            )
        target = directory / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data_file, target)
    shutil.copyfile(model.path, directory / name)


class _Scan:
    """One pass over one file. Not for use twice."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._fields_left = _MAX_FIELDS
        self._data_files: dict[Path, int] = {}  # file -> size in bytes
        self._locations: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int | str | None, ...] | None] = {}
        self._element_types: dict[str, int] = {}
        self._ends: dict[int, list[str]] = {_INPUT: [], _OUTPUT: []}

    def model(self) -> ModelFile:
        self._look_for_other_formats()
        ir_version, producer, has_graph = 0, "", False
        opsets: dict[str, int] = {}
        # (message, first byte, byte behind the last, depth). A list in place of recursion: what a hostile
        # file nests is our memory, not our stack.
        todo: list[tuple[str, int, int, int]] = []
        for number, wire, start, stop in self._fields(0, len(self._data), "ModelProto"):
            child = CHILDREN["ModelProto"].get(number)
            if child is not None and wire != _LEN:
                raise self._damaged(f"field {number} of ModelProto has wire type {wire}", start)
            if number == 1 and wire == _VARINT:
                ir_version = start
            elif number == 2 and wire == _LEN:
                producer = self._data[start:stop].decode("utf-8", "replace")
            elif child == "OperatorSetIdProto":
                domain, version = self._opset(start, stop)
                opsets[domain] = version
            elif child is not None:
                has_graph |= child == "GraphProto"
                todo.append((child, start, stop, 2))
        if not has_graph or ir_version < 1:
            missing = "IR version" if has_graph else "graph"
            raise InvalidModel(f"not an ONNX model: it has no {missing}", where=str(self._path))
        if ir_version >= 1 << 31:  # an int64 whose value no release has; negative ones read as huge
            raise InvalidModel(f"not an ONNX model: IR version {ir_version}", where=str(self._path))
        todo.reverse()
        while todo:
            message, start, stop, depth = todo.pop()
            if depth > _MAX_DEPTH:
                raise self._damaged(f"messages are nested more than {_MAX_DEPTH} deep", start)
            if message == "TensorProto":
                self._tensor(start, stop)
                continue
            children = CHILDREN[message]
            for number, wire, first, last in self._fields(start, stop, message):
                child = children.get(number)
                if child is None:
                    if depth == 2 and message == "GraphProto" and number in self._ends and wire == _LEN:
                        self._value_info(first, last, self._ends[number])
                    continue
                if wire != _LEN:
                    raise self._damaged(f"field {number} of {message} has wire type {wire}", first)
                if last - first <= _SEARCHED_WHOLE and self._data.find(b"location", first, last) < 0:
                    continue
                todo.append((child, first, last, depth + 1))
        return ModelFile(
            self._path,
            tuple(self._data_files),
            opsets,
            ir_version,
            producer,
            self._shapes,
            self._element_types,
            tuple(self._ends[_INPUT]),
            tuple(self._ends[_OUTPUT]),
        )

    def _look_for_other_formats(self) -> None:
        head = self._data[:64]
        for magic, what, hint in _NOT_ONNX:
            if head.startswith(magic):
                raise InvalidModel(f"not an ONNX model: it is {what}", where=f"{self._path}, byte 0", hint=hint)
        if head[4:8] == b"ORTM":
            raise InvalidModel(
                "not an ONNX model: it is in ONNX Runtime's own .ort format",
                where=f"{self._path}, byte 4",
                hint="take the .onnx file that it was made of",
            )

    def _fields(self, start: int, stop: int, message: str) -> Iterator[tuple[int, int, int, int]]:
        """Yields (field number, wire type, first byte, byte behind the last); for a varint (…, value, 0)."""
        data = self._data
        at = start
        while at < stop:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise self._damaged(f"more than {_MAX_FIELDS:,} fields outside of weights", at)
            tag_at = at
            tag = data[at]
            at += 1
            if tag > 127:
                tag, at = self._varint(tag_at, stop, message)
            number, wire = tag >> 3, tag & 7
            if number == 0 or number >= 1 << 29:
                raise self._damaged(f"field number {number} in {message}", tag_at)
            if wire == _LEN:
                size, at = self._varint(at, stop, message)
                end = at + size
                if end > stop:
                    raise self._damaged(
                        f"field {number} of {message} is {size:,} bytes long where {stop - at:,} are left",
                        tag_at,
                    )
                yield number, wire, at, end
                at = end
            elif wire == _VARINT:
                value, at = self._varint(at, stop, message)
                yield number, wire, value, 0
            elif wire in (_I64, _I32):
                end = at + (8 if wire == _I64 else 4)
                if end > stop:
                    raise self._damaged(f"field {number} of {message} ends in the middle", tag_at)
                yield number, wire, at, end
                at = end
            else:  # 3 and 4 are groups, which ONNX never had; 6 and 7 do not exist
                raise self._damaged(f"field {number} of {message} has wire type {wire}", tag_at)

    def _varint(self, at: int, stop: int, message: str) -> tuple[int, int]:
        data = self._data
        value = shift = 0
        begin = at
        while at < stop:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                if value >= 1 << 64:
                    break
                return value, at
            shift += 7
            if shift >= 70:
                break
        else:
            raise self._damaged(f"{message} ends in the middle of a number", begin)
        raise self._damaged(f"a number in {message} has more than 64 bits", begin)

    def _opset(self, start: int, stop: int) -> tuple[str, int]:
        domain, version = "", 0
        for number, wire, first, last in self._fields(start, stop, "OperatorSetIdProto"):
            if number == 1 and wire == _LEN:
                domain = self._data[first:last].decode("utf-8", "replace")
            elif number == 2 and wire == _VARINT:
                version = first
        return ("" if domain == "ai.onnx" else domain), version

    def _value_info(self, start: int, stop: int, names: list[str]) -> None:
        """Notes the name, declared shape and element type of an input or output of the main graph."""
        name, is_tensor, element_type = "", False, 0
        shape: tuple[int | str | None, ...] | None = None
        for number, wire, first, last in self._fields(start, stop, "ValueInfoProto"):
            if number == 1 and wire == _LEN:
                name = self._data[first:last].decode("utf-8", "replace")
            elif number == 2 and wire == _LEN:
                for kind, kind_wire, begin, end in self._fields(first, last, "TypeProto"):
                    if kind == 1 and kind_wire == _LEN:
                        is_tensor = True
                        for field, field_wire, at, behind in self._fields(begin, end, "TypeProto.Tensor"):
                            if field == 1 and field_wire == _VARINT:
                                element_type = at
                            elif field == 2 and field_wire == _LEN:
                                shape = tuple(self._dimensions(at, behind))
        if is_tensor:
            self._shapes[name] = shape
            self._element_types[name] = element_type
        names.append(name)

    def _dimensions(self, start: int, stop: int) -> Iterator[int | str | None]:
        """The entries of a TensorShapeProto: a size, a name, or None where it says neither, or no possible size."""
        for number, wire, first, last in self._fields(start, stop, "TensorShapeProto"):
            if number != 1 or wire != _LEN:
                continue
            dimension: int | str | None = None
            for field, kind, value, behind in self._fields(first, last, "TensorShapeProto.Dimension"):
                if field == 1 and kind == _VARINT:
                    dimension = value if value < 1 << 63 else None  # negative ones read as huge
                elif field == 2 and kind == _LEN:
                    dimension = self._data[value:behind].decode("utf-8", "replace") or None
            yield dimension

    def _tensor(self, start: int, stop: int) -> None:
        name = ""
        entries: dict[str, str] = {}
        for number, wire, first, last in self._fields(start, stop, "TensorProto"):
            if number == 8 and wire == _LEN:
                name = self._data[first:last].decode("utf-8", "replace")
            elif number == 13:
                if wire != _LEN:
                    raise self._damaged(f"field 13 of TensorProto has wire type {wire}", first)
                key, value = self._entry(first, last)
                if key == "location" and key in entries and entries[key] != value:
                    raise InvalidModel("a tensor names two external-data files", where=f"{self._path}, tensor {name!r}")
                entries[key] = value
        if "location" in entries:
            self._check_location(name, entries)

    def _entry(self, start: int, stop: int) -> tuple[str, str]:
        texts = {1: b"", 2: b""}
        for number, wire, first, last in self._fields(start, stop, "StringStringEntryProto"):
            if number in texts:
                if wire != _LEN:
                    raise self._damaged(f"field {number} of StringStringEntryProto is no text", first)
                texts[number] = self._data[first:last]
        try:
            return texts[1].decode("utf-8"), texts[2].decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged("an external-data entry is not UTF-8", start) from None

    def _check_location(self, tensor: str, entries: dict[str, str]) -> None:
        location = entries["location"]
        where = f"{self._path}, tensor {tensor!r}"
        file = self._locations.get(location)
        if file is None:
            try:
                file = _file_below(self._path.parent, location)
            except _Refused as refusal:
                raise InvalidModel(
                    f"external data {location!r}: {refusal}",
                    where=where,
                    hint="save the model again with its data as a plain file beside it",
                ) from None
            self._locations[location] = file
            self._data_files.setdefault(file, os.lstat(file).st_size)
        size = self._data_files[file]
        numbers = {}
        for key, default in (("offset", 0), ("length", None)):
            text = entries.get(key)
            if text is None:
                numbers[key] = default
            elif not (text.isascii() and text.isdigit() and len(text) < 20):
                raise InvalidModel(
                    f"external data {location!r}: {key} {text[:40]!r} is not a size in bytes", where=where
                )
            else:
                numbers[key] = int(text)
        offset, length = numbers["offset"] or 0, numbers["length"] or 0
        if offset + length > size:
            raise InvalidModel(
                f"external data {location!r} is too short: the tensor wants bytes {offset:,} to "
                f"{offset + length:,}, the file has {size:,}",
                where=where,
                hint="the file is truncated or belongs to another model: copy both again",
            )

    def _damaged(self, what: str, at: int) -> InvalidModel:
        at = min(at, len(self._data))
        return InvalidModel(
            f"not an ONNX model, or a damaged or truncated one: {what}",
            where=f"{self._path}, byte {at:,} of {len(self._data):,}",
            hint="export or download it again",
        )


class _Refused(Exception):
    """Why a location may not be opened."""


def _file_below(base: Path, location: str) -> Path:
    """The regular file that a location names below ``base``, or _Refused."""
    if not location or "\0" in location or not location.isprintable():
        raise _Refused("not a file name")
    if "*" in location:
        # ONNX Runtime takes */_ORT_MEM_ADDR_/* and the like as an address in this process.
        raise _Refused("a location with * can stand for a memory address")
    if "\\" in location or location[1:2] == ":" or location.startswith("/"):
        raise _Refused("not a relative POSIX path")
    parts = [part for part in location.split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        raise _Refused("it leads out of the model's folder")
    file = base
    for index, part in enumerate(parts):
        file = file / part
        try:
            status = os.lstat(file)
        except OSError as error:
            raise _Refused(error.strerror or "it cannot be read") from None
        if stat.S_ISLNK(status.st_mode):
            raise _Refused(f"{'/'.join(parts[: index + 1])} is a symlink")
        if index + 1 < len(parts):
            continue  # a file in a folder's place makes the next lstat fail
        if not stat.S_ISREG(status.st_mode):
            raise _Refused("not a regular file")
        if status.st_nlink > 1:
            raise _Refused("it is a hard link to a file that has another name too")
    return file
