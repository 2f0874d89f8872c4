"""Calibration: one streaming pass over samples, and from what it gathered a range for every tensor.

``observe`` runs the graph as ONNX Runtime optimises it, with the values that matter kept as extra outputs, a few
samples at a time, and files each run away in histograms of fixed size: memory is one small run's activations, however
many samples there are and in whatever batches they come. ``Observed.calibration`` then derives any method's ranges;
the data is not read again. ``calibrate`` is both.

Measured in fresh processes on two cores against ONNX Runtime that only runs the model on the same batches (time; peak
memory; method ``auto``; ``benchmarks/results/2026-11-20-int8.md``)::

    ResNet-50, 64 samples              1.5 x    0.8 x
    EfficientNet-Lite0, 64 samples     1.8 x    0.9 x
    EfficientNet-Lite0, 512 samples    1.4 x    0.9 x
    MiniLM, 64 samples                 2.0 x    1.1 x
    MiniLM, 512 samples                1.3 x    1.2 x
    ResNet-20 (CIFAR), 64 samples      4.1 x    1.2 x    (0.08 s: making a session alone takes half of the pass)
    ResNet-20 (CIFAR), 512 samples     1.9 x    1.3 x

What does not shrink with the samples is the planning and the session (0.02 to 0.06 s) and deriving the ranges (0.3 ms a
tensor). Tried and left out: reductions inside the graph (ReduceMin and ReduceMax 1.0 of a forward pass, GlobalMaxPool
without a minimum 0.3 by itself), IO binding (no gain over ``run``), graph optimisation without blocked layouts (2.8),
``only_execute_path_to_fetches`` (skips nothing), deriving in threads (no gain), three runs at once (slower).
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

import runtimes
from passes._quant import Calibration, TensorRange
from runtimes._inputs import InputCheck
from toolchain.calibration_file import Mismatch, match, read, require_match, without_range, write
from toolchain.clipping import METHODS, PERCENTILE, Method
from toolchain.errors import CalibrationError, DataError
from toolchain.histogram import NonFinite
from toolchain.observation import Plan
from toolchain.observed import SAMPLED, Observed, check_method
from toolchain.samples import Batch
from toolchain.watching import WORKERS, Watched, watch

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.evaluate import Feeds

#: elements of all observed tensors that one run may give: as many as the weights have, so that what is held stays small
#: beside the model, but no less than the first and no more than the second (6 and 64 MB in float32)
_LEAST_ELEMENTS, _MOST_ELEMENTS = 1_600_000, 16_000_000
#: pieces that wait for them: with none, a worker that is done waits for the next to be read
_AHEAD = 2


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
        model: a graph in memory, or an ONNX file that is known to be sound, as ``read_onnx`` makes sure. Of a file the
            weights are in memory once, in the runtime.
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
    watched = watch(model, channels=channels)
    with watched.session:
        found = Observed(watched.plan, sampled=sampled, data=data)
        if resume and state is not None and state.exists():
            found.restore(state)
        try:
            _gather(watched, batches, found, state, state_seconds, on_progress)
        except BaseException:
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """What is run at once: some samples, and how many came before them."""

    feeds: Feeds
    first: int
    count: int


def _gather(
    watched: Watched,
    batches: Iterable[Batch | Mapping[str, Any]],
    found: Observed,
    state: Path | None,
    state_seconds: float,
    on_progress: Callable[[int], None],
) -> None:
    """Runs and takes in everything: ``WORKERS`` runs go on at once, and are taken in one after the other.

    When it ends, in whatever way, what was run was taken in: the threads are not interrupted by Ctrl-C.
    """
    saved = time.monotonic()
    running: collections.deque[tuple[concurrent.futures.Future[None], _Piece]] = collections.deque()
    lock = threading.Lock()
    most = min(_MOST_ELEMENTS, max(_LEAST_ELEMENTS, watched.weights))
    #: elements of all that is observed, for each element that was fed: the most in any run so far
    per_element = 0.0

    def take(piece: _Piece, before: concurrent.futures.Future[None] | None) -> None:
        nonlocal per_element
        values = watched.run(piece.feeds)
        per_element = max(per_element, sum(value.size for value in values.values()) / max(1, _size(piece.feeds)))
        if before is not None:
            before.result()
        with lock:
            found.add(values, piece.count)

    def settle() -> None:
        future, piece = running.popleft()
        try:
            future.result()
        except NonFinite:
            _blame(watched, piece)
        on_progress(piece.first + piece.count)

    def step(elements: float) -> int:
        """How many samples to run at once, of so many elements each."""
        # The first samples, each run alone, show how much comes of one.
        while not per_element and len(running) >= WORKERS:
            settle()
        return max(1, int(most / max(1.0, per_element * elements))) if per_element else 1

    with concurrent.futures.ThreadPoolExecutor(WORKERS, "calibrate") as pool:
        for piece in _pieces(watched.session, batches, found, step):
            running.append((pool.submit(take, piece, running[-1][0] if running else None), piece))
            if len(running) == WORKERS + _AHEAD:
                settle()
            if state is not None and time.monotonic() - saved >= state_seconds:
                with lock:
                    found.save(state)
                saved = time.monotonic()
        while running:
            settle()


def _pieces(
    session: runtimes.Session,
    batches: Iterable[Batch | Mapping[str, Any]],
    found: Observed,
    step: Callable[[float], int],
) -> Iterator[_Piece]:
    """The batches in small pieces, without the samples that were taken in before."""
    splittable = all(spec.shape and not isinstance(spec.shape[0], int) for spec in session.inputs)
    already, passed = found.samples, 0
    check = InputCheck(session.inputs)
    for number, batch in enumerate(batches):
        feeds = _feeds(batch, number)
        try:
            check(feeds)
        except runtimes.InvalidInput as error:
            raise DataError(error.what, where=f"batch {number}", hint=error.hint) from error
        _check_rest(feeds, found.plan, passed)
        count = _count(feeds)
        whole = not splittable or any(array.ndim == 0 or len(array) != count for array in feeds.values())
        start = max(0, min(count, already - passed))
        while start < count:
            left = count - start
            # pieces of one size: a small one at the end takes nearly as long as a whole one
            size = count if whole else math.ceil(left / math.ceil(left / step(_size(feeds) / count)))
            part = feeds if size == count else {name: array[start : start + size] for name, array in feeds.items()}
            yield _Piece(part, passed + start, size)
            start += size
        passed += count
    if passed < already:
        raise CalibrationError(
            f"the state has seen {already} samples, the data has only {passed}",
            hint="resume on the data that the calibration began with",
        )


def _blame(watched: Watched, piece: _Piece) -> NoReturn:
    """Runs the piece again to find the first tensor, in the order of the graph, that is not finite."""
    values = watched.run(piece.feeds)
    for name in watched.plan.observed:
        bad = ~np.isfinite(values[name])
        if not bad.any():
            continue
        kind = "NaN" if np.isnan(values[name]).any() else "an infinite value"
        by_sample = bad.ndim > 0 and len(bad) == piece.count
        row = int(bad.reshape(piece.count, -1).any(axis=1).argmax()) if by_sample else 0
        known = by_sample or piece.count == 1
        is_input = name in watched.plan.inputs
        raise CalibrationError(
            f"{'input' if is_input else 'tensor'} {name!r} holds {kind}",
            where=f"sample {piece.first + row}, counted from 0"
            if known
            else f"one of the samples {piece.first} to {piece.first + piece.count - 1}, counted from 0",
            hint="mend that sample or leave it out"
            if is_input
            else "run the float model on that sample: what comes after this tensor means nothing there either",
        )
    raise CalibrationError(
        "a tensor was not finite, and is when the model runs again: the model is not deterministic",
        where=f"samples {piece.first} to {piece.first + piece.count - 1}",
    )


def _feeds(batch: Batch | Mapping[str, Any], number: int) -> Feeds:
    if isinstance(batch, Batch):
        return batch.inputs
    if not isinstance(batch, Mapping):
        raise DataError(
            f"a batch is a {type(batch).__name__}", where=f"batch {number}", hint="yield {input: array} for every batch"
        )
    return {str(name): np.asarray(array) for name, array in batch.items()}


def _size(feeds: Feeds) -> int:
    return sum(array.size for array in feeds.values())


def _count(feeds: Feeds) -> int:
    """Samples in a batch: the length of axis 0 of the first input that has one, else 1."""
    return next((len(array) for array in feeds.values() if array.ndim), 1)


def _check_rest(feeds: Feeds, graph_plan: Plan, passed: int) -> None:
    """Inputs that are not observed, such as a mask of minus infinity, may hold infinities but no NaN."""
    for name, array in feeds.items():
        if name in graph_plan.inputs or array.dtype.kind != "f" or not np.isnan(array).any():
            continue
        row = int(np.isnan(array).reshape(len(array), -1).any(axis=1).argmax()) if array.ndim else 0
        raise CalibrationError(
            f"input {name!r} holds NaN",
            where=f"sample {passed + row}, counted from 0",
            hint="mend that sample or leave it out",
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
    "without_range",
    "write",
]
