"""The accuracy budget: the smallest set of layers that has to stay in float, found in few evaluations.

Layers are ranked by ``sensitivity.py``. The number of the worst ones to leave in float is bisected, which takes
log2(n) evaluations; what the ranking put on the list for nothing is then taken off again, half by half, as long as
the budget holds (delta debugging, Zeller and Hildebrandt 2002), within a fixed number of evaluations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

#: Most evaluations that taking layers off the list again may cost: so many, and one for so many layers.
_MOST_TRIMS = 12
_LAYERS_A_TRIM = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One evaluation: which nodes were in float, and what was lost."""

    excluded: tuple[str, ...]
    drop: float


@dataclasses.dataclass(frozen=True, slots=True)
class BudgetSearch:
    """What was found.

    Attributes:
        met: whether ``excluded`` meets the budget.
        excluded: the nodes to leave in float, the worst first.
        drop: what is lost with them in float, in the metric's unit.
        full_drop: what is lost with everything quantised.
        trials: all evaluations, in order.
    """

    met: bool
    excluded: tuple[str, ...]
    drop: float
    full_drop: float
    trials: tuple[Trial, ...]


def search(ranked: Sequence[str], evaluate: Callable[[tuple[str, ...]], float], max_drop: float) -> BudgetSearch:
    """Finds a small set of nodes to leave in float so that no more than ``max_drop`` is lost.

    Args:
        ranked: all nodes that may be left in float, the most harmful first.
        evaluate: what is lost when these nodes are in float; smaller is better. Infinity where nothing is left to
            quantise then.
        max_drop: the budget, in the same unit.
    """
    trials: list[Trial] = []

    def drop(excluded: tuple[str, ...]) -> float:
        for trial in trials:
            if trial.excluded == excluded:
                return trial.drop
        trials.append(Trial(excluded, evaluate(excluded)))
        return trials[-1].drop

    def found(excluded: tuple[str, ...]) -> BudgetSearch:
        return BudgetSearch(drop(excluded) <= max_drop, excluded, drop(excluded), trials[0].drop, tuple(trials))

    if drop(()) <= max_drop:
        return found(())
    # Grow first: a few bad layers are the common case, and every evaluation of a short list is of a fast model.
    low, high, most = 0, 0, len(ranked) + 1
    while not high:
        if most - low <= 1:
            return found(tuple(ranked[:low]))
        count = min(2 * low or 1, (low + most) // 2)
        lost = drop(tuple(ranked[:count]))
        if lost <= max_drop:
            high = count
        elif math.isinf(lost):
            most = count
        else:
            low = count
    while high - low > 1:
        middle = (low + high) // 2
        if drop(tuple(ranked[:middle])) > max_drop:
            low = middle
        else:
            high = middle
    trims = min(_MOST_TRIMS, math.ceil(len(ranked) / _LAYERS_A_TRIM))
    return found(_trim(tuple(ranked[:high]), drop, max_drop, len(trials) + trims, trials))


def _trim(
    excluded: tuple[str, ...],
    drop: Callable[[tuple[str, ...]], float],
    max_drop: float,
    limit: int,
    trials: Sequence[Trial],
) -> tuple[str, ...]:
    """Takes nodes off the list in ever smaller pieces, the least harmful first, while the budget holds."""
    size = len(excluded) // 2
    while size >= 1 and len(trials) < limit:
        start = len(excluded) - size
        while start >= 0 and len(trials) < limit:
            shorter = excluded[:start] + excluded[start + size :]
            if shorter != excluded and drop(shorter) <= max_drop:
                excluded = shorter
            start -= size
        size //= 2
    return excluded
