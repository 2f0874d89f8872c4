"""Removes nodes that hand on their input as it is.

::

    y = Identity(x)                    z = Relu(x)
    z = Relu(y)                   ->

Identity, Dropout at inference, Pad by nothing, Reshape, Expand, Slice and Flatten to the shape that is
there already, Cast to the own type, Transpose that keeps the order, Concat, Sum, Min, Max, Mean and Split
of one tensor, x + 0, x - 0, x * 1, x / 1, x ** 1, x and True, x or False, Where with a condition that is
the same everywhere. Addends and conditions may have any shape that leaves the shape of x alone; they
may also be dynamic expansions of one value, which is what exporters make of an attention mask that masks
nothing.

A bias of nothing but zeros is left out of Conv, ConvTranspose and Gemm: the kernel would add it all the same, which was
measured to cost ResNet-50 0.5 to 1 % (a BatchNormalization that was never trained leaves such biases).

A graph output keeps its name: the value before the node takes it over. Where that is impossible (it is an
input, an initializer, a value of an outer graph or an output itself), the node stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from passes._graph import (
    Scope,
    array,
    attribute_int,
    attribute_ints,
    can_replace,
    constant,
    dims,
    given,
    integers,
    is_op,
    rank,
    remove,
    replace,
    same_shape,
    scopes,
    set_inputs,
)
from passes.base import Declined, Outcome, Pass, in_standard_domain, label

#: "to the end" in a Slice: exporters write the largest int32 or int64
_TO_THE_END = 2**31 - 1
#: what is larger than this is no bias that one would read through
_MOST_BIASES = 1 << 16


@dataclasses.dataclass(frozen=True)
class EliminateNoops(Pass):
    """Removes nodes that compute nothing. Exact, except that -0.0 + 0 may stay -0.0."""

    def call(self, model: ir.Model) -> Outcome:
        fired = 0
        while True:
            declined: list[Declined] = []
            count = sum(_sweep(scope, declined) for scope in scopes(model))
            fired += count
            if not count:
                return Outcome(model, fired > 0, fired=fired, declined=tuple(declined))


def _sweep(scope: Scope, declined: list[Declined]) -> int:
    count = 0
    for node in list(scope.graph):
        if not in_standard_domain(node):
            continue
        if _has_zero_bias(node, scope.opset):
            set_inputs(node, node.inputs[:2])
            count += 1
        if node.op_type not in _RULES:
            continue
        same = _RULES[node.op_type](node, scope.opset)
        if isinstance(same, str):
            declined.append(Declined(label(node), same))
        if not isinstance(same, ir.Value):
            continue
        if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
            declined.append(Declined(label(node), "a further output of it is used"))
        elif not can_replace(node.outputs[0], same):
            reason = f"it gives the output {node.outputs[0].name!r} its name"
            declined.append(Declined(label(node), reason))
        else:
            replace(node.outputs[0], same)
            remove(node)
            count += 1
    return count


def _has_zero_bias(node: ir.Node, opset: int) -> bool:
    if not is_op(node, "Conv", "ConvTranspose") and not (is_op(node, "Gemm") and opset >= 11):
        return False
    bias = array(given(node, 2), max_size=_MOST_BIASES)
    return bias is not None and not bias.any()


#: the input that the output equals; None if there is none; a text if there might be one
_Rule = Callable[[ir.Node, int], ir.Value | str | None]


def _identity(node: ir.Node, opset: int) -> ir.Value | str | None:
    return node.inputs[0]


def _dropout(node: ir.Node, opset: int) -> ir.Value | str | None:
    if opset >= 12:
        mode, ratio = given(node, 2), given(node, 1)
        if mode is None:
            return node.inputs[0]
        training = array(mode, max_size=1)
        if training is not None and not training.any():
            return node.inputs[0]
        rate = array(ratio, max_size=1)
        if rate is not None and not rate.any():
            return node.inputs[0]
        return "Dropout may be in training mode"
    if opset >= 7 or attribute_int(node, "is_test", 0) == 1:
        return node.inputs[0]
    return "Dropout is in training mode (is_test is 0)"


def _pad(node: ir.Node, opset: int) -> ir.Value | str | None:
    if opset >= 11:
        pads = integers(given(node, 1))
    else:
        pads = attribute_ints(node, "pads" if opset >= 2 else "paddings")
    return node.inputs[0] if pads is not None and not any(pads) else None


def _reshape(node: ir.Node, opset: int) -> ir.Value | str | None:
    data = node.inputs[0]
    if data is None:
        return None
    if same_shape(data, node.outputs[0]):
        return data
    target = integers(given(node, 1)) if opset >= 5 else attribute_ints(node, "shape")
    shape = dims(data)
    if target is None or shape is None or len(target) != len(shape) or target.count(-1) > 1:
        return None
    copies = attribute_int(node, "allowzero", 0) == 0
    # Where all dimensions but one are the same, the count of elements settles the last one,
    # unless one of them is 0.
    for wanted, there in zip(target, shape, strict=True):
        if not ((wanted == 0 and copies) or wanted == -1 or (wanted == there and wanted != 0)):
            return None
    return data


def _expand(node: ir.Node, opset: int) -> ir.Value | str | None:
    data = node.inputs[0]
    if data is None:
        return None
    if same_shape(data, node.outputs[0]):
        return data
    target, there = integers(given(node, 1)), rank(data)
    if target is not None and there is not None and len(target) <= there and all(d == 1 for d in target):
        return data
    return None


def _slice(node: ir.Node, opset: int) -> ir.Value | str | None:
    data = node.inputs[0]
    if data is None:
        return None
    if opset >= 10:
        starts, ends = integers(given(node, 1)), integers(given(node, 2))
        steps = None if given(node, 4) is None else integers(given(node, 4))
        forward = given(node, 4) is None or (steps is not None and all(step == 1 for step in steps))
    else:
        starts, ends, forward = attribute_ints(node, "starts"), attribute_ints(node, "ends"), True
    if not forward:
        return None
    # A slice by steps of 1 that is as long as what it slices is all of it.
    if same_shape(data, node.outputs[0]):
        return data
    if starts is not None and ends is not None and not any(starts) and all(end >= _TO_THE_END for end in ends):
        return data
    return None


def _flatten(node: ir.Node, opset: int) -> ir.Value | str | None:
    data = node.inputs[0]
    return data if rank(data) == 2 and attribute_int(node, "axis", 1) in (1, -1) else None


def _cast(node: ir.Node, opset: int) -> ir.Value | str | None:
    data = node.inputs[0]
    to = attribute_int(node, "to", 0) if opset >= 6 else None
    return data if data is not None and data.dtype is not None and to == int(data.dtype) else None


def _cast_like(node: ir.Node, opset: int) -> ir.Value | str | None:
    data, like = node.inputs[0], node.inputs[1]
    if data is None or like is None or data.dtype is None:
        return None
    return data if data.dtype == like.dtype else None


def _transpose(node: ir.Node, opset: int) -> ir.Value | str | None:
    data = node.inputs[0]
    if "perm" in node.attributes:
        perm = attribute_ints(node, "perm")
        return data if perm is not None and perm == tuple(range(len(perm))) else None
    there = rank(data)
    return data if there is not None and there < 2 else None  # without perm the order is reversed


def _of_one(node: ir.Node, opset: int) -> ir.Value | str | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _split(node: ir.Node, opset: int) -> ir.Value | str | None:
    return node.inputs[0] if len(node.outputs) == 1 else None


def _neutral(element: float, *, either_side: bool) -> _Rule:
    """The rule of a binary op that leaves x alone when the other operand is ``element`` everywhere."""

    def rule(node: ir.Node, opset: int) -> ir.Value | str | None:
        if opset < 7:  # broadcasting had rules of its own
            return None
        left, right = node.inputs[0], node.inputs[1]
        if left is None or right is None:
            return None
        pairs = [(left, right), (right, left)] if either_side else [(left, right)]
        for data, other in pairs:
            if _uniform(other) == element and _keeps_shape(data, other, node.outputs[0]):
                return data
        return None

    return rule


def _where(node: ir.Node, opset: int) -> ir.Value | str | None:
    condition = _uniform(node.inputs[0])
    if condition is None:
        return None
    chosen = node.inputs[1] if condition else node.inputs[2]
    return chosen if chosen is not None and same_shape(chosen, node.outputs[0]) else None


def _keeps_shape(data: ir.Value, other: ir.Value, output: ir.Value) -> bool:
    """Whether broadcasting with ``other`` leaves the shape of ``data`` as it is."""
    if same_shape(data, output):
        return True
    tensor = constant(other)
    if tensor is None or tensor.size != 1:
        return False
    there = rank(data)
    return len(tensor.shape) == 0 or (there is not None and len(tensor.shape) <= there)


#: how far a chain of expansions and selections is followed
_DEPTH = 8
#: comparing all elements of a larger constant would cost more than it is worth
_MAX_COMPARED = 1 << 20


def _uniform(value: ir.Value | None, depth: int = 0) -> float | bool | None:
    """The number that every element of the value equals, whatever its shape; None if there is none."""
    data = array(value, max_size=_MAX_COMPARED)
    if data is not None:
        if data.size == 0 or data.dtype.kind in "OSU":
            return None
        first = data.reshape(-1)[0]
        if data.size > 1 and not (data == first).all():
            return None
        return bool(first) if data.dtype.kind == "b" else float(first)
    node = value.producer() if value is not None else None
    if node is None or depth > _DEPTH:
        return None
    if is_op(node, "Expand", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Identity", "Flatten"):
        return _uniform(given(node, 0), depth + 1)
    if is_op(node, "Where"):
        condition = _uniform(node.inputs[0], depth + 1)
        return None if condition is None else _uniform(node.inputs[1 if condition else 2], depth + 1)
    return None


_RULES: dict[str, _Rule] = {
    "Add": _neutral(0, either_side=True),
    "And": _neutral(True, either_side=True),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _of_one,
    "Div": _neutral(1, either_side=False),
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Identity": _identity,
    "Max": _of_one,
    "Mean": _of_one,
    "Min": _of_one,
    "Mul": _neutral(1, either_side=True),
    "Or": _neutral(False, either_side=True),
    "Pad": _pad,
    "Pow": _neutral(1, either_side=False),
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Sub": _neutral(0, either_side=False),
    "Sum": _of_one,
    "Transpose": _transpose,
    "Where": _where,
}
