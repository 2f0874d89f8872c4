"""The line, from a recipe to an artifact."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import runtimes
from toolchain import calibration_file
from toolchain.artifact import CALIBRATION, Variant, read_report, write_artifact
from toolchain.as_json import dumps, from_json, to_json
from toolchain.benchmark import Comparison
from toolchain.cache import Cache
from toolchain.compile import session_options
from toolchain.errors import FidelityError, GraphError
from toolchain.export import Exported
from toolchain.line import Debugging, Line
from toolchain.lower import CALIBRATED
from toolchain.lowering import Lowered, lower
from toolchain.machine import this_machine
from toolchain.measure import compared, compile_variant, measure, session_values
from toolchain.optimize import PassReport
from toolchain.progress import Status, silent
from toolchain.recipe import Recipe
from toolchain.recipe_file import dump
from toolchain.render import html
from toolchain.report import BuildReport, CalibrationReport, VariantReport
from toolchain.selftest import KEY, make_selftest
from toolchain.targets import cannot_run, float_precision, ranked

__all__ = ["Built", "Debugging", "build"]


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    """Where the artifact is, what the build found out, and whether it was there already."""

    path: Path
    report: BuildReport
    up_to_date: bool


def build(
    recipe: Recipe,
    *,
    cache: Cache,
    reuse: bool = True,
    debugging: Debugging | None = None,
    on_status: Status = silent,
) -> Built:
    """Builds the recipe: export, optimize, then for each target lower, compile, verify
    and benchmark, then rank and pack.

    Args:
        recipe: what to build.
        cache: where results of stages are kept and found.
        reuse: leave an artifact alone that this build would make again.
        debugging: what to look into on the way.
        on_status: is called with a word on what is going on.

    Raises:
        runtimes.Error: any of the tree; nothing half-written is left, an older artifact stays as it was.
    """
    with contextlib.ExitStack() as held:
        line = Line(recipe, cache, debugging or Debugging(), on_status, held)
        for target in line.targets:
            _require(target, recipe)
        exported = line.exported
        kept = _kept(line) if reuse else None
        if kept is not None:
            return Built(line.destination, kept, True)
        found = _ranked(line, [pair for target in line.targets for pair in _variants(line, target)])
        quantised = any(variant.precision in CALIBRATED for variant, _ in found)
        calibration = _calibration_report(line) if quantised else None
        report = BuildReport(
            name=line.name,
            model=line.source.public,
            weights=to_json(line.meta.weights),
            warnings=(*_warnings(line.meta), *(calibration.warnings() if calibration else ())),
            opset=line.meta.opset,
            torch_error=dict(line.meta.torch_error),
            exported_size=sum(file.stat().st_size for file in exported.glob("model.onnx*")),
            passes=from_json(tuple[PassReport, ...], json.loads((line.optimized / "passes.json").read_text())),
            variants=tuple(measured for _, measured in found),
            stages=tuple(line.stages),
            prune=line.prune_report,
            calibration=calibration,
        )
        on_status("packing")
        _pack(line, report, [variant for variant, _ in found])
        cache.evict()
        return Built(line.destination, report, False)


def _require(target: runtimes.Target, recipe: Recipe) -> None:
    """Refuses what cannot be compiled for here, or not with these options, before any work is done.

    Raises:
        TargetUnavailable: the runtime does not work here, or does not know the device.
        InvalidInput: an option that it does not have.
    """
    for name, values in recipe.options.items():
        if ":" in name:
            raise runtimes.InvalidInput(
                f"options go by runtime, not by device: {name!r}", hint=f"write {name.partition(':')[0]}"
            )
        runtimes.backend(name)  # the nearest names, where there is no such runtime
        session_options(runtimes.Target(name), values)
    session_options(target, session_values(recipe, target))
    state = runtimes.backend(target.runtime).can_compile(target)
    if not state.available:
        raise runtimes.TargetUnavailable(
            f"cannot build for {target}: {state.reason}", where=f"target {target}", hint=state.remedy
        )


def _kept(line: Line) -> BuildReport | None:
    """The report of the artifact that is already there, if this build would make the same one."""
    if not line.destination.exists() or line.debugging != Debugging():
        return None
    report = read_report(line.destination, build_key=line.build_key)
    rows = [row for variant in report.variants if variant.benchmark for row in variant.benchmark.rows] if report else []
    if report is None or any(row.disturbed for row in rows):
        return None  # a disturbed benchmark is measured again
    # what the stages took when they ran is not what they took now
    stages = tuple(dataclasses.replace(stage, seconds=0.0, cached=True) for stage in report.stages)
    return dataclasses.replace(report, stages=stages)


#: One that may be shipped: what goes into the package, what was found out about it, and the graph it is made of.
_Pair = tuple[Variant, VariantReport, Lowered]


def _variants(line: Line, target: runtimes.Target) -> list[_Pair]:
    """What is shipped for one target: one precision, or with ``auto`` a float one and INT8 where that is faster and
    keeps the budget. Where the target's device is not here, nothing says which is faster, and both are shipped."""
    precision: str = line.recipe.precision
    plain = float_precision(target) if precision in ("default", "auto") else "fp32"
    if precision == "default":
        precision = plain

    def measured(precision: str) -> _Pair:
        lowered = lower(line, target, precision)
        return (*measure(line, lowered, target), lowered)

    if precision not in ("int8", "auto"):
        return [measured(precision)]
    try:
        quantised = measured("int8")
    except (FidelityError, GraphError) as error:
        if precision == "int8":
            raise
        return [_remarked(measured(plain), f"no INT8: {error.what}")]
    if cannot_run(target) is not None:
        return [quantised] if precision == "int8" else [quantised, measured(plain)]
    float_graph = lower(line, target, plain)
    found = compared(line, compile_variant(line, quantised[2], target), compile_variant(line, float_graph, target))
    ratio = found.ratio
    name = {"fp32": "float32", "fp16": "float16"}[plain]
    remark = f"INT8 takes {ratio:.2f} x the time of {name}, measured turn by turn"
    if not found.decided:
        remark += f" ({found.ratio_low:.2f} to {found.ratio_high:.2f} in 80 % of the blocks: the machine was busy)"
    if ratio > 1:
        remark += ": it is slower here"
    if precision == "int8":
        return [_remarked(quantised, remark)]
    if ratio > 1:
        return [_remarked(measured(plain), f"no INT8: {remark}")]
    return [_remarked(quantised, remark), measured(plain)]


def _remarked(pair: _Pair, remark: str) -> _Pair:
    variant, report, lowered = pair
    return variant, dataclasses.replace(report, remark=remark), lowered


def _ranked(line: Line, found: list[_Pair]) -> list[tuple[Variant, VariantReport]]:
    """The variants as ``runtimes.load`` is to try them."""

    said: dict[str, str] = {}

    def against(a: _Pair, b: _Pair) -> Comparison:
        sides = [compile_variant(line, lowered, variant.compiled.target) for variant, _, lowered in (a, b)]
        return compared(line, sides[0], sides[1])

    def faster(a: _Pair, b: _Pair) -> bool:
        found = against(a, b)
        if not found.decided:
            said[a[1].name] = (
                f"not decided whether it is faster than {b[1].name}: {found.ratio:.2f} x its time, "
                f"{found.ratio_low:.2f} to {found.ratio_high:.2f} in 80 % of the blocks"
            )
        return found.ratio < 1

    order = ranked(
        found,
        timed=lambda pair: pair[1].benchmark is not None,
        faster=faster,
        on_gpu=lambda pair: runtimes.backend(pair[0].compiled.target.runtime).device_class == "gpu",
    )
    return [
        (variant, dataclasses.replace(report, remark="; ".join(filter(None, (report.remark, said.get(report.name))))))
        for variant, report, _ in order
    ]


def _warnings(exported: Exported) -> tuple[str, ...]:
    """What stands above the report. Random weights are told whether they were asked for or not."""
    if exported.weights.kind == "random" and not exported.warnings:
        return (f"the weights are random, seed {exported.weights.seed}: latency is real, the answers mean nothing",)
    return exported.warnings


def _calibration_report(line: Line) -> CalibrationReport:
    file, data, found = line.recipe.quantize.calibration, line.calibration_data, line.calibration
    return CalibrationReport(
        source=Path(file).name if file is not None else data.name if data is not None else "",
        samples=found.samples,
        asked=found.asked,
        tensors=len(found.ranges),
        without_range=calibration_file.without_range(found, line.float_model),
        interrupted=file is not None and Path(f"{file}{calibration_file.STATE}").exists(),
    )


def _pack(line: Line, report: BuildReport, variants: list[Variant]) -> None:
    meta = line.meta
    recipe = line.recipe.portable()
    metadata = {
        "build_key": line.build_key,
        "source": {"model": report.model, "weights": report.weights, "provenance": dict(meta.provenance)},
        "data": {
            name: data.describe()
            for name, data in (("evaluation", line.evaluation), ("calibration", line.calibration_data))
            if data is not None
        },
        "warnings": list(report.warnings),
        "label_offset": meta.label_offset,
        "preprocessing": line.preprocessing.to_json() if line.preprocessing else None,
        "labels": list(meta.labels) if meta.labels else None,
        "recipe": recipe.model_dump(),
        "prune": to_json(report.prune),
        "passes": [{"name": p.name, "changed": p.changed} for p in report.passes],
        "fidelity": _by_name(report, lambda v: to_json(v.fidelity)),
        "accuracy": _by_name(report, lambda v: to_json(v.accuracy)),
        "int8": _by_name(report, lambda v: to_json(v.int8)),
        "latency_ms": _by_name(
            report,
            lambda v: (
                [
                    {"batch": r.batch, "threads": r.threads, "p50": r.percentiles_ms[50], "valid": r.valid}
                    for r in v.benchmark.rows
                ]
                if v.benchmark
                else None
            ),
        ),
        "machine": to_json(this_machine()),
        "command": "toolchain build recipe.yaml",
    }
    # what variants are made of: the exported graph, or what pruning left of it
    made_of = (line.float_folder if line.pruned else line.exported) / "model.onnx"
    test = make_selftest(made_of, variants, seed=line.recipe.seed, dims=line.recipe.dims)
    metadata[KEY] = test.metadata
    texts: dict[str, str | bytes] = {
        "recipe.yaml": dump(recipe),
        "report.json": dumps(report) + "\n",
        "report.html": html(report),
        **test.contents,
    }
    if any(variant.precision in CALIBRATED for variant in variants):
        texts[CALIBRATION] = calibration_file.dumps(line.calibration)
    write_artifact(
        line.destination,
        name=line.name,
        version="1",
        variants=variants,
        exported=line.exported,
        pruned=line.float_folder if line.pruned else None,
        texts=texts,
        metadata=metadata,
    )


def _by_name(report: BuildReport, value: Callable[[VariantReport], object]) -> dict[str, object]:
    """The value of every variant that has one."""
    return {v.name: found for v in report.variants if (found := value(v)) is not None}
