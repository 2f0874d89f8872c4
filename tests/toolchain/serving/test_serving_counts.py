"""Statistics of several workers: sums, batches by size, and what stays of workers that have gone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from standin import Few

from toolchain.serving import describe
from toolchain.serving.base import NotFound
from toolchain.serving.counts import Combined, Counts
from toolchain.serving.statistics import Statistics


def told(**runs: list[int]) -> Counts:
    """What one worker tells of models that ran batches of these rows, each run one request and 10 ns."""
    found: Counts = []
    for name, rows in runs.items():
        counts = Statistics()
        for row in rows:
            counts.executed(row, input_ns=1, infer_ns=10, output_ns=2)
            counts.succeeded(total_ns=13, queue_ns=0, input_ns=1, infer_ns=10, output_ns=2)
        counts.last_inference_ms = len(rows)
        found.append(describe._statistics(name, "1", counts))
    return found


def by_name(counts: Counts) -> dict[str, Any]:
    return {entry["name"]: entry for entry in counts}


def test_numbers_are_added_and_batches_are_one_for_each_size() -> None:
    combined = Combined()
    parts = [told(a=[1, 4, 4], b=[1]), told(a=[2, 4], c=[])]
    found = by_name(combined.of(parts))
    assert found["a"] == told(a=[1, 4, 4, 2, 4])[0] | {"last_inference": 3}
    assert found["b"] == told(b=[1])[0]
    assert found["c"] == told(c=[])[0]
    assert parts == [told(a=[1, 4, 4], b=[1]), told(a=[2, 4], c=[])], "what workers said is not changed"


def test_what_workers_counted_that_have_gone_stays() -> None:
    combined = Combined()
    combined.retire(told(a=[1, 1]))
    combined.retire(told(a=[8], b=[1]))
    assert by_name(combined.of([]))["a"] == told(a=[1, 1, 8])[0] | {"last_inference": 2}
    for _ in range(2):
        assert by_name(combined.of([told(a=[1])]))["a"]["inference_count"] == 11


def test_this_worker_says_what_there_is_and_all_say_how_much(tmp_path: Path) -> None:
    few = Few(tmp_path, ("double",))

    async def everywhere() -> Counts:
        return told(double=[3, 3], gone=[1])

    async def run() -> None:
        (found,) = await describe.statistics(few, everywhere=everywhere)  # type: ignore[arg-type]
        assert (found["name"], found["inference_count"]) == ("double", 6)
        with pytest.raises(NotFound):
            await describe.statistics(few, "gone", everywhere=everywhere)  # type: ignore[arg-type]

        async def none() -> Counts:
            return []

        (found,) = await describe.statistics(few, everywhere=none)  # type: ignore[arg-type]
        assert found["inference_count"] == 0

    asyncio.run(run())
