"""How channels go through layers with weights and through normalisations.

In a convolution with groups either whole groups go (where there are many small ones, as in a depthwise convolution;
the attribute ``group`` falls) or the same channels of every group (where there are few large ones).
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes._channel_atoms import Labels
from passes._channel_graph import ChannelGraph, Editor
from passes._graph import attribute_int, attribute_ints, constant, given
from passes.base import label


def conv(graph: ChannelGraph, node: ir.Node) -> None:
    """Conv [O, C/g, k...] and ConvTranspose [C, O/g, k...]."""
    x, w, bias = node.inputs[0], node.inputs[1], given(node, 2)
    axes, weights = graph.of(x), graph.dims(w)
    groups = attribute_int(node, "group", 1)
    transposed = node.op_type == "ConvTranspose"
    if x is None or w is None or weights is None or groups is None:
        return graph.opaque(node, f"{label(node)}: its weight is not known")
    if axes is None:
        axes = graph.axes[x] = [None] * len(weights)
    why = f"{label(node)} needs all of it"
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    by_group = transposed and groups > 1 and _whole_groups(weights[0], groups)
    graph.role(w, in_axis if by_group else out_axis, "out", node)
    if groups == 1:
        graph.contract(node, x, 1, w, in_axis)
        of_w = graph.of(w)
        result = None if of_w is None else of_w[out_axis]
    else:
        result = _grouped(graph, node, groups, why)
    if bias is not None:
        result = graph.tie(result, bias, 0, why)
        graph.role(bias, 0, "bias", node)
    for labels in axes[2:]:
        graph.atoms.freeze(labels, f"{label(node)} slides along it")
    graph.set(node.outputs[0], [axes[0], result, *[None] * (len(axes) - 2)])


def _grouped(graph: ChannelGraph, node: ir.Node, groups: int, why: str) -> Labels:
    """The atoms of the outputs of a convolution with groups."""
    x, w = node.inputs[0], node.inputs[1]
    assert x is not None
    assert w is not None
    transposed = node.op_type == "ConvTranspose"
    sizes = graph.dims(w)
    assert sizes is not None
    channels, outputs = (sizes[0], sizes[1]) if transposed else (sizes[1], sizes[0])
    if not isinstance(channels, int) or not isinstance(outputs, int):
        graph.opaque(node, why)
        return None
    channels, outputs = (channels, outputs * groups) if transposed else (channels * groups, outputs)
    of_x, of_w = graph.of(x), graph.of(w)
    assert of_x is not None
    assert of_w is not None
    inner, first = of_x[1], of_w[0]
    if inner is None or first is None or len(inner) != channels or channels % groups or outputs % groups:
        graph.keep_whole(w, why)
        graph.atoms.freeze(inner, why)
        return None
    if _whole_groups(channels, groups):
        # One class for each group: its input channels, its rows of the weight, its output channels.
        heads = _tie_rows(graph, inner, groups)
        graph.atoms.join(heads[:, None], first.reshape(groups, -1))
        graph.atoms.freeze(of_w[1], why)
        graph.axes[w][1] = None
        graph.rewrites.append(functools.partial(_fewer_groups, node, "group", heads))
        return np.repeat(heads, outputs // groups)
    columns = _tie_columns(graph, inner, groups)
    if transposed:
        graph.atoms.join(columns[None, :], first.reshape(groups, -1))
        graph.role(w, 0, "in", node)
        return None if of_w[1] is None else np.tile(of_w[1], groups)
    graph.role(w, 1, "in", node)
    if graph.origin(w, 1) is None:
        graph.atoms.freeze(columns, why)
    graph.tie(columns, w, 1, why)
    _tie_columns(graph, first, groups)
    return first


def _whole_groups(channels: object, groups: int) -> bool:
    """Whether groups are cut, not the channels in them: there are at least as many as channels in each."""
    return isinstance(channels, int) and groups * groups >= channels


def gemm(graph: ChannelGraph, node: ir.Node) -> None:
    """x [M, K] or its transpose, w [K, N] or its transpose, bias that broadcasts to [M, N]."""
    x, w, bias = node.inputs[0], node.inputs[1], given(node, 2)
    of_x, rank_w = graph.of(x), graph.rank(w)
    across, flipped = attribute_int(node, "transA", 0), attribute_int(node, "transB", 0)
    if x is not None and of_x is None:
        of_x = graph.axes[x] = [None, None]
    if x is None or w is None or of_x is None or rank_w != 2 or len(of_x) != 2 or across is None or flipped is None:
        return graph.opaque(node, f"{label(node)}: its shapes are not known")
    graph.role(w, 0 if flipped else 1, "out", node)
    graph.contract(node, x, 0 if across else 1, w, 1 if flipped else 0)
    of_w = graph.of(w)
    assert of_w is not None
    result = [of_x[1 if across else 0], of_w[0 if flipped else 1]]
    if bias is not None:
        why = f"{label(node)} adds a constant to all of it"
        of_bias, sizes = graph.rank(bias), graph.dims(bias)
        if of_bias is None or sizes is None:
            return graph.opaque(node, f"{label(node)}: the shape of its bias is not known")
        for back in range(1, of_bias + 1):
            if sizes[-back] != 1:
                result[-back] = graph.tie(result[-back], bias, of_bias - back, why)
        if of_bias and sizes[-1] != 1:
            graph.role(bias, of_bias - 1, "bias", node)
    graph.set(node.outputs[0], result)


def matmul(graph: ChannelGraph, node: ir.Node) -> None:
    """a [..., M, K] times b [..., K, N], the leading axes broadcast."""
    a, b = node.inputs[0], node.inputs[1]
    rank_a, rank_b = graph.rank(a), graph.rank(b)
    if a is None or b is None or rank_a is None or rank_b is None or min(rank_a, rank_b) < 2:
        return graph.opaque(node, f"{label(node)}: its operands are vectors or of unknown rank")
    if graph.origin(b, rank_b - 1) is not None:
        graph.role(b, rank_b - 1, "out", node)
    elif graph.origin(a, rank_a - 2) is not None:
        graph.role(a, rank_a - 2, "out", node)
    graph.contract(node, a, rank_a - 1, b, rank_b - 2)
    of_a, of_b = graph.of(a), graph.of(b)
    assert of_a is not None
    assert of_b is not None
    rank = max(rank_a, rank_b)
    batch = broadcast(graph, node, [a, b], rank, stop=2)
    if constant(a) is None and constant(b) is None:
        graph.heads.extend(labels for labels in batch if labels is not None)
    graph.set(node.outputs[0], [*batch, of_a[-2], of_b[-1]])


def broadcast(graph: ChannelGraph, node: ir.Node, values: list[ir.Value], rank: int, *, stop: int = 0) -> list[Labels]:
    """Joins the axes of values that broadcast against each other, all but the last ``stop`` of them."""
    why = f"{label(node)} joins it with something that is not cut"
    result: list[Labels] = []
    for back in range(rank, stop, -1):
        wide: list[tuple[ir.Value, int]] = []
        sure = True
        for value in values:
            sizes = graph.dims(value)
            assert sizes is not None
            if len(sizes) >= back and sizes[-back] != 1:
                wide.append((value, len(sizes) - back))
                sure &= isinstance(sizes[-back], int)
        labels: Labels = None
        # Values that are computed come first, so that constants take over their atoms.
        for place, (value, axis) in enumerate(sorted(wide, key=lambda each: constant(each[0]) is not None)):
            if not sure:
                # One of them may be 1 at run time.
                labels = graph.tie(None, value, axis, why)
            elif place == 0:
                of_value = graph.of(value)
                labels = None if of_value is None else of_value[axis]
            else:
                labels = graph.tie(labels, value, axis, why)
        result.append(labels)
    return result


def batch_norm(graph: ChannelGraph, node: ir.Node) -> None:
    """Scale, shift, mean and variance for each channel."""
    _per_channel(graph, node, range(1, len(node.inputs)))


def instance_norm(graph: ChannelGraph, node: ir.Node) -> None:
    """Scale and shift for each channel; statistics of each channel alone, over space."""
    for labels in (graph.of(node.inputs[0]) or ())[2:]:
        graph.atoms.freeze(labels, f"{label(node)} takes statistics over it")
    _per_channel(graph, node, range(1, 3))


def _per_channel(graph: ChannelGraph, node: ir.Node, parameters: range) -> None:
    axes = graph.of(node.inputs[0])
    if axes is None or len(axes) < 2 or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return graph.opaque(node, f"{label(node)}: its shapes are not known")
    labels = axes[1]
    for index in parameters:
        value = node.inputs[index]
        if value is not None:
            labels = graph.tie(labels, value, 0, f"{label(node)} needs all of it")
            graph.role(value, 0, "scale" if index == 1 else "other", node)
    graph.set(node.outputs[0], [axes[0], labels, *axes[2:]])


def group_norm(graph: ChannelGraph, node: ir.Node) -> None:
    """Statistics of groups of channels: whole groups go. Scale and shift for each channel, as since opset 21."""
    axes = graph.of(node.inputs[0])
    groups = attribute_int(node, "num_groups", 0)
    labels = None if axes is None or len(axes) < 2 else axes[1]
    if axes is None or labels is None or not groups or len(labels) % groups:
        return graph.opaque(node, f"{label(node)}: its channels are not known")
    why = f"{label(node)} takes statistics of groups of it"
    heads = _tie_rows(graph, labels, groups)
    for index in (1, 2):
        value = node.inputs[index]
        assert value is not None
        graph.tie(labels, value, 0, why)
        graph.role(value, 0, "scale" if index == 1 else "other", node)
    for axis in range(2, len(axes)):
        graph.atoms.freeze(axes[axis], why)
    graph.rewrites.append(functools.partial(_fewer_groups, node, "num_groups", heads))
    graph.set(node.outputs[0], [axes[0], labels, *[None] * (len(axes) - 2)])


def layer_norm(graph: ChannelGraph, node: ir.Node) -> None:
    """LayerNormalization, RMSNormalization: statistics over the last axes, which are kept."""
    _statistics_from(graph, node, attribute_int(node, "axis", -1))


def softmax(graph: ChannelGraph, node: ir.Node) -> None:
    """Softmax and its kin: a sum over one axis; before opset 13 over all axes from there on."""
    axes = graph.of(node.inputs[0])
    axis = attribute_int(node, "axis", -1 if graph.opset >= 13 else 1)
    if axes is None or axis is None:
        return graph.opaque(node, f"{label(node)}: its axes are not known")
    span = range(axis % len(axes), axis % len(axes) + 1 if graph.opset >= 13 else len(axes))
    graph.set(node.outputs[0], _frozen_axes(graph, node, axes, [*span]))


def statistics_over(graph: ChannelGraph, node: ir.Node) -> None:
    """LpNormalization (one axis) and MeanVarianceNormalization (``axes``)."""
    axes = graph.of(node.inputs[0])
    if node.op_type == "MeanVarianceNormalization":
        over = attribute_ints(node, "axes") or (0, 2, 3)
    else:
        over = (attribute_int(node, "axis", -1) or 0,)
    if axes is None:
        return graph.opaque(node, f"{label(node)}: its axes are not known")
    graph.set(node.outputs[0], _frozen_axes(graph, node, axes, [*over]))


def _statistics_from(graph: ChannelGraph, node: ir.Node, axis: int | None) -> None:
    axes = graph.of(node.inputs[0])
    if axes is None or axis is None:
        return graph.opaque(node, f"{label(node)}: its axes are not known")
    result = _frozen_axes(graph, node, axes, [*range(axis % len(axes), len(axes))])
    for value in node.inputs[1:]:
        graph.keep_whole(value, f"{label(node)} takes statistics over it")
    for output in node.outputs:
        graph.set(output, result)


def _frozen_axes(graph: ChannelGraph, node: ir.Node, axes: list[Labels], over: list[int]) -> list[Labels]:
    result = list(axes)
    for axis in over:
        graph.atoms.freeze(axes[axis], f"{label(node)} takes statistics over it")
        result[axis] = None
    return result


def _tie_rows(graph: ChannelGraph, labels: npt.NDArray[np.int64], rows: int) -> npt.NDArray[np.int64]:
    """One class for each of ``rows`` consecutive runs of equal length; gives one atom of each."""
    table = labels.reshape(rows, -1)
    graph.atoms.join(table[:, :1], table)
    return np.ascontiguousarray(table[:, 0])


def _tie_columns(graph: ChannelGraph, labels: npt.NDArray[np.int64], rows: int) -> npt.NDArray[np.int64]:
    """One class of the i-th of each run, for each i; gives one atom of each."""
    table = labels.reshape(rows, -1)
    graph.atoms.join(table[:1], table)
    return np.ascontiguousarray(table[0])


def _fewer_groups(node: ir.Node, name: str, heads: npt.NDArray[np.int64], editor: Editor) -> None:
    node.attributes.add(ir.AttrInt64(name, editor.size(heads)))
