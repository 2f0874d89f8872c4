"""How channels go through Reshape and its kin: which old axes became which new ones.

The two shapes are cut into runs of axes with equal products; within a run every element of the old axes is an element
of the new ones. Where an axis is split, as 768 features into 12 heads of 64, only one of the new axes can be cut, and
each of its indices stands for all elements under it: that is how whole heads come about.

Where axes are merged of which one has no known size, as batch and heads where attention multiplies matrices of three
axes, the new axis keeps the old ones as its parts (``ChannelGraph.merged``), until it is split again.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes._channel_atoms import Labels
from passes._channel_graph import ChannelGraph, Dim, Editor, Part
from passes._graph import attribute_int, attribute_ints, given, integers, is_op
from passes.base import label

#: a number and names, to be multiplied
Size: TypeAlias = tuple[int, tuple[str, ...]]
_PRODUCT = re.compile(r"(\d+|[A-Za-z_]\w*)(\*(\d+|[A-Za-z_]\w*))*")


def reshape(graph: ChannelGraph, node: ir.Node) -> None:
    """Reshape; where the new shape has to be rewritten and cannot be, its channels are kept."""
    shape = given(node, 1)
    axes = _regrouped(graph, node)
    if axes is None:
        return
    merged = graph.merged.get(node.outputs[0], {})
    if any(labels is not None for labels in axes) or merged:
        rewrite = _plan_of_shape(graph, node, axes, merged)
        if rewrite is None:
            why = f"{label(node)}: its new shape is computed, with more than one size that is not known"
            for labels in (*axes, *(labels for parts in merged.values() for _, labels in parts)):
                graph.atoms.freeze(labels, why)
            axes = [None] * len(axes)
            graph.merged.pop(node.outputs[0], None)
        else:
            graph.rewrites.append(rewrite)
    graph.keep_whole(shape, f"{label(node)} reads sizes there")
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
    merged = graph.merged.get(node.inputs[0], {}) if node.inputs[0] is not None else {}
    if merged:
        graph.merged[node.outputs[0]] = {at: merged[axis] for at, axis in enumerate(order) if axis in merged}
    graph.set(node.outputs[0], [axes[axis] for axis in order])


def _axes_of(node: ir.Node) -> tuple[int, ...] | None:
    """The axes of Squeeze and Unsqueeze: an attribute before opset 13, an input since."""
    return attribute_ints(node, "axes") if given(node, 1) is None else integers(given(node, 1))


def _regrouped(graph: ChannelGraph, node: ir.Node) -> list[Labels] | None:
    """The atoms of the axes after a change of shape; None where all was left whole."""
    x = node.inputs[0]
    axes, sizes, new = graph.of(x), graph.dims(x), graph.dims(node.outputs[0])
    if x is None or axes is None or sizes is None or new is None:
        graph.opaque(node, f"{label(node)}: its shapes are not known")
        return None
    # What was merged is several axes again.
    merged = graph.merged.get(x, {})
    old = [part for axis, part in enumerate(zip(sizes, axes, strict=True)) for part in merged.get(axis, (part,))]
    result: list[Labels] = [None] * len(new)
    for before, after in runs(tuple(size for size, _ in old), new):
        parts = [old[axis] for axis in before]
        if all(labels is None for _, labels in parts):
            continue
        for axis, made in zip(after, _one_run(graph, node, parts, [new[axis] for axis in after]), strict=True):
            if len(made) == 1:
                result[axis] = made[0][1]
            elif any(labels is not None for _, labels in made):
                graph.merged.setdefault(node.outputs[0], {})[axis] = made
    return result


def _one_run(graph: ChannelGraph, node: ir.Node, old: list[Part], new: list[Dim]) -> list[tuple[Part, ...]]:
    """For each new axis of a run what it is made of: one part, or several where some of their sizes are not numbers."""
    if len(old) == len(new) == 1:
        return [(old[0],)]
    numbers = [size for size, _ in old if isinstance(size, int)]
    wanted = [size for size in new if isinstance(size, int)]
    if len(numbers) == len(old) and len(wanted) == len(new) > 0 and 0 not in numbers:
        spread = _spread(graph, node, [labels for _, labels in old], numbers, wanted)
        return [((size, labels),) for size, labels in zip(new, spread, strict=True)]
    found = refined(tuple(size for size, _ in old), tuple(new))
    if found is None:
        if len(new) == 1:
            return [tuple(old)]
        for _, labels in old:
            graph.atoms.freeze(labels, f"{label(node)} mixes it with sizes that are not known")
        return [((size, None),) for size in new]
    parted: list[Part] = []
    for (size, labels), factors in zip(old, found[0], strict=True):
        if len(factors) == 1:
            parted.append((size, labels))
        elif labels is None:
            parted.extend((factor, None) for factor in factors)
        else:
            each = [factor for factor in factors if isinstance(factor, int)]
            parted.extend(zip(each, _spread(graph, node, [labels], [len(labels)], each), strict=True))
    result: list[tuple[Part, ...]] = []
    rest = iter(parted)
    for size, factors in zip(new, found[1], strict=True):
        parts = tuple(next(rest) for _ in factors)
        each = [factor for factor, _ in parts if isinstance(factor, int)]
        if len(parts) > 1 and len(each) == len(parts) and any(labels is not None for _, labels in parts):
            (labels,) = _spread(graph, node, [labels for _, labels in parts], each, [math.prod(each)])
            parts = ((size, labels),)
        result.append(parts or ((size, None),))
    return result


def _spread(graph: ChannelGraph, node: ir.Node, axes: list[Labels], old: list[int], new: list[int]) -> list[Labels]:
    """The atoms of axes of these new sizes, element by element."""
    result: list[Labels] = [None] * len(new)
    cut = [axis for axis, labels in enumerate(axes) if labels is not None]
    for axis in cut[1:]:
        graph.atoms.freeze(axes[axis], f"{label(node)} merges it with another axis that can be cut")
    if not cut:
        return result
    labels = axes[cut[0]]
    assert labels is not None
    table = np.broadcast_to(labels.reshape([-1 if i == cut[0] else 1 for i in range(len(old))]), old).reshape(new)
    wide = [i for i, size in enumerate(new) if size > 1]
    if len(wide) == 1:
        result[wide[0]] = table.reshape(-1)
        return result
    roots = graph.atoms.roots(table)
    lossless = [i for i in wide if _constant_under(roots, i)]
    # Others are tried where the first turns out to be kept.
    order = lossless or (sorted(wide, key=lambda i: (-new[i], i)) if graph.largest_first else wide)
    chosen = order[min(graph.preferred.get(node, 0), len(order) - 1)]
    rows = np.moveaxis(table, chosen, 0).reshape(new[chosen], -1)
    graph.atoms.join(rows[:, :1], rows)
    result[chosen] = np.ascontiguousarray(rows[:, 0])
    if not lossless:
        graph.carriers[node] = (order, np.ascontiguousarray(rows[:, 0]))
    return result


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


def refined(
    old: tuple[Dim, ...], new: tuple[Dim, ...]
) -> tuple[tuple[tuple[Dim, ...], ...], tuple[tuple[Dim, ...], ...]] | None:
    """The factors of each old and each new axis such that both are one sequence of factors; None where there are none.

    [b, 32] to [4*b, 8] is [b], [4, 8] and [b, 4], [8].
    """
    left, right = [_product((size,)) for size in old], [_product((size,)) for size in new]
    if None in left or None in right:
        return None
    sides: list[list[Size]] = [[s for s in side if s is not None] for side in (left, right)]
    factors: list[list[list[Dim]]] = [[[] for _ in side] for side in sides]
    at = [0, 0]
    while at[0] < len(old) or at[1] < len(new):
        # An axis that is used up, or of size 1, has no more to say.
        done = next((i for i in (0, 1) if at[i] < len(sides[i]) and sides[i][at[i]] == (1, ())), None)
        if done is not None:
            at[done] += 1
            continue
        if at[0] == len(old) or at[1] == len(new):
            return None
        a, b = sides[0][at[0]], sides[1][at[1]]
        common = a if _divided(b, a) is not None else b
        for i, size in enumerate((a, b)):
            rest = _divided(size, common)
            if rest is None:
                return None
            sides[i][at[i]] = rest
            factors[i][at[i]].append(_named(common))
    return tuple(map(tuple, factors[0])), tuple(map(tuple, factors[1]))


def _named(size: Size) -> Dim:
    number, names = size
    return "*".join([*([str(number)] if number != 1 else []), *names]) if names else number


def _divided(size: Size, by: Size) -> Size | None:
    """One size over another, None where that does not come out even."""
    names = list(size[1])
    for name in by[1]:
        if name not in names:
            return None
        names.remove(name)
    return None if size[0] % by[0] else (size[0] // by[0], tuple(names))


def _product(sizes: tuple[Dim, ...]) -> Size | None:
    """A product of numbers and names (``4*batch`` is both); None where a size is not known, or one is 0."""
    number, names = 1, []
    for size in sizes:
        if size is None or size == 0:
            return None
        for factor in (size,) if isinstance(size, int) else size.split("*") if _PRODUCT.fullmatch(size) else (size,):
            if isinstance(factor, int) or factor.isdigit():
                number *= int(factor)
            else:
                names.append(factor)
    return number, tuple(sorted(names))


def _plan_of_shape(
    graph: ChannelGraph, node: ir.Node, axes: list[Labels], merged: Mapping[int, Sequence[Part]]
) -> Callable[[Editor], None] | None:
    """What rewrites the new shape that a Reshape reads, sizes that may be cut filled in; None if it cannot be told."""
    shape = given(node, 1)
    target = integers(shape)
    inside = {axis: [labels for _, labels in parts if labels is not None] for axis, parts in merged.items()}
    old, new = graph.dims(node.inputs[0]), graph.dims(node.outputs[0])
    assert old is not None
    assert new is not None
    copied = attribute_int(node, "allowzero", 0) == 0
    if target is not None:
        # A size that is copied may be that of another axis which happens to be as long, and is cut.
        told = [
            size if entry == 0 and copied and isinstance(size, int) else entry
            for entry, size in zip(target, new, strict=True)
        ]
        return functools.partial(_rewrite_shape, node, tuple(told), axes, inside)
    entries: list[int] = []
    for axis, size in enumerate(new):
        if isinstance(size, int) and size > 0:
            entries.append(size)
        elif copied and axis not in inside and size is not None and axis < len(old) and old[axis] == size:
            entries.append(0)
        else:
            entries.append(-1)
    if entries.count(-1) <= 1:
        return functools.partial(_rewrite_shape, node, tuple(entries), axes, inside)
    if len(inside) > 1 or (inside and _may_be_inferred(shape, len(new))):
        return None
    return functools.partial(_rewrite_computed_shape, node, axes, inside)


def _may_be_inferred(shape: ir.Value | None, rank: int) -> bool:
    """Whether one of the sizes may be -1 already: not where they are put together from constants and sizes."""
    producer = None if shape is None else shape.producer()
    if producer is None or not is_op(producer, "Concat") or len(producer.inputs) != rank:
        return True
    return any(min(integers(value) or (0,)) < 0 for value in producer.inputs)


def _rewrite_shape(
    node: ir.Node,
    entries: tuple[int, ...],
    axes: list[Labels],
    inside: Mapping[int, Sequence[npt.NDArray[np.int64]]],
    editor: Editor,
) -> None:
    new = list(entries)
    changed = any(editor.size(labels) != len(labels) for each in inside.values() for labels in each)
    for axis, labels in enumerate(axes):
        if labels is None:
            continue
        size = editor.size(labels)
        changed |= size != len(labels)
        if new[axis] != -1:
            new[axis] = size
    if changed:
        editor.set_ints(node, 1, new, "shape")


def _rewrite_computed_shape(
    node: ir.Node, axes: list[Labels], inside: Mapping[int, Sequence[npt.NDArray[np.int64]]], editor: Editor
) -> None:
    """Sizes that are cut are put over those that are computed; -1 where a size that is not known lost some."""
    by = {axis: editor.size(labels) for axis, labels in enumerate(axes) if labels is not None}
    by = {axis: size for axis, size in by.items() if size != len(axes[axis])}  # type: ignore[arg-type]
    for axis, each in inside.items():
        if any(editor.size(labels) != len(labels) for labels in each):
            by[axis] = -1
    if not by:
        return
    places = range(len(axes))
    for op_type, vector in (("Mul", [int(i not in by) for i in places]), ("Add", [by.get(i, 0) for i in places])):
        value = node.inputs[1]
        assert value is not None
        editor.adjust(value, op_type, vector, readers=[(node, 1)])
