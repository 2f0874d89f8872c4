"""Stores weights as int8 and computes in float: a quarter of the file, and next to nothing of the accuracy.

::

    x -> Conv(w) -> y              x -> Conv(DequantizeLinear(w8)) -> y
    indices -> Gather(w) -> y      indices -> Gather(w8) -> Cast -> Mul(Gather(scales)) -> y

Symmetric int8 with a scale for each output channel of Conv, ConvTranspose, Gemm and MatMul, for each row of a table
of embeddings; with ``block_size`` Gemm and MatMul have a scale for each output channel and block of inputs, which
outliers among the inputs hurt less (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 2). Biases stay float.

What becomes of it when it is loaded is the runtime's choice. ONNX Runtime 1.31 on the CPU keeps the weights of MatMul
and Gemm as int8 and dequantises inside of its kernel (MatMulNBits). It dequantises those of a convolution in every
run; with the session option ``session.disable_quant_qdq`` set to 1 it does so once, at loading, and all are float.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnx_ir as ir

from passes._graph import Names, Scope, constant, is_op, scopes
from passes._integer_weights import (
    WeightStore,
    embedding_weight,
    look_up_integers,
    new_node,
    quantize_table,
    require_large,
    require_opset,
)
from passes._quant_plan import LAYERS, Decline, layer_of
from passes._quant_weights import QuantizedWeight, quantize_array
from passes.base import Declined, InvalidOption, Outcome, Pass, label
from passes.quantize_int8 import check_exclude, fill_in_types, quantised


@dataclasses.dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Stores weights as int8 behind DequantizeLinear; activations stay in float.

    Attributes:
        exclude: nodes that stay in float, by name, or as reports name them.
        block_size: inputs of Gemm and MatMul that share a scale, a power of two from 16; None for a scale for each
            output channel alone. Needs opset 21.
        weights: balanced covers the largest weight and rounds so that the errors of a channel cancel; amax rounds
            to the nearest instead; mse clips where the squared error is least.
        smallest: weights of fewer elements stay in float.
    """

    exclude: tuple[str, ...] = ()
    block_size: int | None = None
    weights: str = "balanced"
    smallest: int = 1 << 10

    def __post_init__(self) -> None:
        if self.weights not in ("balanced", "amax", "mse"):
            raise InvalidOption(
                f"option weights of pass quantize_weights is {self.weights!r}", hint="wanted: balanced, amax, mse"
            )
        size = self.block_size
        if size is not None and (size < 16 or size & (size - 1)):
            raise InvalidOption(
                f"option block_size of pass quantize_weights is {size}", hint="wanted: a power of two from 16"
            )

    def call(self, model: ir.Model) -> Outcome:
        if (found := quantised(model)) is not None:
            reason = f"the model is quantised already: this is a {found.op_type}"
            return Outcome(model, False, declined=(Declined(label(found), reason),))
        check_exclude(model, self.exclude)
        changed = fill_in_types(model)
        names = Names(model)
        store = WeightStore(names)
        fired = 0
        declined: list[Declined] = []
        dequantised: dict[ir.Value, ir.Value] = {}
        for scope in scopes(model):
            for node in list(scope.graph):
                if not is_op(node, *LAYERS, "Gather"):
                    continue
                try:
                    if label(node) in self.exclude:
                        raise Decline("excluded")
                    fired += self._store(scope, node, store, names, dequantised)
                except Decline as reason:
                    declined.append(Declined(label(node), str(reason)))
        store.forget_floats()
        return Outcome(model, changed or fired > 0, fired=fired, declined=tuple(declined))

    def _store(
        self,
        scope: Scope,
        node: ir.Node,
        store: WeightStore,
        names: Names,
        dequantised: dict[ir.Value, ir.Value],
    ) -> bool:
        """Whether the node's weight is int8 from now on; a MatMul of two values and a Gather of others have none."""
        if node.op_type == "Gather":
            table = embedding_weight(node, self.smallest)
            tensor = constant(table)
            if table is None or tensor is None:
                return False
            make = functools.partial(quantize_table, tensor, method=self.weights)
            look_up_integers(node, store.put(scope, table, ("table",), make, before=node, zero_point=False), names)
            return True
        layer = layer_of(node)
        weight, axis = layer.weight, layer.axis
        tensor = constant(weight)
        if weight is None or tensor is None:
            return False
        require_large(tensor, self.smallest)
        require_opset(scope, 13, "DequantizeLinear by channel")
        data = tensor.numpy()
        turned = node.op_type == "Gemm" and axis == 0
        if turned:
            # ONNX Runtime has a kernel for DequantizeLinear -> Gemm without transB only
            data, axis = data.T, 1
        size = self.block_size
        block = None
        if size is not None and node.op_type in ("Gemm", "MatMul") and axis is not None and data.shape[0] > size:
            require_opset(scope, 21, "DequantizeLinear by block")
            block = size
            make = functools.partial(by_block, data, size, method=self.weights)
        else:
            make = functools.partial(quantize_array, data, axis, method=self.weights)
        stored = store.put(scope, weight, (axis, turned, block), make, before=node)
        if stored.values not in dequantised:
            attributes = []
            if axis is not None:
                attributes.append(ir.AttrInt64("axis", axis if block is None else 0))
            if block is not None:
                attributes.append(ir.AttrInt64("block_size", block))
            made = new_node(
                "DequantizeLinear",
                [stored.values, stored.scale, stored.zero_point],
                f"{weight.name}_dequantize",
                names=names,
                before=node,
                outputs=((f"{weight.name}_dequantized", ir.DataType.FLOAT),),
                attributes=tuple(attributes),
            )
            made.outputs[0].shape = ir.Shape(data.shape)
            dequantised[stored.values] = made.outputs[0]
        node.replace_input_with(1, dequantised[stored.values])
        if turned:
            del node.attributes["transB"]
        return True


def by_block(matrix: np.ndarray, size: int, *, method: str) -> QuantizedWeight:
    """Quantises a matrix [inputs, channels] with a scale for each ``size`` inputs of a channel.

    Returns:
        Values [inputs, channels] and scales [ceil(inputs / size), channels].
    """
    rows = matrix.T
    count = -(-rows.shape[1] // size)
    padded = np.zeros((len(rows), count * size), np.float32)
    padded[:, : rows.shape[1]] = rows
    made = quantize_array(padded.reshape(-1, size), 0, method=method)
    values = made.values.reshape(padded.shape)[:, : rows.shape[1]]
    scale = made.scale.reshape(len(rows), count)
    return QuantizedWeight(np.ascontiguousarray(values.T), np.ascontiguousarray(scale.T), 0)
