"""The line, from a recipe to an artifact.

Every stage is content-addressed: its key covers the key of the stage before, its own options, our code and
the packages that it uses. A stage whose result is in the cache is not run, and the report says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

import runtimes
from toolchain import models
from toolchain.artifact import Variant, read_report, write_artifact
from toolchain.benchmark import BenchReport, Plan, Subject, benchmark
from toolchain.cache import Cache, digest_of
from toolchain.compile import compile_model, read_compiled, session_options
from toolchain.data import Dataset, open_dataset
from toolchain.errors import StorageError
from toolchain.evaluate import Feeds, class_count, input_specs, reference_session
from toolchain.export import Exported, compare_on, export, import_onnx
from toolchain.machine import cpu_model, package_versions, this_machine, usable_cores
from toolchain.onnx_file import write_onnx
from toolchain.optimize import PassReport, optimize
from toolchain.progress import Status, silent
from toolchain.recipe import Recipe, dump
from toolchain.render import html
from toolchain.report import BuildReport, StageReport, VariantReport, dumps, from_json, to_json
from toolchain.seeded import seeded_inputs
from toolchain.verify import BOUNDS, Accuracy, Fidelity, compare, measure_accuracy, require

#: What a build states; a p90 takes 64 samples, ``toolchain bench`` goes on to p99.
PERCENTILES = (50, 90)


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    """Where the artifact is, what the build found out, and whether it was there already."""

    path: Path
    report: BuildReport
    up_to_date: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Debugging:
    """What a build may do besides, see ``optimize``; with either of them nothing after the export is reused."""

    verify_each: bool = False
    dump_dir: Path | None = None


def build(
    recipe: Recipe,
    *,
    cache: Cache,
    debugging: Debugging | None = None,
    on_status: Status = silent,
) -> Built:
    """Builds the recipe: export, optimize, then compile, verify and benchmark for each target, then pack.

    Args:
        recipe: what to build.
        debugging: what to look into on the way.
        cache: where results of stages are kept and found.
        on_status: is called with a word on what is going on.

    Raises:
        runtimes.Error: any of the tree; nothing half-written is left, an older artifact stays as it was.
    """
    with contextlib.ExitStack() as held:
        line = _Line(recipe, cache, debugging or Debugging(), on_status, held)
        for target in line.targets:
            _require(target)
        exported = line.stage("export", line.export_key, line.make_export)
        kept = line.kept()
        if kept is not None:
            # what the stages took when they ran is not what they took now
            reused = tuple(dataclasses.replace(stage, seconds=0.0, cached=True) for stage in kept.stages)
            return Built(line.destination, dataclasses.replace(kept, stages=reused), True)
        optimized = line.stage("optimize", line.optimize_key, line.make_optimize)
        variants, measured = [], []
        for target in line.targets:
            key = line.compile_key(target)
            directory = line.stage("compile", key, functools.partial(line.make_compiled, target))
            variant = Variant(read_compiled(directory), recipe.precision, recipe.session.model_dump())
            variants.append(variant)
            measured.append(line.measure(variant, key))
        report = BuildReport(
            name=line.name,
            model=line.source.public,
            weights=to_json(line.meta.weights),
            warnings=_warnings(line.meta),
            opset=line.meta.opset,
            torch_error=dict(line.meta.torch_error),
            exported_size=_size(exported, "model.onnx*"),
            passes=from_json(tuple[PassReport, ...], json.loads((optimized / "passes.json").read_text())),
            variants=tuple(measured),
            stages=tuple(line.stages),
        )
        line.pack(report, variants, exported)
        cache.evict()
        return Built(line.destination, report, False)


class _Line:
    """One build on its way: its keys, the stages behind them, and the cache entries that it holds."""

    def __init__(
        self,
        recipe: Recipe,
        cache: Cache,
        debugging: Debugging,
        on_status: Status,
        held: contextlib.ExitStack,
    ) -> None:
        self.recipe = recipe
        self.cache = cache
        self.debugging = debugging
        self.on_status = on_status
        self.held = held
        self.stages: list[StageReport] = []
        self.paths: dict[str, Path] = {}
        self.source = models.resolve(recipe.model)
        self.targets = [runtimes.Target.parse(text) for text in recipe.targets]
        self.name = recipe.name or self.source.name
        self.destination = Path(recipe.output or Path("artifacts") / self.name)

    # The keys, each covering the one before.

    @functools.cached_property
    def export_key(self) -> str:
        return digest_of(
            {
                "stage": "export",
                "code": code_digest(),
                "packages": package_versions(),
                "source": models.fingerprint(self.source, weights=self.recipe.weights, seed=self.recipe.seed),
                "opset": self.recipe.export.opset,
                "compared_on": self.recipe.data.evaluation,
            }
        )

    @functools.cached_property
    def optimize_key(self) -> str:
        steps = [step.model_dump() for step in self.recipe.pipeline()]
        once = uuid.uuid4().hex if self.debugging != Debugging() else None
        return digest_of({"stage": "optimize", "export": self.export_key, "steps": steps, "once": once})

    def compile_key(self, target: runtimes.Target) -> str:
        # the processor too: a prepared graph is bound to it
        session = self.recipe.session.model_dump()
        return digest_of({"graph": self.optimize_key, "target": str(target), "session": session, "cpu": cpu_model()})

    @functools.cached_property
    def build_key(self) -> str:
        """Covers all that the artifact says."""
        return digest_of(
            {
                "compiled": [self.compile_key(target) for target in self.targets],
                "recipe": self.recipe.model_dump(),
                "data": self.data_fingerprint,
                "cores": usable_cores(),
            }
        )

    @functools.cached_property
    def data_fingerprint(self) -> str | None:
        return None if self.dataset is None else self.dataset.fingerprint()

    def kept(self) -> BuildReport | None:
        """The report of the artifact that is already there, if this build would make the same one."""
        if not self.destination.exists() or self.debugging != Debugging():
            return None
        return read_report(self.destination, build_key=self.build_key)

    # The stages.

    def stage(self, name: str, key: str, make: Callable[[Path], None]) -> Path:
        """The folder of the stage's result: from the cache, or made now."""
        started = time.perf_counter()
        cached = True
        for _ in range(3):  # another build may evict what was just written; then it is made again
            path = self.held.enter_context(self.cache.reading(name, key))
            if path is not None:
                self.stages.append(StageReport(name, time.perf_counter() - started, cached))
                self.paths[name] = path
                return path
            cached = False
            self.on_status(name)
            with self.cache.writing(name, key) as working:
                make(working)
        raise StorageError(
            f"the result of {name} vanished from the cache while it was in use",
            where=str(self.cache.root),
            hint="raise TOOLCHAIN_CACHE_SIZE, or give this build its own TOOLCHAIN_CACHE",
        )

    def make_export(self, working: Path) -> None:
        recipe = self.recipe
        if self.source.kind == "onnx":
            exported = import_onnx(self.source)
        else:
            torch_model = models.load_torch(self.source, weights=recipe.weights, seed=recipe.seed)
            exported = export(torch_model, opset=recipe.export.opset)
        self.meta, self.exported_model = exported, exported.model
        if self.source.kind != "onnx" and self.dataset is not None:
            self.on_status("export: comparing with PyTorch on evaluation data")
            self.meta = exported = compare_on(exported, torch_model, self.samples[:1])
        write_onnx(exported.model, working / "model.onnx")
        (working / "meta.json").write_text(json.dumps(exported.to_meta()), encoding="utf-8")

    def make_optimize(self, working: Path) -> None:
        model = self.exported_model.clone()
        reports = optimize(
            model,
            self.recipe.pipeline(),
            verify_on=self.samples[:2] if self.debugging.verify_each else (),
            dump_dir=self.debugging.dump_dir,
            on_status=self.on_status,
        )
        self.optimized_model = model
        write_onnx(model, working / "model.onnx")
        (working / "passes.json").write_text(dumps(reports), encoding="utf-8")

    def make_compiled(self, target: runtimes.Target, working: Path) -> None:
        options = session_options(target, self.recipe.session.model_dump())
        compile_model(self.paths["optimize"] / "model.onnx", target, working, options=options)

    def measure(self, variant: Variant, compile_key: str) -> VariantReport:
        """Verifies and benchmarks one variant; each is a stage of its own."""
        recipe = self.recipe
        ground = {"compiled": compile_key, "verify": recipe.verify.model_dump(), "seed": recipe.seed}
        ground |= {"data": recipe.data.model_dump(), "data_fingerprint": self.data_fingerprint}
        fidelity_dir = self.stage("verify", digest_of(ground), functools.partial(self.make_fidelity, variant))
        accuracy = None
        if recipe.data.evaluation is not None:
            make = functools.partial(self.make_accuracy, variant)
            accuracy_dir = self.stage("accuracy", digest_of({**ground, "stage": "accuracy"}), make)
            accuracy = from_json(Accuracy, json.loads((accuracy_dir / "accuracy.json").read_text()))
        bench_key = digest_of(
            {"compiled": compile_key, "benchmark": recipe.benchmark.model_dump(), "cores": usable_cores()}
        )
        bench_dir = self.stage("benchmark", bench_key, functools.partial(self.make_benchmark, variant))
        return VariantReport(
            name=variant.name,
            target=str(variant.compiled.target),
            precision=variant.precision,
            size=_size(variant.compiled.directory, variant.compiled.model_file or "*"),
            fidelity=from_json(Fidelity, json.loads((fidelity_dir / "fidelity.json").read_text())),
            accuracy=accuracy,
            benchmark=from_json(BenchReport, json.loads((bench_dir / "benchmark.json").read_text())),
        )

    def make_fidelity(self, variant: Variant, working: Path) -> None:
        with self.open(variant) as session:
            bound = self.recipe.verify.max_nmse
            fidelity = compare(
                self.reference_outputs,
                session,
                self.samples,
                bound=BOUNDS[variant.precision] if bound is None else bound,
                inputs="evaluation data" if self.dataset else "seeded random",
            )
        require(fidelity, self.exported_model, self.optimized_model, self.samples[0], where=variant.name)
        (working / "fidelity.json").write_text(dumps(fidelity), encoding="utf-8")

    def make_accuracy(self, variant: Variant, working: Path) -> None:
        dataset = self.dataset
        assert dataset is not None
        with reference_session(self.exported_file) as reference, self.open(variant) as session:
            accuracy = measure_accuracy(
                reference,
                session,
                dataset,
                data=f"{dataset.name} ({dataset.kind})",
                total=dataset.len_hint,
                on_status=self.on_status,
            )
        (working / "accuracy.json").write_text(dumps(accuracy), encoding="utf-8")

    def make_benchmark(self, variant: Variant, working: Path) -> None:
        options = self.recipe.benchmark
        plan = Plan(
            batch_sizes=tuple(options.batch_sizes),
            threads=tuple(options.threads),
            warmup=options.warmup,
            duration_s=options.duration_s,
            count=options.count,
            percentiles=PERCENTILES,
            seed=self.recipe.seed,
        )
        subject = Subject(str(self.paths["compile"]), compiled=True, options=variant.session_options)
        report = benchmark(subject, plan, on_status=self.on_status)
        # the folder that was measured is the cache's; the artifact says which of its variants that is
        report = dataclasses.replace(report, subject=variant.name)
        (working / "benchmark.json").write_text(dumps(report), encoding="utf-8")

    # What the stages share; each is read back from the cache where the stage that makes it did not run.

    @functools.cached_property
    def meta(self) -> Exported:
        return Exported.from_meta(self.exported_model, json.loads((self.paths["export"] / "meta.json").read_text()))

    @property
    def exported_file(self) -> Path:
        return self.paths["export"] / "model.onnx"

    @functools.cached_property
    def exported_model(self) -> ir.Model:
        return ir.load(self.exported_file)

    @functools.cached_property
    def optimized_model(self) -> ir.Model:
        return ir.load(self.paths["optimize"] / "model.onnx")

    @functools.cached_property
    def dataset(self) -> Dataset | None:
        data = self.recipe.data
        if data.evaluation is None:
            return None
        return open_dataset(
            data.evaluation,
            inputs=input_specs(self.exported_model),
            preprocessing=self.meta.preprocessing,
            class_names=self.meta.labels,
            class_count=class_count(self.exported_model),
            label_offset=self.meta.label_offset,
            batch_size=data.batch_size,
            limit=data.limit,
        )

    @functools.cached_property
    def samples(self) -> list[Feeds]:
        """The first evaluation samples, or seeded ones of batch 1, 2, 1, ..., so that the batch is not always one."""
        count = self.recipe.verify.samples
        if self.dataset is not None:
            return [batch.inputs for batch in itertools.islice(self.dataset, count)]
        specs = input_specs(self.exported_model)
        return [seeded_inputs(specs, batch=1 + i % 2, seed=self.recipe.seed + i) for i in range(count)]

    @functools.cached_property
    def reference_outputs(self) -> list[Feeds]:
        self.on_status("verify: running the exported model unoptimised")
        with reference_session(self.exported_file) as session:
            return [session.run(feeds) for feeds in self.samples]

    def open(self, variant: Variant) -> runtimes.Session:
        backend = runtimes.backend(variant.compiled.target.runtime)
        options = session_options(variant.compiled.target, dict(variant.session_options))
        return backend.load(variant.compiled, options=options)

    def pack(self, report: BuildReport, variants: list[Variant], exported: Path) -> None:
        self.on_status("packing")
        meta = self.meta
        recipe = self.recipe.portable()
        metadata = {
            "build_key": self.build_key,
            "source": {"model": report.model, "weights": report.weights, "provenance": dict(meta.provenance)},
            "warnings": list(report.warnings),
            "label_offset": meta.label_offset,
            "preprocessing": meta.preprocessing.to_json() if meta.preprocessing else None,
            "labels": list(meta.labels) if meta.labels else None,
            "recipe": recipe.model_dump(),
            "passes": [{"name": p.name, "changed": p.changed} for p in report.passes],
            "fidelity": {v.name: to_json(v.fidelity) for v in report.variants},
            "accuracy": {v.name: to_json(v.accuracy) for v in report.variants if v.accuracy},
            "latency_ms": {
                v.name: [
                    {"batch": r.batch, "threads": r.threads, "p50": r.percentiles_ms[50], "valid": r.valid}
                    for r in v.benchmark.rows
                ]
                for v in report.variants
            },
            "machine": to_json(this_machine()),
        }
        write_artifact(
            self.destination,
            name=self.name,
            version="1",
            variants=variants,
            exported=exported,
            texts={
                "recipe.yaml": dump(recipe),
                "report.json": dumps(report) + "\n",
                "report.html": html(report),
            },
            metadata=metadata,
        )


def _require(target: runtimes.Target) -> None:
    """Refuses a target that cannot be compiled for here, before any work is done. Raises TargetUnavailable."""
    state = runtimes.backend(target.runtime).probe()
    if not state.available:
        raise runtimes.TargetUnavailable(
            f"cannot build for {target}: {state.reason}", where=f"target {target}", hint=state.remedy
        )


def _warnings(exported: Exported) -> tuple[str, ...]:
    """What stands above the report. Random weights are told whether they were asked for or not."""
    if exported.weights.kind == "random" and not exported.warnings:
        return (f"the weights are random, seed {exported.weights.seed}: latency is real, the answers mean nothing",)
    return exported.warnings


def _size(directory: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in directory.glob(pattern) if file.is_file())


@functools.cache
def code_digest() -> str:
    """SHA-256 over the sources of the three packages: another version of them may give another result."""
    digest = hashlib.sha256()
    for package in ("toolchain", "passes", "runtimes"):
        root = Path(__file__).resolve().parent.parent / package
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{file.relative_to(root)}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
