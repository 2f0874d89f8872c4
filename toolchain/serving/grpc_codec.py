"""Requests and answers of Open Inference Protocol v2 over gRPC, from and to the bytes of their messages.

The messages are those of tritonclient (``service_pb2``), which carries the protocol. What holds the tensors is not
given to protobuf: it would copy every tensor twice. A message is a row of fields, each a tag, a size and its bytes
(https://protobuf.dev/programming-guides/encoding), so those of ``raw_input_contents`` and ``id`` are told apart by
walking over it, and tensors are views of the message as it came. What is left, the header, is parsed by protobuf and
checked against the model, and remembered: clients send the same one again and again, and the next costs a look-up.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from toolchain.serving import shared_memory, tensors, wire
from toolchain.serving.base import InvalidRequest, ModelInfo, Request, Response, Shared, Span

#: Headers longer than this are not remembered, and no more of them than this.
_REMEMBERED_BYTES, _REMEMBERED = 4096, 256
_LENGTH_DELIMITED = 2


def _tag(message: Any, field: str) -> int:
    return int(message.DESCRIPTOR.fields_by_name[field].number) << 3 | _LENGTH_DELIMITED


_NAME = _tag(service_pb2.ModelInferRequest, "model_name")
_VERSION = _tag(service_pb2.ModelInferRequest, "model_version")
_ID = _tag(service_pb2.ModelInferRequest, "id")
_RAW = _tag(service_pb2.ModelInferRequest, "raw_input_contents")
_ANSWER_ID = bytes([_tag(service_pb2.ModelInferResponse, "id")])
_ANSWER_RAW = bytes([_tag(service_pb2.ModelInferResponse, "raw_output_contents")])
_STREAM_ERROR = bytes([_tag(service_pb2.ModelStreamInferResponse, "error_message")])
_STREAM_ANSWER = bytes([_tag(service_pb2.ModelStreamInferResponse, "infer_response")])

#: The protocol's element types → the field of InferTensorContents that has them. FP16 and BF16 have none.
_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """A ModelInferRequest, taken apart.

    Attributes:
        header: all of it but its id and its raw tensors.
        model, version, id: of the request.
        raw: its raw tensors, views of the message.
    """

    header: bytes
    model: str
    version: str
    id: str
    raw: list[memoryview]


@dataclasses.dataclass(frozen=True, slots=True)
class _Header:
    """What a header says, checked against ``info``. ``array`` is None for inputs whose data is raw; those in shared
    memory are in ``shared`` alone."""

    info: ModelInfo
    inputs: tuple[tuple[str, str, tuple[int, ...], np.ndarray | None], ...]
    outputs: tuple[str, ...]
    priority: int
    timeout_ns: int | None
    shared: Shared | None = None


def split(message: bytes) -> Message:
    """Takes a serialised ModelInferRequest apart. Raises InvalidRequest where it is none."""
    end = len(message)
    view = memoryview(message)
    kept: list[tuple[int, int]] = []
    raw: list[memoryview] = []
    model = version = identifier = b""
    at = 0
    try:
        while at < end:
            start = at
            tag = message[at]
            size = message[at + 1]
            at += 2
            # All fields are length-delimited, with numbers below 16; what else there may be is for protobuf to judge.
            if tag & 7 != _LENGTH_DELIMITED or tag > 127:
                return _split_by_protobuf(message)
            if size > 127:
                size, at = _long_size(message, at - 1)
            stop = at + size
            if stop > end:
                raise InvalidRequest("the message is cut short")
            if tag == _RAW:
                raw.append(view[at:stop])
            elif tag == _ID:
                identifier = message[at:stop]
            else:
                if tag == _NAME:
                    model = message[at:stop]
                elif tag == _VERSION:
                    version = message[at:stop]
                if kept and kept[-1][1] == start:
                    kept[-1] = (kept[-1][0], stop)
                else:
                    kept.append((start, stop))
            at = stop
        header = b"".join([message[start:stop] for start, stop in kept])
        return Message(header, str(model, "utf-8"), str(version, "utf-8"), str(identifier, "utf-8"), raw)
    except IndexError:
        raise InvalidRequest("the message is cut short") from None
    except UnicodeDecodeError:
        raise InvalidRequest("the message has a name that is not UTF-8") from None


class Decoder:
    """Reads inference requests. Used on one thread.

    Args:
        max_bytes: of all inputs of one request together.
        shared: tensors may lie in shared memory.
    """

    def __init__(self, *, max_bytes: int, shared: bool = False) -> None:
        self._max_bytes = max_bytes
        self._shared = shared
        self._known: dict[tuple[str, str, bytes], _Header] = {}

    def read(self, message: Message, info: ModelInfo, *, received_ns: int, deadline_ns: int | None) -> Request:
        """Reads one request.

        Args:
            message: of ``split``.
            info: of the model that it names.
            received_ns: ``time.monotonic_ns()`` when it came.
            deadline_ns: what its client said to gRPC; its parameter ``timeout`` may be sooner.

        Raises:
            InvalidRequest, TooLarge, Unsupported: as ``base`` says.
        """
        key = (info.name, info.version, message.header)
        header = self._known.get(key)
        if header is None or header.info is not info:
            header = _parsed(message.header, info, self._max_bytes, self._shared)
            plain = all(array is None for _, _, _, array in header.inputs)
            if plain and len(message.header) <= _REMEMBERED_BYTES:
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[key] = header
        if header.timeout_ns is not None:
            by_timeout = received_ns + header.timeout_ns
            deadline_ns = by_timeout if deadline_ns is None else min(by_timeout, deadline_ns)
        return Request(
            info.name,
            message.version,
            _arrays(header, message.raw),
            header.outputs,
            message.id,
            header.priority,
            deadline_ns,
            received_ns,
            header.shared,
        )


class Encoder:
    """Writes answers. Used on one thread."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], bytes] = {}

    def write(self, response: Response) -> bytes:
        """A serialised ModelInferResponse."""
        key: tuple[Any, ...] = (
            response.model,
            response.version,
            *[(name, array.dtype, array.shape) for name, array in response.outputs.items()],
        )
        header = self._known.get(key)
        if header is None:
            header = _answer_header(response)
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[key] = header
        parts: list[bytes | memoryview] = [header]
        if response.id:
            parts += _field(_ANSWER_ID, response.id.encode())
        for name, array in response.outputs.items():
            # Nothing stands for what is in shared memory: Triton's C++ client looks there for every output.
            parts += _field(_ANSWER_RAW, b"" if name in response.written else wire.to_bytes(array))
        return b"".join(parts)


def stream_answer(answer: bytes) -> bytes:
    """A serialised ModelStreamInferResponse with a serialised ModelInferResponse in it."""
    return b"".join(_field(_STREAM_ANSWER, answer))


def stream_error(text: str, identifier: str) -> bytes:
    """A serialised ModelStreamInferResponse that tells what went wrong with the request of that id."""
    answer = service_pb2.ModelInferResponse(id=identifier).SerializeToString()
    return b"".join(_field(_STREAM_ERROR, text.encode()) + _field(_STREAM_ANSWER, answer))


def _long_size(message: bytes, at: int) -> tuple[int, int]:
    size = shift = 0
    while True:
        byte = message[at]
        at += 1
        size |= (byte & 127) << shift
        if byte < 128:
            return size, at
        shift += 7
        if shift > 63:
            raise InvalidRequest("the message has a size that is none")


def _split_by_protobuf(message: bytes) -> Message:
    """For messages with fields that the protocol does not have, as a newer version of it might send."""
    try:
        request = service_pb2.ModelInferRequest.FromString(message)
    except DecodeError:
        raise InvalidRequest("the message is no ModelInferRequest") from None
    raw = [memoryview(data) for data in request.raw_input_contents]
    identifier = request.id
    request.ClearField("raw_input_contents")
    request.ClearField("id")
    request.DiscardUnknownFields()
    return Message(request.SerializeToString(), request.model_name, request.model_version, identifier, raw)


def _field(tag: bytes, data: bytes | memoryview) -> list[bytes | memoryview]:
    size = len(data)
    if size < 128:
        return [tag, bytes((size,)), data]
    varint = bytearray()
    while size > 127:
        varint.append(size & 127 | 128)
        size >>= 7
    varint.append(size)
    return [tag, bytes(varint), data]


def _answer_header(response: Response) -> bytes:
    header = service_pb2.ModelInferResponse(model_name=response.model, model_version=response.version)
    for name, array in response.outputs.items():
        header.outputs.add(name=name, datatype=wire.name_of(array.dtype), shape=array.shape)
    written: bytes = header.SerializeToString()
    return written


def _parsed(header: bytes, info: ModelInfo, max_bytes: int, shared: bool) -> _Header:
    try:
        request = service_pb2.ModelInferRequest.FromString(header)
    except DecodeError:
        raise InvalidRequest("the message is no ModelInferRequest") from None
    priority, timeout_ns = wire.read_parameters(_parameters(request.parameters), received_ns=0)
    asked: dict[str, tuple[str, list[int]]] = {}
    for item in request.inputs:
        if item.name in asked:
            raise InvalidRequest(f"input {item.name!r} is given twice")
        wire.refuse(_parameters(item.parameters), shared=shared)
        asked[item.name] = (item.datatype, list(item.shape))
    tensors.check(info, asked, max_bytes=max_bytes)
    outputs = tuple(item.name for item in request.outputs)
    tensors.check_outputs(info, outputs)
    to_memory: dict[str, Span] = {}
    for item in request.outputs:
        parameters = _parameters(item.parameters)
        wire.refuse(parameters, shared=shared)
        if shared and (span := shared_memory.span(f"output {item.name!r}", parameters)) is not None:
            to_memory[item.name] = span
    inputs: list[tuple[str, str, tuple[int, ...], np.ndarray | None]] = []
    in_memory: list[tuple[str, str, tuple[int, ...], Span]] = []
    for item in request.inputs:
        spec = (item.name, item.datatype, tuple(item.shape))
        if shared and (span := shared_memory.span(f"input {item.name!r}", _parameters(item.parameters))) is not None:
            if item.HasField("contents"):
                raise InvalidRequest(f"input {item.name!r} lies in shared memory, and has contents", hint="send one")
            shared_memory.check_input(*spec, span, max_bytes=max_bytes)
            in_memory.append((*spec, span))
        else:
            inputs.append((*spec, _typed(item) if item.HasField("contents") else None))
    places = Shared(tuple(in_memory), to_memory) if in_memory or to_memory else None
    return _Header(info, tuple(inputs), outputs, priority, timeout_ns, places)


def _parameters(of: Any) -> dict[str, Any]:
    return {name: getattr(value, value.WhichOneof("parameter_choice") or "bool_param") for name, value in of.items()}


def _typed(item: Any) -> np.ndarray:
    """A tensor out of InferTensorContents."""
    field = _CONTENTS.get(item.datatype)
    filled = [descriptor.name for descriptor, _ in item.contents.ListFields()]
    if field is None or any(name != field for name in filled):
        raise InvalidRequest(
            f"input {item.name!r} is {item.datatype}, and has its data in {filled or 'contents'}",
            hint=f"send {field}" if field else "send raw_input_contents",
        )
    values: list[Any] = list(getattr(item.contents, field))
    if item.datatype == "BYTES":
        try:
            values = [str(value, "utf-8") for value in values]
        except UnicodeDecodeError:
            raise InvalidRequest(f"input {item.name!r} has a string that is not UTF-8") from None
    elif item.datatype in ("FP32", "FP64"):
        # Not from_numbers: a float here may be any, also one that JSON lacks.
        return wire.shaped(item.name, np.array(values, wire.numpy_dtype(item.datatype)), item.shape)
    return wire.from_numbers(item.name, item.datatype, tuple(item.shape), values)


def _arrays(header: _Header, raw: list[memoryview]) -> dict[str, np.ndarray]:
    if raw:
        if len(raw) != len(header.inputs):
            raise InvalidRequest(f"{len(raw)} raw_input_contents, and {len(header.inputs)} inputs")
        arrays = {}
        for (name, datatype, shape, array), data in zip(header.inputs, raw, strict=True):
            if array is not None:
                raise InvalidRequest(f"input {name!r} has contents, and there are raw_input_contents", hint="send one")
            arrays[name] = wire.from_bytes(name, datatype, shape, data)
        return arrays
    # An input without data is one of no elements: protobuf leaves out what is empty.
    nothing = memoryview(b"")
    return {
        name: wire.from_bytes(name, datatype, shape, nothing) if array is None else array
        for name, datatype, shape, array in header.inputs
    }
