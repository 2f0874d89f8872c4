"""Where the CPU kernels of ONNX Runtime want Q/DQ: around every node, on its inputs and on its output.

QLinearConv, QLinearAdd and their like form where every input of a node comes from a DequantizeLinear and its
output goes to one QuantizeLinear and nowhere else (``onnxruntime/core/optimizer/qdq_transformer``). So:

* A Conv is always quantised at its output; every reader of the value reads the dequantised one. Gemm and
  MatMul also come without (QGemm, MatMulIntegerToFloat): theirs stay float unless integers are read, which keeps
  the logits of a classifier exact.
* Relu and Clip after such a node are absorbed: what they stop is outside of the range that integers can hold.
* Between quantised nodes, what only moves or chooses elements (Reshape, Transpose, Slice, Pad, MaxPool, Concat at
  one scale, a Relu with other readers before it ...) works on the integers themselves: there is nothing to fuse,
  and nothing to round again.
* Add, Mul, pooling, Concat, Sigmoid and LeakyRelu are quantised where an integer comes in and an integer is
  wanted; never on the way out to float, where they would cost accuracy and save nothing.

A float layer between DequantizeLinear and QuantizeLinear ONNX Runtime quantises itself, unasked and with one
scale for the whole weight (``weight_bias_quantization.cc``); and an Add or a MaxPool between them is QLinearAdd or
a MaxPool of integers, whoever put them there. What was left out would be left in, so a Max of one input, which is
its input, goes before it: the one identity that no optimisation takes out.

The fused SkipLayerNormalization is slow, so the additions before a LayerNormalization are kept from it
(``shield_layer_norm.py``).

OpenVINO reads the same graph, and runs it faster than one with Q/DQ on inputs alone: CPU time of one thread
0.55, 0.46 and 0.30 of float32 on ResNet-20, EfficientNet-Lite0 and ResNet-50, against 0.58, 0.48 and 0.30
(OpenVINO 2026.4, medians of interleaved runs).

ONNX Runtime has no integer kernel for ConvTranspose, for LSTM with ranges known beforehand, or for GRU.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from passes._graph import (
    Names,
    array,
    attribute_int,
    attribute_ints,
    constant,
    dims,
    given,
    integers,
    is_op,
    only_use,
    rank,
    set_inputs,
)
from passes._quant import TensorRange, affine_u8
from passes._quant_plan import (
    Bounds,
    Decline,
    Group,
    Layer,
    Plan,
    RangeOf,
    activation_bounds,
    clipped,
    in_place_resize,
    is_float,
    layers,
    zero_pad,
)
from passes.base import Declined, label
from passes.shield_layer_norm import shield_layer_norms

#: have a kernel on integers of their own scales
_ARITHMETIC = ("Add", "Mul", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Concat")
#: give elements of their input, so they can work on integers
_MOVERS = (
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "MaxPool",
    "Pad",
    "Reshape",
    "Resize",
    "Slice",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
    "Relu",
    "Clip",
)
#: a constant operand of Add or Mul is quantised if this normalised squared error is not passed
_CONSTANT_ERROR = 1e-4
#: an activation works on integers if it lets through this share of the range: a ReLU of something symmetric does
_CLIP_SHARE = 0.4


def prepare(model: ir.Model, names: Names, *, shield: bool) -> dict[str, str]:
    """Writes means over all of an image as GlobalAveragePool, of which there is an integer kernel.

    Args:
        shield: the runtime is ONNX Runtime, see ``shield_layer_norm.py``.

    Returns:
        For each value that is new the name of the one with the same elements; empty if nothing was changed
        but the names of ops.
    """
    same: dict[str, str] = {}
    if shield:
        shield_layer_norms(model.graph)
    for node in list(model.graph):
        kept = attribute_int(node, "keepdims", 1) if is_op(node, "ReduceMean") else None
        if kept is None or not _over_images(node):
            continue
        output = node.outputs[0]
        node.op_type = "GlobalAveragePool"
        node.attributes.clear()
        set_inputs(node, [node.inputs[0]])
        if kept:
            continue
        pooled = ir.Node("", "GlobalAveragePool", [node.inputs[0]], name=names.fresh(f"{label(node)}_pool"))
        pooled.outputs[0].name = names.fresh(f"{output.name}_pooled")
        pooled.outputs[0].type = output.type
        source = dims(node.inputs[0])
        assert source is not None
        pooled.outputs[0].shape = ir.Shape([*source[:2], *[1] * (len(source) - 2)])
        same[str(pooled.outputs[0].name)] = str(output.name)
        model.graph.insert_before(node, pooled)
        node.op_type = "Flatten"
        node.replace_input_with(0, pooled.outputs[0])
    return same


def _over_images(node: ir.Node) -> bool:
    """Whether a ReduceMean is over all axes but the first two."""
    axes = integers(given(node, 1)) if given(node, 1) is not None else attribute_ints(node, "axes")
    count = rank(node.inputs[0])
    if axes is None or count is None or count < 3 or not is_float(node.inputs[0]):
        return False
    return sorted(axis % count for axis in axes) == list(range(2, count))


def plan(graph: ir.Graph, range_of: RangeOf, exclude: frozenset[str], *, kernels: frozenset[str], shield: bool) -> Plan:
    """Decides where Q/DQ goes.

    Args:
        kernels: the layers that the runtime has integer kernels for, of ``LAYERS``.
        shield: the runtime would quantise float layers itself, see ``Plan``.
    """
    kept = frozenset(node for node in graph if label(node) in exclude)
    made = Plan(integer_bias=True, gather_integers=True, shield=shield, kept=kept)
    _Planner(graph, range_of, exclude, kernels, made).run()
    return made


class _Planner:
    def __init__(
        self, graph: ir.Graph, range_of: RangeOf, exclude: frozenset[str], kernels: frozenset[str], made: Plan
    ) -> None:
        self.graph = graph
        self.range_of = range_of
        self.exclude = exclude
        self.kernels = kernels
        self.plan = made
        self.layers: dict[ir.Node, Layer] = {}
        #: candidates, in order, with the value that stands for their result
        self.results: dict[ir.Node, ir.Value] = {}
        self.activations: dict[ir.Node, ir.Node] = {}
        self.skipped: set[ir.Node] = set()
        #: values that arrive as integers if their producer is quantised
        self.native: set[ir.Value] = set()
        self.quantised: set[ir.Node] = set()

    def run(self) -> None:
        self._candidates()
        self._wanted()
        self._groups()
        self._edges()

    def _candidates(self) -> None:
        """Forward: what could be quantised, given what comes in."""
        found = layers(self.graph, self.exclude, self.plan.declined)
        for node in self.graph:
            if node in self.skipped:
                continue
            if node in found:
                try:
                    self._layer(found[node])
                except Decline as reason:
                    self.plan.declined.append(Declined(label(node), str(reason)))
            elif label(node) not in self.exclude:
                if is_op(node, *_ARITHMETIC):
                    self._arithmetic(node)
                elif self._moves(node):
                    self.native.update(node.outputs)
                    self.results[node] = node.outputs[0]

    def _layer(self, layer: Layer) -> None:
        node = layer.node
        if node.op_type not in self.kernels:
            raise Decline("the runtime has no integer kernel for it")
        if layer.weight is None:
            raise Decline("it multiplies two computed values, which gains little and costs accuracy")
        activation = self._activation(node)
        result = node.outputs[0] if activation is None else activation.outputs[0]
        source = node.inputs[0]
        assert source is not None
        for value in (source, result) if node.op_type == "Conv" else (source,):
            if value not in self.native and self.range_of(value) is None:
                raise Decline(f"the calibration has no range for {value.name!r}")
        self.layers[node] = layer
        self._note(node, activation)

    def _activation(self, node: ir.Node) -> ir.Node | None:
        """The Relu or Clip after the node that its quantisation would absorb."""
        value = node.outputs[0]
        user = only_use(value)
        if user is None or user.graph is not self.graph or label(user) in self.exclude:
            return None
        bounds = activation_bounds(user)
        if bounds is None or user.inputs[0] is not value or not bounds.low <= 0 <= bounds.high:
            return None
        return user if self.range_of(user.outputs[0]) is not None else None

    def _note(self, node: ir.Node, activation: ir.Node | None) -> None:
        """Takes the node as a candidate, whose result is that of the activation if there is one."""
        if activation is not None:
            self.activations[node] = activation
            self.skipped.add(activation)
        result = (activation or node).outputs[0]
        self.results[node] = result
        if self.range_of(result) is not None:
            self.native.add(result)

    def _arithmetic(self, node: ir.Node) -> None:
        """Takes the node if integers come in, and the rest can be made integers."""
        inputs = [value for value in node.inputs if value is not None]
        constants = {value for value in inputs if constant(value) is not None}
        computed = [value for value in inputs if value not in constants]
        if len(node.outputs) != 1 or not all(is_float(value) for value in (*computed, node.outputs[0])):
            return
        if not any(value in self.native for value in computed):
            return
        activation = self._activation(node)
        if self.range_of((activation or node).outputs[0]) is None:
            return
        if not all(value in self.native or self.range_of(value) is not None for value in computed):
            return
        if is_op(node, "AveragePool") and any(d != 1 for d in attribute_ints(node, "dilations") or ()):
            return  # QLinearAveragePool knows no dilations
        # Its bias a MatMul adds in float, exactly and for nothing.
        if constants and any(is_op(value.producer(), "MatMul") for value in computed):
            return
        if not all(_quantises_well(value) for value in constants):
            return
        self._note(node, activation)

    def _moves(self, node: ir.Node) -> bool:
        if not is_op(node, *_MOVERS) or given(node, 0) not in self.native or not is_float(node.outputs[0]):
            return False
        match node.op_type:
            case "MaxPool":
                return len(node.outputs) == 1
            case "Resize":
                return in_place_resize(node)
            case "Pad":
                return zero_pad(node)
            case "Relu" | "Clip":
                bounds = activation_bounds(node)
                return bounds is not None and bounds.low <= 0 <= bounds.high and self._keeps_precision(node)
        return True

    def _keeps_precision(self, node: ir.Node) -> bool:
        """Whether the result of an activation loses no more than about a bit at the scale of its input."""
        source = node.inputs[0]
        assert source is not None
        before, after = self.range_of(source), self.range_of(node.outputs[0])
        if before is None or after is None:
            return True
        return after.high - after.low >= _CLIP_SHARE * (before.high - before.low)

    def _wanted(self) -> None:
        """Backward: of those, the ones whose integers somebody reads."""
        for node in reversed(list(self.results)):
            if node in self.layers or self._read_as_integers(node):
                self.quantised.add(node)

    def _read_as_integers(self, node: ir.Node) -> bool:
        values = [self.results[node]] if self._of_one(node) else list(node.outputs)
        return any(use.node in self.quantised and self._is_data(use.node, use.idx) for v in values for use in v.uses())

    def _of_one(self, node: ir.Node) -> bool:
        return node in self.layers or is_op(node, *_ARITHMETIC)

    def _is_data(self, node: ir.Node, index: int) -> bool:
        """Whether the input is one that would be integers."""
        return index == 0 or is_op(node, "Add", "Mul", "Concat")

    def _groups(self) -> None:
        groups = self.plan.groups
        for node in self.results:
            if node not in self.quantised:
                continue
            for index, value in enumerate(node.inputs):
                if value is not None and self._is_data(node, index) and value not in groups:
                    self._add(value, None)
            if not self._of_one(node):
                source = node.inputs[0]
                assert source is not None
                for output in node.outputs:
                    groups.follow(output, source)
                self.plan.movers.append(node)
                continue
            if node in self.layers:
                self.plan.layers[node] = self.layers[node]
            elif not is_op(node, "Concat"):
                self.plan.others.append(node)
            if node.op_type != "Conv" and not self._read_as_integers(node):
                continue
            activation = self.activations.get(node)
            result = self.results[node]
            self._add(result, None if activation is None else activation_bounds(activation))
            if activation is not None:
                self.plan.absorbed[node.outputs[0]] = activation
            if is_op(node, "Concat"):
                self._concat(node, result)
            else:
                self.plan.sources.append(result)

    def _add(self, value: ir.Value, bounds: Bounds | None) -> None:
        range_ = self.range_of(value)
        if range_ is None:
            # Only constants come without: they bring their own.
            data = array(value)
            assert data is not None, value
            range_ = _range_of_constant(data)
        if bounds is None:
            self.plan.groups.add(value, Group(range_))
        else:
            self.plan.groups.add(value, Group(clipped(range_, bounds), bounds))

    def _concat(self, node: ir.Node, result: ir.Value) -> None:
        """A Concat whose inputs all take its scale moves integers; otherwise it is a QLinearConcat."""
        groups = self.plan.groups
        shared = [
            value is not None and self._exclusive(value, node) and groups.join(result, value) for value in node.inputs
        ]
        if all(shared) and self.activations.get(node) is None:
            self.plan.movers.append(node)
        else:
            self.plan.others.append(node)
            self.plan.sources.append(result)

    def _exclusive(self, value: ir.Value, reader: ir.Node) -> bool:
        """Whether only the reader would notice another scale of the value."""
        if constant(value) is not None or len(value.uses()) != 1 or value.is_graph_output():
            return False
        producer = value.producer()
        if producer in self.plan.movers and producer is not None:
            source = producer.inputs[0]
            assert source is not None
            return len(producer.outputs) == 1 and self._exclusive(source, producer)
        return True

    def _edges(self) -> None:
        """Every integer input of what stays in Q/DQ form reads the dequantised value."""
        for node in (*self.plan.layers, *self.plan.others):
            for index, value in enumerate(node.inputs):
                if value is not None and self._is_data(node, index) and (index == 0 or node not in self.plan.layers):
                    self.plan.edges.append((node, index))


def _range_of_constant(data: np.ndarray) -> TensorRange:
    low, high = float(data.min(initial=0)), float(data.max(initial=0))
    return TensorRange(low, high, max(-low, high), low, high, "minmax")


def _quantises_well(value: ir.Value) -> bool:
    data = array(value)
    if data is None or data.dtype != np.float32 or not data.size or not np.isfinite(data).all():
        return False
    wide = data.astype(np.float64)
    low, high = float(wide.min()), float(wide.max())
    found = affine_u8(low, high)
    back = (np.clip(np.rint(wide / found.scale) + found.zero_point, 0, 255) - found.zero_point) * found.scale
    return bool(np.square(back - wide).sum() <= _CONSTANT_ERROR * np.square(wide).sum())
