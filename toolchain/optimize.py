"""The pass loop: runs the pipeline over a graph, checks it after every pass, and reports what each did."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

import passes
from passes._shapes import skeleton
from passes.base import Declined, PassFailed, graphs
from toolchain.bounds import float_bound
from toolchain.errors import GraphError
from toolchain.evaluate import Feeds, run_reference
from toolchain.metrics import tensor_error
from toolchain.onnx_file import write_onnx
from toolchain.progress import Status, silent
from toolchain.recipe import PassStep
from toolchain.storage import reported


@dataclasses.dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did.

    Attributes:
        name, options: the pass.
        changed: whether the graph is another one afterwards.
        fired: how often it fired.
        nodes_before, nodes_after: nodes in all graphs, subgraphs and functions.
        seconds: wall time, without the check.
        declined: where it could have fired and did not, and why.
        nmse: worst normalised MSE of an output against the step before; None where it was not compared.
        remarks: what a person should know of it besides.
        lossy: whether it changes what the model computes, on purpose.
    """

    name: str
    options: dict[str, Any]
    changed: bool
    fired: int
    nodes_before: int
    nodes_after: int
    seconds: float
    declined: tuple[Declined, ...]
    nmse: float | None = None
    remarks: tuple[str, ...] = ()
    lossy: bool = False


def count_nodes(model: ir.Model) -> int:
    """Nodes in the main graph, every subgraph and every function."""
    return sum(len(graph) for graph in graphs(model))


def optimize(
    model: ir.Model,
    steps: Sequence[PassStep],
    *,
    verify_on: Sequence[Feeds] = (),
    dump_dir: Path | None = None,
    stop_after: str | None = None,
    on_status: Status = silent,
) -> tuple[PassReport, ...]:
    """Runs ``steps`` on the model, in place.

    Args:
        verify_on: inputs on which the outputs are compared with the step before, after every pass that
            changed the graph; empty compares nothing. What a lossy pass may change is only reported.
        dump_dir: writes ``NN_pass.onnx`` after every pass, ``00_input.onnx`` first.
        stop_after: ends after the last pass of this name.
        on_status: is called before every pass.

    Raises:
        GraphError: a pass failed, left an invalid graph, or changed what the model computes; it names the pass.
    """
    if stop_after is not None and stop_after not in {step.name for step in steps}:
        raise GraphError(
            f"--stop-after {stop_after}: the pipeline has no such pass",
            hint="its passes are " + ", ".join(step.name for step in steps),
        )
    if dump_dir is not None:
        with reported(dump_dir, "the dumps"):
            dump_dir.mkdir(parents=True, exist_ok=True)
        write_onnx(model, dump_dir / "00_input.onnx")
    before = run_reference(model, verify_on) if verify_on else []
    reports: list[PassReport] = []
    last = max((i for i, step in enumerate(steps) if step.name == stop_after), default=len(steps) - 1)
    for number, step in enumerate(steps[: last + 1], start=1):
        on_status(f"optimize: {step.name}", (number - 1) / (last + 1))
        report = _run_pass(model, step)
        if report.changed:
            _check_after(model, step.name)
            if verify_on:
                after = run_reference(model, verify_on)
                report = dataclasses.replace(report, nmse=_compare_steps(model, report, before, after))
                before = after
        if dump_dir is not None:
            write_onnx(model, dump_dir / f"{number:02d}_{step.name}.onnx")
        reports.append(report)
    return tuple(reports)


def _run_pass(model: ir.Model, step: PassStep) -> PassReport:
    nodes_before = count_nodes(model)
    started = time.perf_counter()
    try:
        made = passes.make(step.name, **step.options)
        outcome = made(model)
    except PassFailed as error:
        raise GraphError(
            f"pass {step.name}: {error}", where=error.node, hint=error.hint or _leave_out(step.name)
        ) from error
    except Exception as error:  # a defect of the pass or of a library under it: the user still gets the pass's name
        raise GraphError(
            f"pass {step.name} failed with {type(error).__name__}: {error}", hint=_leave_out(step.name)
        ) from error
    seconds = time.perf_counter() - started
    return PassReport(
        step.name,
        dict(step.options),
        outcome.modified,
        getattr(outcome, "fired", 0),
        nodes_before,
        count_nodes(model),
        seconds,
        getattr(outcome, "declined", ()),
        remarks=getattr(outcome, "remarks", ()),
        lossy=made.lossy,
    )


def _leave_out(name: str) -> str:
    return f"leave {name} out of `passes:` in the recipe, and please report the model that it failed on"


def _check_after(model: ir.Model, name: str) -> None:
    try:
        check_graph(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "invalid")
        raise GraphError(f"pass {name} left an invalid graph: {first}", hint=_leave_out(name)) from error


def check_graph(model: ir.Model) -> None:
    """onnx's full check on the graph with its large weights left out, so that it costs milliseconds.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: what is wrong.
    """
    proto, _ = skeleton(model)
    onnx.checker.check_model(proto, full_check=True)


def _compare_steps(model: ir.Model, report: PassReport, before: list[Feeds], after: list[Feeds]) -> float:
    worst = 0.0
    bound = math.inf if report.lossy else float_bound(model)
    for was, now in zip(before, after, strict=True):
        for output, expected in was.items():
            if output not in now or now[output].shape != expected.shape or now[output].dtype != expected.dtype:
                given = "is gone" if output not in now else f"is {now[output].dtype}{list(now[output].shape)}"
                raise GraphError(
                    f"pass {report.name} changed the model: output {output!r} {given}, "
                    f"it was {expected.dtype}{list(expected.shape)}",
                    hint=_leave_out(report.name),
                )
            error = tensor_error(expected, now[output])
            worst = max(worst, error.nmse)
            if error.nmse > bound:
                raise GraphError(
                    f"pass {report.name} changed the model: output {output!r} is off by a normalised MSE of "
                    f"{error.nmse:.2g} (bound {bound:.0e}, largest difference {error.max_abs:.3g})",
                    hint=_leave_out(report.name),
                )
    return worst
