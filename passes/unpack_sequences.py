"""Takes sequences of tensors apart that are put together only to be read by number.

::

    s = SplitToSequence(x, sizes), a = SequenceAt(s, 0), b = SequenceAt(s, 1)  ->  a, b = Split(x, sizes)
    s = SplitToSequence<keepdims = 0>(x), a = SequenceAt(s, 2)                  ->  a = Gather(x, 2)
    s = SequenceConstruct(p, q), a = SequenceAt(s, 1)                           ->  a = q

torch's exporter writes ``chunk``, ``split`` and ``unbind`` this way. A sequence is no tensor: TensorRT has no such
type, and every pass that follows channels or ranges stops at it.

Depends on: ONNX operators SplitToSequence-11 (and 24), SequenceAt-11, SequenceConstruct-11, Split-11 to 18.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from passes._graph import (
    Names,
    Scope,
    array,
    attribute_int,
    can_replace,
    dims,
    given,
    integers,
    is_op,
    new_constant,
    remove,
    replace,
    scopes,
)
from passes.base import Declined, Outcome, Pass, label


class _NotUnpacked(Exception):
    """Why a sequence stays."""


@dataclasses.dataclass(frozen=True)
class UnpackSequences(Pass):
    """Replaces sequences that are read by constant numbers by the tensors in them."""

    def call(self, model: ir.Model) -> Outcome:
        fired = 0
        declined: list[Declined] = []
        names = Names(model)
        for scope in scopes(model):
            for node in list(scope.graph):
                if not is_op(node, "SplitToSequence", "SequenceConstruct"):
                    continue
                try:
                    _unpack(scope, node, names)
                    fired += 1
                except _NotUnpacked as reason:
                    declined.append(Declined(label(node), str(reason)))
        return Outcome(model, fired > 0, fired=fired, declined=tuple(declined))


def _unpack(scope: Scope, node: ir.Node, names: Names) -> None:
    """Lets the readers of the sequence have its parts; raises where that cannot be done, before anything is changed."""
    readers = _readers(node)
    if is_op(node, "SequenceConstruct"):
        parts = [value for value in node.inputs if value is not None]
        places = [_place(number, len(parts)) for _, number in readers]
        for (reader, _), place in zip(readers, places, strict=True):
            _check(reader.outputs[0], parts[place])
    elif given(node, 1) is None and attribute_int(node, "keepdims", 1) == 0:
        parts, places = _rows(scope, node, [number for _, number in readers], names), [*range(len(readers))]
    else:
        sizes = _sizes(node)
        places = [_place(number, len(sizes)) for _, number in readers]
        outputs = [place for (reader, _), place in zip(readers, places, strict=True) if _is_output(reader)]
        if len(set(outputs)) < len(outputs):
            raise _NotUnpacked("one part of it is two outputs of the graph")
        parts = _split(scope, node, sizes, names)
    for (reader, _), place in zip(readers, places, strict=True):
        replace(reader.outputs[0], parts[place])
        remove(reader)
    remove(node)


def _readers(node: ir.Node) -> list[tuple[ir.Node, int]]:
    """The nodes that read the sequence, and which part each of them takes."""
    value = node.outputs[0]
    found = []
    for use in value.uses():
        number = integers(given(use.node, 1))
        if not is_op(use.node, "SequenceAt") or use.node.graph is not node.graph:
            raise _NotUnpacked(f"{label(use.node)} is a {use.node.op_type} that reads all of it")
        if number is None or len(number) != 1:
            raise _NotUnpacked(f"{label(use.node)} takes a part of it by a number that is computed")
        found.append((use.node, number[0]))
    if not found or value.is_graph_output():
        raise _NotUnpacked("it is an output of the graph" if found else "nothing reads it")
    return found


def _is_output(reader: ir.Node) -> bool:
    return reader.outputs[0].is_graph_output()


def _place(number: int, count: int) -> int:
    if not -count <= number < count:
        raise _NotUnpacked(f"part {number} of {count} is read, which does not exist")
    return number % count


def _check(old: ir.Value, new: ir.Value) -> None:
    if not can_replace(old, new):
        raise _NotUnpacked(f"{old.name!r} is an output of the graph and would be {new.name!r}")


def _sizes(node: ir.Node) -> tuple[int, ...]:
    """How long each part is."""
    axis = attribute_int(node, "axis", 0)
    shape = dims(node.inputs[0])
    whole = None if shape is None or axis is None or not -len(shape) <= axis < len(shape) else shape[axis]
    asked = array(given(node, 1), max_size=1024)
    if given(node, 1) is not None and asked is None:
        raise _NotUnpacked("the sizes of its parts are computed")
    if asked is not None and asked.ndim == 1:
        return tuple(int(size) for size in asked)
    each = 1 if asked is None else int(asked)
    if not isinstance(whole, int) or each < 1:
        raise _NotUnpacked("how many parts it has is not known")
    return tuple(min(each, whole - start) for start in range(0, whole, each))


def _split(scope: Scope, node: ir.Node, sizes: tuple[int, ...], names: Names) -> list[ir.Value]:
    attributes = [ir.AttrInt64("axis", attribute_int(node, "axis", 0) or 0)]
    inputs = [node.inputs[0]]
    name = str(node.outputs[0].name)
    if scope.opset < 13:
        attributes.append(ir.AttrInt64s("split", sizes))
    else:
        inputs.append(new_constant(scope, np.array(sizes, np.int64), names.fresh(f"{name}_sizes"), before=node))
    made = ir.Node("", "Split", inputs, attributes, num_outputs=len(sizes), name=node.name)
    x, axis = node.inputs[0], attribute_int(node, "axis", 0)
    whole = dims(x)
    for value, size in zip(made.outputs, sizes, strict=True):
        value.name = names.fresh(f"{name}_part")
        if x is not None and x.type is not None and whole is not None and axis is not None:
            # What was known of the sequence is the same for all its parts, and wrong where they differ.
            axis %= len(whole)
            value.type = x.type
            value.shape = ir.Shape([*whole[:axis], size, *whole[axis + 1 :]])
    scope.graph.insert_before(node, made)
    return list(made.outputs)


def _rows(scope: Scope, node: ir.Node, numbers: list[int], names: Names) -> list[ir.Value]:
    """For each number the one index along the axis, without the axis."""
    made = []
    for number in numbers:
        name = names.fresh(f"{node.outputs[0].name}_part")
        index = new_constant(scope, np.array(number, np.int64), names.fresh(f"{name}_index"), before=node)
        axis = ir.AttrInt64("axis", attribute_int(node, "axis", 0) or 0)
        row = ir.Node("", "Gather", [node.inputs[0], index], [axis], name=names.fresh(f"{label(node)}_part"))
        row.outputs[0].name = name
        scope.graph.insert_before(node, row)
        made.append(row.outputs[0])
    return made
