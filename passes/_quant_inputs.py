"""Where TensorRT wants Q/DQ: on the inputs of what computes in integers, and nowhere else.

It moves and fuses Q/DQ on its own, and chooses the type of an output by who reads it ("Working with Quantized
Types" in its documentation, Q/DQ placement recommendations). So:

* Conv, ConvTranspose, Gemm and MatMul read dequantised values on all inputs; their bias stays float.
* Of a residual Add, only the branch that does not come straight from a convolution is quantised: the other one
  stays inside of the kernel that does Conv, Add and Relu in one.
* Pooling by average, and the inputs of a Concat that is read as integers, are quantised too; those of the Concat
  at one scale.
* Values that differ only by Reshape, Transpose, MaxPool and their like share a scale, so that Q and DQ can move
  through.
"""

from __future__ import annotations

import onnx_ir as ir

from passes._graph import constant, given, is_op, only_use
from passes._quant_plan import (
    Decline,
    Group,
    Plan,
    RangeOf,
    activation_bounds,
    in_place_resize,
    is_float,
    layers,
)
from passes.base import Declined, label

#: through these Q and DQ move freely
_MOVERS = (
    "Flatten",
    "Identity",
    "MaxPool",
    "Reshape",
    "Resize",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
_POOLING = ("AveragePool", "GlobalAveragePool")


def plan(graph: ir.Graph, range_of: RangeOf, exclude: frozenset[str]) -> Plan:
    """Decides where Q/DQ goes."""
    made = Plan()
    _Planner(graph, range_of, exclude, made).run()
    return made


class _Planner:
    def __init__(self, graph: ir.Graph, range_of: RangeOf, exclude: frozenset[str], made: Plan) -> None:
        self.graph = graph
        self.range_of = range_of
        self.exclude = exclude
        self.plan = made
        #: values that are read as integers, in order
        self.read: dict[ir.Value, None] = {}
        self.concats: list[ir.Node] = []

    def run(self) -> None:
        for node, layer in layers(self.graph, self.exclude, self.plan.declined).items():
            try:
                inputs = [0] if layer.weight is not None else [0, 1]
                for index in inputs:
                    value = given(node, index)
                    assert value is not None
                    if self.range_of(value) is None:
                        raise Decline(f"the calibration has no range for {value.name!r}")
            except Decline as reason:
                self.plan.declined.append(Declined(label(node), str(reason)))
                continue
            self.plan.layers[node] = layer
            for index in inputs:
                self._edge(node, index)
        # Backward: whoever wants integers has been seen before who could give them.
        for node in reversed(list(self.graph)):
            if label(node) in self.exclude or node in self.plan.layers:
                continue
            if is_op(node, "Add"):
                self._residual(node)
            elif is_op(node, *_POOLING):
                if self._comes_from_layer(node.inputs[0]) and self._quantisable(node.inputs[0]):
                    self._edge(node, 0)
                    self.plan.others.append(node)
            elif is_op(node, "Concat"):
                self._concat(node)
        self._groups()

    def _edge(self, node: ir.Node, index: int) -> None:
        value = node.inputs[index]
        assert value is not None
        self.plan.edges.append((node, index))
        self.read[value] = None

    def _quantisable(self, value: ir.Value | None) -> bool:
        return value is not None and is_float(value) and constant(value) is None and self.range_of(value) is not None

    def _wanted(self, value: ir.Value) -> bool:
        """Whether the value is read as integers, here or after what Q moves through."""
        if value in self.read:
            return True
        for use in value.uses():
            node = use.node
            passes = is_op(node, *_MOVERS) or activation_bounds(node) is not None
            if passes and use.idx == 0 and self._wanted(node.outputs[0]):
                return True
        return False

    def _comes_from_layer(self, value: ir.Value | None) -> bool:
        """Whether a quantised layer computes the value, up to an Add, an activation or what Q moves through."""
        node = value.producer() if value is not None else None
        if node is None:
            return False
        if node in self.plan.layers:
            return True
        if is_op(node, "Add"):
            return any(each is not None and each.producer() in self.plan.layers for each in node.inputs)
        if is_op(node, *_MOVERS) or activation_bounds(node) is not None:
            return self._comes_from_layer(node.inputs[0])
        return False

    def _residual(self, node: ir.Node) -> None:
        if not self._wanted(node.outputs[0]):
            return
        fused = [i for i, value in enumerate(node.inputs) if value is not None and self._stays_inside(value)]
        if not fused:
            return
        # Of two convolutions the later one can take the other's result in; Q/DQ goes on that result.
        order = {each: position for position, each in enumerate(self.plan.layers)}
        main = max(fused, key=lambda i: order[_producer(node.inputs[i])])
        if self._quantisable(node.inputs[1 - main]):
            self._edge(node, 1 - main)
            self.plan.others.append(node)

    def _stays_inside(self, value: ir.Value) -> bool:
        return value.producer() in self.plan.layers and only_use(value) is not None

    def _concat(self, node: ir.Node) -> None:
        if not self._wanted(node.outputs[0]) or not all(self._quantisable(value) for value in node.inputs):
            return
        if not any(self._comes_from_layer(value) for value in node.inputs):
            return
        for index in range(len(node.inputs)):
            self._edge(node, index)
        self.concats.append(node)
        self.plan.others.append(node)

    def _groups(self) -> None:
        groups = self.plan.groups
        first: dict[ir.Value, ir.Value] = {}
        for value in self.read:
            groups.add(value, Group(self.range_of(value)))
            root = _root(value)
            if root in first:
                groups.join(first[root], value)
            first.setdefault(root, value)
        for node in self.concats:
            inputs = [value for value in node.inputs if value is not None]
            for value in inputs[1:]:
                groups.join(inputs[0], value)
            root = _root(node.outputs[0])
            if root in first:
                groups.join(first[root], inputs[0])


def _root(value: ir.Value) -> ir.Value:
    """The value before everything that Q and DQ move through."""
    producer = value.producer()
    while is_op(producer, *_MOVERS) and producer is not None:
        if producer.op_type == "Resize" and not in_place_resize(producer):
            break
        source = producer.inputs[0]
        assert source is not None
        value, producer = source, source.producer()
    return value


def _producer(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node
