"""From a float graph and a calibration to an INT8 graph that keeps its accuracy, or the word that there is none.

What is tried, in this order, until the budget is met: everything quantised; the accuracy tools that may be tried,
the cheapest first, each on top of the best so far; the fewest layers returned to float. Then, if that is asked for,
what is slower in INT8 than in float goes back too. How a candidate is made, judged and timed is ``candidates.py``'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from passes._graph import default_opset
from passes._quant import Calibration
from passes.base import Declined, label
from passes.quantize_int8 import quantizable
from runtimes import Target
from toolchain.budget import BudgetSearch, search
from toolchain.candidates import Candidates, Tools
from toolchain.clipping import PERCENTILE, Method
from toolchain.errors import DataError, FidelityError, GraphError
from toolchain.evaluate import Feeds
from toolchain.islands import can_profile
from toolchain.judge import Judge, judged_on
from toolchain.lower import dialect_of
from toolchain.opset import at_least
from toolchain.preparation import Prepared
from toolchain.progress import Status, silent
from toolchain.samples import Batch

#: What Q/DQ with a scale for each channel takes.
LEAST_OPSET = 13
#: Returned layers whose cost in latency is measured.
_COSTED = 8
#: How often what is slower in INT8 is looked for: each time the borders move.
_ISLAND_ROUNDS = 3
#: Why a node was returned.
SLOWER = "slower in INT8"


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """Everything quantised, with some of the accuracy tools.

    Attributes:
        tools: their names.
        drop: what was lost; None where there was nothing to judge.
        note: why not.
    """

    tools: str
    drop: float | None
    note: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Returned:
    """A node that stays in float.

    Attributes:
        node, op_type: the node.
        nmse: its own rounding noise over its signal; 0 for what only moves elements.
        cost_ms: latency with this node alone in float, less that with everything quantised, at batch 1; None where
            it was not measured, since only the first ones are, and those of a target that is here.
        reason: "accuracy", or "slower in INT8", where the cost is what the profile of one run says.
    """

    node: str
    op_type: str
    nmse: float
    cost_ms: float | None
    reason: str = "accuracy"


@dataclasses.dataclass(frozen=True, slots=True)
class Int8Report:
    """How the INT8 graph came about.

    Attributes:
        metric: what ``drop`` is: "top1" and "agreement" are shares of the samples, "nmse" noise over signal.
        data: the samples that it was measured on.
        samples: how many.
        max_drop: the budget; None where there was none.
        drop: what is lost as shipped.
        full_drop: what is lost with everything quantised, and the tools that are used.
        evaluations: how often the model was judged.
        bias_correction: "none", "fast" or "sequential".
        quantised: how many nodes compute in integers.
        returned: the nodes that stay in float, for the budget's sake or for speed.
        declined: what was left in float for other reasons.
        equalization: how many pairs of layers were equalised.
        smooth_quant: "none", "on" or alpha.
        tried: what each of the accuracy tools gave.
        judged_on: the target, or what stood in for it.
        opset: the graph's; larger than the source's where that was too old for INT8.
    """

    metric: str
    data: str
    samples: int
    max_drop: float | None
    drop: float
    full_drop: float
    evaluations: int
    bias_correction: str
    quantised: int
    returned: tuple[Returned, ...]
    declined: tuple[Declined, ...]
    equalization: str = "none"
    smooth_quant: str = "none"
    tried: tuple[Trial, ...] = ()
    judged_on: str = ""
    opset: int = 0

    @property
    def tools(self) -> Tools:
        """The accuracy tools that are used."""
        alpha = self.smooth_quant
        return Tools(self.equalization, alpha if alpha in ("none", "on") else float(alpha), self.bias_correction)


def quantise_within_budget(
    model: ir.Model,
    target: Target,
    calibration: Calibration,
    judge: Judge,
    samples: Sequence[Feeds],
    *,
    data: str,
    max_drop: float | None,
    exclude: tuple[str, ...] = (),
    weights: str = "balanced",
    tools: Tools | None = None,
    calibration_data: Iterable[Batch] = (),
    method: Method = "auto",
    percentile: float = PERCENTILE,
    return_slower: bool = False,
    half: tuple[str, ...] | None = None,
    on_status: Status = silent,
) -> tuple[ir.Model, Int8Report]:
    """Quantises the graph and, where a budget asks for it, uses accuracy tools and returns the fewest layers to float.

    Args:
        model: optimised float graph.
        target: what it is compiled for, and judged on.
        calibration: of ``model``.
        judge: measures the loss.
        samples: small batches that the layers are ranked on.
        data: what the judge's samples are, for the report.
        max_drop: the budget in the judge's metric; None ships what comes out.
        exclude: nodes that stay in float in any case.
        weights: how weight scales are chosen.
        tools: the accuracy tools; None for none of them.
        calibration_data: what the tools measure on; gone through several times, so no generator. Where there is
            none, biases are corrected on ``samples``, and the other tools cannot be used.
        method, percentile: of ranges that the tools change.
        return_slower: return to float what is slower in INT8, where the target is here and can be looked into.
        half: what stays in float computes in 16 bits, these nodes aside, see ``lower_half``; None for float32.
        on_status: is told what is going on.

    Raises:
        FidelityError: the budget cannot be met; the message says how near it came.
        DataError: a tool that was asked for needs calibration data.
        GraphError: see ``lower_int8``, ``prepare`` and ``at_least``.
    """
    tools = Tools() if tools is None else tools
    candidates = Candidates(
        plain=Prepared(at_least(model, LEAST_OPSET), calibration, 0),
        target=target,
        judge=judge,
        samples=tuple(samples),
        exclude=exclude,
        weights=weights,
        data=calibration_data,
        method=method,
        percentile=percentile,
        half=half,
        on_status=on_status,
    )
    chosen, lost, tried = _choose_tools(candidates, tools, max_drop)
    found, ranked = BudgetSearch(True, (), lost, lost, ()), []
    if max_drop is not None and lost > max_drop:
        on_status("int8: ranking the layers")
        ranked = candidates.ranked(chosen)
        found = search([layer.node for layer in ranked], lambda r: candidates.drop(chosen, r) if r else lost, max_drop)
    if max_drop is not None and not found.met:
        worst = ", ".join(layer.node for layer in ranked[:3])
        best = min(found.trials, key=lambda trial: trial.drop)
        raise FidelityError(
            f"INT8 loses {found.full_drop:.4g} ({judge.metric}), at best {best.drop:.4g} with {len(best.excluded)} "
            f"layers in float; the budget is {max_drop:.4g}",
            where=f"worst layers: {worst}" if worst else None,
            hint="give more calibration data, a larger --max-drop, or ship --precision fp32; nothing was written",
        )
    costs = dict(zip(found.excluded, candidates.costs(chosen, found.excluded[:_COSTED]), strict=False))
    slower, drop = _return_slower(candidates, chosen, found, max_drop) if return_slower else ({}, found.drop)
    if slower and not ranked:
        ranked = candidates.ranked(chosen)
    quantised, declined = candidates.lowered(chosen, (*found.excluded, *slower))
    prepared = candidates.prepared(chosen)
    kinds = {label(node): node.op_type for node in prepared.model.graph}
    noise = {layer.node: layer.nmse for layer in ranked}
    returned = [Returned(n, kinds[n], noise.get(n, 0.0), costs.get(n)) for n in found.excluded]
    returned += [Returned(n, kinds[n], noise.get(n, 0.0), cost, SLOWER) for n, cost in slower.items()]
    left = {*exclude, *found.excluded, *slower}
    report = Int8Report(
        metric=judge.metric,
        data=data,
        samples=judge.samples,
        max_drop=max_drop,
        drop=drop,
        full_drop=found.full_drop,
        evaluations=candidates.evaluations,
        bias_correction=chosen.bias_correction,
        quantised=len(set(quantizable(prepared.model, dialect_of(target))) - left),
        returned=tuple(returned),
        declined=declined,
        equalization=chosen.equalization,
        smooth_quant=str(chosen.smooth_quant),
        tried=tuple(tried),
        judged_on=judged_on(target),
        opset=default_opset(prepared.model.opset_imports),
    )
    return quantised, report


def _choose_tools(candidates: Candidates, tools: Tools, max_drop: float | None) -> tuple[Tools, float, list[Trial]]:
    """The tools that are used, what is lost with them, and what was tried. Of equals the fewest are used."""
    chosen = tools.asked()
    lost = candidates.drop(chosen, ())
    tried = [Trial(str(chosen), lost)]
    for step in tools.steps():
        if max_drop is None or lost <= max_drop:
            break
        more = dataclasses.replace(chosen, **step)
        candidates.on_status(f"int8: trying {more}")
        try:
            if candidates.prepared(more).model is candidates.prepared(chosen).model and "bias_correction" not in step:
                tried.append(Trial(str(more), None, "the graph has no place for it"))
                continue
            drop = candidates.drop(more, ())
        except DataError as error:
            tried.append(Trial(str(more), None, error.what))
            continue
        tried.append(Trial(str(more), drop))
        if drop < lost:
            chosen, lost = more, drop
    return chosen, lost, tried


def _return_slower(
    candidates: Candidates, tools: Tools, found: BudgetSearch, max_drop: float | None
) -> tuple[dict[str, float], float]:
    """The nodes that are returned for speed with what each costs in ms (less than nothing), and what is lost then."""
    slower: dict[str, float] = {}
    drop = found.drop
    if not can_profile(candidates.target):
        return slower, drop
    for _ in range(_ISLAND_ROUNDS):
        candidates.on_status("int8: looking for what is slower in INT8")
        before = (*found.excluded, *slower)
        more = {n: ms for n, ms in candidates.slower(tools, before).items() if n not in before}
        if not more:
            break
        now = (*before, *more)
        try:
            if not candidates.is_faster(tools, now, before):
                break
        except GraphError:  # nothing would be left in INT8: that is float32, which is compared as such
            break
        lost = candidates.drop(tools, now)
        if max_drop is not None and lost > max_drop:
            break
        slower |= more
        drop = lost
    return slower, drop
