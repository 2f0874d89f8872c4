"""Carries out a cut: smaller tensors and what goes with them; and the same model with its channels masked.

A cut is exact in this sense: the cut graph computes what the whole graph computes when every layer that sums over the
channels in question has zeros in its weight there (``masked``). A block that is taken out computes what the whole graph
does when the block's own part of the sum is zero. What both do to the accuracy is another matter.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes import _channel_blocks
from passes._channel_graph import ChannelGraph, Editor, Keep
from passes._channel_groups import Analysis, analyze
from passes._graph import constant, set_constant
from passes.base import PassFailed


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """What is to be removed.

    Attributes:
        channels: for each group, by name, which of its channels, each from 0 to the group's count less one.
        blocks: residual blocks, by the name of the Add that ends them.
    """

    channels: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    blocks: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many channels and blocks go."""
        return sum(len(each) for each in self.channels.values()) + len(self.blocks)


def apply(model: ir.Model, cut: Cut) -> None:
    """Removes channels and blocks, in place. Names stay: a value keeps its name with fewer channels.

    Raises:
        PassFailed: an unknown group, channel or block, or a group that would lose its last channel; the model is as
            it was then.
    """
    analysis = analyze(model)
    _channel_blocks.named(model, cut.blocks)
    removed = _removed(analysis, cut)
    graph = analysis.graph

    def keep(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        kept: npt.NDArray[np.bool_] = ~removed[graph.atoms.roots(labels)]
        return kept

    tensors, sizes = _cut_values(graph, keep)
    for value, data in tensors:
        set_constant(value, data)
    editor = Editor(model, keep)
    for rewrite in (*graph.rewrites, *graph.shapes):
        rewrite(editor)
    for value, shape in sizes.items():
        value.shape = shape
    for block in _channel_blocks.named(model, cut.blocks):
        _channel_blocks.drop(block)


def masked(model: ir.Model, cut: Cut) -> ir.Model:
    """A copy of the whole model that computes what the cut one does. Raises PassFailed as ``apply`` does."""
    copy = model.clone()
    analysis = analyze(copy)
    removed = _removed(analysis, cut)
    graph = analysis.graph
    for block in _channel_blocks.named(copy, cut.blocks):
        _channel_blocks.silence(copy, block)
    changed: dict[ir.Value, np.ndarray] = {}
    for (value, axis), roles in graph.roles.items():
        labels = graph.axes[value][axis]
        if labels is None or all(role != "in" for role, _ in roles):
            continue
        gone = np.flatnonzero(removed[graph.atoms.roots(labels)])
        if len(gone):
            data = changed.get(value)
            if data is None:
                tensor = constant(value)
                assert tensor is not None
                data = changed[value] = tensor.numpy().copy()
            data[(slice(None),) * axis + (gone,)] = 0
    for value, data in changed.items():
        set_constant(value, data)
    return copy


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known."""
    there = list(known)
    near = difflib.get_close_matches(name, there, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(there[:8])}" if there else ""


def _removed(analysis: Analysis, cut: Cut) -> npt.NDArray[np.bool_]:
    """For each atom whether its class goes."""
    removed = np.zeros(analysis.graph.atoms.count, dtype=np.bool_)
    for name, channels in cut.channels.items():
        roots = analysis.roots.get(name)
        if roots is None:
            raise PassFailed(f"there is no group {name!r} to cut", hint=nearest(name, analysis.roots))
        wanted = sorted(set(channels))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < len(roots):
            raise PassFailed(f"group {name} has the channels 0 to {len(roots) - 1}, not {wanted[0]} to {wanted[-1]}")
        if len(wanted) == len(roots):
            raise PassFailed(
                f"this would leave {name} without a channel", hint="keep one at least, or take out the whole block"
            )
        removed[roots[wanted]] = True
    return removed


def _cut_values(graph: ChannelGraph, keep: Keep) -> tuple[list[tuple[ir.Value, np.ndarray]], dict[ir.Value, ir.Shape]]:
    """The new tensors of constants and the new shapes of what is computed."""
    tensors: list[tuple[ir.Value, np.ndarray]] = []
    sizes: dict[ir.Value, ir.Shape] = {}
    for value, axes in graph.axes.items():
        kept = {axis: keep(labels) for axis, labels in enumerate(axes) if labels is not None}
        kept = {axis: mask for axis, mask in kept.items() if not mask.all()}
        if not kept:
            continue
        tensor = constant(value)
        if tensor is not None:
            data = tensor.numpy()
            for axis, mask in kept.items():
                data = data[(slice(None),) * axis + (mask,)]
            tensors.append((value, np.ascontiguousarray(data)))
        elif value.shape is not None:
            shape = [int(kept[axis].sum()) if axis in kept else size for axis, size in enumerate(value.shape)]
            sizes[value] = ir.Shape(shape)
    for value, merged in graph.merged.items():
        # A name such as 4*batch would be another size now, which runtimes reuse buffers by.
        lost = {
            axis
            for axis, parts in merged.items()
            if any(labels is not None and not keep(labels).all() for _, labels in parts)
        }
        known = sizes.get(value, value.shape)
        if lost and known is not None:
            sizes[value] = ir.Shape([None if axis in lost else size for axis, size in enumerate(known)])
    return tensors, sizes
