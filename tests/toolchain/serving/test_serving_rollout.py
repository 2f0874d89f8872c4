"""When a version on trial has passed or failed: by what its requests show, and not by chance."""

from __future__ import annotations

import random

import pytest

from toolchain.serving.options import Rollout
from toolchain.serving.rollout import WINDOW, Trial, Window, _bounds

S = 1_000_000_000
MS = 1_000_000


def old_window(count: int = WINDOW, *, failing: float = 0.0, seed: int = 1) -> Window:
    window = Window()
    rng = random.Random(seed)
    for _ in range(count):
        if rng.random() < failing:
            window.failed()
        else:
            window.answered(latency(rng))
    return window


def latency(rng: random.Random) -> int:
    return int(rng.lognormvariate(0.0, 0.5) * 5 * MS)


@pytest.mark.parametrize(("hits", "count"), [(4, 100), (0, 100), (1, 1), (57, 2000), (2000, 2000)])
def test_wilsons_interval(hits: int, count: int) -> None:
    """Its ends are the shares p from which what was seen is just z standard deviations away."""
    lower, upper = _bounds(hits, count)
    assert -1e-12 <= lower - 1e-12 <= hits / count <= upper + 1e-12 <= 1 + 1e-12
    for p in (lower, upper):
        assert (p - hits / count) ** 2 == pytest.approx(2.326**2 * p * (1 - p) / count, abs=1e-12)
    assert _bounds(0, 0) == (0.0, 1.0)


def test_a_window_slides() -> None:
    window = Window()
    for _ in range(10):
        window.failed()
    for i in range(WINDOW - 5):
        window.answered(i)
    assert (window.failures, window.count) == (5, WINDOW)
    for _ in range(WINDOW):
        window.answered(7)
    assert (window.failures, window.p99_ns(), window.slower_than(6), window.slower_than(7)) == (0, 7, WINDOW, 0)
    assert old_window(99).p99_ns() is None
    hundred = Window()
    for i in range(100):
        hundred.answered(i)
    assert hundred.p99_ns() == 98


def test_a_good_version_passes_after_time_and_requests() -> None:
    trial = Trial(Rollout(trial_seconds=10, trial_requests=50), old=old_window(), now_ns=0)
    rng = random.Random(2)
    for _ in range(49):
        trial.answered(latency(rng))
    assert trial.verdict(60 * S) is None
    trial.answered(latency(rng))
    assert trial.verdict(9 * S) is None
    verdict = trial.verdict(10 * S)
    assert verdict is not None
    assert verdict.passed


def test_equals_are_seldom_told_apart() -> None:
    """The test is asked again and again, so its 1 % becomes more; but a good version has to get through."""
    failed = 0
    for seed in range(60):
        rng = random.Random(seed)
        trial = Trial(Rollout(trial_seconds=0, trial_requests=1000), old=old_window(seed=seed, failing=0.005), now_ns=0)
        verdict = None
        while verdict is None:
            for _ in range(50):
                if rng.random() < 0.005:
                    trial.failed()
                else:
                    trial.answered(latency(rng))
            verdict = trial.verdict(0)
        failed += not verdict.passed
    assert failed <= 3


def test_errors_end_a_trial_early() -> None:
    trial = Trial(Rollout(trial_requests=10_000), old=old_window(), now_ns=0)
    for _ in range(2):
        trial.failed()
    assert trial.verdict(0) is None  # might be the request's fault
    trial.failed()
    verdict = trial.verdict(0)
    assert verdict is not None
    assert not verdict.passed
    assert "3 of 3 requests failed" in verdict.why


def test_an_error_rate_that_is_allowed_passes_and_one_that_is_not_does_not() -> None:
    for share, passes in ((0.02, True), (0.15, False)):
        rng = random.Random(3)
        trial = Trial(Rollout(trial_seconds=0, trial_requests=500, max_error_rate=0.05), old=old_window(), now_ns=0)
        verdict = None
        while verdict is None:
            trial.failed() if rng.random() < share else trial.answered(latency(rng))
            verdict = trial.verdict(0)
        assert verdict.passed is passes


def test_what_the_old_version_suffers_from_too_is_not_the_new_ones_fault() -> None:
    rng = random.Random(4)
    trial = Trial(Rollout(trial_seconds=0, trial_requests=500), old=old_window(failing=0.2), now_ns=0)
    for _ in range(500):
        trial.failed() if rng.random() < 0.2 else trial.answered(latency(rng))
    verdict = trial.verdict(0)
    assert verdict is not None
    assert verdict.passed


def test_a_slower_version_is_found_out() -> None:
    old = old_window()
    p99 = old.p99_ns()
    assert p99 is not None
    trial = Trial(Rollout(trial_requests=10_000, max_p99_ratio=2.0), old=old, now_ns=0)
    for _ in range(96):
        trial.answered(5 * MS)
    for _ in range(3):
        trial.answered(3 * p99)
    assert trial.verdict(0) is None
    trial.answered(3 * p99)
    verdict = trial.verdict(0)
    assert verdict is not None
    assert "4 of 100 requests took more than 2 times" in verdict.why
    indifferent = Trial(Rollout(trial_requests=10_000, max_p99_ratio=None), old=old, now_ns=0)
    for _ in range(100):
        indifferent.answered(3 * p99)
    assert indifferent.verdict(0) is None


def test_a_version_that_never_answers_is_found_out() -> None:
    old = old_window()
    trial = Trial(Rollout(), old=old, now_ns=0)
    for i in range(3):
        trial.running[i] = 0
    assert trial.verdict(1) is None
    verdict = trial.verdict(10 * S)
    assert verdict is not None
    assert not verdict.passed


def test_without_an_old_percentile_latency_is_not_judged() -> None:
    trial = Trial(Rollout(trial_seconds=0, trial_requests=200), old=old_window(99), now_ns=0)
    for _ in range(200):
        trial.answered(100 * S)
    verdict = trial.verdict(0)
    assert verdict is not None
    assert verdict.passed


def test_the_share_of_a_canary() -> None:
    trial = Trial(Rollout(canary=0.2), old=Window(), now_ns=0, seed=5)
    assert trial.mode == "canary"
    assert 1850 < sum(trial.takes() for _ in range(10_000)) < 2150
    assert not any(Trial(Rollout(shadow=True), old=Window(), now_ns=0).takes() for _ in range(100))
    assert all(Trial(Rollout(), old=Window(), now_ns=0).takes() for _ in range(100))
