"""From a float graph and a calibration to an INT8 graph that keeps its accuracy, or the word that there is none.

Every candidate is judged as it will ship: compiled for the target and run on its own kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import onnx_ir as ir

import runtimes
from passes._quant import Calibration
from passes.base import Declined
from passes.quantize_int8 import quantizable
from runtimes import Target
from toolchain.benchmark import Comparison, Plan, Subject, compare_latency
from toolchain.bias_correction import correct_bias
from toolchain.budget import BudgetSearch, search
from toolchain.compile import compile_model, read_compiled
from toolchain.data import Batch
from toolchain.errors import DataError, FidelityError, GraphError
from toolchain.evaluate import Feeds
from toolchain.lower import dialect_of, lower_int8
from toolchain.metrics import tensor_error
from toolchain.onnx_file import temporary_onnx
from toolchain.progress import Status, silent
from toolchain.sensitivity import LayerSensitivity, layer_sensitivities
from toolchain.verify import class_scores

Metric = Literal["auto", "top1", "agreement", "nmse"]
#: Samples that the layers are ranked on: all activations of one are held at a time.
_RANKED_ON = 4
#: Returned layers whose cost in latency is measured.
_COSTED = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Returned:
    """A layer that stays in float.

    Attributes:
        node, op_type: the layer.
        nmse: its own rounding noise over its signal.
        cost_ms: latency with this layer alone in float, less that with everything quantised, at batch 1; None where
            it was not measured, since only the first ones are.
    """

    node: str
    op_type: str
    nmse: float
    cost_ms: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Int8Report:
    """How the INT8 graph came about.

    Attributes:
        metric: what ``drop`` is: "top1" and "agreement" are shares of the samples, "nmse" noise over signal.
        data: the samples that it was measured on.
        samples: how many.
        max_drop: the budget; None where there was none.
        drop: what is lost as shipped.
        full_drop: what is lost with everything quantised.
        evaluations: how often the model was judged.
        bias_correction: "none", "fast" or "sequential".
        quantised: how many nodes compute in integers.
        returned: the layers that stay in float for the budget's sake.
        declined: what was left in float for other reasons.
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


class Judge:
    """Says how much a candidate loses against the float model, on samples that are gone through once for each.

    Args:
        reference: a session of the float model.
        batches: labelled or not; held in memory, since every candidate sees all of them.
        metric: ``auto`` is top1 with labels, agreement without where the model classifies, else nmse.

    Raises:
        DataError: no samples, or a metric that needs labels or classes that are not there.
    """

    def __init__(self, reference: runtimes.Session, batches: Sequence[Batch], *, metric: Metric = "auto") -> None:
        if not batches:
            raise DataError("there is nothing to measure the loss on", hint="--eval-data or --data")
        self.batches = batches
        self._outputs = [reference.run(batch.inputs) for batch in batches]
        self.samples = sum(len(next(iter(batch.inputs.values()))) for batch in batches)
        scores = [class_scores(outputs) for outputs in self._outputs]
        labelled = all(batch.labels is not None for batch in batches)
        classifies = all(s is not None for s in scores)
        if metric == "auto":
            metric = "nmse" if not classifies else ("top1" if labelled else "agreement")
        if metric == "top1" and not labelled:
            raise DataError("top1 needs labels", hint="use a folder with one subfolder a class, or metric agreement")
        if metric in ("top1", "agreement") and not classifies:
            raise DataError(f"{metric} needs a model that gives class scores", hint="use metric nmse")
        self.metric = metric
        self._classes = [s.argmax(axis=1) for s in scores if s is not None]

    def drop(self, session: runtimes.Session) -> float:
        """What the candidate loses: top-1 of the float model minus its own (negative where it is better), the
        share of samples it classifies otherwise, or the normalised MSE of its worst output."""
        lost, worst = 0, 0.0
        for index, batch in enumerate(self.batches):
            outputs = session.run(batch.inputs)
            if self.metric == "nmse":
                errors = (tensor_error(v, outputs[k]).nmse for k, v in self._outputs[index].items() if v.size)
                worst = max(worst, *errors) if self._outputs[index] else worst
                continue
            scores = class_scores(outputs)
            assert scores is not None
            mine, theirs = scores.argmax(axis=1), self._classes[index]
            if self.metric == "top1":
                lost += int((theirs == batch.labels).sum()) - int((mine == batch.labels).sum())
            else:
                lost += int((mine != theirs).sum())
        return worst if self.metric == "nmse" else lost / self.samples


@contextlib.contextmanager
def compiled_folder(model: ir.Model, target: Target) -> Iterator[Path]:
    """The graph compiled for the target, as the folder that ``benchmark`` takes."""
    with tempfile.TemporaryDirectory(prefix="toolchain-") as folder, temporary_onnx(model) as path:
        compile_model(path, target, Path(folder))
        yield Path(folder)


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
    bias_correction: str = "none",
    bias_samples: Sequence[Feeds] | None = None,
    on_status: Status = silent,
) -> tuple[ir.Model, Int8Report]:
    """Quantises the graph and, where a budget asks for it, returns the fewest layers to float.

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
        bias_correction: "none", "fast", "sequential", or "auto": the first of them, in this order, that meets the
            budget, else the best; without a budget none.
        bias_samples: batches whose means biases are corrected by; None takes ``samples``.
        on_status: is told what is going on.

    Raises:
        FidelityError: the budget cannot be met; the message says how near it came.
        GraphError: see ``lower_int8``.
    """
    trials = 0
    mode = "none" if bias_correction == "auto" else bias_correction

    def lowered(returned: tuple[str, ...]) -> tuple[ir.Model, tuple[Declined, ...]]:
        made, declined = lower_int8(model, target, calibration, exclude=(*exclude, *returned), weights=weights)
        if mode != "none":
            means_of = samples if bias_samples is None else bias_samples
            correct_bias(model, made, means_of, mode=mode, dialect=dialect_of(target))  # type: ignore[arg-type]
        return made, declined

    def drop(returned: tuple[str, ...]) -> float:
        nonlocal trials
        trials += 1
        on_status(f"int8: evaluation {trials}, {len(returned)} layers in float")
        try:
            quantised, _ = lowered(returned)
        except GraphError:
            if not returned:
                raise
            return math.inf  # nothing is left in INT8: no budget is met by giving up
        with (
            compiled_folder(quantised, target) as folder,
            runtimes.backend(target.runtime).load(read_compiled(folder)) as session,
        ):
            return judge.drop(session)

    ranked: list[LayerSensitivity] = []
    if max_drop is None:
        lost = drop(())
        found = BudgetSearch(True, (), lost, lost, ())
    else:
        lost = drop(())
        if bias_correction == "auto":
            by_mode = {mode: lost}
            for mode in ("fast", "sequential"):
                if min(by_mode.values()) > max_drop:
                    on_status(f"int8: {mode} bias correction")
                    by_mode[mode] = drop(())
            mode = min(by_mode, key=lambda name: by_mode[name])  # the simplest of equals: they are in that order
            lost = by_mode[mode]
        if lost <= max_drop:
            found = BudgetSearch(True, (), lost, lost, ())
        else:
            on_status("int8: ranking the layers")
            names = [name for name in quantizable(model, dialect_of(target)) if name not in exclude]
            ranked = layer_sensitivities(model, lowered(())[0], names, samples[:_RANKED_ON])
            found = search([layer.node for layer in ranked], lambda r: lost if not r else drop(r), max_drop)
    if not found.met and max_drop is not None:
        worst = ", ".join(layer.node for layer in ranked[:3])
        best = min(found.trials, key=lambda trial: trial.drop)
        raise FidelityError(
            f"INT8 loses {found.full_drop:.4g} ({judge.metric}), at best {best.drop:.4g} with {len(best.excluded)} "
            f"layers in float; the budget is {max_drop:.4g}",
            where=f"worst layers: {worst}" if worst else None,
            hint="give more calibration data, a larger --max-drop, or ship --precision fp32; nothing was written",
        )
    costs = dict(zip(found.excluded, _costs(found.excluded[:_COSTED], target, lowered, on_status), strict=False))
    quantised, declined = lowered(found.excluded)
    by_name = {layer.node: layer for layer in ranked}
    report = Int8Report(
        metric=judge.metric,
        data=data,
        samples=judge.samples,
        max_drop=max_drop,
        drop=found.drop,
        full_drop=found.full_drop,
        evaluations=trials,
        bias_correction=mode,
        quantised=len(set(quantizable(model, dialect_of(target))) - set(exclude) - set(found.excluded)),
        returned=tuple(Returned(n, by_name[n].op_type, by_name[n].nmse, costs.get(n)) for n in found.excluded),
        declined=declined,
    )
    return quantised, report


def _costs(
    nodes: Sequence[str],
    target: Target,
    lowered: Callable[[tuple[str, ...]], tuple[ir.Model, tuple[Declined, ...]]],
    on_status: Status,
) -> list[float]:
    """Milliseconds that each of the nodes costs when it alone is in float."""
    costs: list[float] = []
    if not nodes:
        return costs
    with compiled_folder(lowered(())[0], target) as whole:
        for node in nodes:
            on_status(f"int8: what {node} costs in float", len(costs) / len(nodes))
            with compiled_folder(lowered((node,))[0], target) as without:
                found = turn_by_turn(without, whole, seconds=0.5)
                costs.append((found.ratio - 1) * found.b_ms)
    return costs


def turn_by_turn(a: Path, b: Path, *, seconds: float = 1.0) -> Comparison:
    """Latency of one compiled folder against another's at batch 1, turn by turn in one fresh process."""
    plan = Plan(duration_s=seconds, count=10, warmup=5)
    (found,) = compare_latency(Subject(str(a), compiled=True), Subject(str(b), compiled=True), plan)
    return found
