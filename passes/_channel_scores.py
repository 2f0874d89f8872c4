"""How much channels matter, and from that which go.

l1, l2: norms of a channel's weights (Li et al. 2016, arXiv 1608.08710), over all layers that make or read it, each
relative to the mean of its tensor, so that layers can be compared. batch-norm: the scale of normalisations (Liu et al.
2017, arXiv 1708.06519). activation and taylor (Molchanov et al. 2019, arXiv 1906.10771) come from data, so their
numbers are given, one for each channel of a value of the graph: relative to the mean for activation; for taylor as
they are, since numbers of different layers are of one unit there and can be added.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes._channel_cut import Cut, nearest
from passes._channel_groups import Group, Member
from passes._graph import FLOATS, constant
from passes.base import PassFailed

KINDS = ("l1", "l2", "batch-norm", "activation", "taylor", "random")
SCOPES = ("layer", "global")
Scores = Mapping[str, npt.NDArray[np.float64]]


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelScores:
    """How much channels matter, measured on data.

    Attributes:
        scores: for a value of the graph, by name, one number for each index of its channels; more is more important.
    """

    scores: Mapping[str, np.ndarray]


def importance(
    model: ir.Model,
    groups: Sequence[Group],
    *,
    kind: str = "l1",
    scores: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
) -> dict[str, npt.NDArray[np.float64]]:
    """How much each channel of each group matters: for each group name float64 [count]; more is more important.

    Groups of which the kind knows nothing (no normalisation, no numbers given) are left out.

    Args:
        kind: one of ``KINDS``.
        scores: for activation and taylor, see ``ChannelScores``.
        seed: for random.

    Raises:
        PassFailed: an unknown kind, or numbers that are missing or do not fit the graph.
    """
    if kind not in KINDS:
        raise PassFailed(f"there is no importance {kind!r}", hint=nearest(kind, KINDS))
    if kind == "random":
        rng = np.random.default_rng(seed)
        return {group.name: rng.random(group.count) for group in groups}
    if kind in ("activation", "taylor"):
        return _from_data(groups, kind, scores)
    weights = {name: value for name, value in _constants(model).items()}
    result = {}
    for group in groups:
        parts = [part for member in group.members if (part := _norm(member, weights, kind)) is not None]
        if parts:
            result[group.name] = np.mean(parts, axis=0)
    return result


def _constants(model: ir.Model) -> dict[str, ir.Value]:
    found = {name: value for name, value in model.graph.initializers.items()}
    found.update({str(n.outputs[0].name): n.outputs[0] for n in model.graph if n.op_type == "Constant"})
    return found


def _norm(member: Member, weights: Mapping[str, ir.Value], kind: str) -> npt.NDArray[np.float64] | None:
    """A norm of each channel's slice of one tensor, over the mean of them; None where the tensor says nothing."""
    wanted = ("scale",) if kind == "batch-norm" else ("out", "in", "scale")
    value = weights.get(member.value)
    tensor = constant(value)
    if tensor is None or tensor.dtype not in FLOATS or not any(role in wanted for role in member.roles):
        return None
    moved = np.moveaxis(tensor.numpy().astype(np.float64), member.axis, 0)
    data = moved.reshape(len(moved), -1)
    power = 2 if kind == "l2" else 1
    each: npt.NDArray[np.float64] = (np.abs(data) ** power).sum(axis=1)[member.positions].sum(axis=1) ** (1 / power)
    mean = float(each.mean())
    return each / mean if mean > 0 and math.isfinite(mean) else None


def _from_data(
    groups: Sequence[Group], kind: str, scores: Mapping[str, np.ndarray] | None
) -> dict[str, npt.NDArray[np.float64]]:
    if not scores:
        raise PassFailed(
            f"importance {kind} is measured on data, and no scores are given",
            hint="give scores, one number for each channel of a value, or take l1, l2 or batch-norm",
        )
    known = {member.value for group in groups for member in group.members}
    if not known & set(scores):
        first = next(iter(scores))
        raise PassFailed(
            f"no scores are of a value with channels that can be cut: {first!r}", hint=nearest(first, known)
        )
    result = {}
    for group in groups:
        parts = []
        for member in group.members:
            given = scores.get(member.value)
            if given is None:
                continue
            data = np.asarray(given, dtype=np.float64).reshape(-1)
            if member.positions.max() >= len(data) or not np.isfinite(data).all():
                raise PassFailed(
                    f"the scores of {member.value!r} are {len(data)} numbers, some perhaps not finite; its channels "
                    f"go up to {member.positions.max()}"
                )
            each = data[member.positions].sum(axis=1)
            mean = float(each.mean())
            parts.append(each if kind == "taylor" else each / mean if mean > 0 else each)
        if parts:
            result[group.name] = np.sum(parts, axis=0) if kind == "taylor" else np.mean(parts, axis=0)
    return result


def plan(
    groups: Sequence[Group],
    scores: Scores,
    *,
    ratio: float,
    scope: str = "layer",
    per_layer: Mapping[str, float] | None = None,
    round_to: int = 1,
    min_channels: int = 1,
    exclude: Sequence[str] = (),
    dense: Mapping[str, int] | None = None,
) -> Cut:
    """Chooses the channels that go: those that matter least.

    Args:
        groups: from ``find_groups``.
        scores: for each group name float64 [count]; a group without is left whole.
        ratio: of the channels, 0 (none) up to, not including, 1.
        scope: ``layer`` takes the ratio of each group, ``global`` of all groups together, where they matter least.
        per_layer: ratios of the groups of single layers, in place of ``ratio`` and left out of ``global``.
        round_to: what is left of a group is the nearest multiple of this many outputs, one multiple at least.
        min_channels: so many outputs of a group stay.
        exclude: layers, weights or values whose channels stay, by name.
        dense: how many channels groups had before any cut, where that is not now; ratios are of those.

    Raises:
        PassFailed: a ratio out of range, an unknown name, scores that do not fit.
    """
    for name, each in {"ratio": ratio, **(per_layer or {})}.items():
        if not 0 <= each < 1:
            raise PassFailed(f"{name} is {each}", hint="0 cuts nothing, 0.3 three channels of ten; 1 would leave none")
    if scope not in SCOPES:
        raise PassFailed(f"there is no scope {scope!r}", hint=nearest(scope, SCOPES))
    if round_to < 1 or min_channels < 1:
        raise PassFailed(f"round_to is {round_to} and min_channels {min_channels}", hint="1 or more")
    single = _single(groups, per_layer or {})
    excluded = named(groups, exclude)
    chosen = [g for g in groups if g.name in scores and g.name not in excluded]
    for group in chosen:
        if scores[group.name].shape != (group.count,):
            raise PassFailed(f"{group.name} has {group.count} channels, and scores {scores[group.name].shape}")
    wide = {g.name: (dense or {}).get(g.name, g.count) for g in chosen}
    kept = {g.name: wide[g.name] * (1 - single.get(g.name, ratio)) for g in chosen}
    if scope == "global":
        together = [g for g in chosen if g.name not in single]
        kept.update(_global(together, scores, wide, ratio, min_channels))
    channels: dict[str, tuple[int, ...]] = {}
    for group in chosen:
        if single.get(group.name, ratio) == 0:
            continue
        stays = _rounded(group, kept[group.name], round_to, min_channels)
        if stays < group.count:
            order = np.argsort(scores[group.name], kind="stable")
            channels[group.name] = tuple(sorted(int(i) for i in order[: group.count - stays]))
    return Cut(channels)


def _rounded(group: Group, wanted: float, round_to: int, min_channels: int) -> int:
    """How many channels of the group stay."""
    unit = round_to // math.gcd(round_to, group.width)
    stays = max(unit * math.floor(wanted / unit + 0.5), unit, -(-min_channels // group.width))
    return min(stays, group.count)


def _global(
    groups: Sequence[Group], scores: Scores, wide: Mapping[str, int], ratio: float, min_channels: int
) -> dict[str, float]:
    """How many channels of each group stay if the least important of all groups go."""
    total = sum(wide[g.name] * g.width for g in groups)
    budget = ratio * total - sum((wide[g.name] - g.count) * g.width for g in groups)
    kept = {g.name: float(g.count) for g in groups}
    ranked = sorted(
        ((score, g.name, g) for g in groups for score in np.sort(scores[g.name])), key=lambda each: each[:2]
    )
    for _, name, group in ranked:
        if budget < group.width / 2:
            break
        if kept[name] - 1 >= max(1, -(-min_channels // group.width)):
            kept[name] -= 1
            budget -= group.width
    return kept


def named(groups: Sequence[Group], names: Sequence[str]) -> dict[str, str]:
    """The groups that these names mean, each with the name."""
    found: dict[str, str] = {}
    for name in names:
        meant = [
            g.name
            for g in groups
            if name in (g.name, *g.layers) or any(m.value == name and "in" not in m.roles for m in g.members)
        ]
        if not meant:
            known = dict.fromkeys(layer for g in groups for layer in g.layers)
            raise PassFailed(f"no layer that can be cut is called {name!r}", hint=nearest(name, known))
        found.update(dict.fromkeys(meant, name))
    return found


def _single(groups: Sequence[Group], per_layer: Mapping[str, float]) -> dict[str, float]:
    """Ratios by group from ratios by layer."""
    result: dict[str, float] = {}
    for name, ratio in per_layer.items():
        for group in named(groups, [name]):
            if result.setdefault(group, ratio) != ratio:
                raise PassFailed(
                    f"{name} is cut together with a layer that has another ratio: {result[group]}, not {ratio}",
                    hint="give one ratio for the layers of a group",
                )
    return result
