"""Storage codecs: a model's weights as a few shared values, entropy coded in one compact file, and back.

``kmeans`` gives each weight tensor ``levels`` values of its own, those that minimise the squared error (Han et al.
2016, "Deep Compression", arXiv 1510.00149, section 3): Lloyd's algorithm in one dimension, begun from Panter and Dite's
asymptotically best density, from evenly spaced values and, for few levels, from dynamic programming over a fine grid,
whichever ends best. ``log`` takes zero and powers of two (Miyashita et al. 2016, arXiv 1603.01025), each weight the
nearest. A tensor that holds zeros keeps exactly those, so what was pruned stays pruned. Both are for the disk and the
wire only: ``decode`` gives an ordinary float model, as fast and as large as before.

The file, integers little-endian::

    magic 8 | length of the header, uint32 | header, JSON | graph without these weights, lzma | for each tensor: its
    values, float32 | its codes, one byte each, zlib or lzma, whichever is smaller | SHA-256 of all before, 32

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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import google.protobuf.message
import numpy as np
import onnx
import onnx_ir as ir
import pydantic

from passes.base import Declined, graphs
from runtimes import InvalidInput, InvalidModel
from toolchain.onnx_file import EXTERNAL_DATA_FROM, read_onnx
from toolchain.storage import write_bytes

Codec = Literal["kmeans", "log"]
Coder = Literal["zlib", "lzma"]

MAGIC = b"\x89OTCW\r\n\x1a"
_DIGEST = 32
#: headers and graphs that are larger are none of ours
_MOST_HEADER = 64 << 20
_MOST_GRAPH = 512 << 20
_DTYPES: dict[str, np.dtype] = {
    "FLOAT": np.dtype(np.float32),
    "DOUBLE": np.dtype(np.float64),
    "FLOAT16": np.dtype(np.float16),
}
_ROUNDS = 200
#: up to so many levels the best clusters are searched for, among borders of so many cells
_EXACT, _CELLS = 32, 768


class _Tensor(pydantic.BaseModel):
    """A weight; ``index`` is its place among all tensors of the graph, see ``_tensors``."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    index: pydantic.NonNegativeInt
    dtype: Literal["FLOAT", "DOUBLE", "FLOAT16"]
    shape: list[pydantic.NonNegativeInt]
    values: int = pydantic.Field(ge=1, le=256)
    coder: Coder
    size: pydantic.NonNegativeInt


class _Header(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    version: Literal[1]
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
        encoded_bytes: of its values and codes.
        entropy_bytes: what an ideal coder of single codes would need, without the values.
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
    """Writes a model with its large weights encoded; the model stays as it is.

    Args:
        codec: kmeans or log.
        levels: values that a tensor may take: 2 to 256 of kmeans; of log 3 to 255, an odd number: zero, and as many
            negative as positive powers of two.
        smallest: weights of fewer elements, and vectors, stay as they are.

    Raises:
        InvalidInput: an unknown codec, or levels out of range.
        GraphError, InvalidModel, StorageError: nothing was written.
    """
    _check_levels(codec, levels)
    proto = _proto_of(model)
    header_tensors: list[_Tensor] = []
    parts: list[bytes] = []
    report: list[EncodedTensor] = []
    kept: list[Declined] = []
    for index, (name, tensor) in enumerate(_tensors(proto)):
        dtype = onnx.TensorProto.DataType.Name(tensor.data_type)
        if dtype not in _DTYPES:
            continue
        data = onnx.numpy_helper.to_array(tensor)
        reason = _why_not(data, smallest)
        if reason is not None:
            kept.append(Declined(name, reason))
            continue
        values, codes = quantise(data, codec=codec, levels=levels)
        coder, packed = _pack(codes)
        entry = {"index": index, "dtype": dtype, "shape": list(data.shape), "values": len(values)}
        header_tensors.append(_Tensor.model_validate({**entry, "coder": coder, "size": len(packed)}))
        parts += [values.astype("<f4").tobytes(), packed]
        report.append(_reported(name, data, values, codes, 4 * len(values) + len(packed)))
        _empty(tensor)
    graph = proto.SerializeToString()
    if len(graph) > _MOST_GRAPH:
        raise InvalidInput(
            f"what is not encoded takes {len(graph)} bytes, more than {_MOST_GRAPH}", hint="encode smaller weights too"
        )
    squeezed = lzma.compress(graph)
    header = _Header(
        version=1, codec=codec, graph_size=len(squeezed), graph_raw=len(graph), tensors=header_tensors
    ).model_dump_json()
    body = b"".join((MAGIC, struct.pack("<I", len(header)), header.encode(), squeezed, *parts))
    content = body + hashlib.sha256(body).digest()
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
    header, content, at = _open(path)
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
        if entry.index >= len(found) or list(found[entry.index].dims) != entry.shape:
            raise _damaged(path, f"its graph has no weight {entry.index} of shape {entry.shape}")
        values = np.frombuffer(content, "<f4", entry.values, at)
        at += 4 * entry.values
        elements = math.prod(entry.shape)
        codes = np.frombuffer(_unpack(entry.coder, content[at : at + entry.size], elements, path), np.uint8)
        at += entry.size
        if codes.size and int(codes.max()) >= entry.values:
            raise _damaged(path, f"a code of weight {entry.index} stands for nothing")
        data = values.astype(_DTYPES[entry.dtype])[codes].reshape(entry.shape)
        name = found[entry.index].name
        found[entry.index].CopyFrom(onnx.numpy_helper.from_array(data, name))
    with tempfile.TemporaryDirectory(prefix="toolchain-") as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(proto.SerializeToString())
        return read_onnx(file)


def quantise(data: np.ndarray, *, codec: Codec = "kmeans", levels: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Shares values among the weights.

    Args:
        data: floats of any shape, finite.
        codec, levels: see ``encode``.

    Returns:
        The values, float32 in ascending order, at most ``levels``, and for each element the index of its value, uint8.

    Raises:
        InvalidInput: an unknown codec, or levels out of range.
    """
    _check_levels(codec, levels)
    flat = data.reshape(-1).astype(np.float32)
    if codec == "log":
        values = _powers(flat, levels)
    else:
        values = _kmeans(flat[flat != 0], levels - 1 if (flat == 0).any() else levels)
        if (flat == 0).any():
            values = np.unique(np.append(values[values != 0], np.float32(0)))
    codes = _nearest(flat, values)
    zero = np.flatnonzero(values == 0)
    if zero.size:
        # what was not zero becomes zero only where that is the nearest; what was, always
        codes[flat == 0] = zero[0]
    return values, codes.reshape(data.shape)


def _check_levels(codec: str, levels: int) -> None:
    if codec not in ("kmeans", "log"):
        raise InvalidInput(f"no codec is called {codec!r}", hint="take kmeans or log")
    fine = 2 <= levels <= 256 if codec == "kmeans" else 3 <= levels <= 255 and levels % 2 == 1
    if not fine:
        wanted = "2 to 256" if codec == "kmeans" else "an odd number from 3 to 255"
        raise InvalidInput(f"{levels} levels", where=f"codec {codec}", hint=f"wanted: {wanted}")


def _why_not(data: np.ndarray, smallest: int) -> str | None:
    if data.ndim < 2:
        return "it is a vector"
    if data.size < smallest:
        return f"it has {data.size} elements, less than {smallest}"
    return None if np.isfinite(data.astype(np.float32)).all() else "it holds numbers that are not finite"


def _powers(flat: np.ndarray, levels: int) -> np.ndarray:
    """Zero and the powers of two up to the one nearest the largest magnitude."""
    largest = float(np.abs(flat).max(initial=0))
    if not largest:
        return np.zeros(1, np.float32)
    top = math.floor(math.log2(largest / 1.5)) + 1  # a power is nearest from three quarters of it on
    powers = 2.0 ** np.arange(top, top - (levels - 1) // 2, -1, dtype=np.float64)
    powers = powers[powers >= float(np.finfo(np.float32).tiny)]
    return np.concatenate([-powers, [0.0], powers[::-1]]).astype(np.float32)


def _kmeans(flat: np.ndarray, levels: int) -> np.ndarray:
    """The values of 1-D k-means, float32 ascending; fewer where there are fewer different numbers."""
    ordered = np.sort(flat.astype(np.float64))
    different = np.unique(ordered)
    if len(different) <= levels or not levels:
        return different.astype(np.float32)[:levels] if levels else np.empty(0, np.float32)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    squares = np.concatenate([[0.0], np.cumsum(np.square(ordered))])
    starts = [_by_density(ordered, levels), np.linspace(ordered[0], ordered[-1], levels)]
    if levels <= _EXACT:
        starts.append(_by_dynamic_programming(ordered, sums, squares, levels))
    best, least = different[:levels], math.inf
    for start in starts:
        centres, error = _lloyd(ordered, sums, squares, start)
        if error < least:
            best, least = centres, error
    return np.unique(best.astype(np.float32))


def _by_density(ordered: np.ndarray, levels: int) -> np.ndarray:
    """Panter and Dite 1951: the best values lie as dense as the cube root of the density of the numbers."""
    counts, edges = np.histogram(ordered, bins=2048)
    share = np.concatenate([[0.0], np.cumsum(np.cbrt(counts))])
    centres: np.ndarray = np.interp((np.arange(levels) + 0.5) / levels * share[-1], share, edges)
    return centres


def _by_dynamic_programming(ordered: np.ndarray, sums: np.ndarray, squares: np.ndarray, levels: int) -> np.ndarray:
    """The best clusters whose borders are among ``_CELLS`` (Wang and Song 2011, "Ckmeans.1d.dp"): with fewer numbers
    than that, the best there are."""
    if len(ordered) <= _CELLS:
        borders = np.arange(len(ordered) + 1)
    else:
        inner = np.searchsorted(ordered, _by_density(ordered, _CELLS))
        borders = np.unique(np.concatenate([[0], inner, [len(ordered)]]))
    count = np.maximum(borders[None, :] - borders[:, None], 1)
    within = sums[borders][None, :] - sums[borders][:, None]
    cost = squares[borders][None, :] - squares[borders][:, None] - within * within / count
    cost[np.tril_indices(len(borders), -1)] = np.inf  # a cluster ends after it begins
    best, chosen = cost[0], []
    for _ in range(levels - 1):
        total = best[:, None] + cost
        chosen.append(total.argmin(axis=0))
        best = total.min(axis=0)
    ends = [len(borders) - 1]
    for step in reversed(chosen):
        ends.append(int(step[ends[-1]]))
    ends.append(0)
    cuts = borders[ends[::-1]]
    centres: np.ndarray = np.diff(sums[cuts])[np.diff(cuts) > 0] / np.diff(cuts)[np.diff(cuts) > 0]
    return centres


def _lloyd(ordered: np.ndarray, sums: np.ndarray, squares: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, float]:
    """Lloyd's algorithm on sorted numbers: a cluster is a range of them, its sums are differences."""
    error = math.inf
    for _ in range(_ROUNDS):
        borders = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        borders = np.concatenate([[0], borders, [len(ordered)]])
        counts = np.diff(borders)
        totals = np.diff(sums[borders])
        centres = np.where(counts > 0, totals / np.maximum(counts, 1), centres)
        now = float((np.diff(squares[borders]) - totals * totals / np.maximum(counts, 1)).sum())
        if now >= error * (1 - 1e-7):
            break
        error = now
    return centres, error


def _nearest(flat: np.ndarray, values: np.ndarray) -> np.ndarray:
    borders = (values[1:].astype(np.float64) + values[:-1]) / 2
    found: np.ndarray = np.searchsorted(borders, flat.astype(np.float64)).astype(np.uint8)
    return found


def _pack(codes: np.ndarray) -> tuple[Coder, bytes]:
    """The codes under the coder that makes least of them: Huffman alone where they are noise, else with repetitions."""
    raw = codes.tobytes()
    found: list[tuple[Coder, bytes]] = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
        squeezer = zlib.compressobj(9 if strategy == zlib.Z_HUFFMAN_ONLY else 6, strategy=strategy)
        found.append(("zlib", squeezer.compress(raw) + squeezer.flush()))
    found.append(("lzma", lzma.compress(raw, preset=1)))
    return min(found, key=lambda pair: len(pair[1]))


def _reported(name: str, data: np.ndarray, values: np.ndarray, codes: np.ndarray, size: int) -> EncodedTensor:
    before = data.astype(np.float64)
    power = float(np.square(before).sum())
    lost = float(np.square(before - values.astype(np.float64)[codes]).sum())
    counts = np.bincount(codes.reshape(-1), minlength=1)
    share = counts[counts > 0] / codes.size
    bits = float(-(share * np.log2(share)).sum()) * codes.size
    return EncodedTensor(name, data.size, data.nbytes, size, bits / 8, lost / power if power else 0.0)


def _proto_of(model: ir.Model) -> onnx.ModelProto:
    """The graph as ONNX in memory; what is in files comes into it."""
    size = sum(
        value.const_value.nbytes
        for graph in graphs(model)
        if isinstance(graph, ir.Graph)
        for value in graph.initializers.values()
        if value.const_value is not None
    )
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


def _empty(tensor: onnx.TensorProto) -> None:
    """Takes the numbers out of a tensor and leaves its shape."""
    for field in ("raw_data", "float_data", "double_data", "int32_data"):
        tensor.ClearField(field)


def _open(path: Path) -> tuple[_Header, bytes, int]:
    """The header, the whole file, and where its payload begins; digest and sizes are right."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidModel(f"cannot read the file: {error.strerror}", where=str(path), hint="check the path") from error
    if not content.startswith(MAGIC):
        raise InvalidModel("not a file of encoded weights", where=str(path), hint="toolchain.codecs.encode writes them")
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
    payload = header.graph_size + sum(4 * tensor.values + tensor.size for tensor in header.tensors)
    if at + length + payload != len(body):
        raise _damaged(path, f"its header speaks of {payload} bytes, there are {len(body) - at - length}")
    return header, content, at + length


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


__all__: Sequence[str] = ["Codec", "Encoded", "EncodedTensor", "decode", "encode", "quantise"]
