"""Storage codecs: a model's weights as a few shared values, entropy coded in one compact file, and back.

Which values each weight tensor takes, and which value each of its elements, is ``clustering.py``'s. This is for the
disk and the wire only: ``decode`` gives an ordinary float model, as fast and as large as before.

The file, integers little-endian::

    magic 8 | length of the header, uint32 | header, JSON | graph without these weights, lzma | for each tensor: its
    values, float32 | its scales, float32 | its codes, one byte each, zlib or lzma, whichever is smaller |
    SHA-256 of all before, 32

Nothing is decompressed before digest, sizes and caps are checked, and the decoded graph passes ``read_onnx``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import lzma
import math
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import google.protobuf.message
import numpy as np
import onnx
import onnx_ir as ir
import pydantic

from passes.base import Declined
from runtimes import Error, InvalidInput, InvalidModel
from runtimes._unpack import zstd
from toolchain.clustering import Codec, Shared, check_levels, quantise
from toolchain.onnx_file import EXTERNAL_DATA_FROM, read_onnx, weights_size
from toolchain.storage import write_bytes

Coder = Literal["zlib", "lzma"]

MAGIC = b"\x89OTCW\r\n\x1a"
_DIGEST = 32
#: why a vector is not encoded
VECTOR = "it is a vector"
#: headers and graphs that are larger are none of ours
_MOST_HEADER = 64 << 20
_MOST_GRAPH = 512 << 20
_DTYPES: dict[str, np.dtype] = {
    "FLOAT": np.dtype(np.float32),
    "DOUBLE": np.dtype(np.float64),
    "FLOAT16": np.dtype(np.float16),
}


class _Tensor(pydantic.BaseModel):
    """A weight; ``index`` is its place among all tensors of the graph, see ``_tensors``; each index of ``axis`` has a
    scale."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    index: pydantic.NonNegativeInt
    dtype: Literal["FLOAT", "DOUBLE", "FLOAT16"]
    shape: list[pydantic.NonNegativeInt]
    axis: pydantic.NonNegativeInt
    values: int = pydantic.Field(ge=1, le=256)
    coder: Coder
    size: pydantic.NonNegativeInt


class _Header(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    version: Literal[2]
    codec: Codec
    graph_size: pydantic.NonNegativeInt
    graph_raw: int = pydantic.Field(ge=0, le=_MOST_GRAPH)
    tensors: list[_Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedTensor:
    """What became of a weight.

    Attributes:
        name: of the initializer, or of the output of its Constant.
        elements: of it.
        raw_bytes: as floats.
        encoded_bytes: of its values, scales and codes.
        entropy_bytes: what an ideal coder of single codes would need, without values and scales.
        nmse: squared error over the squared weights.
    """

    name: str
    elements: int
    raw_bytes: int
    encoded_bytes: int
    entropy_bytes: float
    nmse: float


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """What ``encode`` wrote.

    Attributes:
        size: of the file in bytes.
        graph_bytes: of which the graph, with all that was not encoded.
        tensors: those that were.
        kept: weights that are stored as they are, and why.
    """

    size: int
    graph_bytes: int
    tensors: tuple[EncodedTensor, ...]
    kept: tuple[Declined, ...]


def encode(model: ir.Model, path: Path, *, codec: Codec = "kmeans", levels: int = 16, smallest: int = 1024) -> Encoded:
    """Writes a model with its large weights encoded; the model stays as it is. What is written was decoded and
    compared first.

    Args:
        codec: kmeans or log.
        levels: values that a tensor may take: 2 to 256 of kmeans; of log 3 to 255, an odd number: zero, and as many
            negative as positive powers of two.
        smallest: weights of fewer elements, and vectors, stay as they are.

    Raises:
        InvalidInput: an unknown codec, or levels out of range.
        GraphError, InvalidModel, StorageError: nothing was written.
    """
    check_levels(codec, levels)
    proto = _proto_of(model)
    header_tensors: list[_Tensor] = []
    parts: list[bytes] = []
    report: list[EncodedTensor] = []
    kept: list[Declined] = []
    wanted: dict[int, bytes] = {}
    axes = _channel_axes(proto)
    for index, (name, tensor) in enumerate(_tensors(proto)):
        dtype = onnx.TensorProto.DataType.Name(tensor.data_type)
        if dtype not in _DTYPES:
            continue
        data = onnx.numpy_helper.to_array(tensor)
        reason = _why_not(data, smallest)
        if reason is not None:
            kept.append(Declined(name, reason))
            continue
        shared = quantise(data, codec=codec, levels=levels, axis=axes.get(name, 0) % data.ndim)
        coder, packed = _pack(shared.codes)
        entry = {"index": index, "dtype": dtype, "shape": list(data.shape), "axis": shared.axis}
        entry |= {"values": len(shared.values), "coder": coder, "size": len(packed)}
        header_tensors.append(_Tensor.model_validate(entry))
        tables = shared.values.astype("<f4").tobytes() + shared.scales.astype("<f4").tobytes()
        parts += [tables, packed]
        report.append(_reported(name, data, shared, len(tables) + len(packed)))
        wanted[index] = hashlib.sha256(shared.restored().astype(_DTYPES[dtype]).tobytes()).digest()
        _empty(tensor)
    graph = proto.SerializeToString()
    if len(graph) > _MOST_GRAPH:
        raise InvalidInput(
            f"what is not encoded takes {len(graph)} bytes, more than {_MOST_GRAPH}", hint="encode smaller weights too"
        )
    squeezed = lzma.compress(graph)
    header = _Header(
        version=2, codec=codec, graph_size=len(squeezed), graph_raw=len(graph), tensors=header_tensors
    ).model_dump_json()
    body = b"".join((MAGIC, struct.pack("<I", len(header)), header.encode(), squeezed, *parts))
    content = body + hashlib.sha256(body).digest()
    _check_round_trip(_decoded(content, path, EXTERNAL_DATA_FROM), graph, wanted)
    write_bytes(path, content)
    return Encoded(len(content), len(squeezed), tuple(report), tuple(kept))


def decode(path: Path, *, most_bytes: int = EXTERNAL_DATA_FROM) -> ir.Model:
    """Reads what ``encode`` wrote, from anyone, as an ordinary model.

    Args:
        most_bytes: of weights that may come out.

    Raises:
        InvalidModel: not such a file, damaged, or its weights are larger than ``most_bytes``.
        GraphError: the graph in it is not valid.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidModel(f"cannot read the file: {error.strerror}", where=str(path), hint="check the path") from error
    proto = _decoded(content, path, most_bytes)
    with tempfile.TemporaryDirectory(prefix="toolchain-") as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(proto.SerializeToString())
        return read_onnx(file)


def _decoded(content: bytes, path: Path, most_bytes: int) -> onnx.ModelProto:
    """The graph with its weights; ``path`` is for errors."""
    header, at = _opened(content, path)
    sizes = [math.prod(tensor.shape) * _DTYPES[tensor.dtype].itemsize for tensor in header.tensors]
    if sum(sizes) > most_bytes:
        raise InvalidModel(
            f"its weights take {sum(sizes)} bytes, more than {most_bytes}", where=str(path), hint="raise most_bytes"
        )
    raw = _unpack("lzma", content[at : at + header.graph_size], header.graph_raw, path)
    at += header.graph_size
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(raw)
    except google.protobuf.message.DecodeError as error:
        raise _damaged(path, f"its graph is no ONNX ({error})") from error
    found = [tensor for _, tensor in _tensors(proto)]
    for entry in header.tensors:
        if entry.index >= len(found) or _form(found[entry.index]) != (entry.dtype, entry.shape):
            raise _damaged(path, f"its graph has no weight {entry.index} of shape {entry.shape}")
        scales = entry.shape[entry.axis]
        tables = np.frombuffer(content, "<f4", entry.values + scales, at)
        at += 4 * (entry.values + scales)
        elements = math.prod(entry.shape)
        codes = np.frombuffer(_unpack(entry.coder, content[at : at + entry.size], elements, path), np.uint8)
        at += entry.size
        if codes.size and int(codes.max()) >= entry.values:
            raise _damaged(path, f"a code of weight {entry.index} stands for nothing")
        shared = Shared(tables[: entry.values], tables[entry.values :], codes.reshape(entry.shape), entry.axis)
        data = shared.restored().astype(_DTYPES[entry.dtype])
        found[entry.index].raw_data = data.tobytes()
    return proto


def _form(tensor: onnx.TensorProto) -> tuple[str, list[int]]:
    return onnx.TensorProto.DataType.Name(tensor.data_type), list(tensor.dims)


def _check_round_trip(proto: onnx.ModelProto, graph: bytes, wanted: Mapping[int, bytes]) -> None:
    """Whether what was decoded is what was encoded: the graph to the byte, and the digests of its weights by index."""
    for index, (name, tensor) in enumerate(_tensors(proto)):
        if index in wanted:
            if hashlib.sha256(tensor.raw_data).digest() != wanted[index]:
                raise RuntimeError(f"weight {name!r} does not come back as it was encoded")
            _empty(tensor)
    if proto.SerializeToString() != graph:
        raise RuntimeError("the graph does not come back as it was encoded")


def float_file(model: ir.Model) -> bytes:
    """The model as one ONNX file, to compare sizes with. Raises InvalidInput where its weights do not fit into one."""
    file: bytes = _proto_of(model).SerializeToString()
    return file


def compressed(raw: bytes) -> tuple[str, int]:
    """How many bytes a common compressor makes of it, and which: zstd where it is installed, else lzma."""
    try:
        module = zstd()
    except Error:
        return "lzma", len(lzma.compress(raw))
    level = 19 if len(raw) < 20e6 else 9  # 19 takes a minute on 100 MB, and makes no less of floats
    return f"zstd -{level}", len(module.compress(raw, level))


def _why_not(data: np.ndarray, smallest: int) -> str | None:
    if data.ndim < 2:
        return VECTOR
    if data.size < smallest:
        return f"it has {data.size} elements, less than {smallest}"
    return None if np.isfinite(data.astype(np.float32)).all() else "it holds numbers that are not finite"


def _pack(codes: np.ndarray) -> tuple[Coder, bytes]:
    """The codes under the coder that makes least of them: Huffman alone where they are noise, else with repetitions."""
    raw = codes.tobytes()
    found: list[tuple[Coder, bytes]] = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
        squeezer = zlib.compressobj(9 if strategy == zlib.Z_HUFFMAN_ONLY else 6, strategy=strategy)
        found.append(("zlib", squeezer.compress(raw) + squeezer.flush()))
    found.append(("lzma", lzma.compress(raw, preset=1)))
    return min(found, key=lambda pair: len(pair[1]))


def _reported(name: str, data: np.ndarray, shared: Shared, size: int) -> EncodedTensor:
    before = data.astype(np.float64)
    power = float(np.square(before).sum())
    lost = float(np.square(before - shared.restored()).sum())
    counts = np.bincount(shared.codes.reshape(-1), minlength=1)
    share = counts[counts > 0] / shared.codes.size
    bits = float(-(share * np.log2(share)).sum()) * shared.codes.size
    return EncodedTensor(name, data.size, data.nbytes, size, bits / 8, lost / power if power else 0.0)


def _proto_of(model: ir.Model) -> onnx.ModelProto:
    """The graph as ONNX in memory; what is in files comes into it."""
    size = weights_size(model)
    if size > EXTERNAL_DATA_FROM:
        raise InvalidInput(f"the weights take {size} bytes, more than {EXTERNAL_DATA_FROM}", hint="encode it in parts")
    return ir.to_proto(ir.external_data.load_to_model(model))


def _tensors(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Every initializer and every tensor of a Constant, subgraphs and functions too, always in the same order."""
    yield from _of_graph(proto.graph)
    for function in proto.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    yield from ((tensor.name, tensor) for tensor in graph.initializer)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, onnx.TensorProto]]:
    for node in nodes:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield node.output[0], attribute.t
            for inner in [attribute.g] if attribute.HasField("g") else [*attribute.graphs]:
                yield from _of_graph(inner)


def _channel_axes(proto: onnx.ModelProto) -> dict[str, int]:
    """For weights of MatMul, Gemm and ConvTranspose the axis of their output channels; that of others is the first.

    By name: where two graphs use one for different weights, the axis of one of them may be the lesser choice, and no
    number is wrong."""
    found: dict[str, int] = {}
    bodies = [proto.graph.node, *(function.node for function in proto.functions)]
    while bodies:
        for node in bodies.pop():
            if len(node.input) > 1 and node.op_type in ("MatMul", "Gemm", "ConvTranspose"):
                turned = any(a.name == "transB" and a.i for a in node.attribute)
                found[node.input[1]] = 1 if node.op_type == "ConvTranspose" else (0 if turned else -1)
            for attribute in node.attribute:
                inner = [attribute.g] if attribute.HasField("g") else [*attribute.graphs]
                bodies += [graph.node for graph in inner]
    return found


def _empty(tensor: onnx.TensorProto) -> None:
    """Takes the numbers out of a tensor and leaves its shape."""
    for field in ("raw_data", "float_data", "double_data", "int32_data"):
        tensor.ClearField(field)


def _opened(content: bytes, path: Path) -> tuple[_Header, int]:
    """The header, and where the payload begins; digest and sizes are right."""
    if not content.startswith(MAGIC):
        raise InvalidModel("not a file of encoded weights", where=str(path), hint="`toolchain encode` writes them")
    body = memoryview(content)[:-_DIGEST]
    if len(content) < len(MAGIC) + 4 + _DIGEST or hashlib.sha256(body).digest() != content[-_DIGEST:]:
        raise _damaged(path, "its SHA-256 is not that of its content")
    (length,) = struct.unpack_from("<I", content, len(MAGIC))
    at = len(MAGIC) + 4
    if length > min(_MOST_HEADER, len(body) - at):
        raise _damaged(path, "its header is longer than the file")
    try:
        header = _Header.model_validate_json(content[at : at + length])
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "header"
        raise _damaged(path, f"its header: {place}: {first['msg']}") from error
    for tensor in header.tensors:
        if tensor.axis >= len(tensor.shape):
            raise _damaged(path, f"weight {tensor.index} has no axis {tensor.axis}")
    payload = header.graph_size + sum(
        4 * (tensor.values + tensor.shape[tensor.axis]) + tensor.size for tensor in header.tensors
    )
    if at + length + payload != len(body):
        raise _damaged(path, f"its header speaks of {payload} bytes, there are {len(body) - at - length}")
    return header, at + length


def _unpack(coder: Coder, packed: bytes, size: int, path: Path) -> bytes:
    """Decompresses to exactly ``size`` bytes, and never to more."""
    try:
        if coder == "zlib":
            inflater = zlib.decompressobj()
            raw = inflater.decompress(packed, size + 1)
        else:
            raw = lzma.LZMADecompressor(memlimit=1 << 28).decompress(packed, size + 1)
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise _damaged(path, f"a part of it cannot be decompressed ({error})") from error
    if len(raw) != size:
        more = "more than " if len(raw) > size else ""
        raise _damaged(path, f"a part of it gives {more}{min(len(raw), size)} bytes, not {size}")
    return raw


def _damaged(path: Path, why: str) -> InvalidModel:
    return InvalidModel(f"the file of encoded weights is damaged: {why}", where=str(path), hint="get or encode it anew")
