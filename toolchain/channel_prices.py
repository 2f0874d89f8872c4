"""What a graph costs with any number of channels left of its groups, told without cutting it.

A layer's cost is taken as the product of its sizes: multiply-accumulates are, to the number. Milliseconds are as far as
the kernels' blocks allow: ONNX Runtime's convolutions on a CPU compute channels in blocks of ``BLOCK`` (its NCHWc
layout on AVX-512), so 36 channels take as long as 48; and a layer whose channels are no multiple of 4 leaves that
layout and may be slower than it was whole (measured: 62 channels take 1.4 x the time of 64, 3x3 at 16x16).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from passes._channel_blocks import Block
from passes._channel_groups import Group
from passes._graph import constant, given, is_op
from passes._linear import LINEAR
from passes.base import labels

#: channels that a convolution of ONNX Runtime computes at a time
BLOCK = 16


@dataclasses.dataclass(frozen=True, slots=True)
class _Axis:
    """An axis with channels of groups: its size, how many of its indices each channel of a group takes, and the
    multiple that kernels round it up to."""

    size: int
    widths: tuple[tuple[str, int], ...]
    block: int

    def share(self, gone: Mapping[str, int]) -> float:
        left = self.size - sum(width * gone.get(name, 0) for name, width in self.widths)
        return -(-left // self.block) / -(-self.size // self.block)


@dataclasses.dataclass(frozen=True, slots=True)
class _Priced:
    cost: float
    axes: tuple[_Axis, ...]
    blocks: tuple[str, ...]

    def at(self, gone: Mapping[str, int]) -> float:
        if any(gone.get(block) for block in self.blocks):
            return 0.0
        cost = self.cost
        for axis in self.axes:
            cost *= axis.share(gone)
        return cost


class Prices:
    """Costs of a graph's nodes as functions of the channels that go.

    Args:
        model: the whole graph, prepared as ``passes.prune_channels.prepare`` does.
        groups: from ``find_groups``.
        costs: of its nodes, as ``passes.base.labels`` names them, in any unit; nodes that are not named cost nothing.
        blocks: residual blocks that may go as a whole; each counts as one channel of its name.
        stepped: whether costs rise in steps of ``BLOCK`` channels, as times do.
    """

    def __init__(
        self,
        model: ir.Model,
        groups: Sequence[Group],
        costs: Mapping[str, float],
        *,
        blocks: Sequence[Block] = (),
        stepped: bool = False,
    ) -> None:
        lies: dict[tuple[str, int], list[tuple[str, int]]] = {}
        for group in groups:
            for member in group.members:
                lies.setdefault((member.value, member.axis), []).append((group.name, member.positions.shape[1]))
        self._nodes: list[_Priced] = []
        names = [group.name for group in groups] + [block.name for block in blocks]
        self._of: dict[str, list[_Priced]] = {name: [] for name in names}
        inside: dict[ir.Node, list[str]] = {}
        for block in blocks:
            for node in (block.end, *block.nodes):
                inside.setdefault(node, []).append(block.name)
        for node, text in labels(model.graph).items():
            cost = costs.get(text, 0.0)
            if not cost:
                continue
            axes = tuple(
                _Axis(size, tuple(lies[name, axis]), BLOCK if stepped and spatial else 1)
                for name, axis, size, spatial in _axes(node)
                if (name, axis) in lies
            )
            priced = _Priced(cost, axes, tuple(inside.get(node, ())))
            self._nodes.append(priced)
            for name in {name for axis in axes for name, _ in axis.widths} | set(priced.blocks):
                self._of[name].append(priced)

    def total(self, gone: Mapping[str, int]) -> float:
        """The cost with so many channels of each group gone; a group that is not named is whole."""
        return sum(priced.at(gone) for priced in self._nodes)

    def saved(self, gone: Mapping[str, int], group: str, more: int) -> float:
        """What it saves that ``more`` channels of the group go besides."""
        then = {**gone, group: gone.get(group, 0) + more}
        return sum(priced.at(gone) - priced.at(then) for priced in self._of[group])


def _axes(node: ir.Node) -> list[tuple[str, int, int, bool]]:
    """The axes whose sizes a node's cost is the product of: value, axis, size, whether kernels block it."""
    weight = given(node, 1)
    if is_op(node, *LINEAR) and weight is not None and constant(weight) is not None:
        return _sized(weight, None)
    found = _sized(node.outputs[0], None)
    first = given(node, 0)
    if is_op(node, "MatMul") and first is not None:
        found += _sized(first, -1)
    return found


def _sized(value: ir.Value, only: int | None) -> list[tuple[str, int, int, bool]]:
    tensor = constant(value)
    shape = tensor.shape if tensor is not None else value.shape
    if shape is None:
        return []
    spatial = len(shape) >= 3  # of a convolution: MatMul's weights are matrices
    axes = range(len(shape)) if only is None else [len(shape) + only]
    sizes = [(axis, shape[axis]) for axis in axes]
    return [(str(value.name), axis, size, spatial) for axis, size in sizes if isinstance(size, int)]
