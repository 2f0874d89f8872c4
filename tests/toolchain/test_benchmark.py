"""The statistics by hand, and a real measurement of a small model. No test asserts a time."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toolchain_support import conv_net, save, toolchain, toolchain_json

from toolchain import _measure
from toolchain.benchmark import (
    BenchmarkFailed,
    BenchResult,
    Plan,
    Subject,
    benchmark,
    compare_latency,
    samples_needed,
    summarise,
)

QUICK = Plan(batch_sizes=(1, 3), threads=(1, 2), warmup=1, duration_s=0, count=20, percentiles=(50,))


@pytest.mark.parametrize(("percentile", "needed"), [(50, 11), (90, 64), (99, 662)])
def test_samples_needed_are_mlperfs(percentile: int, needed: int) -> None:
    assert samples_needed(percentile) == needed


def row(samples: np.ndarray, **kwargs: Any) -> BenchResult:
    return summarise(samples.tolist(), batch=4, threads=0, load_ms=1, first_ms=1, peak_memory_mb=1, **kwargs)


def test_by_hand() -> None:
    result = row(np.array([1.0, 2.0, 3.0] * 300))
    assert (result.min_ms, result.mean_ms, result.max_ms) == (1, 2, 3)
    assert result.percentiles_ms == {50: 2, 90: 3, 95: 3, 99: 3}
    assert result.throughput == pytest.approx(2000)
    assert result.cov == pytest.approx(math.sqrt(2 / 3) / 2)


@pytest.mark.parametrize(
    ("samples", "percentiles", "reason"),
    [
        (np.full(661, 1.0), (50, 99), "p99 needs 662 samples, there are 661"),
        (np.array([1.0, 2.0] * 400), (50,), "spreads over"),
        (np.array([1.0] * 699 + [3000.0]), (50,), "standard deviation"),
    ],
)
def test_what_may_not_be_quoted_says_why(samples: np.ndarray, percentiles: tuple[int, ...], reason: str) -> None:
    result = row(samples, percentiles=percentiles)
    assert not result.valid
    assert reason in result.reason


def test_enough_quiet_samples_are_valid() -> None:
    result = row(1 + np.random.default_rng(0).normal(size=662) / 100)
    assert (result.valid, result.reason) == (True, None)


def test_a_table_of_batch_sizes_and_threads(tmp_path: Path) -> None:
    report = benchmark(Subject(str(save(conv_net(), tmp_path / "m.onnx"))), QUICK)
    assert [(r.batch, r.threads) for r in report.rows] == [(1, 1), (3, 1), (1, 2), (3, 2)]
    for r in report.rows:
        assert len(r.samples_ms) >= 20
        assert 0 < r.min_ms <= r.percentiles_ms[50] <= r.max_ms
        assert r.load_ms > 0
        assert r.first_ms > 0
        assert 10 < r.peak_memory_mb < 2000
    assert report.target == "ort-cpu"
    assert report.cpu
    assert report.packages["onnxruntime"]


def test_the_measuring_process_is_small(tmp_path: Path) -> None:
    """Its memory is that of a service: were torch or onnx imported there, it would be hundreds of MB."""
    ballast = np.ones(60_000_000)  # 480 MB in this process, which must not be counted
    report = benchmark(Subject(str(save(conv_net(), tmp_path / "m.onnx"))), QUICK)
    assert report.rows[0].peak_memory_mb < 150
    assert ballast[-1] == 1


def test_two_subjects_turn_by_turn(tmp_path: Path) -> None:
    a = Subject(str(save(conv_net(channels=64), tmp_path / "a.onnx")))
    b = Subject(str(save(conv_net(channels=64), tmp_path / "b.onnx")))
    (found,) = compare_latency(a, b, Plan(warmup=2, duration_s=0.3, count=10))
    assert found.blocks >= 2
    assert found.ratio_low <= found.ratio <= found.ratio_high
    assert found.ratio > 0


def test_what_cannot_be_loaded_fails_with_the_runtimes_own_words(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"junk")
    with pytest.raises(BenchmarkFailed) as caught:
        benchmark(Subject(str(bad)), QUICK)
    assert "bad.onnx" in str(caught.value)


def test_bench_command(tmp_path: Path) -> None:
    path = save(conv_net(), tmp_path / "m.onnx")
    found = toolchain_json("bench", path, "--count", "5", "--duration", "0", "--batch-sizes", "1,2")
    assert [r["batch"] for r in found["rows"]] == [1, 2]
    assert found["rows"][0]["valid"] is False
    assert "p99 needs 662 samples" in found["rows"][0]["reason"]
    shown = toolchain("bench", path, "--vs", path, "--count", "5", "--duration", "0").stdout
    assert "A/B" in shown
    assert "not a list of numbers" in toolchain("bench", path, "--batch-sizes", "1;2", check=2).stderr
    assert "--dim" in toolchain("bench", path, "--dim", "sequence", check=2).stderr


def test_a_side_has_its_turn_when_the_threads_of_the_other_have_stopped() -> None:
    stop = threading.Event()

    def spin() -> None:
        until = time.process_time() + 0.15
        while time.process_time() < until:
            sum(range(1000))
        stop.set()

    threading.Thread(target=spin).start()
    _measure._settle()
    assert stop.is_set()
