"""Measures sessions, each in a fresh process that imports numpy, the runtime and nothing of the build.

Percentiles follow the early-stopping rule of MLPerf Inference (Reddi et al. 2020): percentile p is stated only
with enough samples that, at 99 % confidence, the true one is no worse; 64 for p90, 662 for p99.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes import Error
from toolchain import child as children
from toolchain.machine import cpu_model, package_versions, usable_cores
from toolchain.progress import Status, silent

#: An interquartile range beyond this share of the median says that the machine was busy with something else.
MAX_SPREAD = 0.25
#: Beyond this the mean, and with it the throughput, is made by a few outliers.
MAX_COV = 1.0
_CONFIDENCE = 0.99
#: Ratios of blocks that lie within so much of each other say that nothing disturbed them.
_ALIKE = 0.1
PERCENTILES = (50, 90, 95, 99)


class BenchmarkFailed(Error):
    """The measuring process failed; the message carries its own error."""


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """What to measure: an artifact folder or .onnx file and which variant or target of it, or, with
    ``compiled``, the folder that ``compile_model`` filled."""

    path: str
    compiled: bool = False
    target: str | None = None
    variant: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How long to measure.

    Attributes:
        batch_sizes: one row for each.
        threads: one row for each; 0 is the runtime's own choice.
        warmup: runs that are thrown away.
        duration_s, count: runs until both are reached.
        percentiles: the ones to state.
        dims: sizes of symbolic dimensions other than the batch.
        seed: of the inputs.
    """

    batch_sizes: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (0,)
    warmup: int = 3
    duration_s: float = 1.0
    count: int = 100
    percentiles: tuple[int, ...] = PERCENTILES
    dims: Mapping[str, int] = dataclasses.field(default_factory=dict)
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class BenchResult:
    """One row: one batch size with one number of threads. Times in milliseconds.

    Attributes:
        samples_ms: every run, in order.
        load_ms: from the call of ``runtimes.load`` to a session, in the measuring process.
        first_ms: the first run.
        peak_memory_mb: the process's peak resident memory (MB of 10^6 bytes), all of it.
        throughput: samples (batch entries) a second at the mean.
        cov: standard deviation over mean.
        percentiles_ms: those that were asked for.
        valid, reason: whether the numbers may be quoted, and why not.
        disturbed: not valid for a reason that may be gone next time: the machine had something else to do.
    """

    batch: int
    threads: int
    samples_ms: tuple[float, ...]
    load_ms: float
    first_ms: float
    peak_memory_mb: float
    min_ms: float
    mean_ms: float
    max_ms: float
    percentiles_ms: dict[int, float]
    cov: float
    throughput: float
    valid: bool
    reason: str | None
    disturbed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class BenchReport:
    """Rows, and what they were measured on. ``info`` is the session's own account of what it loaded."""

    subject: str
    target: str
    rows: tuple[BenchResult, ...]
    info: dict[str, str]
    digest: str | None
    cpu: str
    cores: int
    packages: dict[str, str]
    measured_at: str


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """Two subjects measured turn by turn in one process.

    Attributes:
        ratio: median over blocks of (median of A in the block) / (median of B in the block).
        ratio_low, ratio_high: 10th and 90th percentile of the blocks' ratios.
    """

    batch: int
    threads: int
    a_ms: float
    b_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    blocks: int

    @property
    def decided(self) -> bool:
        """Whether eight of ten blocks agree on which is faster, or on that neither is by more than a few percent."""
        return self.ratio_high < 1 or self.ratio_low > 1 or self.ratio_high - self.ratio_low < _ALIKE


def samples_needed(percentile: int) -> int:
    """Fewest samples for a percentile: one may lie beyond it, and still n runs are evidence at 99 %."""
    p, n = percentile / 100, 2
    while p**n + n * (1 - p) * p ** (n - 1) > 1 - _CONFIDENCE:
        n += 1
    return n


def summarise(
    samples_ms: Sequence[float],
    *,
    batch: int,
    threads: int,
    load_ms: float,
    first_ms: float,
    peak_memory_mb: float,
    percentiles: Sequence[int] = PERCENTILES,
) -> BenchResult:
    """The statistics of one row, and whether they may be quoted."""
    array = np.asarray(samples_ms, dtype=np.float64)
    low, median, high = np.percentile(array, [25, 50, 75])
    reasons = [
        f"p{p} needs {samples_needed(p)} samples, there are {len(array)}"
        for p in percentiles
        if len(array) < samples_needed(p)
    ]
    too_few = len(reasons)
    spread = float((high - low) / median) if median else math.inf
    if spread > MAX_SPREAD:
        reasons.append(
            f"the middle half of the samples spreads over {spread:.0%} of the median (limit {MAX_SPREAD:.0%})"
        )
    mean = float(array.mean())
    cov = float(array.std()) / mean if mean else 0.0
    if cov > MAX_COV:
        reasons.append(f"single runs took far longer than the rest: standard deviation {cov:.1f} x the mean")
    return BenchResult(
        batch=batch,
        threads=threads,
        samples_ms=tuple(float(s) for s in array),
        load_ms=load_ms,
        first_ms=first_ms,
        peak_memory_mb=peak_memory_mb,
        min_ms=float(array.min()),
        mean_ms=mean,
        max_ms=float(array.max()),
        percentiles_ms={p: float(np.percentile(array, p)) for p in percentiles},
        cov=cov,
        throughput=batch * 1000 / mean if mean else math.inf,
        valid=not reasons,
        reason="; ".join(reasons) or None,
        disturbed=len(reasons) > too_few,
    )


def benchmark(subject: Subject, plan: Plan, *, on_status: Status = silent) -> BenchReport:
    """Measures one subject, a process for every number of threads.

    Raises:
        BenchmarkFailed: the subject cannot be loaded or run; the message is the runtime's.
    """
    rows: list[BenchResult] = []
    info: dict[str, str] = {}
    target, digest = "", None
    for threads in plan.threads:
        answers = _measure([subject], plan, threads, interleave=False, on_status=on_status)
        for answer in answers:
            info, target, digest = answer["info"], answer["target"], answer["digest"]
            rows.append(
                summarise(
                    answer["samples_ms"],
                    batch=answer["batch"],
                    threads=threads,
                    load_ms=answer["load_ms"],
                    first_ms=answer["first_ms"],
                    peak_memory_mb=answer["peak_memory_mb"],
                    percentiles=plan.percentiles,
                )
            )
    return BenchReport(
        Path(subject.path).name, target, tuple(rows), info, digest, cpu_model(), usable_cores(),
        dict(package_versions()), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def compare_latency(a: Subject, b: Subject, plan: Plan, *, on_status: Status = silent) -> list[Comparison]:
    """Measures two subjects A B A B in one process, so that what disturbs the machine disturbs both.

    Raises:
        BenchmarkFailed: one of them cannot be loaded or run, or they do not take the same inputs.
    """
    found = []
    for threads in plan.threads:
        for answer in _measure([a, b], plan, threads, interleave=True, on_status=on_status):
            blocks_a, blocks_b = (np.asarray(side) for side in answer["blocks_ms"])
            ratios = blocks_a / blocks_b
            low, middle, high = np.percentile(ratios, [10, 50, 90])
            found.append(
                Comparison(
                    answer["batch"], threads, float(np.median(blocks_a)), float(np.median(blocks_b)),
                    float(middle), float(low), float(high), len(ratios),
                )
            )  # fmt: skip
    return found


def _measure(
    subjects: Sequence[Subject],
    plan: Plan,
    threads: int,
    *,
    interleave: bool,
    on_status: Status,
) -> list[dict[str, Any]]:
    job = {
        "subjects": [dataclasses.asdict(s) for s in subjects],
        "plan": dataclasses.asdict(plan),
        "threads": threads,
        "interleave": interleave,
    }
    command = children.command("toolchain._measure")
    answers: list[dict[str, Any]] = []
    # stderr goes to a file: a pipe that nobody reads would stop a child that has much to say
    with (
        tempfile.TemporaryFile("w+") as noise,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, text=True) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(job))
        child.stdin.close()
        failure: dict[str, Any] | None = None
        for line in child.stdout:
            try:
                answer = json.loads(line)
            except ValueError as error:  # a library under the session writes to standard output
                raise BenchmarkFailed(
                    f"the measuring process said what it should not: {line.strip()[:200]}", where=subjects[0].path
                ) from error
            if "error" in answer:
                failure = answer
            elif "progress" in answer:
                on_status(answer["progress"], answer["share"])
            else:
                answers.append(answer)
        child.wait()
        noise.seek(0)
        said = noise.read().strip()[-400:]
    if failure is not None:
        raise BenchmarkFailed(failure["error"], where=failure["where"], hint=failure["hint"])
    if child.returncode != 0:
        how = f"was ended by signal {-child.returncode}" if child.returncode < 0 else f"exited with {child.returncode}"
        raise BenchmarkFailed(f"the measuring process {how}: {said or 'it said nothing'}", where=subjects[0].path)
    return answers
