"""A layer with a constant weight, whatever its op, in one orientation: what rescaling channels computes with.

Conv [O, I/g, k...], ConvTranspose [I, O/g, k...], Gemm and MatMul [I, O] (or [O, I]) all become
``[g, O/g, I/g, taps]`` in float64. Output channel ``c`` is row ``c % (O/g)`` of group ``c // (O/g)``, and so
for input channels. Rounded back once, when all is computed.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import onnx_ir as ir

from passes._graph import (
    FLOATS,
    Names,
    Scope,
    array,
    attribute_float,
    attribute_int,
    constant,
    given,
    is_op,
    new_constant,
    set_inputs,
)
from passes.base import label

#: ops that this module knows
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class NotLinear(Exception):
    """Why a node is no layer that can be rescaled."""


@dataclasses.dataclass(eq=False)
class Linear:
    """A layer, to be changed here and then written with ``write``.

    Attributes:
        node: Conv, ConvTranspose, Gemm or MatMul.
        weight: float64 [g, O/g, I/g, taps], to be changed in place; Gemm's alpha is not in it.
        bias: float64 [O], Gemm's beta multiplied in; None without.
        alpha: what the node multiplies the product with.
    """

    node: ir.Node
    weight: np.ndarray
    bias: np.ndarray | None
    alpha: float = 1.0

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return int(self.weight.shape[0] * self.weight.shape[1])

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return int(self.weight.shape[0] * self.weight.shape[2])

    def scale_outputs(self, factors: np.ndarray) -> None:
        """Multiplies each output channel, bias too; ``factors`` is [O]."""
        self.weight *= factors.reshape(self.weight.shape[0], -1, 1, 1)
        if self.bias is not None:
            self.bias = self.bias * factors

    def scale_inputs(self, factors: np.ndarray) -> None:
        """Multiplies what each input channel is multiplied with; ``factors`` is [I]."""
        self.weight *= factors.reshape(self.weight.shape[0], 1, -1, 1)

    def output_absmax(self) -> np.ndarray:
        """Largest magnitude of the weights of each output channel, [O]."""
        largest: np.ndarray = np.abs(self.weight).max(axis=(2, 3), initial=0).reshape(-1)
        return largest

    def input_absmax(self) -> np.ndarray:
        """Largest magnitude of the weights of each input channel, [I]."""
        largest: np.ndarray = np.abs(self.weight).max(axis=(1, 3), initial=0).reshape(-1)
        return largest

    def check(self) -> None:
        """Raises NotLinear where a number would leave the range of the weight's type."""
        largest = max(float(np.abs(a).max(initial=0)) for a in (self.weight, self.bias) if a is not None)
        if not largest <= float(ml_dtypes.finfo(self._tensor().dtype.numpy()).max):
            raise NotLinear(f"{label(self.node)}: the new numbers leave the range of {self._tensor().dtype.name}")

    def write(self, scope: Scope, names: Names) -> None:
        """Gives the node the weight and bias, as new constants named after its output. ``check`` comes first.

        A MatMul that got a bias becomes a Gemm: its input has to be a matrix.
        """
        node, tensor = self.node, self._tensor()
        dtype = tensor.dtype.numpy()
        base = str(node.outputs[0].name)
        weight = np.ascontiguousarray(self._oriented(tuple(tensor.shape.numpy()))).astype(dtype)
        replaced = list(node.inputs[1:])
        node.replace_input_with(1, new_constant(scope, weight, names.fresh(f"{base}_weight"), before=node))
        if self.bias is not None:
            if node.op_type == "MatMul":
                node.op_type = "Gemm"
            value = new_constant(scope, self.bias.astype(dtype), names.fresh(f"{base}_bias"), before=node)
            set_inputs(node, [node.inputs[0], node.inputs[1], value])
            if node.op_type == "Gemm":
                node.attributes.add(ir.AttrFloat32("beta", 1.0))
        for old in replaced:
            drop_unused(old)

    def _tensor(self) -> ir.TensorProtocol:
        tensor = constant(self.node.inputs[1])
        assert tensor is not None
        return tensor

    def _oriented(self, shape: tuple[int, ...]) -> np.ndarray:
        return oriented(self.node, self.weight, shape)


def read_linear(node: ir.Node, *, shared: bool = False, any_input: bool = False) -> Linear:
    """Reads a layer; one whose weight others read too only if ``shared``.

    ``any_input``: a Gemm with transA too, whose channels are rows of its input: only its outputs may be scaled.

    Raises:
        NotLinear: its numbers are not constant, or not its own; the message says which.
    """
    if not is_op(node, *LINEAR):
        raise NotLinear(f"{label(node)} is no layer with a weight")
    value = given(node, 1)
    tensor = constant(value)
    if value is None or tensor is None:
        raise NotLinear(f"{label(node)}: its weight is not constant")
    if tensor.dtype not in FLOATS:
        raise NotLinear(f"{label(node)}: its weight is {tensor.dtype.name.lower()}")
    if not shared and (len(value.uses()) != 1 or value.is_graph_output()):
        raise NotLinear(f"{label(node)}: its weight is shared")
    weight = canonical(node, tensor.numpy(), any_input=any_input)
    outputs = weight.shape[0] * weight.shape[1]
    if node.op_type == "MatMul":
        return Linear(node, weight, None)
    bias = None
    if given(node, 2) is not None:
        data = array(given(node, 2))
        if data is None:
            raise NotLinear(f"{label(node)}: its bias is not constant")
        bias = data.astype(np.float64)
    if node.op_type != "Gemm":
        return Linear(node, weight, bias)
    alpha, beta = attribute_float(node, "alpha", 1.0), attribute_float(node, "beta", 1.0)
    if alpha is None or beta is None:
        raise NotLinear(f"{label(node)}: its attributes are not constant")
    if bias is not None:
        bias = one_row(bias, outputs)
        if bias is None:
            raise NotLinear(f"{label(node)}: its C differs from row to row")
        bias = beta * bias
    return Linear(node, weight, bias, alpha)


def one_row(c: np.ndarray, channels: int) -> np.ndarray | None:
    """A new vector [channels] that stands for Gemm's C; None where C differs from row to row."""
    if c.ndim and (c.size != c.shape[-1] or c.size not in (1, channels)):
        return None
    return np.broadcast_to(c.reshape(-1), (channels,)).copy()


def canonical(node: ir.Node, data: np.ndarray, *, any_input: bool = False) -> np.ndarray:
    """A new float64 array [g, O/g, I/g, taps] of the weight ``data`` of a layer. Raises NotLinear."""
    if node.op_type in ("Conv", "ConvTranspose"):
        group = attribute_int(node, "group", 1)
        if group is None or data.ndim < 3 or group < 1 or data.shape[0] % group:
            raise NotLinear(f"{label(node)}: its group does not fit its weight")
        wide = data.astype(np.float64).reshape(group, data.shape[0] // group, data.shape[1], -1)
        return wide if node.op_type == "Conv" else np.ascontiguousarray(wide.swapaxes(1, 2))
    if data.ndim != 2:
        raise NotLinear(f"{label(node)}: its weight is no matrix")
    transposed: int | None = 0
    if node.op_type == "Gemm":
        transposed = attribute_int(node, "transB", 0)
        if transposed is None or (not any_input and attribute_int(node, "transA", 0) != 0):
            raise NotLinear(f"{label(node)}: its channels are not in columns")
    matrix = data if transposed else data.T
    return np.array(matrix, dtype=np.float64, order="C").reshape(1, *matrix.shape, 1)


def oriented(node: ir.Node, weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The way back from ``canonical``: an array [g, O/g, I/g, taps] as the node's weight of this shape."""
    if node.op_type == "ConvTranspose":
        weight = weight.swapaxes(1, 2)
    elif node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute_int(node, "transB", 0)):
        return weight[0, :, :, 0].T
    return weight.reshape(shape)


def drop_unused(value: ir.Value | None) -> None:
    """Takes an initializer out of its graph that nobody reads any more: two copies of a weight are one too many."""
    if value is None or not value.is_initializer() or value.uses() or value.is_graph_output():
        return
    graph = value.graph
    if graph is not None and not value.is_graph_input():
        del graph.initializers[str(value.name)]
