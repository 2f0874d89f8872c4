"""How batches adapt: on a clock of our own, with a model whose times are known exactly."""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import math
import random
from collections.abc import Callable

import pytest
from serving_support import Scripted, make, request

from toolchain.serving.adaptive import Controller, Pace
from toolchain.serving.base import Overloaded, Response
from toolchain.serving.options import Batching

MS = 1_000_000


def linear(base: float, row: float) -> Callable[[int], int]:
    """A run of n rows takes base + row · n milliseconds."""
    return lambda rows: int((base + row * rows) * MS)


def controller(*, most: int = 64, slo: float | None = None, **batching: int) -> Controller:
    return Controller(Batching(**batching), max_batch_size=most, slo_p99_ms=slo)  # type: ignore[arg-type]


@dataclasses.dataclass
class Outcome:
    """What came of a simulated load: latencies, milliseconds, and how many were refused."""

    latencies: list[float]
    refused: int
    seconds: float
    batches: list[int]

    def goodput(self, slo: float) -> float:
        return sum(latency <= slo for latency in self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        return sorted(self.latencies)[math.ceil(share * len(self.latencies)) - 1]


def simulate(
    adapt: Controller, takes: Callable[[int], int], *, rate: float, seconds: float, seed: int = 0, start: float = 0.0
) -> Outcome:
    """One instance of a model, requests of one row with Poisson arrivals, in simulated time.

    It follows the batcher: a free instance takes what waits, up to what the controller says.
    """
    rng = random.Random(seed)
    arrivals, now = [], start * 1e9
    while now < (start + seconds) * 1e9:
        now += rng.expovariate(rate) * 1e9
        arrivals.append(int(now))
    events = [(time, 0) for time in arrivals]
    heapq.heapify(events)
    waiting: list[int] = []
    running: tuple[int, list[int]] | None = None
    done = Outcome([], 0, seconds, [])
    while events:
        clock, kind = heapq.heappop(events)
        if kind:
            assert running is not None
            began, batch = running
            adapt.ran(len(batch), clock - began)
            adapt.answered(batch, clock)
            done.latencies += [(clock - came) / MS for came in batch]
            running = None
        else:
            late = False
            if running or waiting:
                busy = (len(running[1]), clock - running[0]) if running else (0, 0)
                late = adapt.has_slo and adapt.too_late(adapt.wait_ns(len(waiting), *busy), 1)
            if late or len(waiting) >= 1024:
                done.refused += 1
            else:
                waiting.append(clock)
        if running is None and waiting:
            size = min(len(waiting), adapt.look(len(waiting)))
            running = (clock, waiting[:size])
            done.batches.append(size)
            del waiting[:size]
            heapq.heappush(events, (clock + takes(size), 1))
    return done


def test_pace_is_the_median_and_lies_between_what_was_measured() -> None:
    pace = Pace((1, 2, 4, 8))
    assert pace.predict(3) == 0
    pace.add(2, 10)
    assert [pace.predict(rows) for rows in (1, 2, 4)] == [10, 10, 20]  # one size is known: more rows in proportion
    for ns in (18, 18, 18, 18, 9999):
        pace.add(8, ns)
    assert pace.predict(8) == 18
    assert pace.predict(5) == 14
    assert pace.predict(16) == pytest.approx(18 + 8 * 8 / 6)
    pace.add(6, 21)  # counts for four rows, in proportion
    assert pace.predict(4) == 14
    assert not pace.known(4)
    pace.add(4, 14)
    assert pace.known(4)


def test_a_size_that_takes_less_than_a_smaller_one_predicts_no_less_for_larger() -> None:
    pace = Pace((1, 2, 4))
    pace.add(1, 30)
    pace.add(2, 20)
    assert pace.predict(4) == 20


@pytest.mark.parametrize(
    ("takes", "best"),
    [
        (linear(10, 0.1), 64),  # a run costs much, a row little
        (linear(0, 3), 1),  # nothing is won
        (linear(1, 1), 24),  # 24 of 25 is 0.975 of 64 of 65, and 16 of 17 is 0.956
        (lambda rows: int(rows * (1.0 if rows < 8 else 1.6) * MS), 1),
        (lambda rows: int((4 + rows) * (1 if rows <= 8 else 3) * MS), 8),  # falls out of a cache beyond 8
    ],
)
def test_under_load_it_finds_the_smallest_size_with_nearly_the_most_throughput(
    takes: Callable[[int], int], best: int
) -> None:
    adapt = controller()
    full = max(rows / takes(rows) for rows in (1, 2, 4, 8, 16, 32, 64)) * 1e9
    outcome = simulate(adapt, takes, rate=2 * full, seconds=4000 / full)
    assert adapt.limit(1 << 20) == best
    assert len(outcome.latencies) / outcome.seconds >= 0.9 * full


def test_light_load_is_answered_at_once() -> None:
    takes = linear(5, 1)
    outcome = simulate(controller(), takes, rate=20, seconds=60)
    assert outcome.percentile(0.5) <= 6.01
    assert outcome.refused == 0


def test_it_follows_a_model_that_changes() -> None:
    adapt = controller()
    simulate(adapt, linear(10, 0.1), rate=8000, seconds=5)
    assert adapt.limit(1 << 20) == 64
    simulate(adapt, linear(0, 2), rate=1000, seconds=20)
    assert adapt.limit(1 << 20) <= 2
    simulate(adapt, linear(10, 0.1), rate=4500, seconds=50)
    assert adapt.limit(1 << 20) >= 32


@pytest.mark.parametrize(("takes", "slo"), [(linear(2, 1), 50.0), (linear(5, 0.2), 30.0), (linear(0, 4), 40.0)])
def test_with_an_slo_goodput_at_twice_the_load_is_that_of_full_load(takes: Callable[[int], int], slo: float) -> None:
    # The most that any batch size could give within the SLO: a request waits for one run and takes part in one.
    most = max(rows / takes(rows) * 1e9 for rows in range(1, 65) if 2 * takes(rows) <= slo * MS)
    at = {
        load: simulate(controller(slo=slo), takes, rate=load * most, seconds=20) for load in (0.5, 0.8, 1.0, 2.0, 5.0)
    }
    best = max(outcome.goodput(slo) for outcome in at.values())
    assert at[2.0].goodput(slo) >= 0.9 * best
    assert at[5.0].goodput(slo) >= 0.9 * best
    assert best >= 0.8 * most  # at most 0.9 of the SLO is planned with, and sizes are a grid
    for load in (0.5, 0.8, 1.0, 2.0):
        assert at[load].percentile(0.99) <= slo, load
    assert at[0.5].refused <= 0.01 * len(at[0.5].latencies)
    # Without one the queue fills, and what comes out of it is late.
    assert simulate(controller(), takes, rate=2 * most, seconds=20).goodput(slo) < 0.2 * best


def test_noise_in_the_model_tightens_the_plan_until_the_tail_holds() -> None:
    rng = random.Random(5)
    noisy: Callable[[int], int] = lambda rows: int((2 + rows) * rng.choice((1.0, 1.0, 1.0, 1.7)) * MS)  # noqa: E731
    adapt = controller(slo=50.0)
    simulate(adapt, noisy, rate=900, seconds=60)
    outcome = simulate(adapt, noisy, rate=900, seconds=60, seed=1, start=60)
    assert outcome.percentile(0.99) <= 50.0
    assert outcome.goodput(50.0) >= 300


def test_late_answers_cut_the_share_once_and_it_comes_back() -> None:
    adapt = controller(slo=10.0)
    adapt.answered([100 * MS] * 64, 111 * MS)
    assert adapt._share == pytest.approx(0.8 * 0.8)
    # They came before the cut: it could not have helped them.
    adapt.answered([105 * MS] * 64, 120 * MS)
    assert adapt._share == pytest.approx(0.8 * 0.8)
    adapt.answered([112 * MS], 130 * MS)
    assert adapt._share == pytest.approx(0.8 * 0.8 * 0.96)
    for n in range(2, 50):
        adapt.answered([n * 100 * MS] * 64, (n * 100 + 11) * MS)
    assert adapt._share == 0.5
    for _ in range(5000):
        adapt.answered([9000 * MS], 9001 * MS)
    assert adapt._share == 0.9


def test_a_delay_has_room_within_the_slo_or_is_cut() -> None:
    adapt = controller(slo=20.0, max_queue_delay_us=5000)
    assert adapt.delay_ns == 5 * MS
    for _ in range(9):
        adapt.ran(1, 7 * MS)
    assert adapt.delay_ns == pytest.approx((0.8 * 20 - 14) * MS)
    for _ in range(9):
        adapt.ran(1, 9 * MS)
    assert adapt.delay_ns == 0


def test_memory_pressure_cuts_batches_and_gives_them_back() -> None:
    adapt = controller(most=48)
    for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48):
        for _ in range(3):
            adapt.ran(size, MS)
    assert adapt.limit(100) == 48
    adapt.shrink(0.25)
    assert (adapt.cap, adapt.limit(100)) == (12, 12)
    adapt.shrink(0.01)
    assert (adapt.cap, adapt.limit(100)) == (1, 1)
    for _ in range(9):
        adapt.grow()
    assert (adapt.cap, adapt.limit(100)) == (48, 48)


def test_preferred_sizes_are_taken_at_their_word() -> None:
    adapt = Controller(Batching(preferred_batch_size=(4, 8, 200)), max_batch_size=64)
    for size in (1, 2, 4, 8, 16):
        for _ in range(3):
            adapt.ran(size, size * MS)
    assert adapt.preferred == (4, 8)
    assert adapt.limit(100) == 8
    adapt.shrink(0.1)
    assert adapt.limit(100) == 4


def test_a_real_queue_refuses_what_would_be_late_and_what_would_miss_its_deadline() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session, most=2, slo_p99_ms=100.0, known={1: 30 * MS, 2: 30 * MS}, queue_size=100)
        tasks = [asyncio.create_task(loaded.infer(request(float(n)))) for n in range(20)]
        while not session.started.is_set():
            await asyncio.sleep(0.001)
        refused = [task for task in tasks if task.done() and isinstance(task.exception(), Overloaded)]
        # 80 ms are planned with: two run and two wait (30 + 30), and two more would be answered after 90.
        assert 14 <= len(refused) <= 17
        assert "send it again in" in str(refused[0].exception())
        session.gate.set()
        answers = [answer for answer in await asyncio.gather(*tasks, return_exceptions=True)]
        assert sum(isinstance(answer, Response) for answer in answers) == 20 - len(refused)
        assert loaded.statistics.failures == {"REJECTED": len(refused)}

    asyncio.run(scene())


def test_a_deadline_that_the_queue_cannot_meet_is_refused_at_once_without_an_slo() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session, most=1, known={1: 1000 * MS})
        first = asyncio.create_task(loaded.infer(request()))
        while not session.started.is_set():
            await asyncio.sleep(0.001)
        hurried = request()
        hurried.deadline_ns = hurried.received_ns + 500 * MS
        with pytest.raises(Overloaded, match="beyond its deadline"):
            await loaded.infer(hurried)
        session.gate.set()
        await first

    asyncio.run(scene())
