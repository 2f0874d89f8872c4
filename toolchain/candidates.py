"""The INT8 candidates of one float graph: made with some of the accuracy tools, judged, and timed one against another.

Every candidate is judged as it will ship: compiled for the target and run on its own kernels. Only where the target
is not here is it judged by its graph, and the report says so.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from passes.base import Declined
from passes.quantize_int8 import quantizable
from runtimes import Target
from toolchain.benchmark import Comparison, Plan, Subject, compare_latency
from toolchain.bias_correction import correct_bias
from toolchain.clipping import Method
from toolchain.errors import GraphError
from toolchain.evaluate import Feeds
from toolchain.islands import slower_in_int8
from toolchain.judge import Judge, candidate_session, compiled_folder
from toolchain.lower import dialect_of, lower_half, lower_int8
from toolchain.preparation import Prepared, prepare
from toolchain.progress import Status
from toolchain.samples import Batch
from toolchain.sensitivity import LayerSensitivity, layer_sensitivities
from toolchain.targets import cannot_run

#: Samples that the layers are ranked on: all activations of one are held at a time.
_RANKED_ON = 4
#: Batches of calibration data that biases are corrected by.
_BIAS_BATCHES = 4
#: Layers go back to float for speed if the whole is faster by more than measurements differ.
_WORTHWHILE = 0.98


@dataclasses.dataclass(frozen=True, slots=True)
class Tools:
    """Which accuracy tools are used.

    Attributes:
        equalization: "none", "on", or "auto": where the budget is missed without, and only if it helps.
        smooth_quant: "none", "on" (the best alpha of each value), alpha from 0 to 1, or "auto" as above.
        bias_correction: "none", "fast", "sequential", or "auto" as above, of the two the one that helps.
    """

    equalization: str = "none"
    smooth_quant: str | float = "none"
    bias_correction: str = "none"

    def asked(self) -> Tools:
        """What is used in any case."""
        return Tools(*("none" if value == "auto" else value for value in dataclasses.astuple(self)))

    def steps(self) -> list[dict[str, Any]]:
        """What may be tried besides, the cheapest first: a pass over a few samples, one over all, two, many."""
        order = (
            ("bias_correction", "fast"),
            ("equalization", "on"),
            ("smooth_quant", "on"),
            ("bias_correction", "sequential"),
        )
        return [{name: value} for name, value in order if getattr(self, name) == "auto"]

    def __str__(self) -> str:
        used = [
            name.replace("_", " ") + ("" if value == "on" else f" ({value})")
            for name, value in dataclasses.asdict(self).items()
            if value != "none"
        ]
        return " + ".join(used) or "plain"


def prepared_by(
    tools: Tools,
    plain: Prepared,
    data: Iterable[Batch],
    *,
    method: Method,
    percentile: float,
    on_status: Status,
) -> Prepared:
    """The float graph that is quantised: ``plain`` itself, or what the tools make of it. See ``prepare``."""
    if (tools.equalization, tools.smooth_quant) == ("none", "none"):
        return plain
    alpha = {"none": None, "on": "auto"}.get(str(tools.smooth_quant), tools.smooth_quant)
    return prepare(
        plain.model,
        plain.calibration,
        data,
        equalization=tools.equalization != "none",
        smooth_quant=alpha,  # type: ignore[arg-type]  # a float, or "auto"
        method=method,
        percentile=percentile,
        on_status=on_status,
    )


def quantised_by(
    tools: Tools,
    prepared: Prepared,
    target: Target,
    *,
    exclude: tuple[str, ...],
    weights: str,
    data: Iterable[Batch],
    samples: Sequence[Feeds],
) -> tuple[ir.Model, tuple[Declined, ...]]:
    """The prepared graph in INT8, and what was declined in it. If the tools say so, its biases are corrected on the
    first batches of ``data``, or on ``samples`` where there is none."""
    made, declined = lower_int8(prepared.model, target, prepared.calibration, exclude=exclude, weights=weights)
    if tools.bias_correction != "none":
        means_of = [batch.inputs for batch in itertools.islice(data, _BIAS_BATCHES)] or samples
        mode = tools.bias_correction
        correct_bias(prepared.model, made, means_of, mode=mode, dialect=dialect_of(target))  # type: ignore[arg-type]
    return made, declined


@dataclasses.dataclass(eq=False, kw_only=True)
class Candidates:
    """Makes, judges and times candidates, each one told by its tools and by the nodes that are returned to float.

    Attributes:
        plain: the graph with its ranges, as it is without tools.
        target, judge, samples, exclude, weights, method, percentile, half, on_status: see ``quantise_within_budget``.
        data: its ``calibration_data``.
        evaluations: how often a candidate was judged.
    """

    plain: Prepared
    target: Target
    judge: Judge
    samples: Sequence[Feeds]
    exclude: tuple[str, ...]
    weights: str
    data: Iterable[Batch]
    method: Method
    percentile: float
    half: tuple[str, ...] | None
    on_status: Status
    evaluations: int = 0
    _prepared: dict[tuple[str, str | float], Prepared] = dataclasses.field(default_factory=dict)

    def prepared(self, tools: Tools) -> Prepared:
        """The float graph that is quantised. Raises DataError, GraphError."""
        key = tools.equalization, tools.smooth_quant
        if key not in self._prepared:
            self._prepared[key] = prepared_by(
                tools, self.plain, self.data, method=self.method, percentile=self.percentile, on_status=self.on_status
            )
        return self._prepared[key]

    def lowered(self, tools: Tools, returned: tuple[str, ...]) -> tuple[ir.Model, tuple[Declined, ...]]:
        """A candidate as it is compiled, and what was declined in it."""
        made, declined = self.quantised(tools, returned)
        return made if self.half is None else lower_half(made, self.target, keep=self.half), declined

    def quantised(self, tools: Tools, returned: tuple[str, ...]) -> tuple[ir.Model, tuple[Declined, ...]]:
        """A candidate whose float values are those of the float graph, and what was declined in it."""
        return quantised_by(
            tools,
            self.prepared(tools),
            self.target,
            exclude=(*self.exclude, *returned),
            weights=self.weights,
            data=self.data,
            samples=self.samples,
        )

    def drop(self, tools: Tools, returned: tuple[str, ...]) -> float:
        """What the candidate loses."""
        self.evaluations += 1
        self.on_status(f"int8: evaluation {self.evaluations}, {len(returned)} layers in float")
        try:
            quantised, _ = self.lowered(tools, returned)
        except GraphError:
            if not returned:
                raise
            return math.inf  # nothing is left in INT8: no budget is met by giving up
        with candidate_session(quantised, self.target) as session:
            return self.judge.drop(session)

    def ranked(self, tools: Tools) -> list[LayerSensitivity]:
        """The layers, the most harmful first."""
        model = self.prepared(tools).model
        names = [name for name in quantizable(model, dialect_of(self.target)) if name not in self.exclude]
        return layer_sensitivities(model, self.quantised(tools, ())[0], names, self.samples[:_RANKED_ON])

    def costs(self, tools: Tools, nodes: Sequence[str]) -> list[float]:
        """Milliseconds that each of the nodes costs when it alone is in float; none where the target is not here."""
        costs: list[float] = []
        if not nodes or cannot_run(self.target) is not None:
            return costs
        with compiled_folder(self.lowered(tools, ())[0], self.target) as whole:
            for node in nodes:
                self.on_status(f"int8: what {node} costs in float", len(costs) / len(nodes))
                with compiled_folder(self.lowered(tools, (node,))[0], self.target) as without:
                    found = turn_by_turn(without, whole, seconds=0.5)
                    costs.append((found.ratio - 1) * found.b_ms)
        return costs

    def slower(self, tools: Tools, returned: tuple[str, ...]) -> dict[str, float]:
        """Nodes to return for speed, and what each then costs (less than nothing), see ``islands.py``."""
        made, _ = self.quantised(tools, returned)
        model = self.prepared(tools).model
        return slower_in_int8(model, made, quantizable(model, dialect_of(self.target)), self.samples[0])

    def is_faster(self, tools: Tools, returned: tuple[str, ...], than: tuple[str, ...]) -> bool:
        """Whether the candidate is faster with these nodes in float than with those."""
        with (
            compiled_folder(self.lowered(tools, returned)[0], self.target) as a,
            compiled_folder(self.lowered(tools, than)[0], self.target) as b,
        ):
            return turn_by_turn(a, b).ratio <= _WORTHWHILE


def turn_by_turn(a: Path, b: Path, *, seconds: float = 1.0) -> Comparison:
    """Latency of one compiled folder against another's at batch 1, turn by turn in one fresh process."""
    plan = Plan(duration_s=seconds, count=10, warmup=5)
    (found,) = compare_latency(Subject(str(a), compiled=True), Subject(str(b), compiled=True), plan)
    return found
