"""What is to be quantised in a graph, before anything is changed: layers, values, shared scales, absorbed activations.

The dialects (``_quant_outputs.py``, ``_quant_inputs.py``) fill a ``Plan``; ``_qdq.py`` carries it out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from passes._graph import array, attribute_float, attribute_int, constant, given, is_op, scalar
from passes._linear import one_row
from passes._quant import TensorRange
from passes.base import Declined, label

#: ops with weights: what quantisation is about
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

#: looks up the calibrated range of a value; None where there is none
RangeOf = Callable[[ir.Value], TensorRange | None]


class Decline(Exception):
    """Why a node stays in float."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Layer:
    """A node with a weight.

    Attributes:
        node: Conv, ConvTranspose, Gemm or MatMul.
        weight: float32 constant; None for a MatMul of two values that are computed.
        axis: the axis of the weight's output channels; None where one scale must do.
        bias: float32 [channels], Gemm's beta multiplied in; None without.
        factor: Gemm's alpha, to be multiplied into the weight.
        together: so many indices of the axis in a row are inputs of one output channel, and share a scale.
    """

    node: ir.Node
    weight: ir.Value | None
    axis: int | None
    bias: np.ndarray | None
    factor: float = 1.0
    together: int = 1

    def of_outputs(self, scale: np.ndarray, outputs: int) -> np.ndarray:
        """The scale of each of the ``outputs`` channels, from one for each index of ``axis``."""
        own = scale[:: self.together]
        return np.tile(own, outputs // len(own))

    def of_indices(self, floor: np.ndarray, indices: int) -> np.ndarray:
        """The other way round: the largest number among the output channels of each index of ``axis``."""
        own: np.ndarray = floor.reshape(-1, indices // self.together).max(axis=0)
        return np.repeat(own, self.together)


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """What an activation lets through: Relu is 0 to infinity."""

    low: float
    high: float


@dataclasses.dataclass(eq=False, slots=True)
class Group:
    """Values with one scale.

    Attributes:
        range: what it covers; None until the first value that brings a range.
        bounds: what the absorbed activations of its values let through; the range stays inside.
    """

    range: TensorRange | None
    bounds: Bounds = Bounds(-math.inf, math.inf)


class Groups:
    """Which values share a scale: sets that can be joined."""

    def __init__(self) -> None:
        self._parent: dict[ir.Value, ir.Value] = {}
        self._group: dict[ir.Value, Group] = {}

    def add(self, value: ir.Value, group: Group) -> None:
        """Starts a group of one value."""
        self._parent[value] = value
        self._group[value] = group

    def follow(self, value: ir.Value, source: ir.Value) -> None:
        """Puts a value that brings no range of its own into the group of another."""
        self._parent[value] = self._root(source)

    def join(self, a: ir.Value, b: ir.Value) -> bool:
        """Joins two groups, unless a value would then pass what an absorbed activation has to stop."""
        left, right = self._root(a), self._root(b)
        if left is right:
            return True
        one, other = self._group[left], self._group[right]
        bounds = Bounds(max(one.bounds.low, other.bounds.low), min(one.bounds.high, other.bounds.high))
        both = union([g.range for g in (one, other) if g.range is not None])
        if both is not None and not within(both, bounds):
            return False
        self._parent[right] = left
        self._group[left] = Group(both, bounds)
        return True

    def of(self, value: ir.Value) -> Group:
        """The group of a value."""
        return self._group[self._root(value)]

    def __contains__(self, value: ir.Value) -> bool:
        return value in self._parent

    def _root(self, value: ir.Value) -> ir.Value:
        while self._parent[value] is not value:
            value = self._parent[value]
        return value


@dataclasses.dataclass(eq=False)
class Plan:
    """What to do with a graph.

    Attributes:
        layers: get integer weights.
        tables: Gathers from a table of embeddings, which becomes integers.
        gather_integers: the rows are looked up as integers and scaled then, not dequantised as a table.
        integer_bias: the bias becomes int32 at the scale of the product.
        shield: float layers between Q/DQ, and ``kept``, are kept from a runtime that would quantise them itself.
        kept: nodes that were asked to stay in float.
        others: further nodes that compute on integers (Add, pooling, Concat ...).
        edges: these inputs (node, index) read the dequantised value instead.
        sources: values of which every reader reads the dequantised value.
        movers: nodes that only move or choose elements, and do it on the integers themselves.
        absorbed: activations that the quantisation of the value before them does, by that value.
        groups: the shared scales; holds every value that is quantised.
        declined: nodes left in float, and why.
    """

    layers: dict[ir.Node, Layer] = dataclasses.field(default_factory=dict)
    tables: list[ir.Node] = dataclasses.field(default_factory=list)
    gather_integers: bool = False
    integer_bias: bool = False
    shield: bool = False
    kept: frozenset[ir.Node] = frozenset()
    others: list[ir.Node] = dataclasses.field(default_factory=list)
    edges: list[tuple[ir.Node, int]] = dataclasses.field(default_factory=list)
    sources: list[ir.Value] = dataclasses.field(default_factory=list)
    movers: list[ir.Node] = dataclasses.field(default_factory=list)
    absorbed: dict[ir.Value, ir.Node] = dataclasses.field(default_factory=dict)
    groups: Groups = dataclasses.field(default_factory=Groups)
    declined: list[Declined] = dataclasses.field(default_factory=list)


def union(ranges: Iterable[TensorRange]) -> TensorRange | None:
    """The least range that covers all; None of none."""
    found = list(ranges)
    if not found:
        return None
    return TensorRange(
        min(r.low for r in found),
        max(r.high for r in found),
        max(r.amax for r in found),
        min(r.minimum for r in found),
        max(r.maximum for r in found),
        found[0].method,
    )


def within(range_: TensorRange, bounds: Bounds) -> bool:
    """Whether integers that cover the range (and zero) cannot stand for anything beyond the bounds."""
    return bounds.low <= min(range_.low, 0.0) and max(range_.high, 0.0) <= bounds.high


def clipped(range_: TensorRange, bounds: Bounds) -> TensorRange:
    """The part of the range that the bounds let through."""
    low, high = (float(np.clip(x, bounds.low, bounds.high)) for x in (range_.low, range_.high))
    return dataclasses.replace(range_, low=low, high=high, amax=min(range_.amax, max(-bounds.low, bounds.high)))


def activation_bounds(node: ir.Node) -> Bounds | None:
    """The bounds of a Relu or a Clip by constants; None for anything else."""
    if is_op(node, "Relu"):
        return Bounds(0.0, math.inf)
    if not is_op(node, "Clip"):
        return None
    limits = []
    for index, default in ((1, -math.inf), (2, math.inf)):
        value = given(node, index)
        limit = default if value is None else scalar(value)
        if limit is None:
            return None
        limits.append(limit)
    return Bounds(*limits)


def layer_of(node: ir.Node) -> Layer:
    """What a Conv, ConvTranspose, Gemm or MatMul brings to quantisation.

    Raises:
        Decline: it cannot be quantised, whatever the dialect.
    """
    for value in (given(node, 0), given(node, 1), node.outputs[0]):
        if value is not None and value.dtype is not None and value.dtype != ir.DataType.FLOAT:
            raise Decline(f"it computes in {value.dtype.name.lower()}; only float32 is quantised")
    if constant(given(node, 0)) is not None:
        raise Decline("its first input is constant: the weight is expected as the second")
    weight = given(node, 1)
    tensor = constant(weight)
    if node.op_type == "MatMul":
        if tensor is None:
            return Layer(node, None, None, None)
        if len(tensor.shape) < 2:
            raise Decline("its weight is a vector")
        return Layer(node, weight, 1 if len(tensor.shape) == 2 else None, None)
    if tensor is None:
        raise Decline("its weight is not constant")
    if tensor.dtype != ir.DataType.FLOAT:
        raise Decline(f"its weight is {tensor.dtype.name.lower()}; only float32 is quantised")
    bias = None
    if given(node, 2) is not None:
        bias = array(given(node, 2))
        if bias is None:
            raise Decline("its bias is not constant")
    if node.op_type == "Gemm":
        return _gemm(node, weight, bias)
    if node.op_type == "Conv":
        return Layer(node, weight, 0, bias)
    return _conv_transpose(node, weight, tensor, bias)


def _conv_transpose(
    node: ir.Node, weight: ir.Value | None, tensor: ir.TensorProtocol, bias: np.ndarray | None
) -> Layer:
    """Output channel c of group g is at [g * in : (g + 1) * in, c], and DequantizeLinear has scales for one axis.

    So channels with one place in their groups share a scale; where every group is one channel, it has its own.
    """
    group = attribute_int(node, "group", 1)
    if group is None or len(tensor.shape) < 3 or group < 1 or tensor.shape.numpy()[0] % group:
        raise Decline("its group does not fit its weight")
    inputs, outputs = tensor.shape.numpy()[:2]
    if group > 1 and outputs == 1:
        return Layer(node, weight, 0, bias, together=inputs // group)
    return Layer(node, weight, 1, bias)


def _gemm(node: ir.Node, weight: ir.Value | None, bias: np.ndarray | None) -> Layer:
    alpha, beta = attribute_float(node, "alpha", 1.0), attribute_float(node, "beta", 1.0)
    transposed = attribute_int(node, "transB", 0)
    if alpha is None or beta is None or transposed is None or not math.isfinite(alpha) or alpha == 0:
        raise Decline("its alpha, beta or transB is not known")
    if attribute_int(node, "transA", 0) != 0:
        raise Decline("transA is set: its input is not in rows")
    axis = 0 if transposed else 1
    tensor = constant(weight)
    assert tensor is not None
    channels = tensor.numpy().shape[axis]
    if bias is not None:
        bias = one_row(bias, channels)
        if bias is None:
            raise Decline("its C differs from row to row")
        bias *= np.float32(beta)
    return Layer(node, weight, axis, bias, alpha)


def is_float(value: ir.Value | None) -> bool:
    """Whether the value is a float32 tensor."""
    return value is not None and value.dtype == ir.DataType.FLOAT


def layers(graph: ir.Graph, exclude: frozenset[str], declined: list[Declined]) -> dict[ir.Node, Layer]:
    """Every node of the graph with a weight to quantise; the reasons of the others go to ``declined``."""
    found = {}
    for node in graph:
        if not is_op(node, *LAYERS):
            continue
        try:
            if label(node) in exclude:
                raise Decline("excluded")
            found[node] = layer_of(node)
        except Decline as reason:
            declined.append(Declined(label(node), str(reason)))
    return found


def in_place_resize(node: ir.Node) -> bool:
    """Whether a Resize only repeats elements."""
    return (
        node.attributes.get_string("mode", "nearest") == "nearest"
        and node.attributes.get_string("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
    )


def zero_pad(node: ir.Node) -> bool:
    """Whether a Pad adds zeros, or elements that are there already."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return True
    value = given(node, 2)
    return value is None or scalar(value) == 0
