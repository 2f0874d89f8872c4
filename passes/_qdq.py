"""Carries out a plan: QuantizeLinear and DequantizeLinear, integer weights, int32 biases, integer movers.

Names: a float value keeps its name. What is made of value ``x`` is called ``x_scale``, ``x_zero_point``,
``x_quantized`` and ``x_dequantized``; where the float value itself goes (an absorbed activation, a mover that
works on integers, an output of the graph), the dequantised value, which stands for it, takes over its name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from passes._graph import Names, Scope, constant, is_op, new_constant, remove, set_inputs
from passes._integer_weights import WeightStore, look_up_integers, quantize_table
from passes._quant import Affine, TensorRange
from passes._quant_plan import Group, Layer, Plan, activation_bounds
from passes._quant_weights import QuantizedWeight, bias_scale_floor, quantize_array, quantize_weight


def carry_out(
    scope: Scope,
    plan: Plan,
    names: Names,
    *,
    affine: Callable[[TensorRange], Affine],
    dtype: type[np.uint8] | type[np.int8],
    per_channel: bool,
    weights: str,
) -> None:
    """Changes the graph as planned.

    Args:
        affine: from a range to scale and zero-point of ``dtype``.
        dtype: of activations.
        per_channel: a scale for each output channel of a weight, or one for all.
        weights: how their ranges are chosen, see ``quantize_weight``.
    """
    _Writer(scope, plan, names, affine, dtype, per_channel, weights).run()


class _Writer:
    def __init__(
        self,
        scope: Scope,
        plan: Plan,
        names: Names,
        affine: Callable[[TensorRange], Affine],
        dtype: type[np.uint8] | type[np.int8],
        per_channel: bool,
        weights: str,
    ) -> None:
        self.scope = scope
        self.graph = scope.graph
        self.plan = plan
        self.names = names
        self.affine = affine
        self.dtype = dtype
        self.per_channel = per_channel
        self.method = weights
        self.first = next(iter(self.graph))
        self.parameters: dict[Group, tuple[Affine, ir.Value, ir.Value]] = {}
        self.integers: dict[ir.Value, ir.Value] = {}
        self.dequantised: dict[ir.Value, ir.Value] = {}
        self.weights: dict[tuple[ir.Value, int | None, float, int], ir.Value] = {}
        self.tables = WeightStore(names)
        self.replaced: list[ir.Value] = []

    def run(self) -> None:
        edges = [(node, index, _input(node, index)) for node, index in self.plan.edges]
        movers = [
            (node, [(i, _input(node, i)) for i in range(len(node.inputs) if is_op(node, "Concat") else 1)])
            for node in self.plan.movers
        ]
        moved = {output for node in self.plan.movers for output in node.outputs}
        for value in self.plan.sources:
            self._quantise(value, all_readers=True)
        for value in [v for _, _, v in edges] + [v for _, inputs in movers for _, v in inputs]:
            if value not in self.integers and value not in moved:
                self._quantise(value, all_readers=False)
        for node, inputs in movers:
            self._move(node, inputs)
        for node in self.plan.tables:
            self._table(node)
        for layer in self.plan.layers.values():
            self._layer(layer, edges)
        for node, index, value in edges:
            node.replace_input_with(index, self.dequantised[value])
        for value in self.dequantised.values():
            producer = value.producer()
            if producer is not None and not value.uses() and not value.is_graph_output():
                remove(producer)
        for value in self.replaced:
            self._drop_constant(value)
        if self.plan.shield:
            for node in list(self.graph):
                in_float = is_op(node, "Conv", "ConvTranspose", "Gemm") and node not in self.plan.layers
                if in_float or node in self.plan.kept:
                    self._shield(node)

    def _parameters(self, value: ir.Value) -> tuple[Affine, ir.Value, ir.Value]:
        group = self.plan.groups.of(value)
        if group not in self.parameters:
            assert group.range is not None
            found = self.affine(group.range)
            scale = self._constant(np.array(found.scale, np.float32), f"{value.name}_scale")
            zero_point = self._constant(np.array(found.zero_point, self.dtype), f"{value.name}_zero_point")
            self.parameters[group] = found, scale, zero_point
        return self.parameters[group]

    def _constant(self, data: np.ndarray, name: str) -> ir.Value:
        return new_constant(self.scope, data, self.names.fresh(name), before=self.first)

    def _quantise(self, value: ir.Value, *, all_readers: bool) -> None:
        """Makes the integers of a float value, and the value that they stand for."""
        data = constant(value)
        found, scale, zero_point = self._parameters(value)
        name = value.name
        if data is not None:
            limits = np.iinfo(self.dtype)
            rounded = np.rint(data.numpy().astype(np.float64) / found.scale) + found.zero_point
            integers = self._constant(np.clip(rounded, limits.min, limits.max).astype(self.dtype), f"{name}_quantized")
            self.integers[value] = integers
            self._dequantise(value, scale, zero_point, before=self.first)
            self.replaced.append(value)
            return
        activation = next((a for a in self.plan.absorbed.values() if a.outputs[0] is value), None)
        raw = value if activation is None else _input(activation, 0)
        uses = list(value.uses()) if all_readers else []
        quantise = ir.Node("", "QuantizeLinear", [raw, scale, zero_point], name=self.names.fresh(f"{name}_quantize"))
        integers = quantise.outputs[0]
        integers.name = self.names.fresh(f"{name}_quantized")
        self._typed(integers, value)
        producer = raw.producer()
        if producer is not None:
            self.graph.insert_after(producer, quantise)
        else:
            self.graph.insert_before(self.first, quantise)
        self.integers[value] = integers
        dequantised = self._dequantise(value, scale, zero_point, after=quantise)
        for use in uses:
            use.node.replace_input_with(use.idx, dequantised)
        if all_readers and (activation is not None or value.is_graph_output()):
            self._take_over(value, dequantised)
        if activation is not None:
            remove(activation)

    def _dequantise(
        self,
        value: ir.Value,
        scale: ir.Value,
        zero_point: ir.Value,
        *,
        after: ir.Node | None = None,
        before: ir.Node | None = None,
    ) -> ir.Value:
        """The DequantizeLinear of the value's integers."""
        node = ir.Node(
            "",
            "DequantizeLinear",
            [self.integers[value], scale, zero_point],
            name=self.names.fresh(f"{value.name}_dequantize"),
        )
        result = node.outputs[0]
        result.name = self.names.fresh(f"{value.name}_dequantized")
        result.type = ir.TensorType(ir.DataType.FLOAT)
        result.shape = value.shape.copy() if value.shape is not None else None
        if after is not None:
            self.graph.insert_after(after, node)
        elif before is not None:
            self.graph.insert_before(before, node)
        self.dequantised[value] = result
        return result

    def _typed(self, integers: ir.Value, value: ir.Value) -> None:
        integers.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(self.dtype)))
        integers.shape = value.shape.copy() if value.shape is not None else None

    def _take_over(self, value: ir.Value, dequantised: ir.Value) -> None:
        """Gives the dequantised value the name, and the place among the graph's outputs."""
        name = value.name
        value.name = None
        dequantised.name = name
        value.name = self.names.fresh(f"{name}_float")
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[index] = dequantised

    def _move(self, node: ir.Node, inputs: list[tuple[int, ir.Value]]) -> None:
        """Lets a node work on integers: its input's scale is its output's."""
        found, scale, zero_point = self._parameters(node.outputs[0])
        for index, value in inputs:
            node.replace_input_with(index, self.integers[value])
        if is_op(node, "Pad") and node.attributes.get_string("mode", "constant") == "constant":
            set_inputs(node, [*node.inputs[:2], zero_point, *node.inputs[3:]])
        elif is_op(node, "Relu", "Clip"):
            self._clip(node, found)
        for output in node.outputs:
            uses = list(output.uses())
            dequantised = self._dequantise_moved(node, output, scale, zero_point)
            for use in uses:
                use.node.replace_input_with(use.idx, dequantised)

    def _dequantise_moved(self, node: ir.Node, output: ir.Value, scale: ir.Value, zero_point: ir.Value) -> ir.Value:
        self.integers[output] = output
        name = output.name
        dequantised = self._dequantise(output, scale, zero_point, after=node)
        self._take_over(output, dequantised)
        output.name = self.names.fresh(f"{name}_quantized")
        self._typed(output, output)
        return dequantised

    def _clip(self, node: ir.Node, found: Affine) -> None:
        bounds = activation_bounds(node)
        assert bounds is not None
        limits = np.iinfo(self.dtype)
        inputs: list[ir.Value | None] = [node.inputs[0]]
        for side, bound in (("min", bounds.low), ("max", bounds.high)):
            if not np.isfinite(bound):
                inputs.append(None)
                continue
            integer = np.clip(np.rint(bound / found.scale) + found.zero_point, limits.min, limits.max)
            inputs.append(self._constant(np.array(integer, self.dtype), f"{node.outputs[0].name}_{side}"))
        node.op_type = "Clip"
        set_inputs(node, inputs)

    def _table(self, node: ir.Node) -> None:
        """Replaces the table of a Gather by integers with a scale for each row."""
        table = _input(node, 0)
        tensor = constant(table)
        assert tensor is not None
        self.replaced.append(table)
        if self.plan.gather_integers:
            make = functools.partial(quantize_table, tensor, method=self.method)
            stored = self.tables.put(self.scope, table, ("table",), make, before=node, zero_point=False)
            look_up_integers(node, stored, self.names)
            return
        key = (table, 0, 1.0, 1)
        if key not in self.weights:
            weight = quantize_weight(tensor, 0, method=self.method)
            # At the front: a layer with the same weight may come before or after.
            self.weights[key] = self._dequantised_constant(
                weight.values, weight.scale, 0, np.int8, str(table.name), before=self.first
            )
        node.replace_input_with(0, self.weights[key])

    def _layer(self, layer: Layer, edges: list[tuple[ir.Node, int, ir.Value]]) -> None:
        node = layer.node
        if layer.weight is None:
            return
        axis = layer.axis if self.per_channel else None
        floor = None
        tensor = constant(layer.weight)
        assert tensor is not None
        together = layer.together if axis is not None else 1
        weight = quantize_weight(tensor, axis, method=self.method, factor=layer.factor, together=together)
        if layer.bias is not None and self.plan.integer_bias:
            input_scale = self._parameters(next(v for n, i, v in edges if n is node and i == 0))[0].scale
            floor = bias_scale_floor(layer.bias, input_scale)
            floor = floor.max(initial=0) if axis is None else layer.of_indices(floor, len(weight.scale))
            if np.any(weight.scale < floor):
                data = tensor.numpy() * np.float32(layer.factor)
                weight = quantize_array(data, axis, method=self.method, floor=np.asarray(floor), together=together)
            else:
                floor = None
            self._bias(layer, weight, input_scale)
        key = (layer.weight, axis, layer.factor, together)
        if floor is not None or key not in self.weights:
            self.weights[key] = self._dequantised_constant(
                weight.values, weight.scale, axis, np.int8, str(layer.weight.name), before=node
            )
        value = self.weights[key]
        if floor is not None:
            del self.weights[key]
        node.replace_input_with(1, value)
        self.replaced.append(layer.weight)
        if layer.factor != 1:
            node.attributes.add(ir.AttrFloat32("alpha", 1.0))

    def _bias(self, layer: Layer, weight: QuantizedWeight, input_scale: float) -> None:
        node = layer.node
        assert layer.bias is not None
        old = _input(node, 2)
        # float32, as the kernel multiplies: DequantizeLinear's scale must be the product to the bit
        scale = np.float32(input_scale) * weight.scale
        if weight.axis is not None:
            scale = layer.of_outputs(scale, len(layer.bias))
        rounded = np.rint(layer.bias.astype(np.float64) / scale)
        integers = np.clip(rounded, -(2**31), 2**31 - 1).astype(np.int32)
        axis = None if weight.axis is None else 0
        value = self._dequantised_constant(integers, scale, axis, np.int32, f"{node.outputs[0].name}_bias", node)
        node.replace_input_with(2, value)
        self.replaced.append(old)
        if node.op_type == "Gemm":
            node.attributes.add(ir.AttrFloat32("beta", 1.0))

    def _dequantised_constant(
        self, integers: np.ndarray, scale: np.ndarray, axis: int | None, dtype: type, name: str, before: ir.Node
    ) -> ir.Value:
        """A constant of integers and its DequantizeLinear, with a scale for each index of ``axis``."""
        scale = np.asarray(scale, np.float32)
        node = ir.Node(
            "",
            "DequantizeLinear",
            [
                self._constant(integers, f"{name}_quantized"),
                self._constant(scale, f"{name}_scale"),
                self._constant(np.zeros(scale.shape, dtype), f"{name}_zero_point"),
            ],
            [ir.AttrInt64("axis", axis)] if axis is not None else [],
            name=self.names.fresh(f"{name}_dequantize"),
        )
        value = node.outputs[0]
        value.name = self.names.fresh(f"{name}_dequantized")
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(integers.shape)
        self.graph.insert_before(before, node)
        return value

    def _shield(self, node: ir.Node) -> None:
        """Puts a Max of one input between a float node and the DequantizeLinear before it."""
        source = node.inputs[0] if node.inputs else None
        if source is None:
            return
        # Wherever the output goes: the runtime moves QuantizeLinear up to it, through MaxPool or Transpose.
        if not is_op(source.producer(), "DequantizeLinear"):
            return
        same = ir.Node("", "Max", [source], name=self.names.fresh(f"{source.name}_as_float"))
        value = same.outputs[0]
        value.name, value.type = self.names.fresh(f"{source.name}_as_float"), source.type
        value.shape = source.shape.copy() if source.shape is not None else None
        self.graph.insert_before(node, same)
        node.replace_input_with(0, value)

    def _drop_constant(self, value: ir.Value) -> None:
        """Takes a float constant out of the graph that nobody reads any more."""
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            return
        producer = value.producer()
        if producer is not None:
            if producer.graph is not None:
                remove(producer)
        else:
            self.graph.initializers.pop(str(value.name), None)


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
