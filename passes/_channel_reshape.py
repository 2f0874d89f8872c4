"""How channels go through Reshape and its kin: which old axes became which new ones.

The two shapes are cut into runs of axes with equal products; within a run every element of the old axes is an element
of the new ones. Where an axis is split, as 768 features into 12 heads of 64, only one of the new axes can be cut, and
each of its indices stands for all elements under it: that is how whole heads come about.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import onnx_ir as ir

from passes._channel_atoms import Labels
from passes._channel_graph import ChannelGraph, Dim, Editor
from passes._graph import attribute_int, attribute_ints, given, integers, is_op, only_use
from passes.base import label


def reshape(graph: ChannelGraph, node: ir.Node) -> None:
    """Reshape; where the new shape has to be rewritten and cannot be, its channels are kept."""
    target = integers(given(node, 1))
    axes = _regrouped(graph, node)
    if axes is None:
        return
    _bring_back(graph, node, axes)
    plan = _shape_entries(graph, node, target, axes)
    if plan is None:
        why = f"{label(node)}: its new shape is computed, with more than one size that is not known"
        for labels in axes:
            graph.atoms.freeze(labels, why)
        axes = [None] * len(axes)
    elif any(labels is not None for labels in axes):
        graph.rewrites.append(functools.partial(_rewrite_shape, node, plan, axes))
    graph.keep_whole(given(node, 1), f"{label(node)} reads sizes there")
    graph.set(node.outputs[0], axes)


def flatten(graph: ChannelGraph, node: ir.Node) -> None:
    """Flatten to two axes."""
    axes = _regrouped(graph, node)
    if axes is not None:
        graph.set(node.outputs[0], axes)


def squeeze(graph: ChannelGraph, node: ir.Node) -> None:
    """Axes of size 1 go."""
    axes, sizes = graph.of(node.inputs[0]), graph.dims(node.inputs[0])
    gone = _axes_of(node)
    if axes is None or sizes is None or (gone is None and not all(isinstance(n, int) for n in sizes)):
        return graph.opaque(node, f"{label(node)}: its axes are not known")
    if gone is None:
        gone = tuple(axis for axis, size in enumerate(sizes) if size == 1)
    positive = {axis % len(axes) for axis in gone}
    graph.set(node.outputs[0], [labels for axis, labels in enumerate(axes) if axis not in positive])


def unsqueeze(graph: ChannelGraph, node: ir.Node) -> None:
    """Axes of size 1 come."""
    axes, new = graph.of(node.inputs[0]), _axes_of(node)
    if axes is None or new is None:
        return graph.opaque(node, f"{label(node)}: its axes are not known")
    rank = len(axes) + len(new)
    positive = {axis % rank for axis in new}
    old = iter(axes)
    graph.set(node.outputs[0], [None if axis in positive else next(old) for axis in range(rank)])


def transpose(graph: ChannelGraph, node: ir.Node) -> None:
    """The axes in another order."""
    axes = graph.of(node.inputs[0])
    if axes is None:
        return graph.opaque(node, f"{label(node)}: its rank is not known")
    order = attribute_ints(node, "perm") or tuple(reversed(range(len(axes))))
    graph.set(node.outputs[0], [axes[axis] for axis in order])


def _axes_of(node: ir.Node) -> tuple[int, ...] | None:
    """The axes of Squeeze and Unsqueeze: an attribute before opset 13, an input since."""
    return attribute_ints(node, "axes") if given(node, 1) is None else integers(given(node, 1))


def _regrouped(graph: ChannelGraph, node: ir.Node) -> list[Labels] | None:
    """The atoms of the axes after a change of shape; None where all was left whole."""
    x = node.inputs[0]
    axes, old, new = graph.of(x), graph.dims(x), graph.dims(node.outputs[0])
    if axes is None or old is None or new is None:
        graph.opaque(node, f"{label(node)}: its shapes are not known")
        return None
    result: list[Labels] = [None] * len(new)
    for before, after in runs(old, new):
        if all(axes[axis] is None for axis in before):
            continue
        if len(before) == len(after) == 1:
            result[after[0]] = axes[before[0]]
            continue
        sizes = [[shape[axis] for axis in span] for shape, span in ((old, before), (new, after))]
        numbers = [[n for n in part if isinstance(n, int)] for part in sizes]
        if any(len(a) != len(b) for a, b in zip(sizes, numbers, strict=True)) or not after or 0 in numbers[0]:
            if _comes_back(graph, node, before, after):
                continue
            for axis in before:
                graph.atoms.freeze(axes[axis], f"{label(node)} mixes it with sizes that are not known")
            continue
        _spread(graph, node, axes, before, numbers[0], after, numbers[1], result)
    return result


def _comes_back(graph: ChannelGraph, node: ir.Node, before: range, after: range) -> bool:
    """Whether axes are merged for a Transpose alone, and split again right behind it.

    So the keys of attention are exported: [batch, heads, s, d] to [-1, s, d], transposed, and back to four axes. The
    batch is not known, so neither is the merged axis, but what was merged comes out again as it went in.
    """
    target = integers(given(node, 1))
    if len(after) != 1 or target is None or target[after[0]] != -1:
        return False
    middle = only_use(node.outputs[0])
    last = None if middle is None or not is_op(middle, "Transpose") else only_use(middle.outputs[0])
    if middle is None or last is None or not is_op(last, "Reshape"):
        return False
    old, rank = graph.dims(node.inputs[0]), graph.rank(node.outputs[0])
    new = graph.dims(last.outputs[0])
    if old is None or new is None or rank is None:
        return False
    order = attribute_ints(middle, "perm") or tuple(reversed(range(rank)))
    sizes = [old[axis] for axis in before]
    mid, parted = graph.dims(node.outputs[0]), integers(given(last, 1))
    if mid is None or order[0] != after[0] or after[0] != 0 or len(new) != len(sizes) + rank - 1:
        return False
    wanted = [*sizes, *(mid[axis] for axis in order[1:])]
    for axis, (size, expected) in enumerate(zip(new, wanted, strict=True)):
        # One size may be whatever is left over: with all others as they were it is as it was too.
        if (size is None or size != expected) and (parted is None or parted[axis] != -1):
            return False
    graph.merged[last] = [(graph.axes[node.inputs[0]] if node.inputs[0] else [])[axis] for axis in before]
    return True


def _bring_back(graph: ChannelGraph, node: ir.Node, axes: list[Labels]) -> None:
    """The atoms of axes that were merged for a Transpose, in front again."""
    for axis, labels in enumerate(graph.merged.get(node, ())):
        axes[axis] = labels


def _spread(
    graph: ChannelGraph,
    node: ir.Node,
    axes: list[Labels],
    before: range,
    old: list[int],
    after: range,
    new: list[int],
    result: list[Labels],
) -> None:
    """The atoms of one run, element by element."""
    cut = [axis for axis in before if axes[axis] is not None]
    for axis in cut[1:]:
        graph.atoms.freeze(axes[axis], f"{label(node)} merges it with another axis that can be cut")
    labels = axes[cut[0]]
    assert labels is not None
    place = before.index(cut[0])
    table = np.broadcast_to(labels.reshape([-1 if i == place else 1 for i in range(len(old))]), old).reshape(new)
    wide = [i for i, size in enumerate(new) if size > 1]
    if len(wide) == 1:
        result[after[wide[0]]] = table.reshape(-1)
        return
    roots = graph.atoms.roots(table)
    lossless = [i for i in wide if _constant_under(roots, i)]
    # Others are tried where the first turns out to be kept.
    order = lossless or (sorted(wide, key=lambda i: (-new[i], i)) if graph.largest_first else wide)
    chosen = order[min(graph.preferred.get(node, 0), len(order) - 1)]
    rows = np.moveaxis(table, chosen, 0).reshape(new[chosen], -1)
    graph.atoms.join(rows[:, :1], rows)
    result[after[chosen]] = np.ascontiguousarray(rows[:, 0])
    if not lossless:
        graph.carriers[node] = (order, np.ascontiguousarray(rows[:, 0]))


def _constant_under(roots: np.ndarray, axis: int) -> bool:
    """Whether each index of the axis has one atom alone under it."""
    rows = np.moveaxis(roots, axis, 0).reshape(roots.shape[axis], -1)
    return bool((rows == rows[:, :1]).all())


def runs(old: tuple[Dim, ...], new: tuple[Dim, ...]) -> list[tuple[range, range]]:
    """Runs of old and new axes that hold the same elements, in order.

    Sizes may be names; equal names are equal sizes. What lies around a size that is not known is one run.
    """
    left: list[tuple[range, range]] = []
    i = j = 0
    while (step := _step(old[i:], new[j:])) is not None:
        left.append((range(i, i + step[0]), range(j, j + step[1])))
        i, j = i + step[0], j + step[1]
    right: list[tuple[range, range]] = []
    end_i, end_j = len(old), len(new)
    while (step := _step(old[i:end_i][::-1], new[j:end_j][::-1])) is not None:
        right.append((range(end_i - step[0], end_i), range(end_j - step[1], end_j)))
        end_i, end_j = end_i - step[0], end_j - step[1]
    middle = [(range(i, end_i), range(j, end_j))] if i < end_i or j < end_j else []
    return [*left, *middle, *reversed(right)]


def _step(old: tuple[Dim, ...], new: tuple[Dim, ...]) -> tuple[int, int] | None:
    """How many axes the first run takes on either side; None where that cannot be told."""
    if not old or not new:
        return None
    i = j = 1
    while _product(old[:i]) != _product(new[:j]):
        a, b = _product(old[:i]), _product(new[:j])
        if a is None or b is None:
            return None
        # Only numbers can be split further; a name that the other side lacks has to be met by that side.
        if (a[1] == b[1] and a[0] < b[0]) or (len(a[1]) < len(b[1])):
            i += 1
        else:
            j += 1
        if i > len(old) or j > len(new):
            return None
    return None if _product(old[:i]) is None else (i, j)


def _product(sizes: tuple[Dim, ...]) -> tuple[int, tuple[str, ...]] | None:
    """A product of numbers and names; None where a size is not known."""
    if any(size is None for size in sizes):
        return None
    return math.prod(n for n in sizes if isinstance(n, int)), tuple(sorted(n for n in sizes if isinstance(n, str)))


def _shape_entries(
    graph: ChannelGraph, node: ir.Node, target: tuple[int, ...] | None, axes: list[Labels]
) -> list[int] | None:
    """The new shape as Reshape wants it, sizes of axes that may be cut to be filled in; None if it cannot be told."""
    if target is not None:
        return list(target)
    if all(labels is None for labels in axes):
        return []
    old, new = graph.dims(node.inputs[0]), graph.dims(node.outputs[0])
    assert old is not None
    assert new is not None
    copied = attribute_int(node, "allowzero", 0) == 0
    entries: list[int] = []
    for axis, size in enumerate(new):
        if isinstance(size, int) and size > 0:
            entries.append(size)
        elif copied and size is not None and axis < len(old) and old[axis] == size:
            entries.append(0)
        else:
            entries.append(-1)
    return entries if entries.count(-1) <= 1 else None


def _rewrite_shape(node: ir.Node, entries: list[int], axes: list[Labels], editor: Editor) -> None:
    new = list(entries)
    changed = False
    for axis, labels in enumerate(axes):
        if labels is None:
            continue
        size = editor.size(labels)
        changed |= size != len(labels)
        if new[axis] != -1:
            new[axis] = size
    if changed:
        editor.set_ints(node, 1, new, "shape")
