"""The search on made-up losses, where the best answer is known; and the ranking on a graph with one bad layer."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from toolchain.budget import search

NAMES = tuple(f"layer{n}" for n in range(64))


def additive(costs: dict[str, float]) -> tuple[list[tuple[str, ...]], object]:
    asked: list[tuple[str, ...]] = []

    def evaluate(excluded: tuple[str, ...]) -> float:
        asked.append(excluded)
        return sum(cost for name, cost in costs.items() if name not in excluded)

    return asked, evaluate


def test_nothing_to_do_takes_one_evaluation() -> None:
    asked, evaluate = additive(dict.fromkeys(NAMES, 0.0001))
    found = search(NAMES, evaluate, 0.01)  # type: ignore[arg-type]
    assert (found.met, found.excluded, asked) == (True, (), [()])


@pytest.mark.parametrize("bad", [1, 2, 5, 13])
def test_the_bad_layers_and_no_others(bad: int) -> None:
    costs = {name: (0.1 if index < bad else 0.00001) for index, name in enumerate(NAMES)}
    asked, evaluate = additive(costs)
    found = search(NAMES, evaluate, 0.01)  # type: ignore[arg-type]
    assert found.met
    assert found.excluded == NAMES[:bad]
    assert found.full_drop == pytest.approx(0.1 * bad, rel=0.05)
    assert len(asked) <= 2 * math.log2(len(NAMES)) + 12


def test_what_the_ranking_put_there_for_nothing_is_taken_off() -> None:
    costs = dict.fromkeys(NAMES, 0.0) | {NAMES[0]: 0.1, NAMES[5]: 0.1}
    _, evaluate = additive(costs)
    assert set(search(NAMES, evaluate, 0.05).excluded) == {NAMES[0], NAMES[5]}  # type: ignore[arg-type]


def test_a_budget_that_cannot_be_met_says_so() -> None:
    asked, evaluate = additive(dict.fromkeys(NAMES, 1.0))
    found = search(NAMES, lambda excluded: evaluate(excluded) + 1, 0.5)  # type: ignore[operator]
    assert not found.met
    assert found.drop == 1
    assert len(asked) < len(NAMES)


def test_no_evaluation_is_made_twice() -> None:
    rng = np.random.default_rng(0)
    for costs in ({n: float(c) for n, c in zip(NAMES, rng.exponential(0.01, 64), strict=True)} for _ in range(20)):
        ranked = sorted(costs, key=lambda name: -costs[name])
        asked, evaluate = additive(costs)
        found = search(ranked, evaluate, 0.2)  # type: ignore[arg-type]
        assert len(set(asked)) == len(asked)
        assert len(asked) < 25
        # with a true ranking of independent costs the shortest prefix is the smallest set there is
        remaining = list(itertools.accumulate([sum(costs.values())] + [-costs[name] for name in ranked]))
        assert len(found.excluded) <= next(k for k, left in enumerate(remaining) if left <= 0.2)


def test_a_budget_that_only_almost_everything_in_float_meets() -> None:
    """With all in float nothing is left to quantise, which is no answer; with all but the last it is one."""
    names = [f"n{i}" for i in range(30)]

    def evaluate(excluded: tuple[str, ...]) -> float:
        return math.inf if len(excluded) == 30 else float(30 - len(excluded))

    found = search(names, evaluate, 1.0)
    assert found.met
    assert found.excluded == tuple(names[:29])
    unmet = search(names, evaluate, 0.5)
    assert not unmet.met
    assert unmet.drop == 1.0
    assert len(unmet.trials) <= 12
