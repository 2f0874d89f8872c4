"""Pruning, from a float graph and what is asked to a smaller graph and an account of it; a stage of the line.

What was cut is proved: the cut graph, before anything is recovered, gives what the whole graph gives with the weights
masked that read the channels. From then on it is another function than the model was, on purpose, and is judged by
what it loses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

import runtimes
from passes._channel_cut import Cut
from passes._graph import scopes
from passes.base import Declined, Pass, PassFailed, label
from passes.factorize_low_rank import FactorizeLowRank
from passes.fuse_conv_bn import FuseConvBn
from passes.prune_channels import prepared_copy
from passes.prune_weights import PruneWeights, storage_remark
from passes.quantize_int8 import check_exclude
from toolchain.channel_pruning import cut_channels
from toolchain.errors import DataError, GraphError
from toolchain.finetune import Round
from toolchain.judge import Judge
from toolchain.layer_statistics import input_moments, input_norms
from toolchain.masks import read_masks
from toolchain.model_cost import cost_of
from toolchain.onnx_file import temporary_onnx
from toolchain.prune_account import Given, PruneReport, held_back
from toolchain.prune_rounds import in_rounds
from toolchain.recipe import Prune
from toolchain.reconstruct import Method, reconstruct

__all__ = ["Given", "PruneReport", "prune"]

#: Remarks where nothing went, and nothing held it.
ALREADY = "it is pruned like this already: nothing was cut"
TOO_LITTLE = "so little is asked that no layer loses a channel: nothing was cut"
#: How layers are fitted, what does most first; see ``reconstruct``.
_RECONSTRUCTIONS: tuple[tuple[Method, str], ...] = (("least-squares", "least squares"), ("bias", "bias correction"))
#: Layers that a remark names.
_NAMED = 3


def prune(model: ir.Model, asked: Prune, given: Given) -> tuple[ir.Model, PruneReport]:
    """A pruned copy of an optimised float graph, and the account of it. The model itself is not changed.

    Where it is pruned like that already, it comes back as it is, and the report says so.

    Raises:
        GraphError: nothing can be cut, a layer is not there, or the aim cannot be reached.
        DataError: samples are needed that are not there.
        FidelityError: the cut graph does not compute what it should, or no cut keeps ``max_drop``.
        SourceError: the masks cannot be read.
    """
    asked = _spelled_out(asked, given)
    with temporary_onnx(model) as path, runtimes.load(path, target="ort-cpu") as session:
        judge = _Counting(Judge(session, given.judged))

    def step(whole: ir.Model, part: Prune, within: Given) -> tuple[ir.Model, PruneReport]:
        if asked.method == "channels":
            return _channels(whole, part, within, judge)
        return _by_pass(whole, part, within, judge, dense=model)

    try:
        if asked.rounds == 1:
            made, report = step(model, asked, given)
        else:
            made, report = in_rounds(model, asked, given, step)
    except PassFailed as error:
        raise GraphError(str(error), where=error.node, hint=error.hint) from error
    before, after = (cost_of(each, dims=given.dims) for each in (model, made))
    return made, dataclasses.replace(
        report,
        parameters=(before.parameters, after.parameters),
        macs=(before.macs, after.macs),
        evaluations=judge.evaluations,
    )


def _spelled_out(asked: Prune, given: Given) -> Prune:
    """With each ``auto`` decided. Raises DataError where it asks for samples and there are none."""
    ranked = {"channels": ("activation", "l1"), "weights": ("l2", "l2"), "low-rank": ("activation", "auto")}
    changes: dict[str, Any] = {}
    if asked.importance == "auto":
        changes["importance"] = ranked[asked.method][0 if given.has_calibration else 1]
    if asked.reconstruct == "auto":
        changes["reconstruct"] = given.has_calibration and asked.method != "low-rank"
    asked = asked.model_copy(update=changes)
    for key, value in (("importance", asked.importance), ("reconstruct", asked.reconstruct)):
        if value in ("activation", "taylor", "wanda", True) and not given.has_calibration:
            raise DataError(f"{key} {value} needs samples", hint="--data FOLDER")
    return asked


class _Counting:
    """Says what a graph loses, and counts how often it was asked."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.evaluations = 0

    @property
    def chance(self) -> float:
        """How much two drops may differ by chance: twice the largest standard error of a share of so many samples."""
        return 0.0 if self.judge.metric == "nmse" else self.judge.samples**-0.5

    def drop(self, model: ir.Model) -> float:
        self.evaluations += 1
        with temporary_onnx(model) as path, runtimes.load(path, target="ort-cpu") as session:
            return self.judge.drop(session)


def _report(asked: Prune, given: Given, judge: _Counting) -> PruneReport:
    """With what is known from the start."""
    name, value = asked.aim
    return PruneReport(
        method=asked.method,
        asked=f"{name} {Path(value).name if isinstance(value, str) else f'{value:.4g}'}",
        importance=asked.importance,
        metric=judge.judge.metric,
        data=given.data,
        samples=judge.judge.samples,
    )


# Weights and low rank: a pass does it.


def _by_pass(
    model: ir.Model, asked: Prune, given: Given, judge: _Counting, *, dense: ir.Model
) -> tuple[ir.Model, PruneReport]:
    """``dense`` is what sizes are compared with: in rounds the model before the first."""
    made, folded = _folded(model, asked) if asked.method == "low-rank" else (model.clone(), ())
    step = _pass(made, asked, given)
    given.on_status(f"prune: {step.name}")
    outcome: Any = step(made)
    remarks = (*folded, *outcome.remarks)
    if outcome.modified and asked.method == "weights":
        remarks = (storage_remark(dense, made, asked.pattern),)
    report = dataclasses.replace(_report(asked, given, judge), whole=outcome.declined, remarks=remarks)
    if not outcome.modified:
        if not outcome.declined:
            raise GraphError("the model has no layer with a constant float weight: there is nothing to prune")
        return model, dataclasses.replace(report, remarks=(_nothing_went(outcome.declined),))
    return _told(_recovered(model, made, Cut(), asked, given, judge), report)


def _folded(model: ir.Model, asked: Prune) -> tuple[ir.Model, tuple[str, ...]]:
    """A copy with constants and BatchNormalization folded, as exporters leave neither: the scale of a normalisation
    belongs to the weight whose rank is chosen, and one between two layers hides that they are factors. In a build the
    passes have done that. With a remark that says so. Raises PassFailed where an excluded node is not there."""
    check_exclude(model, tuple(asked.exclude))
    made = prepared_copy(model)
    for node in made.graph:
        node.name = label(node)  # what is excluded keeps its name, whatever becomes of its output's
    count = FuseConvBn().call(made).fired
    known = {label(node) for scope in scopes(made) for node in scope.graph}
    gone = [name for name in asked.exclude if name not in known]
    if gone:
        raise PassFailed(
            f"{gone[0]} is folded into another layer before ranks are chosen: it cannot be excluded",
            hint="exclude the layer itself",
        )
    return made, (f"{count} BatchNormalization were folded into the layers beside them first",) if count else ()


def _nothing_went(declined: Sequence[Declined]) -> str:
    reasons = [f"{each.node}: {each.reason}" for each in declined]
    more = f"; and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
    return f"nothing was cut: {'; '.join(reasons[:_NAMED])}{more}"


def _pass(model: ir.Model, asked: Prune, given: Given) -> Pass:
    exclude = tuple(asked.exclude)
    samples = (batch.inputs for batch in given.calibration)
    if asked.method == "low-rank":
        assert asked.ratio is not None
        moments = input_moments(model, samples) if asked.importance == "activation" else None
        return FactorizeLowRank(ratio=1 - asked.ratio, moments=moments, exclude=exclude)
    if asked.masks is not None:
        return PruneWeights(masks=read_masks(Path(asked.masks)), exclude=exclude)
    return PruneWeights(
        sparsity=asked.ratio,
        method=asked.importance,
        scope=None if asked.scope == "auto" else asked.scope,
        pattern=asked.pattern,
        norms=input_norms(model, samples) if asked.importance == "wanda" else None,
        seed=given.seed,
        exclude=exclude,
    )


def _channels(model: ir.Model, asked: Prune, given: Given, judge: _Counting) -> tuple[ir.Model, PruneReport]:
    def lost(whole: ir.Model, made: ir.Model, cut: Cut) -> float:
        # without training: a search would train as often as it asks
        return _recovered(whole, made, cut, asked, dataclasses.replace(given, fine_tune=None), judge).drop

    found = cut_channels(model, asked, given, lost)
    report = dataclasses.replace(
        _report(asked, given, judge),
        groups=found.groups,
        blocks=found.cut.blocks,
        whole=found.declined,
        latency_ratio=found.latency_ratio,
        proof=found.proof,
    )
    made, held = found.model, held_back(found.groups)
    if made is None:
        nothing = ALREADY if found.pruned_before else TOO_LITTLE
        if held:
            nothing = f"no layer loses a channel: {'; '.join(held)}"
        return model, dataclasses.replace(report, remarks=(nothing,))
    report = dataclasses.replace(report, remarks=tuple(f"held back: {each}" for each in held))
    return _told(_recovered(found.whole, made, found.cut, asked, given, judge), report)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Recovered:
    """What was won back: the model, what was done, what the cut alone loses and what is lost now, and remarks."""

    model: ir.Model
    ways: tuple[str, ...]
    drop_cut: float
    drop: float
    remarks: tuple[str, ...]


def _recovered(whole: ir.Model, made: ir.Model, cut: Cut, asked: Prune, given: Given, judge: _Counting) -> _Recovered:
    """Wins accuracy back. A layer that comes nearer to the whole model's may still harm those behind it: what loses
    more than the cut alone is not kept, and the biases alone are moved, if that helps."""
    ways, remarks = [], []
    by_cut = drop = judge.drop(made)
    for method, way in _RECONSTRUCTIONS if asked.reconstruct else ():
        fitted = made.clone()
        reconstruct(
            whole,
            fitted,
            (batch.inputs for batch in given.calibration),
            method=method,
            cut=cut,
            seed=given.seed,
            on_progress=lambda layer, total: given.on_status("prune: reconstructing layers", layer / total),
        )
        found = judge.drop(fitted)
        if found <= by_cut + judge.chance:
            made, drop = fitted, found
            ways.append(way)
            break
        remarks.append(
            f"{way} is not kept: with it {found:.3g} ({judge.judge.metric}) is lost, with the cut alone {by_cut:.3g}"
        )
    if given.fine_tune is not None:
        given.on_status("prune: fine-tuning")
        given.fine_tune(whole, made, Round())
        drop = judge.drop(made)
        ways.append("fine-tuning")
    return _Recovered(made, tuple(ways), by_cut, drop, tuple(remarks))


def _told(found: _Recovered, report: PruneReport) -> tuple[ir.Model, PruneReport]:
    return found.model, dataclasses.replace(
        report,
        drop_cut=found.drop_cut,
        drop=found.drop,
        recovery=found.ways,
        remarks=(*report.remarks, *found.remarks),
        changed=True,
    )
