"""Sessions give back what their largest batches took: when nothing runs, when little runs, and when memory is short."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from versions_support import request, serving, until, write_artifact

from toolchain.serving import memory, trimming
from toolchain.serving.models import Models
from toolchain.serving.options import ModelOptions, Rollout
from toolchain.serving.trimming import IDLE_S, WINDOW_S, Kept

MB = 1 << 20
#: y = 2 x, by way of a megabyte for each row that changes nothing.
WIDE = """g (float[n, 2] x) => (float[n, 2] y) <float two = {2.0}, float zero = {0.0}, int64[2] wide = {1, 262144}>
{ m = ReduceMean <axes = [1], keepdims = 1> (x) e = Expand(m, wide) s = Sin(e)
  r = ReduceMax <axes = [1], keepdims = 1> (s) z = Mul(r, zero) d = Mul(x, two) y = Add(d, z) }"""
AT_ONCE = ModelOptions(rollout=Rollout(trial_seconds=0, trial_requests=0))
MANY = np.ones((64, 2), np.float32)


def test_given_back_when_nothing_ran_for_a_while_and_only_once() -> None:
    kept = Kept()
    assert not kept.due(0.0, running=False)
    kept.ran(100)
    assert not kept.due(1.0, running=False)
    assert not kept.due(1.0 + 0.9 * IDLE_S, running=False)
    kept.ran(1)
    assert not kept.due(1.0 + 1.1 * IDLE_S, running=False)
    assert kept.due(1.0 + 2.2 * IDLE_S, running=False)
    assert kept.due(1.0 + 2.3 * IDLE_S, running=False), "it was not done yet"
    kept.given_back(1.0 + 2.3 * IDLE_S)
    assert not kept.due(100 * IDLE_S, running=False)


def ticks(kept: Kept, sizes: Callable[[int], int], seconds: float, start: float) -> list[float]:
    """Runs of these sizes, each second; when something was given back."""
    found = []
    for second in range(int(seconds)):
        if size := sizes(second):
            kept.ran(size)
        if kept.due(start + second, running=False):
            kept.given_back(start + second)
            found.append(start + second)
    return found


def test_given_back_when_all_that_runs_is_much_smaller() -> None:
    kept = Kept()
    assert ticks(kept, lambda _: 100, 3 * WINDOW_S, 0.0) == [], "what is needed is kept"
    given = ticks(kept, lambda _: 50, 4 * WINDOW_S, 1000.0)
    assert len(given) == 1, "and then what is kept is what is needed"
    assert 1000 + WINDOW_S <= given[0] <= 1000 + 2 * WINDOW_S
    assert ticks(kept, lambda _: 51, 4 * WINDOW_S, 2000.0) == []
    assert ticks(kept, lambda second: 1 if second % 20 else 102, 6 * WINDOW_S, 3000.0) == [], "large ones come often"


def test_a_run_that_takes_long_is_not_idleness_and_what_it_took_is_given_back_after_it() -> None:
    kept = Kept()
    kept.ran(100)
    now = 0.0
    while now < 0.9 * WINDOW_S:  # one run, which takes longer than a server may be idle
        assert not kept.due(now, running=True)
        now += IDLE_S / 4
    kept.given_back(now)  # memory was short, and the run went on
    for _ in range(20):
        assert not kept.due(now, running=True)
        now += WINDOW_S
    kept.ran(100)
    assert not kept.due(now, running=False)
    assert kept.due(now + IDLE_S, running=False)


async def held(models: Models) -> int:
    """What a batch of many rows leaves behind, bytes."""
    await models.infer(request("a"))
    before = memory.resident_bytes()
    response = await models.infer(request("a", x=MANY))
    assert (response.outputs["y"] == 2).all()
    return memory.resident_bytes() - before


@pytest.fixture
def proved(tmp_path: Path) -> Path:
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is read from /proc")
    write_artifact(tmp_path / "m" / "a" / "1", graph=WIDE)
    return tmp_path / "m"


@pytest.mark.parametrize(("idle", "window"), [(0.3, 1e9), (1e9, 0.3)], ids=["idle", "small"])
def test_memory_of_a_large_batch_is_given_back(
    proved: Path, monkeypatch: pytest.MonkeyPatch, idle: float, window: float
) -> None:
    monkeypatch.setattr(trimming, "IDLE_S", idle)
    monkeypatch.setattr(trimming, "WINDOW_S", window)

    async def run() -> None:
        async with serving(proved, defaults=AT_ONCE) as models:
            before = memory.resident_bytes()
            assert await held(models) > 100 * MB, "the test proves nothing"
            end = time.monotonic() + 10
            while memory.resident_bytes() - before > 30 * MB:
                assert time.monotonic() < end, f"{(memory.resident_bytes() - before) / MB} MB are kept"
                if idle > 1e6:
                    await models.infer(request("a"))
                await asyncio.sleep(0.02)
            await until(lambda: models.resources()["trims"] >= 1)
            assert await held(models) > 100 * MB, "and taken again"

    asyncio.run(run())


def test_nothing_is_given_back_between_batches(proved: Path) -> None:
    async def run() -> None:
        async with serving(proved, defaults=AT_ONCE) as models:
            await held(models)
            await asyncio.sleep(0.8)  # three looks at memory
            assert models.resources()["trims"] == 0

    asyncio.run(run())


def test_memory_that_is_short_is_given_back_before_anybody_is_evicted(
    proved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolchain.serving.models._TICK_S", 0.01)
    monkeypatch.setattr("toolchain.serving.relief._STEP_S", 0.1)
    used = [0]
    allowed = memory.resident_bytes() + 1000 * MB

    async def run() -> None:
        async with serving(
            proved, defaults=AT_ONCE, max_memory=allowed, resident=lambda: used[0] or memory.resident_bytes()
        ) as models:
            before = memory.resident_bytes()
            assert await held(models) > 100 * MB
            used[0] = round(0.87 * allowed)
            await until(lambda: models.resources()["trims"] >= 1)
            await until(lambda: memory.resident_bytes() - before < 30 * MB)
            assert models.resources()["evictions"] == 0
            assert (await models.infer(request("a"))).version == "1"

    asyncio.run(run())


def test_a_run_that_is_longer_than_idleness_keeps_its_memory_until_it_ends(
    proved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolchain.serving.models._TICK_S", 0.01)
    monkeypatch.setattr(trimming, "IDLE_S", 0.1)

    async def run() -> None:
        async with serving(proved, defaults=AT_ONCE) as models:
            loaded = models.loaded("a")
            assert loaded is not None
            await until(lambda: not loaded.keeps_too_much(time.monotonic()))
            before, run = models.resources()["trims"], loaded.session.run

            def slow(feeds: object) -> object:
                answer = run(feeds)  # type: ignore[arg-type]
                time.sleep(0.5)
                return answer

            monkeypatch.setattr(loaded.session, "run", slow)
            asked = asyncio.create_task(models.infer(request("a", x=MANY)))
            await asyncio.sleep(0.4)
            assert not asked.done()
            assert models.resources()["trims"] == before
            await asked
            await until(lambda: models.resources()["trims"] > before)

    asyncio.run(run())


def test_a_session_that_fails_at_it_is_told_and_goes_on(proved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import runtimes

    monkeypatch.setattr(trimming, "IDLE_S", 0.1)
    tried = []

    async def run() -> None:
        async with serving(proved, defaults=AT_ONCE) as models:
            loaded = models.loaded("a")
            assert loaded is not None

            def fails() -> None:
                tried.append(1)
                raise runtimes.RunFailed("no")

            monkeypatch.setattr(loaded.session, "trim", fails)
            await models.infer(request("a", x=MANY))
            await until(lambda: bool(tried))
            await models.infer(request("a"))
            assert models.resources()["trims"] == 0

    asyncio.run(run())
