"""What is counted of each version of a model: Triton's statistics, and histograms of queue, batch size and compute.

Counted on the event loop's thread and nowhere else, so no lock is taken and a count costs some additions. The metrics
page and the statistics of the protocol are both read from here.
"""

from __future__ import annotations

import bisect
import dataclasses
import time
from collections import Counter
from typing import Literal

#: Why a request failed, as Triton's metrics have it.
Reason = Literal["REJECTED", "CANCELED", "BACKEND", "OTHER"]

#: Upper bounds, seconds: 1-2-5 from 50 µs to 50 s.
SECONDS = tuple(m * 10.0**e for e in range(-5, 2) for m in (1, 2, 5))[2:]
#: Upper bounds, rows.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclasses.dataclass(slots=True)
class Sum:
    """How often, and how long in all, nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


class Histogram:
    """Counts by upper bound, as Prometheus has them; the last counts what is above all bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclasses.dataclass(slots=True)
class ByBatch:
    """Executions of one batch size."""

    input: Sum = dataclasses.field(default_factory=Sum)
    infer: Sum = dataclasses.field(default_factory=Sum)
    output: Sum = dataclasses.field(default_factory=Sum)


class Statistics:
    """One version's counts since it was first loaded.

    Attributes:
        inference_count: rows that were inferred; rows out of the result cache are not among them.
        execution_count: runs of the model.
        success, queue, input, infer, output, cache_hit, cache_miss: requests and their time, as Triton defines them.
        failures: failed requests by reason; failed: their time.
        last_inference_ms: since the epoch.
        pending: requests that wait in the queue now.
        batches: rows of a run → its times.
        queue_seconds, compute_seconds, request_seconds, batch_rows: histograms.
    """

    def __init__(self) -> None:
        self.inference_count = 0
        self.execution_count = 0
        self.success = Sum()
        self.failed = Sum()
        self.queue = Sum()
        self.input = Sum()
        self.infer = Sum()
        self.output = Sum()
        self.cache_hit = Sum()
        self.cache_miss = Sum()
        self.failures: Counter[Reason] = Counter()
        self.last_inference_ms = 0
        self.pending = 0
        self.batches: dict[int, ByBatch] = {}
        self.queue_seconds = Histogram(SECONDS)
        self.compute_seconds = Histogram(SECONDS)
        self.request_seconds = Histogram(SECONDS)
        self.batch_rows = Histogram(ROWS)

    def executed(self, rows: int, *, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """One run of the model over ``rows`` rows: gathering inputs, running, handing out outputs."""
        self.inference_count += rows
        self.execution_count += 1
        batch = self.batches.get(rows)
        if batch is None:
            batch = self.batches[rows] = ByBatch()
        batch.input.add(input_ns)
        batch.infer.add(infer_ns)
        batch.output.add(output_ns)
        self.compute_seconds.add(infer_ns * 1e-9)
        self.batch_rows.add(rows)

    def succeeded(self, *, total_ns: int, queue_ns: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """One request that was answered by a run."""
        self.success.add(total_ns)
        self.queue.add(queue_ns)
        self.input.add(input_ns)
        self.infer.add(infer_ns)
        self.output.add(output_ns)
        self.queue_seconds.add(queue_ns * 1e-9)
        self.request_seconds.add(total_ns * 1e-9)
        self.last_inference_ms = time.time_ns() // 1_000_000

    def answered_from_cache(self, *, total_ns: int, lookup_ns: int) -> None:
        """One request that was answered without a run."""
        self.success.add(total_ns)
        self.cache_hit.add(lookup_ns)
        self.request_seconds.add(total_ns * 1e-9)

    def rejected(self, reason: Reason, *, total_ns: int = 0) -> None:
        """One request that was not answered."""
        self.failures[reason] += 1
        self.failed.add(total_ns)
