"""Computes BatchNormalization into the weights of the Conv, ConvTranspose, Gemm or MatMul beside it.

At inference BatchNormalization is one multiplication and one addition a channel::

    BN(v) = s v + t      s = gamma / sqrt(var + epsilon),  t = beta - s mean

After a linear layer (its output channel c)::

    BN(W x + b)          ->   (s W) x + (s b + t)

Before one (its input channel i), as long as no padding mixes zeros in, which BN would have shifted::

    W BN(x) + b          ->   (W s) x + (b + W t)

The scale is computed in float64 and rounded once. New weights are new initializers, named after the output
they feed, so other users of a shared weight keep theirs. Declined: training mode, parameters that are
not constant, a linear output that something else reads too, and weights that would leave their type's
range (float16).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from passes._graph import (
    FLOATS,
    Names,
    Scope,
    array,
    attribute_float,
    attribute_int,
    attribute_ints,
    can_replace,
    constant,
    given,
    is_op,
    new_constant,
    only_use,
    rank,
    remove,
    replace,
    scopes,
    set_inputs,
)
from passes.base import Declined, Outcome, Pass, label

_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class _Decline(Exception):
    """Why a BatchNormalization stays."""


@dataclasses.dataclass(frozen=True)
class FuseConvBn(Pass):
    """Fuses BatchNormalization into the linear layer before it or, where the algebra allows, after it.

    Attributes:
        before: fuse into the layer after it too.
    """

    before: bool = True

    def call(self, model: ir.Model) -> Outcome:
        fired = 0
        declined: list[Declined] = []
        names = Names(model)
        for scope in scopes(model):
            for node in list(scope.graph):
                if not is_op(node, "BatchNormalization"):
                    continue
                try:
                    self._fuse(scope, node, names)
                    fired += 1
                except _Decline as reason:
                    declined.append(Declined(label(node), str(reason)))
        return Outcome(model, fired > 0, fired=fired, declined=tuple(declined))

    def _fuse(self, scope: Scope, node: ir.Node, names: Names) -> None:
        source = node.inputs[0]
        assert source is not None
        linear = source.producer()
        if is_op(linear, *_LINEAR) and linear is not None and linear.graph is node.graph:
            if only_use(source) is None:
                raise _Decline(f"{label(linear)}: something else reads its output too")
            _after(scope, linear, node, *_scale_and_shift(scope, node), names)
            return
        user = only_use(node.outputs[0])
        if self.before and is_op(user, *_LINEAR) and user is not None and user.graph is node.graph:
            _before(scope, node, user, *_scale_and_shift(scope, node), names)
            return
        raise _Decline("no Conv, ConvTranspose, Gemm or MatMul of its own beside it")


def _scale_and_shift(scope: Scope, node: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    """The float64 vectors s and t, one element a channel."""
    if scope.opset < 7:
        raise _Decline(f"opset {scope.opset}: only 7 and later are known here")
    if scope.opset >= 14 and attribute_int(node, "training_mode", 0) != 0:
        raise _Decline("it is in training mode")
    if len(node.outputs) > 1 and (scope.opset < 14 or any(v.uses() or v.is_graph_output() for v in node.outputs[1:])):
        raise _Decline("it has outputs of training mode")
    if scope.opset < 9 and attribute_int(node, "spatial", 1) != 1:
        raise _Decline("spatial is 0: a mean and a variance an element, not a channel")
    epsilon = attribute_float(node, "epsilon", 1e-5)
    parameters = [array(given(node, index)) for index in range(1, 5)]
    if epsilon is None or any(p is None or p.ndim != 1 for p in parameters):
        raise _Decline("its parameters are not constant")
    gamma, beta, mean, variance = (p.astype(np.float64) for p in parameters if p is not None)
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + epsilon)
        shift = beta - scale * mean
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        raise _Decline("its parameters give no finite scale and shift")
    return scale, shift


def _weight(linear: ir.Node) -> np.ndarray:
    tensor = constant(given(linear, 1))
    if tensor is None:
        raise _Decline(f"{label(linear)}: its weight is not constant")
    if tensor.dtype not in FLOATS:
        raise _Decline(f"{label(linear)}: its weight is {tensor.dtype.name}")
    return tensor.numpy()


def _bias(linear: ir.Node) -> np.ndarray | None:
    value = given(linear, 2)
    if value is None:
        return None
    data = array(value)
    if data is None:
        raise _Decline(f"{label(linear)}: its bias is not constant")
    return data.astype(np.float64)


def _group(linear: ir.Node) -> int:
    group = attribute_int(linear, "group", 1)
    if group is None:
        raise _Decline(f"{label(linear)}: its group is not constant")
    return group


def _multiply(weight: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Product in the weight's own type; float16 and bfloat16 are computed in float32 and rounded once."""
    wide = np.float64 if weight.dtype == np.float64 else np.float32
    product: np.ndarray = weight.astype(wide, copy=False) * factors.astype(wide)
    return product


def _rounded(data: np.ndarray, dtype: np.dtype, linear: ir.Node) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        result = data.astype(dtype, copy=False)
        # Finite only if every element is, and one pass without a second array of flags.
        total = np.sum(result, dtype=np.float64)
    if not np.isfinite(total):
        raise _Decline(f"{label(linear)}: the fused weights leave the range of {dtype}")
    return result


def _gemm(linear: ir.Node) -> tuple[float, float, bool]:
    alpha, beta = attribute_float(linear, "alpha", 1.0), attribute_float(linear, "beta", 1.0)
    transposed = attribute_int(linear, "transB", 0)
    if alpha is None or beta is None or transposed is None:
        raise _Decline(f"{label(linear)}: its attributes are not constant")
    return alpha, beta, bool(transposed)


def _row(bias: np.ndarray | None, beta: float, count: int, linear: ir.Node) -> np.ndarray:
    """Gemm's C as one float64 vector over the output's columns."""
    if bias is None:
        return np.zeros(count)
    if bias.ndim > 2 or (bias.ndim == 2 and bias.shape[0] != 1) or bias.shape[-1:] not in ((), (1,), (count,)):
        raise _Decline(f"{label(linear)}: its C differs from row to row")
    return np.broadcast_to(beta * bias.reshape(-1), (count,)).astype(np.float64)


def _after(
    scope: Scope,
    linear: ir.Node,
    bn: ir.Node,
    scale: np.ndarray,
    shift: np.ndarray,
    names: Names,
) -> None:
    """linear -> BN becomes linear with other weights, and takes over the name of BN's output."""
    weight, bias = _weight(linear), _bias(linear) if linear.op_type != "MatMul" else None
    channels = len(scale)
    if linear.op_type == "Conv":
        _expect(weight.shape[0] == channels, linear)
        fused = _multiply(weight, scale.reshape(-1, *[1] * (weight.ndim - 1)))
    elif linear.op_type == "ConvTranspose":
        group = _group(linear)
        _expect(weight.shape[1] * group == channels, linear)
        grouped = weight.reshape(group, -1, *weight.shape[1:])  # (group, in a group, out a group, kernel...)
        factors = scale.reshape(group, 1, -1, *[1] * (weight.ndim - 2))
        fused = _multiply(grouped, factors).reshape(weight.shape)
    elif linear.op_type == "Gemm":
        _, beta, transposed = _gemm(linear)
        _expect(weight.ndim == 2 and weight.shape[0 if transposed else 1] == channels, linear)
        bias = _row(bias, beta, channels, linear)
        fused = _multiply(weight, scale[:, None] if transposed else scale[None, :])
    else:
        _expect_matrix(linear, weight, linear.outputs[0])
        _expect(weight.shape[1] == channels, linear)
        fused = _multiply(weight, scale[None, :])
    total = shift if bias is None else scale * bias + shift
    if not can_replace(bn.outputs[0], linear.outputs[0]):
        raise _Decline("an output of the graph would lose its name")
    _rewrite(scope, linear, fused, total, names, weight.dtype, output=bn.outputs[0])
    remove(bn)


def _before(
    scope: Scope,
    bn: ir.Node,
    linear: ir.Node,
    scale: np.ndarray,
    shift: np.ndarray,
    names: Names,
) -> None:
    """BN -> linear becomes linear with other weights."""
    if linear.inputs[0] is not bn.outputs[0]:
        raise _Decline(f"{label(linear)}: it reads the normalised value as its weight")
    weight, bias = _weight(linear), _bias(linear) if linear.op_type != "MatMul" else None
    channels = len(scale)
    wide = weight.astype(np.float64)
    if linear.op_type in ("Conv", "ConvTranspose"):
        group = _group(linear)
        _expect(channels % group == 0 and weight.ndim > 2, linear)
        kernel = [1] * (weight.ndim - 2)
        if linear.op_type == "Conv":
            _expect(weight.shape[1] * group == channels and weight.shape[0] % group == 0, linear)
            if shift.any() and not _without_padding(linear):
                raise _Decline(f"{label(linear)}: it pads with zeros, which the shift does not reach")
            grouped = weight.reshape(group, -1, *weight.shape[1:])  # (group, out a group, in a group, kernel...)
            fused = _multiply(grouped, scale.reshape(group, 1, -1, *kernel)).reshape(weight.shape)
            sums = wide.reshape(group, -1, *weight.shape[1:]).sum(axis=tuple(range(3, weight.ndim + 1)))
            moved = np.einsum("goi,gi->go", sums, shift.reshape(group, -1)).reshape(-1)
        else:
            _expect(weight.shape[0] == channels, linear)
            if shift.any():
                raise _Decline(f"{label(linear)}: its border sums fewer taps, so a shift is no constant")
            fused = _multiply(weight, scale.reshape(-1, 1, *kernel))
            moved = np.zeros(weight.shape[1] * group)
        total = moved if bias is None else bias + moved
    elif linear.op_type == "Gemm":
        alpha, beta, transposed = _gemm(linear)
        if attribute_int(linear, "transA", 0) != 0:
            raise _Decline(f"{label(linear)}: transA turns channels into rows")
        matrix = wide.T if transposed else wide  # (in, out)
        _expect(matrix.shape[0] == channels, linear)
        fused = _multiply(weight, scale[None, :] if transposed else scale[:, None])
        total = _row(bias, beta, matrix.shape[1], linear) + alpha * (shift @ matrix)
    else:
        _expect_matrix(linear, weight, linear.outputs[0])
        _expect(weight.shape[0] == channels, linear)
        fused = _multiply(weight, scale[:, None])
        total = shift @ wide
    source = bn.inputs[0]
    if bias is None and not total.any() and linear.op_type != "Gemm":
        rounded = _rounded(fused, weight.dtype, linear)
        _set_weight(scope, linear, rounded, names, str(linear.outputs[0].name))
    else:
        _rewrite(scope, linear, fused, total, names, weight.dtype, output=None)
    linear.replace_input_with(0, source)
    remove(bn)


def _expect(fits: bool, linear: ir.Node) -> None:
    if not fits:
        raise _Decline(f"{label(linear)}: its weight does not have as many channels as the normalisation")


def _expect_matrix(linear: ir.Node, weight: np.ndarray, output: ir.Value) -> None:
    # On more than two dimensions BN's channel is axis 1, and MatMul's is the last.
    if weight.ndim != 2 or rank(output) != 2:
        raise _Decline(f"{label(linear)}: not known to be a product of two matrices")


def _without_padding(conv: ir.Node) -> bool:
    mode = conv.attributes.get_string("auto_pad", "NOTSET")
    if mode == "VALID":
        return True
    pads = attribute_ints(conv, "pads")
    return mode == "NOTSET" and ("pads" not in conv.attributes or (pads is not None and not any(pads)))


def _set_weight(scope: Scope, linear: ir.Node, weight: np.ndarray, names: Names, base: str) -> None:
    linear.replace_input_with(1, new_constant(scope, weight, names.fresh(f"{base}_weight"), before=linear))


def _rewrite(
    scope: Scope,
    linear: ir.Node,
    weight: np.ndarray,
    bias: np.ndarray,
    names: Names,
    dtype: np.dtype,
    *,
    output: ir.Value | None,
) -> None:
    """Gives the layer its new weights and bias; a MatMul becomes the Gemm that it is with a bias."""
    new_weight = _rounded(weight, dtype, linear)
    new_bias = _rounded(bias, dtype, linear)
    base = str((output or linear.outputs[0]).name)
    if linear.op_type == "MatMul":
        linear.op_type = "Gemm"
    elif linear.op_type == "Gemm":
        linear.attributes.add(ir.AttrFloat32("beta", 1.0))
    set_inputs(linear, [linear.inputs[0], linear.inputs[1], None])
    _set_weight(scope, linear, new_weight, names, base)
    linear.replace_input_with(2, new_constant(scope, new_bias, names.fresh(f"{base}_bias"), before=linear))
    if output is not None:
        result = linear.outputs[0]
        if not output.is_graph_output():
            name, shape = output.name, output.shape
            output.name = None
            result.name = name
            result.shape = shape if shape is not None else result.shape
        replace(output, result)
