"""How channels go through nodes that put indices elsewhere: Concat, Split, Slice, Pad, Gather.

Each is a map from old to new indices; what a node says in numbers (sizes, bounds, pads, indices) is rewritten.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes._channel_atoms import Labels
from passes._channel_graph import ChannelGraph, Editor
from passes._graph import array, attribute_int, attribute_ints, given, integers
from passes.base import label


def concat(graph: ChannelGraph, node: ir.Node) -> None:
    """One after the other along an axis; the other axes go together."""
    values = [value for value in node.inputs if value is not None]
    sizes = [graph.dims(value) for value in values]
    ranks = {None if s is None else len(s) for s in sizes}
    rank = ranks.pop()
    at = attribute_int(node, "axis", 0)
    if ranks or rank is None or at is None:
        return graph.opaque(node, f"{label(node)}: its shapes are not known")
    at %= rank
    lengths = [s[at] for s in sizes if s is not None]
    result: list[Labels] = []
    for axis in range(rank):
        if axis != at:
            result.append(_together(graph, node, values, axis))
            continue
        parts = [_axis(graph, value, axis) for value in values]
        if all(part is None for part in parts):
            result.append(None)
        elif all(isinstance(n, int) for n in lengths):
            filled = []
            for part, length in zip(parts, lengths, strict=True):
                if part is None:
                    assert isinstance(length, int)
                    part = graph.atoms.fresh(length)
                    graph.atoms.freeze(part, f"{label(node)} appends what is not cut")
                filled.append(part)
            result.append(np.concatenate(filled))
        else:
            for part in parts:
                graph.atoms.freeze(part, f"{label(node)} joins it with something of unknown size")
            result.append(None)
    graph.set(node.outputs[0], result)


def _together(graph: ChannelGraph, node: ir.Node, values: Sequence[ir.Value], axis: int) -> Labels:
    labels = _axis(graph, values[0], axis)
    for value in values[1:]:
        labels = graph.tie(labels, value, axis, f"{label(node)} joins it with something that is not cut")
    return labels


def _axis(graph: ChannelGraph, value: ir.Value | None, axis: int) -> Labels:
    axes = graph.of(value)
    return None if axes is None else axes[axis]


def split(graph: ChannelGraph, node: ir.Node) -> None:
    """Consecutive parts; an input that says how many becomes one that says how long each is."""
    axes = graph.of(node.inputs[0])
    at = attribute_int(node, "axis", 0)
    if axes is None or at is None:
        return graph.opaque(node, f"{label(node)}: its axis is not known")
    at %= len(axes)
    labels = axes[at]
    parts: list[Labels] = [None] * len(node.outputs)
    if labels is not None:
        sizes = attribute_ints(node, "split") or integers(given(node, 1))
        if sizes is None and given(node, 1) is None:
            each = -(-len(labels) // len(node.outputs))
            sizes = tuple(min(each, len(labels) - start) for start in range(0, len(labels), each))
        if sizes is None or len(sizes) != len(parts) or sum(sizes) != len(labels):
            return graph.opaque(node, f"{label(node)}: the sizes of its parts are not known")
        parts = [*np.split(labels, np.cumsum(sizes)[:-1])]
        graph.rewrites.append(functools.partial(_rewrite_split, node, labels, parts, graph.opset))
    graph.keep_whole(given(node, 1), f"{label(node)} reads sizes there")
    for output, part in zip(node.outputs, parts, strict=True):
        graph.set(output, [*axes[:at], part, *axes[at + 1 :]])


def _rewrite_split(
    node: ir.Node, whole: npt.NDArray[np.int64], parts: list[Labels], opset: int, editor: Editor
) -> None:
    if editor.size(whole) == len(whole):
        return
    sizes = [editor.size(part) for part in parts if part is not None]
    if opset < 13:
        node.attributes.add(ir.AttrInt64s("split", sizes))
        return
    node.attributes.pop("num_outputs", None)
    editor.set_ints(node, 1, sizes, "split")


def slice_(graph: ChannelGraph, node: ir.Node) -> None:
    """A range of indices; steps other than 1 keep their axis whole."""
    axes = graph.of(node.inputs[0])
    if graph.opset < 10:
        starts, ends = attribute_ints(node, "starts"), attribute_ints(node, "ends")
        at, steps = attribute_ints(node, "axes"), None
    else:
        starts, ends = integers(given(node, 1)), integers(given(node, 2))
        at = integers(given(node, 3))
        steps = integers(given(node, 4))
        if at is None and given(node, 3) is not None:
            return graph.opaque(node, f"{label(node)}: its axes are computed")
        if steps is None and given(node, 4) is not None:
            starts = None
    if axes is None:
        return graph.opaque(node, f"{label(node)}: its shapes are not known")
    if at is None:
        count = graph.dims(given(node, 1)) if starts is None else (len(starts),)
        at = tuple(range(count[0])) if count and isinstance(count[0], int) else tuple(range(len(axes)))
    result = list(axes)
    bounds: list[tuple[int, npt.NDArray[np.int64], int, int]] = []
    for place, axis in enumerate(at):
        axis %= len(axes)
        labels = axes[axis]
        if labels is None:
            continue
        if starts is None or ends is None or (steps is not None and steps[place] != 1):
            graph.atoms.freeze(labels, f"{label(node)} takes a range of it that is computed, or has a step")
            result[axis] = None
            continue
        start, end, _ = slice(starts[place], ends[place]).indices(len(labels))
        result[axis] = labels[start:end] if end > start else None
        bounds.append((place, labels, start, max(start, end)))
    if bounds:
        assert starts is not None
        assert ends is not None
        graph.rewrites.append(functools.partial(_rewrite_slice, node, starts, ends, bounds, graph.opset))
    for value in node.inputs[1:]:
        graph.keep_whole(value, f"{label(node)} reads bounds there")
    graph.set(node.outputs[0], result)


def _rewrite_slice(
    node: ir.Node,
    starts: tuple[int, ...],
    ends: tuple[int, ...],
    bounds: list[tuple[int, npt.NDArray[np.int64], int, int]],
    opset: int,
    editor: Editor,
) -> None:
    first, last = list(starts), list(ends)
    changed = False
    for place, labels, start, end in bounds:
        kept = editor.keep(labels)
        changed |= not kept.all()
        first[place] = int(kept[:start].sum())
        last[place] = int(kept[:end].sum())
    if not changed:
        return
    if opset < 10:
        node.attributes.add(ir.AttrInt64s("starts", first))
        node.attributes.add(ir.AttrInt64s("ends", last))
        return
    editor.set_ints(node, 1, first, "starts")
    editor.set_ints(node, 2, last, "ends")


def pad(graph: ChannelGraph, node: ir.Node) -> None:
    """Indices before and behind. Padded channels hold one number, and go with the channels that they are added to."""
    axes = graph.of(node.inputs[0])
    pads = attribute_ints(node, "pads") if graph.opset < 11 else integers(given(node, 1))
    if axes is None:
        return graph.opaque(node, f"{label(node)}: its shapes are not known")
    at = tuple(range(len(axes))) if given(node, 3) is None else integers(given(node, 3))
    if pads is None or at is None or len(pads) != 2 * len(at):
        return graph.opaque(node, f"{label(node)}: its pads are computed")
    mode = node.attributes.get_string("mode", "constant")
    result = list(axes)
    changed: list[tuple[int, Labels, Labels]] = []
    for place, axis in enumerate(at):
        axis %= len(axes)
        labels, before, behind = axes[axis], pads[place], pads[place + len(at)]
        if labels is None or before == behind == 0:
            continue
        if mode != "constant" or min(before, behind) < 0:
            graph.atoms.freeze(labels, f"{label(node)} pads it in mode {mode}")
            result[axis] = None
            continue
        new = graph.atoms.fresh(before), graph.atoms.fresh(behind)
        result[axis] = np.concatenate([new[0], labels, new[1]])
        changed.append((place, *new))
    if changed:
        graph.rewrites.append(functools.partial(_rewrite_pad, node, pads, changed, graph.opset))
    for value in node.inputs[1:]:
        graph.keep_whole(value, f"{label(node)} reads pads there")
    graph.set(node.outputs[0], result)


def _rewrite_pad(
    node: ir.Node, pads: tuple[int, ...], changed: list[tuple[int, Labels, Labels]], opset: int, editor: Editor
) -> None:
    new = list(pads)
    for place, before, behind in changed:
        assert before is not None
        assert behind is not None
        new[place] = editor.size(before)
        new[place + len(pads) // 2] = editor.size(behind)
    if new == list(pads):
        return
    if opset < 11:
        node.attributes.add(ir.AttrInt64s("pads", new))
    else:
        editor.set_ints(node, 1, new, "pads")


def gather(graph: ChannelGraph, node: ir.Node) -> None:
    """Rows by number. Constant numbers are rewritten; by computed ones any row may be asked for."""
    data, indices = node.inputs[0], node.inputs[1]
    at = attribute_int(node, "axis", 0)
    if data is None or at is None or graph.rank(data) is None or graph.rank(indices) is None:
        return graph.opaque(node, f"{label(node)}: its shapes are not known")
    axes, taken = graph.of(data), array(indices)
    assert axes is not None
    at %= len(axes)
    labels = axes[at]
    rank = graph.rank(indices) or 0
    middle: list[Labels]
    if taken is None:
        other = graph.of(indices)
        middle = list(other or [])
        graph.atoms.freeze(labels, f"{label(node)} reads rows of it by number")
    else:
        middle = [None] * rank
        if labels is not None:
            at_rows = labels[taken.astype(np.int64)]
            if rank == 1 and taken.size > 1:
                middle = [at_rows]
                graph.rewrites.append(functools.partial(_rewrite_gather, node, labels, taken.astype(np.int64)))
            else:
                graph.atoms.freeze(at_rows.reshape(-1), f"{label(node)} takes this one")
                graph.rewrites.append(functools.partial(_rewrite_gather, node, labels, taken.astype(np.int64)))
        graph.keep_whole(indices, f"{label(node)} reads row numbers there")
    if at != len(axes) - 1 and graph.origin(data, len(axes) - 1) is not None:
        graph.role(data, len(axes) - 1, "out", node)
    graph.set(node.outputs[0], [*axes[:at], *middle, *axes[at + 1 :]])


def _rewrite_gather(node: ir.Node, labels: npt.NDArray[np.int64], taken: npt.NDArray[np.int64], editor: Editor) -> None:
    kept = editor.keep(labels)
    if kept.all():
        return
    positions = np.cumsum(kept) - 1
    wanted = taken % len(labels)
    if taken.ndim == 0:
        editor.set_ints(node, 1, int(positions[wanted]), "indices")  # type: ignore[arg-type]
        return
    if taken.ndim == 1:
        wanted = wanted[kept[wanted]]
    editor.set_ints(node, 1, positions[wanted], "indices")  # type: ignore[arg-type]
