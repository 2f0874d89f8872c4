"""Which rule shows how channels go through which op, as a literal table; an op that is not in it keeps them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from passes import _channel_layers as layers
from passes import _channel_moves as moves
from passes import _channel_recurrent as states
from passes import _channel_reshape as shapes
from passes import _channel_sizes as sizes
from passes._channel_atoms import Labels
from passes._channel_graph import ChannelGraph, Part
from passes._graph import attribute_int, attribute_ints, given, integers, is_op
from passes.base import in_standard_domain, label

Rule = Callable[[ChannelGraph, ir.Node], None]


def unary(graph: ChannelGraph, node: ir.Node) -> None:
    """Each element by itself: the first output is like the first input."""
    axes = graph.of(node.inputs[0])
    if axes is None:
        return graph.opaque(node, f"{label(node)}: its rank is not known")
    for value in node.inputs[1:]:
        graph.keep_whole(value, f"{label(node)} reads it whole")
    for output in node.outputs:
        graph.set(output, axes)


def elementwise(graph: ChannelGraph, node: ir.Node) -> None:
    """Any number of inputs that broadcast."""
    values = [value for value in node.inputs if value is not None]
    ranks = [graph.rank(value) for value in values]
    known = [rank for rank in ranks if rank is not None]
    if len(known) != len(ranks):
        return graph.opaque(node, f"{label(node)}: its shapes are not known")
    graph.set(node.outputs[0], layers.broadcast(graph, node, values, max(known)))


def pool(graph: ChannelGraph, node: ir.Node) -> None:
    """Pooling over space, a channel at a time."""
    axes = graph.of(node.inputs[0])
    if axes is None or any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return graph.opaque(node, f"{label(node)}: its rank is not known, or its indices are read")
    for labels in axes[2:]:
        graph.atoms.freeze(labels, f"{label(node)} pools over it")
    graph.set(node.outputs[0], [*axes[:2], *[None] * (len(axes) - 2)])


def reduce(graph: ChannelGraph, node: ir.Node) -> None:
    """Reductions: the axes that they go over are kept."""
    axes = graph.of(node.inputs[0])
    if node.op_type in ("ArgMax", "ArgMin"):
        at: tuple[int, ...] | None = (attribute_int(node, "axis", 0) or 0,)
    else:
        at = attribute_ints(node, "axes")
        if at is None and given(node, 1) is not None:
            at = integers(given(node, 1))
            if at is None:
                return graph.opaque(node, f"{label(node)}: its axes are computed")
    if axes is None:
        return graph.opaque(node, f"{label(node)}: its rank is not known")
    if not at:
        none = attribute_int(node, "noop_with_empty_axes", 0)
        at = () if none else tuple(range(len(axes)))
    positive = {axis % len(axes) for axis in at}
    result: list[Labels] = []
    for axis, labels in enumerate(axes):
        if axis not in positive:
            result.append(labels)
            continue
        graph.atoms.freeze(labels, f"{label(node)} reduces over it")
        if attribute_int(node, "keepdims", 1):
            result.append(None)
    graph.keep_whole(given(node, 1), f"{label(node)} reads axes there")
    graph.set(node.outputs[0], result)


def one_axis(graph: ChannelGraph, node: ir.Node) -> None:
    """CumSum: one axis, given as an input, is kept."""
    axes, at = graph.of(node.inputs[0]), integers(given(node, 1))
    if axes is None or at is None:
        return graph.opaque(node, f"{label(node)}: its axis is computed")
    result = list(axes)
    graph.atoms.freeze(result[at[0]], f"{label(node)} sums along it")
    result[at[0]] = None
    graph.set(node.outputs[0], result)


def constant_node(graph: ChannelGraph, node: ir.Node) -> None:
    """A Constant gets its atoms when something asks for them."""


_UNARY = """
    Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu
    HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid
    Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu
""".split()
_BINARY = """
    Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min
    Mod Mul Or PRelu Pow Sub Sum Where Xor
""".split()
_REDUCE = """
    ArgMax ArgMin ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare
""".split()
_POOL = "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool".split()

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_UNARY, unary),
    **dict.fromkeys(_BINARY, elementwise),
    **dict.fromkeys(_REDUCE, reduce),
    **dict.fromkeys(_POOL, pool),
    "BatchNormalization": layers.batch_norm,
    "Concat": moves.concat,
    "Constant": constant_node,
    "Conv": layers.conv,
    "ConvTranspose": layers.conv,
    "CumSum": one_axis,
    "Expand": sizes.expand,
    "Flatten": shapes.flatten,
    "Gather": moves.gather,
    "Gemm": layers.gemm,
    "GRU": states.recurrent,
    "GroupNormalization": layers.group_norm,
    "Hardmax": layers.softmax,
    "InstanceNormalization": layers.instance_norm,
    "LSTM": states.recurrent,
    "LayerNormalization": layers.layer_norm,
    "LogSoftmax": layers.softmax,
    "LpNormalization": layers.statistics_over,
    "MatMul": layers.matmul,
    "MeanVarianceNormalization": layers.statistics_over,
    "Pad": moves.pad,
    "RMSNormalization": layers.layer_norm,
    "RNN": states.recurrent,
    "Reshape": shapes.reshape,
    "Resize": sizes.resize,
    "Shape": sizes.shape,
    "Slice": moves.slice_,
    "Softmax": layers.softmax,
    "Split": moves.split,
    "Squeeze": shapes.squeeze,
    "Tile": sizes.tile,
    "Transpose": shapes.transpose,
    "Unsqueeze": shapes.unsqueeze,
    "Upsample": sizes.resize,
}


def visit(graph: ChannelGraph, node: ir.Node) -> None:
    """Says which atoms the outputs of a node carry, and joins those of its inputs that go together."""
    rule = RULES.get(node.op_type) if in_standard_domain(node) else None
    if rule is None:
        graph.opaque(node, f"{label(node)} is a {node.op_type}, whose channels are not followed")
    elif any(attribute.is_ref() for attribute in node.attributes.values()):
        graph.opaque(node, f"{label(node)} has attributes that are not constant")
    else:
        merged = _merged_along(graph, node)
        rule(graph, node)
        if merged:
            graph.merged[node.outputs[0]] = merged


def _merged_along(graph: ChannelGraph, node: ir.Node) -> dict[int, tuple[Part, ...]]:
    """What the axes of the output were merged from. Ops other than these, and axes that do not match, keep it whole."""
    given_ = [value for value in node.inputs if value is not None and value in graph.merged]
    if not given_ or is_op(node, "Reshape", "Transpose"):
        return {}
    result: dict[int, tuple[Part, ...]] = {}
    follows = node.op_type in (*_UNARY, *_BINARY, "MatMul", "Softmax")
    sizes = [graph.dims(value) for value in node.inputs if value is not None]
    rank = max((len(each) for each in sizes if each is not None), default=0)
    last = -1 if node.op_type == "Softmax" and attribute_int(node, "axis", -1) in (-1, rank - 1) else 0
    stop = 2 if node.op_type == "MatMul" else -last
    for back in range(rank, 0, -1):
        wide = [
            graph.merged.get(value, {}).get(len(each) - back)
            for value, each in zip((v for v in node.inputs if v is not None), sizes, strict=True)
            if each is not None and len(each) >= back and each[-back] != 1
        ]
        if all(parts is None for parts in wide):
            continue
        first = next(parts for parts in wide if parts is not None)
        like = all(parts is not None and [n for n, _ in parts] == [n for n, _ in first] for parts in wide)
        if follows and like and None not in sizes and back > stop and None not in [n for n, _ in first]:
            columns = [[parts[i][1] for parts in wide if parts is not None] for i in range(len(first))]
            joined = [_all_joined(graph, node, column) for column in columns]
            result[rank - back] = tuple((n, labels) for (n, _), labels in zip(first, joined, strict=True))
            if node.op_type == "MatMul":
                graph.heads.extend(labels for labels in joined if labels is not None)
            continue
        for parts in wide:
            for _, labels in parts or ():
                graph.atoms.freeze(labels, f"{label(node)} reads it merged with others")
    return result


def _all_joined(graph: ChannelGraph, node: ir.Node, column: list[Labels]) -> Labels:
    labels = column[0]
    for other in column[1:]:
        labels = graph.join(labels, other, f"{label(node)} joins it with something that is not cut")
    return labels
