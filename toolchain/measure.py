"""What is done with a lowered graph: compile it, compare it with its reference, and time it.

Each is a stage of the line, kept in the cache under its own key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import onnx_ir as ir

import runtimes
from toolchain.artifact import Variant
from toolchain.as_json import dumps, from_json
from toolchain.benchmark import BenchReport, Comparison, Plan, Subject, benchmark, compare_latency
from toolchain.bounds import bound as bound_of
from toolchain.cache import digest_of
from toolchain.compile import compile_model, read_compiled, session_options
from toolchain.evaluate import reference_session
from toolchain.line import Line
from toolchain.lowering import Lowered
from toolchain.machine import cpu_model, usable_cores
from toolchain.recipe import Recipe, SessionConfig
from toolchain.report import StageReport, VariantReport
from toolchain.targets import cannot_run
from toolchain.verify import Accuracy, Fidelity, compare, measure_accuracy, require

T = TypeVar("T")

#: What a build states; a p90 takes 64 samples, ``toolchain bench`` goes on to p99.
PERCENTILES = (50, 90)
#: Seconds for a comparison, and again where that did not decide.
_COMPARED_S = (1.0, 4.0)


def compile_variant(line: Line, lowered: Lowered, target: runtimes.Target) -> tuple[Variant, str, Path]:
    """The compiled variant, its key, and the folder that ``benchmark`` takes."""
    session = session_values(line.recipe, target)
    state = runtimes.backend(target.runtime).can_compile(target)
    # the processor and the runtime too: prepared graphs and engines are bound to them
    key = digest_of(
        {"graph": lowered.key, "target": str(target), "session": session, "cpu": cpu_model(), "runtime": state.version}
    )

    def make(working: Path) -> None:
        options = session_options(target, session)
        compile_model(lowered.folder / "model.onnx", target, working, options=options, on_status=line.on_status)

    folder = line.stage("compile", key, make)
    return Variant(read_compiled(folder), lowered.precision, session), key, folder


def session_values(recipe: Recipe, target: runtimes.Target) -> dict[str, object]:
    """The recipe's options for this target. The section ``session`` is one for all targets: what a runtime has no
    option for is left out where the recipe leaves it at its default, and refused by the runtime where not. What
    ``options`` says of the runtime goes over it."""
    known = {field.name for field in dataclasses.fields(runtimes.backend(target.runtime).options_type)}
    defaults = SessionConfig().model_dump()
    values = recipe.session.model_dump()
    kept = {name: value for name, value in values.items() if name in known or value != defaults[name]}
    return kept | recipe.options.get(target.runtime, {})


def measure(line: Line, lowered: Lowered, target: runtimes.Target) -> tuple[Variant, VariantReport]:
    """Compiles, verifies and benchmarks; each is a stage of its own. What was compiled for a device that is not here
    is not timed, and its graph is verified on the reference runtime as it stands."""
    recipe = line.recipe
    variant, key, folder = compile_variant(line, lowered, target)
    absent = cannot_run(target)
    evaluated = line.judged_on.fingerprint() if line.judged_on else None
    ground = {"compiled": key, "verify": recipe.verify.model_dump(), "seed": recipe.seed, "data": evaluated}
    ground |= {"dims": recipe.dims, "absent": absent is not None}
    fidelity = _kept(
        line, "verify", ground, "fidelity.json", Fidelity, functools.partial(_fidelity, line, variant, lowered)
    )
    accuracy = None
    if line.evaluation is not None:
        accuracy = _kept(
            line, "accuracy", ground, "accuracy.json", Accuracy, functools.partial(_accuracy, line, variant, lowered)
        )
    bench = None
    if absent is None:
        ground = {"compiled": key, "benchmark": recipe.benchmark.model_dump(), "cores": usable_cores()}
        ground |= {"dims": recipe.dims}
        # what was measured while the machine had something else to do is not kept for others
        bench = _kept_if(
            line,
            "benchmark",
            ground,
            "benchmark.json",
            BenchReport,
            functools.partial(_benchmark, line, variant, folder),
            lambda report: not any(row.disturbed for row in report.rows),
        )
    files = folder / "files"
    size = sum(file.stat().st_size for file in files.glob("model.onnx*"))
    prepared = sum(file.stat().st_size for file in (files / "prepared").rglob("*") if file.is_file())
    report = VariantReport(
        name=variant.name,
        target=str(target),
        precision=variant.precision,
        size=size,
        prepared_size=prepared or None,
        fidelity=fidelity,
        accuracy=accuracy,
        benchmark=bench,
        int8=lowered.int8,
        not_run=absent,
    )
    return variant, report


def compared(line: Line, a: tuple[Variant, str, Path], b: tuple[Variant, str, Path]) -> Comparison:
    """Latency of one compiled variant against another's at the recipe's first batch size, turn by turn in one fresh
    process; a stage, so that a pair is measured once. What is undecided is measured longer, and not kept if it stays
    so."""
    batch = line.recipe.benchmark.batch_sizes[0]

    def find() -> Comparison:
        sides = [Subject(str(folder), compiled=True, options=variant.session_options) for variant, _, folder in (a, b)]
        for seconds in _COMPARED_S:
            plan = Plan(batch_sizes=(batch,), duration_s=seconds, count=10, warmup=5, dims=line.recipe.dims)
            (found,) = compare_latency(sides[0], sides[1], plan, on_status=line.on_status)
            if found.decided:
                break
        return found

    ground = {"a": a[1], "b": b[1], "batch": batch, "dims": line.recipe.dims, "cores": usable_cores()}
    return _kept_if(line, "compare", ground, "comparison.json", Comparison, find, lambda found: found.decided)


def _kept_if(
    line: Line,
    name: str,
    ground: dict[str, object],
    file: str,
    kind: type[T],
    find: Callable[[], T],
    sound: Callable[[T], bool],
) -> T:
    """A stage whose result is kept for later builds only where it is sound; within this one it is."""
    key = digest_of({"stage": name, **ground})
    known = line.found.get(key)
    if known is not None:
        return cast("T", known)
    with line.cache.reading(name, key) as folder:
        if folder is not None:
            line.stages.append(StageReport(name, 0.0, True))
            return from_json(kind, json.loads((folder / file).read_text(encoding="utf-8")))
    started = time.perf_counter()
    line.on_status(name)
    result = find()
    line.stages.append(StageReport(name, time.perf_counter() - started, False))
    line.found[key] = result
    if sound(result):
        with line.cache.writing(name, key) as working:
            (working / file).write_text(dumps(result), encoding="utf-8")
    return result


def _kept(line: Line, name: str, ground: dict[str, object], file: str, kind: type[T], find: Callable[[], T]) -> T:
    """A stage whose result is one small dataclass."""

    def make(working: Path) -> None:
        (working / file).write_text(dumps(find()), encoding="utf-8")

    folder = line.stage(name, digest_of({"stage": name, **ground}), make)
    return from_json(kind, json.loads((folder / file).read_text(encoding="utf-8")))


def _fidelity(line: Line, variant: Variant, lowered: Lowered) -> Fidelity:
    with _open(variant, lowered) as session:
        bound = line.recipe.verify.max_nmse
        fidelity = compare(
            line.reference_outputs,
            session,
            line.samples,
            bound=bound_of(variant.precision, line.exported_model) if bound is None else bound,
            inputs=line.samples_are,
        )
    if not fidelity.passed:
        graph = ir.load(lowered.folder / "model.onnx")
        require(fidelity, line.reference_model, graph, line.samples[0], where=variant.name)
    return fidelity


def _accuracy(line: Line, variant: Variant, lowered: Lowered) -> Accuracy:
    dataset = line.evaluation
    assert dataset is not None
    with reference_session(line.exported / "model.onnx") as reference, _open(variant, lowered) as session:
        return measure_accuracy(
            reference,
            session,
            dataset,
            data=f"{dataset.name} ({dataset.kind})",
            total=dataset.len_hint,
            on_status=line.on_status,
        )


def _benchmark(line: Line, variant: Variant, folder: Path) -> BenchReport:
    options = line.recipe.benchmark
    plan = Plan(
        batch_sizes=tuple(options.batch_sizes),
        threads=tuple(options.threads),
        warmup=options.warmup,
        duration_s=options.duration_s,
        count=options.count,
        percentiles=PERCENTILES,
        dims=line.recipe.dims,
        seed=line.recipe.seed,
    )
    subject = Subject(str(folder), compiled=True, options=variant.session_options)
    report = benchmark(subject, plan, on_status=line.on_status)
    # the folder that was measured is the cache's; the artifact says which of its variants that is
    return dataclasses.replace(report, subject=variant.name)


def _open(variant: Variant, lowered: Lowered) -> contextlib.AbstractContextManager[runtimes.Session]:
    """A session of the files that will be shipped, with the options that they will carry; where their device is not
    here, one that runs the graph as it stands."""
    target = variant.compiled.target
    if cannot_run(target) is not None:
        return reference_session(lowered.folder / "model.onnx")
    return runtimes.backend(target.runtime).load(
        variant.compiled, options=session_options(target, dict(variant.session_options))
    )
