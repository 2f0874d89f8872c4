"""Quantises weights now, and activations while the model runs: INT8 without calibration, for transformers.

::

    x -> MatMul(w) -> y        x -> DynamicQuantizeLinear -> MatMulInteger(w8) -> Cast -> Mul(s_x * s_w) -> y

Each run takes the scale of ``x`` from the least and the largest element of ``x``, so a range that differs from
sentence to sentence costs nothing; what it costs is a look at every activation. Layers that read one value share its
DynamicQuantizeLinear. A weight is int8, symmetric, with a scale for each output channel; an activation is uint8, one
scale and zero-point a tensor, as DynamicQuantizeLinear defines them.

Gemm becomes the same with its C added behind. A Gather from a table of embeddings looks up int8 rows and their
scales, and multiplies. LSTM becomes ``com.microsoft::DynamicQuantizeLSTM``, which ONNX Runtime alone has; all else is
standard ONNX. Convolutions stay in float: their integer kernels without calibrated outputs are the slower ones.

On the CPU ONNX Runtime fuses a row of these nodes into one kernel, DynamicQuantizeMatMul where nobody shares the
input and MatMulIntegerToFloat where somebody does, the addition of a bias included. The fused
SkipLayerNormalization is slow there, so the additions before a LayerNormalization are kept from it
(``shield_layer_norm.py``).
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnx_ir as ir

from passes._graph import Names, Scope, array, attribute_int, constant, given, is_op, new_constant, scopes, set_inputs
from passes._integer_weights import (
    WeightStore,
    embedding_weight,
    look_up_integers,
    new_node,
    quantize_table,
    require_large,
    require_opset,
    turn_into,
)
from passes._quant_plan import Decline, Layer, is_float, layer_of
from passes._quant_weights import QuantizedWeight, quantize_array
from passes.base import Declined, InvalidOption, Outcome, Pass, label
from passes.quantize_int8 import check_exclude, fill_in_types, quantised
from passes.shield_layer_norm import shield_layer_norms

_OPS = ("MatMul", "Gemm", "LSTM", "GRU", "Gather")


@dataclasses.dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Quantises weights of MatMul, Gemm, LSTM and embeddings to int8; activations as the model runs.

    Attributes:
        exclude: nodes that stay in float, by name, or as reports name them.
        granularity: channel for a weight scale for each output channel, tensor for one.
        weights: balanced covers the largest weight and rounds so that the errors of a channel cancel; amax rounds
            to the nearest instead; mse clips where the squared error is least.
        embeddings: quantise the tables of embeddings too.
        lstm: quantise LSTM too, with an op that only ONNX Runtime has.
        smallest: weights of fewer elements stay in float: up to 128 x 128, looking at the input takes ONNX Runtime
            longer than integers save it.
    """

    exclude: tuple[str, ...] = ()
    granularity: str = "channel"
    weights: str = "balanced"
    embeddings: bool = True
    lstm: bool = True
    smallest: int = 1 << 14

    def __post_init__(self) -> None:
        for option, allowed in (("granularity", ("channel", "tensor")), ("weights", ("balanced", "amax", "mse"))):
            if getattr(self, option) not in allowed:
                raise InvalidOption(
                    f"option {option} of pass quantize_dynamic is {getattr(self, option)!r}",
                    hint="wanted: " + ", ".join(allowed),
                )

    def call(self, model: ir.Model) -> Outcome:
        if (found := quantised(model)) is not None:
            reason = f"the model is quantised already: this is a {found.op_type}"
            return Outcome(model, False, declined=(Declined(label(found), reason),))
        check_exclude(model, self.exclude)
        changed = fill_in_types(model)
        rewrite = _Rewrite(model, self)
        for scope in scopes(model):
            for node in list(scope.graph):
                if is_op(node, *_OPS):
                    rewrite.visit(scope, node)
        rewrite.store.forget_floats()
        if rewrite.fired:
            for scope in scopes(model):
                shield_layer_norms(scope.graph)
        return Outcome(model, changed or rewrite.fired > 0, fired=rewrite.fired, declined=tuple(rewrite.declined))


class _Rewrite:
    def __init__(self, model: ir.Model, options: QuantizeDynamic) -> None:
        self.model = model
        self.options = options
        self.names = Names(model)
        self.store = WeightStore(self.names)
        self.fired = 0
        self.declined: list[Declined] = []
        self._quantised: dict[tuple[ir.Graph, ir.Value], tuple[ir.Value, ...]] = {}

    def visit(self, scope: Scope, node: ir.Node) -> None:
        try:
            if label(node) in self.options.exclude:
                raise Decline("excluded")
            match node.op_type:
                case "MatMul" | "Gemm":
                    self._layer(scope, node)
                case "Gather":
                    if not self._embedding(scope, node):
                        return
                case "LSTM":
                    self._lstm(scope, node)
                case "GRU":
                    raise Decline("no runtime here has a GRU that quantises its input as it runs")
        except Decline as reason:
            self.declined.append(Declined(label(node), str(reason)))
            return
        self.fired += 1

    def _layer(self, scope: Scope, node: ir.Node) -> None:
        layer = layer_of(node)
        value = given(node, 0)
        if layer.weight is None:
            raise Decline("its weight is not constant")
        if value is None or not is_float(value):
            raise Decline("the type of its input is not known")
        tensor = constant(layer.weight)
        assert tensor is not None
        require_large(tensor, self.options.smallest)
        require_opset(scope, 11, "DynamicQuantizeLinear")
        transposed = node.op_type == "Gemm" and attribute_int(node, "transB", 0) == 1
        axis = layer.axis if self.options.granularity == "channel" else None

        def make() -> QuantizedWeight:
            # MatMulInteger has no transB: [channels, inputs] is turned once, here
            data = tensor.numpy() * np.float32(layer.factor) if layer.factor != 1 else tensor.numpy()
            return quantize_array(
                data.T if transposed else data, None if axis is None else 1, method=self.options.weights
            )

        stored = self.store.put(
            scope, layer.weight, (axis, transposed, layer.factor), make, before=node, zero_point=False
        )
        bias = self._bias(scope, layer)
        quantized, scale, zero_point = self._quantise(scope, value, before=node)
        self._multiply(scope, node, (quantized, stored.values, zero_point), (scale, stored.scale), bias)

    def _bias(self, scope: Scope, layer: Layer) -> ir.Value | None:
        """Gemm's C as one vector, which is what ONNX Runtime takes into its kernel."""
        if layer.bias is None:
            return None
        given_bias = given(layer.node, 2)
        data = array(given_bias)
        if data is not None and data.shape == layer.bias.shape and np.array_equal(data, layer.bias):
            return given_bias
        assert given_bias is not None
        name = self.names.fresh(f"{layer.node.outputs[0].name}_bias")
        return new_constant(scope, layer.bias, name, before=layer.node)

    def _quantise(self, scope: Scope, value: ir.Value, *, before: ir.Node) -> tuple[ir.Value, ...]:
        """uint8, scale and zero-point of a value, computed once in a graph."""
        key = (scope.graph, value)
        if key not in self._quantised:
            node = new_node(
                "DynamicQuantizeLinear",
                [value],
                f"{value.name}_quantize",
                names=self.names,
                before=before,
                outputs=(
                    (f"{value.name}_quantized", ir.DataType.UINT8),
                    (f"{value.name}_scale", ir.DataType.FLOAT),
                    (f"{value.name}_zero_point", ir.DataType.UINT8),
                ),
            )
            node.outputs[0].shape = value.shape.copy() if value.shape is not None else None
            node.outputs[1].shape, node.outputs[2].shape = ir.Shape([]), ir.Shape([])
            self._quantised[key] = tuple(node.outputs)
        return self._quantised[key]

    def _multiply(
        self,
        scope: Scope,
        node: ir.Node,
        factors: tuple[ir.Value, ir.Value, ir.Value],
        scales: tuple[ir.Value, ir.Value],
        bias: ir.Value | None,
    ) -> None:
        """Puts MatMulInteger, Cast and Mul before the node, which itself becomes the last of them."""
        output = node.outputs[0]
        shape = output.shape

        def add(
            op_type: str, inputs: list[ir.Value], suffix: str, dtype: ir.DataType, *attributes: ir.Attr
        ) -> ir.Value:
            made = new_node(
                op_type,
                inputs,
                f"{label(node)}_{suffix}",
                names=self.names,
                before=node,
                outputs=((f"{output.name}_{suffix}", dtype),),
                attributes=attributes,
            ).outputs[0]
            made.shape = shape.copy() if shape is not None else None
            return made

        quantized, weight, zero_point = factors
        zero = new_constant(
            scope, np.array(0, np.int8), self.names.fresh(f"{output.name}_weight_zero_point"), before=node
        )
        product = add("MatMulInteger", [quantized, weight, zero_point, zero], "integer", ir.DataType.INT32)
        real = add("Cast", [product], "unscaled", ir.DataType.FLOAT, ir.AttrInt64("to", ir.DataType.FLOAT.value))
        scale = add("Mul", list(scales), "scale", ir.DataType.FLOAT)
        scale.shape = scales[1].shape.copy() if scales[1].shape is not None else None
        if bias is None:
            turn_into(node, "Mul")
            set_inputs(node, [real, scale])
            return
        scaled = add("Mul", [real, scale], "scaled", ir.DataType.FLOAT)
        turn_into(node, "Add")
        set_inputs(node, [scaled, bias])

    def _embedding(self, scope: Scope, node: ir.Node) -> bool:
        """Whether the node looks up embeddings, in integers from now on."""
        if not self.options.embeddings:
            return False
        weight = embedding_weight(node, self.options.smallest)
        if weight is None:
            return False
        tensor = constant(weight)
        assert tensor is not None
        make = functools.partial(quantize_table, tensor, method=self.options.weights)
        stored = self.store.put(scope, weight, ("table",), make, before=node, zero_point=False)
        look_up_integers(node, stored, self.names)
        return True

    def _lstm(self, scope: Scope, node: ir.Node) -> None:
        if not self.options.lstm:
            raise Decline("option lstm is off")
        if scope.in_function:
            raise Decline("it is in a function, which would have to import another domain")
        if attribute_int(node, "layout", 0) != 0:
            raise Decline("its layout is 1: DynamicQuantizeLSTM has the sequence first")
        if not is_float(given(node, 0)):
            raise Decline("its input is not known to be float32")
        found: list[tuple[ir.Value, ir.TensorProtocol]] = []
        for index in (1, 2):
            value = given(node, index)
            tensor = constant(value)
            if value is None or tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 3:
                raise Decline("its weights are not constant float32")
            require_large(tensor, self.options.smallest)
            found.append((value, tensor))
        weights: list[ir.Value] = []
        parameters: list[ir.Value] = []
        for value, tensor in found:
            stored = self.store.put(scope, value, ("gates",), functools.partial(self._gates, tensor), before=node)
            weights.append(stored.values)
            assert stored.zero_point is not None
            parameters += [stored.scale, stored.zero_point]
        rest = [given(node, index) for index in range(3, 8)]
        kept = [a for a in node.attributes.values() if a.name != "layout"]
        turn_into(node, "DynamicQuantizeLSTM", domain="com.microsoft")
        for attribute in kept:
            node.attributes.add(attribute)
        set_inputs(node, [node.inputs[0], *weights, *rest, *parameters])
        self.model.opset_imports.setdefault("com.microsoft", 1)

    def _gates(self, tensor: ir.TensorProtocol) -> QuantizedWeight:
        """[directions, gates, inputs] turned to [directions, inputs, gates], with scales [directions, gates]."""
        data = tensor.numpy()
        directions, gates, inputs = data.shape
        if self.options.granularity == "channel":
            made = quantize_array(data.reshape(-1, inputs), 0, method=self.options.weights)
            scale = made.scale.reshape(directions, gates)
        else:
            made = quantize_array(data.reshape(directions, -1), 0, method=self.options.weights)
            scale = made.scale.reshape(directions)
        values = made.values.reshape(directions, gates, inputs).transpose(0, 2, 1)
        return QuantizedWeight(np.ascontiguousarray(values), scale, None)
