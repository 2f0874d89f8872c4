"""Moves a Pad into the convolution or pooling that reads it.

::

    Conv(Pad(x, [0,0,1,1, 0,0,1,1], 0), W, pads=[0,0,0,0])   ->   Conv(x, W, pads=[1,1,1,1])

Conv pads with zeros, so a Pad with zeros over spatial axes just adds to its ``pads``. AveragePool that
counts the padding in its mean (or had none: then it is told to count) is the same. MaxPool pads with minus
infinity, so a Pad with zeros fuses only where x is known to be >= 0 and every window holds an element of
x, and a Pad with the lowest value of the type always does.

One Pad may feed several such nodes: it is fused when all of them take it. ONNX Runtime does this itself for
a single Conv; other runtimes and the quantizer get a graph without the copy too.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from passes._graph import (
    Scope,
    array,
    attribute_int,
    attribute_ints,
    given,
    integers,
    is_op,
    rank,
    remove,
    scopes,
)
from passes.base import Declined, Outcome, Pass, label

#: ops whose output is never negative
_NOT_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp", "Sqrt", "Softplus")


class _Decline(Exception):
    """Why a Pad stays."""


@dataclasses.dataclass(frozen=True)
class FusePad(Pass):
    """Fuses constant spatial padding into Conv, AveragePool and MaxPool."""

    def call(self, model: ir.Model) -> Outcome:
        fired = 0
        declined: list[Declined] = []
        for scope in scopes(model):
            for node in list(scope.graph):
                if not is_op(node, "Pad"):
                    continue
                try:
                    _fuse(scope, node)
                    fired += 1
                except _Decline as reason:
                    declined.append(Declined(label(node), str(reason)))
        return Outcome(model, fired > 0, fired=fired, declined=tuple(declined))


def _fuse(scope: Scope, pad: ir.Node) -> None:
    output = pad.outputs[0]
    uses = output.uses()
    if output.is_graph_output() or not uses:
        raise _Decline("its result is an output" if output.is_graph_output() else "nothing reads it")
    plans = []
    for user, index in uses:
        if user.graph is not pad.graph or index != 0 or not is_op(user, "Conv", "AveragePool", "MaxPool"):
            raise _Decline(f"{label(user)} reads it and cannot pad by itself")
        plans.append((user, _new_pads(scope, pad, user)))
    for user, pads in plans:
        user.attributes.add(ir.AttrInt64s("pads", pads))
        user.attributes.pop("auto_pad", None)
        if user.op_type == "AveragePool":
            user.attributes.add(ir.AttrInt64("count_include_pad", 1))
        user.replace_input_with(0, pad.inputs[0])
    remove(pad)


def _new_pads(scope: Scope, pad: ir.Node, user: ir.Node) -> list[int]:
    """The pads attribute with which ``user`` does both paddings. Raises _Decline where it cannot."""
    kernel = _kernel(user)
    begins, ends = _spatial_pads(scope, pad, len(kernel))
    own = _own_pads(user, len(kernel))
    value = _value(scope, pad)
    if user.op_type == "Conv":
        if value != 0:
            raise _Decline(f"it pads with {value}, Conv with zeros")
    else:
        _check_pool(scope, pad, user, value, any(own))
    count = len(kernel)
    total = [a + b for a, b in zip((*begins, *ends), own, strict=True)]
    if user.op_type != "Conv" and any(total[i] >= kernel[i] or total[i + count] >= kernel[i] for i in range(count)):
        raise _Decline(f"{label(user)}: a window would lie in the padding alone")
    return total


def _check_pool(scope: Scope, pad: ir.Node, pool: ir.Node, value: float, has_pads: bool) -> None:
    if attribute_int(pool, "ceil_mode", 0) != 0:
        raise _Decline(f"{label(pool)}: with ceil_mode the last window depends on who pads")
    if pool.op_type == "AveragePool":
        if scope.opset < 7:
            raise _Decline(f"{label(pool)}: before opset 7 it cannot count the padding")
        if value != 0:
            raise _Decline(f"it pads with {value}, AveragePool with zeros")
        if has_pads and attribute_int(pool, "count_include_pad", 0) != 1:
            raise _Decline(f"{label(pool)}: its own padding does not count, this one does")
        return
    if len(pool.outputs) > 1:
        raise _Decline(f"{label(pool)}: its indices count the padding")
    if any(d != 1 for d in attribute_ints(pool, "dilations") or ()):
        raise _Decline(f"{label(pool)}: a dilated window may lie in the padding alone")
    if not (value == 0 and _not_negative(pad.inputs[0])) and not _is_lowest(value, pad.inputs[0]):
        raise _Decline(f"{label(pool)}: it pads with minus infinity, this one with {value}")
    if has_pads and not _is_lowest(value, pad.inputs[0]) and value != 0:
        raise _Decline(f"{label(pool)}: it has padding of its own")


def _kernel(user: ir.Node) -> tuple[int, ...]:
    kernel = attribute_ints(user, "kernel_shape")
    if kernel is None and user.op_type == "Conv":
        weight = given(user, 1)
        there = rank(weight)
        return (0,) * (there - 2) if there is not None and there > 2 else _unknown_kernel(user)
    return kernel if kernel is not None else _unknown_kernel(user)


def _unknown_kernel(user: ir.Node) -> tuple[int, ...]:
    raise _Decline(f"{label(user)}: the number of its spatial axes is unknown")


def _own_pads(user: ir.Node, count: int) -> tuple[int, ...]:
    mode = user.attributes.get_string("auto_pad", "NOTSET")
    if mode == "VALID":
        return (0,) * (2 * count)
    if mode != "NOTSET":
        raise _Decline(f"{label(user)}: auto_pad {mode} depends on the size of what it reads")
    pads = attribute_ints(user, "pads")
    if pads is None and "pads" not in user.attributes:
        return (0,) * (2 * count)
    if pads is None or len(pads) != 2 * count:
        raise _Decline(f"{label(user)}: its pads are not known")
    return pads


def _spatial_pads(scope: Scope, pad: ir.Node, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Begin and end padding of each of ``count`` spatial axes."""
    if pad.attributes.get_string("mode", "constant") != "constant":
        raise _Decline("it does not pad with a constant")
    if scope.opset >= 11:
        pads = integers(given(pad, 1))
    else:
        pads = attribute_ints(pad, "pads" if scope.opset >= 2 else "paddings")
    if pads is None:
        raise _Decline("its padding is not constant")
    total = count + 2
    axes = tuple(range(total))
    if scope.opset >= 18 and given(pad, 3) is not None:
        chosen = integers(given(pad, 3))
        if chosen is None:
            raise _Decline("its axes are not constant")
        axes = tuple(axis % total for axis in chosen)
    if len(pads) != 2 * len(axes):
        raise _Decline("its padding does not fit the layer's number of axes")
    if any(p < 0 for p in pads):
        raise _Decline("it crops")
    begins, ends = [0] * total, [0] * total
    for index, axis in enumerate(axes):
        begins[axis], ends[axis] = pads[index], pads[index + len(axes)]
    if any(begins[:2]) or any(ends[:2]):
        raise _Decline("it pads the batch or the channels")
    return tuple(begins[2:]), tuple(ends[2:])


def _value(scope: Scope, pad: ir.Node) -> float:
    if scope.opset < 11:
        found = pad.attributes.get("value")
        if found is not None and found.is_ref():
            raise _Decline("its value is not constant")
        return float(found.as_float()) if found is not None else 0.0
    value = given(pad, 2)
    if value is None:
        return 0.0
    data = array(value, max_size=1)
    if data is None or data.size != 1:
        raise _Decline("its value is not constant")
    return float(data.reshape(-1)[0])


def _not_negative(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    if is_op(node, *_NOT_NEGATIVE):
        return True
    if node is not None and is_op(node, "Clip"):
        low = node.attributes.get("min")
        if low is not None:
            return not low.is_ref() and low.as_float() >= 0
        data = array(given(node, 1), max_size=1)
        return data is not None and data.size == 1 and bool(data.reshape(-1)[0] >= 0)
    return False


def _is_lowest(value: float, data: ir.Value | None) -> bool:
    """Whether no element can be below ``value``."""
    if value == -np.inf:
        return True
    dtype = data.dtype if data is not None else None
    return dtype is not None and dtype.is_floating_point() and value == float(dtype.min)
