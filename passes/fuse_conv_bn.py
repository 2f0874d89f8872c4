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
    Names,
    Scope,
    array,
    attribute_float,
    attribute_int,
    attribute_ints,
    can_replace,
    given,
    is_op,
    only_use,
    rank,
    remove,
    replace,
    scopes,
)
from passes._linear import LINEAR, Linear, NotLinear, read_linear
from passes.base import Declined, Outcome, Pass, label


class _Decline(NotLinear):
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
                except NotLinear as reason:
                    declined.append(Declined(label(node), str(reason)))
        return Outcome(model, fired > 0, fired=fired, declined=tuple(declined))

    def _fuse(self, scope: Scope, node: ir.Node, names: Names) -> None:
        source = node.inputs[0]
        assert source is not None
        linear = source.producer()
        if is_op(linear, *LINEAR) and linear is not None and linear.graph is node.graph:
            if only_use(source) is None:
                raise _Decline(f"{label(linear)}: something else reads its output too")
            found = read_linear(linear, shared=True, any_input=True)
            _after(scope, found, node, *_scale_and_shift(scope, node), names)
            return
        user = only_use(node.outputs[0])
        if self.before and is_op(user, *LINEAR) and user is not None and user.graph is node.graph:
            _before(scope, node, read_linear(user, shared=True), *_scale_and_shift(scope, node), names)
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


def _after(scope: Scope, linear: Linear, bn: ir.Node, scale: np.ndarray, shift: np.ndarray, names: Names) -> None:
    """linear -> BN becomes linear with other weights, and takes over the name of BN's output."""
    _expect(linear, linear.outputs, scale)
    linear.scale_outputs(scale)
    linear.bias = shift if linear.bias is None else linear.bias + shift
    result, output = linear.node.outputs[0], bn.outputs[0]
    if not can_replace(output, result):
        raise _Decline("an output of the graph would lose its name")
    linear.check()
    if not output.is_graph_output():
        name, shape = output.name, output.shape
        output.name = None
        result.name = name
        result.shape = shape if shape is not None else result.shape
    replace(output, result)
    remove(bn)
    linear.write(scope, names)


def _before(scope: Scope, bn: ir.Node, linear: Linear, scale: np.ndarray, shift: np.ndarray, names: Names) -> None:
    """BN -> linear becomes linear with other weights."""
    node = linear.node
    _expect(linear, linear.inputs, scale)
    if shift.any() and node.op_type == "Conv" and not _without_padding(node):
        raise _Decline(f"{label(node)}: it pads with zeros, which the shift does not reach")
    if shift.any() and node.op_type == "ConvTranspose":
        raise _Decline(f"{label(node)}: its border sums fewer taps, so a shift is no constant")
    groups = linear.weight.shape[0]
    moved = linear.alpha * np.einsum("goit,gi->go", linear.weight, shift.reshape(groups, -1)).reshape(-1)
    linear.scale_inputs(scale)
    if linear.bias is not None or moved.any():
        linear.bias = moved if linear.bias is None else linear.bias + moved
    linear.check()
    node.replace_input_with(0, bn.inputs[0])
    remove(bn)
    linear.write(scope, names)


def _expect(linear: Linear, channels: int, scale: np.ndarray) -> None:
    node = linear.node
    # On more than two dimensions BN's channel is axis 1, and MatMul's is the last.
    if node.op_type == "MatMul" and rank(node.outputs[0]) != 2:
        raise _Decline(f"{label(node)}: not known to be a product of two matrices")
    if channels != len(scale):
        raise _Decline(f"{label(node)}: its weight does not have as many channels as the normalisation")


def _without_padding(conv: ir.Node) -> bool:
    mode = conv.attributes.get_string("auto_pad", "NOTSET")
    if mode == "VALID":
        return True
    pads = attribute_ints(conv, "pads")
    return mode == "NOTSET" and ("pads" not in conv.attributes or (pads is not None and not any(pads)))
