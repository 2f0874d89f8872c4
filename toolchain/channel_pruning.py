"""Cuts channels out of a float graph: how much of which, by what is asked, and the proof that nothing else changed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes._channel_blocks import find_blocks
from passes._channel_cut import Cut, masked
from passes._channel_groups import Group, analyze
from passes._channel_scores import importance, named
from passes._graph import constant, is_op
from passes._graph import given as given_input
from passes._linear import LINEAR, NotLinear, canonical
from passes.base import Declined, label
from passes.prune_channels import prepared_copy, read_record, remember
from toolchain.benchmark import Plan, Subject, compare_latency
from toolchain.bounds import float_bound
from toolchain.channel_taylor import taylor_importance
from toolchain.errors import FidelityError, GraphError
from toolchain.evaluate import Feeds, run_reference
from toolchain.judge import compiled_folder
from toolchain.layer_statistics import input_norms
from toolchain.metrics import tensor_error
from toolchain.model_cost import cost_of
from toolchain.prune_account import Given, GroupCut
from toolchain.prune_search import Found, Ground, Room, chosen, cut_copy, room, to_drop, to_latency, to_macs, to_ratio
from toolchain.recipe import Prune

#: Samples that curves are measured on, and those that the cut is proved on.
_CURVES_ON = 64
_PROVED_ON = 2
#: Seconds that a cut's latency is measured for.
_LATENCY_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class ChannelCut:
    """A cut, carried out.

    Attributes:
        whole: the graph, prepared, that ``model`` was cut from.
        model: the cut graph, nothing recovered; None where nothing went.
        cut: what went.
        pruned_before: whether the graph had been pruned already.
        groups: what became of each group.
        declined: what was left whole, and why.
        proof: worst normalised MSE between the cut graph and the whole one masked.
        latency_ratio: measured; None where it was not asked for.
    """

    whole: ir.Model
    model: ir.Model | None
    cut: Cut
    pruned_before: bool
    groups: tuple[GroupCut, ...]
    declined: tuple[Declined, ...]
    proof: float | None = None
    latency_ratio: float | None = None


def cut_channels(
    model: ir.Model, asked: Prune, given: Given, lost: Callable[[ir.Model, ir.Model, Cut], float]
) -> ChannelCut:
    """Finds a cut that gives what is asked, and carries it out on a copy.

    Args:
        model: optimised, float; it is not changed.
        asked: of method channels, with no ``auto`` left.
        lost: what is lost by a cut of the first graph to the second, recovered as it will be.

    Raises:
        PassFailed, GraphError: nothing can be cut, a layer is not there, or the aim cannot be reached.
        FidelityError: the cut graph does not compute what it should, or no cut keeps ``max_drop``.
    """
    record = read_record(model)
    before = record.get("asked", {})
    # what decides how much goes; which channels go is then decided already
    decided = asked.model_dump(exclude={"importance", "reconstruct", "finetune", "rounds"})
    whole = prepared_copy(model)
    groups, declined = _eligible(whole, asked.exclude)
    if {name: before.get(name) for name in decided} == decided:
        return ChannelCut(whole, None, Cut(), True, _described(groups, Found({}), {}), declined)
    scores = _scores(whole, groups, asked, given)
    unknown = [group for group in groups if group.name not in scores]
    declined += tuple(Declined(g.name, f"importance {asked.importance} knows nothing of it") for g in unknown)
    groups = [group for group in groups if group.name in scores]
    if not groups:
        raise GraphError(
            f"importance {asked.importance} knows nothing of any layer that can be cut",
            hint="take l1, l2 or activation" if asked.importance == "batch-norm" else None,
        )
    dense = {group.name: group.count for group in groups} | record.get("dense", {})
    macs = before.get("of_macs") or cost_of(whole, dims=given.dims).macs
    rooms = {
        g.name: room(g, round_to=asked.round_to, min_channels=asked.min_channels, dense=dense[g.name]) for g in groups
    }
    blocks = (
        tuple(b for b in find_blocks(whole) if not {b.name, *b.layers} & set(asked.exclude)) if asked.blocks else ()
    )
    if asked.ratio is None and not blocks and not any(each.most for each in rooms.values()):
        first = "; ".join(f"{name}: {each.held}" for name, each in list(rooms.items())[:3])
        raise GraphError(f"no layer may lose a channel: {first}", hint="a smaller round_to or min_channels")
    ground = Ground(whole, groups, scores, rooms, blocks, _some(given), given.dims, given.on_status)

    def judged(gone: Mapping[str, int]) -> float:
        cut = chosen(ground, gone)
        return lost(whole, cut_copy(whole, cut), cut)

    found = _search(ground, asked, given, dense=dense, macs=macs, lost=judged)
    cut = chosen(ground, found.gone)
    described = _described(groups, found, rooms)
    if not cut.count:
        return ChannelCut(whole, None, cut, bool(record), described, declined)
    made = cut_copy(whole, cut)
    proof = _prove(whole, made, cut, given)
    remember(made, cut, asked=decided | {"of_macs": macs}, dense=dense)
    return ChannelCut(whole, made, cut, bool(record), described, declined, proof, found.latency_ratio)


def _search(
    ground: Ground,
    asked: Prune,
    given: Given,
    *,
    dense: Mapping[str, int],
    macs: int,
    lost: Callable[[Mapping[str, int]], float],
) -> Found:
    if asked.ratio is not None:
        return to_ratio(ground, asked.ratio, scope="global" if asked.scope == "global" else "layer", dense=dense)
    if asked.target_macs is not None:
        return to_macs(ground, asked.target_macs * macs)
    if asked.target_latency is not None:
        with compiled_folder(ground.model, given.target) as folder:
            return to_latency(ground, asked.target_latency, functools.partial(_time_over, folder, given))
    assert asked.max_drop is not None
    return to_drop(ground, lost, asked.max_drop)


def _time_over(whole: Path, given: Given, model: ir.Model) -> float:
    """The time of a graph over that of the compiled whole one, turn by turn at batch 1."""
    plan = Plan(batch_sizes=(1,), duration_s=_LATENCY_SECONDS, count=10, warmup=5, dims=dict(given.dims))
    with compiled_folder(model, given.target) as folder:
        (found,) = compare_latency(Subject(str(folder), compiled=True), Subject(str(whole), compiled=True), plan)
    return found.ratio


def _some(given: Given) -> list[Feeds]:
    """The samples that curves are measured on: of the calibration data, else of what losses are judged on."""
    feeds, count = [], 0
    for batch in given.calibration if given.has_calibration else given.judged:
        taken = {name: array[: _CURVES_ON - count] for name, array in batch.inputs.items()}
        feeds.append(taken)
        count += len(next(iter(taken.values())))
        if count >= _CURVES_ON:
            break
    return feeds


def _eligible(model: ir.Model, exclude: Sequence[str]) -> tuple[list[Group], tuple[Declined, ...]]:
    """The groups that may be cut, and what may not be, with the reason."""
    analysis = analyze(model)
    # one that is kept anyway may be excluded all the same
    kept = {label(layer.node) for layer in analysis.graph.layers} - {n for g in analysis.groups for n in g.layers}
    excluded = named(analysis.groups, [name for name in exclude if name not in kept])
    groups, declined = [], list(analysis.declined)
    for group in analysis.groups:
        if group.name in excluded:
            declined.append(Declined(group.name, "excluded"))
        elif group.count == 1:
            declined.append(Declined(group.name, "it has one channel alone that could go"))
        else:
            groups.append(group)
    if not groups:
        first = "; ".join(f"{each.node}: {each.reason}" for each in declined[:3])
        what = f"no layer can be cut: {first}" if declined else "the model has no layer with a constant float weight"
        hint = "exclude fewer layers" if excluded else "prune before quantising, and leave the model as it is"
        raise GraphError(what, hint=hint)
    return groups, tuple(declined)


def _scores(model: ir.Model, groups: Sequence[Group], asked: Prune, given: Given) -> dict[str, npt.NDArray[np.float64]]:
    if asked.importance == "taylor":
        given.on_status("prune: what the loss says of channels")
        return taylor_importance(model, groups, given.calibration)
    energy = None
    if asked.importance == "activation":
        given.on_status("prune: what layers are fed")
        energy = input_energy(model, (batch.inputs for batch in given.calibration))
    return importance(model, groups, kind=asked.importance, scores=energy, seed=given.seed)


def input_energy(model: ir.Model, samples: Iterable[Feeds]) -> dict[str, npt.NDArray[np.float64]]:
    """What each channel of a value brings to the layers that read it: for each value float64 [channels].

    That is |w_c|^2 |x_c|^2, w_c the weights that read channel c and x_c its values over all samples and places, as a
    share of all channels of the layer; of several layers the sum. Wanda's score (Sun et al. 2023, arXiv 2306.11695),
    of whole channels.

    Raises:
        As ``layer_statistics.input_norms``.
    """
    norms = input_norms(model, samples).norms
    found: dict[str, npt.NDArray[np.float64]] = {}
    for node in model.graph:
        weight, source = given_input(node, 1), given_input(node, 0)
        tensor = constant(weight)
        if not is_op(node, *LINEAR) or label(node) not in norms or tensor is None or source is None:
            continue
        try:
            squares = np.square(canonical(node, tensor.numpy()))  # [groups, outputs, inputs, taps]
        except NotLinear:
            continue
        energy = squares.sum(axis=(1, 3)).reshape(-1) * np.square(norms[label(node)])
        total = energy.sum()
        if total > 0:
            name = str(source.name)
            found[name] = found.get(name, np.zeros(len(energy))) + energy / total
    return found


def _described(groups: Sequence[Group], found: Found, rooms: Mapping[str, Room]) -> tuple[GroupCut, ...]:
    held = dict(found.held)
    if not found.asked:
        held |= {name: room.held for name, room in rooms.items() if not room.most}
    return tuple(
        GroupCut(
            g.name,
            g.kind,
            len(g.layers),
            g.count,
            g.count - found.gone.get(g.name, 0),
            found.curves[g.name].at(g.count // 2) if g.name in found.curves else None,
            found.asked.get(g.name),
            held.get(g.name, ""),
        )
        for g in groups
    )


def _prove(whole: ir.Model, made: ir.Model, cut: Cut, given: Given) -> float:
    """How far the cut graph is from the whole one with the weights masked that read what was cut: the worst output's
    normalised MSE. Raises FidelityError beyond the bound of floats."""
    feeds = [{name: array[:_PROVED_ON] for name, array in given.judged[0].inputs.items()}]
    expected, got = run_reference(masked(whole, cut), feeds)[0], run_reference(made, feeds)[0]
    found = max((tensor_error(expected[name], got[name]).nmse for name in expected if expected[name].size), default=0.0)
    if found > (bound := float_bound(whole)):
        raise FidelityError(
            f"the cut graph is off by a normalised MSE of {found:.2g} from the whole one masked (bound {bound:.0e})",
            hint="exclude layers until it is not, and please report the model",
        )
    return found
