"""What pruning is given, and the account of what it did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

import runtimes
from passes.base import Declined
from toolchain.finetune import Round
from toolchain.progress import Status, silent
from toolchain.samples import Batch

_ORT = runtimes.Target("ort-cpu")

#: Groups that a sentence names; the report has all of them.
_NAMED = 8
#: Trains a pruned graph in place, given the whole one before it.
FineTune = Callable[[ir.Model, ir.Model, Round], object]


@dataclasses.dataclass(frozen=True, slots=True)
class GroupCut:
    """What became of a group of channels.

    Attributes:
        name, kind: of the group, as ``find_groups`` has them.
        layers: how many layers make its channels.
        before, after: channels.
        alone: noise over signal at the outputs where half of this group alone goes, before anything is recovered;
            None where the search did not ask.
        asked: channels that a ratio leaves before anything is rounded; None for other aims.
        held: why more are left than were asked for, or why none may go; empty where nothing held it.
    """

    name: str
    kind: str
    layers: int
    before: int
    after: int
    alone: float | None = None
    asked: int | None = None
    held: str = ""


def held_back(groups: Sequence[GroupCut]) -> tuple[str, ...]:
    """What kept groups from losing what a ratio asks, or anything where another aim is set: a sentence a reason."""
    by_reason: dict[str, list[str]] = {}
    for each in groups:
        if each.held:
            left = "all stay" if each.asked is None else f"{each.after} of {each.before} stay, not {each.asked}"
            by_reason.setdefault(each.held, []).append(f"{each.name} ({left})")
    return tuple(
        f"{reason}: {', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''}"
        for reason, names in by_reason.items()
    )


@dataclasses.dataclass(frozen=True, slots=True)
class PruneReport:
    """What was cut, what it saves and what it costs.

    Attributes:
        method: channels, weights or low-rank.
        asked: the aim, such as ``target_macs 0.5``.
        importance: what ranked the channels or weights.
        metric: what the drops are, see ``Judge``.
        data: what they were measured on.
        samples: how many.
        groups: all that may be cut, in the order of the graph; empty for other methods than channels.
        blocks: residual blocks that went as a whole, by the Add that ended them.
        whole: what was left whole, and why.
        remarks: of the pass.
        parameters, macs: before and after, at batch 1.
        latency_ratio: after over before, measured turn by turn; None where it was not asked for.
        drop_cut: what is lost by the cut alone.
        drop: what is lost as it is now.
        recovery: what was done to win accuracy back.
        proof: worst normalised MSE between the cut graph and the whole one masked; None for other methods.
        changed: whether anything went; an already pruned model is left as it is.
        evaluations: how often a candidate was judged.
    """

    method: str
    asked: str
    importance: str
    metric: str
    data: str
    samples: int
    groups: tuple[GroupCut, ...] = ()
    blocks: tuple[str, ...] = ()
    whole: tuple[Declined, ...] = ()
    remarks: tuple[str, ...] = ()
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    latency_ratio: float | None = None
    drop_cut: float = 0.0
    drop: float = 0.0
    recovery: tuple[str, ...] = ()
    proof: float | None = None
    changed: bool = False
    evaluations: int = 0


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Given:
    """What pruning goes by, besides the graph and what is asked.

    Attributes:
        calibration: samples that channels are ranked and layers reconstructed on; gone through several times. May be
            empty.
        judged: batches that losses are measured on, all in memory.
        data: what those are, for the report.
        dims: sizes of symbolic dimensions.
        target: where latency is measured; it runs here.
        seed: of importance random.
        fine_tune: training, after everything else.
        folder: where pruning in rounds keeps what it made until the last of them.
        key: digest of the data and of the training, by which rounds are known again.
        on_status: is told what is going on.
    """

    calibration: Iterable[Batch]
    judged: Sequence[Batch]
    data: str
    dims: Mapping[str, int] = dataclasses.field(default_factory=dict)
    target: runtimes.Target = _ORT
    seed: int = 0
    fine_tune: FineTune | None = None
    folder: Path | None = None
    key: str = ""
    on_status: Status = silent

    @property
    def has_calibration(self) -> bool:
        """Whether there is a sample."""
        return next(iter(self.calibration), None) is not None
