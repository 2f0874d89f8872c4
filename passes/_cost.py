"""What a graph costs: parameters, multiply-accumulates, operations and memory, of each node and in all.

A multiply-accumulate (MAC) is one product and one sum, of Conv, ConvTranspose, Gemm, MatMul, Einsum, RNN, GRU, LSTM and
Attention and of their integer kinds, biases left out: what papers and fvcore call "FLOPs" of a network (He et al. 2015,
table 1). ``operations`` counts two for each, one for each bias that is added, and for the rest one for each element
that is written (0 where elements only move), for each tap of a pooling and for each element that a reduction reads,
five in Softmax and in a normalisation: an estimate. Arithmetic intensity is operations over bytes read and written
once, weights included (Williams et al. 2009, "Roofline").

Memory is that of a run in the order of the graph in which every value is freed after its last reader and no two
share a buffer: a runtime that computes in place needs less, one with an arena somewhat more.

If costs its dearer branch, Loop its body times the trip count where that is constant (else once), Scan its body times
its length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx_ir as ir
import onnx_ir.passes.common

from passes._graph import attribute_int, attribute_ints, constant, dims, given, scalar
from passes._shapes import infer_shapes
from passes.base import PassFailed, in_standard_domain, labels

Shape = tuple[int, ...]
#: elements move, nothing is computed
_MOVES = frozenset(
    """
    Cast CastLike Compress Concat Constant ConstantOfShape DepthToSpace Expand EyeLike Flatten Gather GatherElements
    GatherND Identity If Loop NonZero Optional Pad Range Reshape ReverseSequence Scan Scatter ScatterElements ScatterND
    SequenceAt Shape Size Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze Dropout
    """.split()
)
#: operations for each element that is read
_READS = {
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "ArgMax", "ArgMin", "TopK", "CumSum"), 1),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LayerNormalization", "InstanceNormalization", "GroupNormalization"), 5),
    **dict.fromkeys(("RMSNormalization", "LpNormalization", "MeanVarianceNormalization"), 5),
}


@dataclasses.dataclass(frozen=True, slots=True)
class NodeCost:
    """What one node costs; None where a shape is not known.

    Attributes:
        node, op_type: the node, as ``passes.base.labels`` names it.
        output: the shape of its first output.
        parameters: elements of the weights that it reads and no node before it does.
        weight_bytes: of all the weights that it reads.
        macs: multiply-accumulates.
        operations: see above.
        moved_bytes: activations that it reads and writes.
        live_bytes: activations in memory while it runs; None in subgraphs too.
    """

    node: str
    op_type: str
    output: Shape | None
    parameters: int
    weight_bytes: int
    macs: int | None
    operations: int | None
    moved_bytes: int | None
    live_bytes: int | None

    @property
    def intensity(self) -> float | None:
        """Operations for each byte that is read or written."""
        if self.operations is None or self.moved_bytes is None or not self.moved_bytes + self.weight_bytes:
            return None
        return self.operations / (self.moved_bytes + self.weight_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelCost:
    """What a graph costs, at the shapes that were given.

    Attributes:
        nodes: in the order of the main graph; what is in subgraphs counts for the node that holds them.
        parameters: elements of all weights, each counted once.
        weight_bytes: of these.
        macs, operations: of the nodes whose shapes are known.
        peak_bytes: activations in memory at once, at most; None where a shape is not known.
        peak_node: where that is.
        unknown: nodes whose cost is not known, since a shape is not.
    """

    nodes: tuple[NodeCost, ...]
    parameters: int
    weight_bytes: int
    macs: int
    operations: int
    peak_bytes: int | None
    peak_node: str | None
    unknown: tuple[str, ...]


def model_cost(model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None) -> ModelCost:
    """Counts what the graph costs; the model stays as it is.

    Args:
        shapes: sizes of graph inputs, and of any other values of the main graph where inference would not find them.

    Raises:
        PassFailed: a shape contradicts the graph.
    """
    graph = with_shapes(model, shapes or {})
    live = _live_bytes(graph.graph)
    counted: set[ir.Value] = set()
    nodes = []
    for node, text in labels(graph.graph).items():
        if node.op_type == "Constant" and in_standard_domain(node):
            continue
        nodes.append(_node_cost(node, text, counted, live.get(node)))
    known = [(node.live_bytes, node.node) for node in nodes if node.live_bytes is not None]
    complete = len(known) == len(nodes)
    peak, where = max(known, key=lambda pair: pair[0], default=(0, None)) if complete else (None, None)
    return ModelCost(
        tuple(nodes),
        sum(node.parameters for node in nodes),
        sum(_bytes_of(value) for value in counted),
        sum(node.macs or 0 for node in nodes),
        sum(node.operations or 0 for node in nodes),
        peak,
        where,
        tuple(node.node for node in nodes if node.macs is None or node.operations is None),
    )


def with_shapes(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> ir.Model:
    """A copy with these shapes, what follows from them inferred, and functions inlined; it shares the weights.

    Raises:
        PassFailed: no such value, another rank, or a shape that contradicts the graph.
    """
    copy = model.clone()
    if copy.functions:
        onnx_ir.passes.common.InlinePass()(copy)
    values = {str(value.name): value for value in _values(copy.graph)}
    bindings: dict[str, int] = {}
    for name, sizes in shapes.items():
        value = values.get(name)
        if value is None:
            raise PassFailed(f"there is no value {name!r} to give a shape")
        before = dims(value)
        if before is not None and (
            len(before) != len(sizes)
            or any(isinstance(d, int) and d != size for d, size in zip(before, sizes, strict=True))
        ):
            raise PassFailed(f"{name!r} is {_text(before)} and cannot be {list(sizes)}")
        for dim, size in zip(before or (), sizes, strict=bool(before)):
            if isinstance(dim, str):
                bindings.setdefault(dim, int(size))
        value.shape = ir.Shape([int(size) for size in sizes])
    for value in values.values():
        if value.shape is not None and not value.is_initializer():
            known = [bindings.get(str(d.value), d) if not isinstance(d, int) else d for d in value.shape]
            value.shape = ir.Shape(known)
    # what a model says of its outputs counts for inference as known; here a symbol of theirs is not
    outputs = list(copy.graph.outputs)
    copy.graph.outputs.clear()
    infer_shapes(copy)
    copy.graph.outputs.extend(outputs)
    return copy


def unknown_values(model: ir.Model) -> tuple[str, ...]:
    """Names of main-graph values whose shape is not a list of numbers."""
    return tuple(str(v.name) for node in model.graph for v in node.outputs if v.name and _shape(v) is None)


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from (value for value in node.outputs if value.name)


def _text(shape: Iterable[int | str | None]) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def _shape(value: ir.Value | None) -> Shape | None:
    found = dims(value)
    if found is None or not all(isinstance(d, int) for d in found):
        return None
    return tuple(int(str(d)) for d in found)


def _elements(value: ir.Value | None) -> int | None:
    shape = _shape(value)
    return None if shape is None else math.prod(shape)


def _is_weight(value: ir.Value | None) -> bool:
    """Floats and small integers; shapes, axes and indices are no weights."""
    tensor = constant(value)
    return tensor is not None and (tensor.dtype.is_floating_point() or tensor.dtype.bitwidth <= 8)


def _bytes_of(value: ir.Value) -> int:
    tensor = constant(value)
    if tensor is not None:
        return int(tensor.nbytes)
    elements = _elements(value)
    if elements is None:
        return 0
    return math.ceil(elements * (value.dtype.bitwidth if value.dtype is not None else 32) / 8)


def _node_cost(node: ir.Node, text: str, counted: set[ir.Value], live: int | None) -> NodeCost:
    nodes = [node, *_inside(node)]
    weights = {value for each in nodes for value in each.inputs if value is not None and _is_weight(value)}
    new = weights - counted
    counted |= new
    macs, operations = _count(node)
    activations = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name and constant(v) is None]
    known = all(_elements(value) is not None for value in activations)
    return NodeCost(
        text,
        node.op_type if in_standard_domain(node) else f"{node.domain}.{node.op_type}",
        _shape(node.outputs[0]) if node.outputs else None,
        sum(_elements(value) or 0 for value in new),
        sum(_bytes_of(value) for value in weights),
        macs,
        operations,
        sum(_bytes_of(value) for value in activations) if known else None,
        live,
    )


def _bodies(node: ir.Node) -> list[ir.Graph]:
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found


def _inside(node: ir.Node) -> list[ir.Node]:
    return [inner for body in _bodies(node) for inner in ir.traversal.RecursiveGraphIterator(body)]


def _live_bytes(graph: ir.Graph) -> dict[ir.Node, int]:
    """Bytes of activations in memory while each node runs, where all shapes up to there are known."""
    order = list(graph)
    last: dict[ir.Value, int] = {}
    for position, node in enumerate(order):
        for each in (node, *_inside(node)):
            for value in each.inputs:
                if value is not None:
                    last[value] = position
    for value in graph.outputs:
        last[value] = len(order)
    alive = {v: _bytes_of(v) for v in graph.inputs if not v.is_initializer()}
    if any(_elements(value) is None for value in alive):
        return {}
    found: dict[ir.Node, int] = {}
    for position, node in enumerate(order):
        if node.op_type == "Constant" and in_standard_domain(node):
            continue
        for value in node.outputs:
            if not value.name:
                continue
            if _elements(value) is None:
                return found
            alive[value] = _bytes_of(value)
        found[node] = sum(alive.values())
        for value in {*node.inputs, *node.outputs}:
            if value is not None and last.get(value, -1) <= position:
                alive.pop(value, None)
    return found


def _count(node: ir.Node) -> tuple[int | None, int | None]:
    """MACs and operations."""
    if bodies := _bodies(node):
        sums = [_sum(_count(inner) for inner in body) for body in bodies]
        turns = _turns(node)
        macs, operations = max(sums, key=lambda pair: (pair[0] or 0, pair[1] or 0))
        return (None if macs is None else macs * turns), (None if operations is None else operations * turns)
    written = _elements(node.outputs[0]) if node.outputs else 0
    rule = _MACS.get(node.op_type)
    if rule is not None:
        macs = rule(node)
        bias = given(node, 2) if node.op_type in ("Conv", "ConvTranspose", "Gemm") else None
        if macs is None or written is None:
            return None, None
        return macs, 2 * macs + (written if bias is not None else 0)
    if node.op_type in _MOVES:
        return 0, 0
    read = _elements(node.inputs[0]) if node.inputs and node.inputs[0] is not None else 0
    if node.op_type.startswith("Reduce"):
        return 0, read
    if node.op_type in _READS:
        return 0, None if read is None else read * _READS[node.op_type]
    if written is None:
        return 0, None
    if node.op_type in ("AveragePool", "MaxPool", "LpPool"):
        return 0, written * math.prod(attribute_ints(node, "kernel_shape") or ())
    return 0, written * sum(1 for value in node.outputs if value.name)


def _sum(counts: Iterable[tuple[int | None, int | None]]) -> tuple[int | None, int | None]:
    macs, operations = 0, 0
    for each in counts:
        if each[0] is None or each[1] is None:
            return None, None
        macs, operations = macs + each[0], operations + each[1]
    return macs, operations


def _turns(node: ir.Node) -> int:
    if node.op_type == "Loop":
        count = scalar(given(node, 0))
        return 1 if count is None else max(0, int(count))
    if node.op_type == "Scan":
        scanned = attribute_int(node, "num_scan_inputs", 0) or 0
        shape = _shape(node.inputs[-1]) if scanned else None
        axes = attribute_ints(node, "scan_input_axes")
        return shape[axes[-1] if axes else 0] if shape else 1
    return 1


def _convolution(weight_at: int) -> Callable[[ir.Node], int | None]:
    def count(node: ir.Node) -> int | None:
        written, weight = _elements(node.outputs[0]), _shape(given(node, weight_at))
        return None if written is None or weight is None else written * math.prod(weight[1:])

    return count


def _transposed(node: ir.Node) -> int | None:
    read, weight = _elements(node.inputs[0]), _shape(given(node, 1))
    return None if read is None or weight is None else read * math.prod(weight[1:])


def _gemm(node: ir.Node) -> int | None:
    written, a = _elements(node.outputs[0]), _shape(node.inputs[0])
    return None if written is None or a is None else written * a[0 if attribute_int(node, "transA", 0) else 1]


def _matmul(node: ir.Node) -> int | None:
    written, a = _elements(node.outputs[0]), _shape(node.inputs[0])
    return None if written is None or not a else written * a[-1]


def _einsum(node: ir.Node) -> int | None:
    equation = node.attributes.get("equation")
    if equation is None or equation.is_ref() or len(node.inputs) < 2:
        return 0 if equation is not None else None
    terms = equation.as_string().replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, value in zip(terms, node.inputs, strict=False):
        shape = _shape(value)
        if shape is None or "." in term or len(term) != len(shape):
            return None
        sizes.update({axis: max(size, sizes.get(axis, 1)) for axis, size in zip(term, shape, strict=True)})
    return math.prod(sizes.values())


def _recurrent(node: ir.Node) -> int | None:
    x, w, r = (_shape(given(node, index)) for index in range(3))
    if x is None or w is None or r is None:
        return None
    return x[0] * x[1] * (math.prod(w) + math.prod(r))  # steps times batch, whichever comes first


def _attention(node: ir.Node) -> int | None:
    """Q times K, and the weights of attention times V; ONNX's own Attention, 3-D and 4-D."""
    q, k, out = _shape(given(node, 0)), _shape(given(node, 1)), _shape(node.outputs[0])
    if q is None or k is None or out is None or len(q) not in (3, 4):
        return None
    past = _shape(given(node, 4))
    length = k[-2] + (past[-2] if past else 0)
    return (math.prod(q) + math.prod(out)) * length


_MACS: Mapping[str, Callable[[ir.Node], int | None]] = {
    "Attention": _attention,
    "Conv": _convolution(1),
    "ConvInteger": _convolution(1),
    "ConvTranspose": _transposed,
    "DeformConv": _convolution(1),
    "Einsum": _einsum,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearConv": _convolution(3),
    "QLinearMatMul": _matmul,
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
}
