"""The minimum cut of a small graph (Ford and Fulkerson 1956, shortest augmenting paths: Edmonds and Karp 1972)."""

from __future__ import annotations

import collections
import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

N = TypeVar("N", bound=Hashable)

#: Below this, what is left of a capacity is a rounding error.
_LEAST = 1e-12


def minimum_cut(capacities: Mapping[tuple[N, N], float], source: N, sink: N) -> set[N]:
    """The nodes on the source's side of a cut whose edges, from that side to the other, have the least sum.

    Args:
        capacities: of each directed edge, >= 0; infinity is never cut. There must be a finite cut.
        source, sink: the nodes to be parted.
    """
    left: dict[N, dict[N, float]] = collections.defaultdict(dict)
    for (a, b), capacity in capacities.items():
        left[a][b] = left[a].get(b, 0.0) + capacity
        left[b].setdefault(a, 0.0)
    while True:
        before: dict[N, N] = {source: source}
        waiting = collections.deque([source])
        while waiting and sink not in before:
            node = waiting.popleft()
            for other, capacity in left[node].items():
                if capacity > _LEAST and other not in before:
                    before[other] = node
                    waiting.append(other)
        if sink not in before:
            return set(before)
        path = [sink]
        while path[-1] != source:
            path.append(before[path[-1]])
        steps = list(zip(path[1:], path[:-1], strict=True))
        flow = min(left[a][b] for a, b in steps)
        if math.isinf(flow):
            raise ValueError("no finite cut parts the two")
        for a, b in steps:
            left[a][b] -= flow
            left[b][a] += flow
