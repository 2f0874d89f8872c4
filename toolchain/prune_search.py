"""Which channels to cut for a cost, or for a loss: from what each group loses alone to how much of each goes.

1. **Curves.** Each group is cut alone at a few ratios, the model is run on a few samples, and noise over signal of its
   outputs is what that cut loses. Beside it, the price: what is saved, in multiply-accumulates or milliseconds.
2. **Spending.** From the whole graph on, the next channels go where the least is lost for what they save, until the
   cost is reached. What several cuts lose adds up, by assumption; the curves are taken at their lower convex hull,
   without which greedy steps stop before what is cheap in the end.
3. **Bisection**, where not a cost but a loss was asked for: on the cost, each candidate judged as it will be.

What each group loses alone is measured and not guessed. On CIFAR ResNet-56, 30 groups at three ratios, it spans ten
orders of magnitude (a quarter of one group's channels is never read; the residual stream of the first stage is lost
with a quarter of its channels), and the share of importance that goes, which costs nothing to know, ranks the cuts by
Spearman's 0.70 (l1), 0.71 (l2) and 0.75 (activation); noise over signal on 64 images in turn ranks them by 0.76 as the
top-1 on 1,000 images does, which cannot tell small losses apart. Channels chosen by activation lose 0.7 to 0.8 of what
those chosen by l1 do.

Everything is a function of the graph, the samples and the seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

import runtimes
from passes import _channel_blocks
from passes._channel_blocks import Block
from passes._channel_cut import Cut, apply
from passes._channel_groups import Group
from passes._channel_scores import plan
from passes._graph import constant, set_constant
from passes.base import label
from passes.eliminate_dead_code import EliminateDeadCode
from toolchain.channel_prices import Prices
from toolchain.errors import FidelityError, GraphError
from toolchain.evaluate import Feeds
from toolchain.layer_latency import layer_latency
from toolchain.metrics import noise_to_signal
from toolchain.model_cost import cost_of
from toolchain.onnx_file import temporary_onnx
from toolchain.progress import Status, silent

#: Where curves are measured: shares of a group's channels.
RATIOS = (0.25, 0.5, 0.75)
#: No group loses more than this share of its channels: beyond, curves are not measured.
MOST = 0.9
#: What is left of a group of so many channels is rounded so that kernels do not mind: by 16, 8 or 4, whichever
#: leaves at least four sizes to choose from.
_UNITS = (16, 8, 4)
#: Steps that a whole group is spent in.
_STEPS = 32
#: Candidates of a bisection, and how near to each other its ends may come, as shares of the cost.
_HALVINGS = 7
_CLOSE = 0.02
#: Cuts of which the latency is measured, and how near below the target one is to come.
_LATENCY_ROUNDS = 6
_NEAR = 0.93
#: A measurement is aimed at this much below the target, for no two are the same.
_INSIDE = 0.98


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """What a group loses alone.

    Attributes:
        gone: numbers of channels, rising, 0 first.
        lost: noise over signal of the outputs at each, 0 first.
    """

    gone: tuple[int, ...]
    lost: tuple[float, ...]

    def at(self, gone: int) -> float:
        """The loss on the lower convex hull; beyond the last point its last slope goes on."""
        xs, ys = self._hull()
        if gone <= xs[-1] or len(xs) == 1:
            return float(np.interp(gone, xs, ys))
        return ys[-1] + (gone - xs[-1]) * (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])

    def _hull(self) -> tuple[list[int], list[float]]:
        xs: list[int] = []
        ys: list[float] = []
        lost = np.maximum.accumulate(self.lost)
        for x, y in zip(self.gone, lost, strict=True):
            while len(xs) > 1 and (ys[-1] - ys[-2]) * (x - xs[-1]) >= (y - ys[-1]) * (xs[-1] - xs[-2]):
                xs.pop()
                ys.pop()
            xs.append(x)
            ys.append(float(y))
        return xs, ys


@dataclasses.dataclass(frozen=True, slots=True)
class Room:
    """How far a group may be cut.

    Attributes:
        unit: what is left is a multiple of this many channels.
        most: so many channels may go.
        held: what keeps more from going.
    """

    unit: int
    most: int
    held: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Ground:
    """What a search is about.

    Attributes:
        model: prepared, whole; it is not changed.
        groups: those that may be cut.
        scores: of their channels, float64 [count] by group; those that matter least go first.
        rooms: how far each may be cut.
        blocks: residual blocks of ``model`` that may go as a whole.
        samples: inputs that curves are measured on, all in memory.
        dims: sizes of symbolic dimensions of made-up inputs.
        on_status: is told what is going on.
    """

    model: ir.Model
    groups: Sequence[Group]
    scores: Mapping[str, npt.NDArray[np.float64]]
    rooms: Mapping[str, Room]
    blocks: Sequence[Block]
    samples: Sequence[Feeds]
    dims: Mapping[str, int]
    on_status: Status = silent


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Found:
    """How much of what goes.

    Attributes:
        gone: channels of each group that go; 1 for a residual block that goes as a whole.
        curves: what each group loses alone; empty where the search did not ask.
        latency_ratio: measured, after over before; None where it was not asked for.
        asked: channels of each group that a ratio leaves before anything is rounded; empty for other aims.
        held: why more than that are left, of those groups where it is so.
    """

    gone: Mapping[str, int]
    curves: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    latency_ratio: float | None = None
    asked: Mapping[str, int] = dataclasses.field(default_factory=dict)
    held: Mapping[str, str] = dataclasses.field(default_factory=dict)


def room(group: Group, *, round_to: int | None, min_channels: int, dense: int) -> Room:
    """How far a group may be cut.

    Args:
        round_to: multiple of outputs that are left; None for what suits its size.
        min_channels: so many outputs stay.
        dense: channels that it had before it was ever cut.
    """
    outputs = dense * group.width
    wanted = round_to or next((unit for unit in _UNITS if 4 * unit <= outputs), 1)
    unit = wanted // math.gcd(wanted, group.width)
    floors = {
        -(-min_channels // group.width): f"{min_channels} are to stay (min_channels)",
        dense - int(MOST * dense): f"of {dense} no more than {MOST:.0%} go",
        unit: "",
    }
    multiple = _multiple(wanted) if unit > 1 else ""
    held = " and ".join(filter(None, (floors[max(floors)], multiple))) or "one has to stay"
    least = -(-max(floors) // unit) * unit  # a multiple again
    return Room(unit, max(0, group.count - least), held)


def _multiple(unit: int) -> str:
    return f"what is left is a multiple of {unit} (round_to)"


def to_ratio(ground: Ground, ratio: float, *, scope: str, dense: Mapping[str, int]) -> Found:
    """The same ratio of every group (``scope`` layer), or of all together where they matter least (global).

    Args:
        dense: how many channels groups had before any cut: the ratio is of those.
    """
    cut = plan(ground.groups, ground.scores, ratio=ratio, scope=scope, dense=dense)
    gone, asked, held = {}, {}, {}
    for group in ground.groups:
        kept, room = group.count - len(cut.channels.get(group.name, ())), ground.rooms[group.name]
        rounded, least = room.unit * math.floor(kept / room.unit + 0.5), group.count - room.most
        left = min(max(rounded, least), group.count)
        gone[group.name], asked[group.name] = group.count - left, kept
        if left > kept:
            held[group.name] = room.held if rounded <= least else _multiple(room.unit * group.width)
    return Found(gone, asked=asked, held=held)


def to_macs(ground: Ground, target: float) -> Found:
    """The cut that leaves at most so many multiply-accumulates, at batch 1.

    Raises:
        GraphError: they cannot be reached.
    """
    cost = cost_of(ground.model, dims=ground.dims)
    macs = {node.node: float(node.macs or 0) for node in cost.nodes}
    prices = Prices(ground.model, ground.groups, macs, blocks=ground.blocks)
    if cost.macs <= target:
        return Found({})
    _require_reach(ground, prices, target / cost.macs, "multiply-accumulates")
    measured = curves(ground)
    return Found(spend(ground, measured, prices, target), measured)


def to_latency(ground: Ground, share: float, measure: Callable[[ir.Model], float]) -> Found:
    """The cut that takes at most this share of the time.

    The profile of single layers says where time goes; a cut that it says is fast enough is measured, and goes further
    or less far by what that found.

    Args:
        measure: the time of a graph over that of the whole one.

    Raises:
        GraphError: it cannot be reached.
    """
    ground.on_status("prune: the time of each layer")
    times = {layer.node: layer.milliseconds for layer in layer_latency(ground.model, dims=ground.dims).layers}
    prices = Prices(ground.model, ground.groups, times, blocks=ground.blocks, stepped=True)
    whole = prices.total({})
    measured = curves(ground)
    wanted, found, deepest, tried = share, None, 1.0, []
    for _ in range(_LATENCY_ROUNDS):
        gone = spend(ground, measured, prices, wanted * whole)
        if gone in tried or not any(gone.values()):
            break
        tried.append(gone)
        ground.on_status("prune: measuring latency")
        seen, told = measure(cut_copy(ground.model, chosen(ground, gone))), prices.total(gone) / whole
        deepest = min(deepest, seen)
        if seen <= share and (found is None or found.latency_ratio is None or seen > found.latency_ratio):
            found = Found(gone, measured, seen)
        if share * _NEAR < seen <= share:
            break
        # Not all that the profile promises comes true, nor does what is in no layer shrink: aim as far beyond.
        kept = max((1 - seen) / (1 - told), 0.05)
        wanted = max(1 - (1 - share * _INSIDE) / kept, 0.0)
        if seen > share:
            wanted = min(wanted, told - 0.01)
    if found is None:
        raise GraphError(
            f"{share:.0%} of the latency cannot be reached: the deepest cut that was tried takes {deepest:.0%} of it",
            hint="a larger target, a smaller round_to or min_channels, or fewer excluded layers",
        )
    return found


def to_drop(ground: Ground, judge: Callable[[Mapping[str, int]], float], max_drop: float) -> Found:
    """The deepest cut of those tried that loses at most ``max_drop``: its multiply-accumulates are bisected.

    Args:
        judge: what is lost with so many channels of each group gone, recovered as it will be.

    Raises:
        FidelityError: none does.
    """
    cost = cost_of(ground.model, dims=ground.dims)
    macs = {node.node: float(node.macs or 0) for node in cost.nodes}
    prices = Prices(ground.model, ground.groups, macs, blocks=ground.blocks)
    measured = curves(ground)
    low, high, best, least = 0.0, 1.0, None, math.inf
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        gone = spend(ground, measured, prices, middle * cost.macs)
        share = prices.total(gone) / cost.macs
        ground.on_status(f"prune: judging {share:.0%} of the multiply-accumulates")
        lost = judge(gone)
        least = min(least, lost)
        if lost <= max_drop:
            best, high = gone, min(middle, share)
        else:
            low = middle
        if high - low < _CLOSE:
            break
    if best is None:
        raise FidelityError(
            f"no cut that was tried loses {max_drop:g} or less; the least lost {least:.3g}",
            hint="a larger max_drop, reconstruct with samples, or exclude what is sensitive",
        )
    return Found(best, measured)


def chosen(ground: Ground, gone: Mapping[str, int]) -> Cut:
    """Cuts so many channels of each group, those that matter least, and the blocks that go."""
    blocks = [block for block in ground.blocks if gone.get(block.name)]
    inside = {label(node) for block in blocks for node in block.nodes}
    channels = {}
    for group in ground.groups:
        name, count = group.name, gone.get(group.name, 0)
        if count and not inside.issuperset(group.layers):
            order = np.argsort(ground.scores[name], kind="stable")
            channels[name] = tuple(sorted(int(i) for i in order[:count]))
    return Cut(channels, tuple(block.name for block in blocks))


def cut_copy(model: ir.Model, cut: Cut) -> ir.Model:
    """A copy of the prepared model without these channels. Raises PassFailed as ``apply`` does."""
    copy = model.clone()
    apply(copy, cut)
    EliminateDeadCode()(copy)
    return copy


def curves(ground: Ground) -> dict[str, Curve]:
    """Cuts each group alone, and each block, and compares the outputs with the whole model's.

    Raises:
        RunFailed: the model does not run on the samples.
    """
    whole = _outputs(ground.model, ground.samples)
    found = {}
    total = len(ground.groups) + len(ground.blocks)

    for number, group in enumerate(ground.groups):
        ground.on_status(f"prune: what {group.name} loses alone", number / total)
        room = ground.rooms[group.name]
        counts, lost = [0], [0.0]
        for ratio in RATIOS:
            gone = min(round(group.count * ratio), room.most)
            if gone > counts[-1]:
                counts.append(gone)
                made = _silenced(ground.model, group, chosen(ground, {group.name: gone}).channels[group.name])
                lost.append(_worst(whole, _outputs(made, ground.samples)))
        found[group.name] = Curve(tuple(counts), tuple(lost))
    for number, block in enumerate(ground.blocks, start=len(ground.groups)):
        ground.on_status(f"prune: what {block.name} loses alone", number / total)
        made = ground.model.clone()
        for each in _channel_blocks.named(made, [block.name]):
            _channel_blocks.drop(each)
        found[block.name] = Curve((0, 1), (0.0, _worst(whole, _outputs(made, ground.samples))))
    return found


def _silenced(model: ir.Model, group: Group, channels: Sequence[int]) -> ir.Model:
    """A copy in which nothing reads these channels: what ``passes._channel_cut.masked`` makes, without its analysis."""
    copy = model.clone()
    values = {str(each.name): each for node in copy.graph for each in node.inputs if each is not None}
    for member in group.members:
        if "in" in member.roles:
            value = values[member.value]
            tensor = constant(value)
            assert tensor is not None
            data = tensor.numpy().copy()
            data[(slice(None),) * member.axis + (member.positions[list(channels)].reshape(-1),)] = 0
            set_constant(value, data)
    return copy


def _outputs(model: ir.Model, samples: Sequence[Feeds]) -> list[Feeds]:
    with temporary_onnx(model) as path, runtimes.load(path, target="ort-cpu") as session:
        return [session.run(feeds) for feeds in samples]


def _worst(whole: Sequence[Feeds], cut: Sequence[Feeds]) -> float:
    """Noise over signal of the worst output, mean over the samples. What is not finite is beyond all bounds."""
    found = [
        float(np.mean([noise_to_signal(a[name], b[name]) for a, b in zip(whole, cut, strict=True)]))
        for name, array in whole[0].items()
        if array.dtype.kind == "f" and array.size
    ]
    return max(found, default=0.0)


def spend(ground: Ground, measured: Mapping[str, Curve], prices: Prices, target: float) -> dict[str, int]:
    """How many channels of each group go so that the cost is at most ``target``, in the unit of ``prices``.

    The next channels to go are always those of the group that loses least for what they save. Where the cost cannot
    be reached, all that may go is gone: ask ``prices.total`` what is left.
    """
    counts = {group.name: group.count for group in ground.groups}
    gone = dict.fromkeys(measured, 0)
    total = prices.total(gone)
    while total > target:
        best: tuple[float, str, int, float] | None = None
        for name, curve in measured.items():
            if name in counts:
                step, saved = _step(counts[name], gone, name, ground.rooms[name], prices)
            else:  # a block
                step, saved = 1, 0.0 if gone[name] else prices.saved(gone, name, 1)
            if saved <= 0:
                continue
            loses = (curve.at(gone[name] + step) - curve.at(gone[name])) / saved
            if best is None or (loses, name) < best[:2]:
                best = (loses, name, step, saved)
        if best is None:
            return gone
        _, name, step, saved = best
        gone[name] += step
        total -= saved
    return gone


def _step(count: int, gone: Mapping[str, int], name: str, room: Room, prices: Prices) -> tuple[int, float]:
    """The next channels of a group that go together, and what that saves: few, what is left a multiple of the unit,
    and so many that it saves anything, for kernels compute in blocks. (0, 0) where there are none."""
    there = count - gone[name]
    left = (there - max(1, count // _STEPS)) // room.unit * room.unit
    while left > 0 and count - left <= room.most:
        if (saved := prices.saved(gone, name, there - left)) > 0:
            return there - left, saved
        left -= room.unit
    return 0, 0.0


def _require_reach(ground: Ground, prices: Prices, share: float, what: str) -> None:
    most = {name: room.most for name, room in ground.rooms.items()} | {block.name: 1 for block in ground.blocks}
    least = prices.total(most) / prices.total({})
    if least > share:
        raise GraphError(
            f"{share:.0%} of the {what} cannot be reached: with all cut that may be, {least:.0%} are left",
            hint="a larger target, a smaller round_to or min_channels, or fewer excluded layers",
        )
