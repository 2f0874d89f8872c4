"""The statistics of several workers as those of one server.

Clients take differences of two answers (perf_analyzer finds the version that it measured by what has grown), and each
answer may come from another worker: so all tell the same sum, and what a worker counted that has gone stays in it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

#: Those of one worker, as ``describe.statistics`` has them.
Counts = list[dict[str, Any]]


class Combined:
    """The sum, and what workers counted that have gone."""

    def __init__(self) -> None:
        self._gone: Counts = []

    def retire(self, counts: Counts) -> None:
        """Keeps the counts of a worker that has gone."""
        self._gone = summed([self._gone, counts])

    def of(self, parts: Iterable[Counts]) -> Counts:
        """Those of all workers that run, and of those before them."""
        return summed([self._gone, *parts])


def summed(parts: Iterable[Counts]) -> Counts:
    """Counts of several workers as those of one, by model and version."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for part in parts:
        for entry in part:
            key = (entry["name"], entry["version"])
            found[key] = _sum(found[key], entry) if key in found else copy.deepcopy(entry)
    return list(found.values())


def _sum(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Numbers are added, but for the time of the last inference; batches are one for each size."""
    made: dict[str, Any] = {}
    for name, value in one.items():
        match value:
            case int() if name == "last_inference":
                made[name] = max(value, other[name])
            case int() if name != "batch_size":
                made[name] = value + other[name]
            case dict():
                made[name] = _sum(value, other[name])
            case list() if name == "batch_stats":
                sizes = {batch["batch_size"]: batch for batch in value}
                for batch in other[name]:
                    size = batch["batch_size"]
                    sizes[size] = _sum(sizes[size], batch) if size in sizes else batch
                made[name] = [sizes[size] for size in sorted(sizes)]
            case _:
                made[name] = value
    return made
