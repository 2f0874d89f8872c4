"""The stages of a build and their keys: what each makes, and under which name the cache keeps it.

Every stage is content-addressed: its key covers the key of the stage before, its own options, our code and
the packages that it uses. What a stage needs of an earlier one is read back from the cache if that did not run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

import runtimes
from passes._quant import Calibration
from toolchain import calibration_file, models, targets
from toolchain.artifact import check_destination
from toolchain.as_json import dumps, from_json
from toolchain.bounds import float_bound
from toolchain.cache import Cache, digest_of
from toolchain.calibration import calibrate
from toolchain.data import Dataset, open_dataset, preprocessing_of
from toolchain.errors import DataError, StorageError
from toolchain.evaluate import Feeds, class_count, input_specs, reference_session, run_made_up
from toolchain.export import Exported, compare_on, export, export_source
from toolchain.finetune import forget_rounds, loop_digest, trainer
from toolchain.machine import cpu_model, package_versions, usable_cores
from toolchain.onnx_file import write_onnx
from toolchain.optimize import optimize
from toolchain.preprocessing import ImagePreprocessing
from toolchain.progress import Status
from toolchain.prune_account import Given, PruneReport
from toolchain.pruning import prune
from toolchain.recipe import Recipe
from toolchain.report import StageReport
from toolchain.samples import Batch
from toolchain.seeded import seeded_inputs
from toolchain.verify import compare, require


@dataclasses.dataclass(frozen=True, slots=True)
class Debugging:
    """What a build may do besides, see ``optimize``; with either of them nothing after the export is reused."""

    verify_each: bool = False
    dump_dir: Path | None = None


class Line:
    """One build on its way: its keys, the stages behind them, and the cache entries that it holds.

    Args:
        recipe: what to build.
        cache: where results of stages are kept and found.
        debugging: what to look into on the way.
        on_status: is called with a word on what is going on.
        held: keeps the cache entries that were read from being evicted, as long as it is open.
    """

    def __init__(
        self, recipe: Recipe, cache: Cache, debugging: Debugging, on_status: Status, held: contextlib.ExitStack
    ) -> None:
        self.recipe = recipe
        self.cache = cache
        self.debugging = debugging
        self.on_status = on_status
        self.held = held
        self.stages: list[StageReport] = []
        #: what was measured in this build, by key, whether it may be kept for others or not
        self.found: dict[str, object] = {}
        self._folders: dict[tuple[str, str], Path] = {}
        self.source = models.resolve(recipe.model)
        self.targets = targets.resolve(recipe.targets)
        self.name = recipe.name or self.source.name
        self.destination = Path(recipe.output or Path("artifacts") / self.name)
        check_destination(self.destination)

    # The keys, each covering the one before.

    @functools.cached_property
    def export_key(self) -> str:
        """Of the exported graph: the source's content, our code, the packages."""
        return digest_of(
            {
                "stage": "export",
                "code": code_digest(),
                "packages": package_versions(),
                "source": models.fingerprint(self.source, weights=self.recipe.weights, seed=self.recipe.seed),
                "opset": self.recipe.export.opset,
                "compared_on": _identity(self.recipe.data.evaluation),
                "preprocessing": self.recipe.data.preprocessing and _as_key(self.preprocessing),
            }
        )

    @functools.cached_property
    def optimize_key(self) -> str:
        """Of the optimised graph."""
        steps = [step.model_dump() for step in self.recipe.pipeline()]
        once = uuid.uuid4().hex if self.debugging != Debugging() else None
        return digest_of({"stage": "optimize", "export": self.export_key, "steps": steps, "once": once})

    @functools.cached_property
    def float_key(self) -> str:
        """Of the float graph that is calibrated and lowered: the optimised one, or what pruning made of it."""
        asked = self.recipe.prune
        if asked is None:
            return self.optimize_key
        return digest_of({**self._prune_ground, "loop": asked.finetune and loop_digest(asked.finetune, data=True)})

    @functools.cached_property
    def _prune_ground(self) -> dict[str, object]:
        """What decides the result of pruning."""
        asked = self.recipe.prune
        assert asked is not None
        datasets = [None if d is None else d.fingerprint() for d in (self.judged_on, self.calibration_data)]
        ground: dict[str, object] = {
            "stage": "prune",
            "graph": self.optimize_key,
            "prune": asked.model_dump(),
            "data": datasets,
        }
        ground |= {"masks": _digest_of_file(asked.masks, "the masks"), "seed": self.recipe.seed}
        ground |= {"loop": asked.finetune and loop_digest(asked.finetune)}
        ground |= {"dims": self.recipe.dims, "verify": self.recipe.verify.model_dump()}
        if asked.target_latency is not None:
            ground |= {"targets": [str(target) for target in self.targets], "machine": [cpu_model(), usable_cores()]}
        return ground

    @functools.cached_property
    def build_key(self) -> str:
        """Covers all that the artifact says."""
        datasets = [None if d is None else d.fingerprint() for d in (self.evaluation, self.calibration_data)]
        return digest_of(
            {
                "float": self.float_key,
                "recipe": self.recipe.model_dump(),
                "targets": [str(target) for target in self.targets],
                "data": datasets,
                "preprocessing": _as_key(self.preprocessing),
                "calibration": self.calibration_file_digest,
                "machine": [cpu_model(), usable_cores()],
            }
        )

    @functools.cached_property
    def calibration_file_digest(self) -> str | None:
        """SHA-256 of the calibration file that the recipe names."""
        return _digest_of_file(self.recipe.quantize.calibration, "the calibration")

    # The stages.

    def stage(self, name: str, key: str, make: Callable[[Path], None]) -> Path:
        """The folder of the stage's result: from the cache, or made now."""
        if (name, key) in self._folders:
            return self._folders[name, key]
        started = time.perf_counter()
        cached = True
        for _ in range(3):  # another build may evict what was just written; then it is made again
            path = self.held.enter_context(self.cache.reading(name, key))
            if path is not None:
                self.stages.append(StageReport(name, time.perf_counter() - started, cached))
                self._folders[name, key] = path
                return path
            cached = False
            self.on_status(name)
            with self.cache.writing(name, key) as working:
                try:
                    make(working)
                except runtimes.Error as error:
                    if error.where and str(self.cache.root) in error.where:  # of no use to the user, and gone by then
                        error.where = f"{self.source.public}, {name}"
                    raise
        raise StorageError(
            f"the result of {name} vanished from the cache while it was in use",
            where=str(self.cache.root),
            hint="raise TOOLCHAIN_CACHE_SIZE, or give this build its own TOOLCHAIN_CACHE",
        )

    @functools.cached_property
    def exported(self) -> Path:
        """The exported model's folder."""
        return self.stage("export", self.export_key, self._export)

    def _export(self, working: Path) -> None:
        recipe = self.recipe
        if self.source.kind == "onnx":
            exported = export_source(self.source, weights=recipe.weights, opset=recipe.export.opset)
        else:
            torch_model = models.load_torch(self.source, weights=recipe.weights, seed=recipe.seed)
            exported = export(torch_model, opset=recipe.export.opset)
        self.meta, self.exported_model = exported, exported.model
        if self.source.kind != "onnx" and self.evaluation is not None:
            self.on_status("export: comparing with PyTorch on evaluation data")
            self.meta = exported = compare_on(exported, torch_model, self.samples[:1])
        write_onnx(exported.model, working / "model.onnx")
        (working / "meta.json").write_text(json.dumps(exported.to_meta()), encoding="utf-8")
        # What torch and its exporter hold need not be searched for garbage again: that took half a second of the rest.
        gc.freeze()

    @functools.cached_property
    def optimized(self) -> Path:
        """The optimised model's folder."""
        return self.stage("optimize", self.optimize_key, self._optimize)

    def _optimize(self, working: Path) -> None:
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

    @functools.cached_property
    def float_folder(self) -> Path:
        """The folder of the float graph that is calibrated and lowered."""
        return self.optimized if self.recipe.prune is None else self.stage("prune", self.float_key, self._prune)

    def _prune(self, working: Path) -> None:
        asked = self.recipe.prune
        assert asked is not None
        # From here on artifacts are compared with the pruned graph: this is where the passes are held to the export.
        self.on_status("prune: comparing the optimised graph with the exported model")
        with reference_session(self.optimized / "model.onnx") as session:
            bound = self.recipe.verify.max_nmse
            bound = float_bound(self.exported_model) if bound is None else bound
            fidelity = compare(self._outputs_of(self.exported), session, self.samples, bound=bound, inputs="")
        require(fidelity, self.exported_model, self.optimized_model, self.samples[0], where="the optimised graph")
        judged = self.judged_on
        here = (target for target in self.targets if targets.cannot_run(target) is None)
        # Not in the stage's own folder, which goes with a failure; a file that the loop writes changes its key, too.
        rounds = self.cache.root / "rounds" / digest_of(self._prune_ground)
        given = Given(
            calibration=self.calibration_data or (),
            judged=[Batch(feeds, None) for feeds in self.samples] if judged is None else list(judged),
            data="seeded random inputs" if judged is None else judged.name,
            dims=self.recipe.dims,
            target=next(here, runtimes.Target("ort-cpu")),
            seed=self.recipe.seed,
            fine_tune=None if asked.finetune is None else trainer(asked.finetune),
            folder=rounds,
            on_status=self.on_status,
        )
        model, report = prune(self.optimized_model, asked, given)
        write_onnx(model, working / "model.onnx")
        (working / "prune.json").write_text(dumps(report), encoding="utf-8")
        forget_rounds(rounds)

    @functools.cached_property
    def prune_report(self) -> PruneReport | None:
        """What was cut; None where nothing was asked for."""
        if self.recipe.prune is None:
            return None
        return from_json(PruneReport, json.loads((self.float_folder / "prune.json").read_text(encoding="utf-8")))

    @property
    def pruned(self) -> bool:
        """Whether the float graph is another function than the exported model."""
        return self.prune_report is not None and self.prune_report.changed

    @functools.cached_property
    def calibration(self) -> Calibration:
        """The ranges of the float graph: from the recipe's file, or measured on its calibration data."""
        options = self.recipe.quantize
        if options.calibration is not None:
            found = calibration_file.read(Path(options.calibration))
            calibration_file.require_match(found, self.float_model, where=options.calibration)
            return found
        data = self.calibration_data
        if data is None:
            raise DataError(
                "INT8 needs samples to calibrate on",
                hint="--data FOLDER, or --calibration FILE from toolchain calibrate",
            )
        key = digest_of(
            {"graph": self.float_key, "data": data.fingerprint(), "method": options.method, "at": options.percentile}
        )
        return calibration_file.read(self.stage("calibrate", key, self._calibrate) / "calibration.json")

    def _calibrate(self, working: Path) -> None:
        data = self.calibration_data
        assert data is not None
        total = data.len_hint

        def progress(samples: int) -> None:
            self.on_status(f"calibrate: {samples} samples", samples / total if total else None)

        options = self.recipe.quantize
        found = calibrate(
            self.float_folder / "model.onnx",  # the path, not the graph: its weights are in memory once then
            (batch.inputs for batch in data),
            method=options.method,
            percentile=options.percentile,
            on_progress=progress,
        )
        found = dataclasses.replace(found, asked=data.whole)
        calibration_file.write(found, working / "calibration.json")

    # What the stages share; each is read back from the cache where the stage that makes it did not run.

    @functools.cached_property
    def meta(self) -> Exported:
        """What is known of the exported model besides the graph."""
        meta = json.loads((self.exported / "meta.json").read_text(encoding="utf-8"))
        return Exported.from_meta(self.exported_model, meta)

    @functools.cached_property
    def exported_model(self) -> ir.Model:
        """The exported graph."""
        return ir.load(self.exported / "model.onnx")

    @functools.cached_property
    def optimized_model(self) -> ir.Model:
        """The optimised graph."""
        return ir.load(self.optimized / "model.onnx")

    @functools.cached_property
    def float_model(self) -> ir.Model:
        """The float graph that is calibrated and lowered."""
        return self.optimized_model if self.recipe.prune is None else ir.load(self.float_folder / "model.onnx")

    @property
    def reference_model(self) -> ir.Model:
        """What an artifact is to compute: the exported graph or, where it was pruned, the pruned one."""
        return self.float_model if self.pruned else self.exported_model

    @functools.cached_property
    def preprocessing(self) -> ImagePreprocessing | None:
        """How images become the model's input: as the recipe says, else as the source does. Raises DataError."""
        stated = self.recipe.data.preprocessing
        return self.meta.preprocessing if stated is None else preprocessing_of(stated)

    @functools.cached_property
    def evaluation(self) -> Dataset | None:
        """Samples with labels that accuracy is measured on."""
        return self._dataset(self.recipe.data.evaluation, self.recipe.data.limit)

    @functools.cached_property
    def calibration_data(self) -> Dataset | None:
        """Samples that ranges are measured on."""
        return self._dataset(self.recipe.data.calibration, self.recipe.data.calibration_limit)

    @property
    def judged_on(self) -> Dataset | None:
        """What INT8 candidates are judged on: evaluation data, else the calibration data, else seeded inputs."""
        return self.evaluation or self.calibration_data

    def _dataset(self, text: str | None, limit: int | None) -> Dataset | None:
        if text is None:
            return None
        return open_dataset(
            text,
            inputs=input_specs(self.exported_model),
            preprocessing=self.preprocessing,
            class_names=self.meta.labels,
            class_count=class_count(self.exported_model),
            label_offset=self.meta.label_offset,
            batch_size=self.recipe.data.batch_size,
            limit=limit,
        )

    @functools.cached_property
    def samples(self) -> list[Feeds]:
        """What the artifact is verified on: the first batches of evaluation data; where there is none, samples of the
        calibration data or seeded ones, of batch 1, 2, 1, ..., so that the batch is not always one."""
        count = self.recipe.verify.samples
        if self.evaluation is not None:
            return [batch.inputs for batch in itertools.islice(self.evaluation, count)]
        specs = input_specs(self.exported_model)
        if self.calibration_data is not None:
            whole = any(spec.shape and isinstance(spec.shape[0], int) for spec in specs)
            return [
                batch.inputs if whole else {name: array[: 1 + i % 2] for name, array in batch.inputs.items()}
                for i, batch in enumerate(itertools.islice(self.calibration_data, count))
            ]
        dims = self.recipe.dims
        return [seeded_inputs(specs, batch=1 + i % 2, seed=self.recipe.seed + i, dims=dims) for i in range(count)]

    @property
    def samples_are(self) -> str:
        """What ``samples`` are, for the report."""
        if self.evaluation is not None:
            return "evaluation data"
        return "seeded random" if self.calibration_data is None else "calibration data"

    @functools.cached_property
    def reference_outputs(self) -> list[Feeds]:
        """What ``reference_model`` gives on ``samples``, unoptimised."""
        self.on_status("verify: running the reference unoptimised")
        return self._outputs_of(self.float_folder if self.pruned else self.exported)

    def _outputs_of(self, folder: Path) -> list[Feeds]:
        with reference_session(folder / "model.onnx") as session:
            return run_made_up(session, self.samples) if self.judged_on is None else [*map(session.run, self.samples)]


def _as_key(preprocessing: ImagePreprocessing | None) -> dict[str, object] | None:
    return None if preprocessing is None else preprocessing.to_json()


def _identity(data: str | None) -> list[str | int] | None:
    """Which data a text names, without reading it: the place, and when it last changed."""
    if data is None:
        return None
    path = Path(data.rpartition(":")[0] or data) if ".py:" in data else Path(data)
    return [os.path.abspath(path), path.stat().st_mtime_ns if path.exists() else 0]


def _digest_of_file(name: str | None, what: str) -> str | None:
    """SHA-256 of a file that the recipe names, if it does. Raises DataError."""
    if name is None:
        return None
    try:
        return hashlib.sha256(Path(name).read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {what}: {error.strerror}", where=name) from error


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
