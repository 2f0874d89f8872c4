"""How much an INT8 candidate loses against the float model, on the kernels that it will run on."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import onnx_ir as ir

import runtimes
from runtimes import Target
from toolchain.compile import compile_model, read_compiled
from toolchain.data import Batch
from toolchain.errors import DataError
from toolchain.evaluate import reference_session
from toolchain.metrics import tensor_error
from toolchain.onnx_file import temporary_onnx
from toolchain.targets import cannot_run
from toolchain.verify import class_scores

Metric = Literal["auto", "top1", "agreement", "nmse"]


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


def judged_on(target: Target) -> str:
    """What a candidate for the target is judged on, for the report."""
    return str(target) if cannot_run(target) is None else "its graph as written, on ort-cpu"


@contextlib.contextmanager
def candidate_session(model: ir.Model, target: Target) -> Iterator[runtimes.Session]:
    """A session of a candidate: compiled for the target, as it will ship; where the target cannot run here, of the
    graph as it is written, Q/DQ computed one by one in float, which is what the target's integer kernels stand for."""
    if cannot_run(target) is not None:
        with reference_session(model) as session:
            yield session
        return
    with (
        compiled_folder(model, target) as folder,
        runtimes.backend(target.runtime).load(read_compiled(folder)) as session,
    ):
        yield session
