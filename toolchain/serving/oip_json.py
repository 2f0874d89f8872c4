"""Requests and answers of Open Inference Protocol v2 over REST, as JSON with binary sections after it.

The protocol: https://github.com/kserve/open-inference-protocol; the binary sections: Triton's binary tensor data
extension, https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_binary_data.html

Before a body's data is looked at, its header (the JSON) is read and checked against the model. Clients send the same
header again and again, so one whose inputs are all binary is remembered with what was found out, and the next costs a
look-up. Nothing of the data is ever remembered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pydantic_core

from toolchain.serving import shared_memory, tensors, wire
from toolchain.serving.base import InvalidRequest, ModelInfo, Request, Response, Shared, Span, TooLarge

#: Headers longer than this are not remembered, and no more of them than this.
_REMEMBERED_BYTES, _REMEMBERED = 4096, 256
#: A parser of JSON holds the event loop for as long as it takes: some 4 ms a MB on the machine it was measured on.
MAX_JSON_BYTES = 16 << 20
#: Numbers are written as JSON in pieces of so many: one call holds the interpreter for some milliseconds at most.
_PIECE = 1 << 16
_NO_JSON_FORM = ("FP16", "BF16")


@dataclasses.dataclass(frozen=True, slots=True)
class _Input:
    """One input as a header has it: ``end`` is where its binary section ends, None where ``array`` is its data, or
    ``span`` is where that lies."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    start: int
    end: int | None
    array: np.ndarray | None
    span: Span | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Header:
    """All that the JSON of a request says, checked against ``info``."""

    info: ModelInfo
    inputs: tuple[_Input, ...]
    outputs: tuple[str, ...]
    binary: frozenset[str]
    id: str
    priority: int
    timeout_ns: int | None
    end: int
    shared: Shared | None = None


class Decoder:
    """Reads the bodies of inference requests. Used on one thread.

    Args:
        max_bytes: of all inputs of one request together.
        shared: tensors may lie in shared memory.
    """

    def __init__(self, *, max_bytes: int, shared: bool = False) -> None:
        self._max_bytes = max_bytes
        self._shared = shared
        self._known: dict[tuple[str, str, bytes], _Header] = {}

    def read(
        self, body: bytes | memoryview, header_size: int | None, info: ModelInfo, *, version: str, received_ns: int
    ) -> tuple[Request, frozenset[str]]:
        """Reads one body.

        Args:
            body: whole, and decompressed.
            header_size: the bytes of its JSON, as ``Inference-Header-Content-Length`` says; None: all of it. 0 is
                Triton's raw binary request: the body is the data of the model's only input.
            info: the model that was asked for.
            version: the version asked for, "" where none was.
            received_ns: ``time.monotonic_ns()`` when the request came.

        Returns:
            The request, its arrays views of ``body``, and the outputs that are not wanted as lists of numbers.

        Raises:
            InvalidRequest, TooLarge: as ``base`` says.
        """
        if header_size == 0:
            header = _raw(info, len(body), self._max_bytes)
            header_size = 0
        else:
            header = self._header(body, header_size, info)
            header_size = len(body) if header_size is None else header_size
        data = memoryview(body)[header_size:]
        if header.end != len(data):
            raise InvalidRequest(
                f"the inputs' binary_data_size come to {header.end} bytes, and {len(data)} follow the JSON"
            )
        arrays = {}
        for item in header.inputs:
            array = item.array
            if item.span is not None:
                continue
            if array is None:
                array = wire.from_bytes(item.name, item.datatype, item.shape, data[item.start : item.end])
            arrays[item.name] = array
        deadline = None if header.timeout_ns is None else received_ns + header.timeout_ns
        request = Request(
            info.name, version, arrays, header.outputs, header.id, header.priority, deadline, received_ns, header.shared
        )
        return request, header.binary

    def _header(self, body: bytes | memoryview, size: int | None, info: ModelInfo) -> _Header:
        if size is not None and not 0 < size <= len(body):
            raise InvalidRequest(f"Inference-Header-Content-Length is {size}, and the body has {len(body)} bytes")
        text = bytes(body if size is None else body[:size])
        if len(text) > _REMEMBERED_BYTES:
            return self._parsed(text, size is not None, info)
        key = (info.name, info.version, text)
        header = self._known.get(key)
        if header is None or header.info is not info:
            header = self._parsed(text, size is not None, info)
            if all(item.array is None for item in header.inputs):
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[key] = header
        return header

    def _parsed(self, text: bytes, sections: bool, info: ModelInfo) -> _Header:
        return _parsed(text, sections, info, self._max_bytes, self._shared)


def load_json(text: bytes) -> Any:
    """JSON values. Raises InvalidRequest for what is none (as NaN and Infinity), TooLarge beyond MAX_JSON_BYTES."""
    if len(text) > MAX_JSON_BYTES:
        raise TooLarge(f"{len(text)} bytes of JSON, and at most {MAX_JSON_BYTES} are taken", hint="send binary data")
    try:
        return pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


def dump_json(values: Any, *, numbers: str = "constants") -> bytes:
    """JSON text. ``numbers`` says how NaN and infinities are written: ``constants``, as Triton writes them (and its
    clients read them), or ``strings``, which any parser reads."""
    return pydantic_core.to_json(values, inf_nan_mode=numbers)  # type: ignore[arg-type]


def is_long(response: Response, binary: frozenset[str]) -> bool:
    """Whether writing an answer as JSON takes so long that it is better done in a thread."""
    return sum(array.size for name, array in response.outputs.items() if name not in binary) > _PIECE


class Encoder:
    """Writes answers; on the event loop's thread, but for those that are long.

    The JSON of answers that are all binary is remembered by their shapes.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], bytes] = {}

    def write(self, response: Response, binary: frozenset[str]) -> tuple[bytes, int | None]:
        """An answer as a body, and the size of its JSON where binary data may follow that.

        Args:
            response: what the model gave.
            binary: the outputs to write in binary; the others are lists of numbers, row by row. What was written to
                shared memory is in neither form.
        """
        if not binary:
            return _with_id(_tree(response, binary), response.id), None
        written = response.written
        data = [
            wire.to_bytes(array) for name, array in response.outputs.items() if name in binary and name not in written
        ]
        if len(data) + len(written) == len(response.outputs):
            key = (
                response.model,
                response.version,
                *[(name, array.dtype, array.shape) for name, array in response.outputs.items()],
                # Of strings the shape does not say how long they are.
                *[len(raw) for raw in data],
                written,
            )
            text = self._known.get(key)
            if text is None:
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                text = self._known[key] = _tree(response, binary)
        else:
            text = _tree(response, binary)
        text = _with_id(text, response.id)
        return b"".join((text, *data)), len(text) if data else None


def _tree(response: Response, binary: frozenset[str]) -> bytes:
    outputs = []
    for name, array in response.outputs.items():
        output: dict[str, Any] = {"name": name, "datatype": wire.name_of(array.dtype), "shape": array.shape}
        if name in response.written:
            # Without parameters: Triton's C++ client expects a binary_data_size where there are any.
            outputs.append(dump_json(output))
        elif name in binary:
            output["parameters"] = {"binary_data_size": len(wire.to_bytes(array))}
            outputs.append(dump_json(output))
        else:
            outputs.append(b'%s,"data":%s}' % (dump_json(output)[:-1], _data(array.reshape(-1))))
    head = dump_json({"model_name": response.model, "model_version": response.version})
    return b'%s,"outputs":[%s]}' % (head[:-1], b",".join(outputs))


def _data(flat: np.ndarray) -> bytes:
    """A list of numbers."""
    pieces = [dump_json(flat[at : at + _PIECE].tolist())[1:-1] for at in range(0, flat.size, _PIECE)]
    return b"[%s]" % b",".join(pieces)


def _with_id(text: bytes, identifier: str) -> bytes:
    return b'%s,"id":%s}' % (text[:-1], dump_json(identifier)) if identifier else text


def _raw(info: ModelInfo, size: int, max_bytes: int) -> _Header:
    """A body without JSON: the data of the only input, whose shape follows from how much there is."""
    if len(info.inputs) != 1:
        raise InvalidRequest(
            f"a request without JSON has one input, and model {info.name!r} has {len(info.inputs)}",
            hint="send JSON first, and its size as Inference-Header-Content-Length",
        )
    spec = info.inputs[0]
    name = wire.datatype(spec)
    shape = wire.dims(spec)
    if info.max_batch_size:
        shape[0] = 1
    if shape.count(-1) > 1 or spec.shape is None:
        raise InvalidRequest(f"a request without JSON does not say the shape of {spec}", hint="send JSON first")
    if -1 in shape:
        row = -math.prod(shape) * (1 if name == "BYTES" else tensors.DTYPES[name][1])
        if name == "BYTES" or row == 0:
            raise InvalidRequest(f"a request without JSON does not say the shape of {spec}", hint="send JSON first")
        shape[shape.index(-1)] = size // row
    tensors.check(info, {spec.name: (name, shape)}, max_bytes=max_bytes)
    _check_json_form(info, (), frozenset(spec.name for spec in info.outputs))
    item = _Input(spec.name, name, tuple(shape), 0, size, None)
    return _Header(info, (item,), (), frozenset(spec.name for spec in info.outputs), "", 0, None, size)


def _parsed(text: bytes, sections: bool, info: ModelInfo, max_bytes: int, shared: bool) -> _Header:
    tree = load_json(text)
    if not isinstance(tree, dict):
        raise InvalidRequest("the JSON is no object", hint='send {"inputs": [...]}')
    identifier = tree.get("id", "")
    if type(identifier) is not str:
        raise InvalidRequest("id is no text")
    parameters = _object(tree, "parameters", "the request")
    priority, timeout_ns = wire.read_parameters(parameters, received_ns=0)
    entries = [_entry(entry, "input") for entry in _list(tree, "inputs")]
    asked: dict[str, tuple[str, list[int]]] = {}
    for entry in entries:
        if entry["name"] in asked:
            raise InvalidRequest(f"input {entry['name']!r} is given twice")
        asked[entry["name"]] = _said(entry)
    tensors.check(info, asked, max_bytes=max_bytes)
    at = 0
    items: list[_Input] = []
    for entry in entries:
        datatype, shape = asked[entry["name"]]
        items.append(_input(entry, datatype, tuple(shape), at, sections, max_bytes if shared else None))
        at = items[-1].end if items[-1].end is not None else at
    outputs, binary, to_memory = _outputs(tree, parameters, info, shared)
    in_memory = tuple((item.name, item.datatype, item.shape, item.span) for item in items if item.span is not None)
    places = Shared(in_memory, to_memory) if in_memory or to_memory else None
    return _Header(info, tuple(items), outputs, binary, identifier, priority, timeout_ns, at, places)


def _input(
    entry: dict[str, Any], datatype: str, shape: tuple[int, ...], at: int, sections: bool, most_shared: int | None
) -> _Input:
    """``most_shared``: the bytes that it may have in shared memory; None where it may not be there."""
    name = entry["name"]
    parameters = _object(entry, "parameters", f"input {name!r}")
    wire.refuse(parameters, shared=most_shared is not None)
    span = None if most_shared is None else shared_memory.span(f"input {name!r}", parameters)
    if span is not None and most_shared is not None:
        if "data" in entry or "binary_data_size" in parameters:
            raise InvalidRequest(f"input {name!r} lies in shared memory, and has data in the request", hint="send one")
        shared_memory.check_input(name, datatype, shape, span, max_bytes=most_shared)
        return _Input(name, datatype, shape, at, None, None, span)
    size = parameters.get("binary_data_size")
    if size is None:
        if "data" not in entry:
            raise InvalidRequest(f"input {name!r} has no data", hint="send data, or binary data and binary_data_size")
        if datatype in _NO_JSON_FORM:
            raise InvalidRequest(f"input {name!r} is {datatype}, which JSON has no form for", hint="send binary data")
        return _Input(name, datatype, shape, at, None, wire.from_numbers(name, datatype, shape, entry["data"]))
    if "data" in entry:
        raise InvalidRequest(f"input {name!r} has both data and binary_data_size", hint="send one")
    if not sections:
        raise InvalidRequest(
            f"input {name!r} has a binary_data_size, and the request no Inference-Header-Content-Length"
        )
    if type(size) is not int or size < 0:
        raise InvalidRequest(
            f"input {name!r} has the binary_data_size {str(size)[:40]}", hint="it is a number of bytes"
        )
    if datatype != "BYTES" and size != math.prod(shape) * tensors.DTYPES[datatype][1]:
        raise InvalidRequest(
            f"input {name!r} has a binary_data_size of {size}, and its shape {list(shape)} of {datatype} "
            f"takes {math.prod(shape) * tensors.DTYPES[datatype][1]}"
        )
    return _Input(name, datatype, shape, at, at + size, None)


def _outputs(
    tree: dict[str, Any], parameters: Mapping[str, Any], info: ModelInfo, shared: bool
) -> tuple[tuple[str, ...], frozenset[str], dict[str, Span]]:
    """The outputs asked for, those that are not wanted as numbers, and where some of these are to be written."""
    default = _flag(parameters, "binary_data_output", False, "the request")
    entries = [_entry(entry, "output") for entry in _list(tree, "outputs")] if tree.get("outputs") is not None else []
    if not entries:
        names = frozenset(spec.name for spec in info.outputs) if default else frozenset()
        _check_json_form(info, (), names)
        return (), names, {}
    outputs = tuple(entry["name"] for entry in entries)
    tensors.check_outputs(info, outputs)
    binary = set()
    spans: dict[str, Span] = {}
    for entry in entries:
        of = _object(entry, "parameters", f"output {entry['name']!r}")
        wire.refuse(of, shared=shared)
        if shared and (span := shared_memory.span(f"output {entry['name']!r}", of)) is not None:
            spans[entry["name"]] = span
            binary.add(entry["name"])
        elif _flag(of, "binary_data", default, f"output {entry['name']!r}"):
            binary.add(entry["name"])
    _check_json_form(info, outputs, frozenset(binary))
    return outputs, frozenset(binary), spans


def _check_json_form(info: ModelInfo, outputs: tuple[str, ...], binary: frozenset[str]) -> None:
    """Before the model runs: whether its answer can be written as asked."""
    for spec in info.outputs:
        if (not outputs or spec.name in outputs) and wire.datatype(spec) in _NO_JSON_FORM and spec.name not in binary:
            raise InvalidRequest(
                f"output {spec.name!r} is {wire.datatype(spec)}, which JSON has no form for",
                hint="ask for it with binary_data, or for all with binary_data_output",
            )


def _said(entry: dict[str, Any]) -> tuple[str, list[int]]:
    datatype, shape = entry.get("datatype"), entry.get("shape")
    if type(datatype) is not str:
        raise InvalidRequest(f"input {entry['name']!r} has no datatype")
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise InvalidRequest(f"input {entry['name']!r} has no shape", hint="it is a list of whole numbers")
    return datatype, shape


def _entry(entry: object, what: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or type(entry.get("name")) is not str:
        raise InvalidRequest(f"an {what} has no name")
    return entry


def _list(tree: Mapping[str, Any], name: str) -> list[Any]:
    value = tree.get(name)
    if not isinstance(value, list):
        raise InvalidRequest(f"the request has no list of {name}")
    return value


def _object(tree: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    value = tree.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} of {where} is no object")
    return value


def _flag(parameters: Mapping[str, Any], name: str, default: bool, where: str) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise InvalidRequest(f"{name} of {where} is neither true nor false")
    return value
