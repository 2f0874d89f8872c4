"""Keeps ONNX Runtime on the CPU from fusing an addition into the LayerNormalization that reads it.

::

    a, b -> Add -> LayerNormalization -> y      a, b -> Sum -> LayerNormalization -> y

The fused kernel, SkipLayerNormalization, is slow: on MiniLM, 344 tokens of 384 channels, it takes 276 us where
LayerNormalization takes 35 and the addition 20 (ONNX Runtime 1.31, two threads). Sum of two values is Add by another
name, for which there is no such fusion; nothing is computed otherwise. MiniLM takes 0.91 of the time with it in
float32 (one sentence) and 0.88 (eight), 0.75 and 0.75 in INT8, 0.73 and 0.73 in dynamic INT8 (one thread, medians of
interleaved runs).

An addition that something else reads too is not fused, and left. Meant for that runtime alone (for a GPU it was not
measured), and for graphs whose attention it does not fuse: in a float graph its AttentionFusion looks for an Add beside
the MatMuls of queries, keys and values. Float32 only, since Sum has no kernel for less. Besides LayerNormalization
itself its beginning in pieces counts, x - ReduceMean(x), of which ONNX Runtime makes one.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from passes._graph import constant, is_op, scopes
from passes._quant_plan import is_float
from passes.base import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class ShieldLayerNorm(Pass):
    """Writes the addition before a LayerNormalization as Sum, which ONNX Runtime on the CPU does not fuse with it."""

    def call(self, model: ir.Model) -> Outcome:
        fired = sum(shield_layer_norms(scope.graph) for scope in scopes(model))
        return Outcome(model, fired > 0, fired=fired)


def shield_layer_norms(graph: ir.Graph) -> int:
    """``ShieldLayerNorm`` of one graph; the number of additions that were changed."""
    found = [node for node in graph if is_op(node, "Add") and _is_residual(node)]
    for node in found:
        node.op_type = "Sum"
    return len(found)


def _is_residual(node: ir.Node) -> bool:
    # All three have one type, but not all need have been inferred.
    if not any(is_float(value) for value in (*node.inputs, node.outputs[0])):
        return False
    if any(constant(value) is not None for value in node.inputs):
        return False
    value = node.outputs[0]
    users = [use.node for use in value.uses()]
    if value.is_graph_output() or not users:
        return False  # the runtime leaves an addition alone that somebody else reads too
    if is_op(users[0], "LayerNormalization"):
        return len(users) == 1
    means = [user.outputs[0] for user in users if is_op(user, "ReduceMean")]
    centred = [user for user in users if is_op(user, "Sub") and user.inputs[0] is value and user.inputs[1] in means]
    return len(means) == 1 and len(centred) == len(users) - 1 > 0
