"""Calibration: one streaming pass over samples, and from what it gathered a range for every tensor.

``observe`` runs the graph as ONNX Runtime optimises it, with the values that matter kept as extra outputs, a few
samples at a time, and files each run away in histograms of fixed size: memory is one small run's activations, however
many samples there are and in whatever batches they come. ``Observed.calibration`` then derives any method's ranges;
the data is not read again. ``calibrate`` is both.

Measured by ``benchmarks/calibration.py``, see there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import runtimes
from passes._quant import Calibration, TensorRange
from toolchain.calibration_file import Mismatch, match, read, require_match, write
from toolchain.clipping import METHODS, PERCENTILE, Method, tensor_range
from toolchain.errors import CalibrationError, DataError
from toolchain.evaluate import Feeds, with_outputs
from toolchain.histogram import Distribution, Histograms, NonFinite, joined
from toolchain.observation import Plan, plan
from toolchain.onnx_file import read_onnx, temporary_onnx
from toolchain.samples import Batch
from toolchain.storage import write_bytes

#: elements of a tensor that go into its histogram for each sample
SAMPLED = 2048
#: elements of all observed tensors that one run may give (16 MB in float32): more does not go faster, and is memory
_RUN_ELEMENTS = 4_000_000
_FORMAT = {"format": "toolchain-observed", "version": 1}


class Observed:
    """What a pass over samples gathered of a graph.

    Args:
        graph_plan: what was looked at.
        sampled: see ``observe``.
        data: a key of the samples, for resuming; "" where it is not known.

    Attributes:
        samples: how many were taken in (entries of axis 0 of the inputs).
    """

    def __init__(self, graph_plan: Plan, *, sampled: int | None = SAMPLED, data: str = "") -> None:
        self.plan = graph_plan
        self._index = {name: i for i, name in enumerate(graph_plan.observed)}
        bounds = {self._index[name]: limits for name, limits in graph_plan.bounds.items()}
        self._histograms = Histograms(len(self._index), sampled=sampled, bounds=bounds)
        self._amax: dict[str, np.ndarray] = {}
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, int] = {}
        # the samples may be read in other batches when a calibration is resumed, but not otherwise
        self._key = {**_FORMAT, "graph": graph_plan.graph, "sampled": sampled, "data": data}
        self._key["tensors"] = list(graph_plan.observed)
        self._key["channels"] = sorted(set(graph_plan.channel_inputs) | set(graph_plan.channel_outputs))

    @property
    def samples(self) -> int:
        return self._histograms.samples

    def add(self, values: Mapping[str, np.ndarray], samples: int) -> None:
        """Takes in one run: every observed value by name, and how many samples they are of.

        Raises:
            CalibrationError: NaN or infinity; nothing of the run was taken in.
        """
        try:
            self._histograms.add([values[name] for name in self.plan.observed], samples)
        except NonFinite as error:
            name = self.plan.observed[error.tensor]
            first = self.samples + (error.row or 0)
            last = self.samples + samples - 1 if error.row is None else first
            what = f"input {name!r}" if name in self.plan.inputs else f"tensor {name!r}"
            raise CalibrationError(
                f"{what} holds {'NaN' if error.kind == 'NaN' else 'an infinite value'}",
                where=f"sample {first}" if first == last else f"one of the samples {first} to {last}",
                hint="mend or leave out that sample, counted from 0"
                if name in self.plan.inputs
                else "run the float model on that sample, counted from 0: its results there mean nothing either",
            ) from error
        for name in self.plan.channel_inputs:
            value = values[name].reshape(-1, values[name].shape[-1])
            if value.size:
                amax = np.maximum(value.max(axis=0), -value.min(axis=0)).astype(np.float64)
                self._amax[name] = np.maximum(self._amax.get(name, 0.0), amax)
        for name, axis in self.plan.channel_outputs.items():
            value = np.moveaxis(values[name], axis, -1)
            if value.size:
                others = tuple(range(value.ndim - 1))
                self._sums[name] = self._sums.get(name, 0.0) + value.sum(axis=others, dtype=np.float64)
                self._counts[name] = self._counts.get(name, 0) + value.size // value.shape[-1]

    def distributions(self) -> Iterator[tuple[str, Distribution]]:
        """The distribution of every tensor that was looked at and ever had an element."""
        for name, index in self._index.items():
            found = self._histograms.distribution(index)
            if found is not None:
                yield name, found

    def calibration(self, *, method: Method = "auto", percentile: float = PERCENTILE) -> Calibration:
        """Derives the ranges; see ``toolchain/clipping.py`` for the methods.

        Args:
            method: one of METHODS.
            percentile: percent of the elements that the ``percentile`` method covers, above 50 to 100.

        Raises:
            CalibrationError: an unknown method or percentile, or no samples were seen.
        """
        check_method(method, percentile)
        if not self.samples:
            raise CalibrationError(
                "there are no samples to calibrate on", hint="give at least one; 50 to 500 are usual"
            )
        found = dict(self.distributions())
        ranges = {name: tensor_range(d, method=method, percentile=percentile) for name, d in found.items()}
        for name, parts in self.plan.joined.items():
            if all(part in found for part in parts):
                whole = joined([(found[part], self._histograms.elements(self._index[part])) for part in parts])
                ranges[name] = tensor_range(whole, method=method, percentile=percentile)
        ranges |= {name: ranges[carrier] for name, carrier in self.plan.same.items() if carrier in ranges}
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        return Calibration(self.plan.graph, self.samples, ranges, dict(self._amax), means)

    def save(self, path: Path) -> None:
        """Writes everything to an .npz, whole or not at all. Raises StorageError."""
        arrays: dict[str, Any] = self._histograms.arrays()
        for kind, held in (("amax", self._amax), ("sum", self._sums)):
            arrays |= {f"{kind}/{name}": array for name, array in held.items()}
        arrays |= {f"count/{name}": np.array(count) for name, count in self._counts.items()}
        arrays["key"] = np.frombuffer(json.dumps(self._key).encode(), np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_bytes(path, buffer.getbuffer())

    def restore(self, path: Path) -> None:
        """Goes on from a file that ``save`` wrote for the same graph, tensors, options and data.

        Raises:
            CalibrationError: it is not such a file.
        """
        hint = "delete it and calibrate from the start"
        try:
            with np.load(path, allow_pickle=False) as archive:
                key = json.loads(bytes(archive["key"]))
                differs = [k for k in self._key if key.get(k) != self._key[k]]
                if differs:
                    raise CalibrationError(
                        f"it was written for another {' and '.join(differs)}", where=str(path), hint=hint
                    )
                self._histograms.restore(archive)
                for name in archive.files:
                    kind, _, tensor = name.partition("/")
                    if kind == "amax" and tensor:
                        self._amax[tensor] = archive[name]
                    elif kind == "sum" and tensor:
                        self._sums[tensor] = archive[name]
                    elif kind == "count" and tensor:
                        self._counts[tensor] = int(archive[name])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
            raise CalibrationError(f"cannot go on from this state: {error}", where=str(path), hint=hint) from error


def check_method(method: str, percentile: float) -> None:
    """Raises CalibrationError unless both are allowed."""
    if method not in METHODS:
        raise CalibrationError(f"there is no method {method!r}", hint=f"one of {', '.join(METHODS)}")
    if not 50 < percentile <= 100:
        raise CalibrationError(f"percentile is {percentile:g}", hint="above 50, at most 100, such as 99.99")


def observe(
    model: ir.Model | Path,
    batches: Iterable[Batch | Mapping[str, Any]],
    *,
    sampled: int | None = SAMPLED,
    channels: bool = False,
    data: str = "",
    state: Path | None = None,
    resume: bool = False,
    state_seconds: float = 5.0,
    on_progress: Callable[[int], None] = lambda samples: None,
) -> Observed:
    """Runs the model once over the samples and gathers what every method needs.

    Args:
        model: a graph in memory, or an ONNX file.
        batches: read once, so a generator will do. Each an array for every input; the samples along axis 0, any
            number of them.
        sampled: elements of a tensor that go into its histogram for each sample, spread over it; None takes all, at
            several times the cost. Extremes are exact either way.
        channels: also gather extremes and means of single channels, see ``Calibration``. Costs time: values are kept
            that the runtime would fuse.
        data: a key of the samples, such as ``Dataset.fingerprint()``; a state for other data is not resumed.
        state: file to keep what was gathered in, every ``state_seconds`` and when this is interrupted.
        resume: go on from ``state`` if it is there; as many samples as it has seen are passed over.
        on_progress: is called with the number of samples that were taken in.

    Raises:
        CalibrationError: no samples, NaN or infinity in an input or a tensor (with the first sample), a graph without
            anything to quantise, or a state of something else.
        DataError: a batch does not fit the model's inputs.
        InvalidModel, GraphError, CompileFailed, RunFailed: the model cannot be read or run.
    """
    graph = _typed(read_onnx(model) if isinstance(model, Path) else model)
    found = Observed(plan(graph, channels=channels), sampled=sampled, data=data)
    if resume and state is not None and state.exists():
        found.restore(state)
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(_session(with_outputs(graph, found.plan.outputs)))
        del graph, model  # of a file, this was the only copy of the weights besides the runtime's
        worker = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1, "observe"))
        saved = time.monotonic()
        try:
            for values, count in _runs(session, batches, found):
                # In a thread of its own it is done to the end, also when Ctrl-C raises here meanwhile.
                worker.submit(found.add, values, count).result()
                del values
                on_progress(found.samples)
                if state is not None and time.monotonic() - saved >= state_seconds:
                    found.save(state)
                    saved = time.monotonic()
        except BaseException:
            worker.shutdown(wait=True)
            if state is not None and found.samples:
                found.save(state)
            raise
    if not found.samples:
        raise CalibrationError("there are no samples to calibrate on", hint="give at least one; 50 to 500 are usual")
    return found


def calibrate(
    model: ir.Model | Path,
    batches: Iterable[Batch | Mapping[str, Any]],
    *,
    method: Method = "auto",
    percentile: float = PERCENTILE,
    sampled: int | None = SAMPLED,
    channels: bool = False,
    data: str = "",
    state: Path | None = None,
    resume: bool = False,
    on_progress: Callable[[int], None] = lambda samples: None,
) -> Calibration:
    """``observe`` and ``Observed.calibration`` in one; arguments and errors are theirs. The state file is removed
    at the end."""
    check_method(method, percentile)
    found = observe(
        model, batches, sampled=sampled, channels=channels, data=data,
        state=state, resume=resume, on_progress=on_progress,
    )  # fmt: skip
    result = found.calibration(method=method, percentile=percentile)
    if state is not None:
        state.unlink(missing_ok=True)
    return result


def _typed(model: ir.Model) -> ir.Model:
    """The model with the types of all values known; a copy where they have to be found first."""
    if all(value.type is not None for node in model.graph for value in node.outputs if value.name):
        return model
    copy = model.clone()
    ir.passes.common.ShapeInferencePass()(copy)
    return copy


@contextlib.contextmanager
def _session(model: ir.Model) -> Iterator[runtimes.Session]:
    with temporary_onnx(model) as path:
        # Without a memory pattern the arena holds what a run takes and no second plan of it: a quarter less memory.
        with runtimes.load(path, target="ort-cpu", options={"memory_pattern": False}) as session:
            yield session


def _runs(
    session: runtimes.Session, batches: Iterable[Batch | Mapping[str, Any]], found: Observed
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Runs the model over the batches in small pieces: observed values by name, and the number of their samples."""
    splittable = all(spec.shape and not isinstance(spec.shape[0], int) for spec in session.inputs)
    passed, largest = 0, 0
    already = found.samples
    for number, batch in enumerate(batches):
        feeds = _feeds(batch, number)
        count = _count(feeds)
        whole = not splittable or any(array.ndim == 0 or len(array) != count for array in feeds.values())
        start = max(0, min(count, already - passed))
        while start < count:
            # The first sample shows how large they are.
            step = count if whole else max(1, min(count - start, _RUN_ELEMENTS // largest if largest else 1))
            part = feeds if step == count else {name: array[start : start + step] for name, array in feeds.items()}
            try:
                outputs = session.run(part)
            except runtimes.InvalidInput as error:
                raise DataError(error.what, where=f"batch {number}", hint=error.hint) from error
            _check_rest(part, found)
            values = {**part, **outputs}
            del outputs
            largest = max(largest, sum(values[name].size for name in found.plan.observed) // step)
            yield values, step
            del values  # before the next run, not after it: they are most of the memory
            start += step
        passed += count
    if passed < already:
        raise CalibrationError(
            f"the state has seen {already} samples, the data has only {passed}",
            hint="resume on the data that the calibration began with",
        )


def _feeds(batch: Batch | Mapping[str, Any], number: int) -> Feeds:
    if isinstance(batch, Batch):
        return batch.inputs
    if not isinstance(batch, Mapping):
        raise DataError(
            f"a batch is a {type(batch).__name__}", where=f"batch {number}", hint="yield {input: array} for every batch"
        )
    return {str(name): np.asarray(array) for name, array in batch.items()}


def _count(feeds: Feeds) -> int:
    """Samples in a batch: the length of axis 0 of the first input that has one, else 1."""
    return next((len(array) for array in feeds.values() if array.ndim), 1)


def _check_rest(feeds: Feeds, found: Observed) -> None:
    """Inputs that are not observed, such as a mask of minus infinity, may hold infinities but no NaN."""
    for name, array in feeds.items():
        if name not in found.plan.inputs and array.dtype.kind == "f" and np.isnan(array).any():
            raise CalibrationError(
                f"input {name!r} holds NaN",
                where=f"sample {found.samples} or shortly after it",
                hint="mend or leave out that sample, counted from 0",
            )


__all__ = [
    "METHODS",
    "Calibration",
    "Method",
    "Mismatch",
    "Observed",
    "TensorRange",
    "calibrate",
    "check_method",
    "match",
    "observe",
    "read",
    "require_match",
    "write",
]
