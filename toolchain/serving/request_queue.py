"""The queue of one version of a model: by priority, first come first served within one, and left from anywhere."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import OrderedDict
from collections.abc import Hashable, Iterator

from toolchain.serving.base import Request, Response

Shapes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(slots=True, eq=False)
class Waiting:
    """A request in the queue, or in a batch that runs.

    Attributes:
        request: what is asked.
        rows: of its inputs; 1 where the model has no batch axis.
        key: requests with equal keys may go together (``padding.Layout.key``).
        shapes: of its inputs, in their order.
        level: 0 is served first.
        received_ns: when its first byte was handled.
        queued_ns: when it came into the queue; latency that is promised is counted from here, since how long a
            client takes to send its request is not the server's doing.
        deadline_ns: when it need not be run any more.
        answer: what the client waits for.
        timer: ends the wait at its deadline.
    """

    request: Request
    rows: int
    key: Hashable
    shapes: Shapes
    level: int
    received_ns: int
    queued_ns: int
    deadline_ns: int | None
    answer: asyncio.Future[Response]
    timer: asyncio.TimerHandle | None = None

    def expired(self, now: int) -> bool:
        """Whether its deadline has passed."""
        return self.deadline_ns is not None and self.deadline_ns <= now


class Queue:
    """Requests in the order in which they are served.

    Args:
        levels: how many priorities there are.
    """

    def __init__(self, levels: int) -> None:
        # Ordered dicts are linked lists with an index: whoever gives up leaves from the middle at once.
        self._levels = [OrderedDict[Waiting, None]() for _ in range(levels)]
        self._rows = [0] * levels
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Waiting]:
        for level in self._levels:
            yield from level

    def level(self, priority: int) -> int:
        """The level of a request's priority: 1 is the first, and what is none is the last, as Triton has it."""
        return priority - 1 if 1 <= priority <= len(self._levels) else len(self._levels) - 1

    def rows(self, level: int | None = None) -> int:
        """Rows that wait: all, or those that are served before a new request of a level."""
        return sum(self._rows if level is None else self._rows[: level + 1])

    def enter(self, waiting: Waiting) -> None:
        """Puts it behind all others of its level."""
        self._levels[waiting.level][waiting] = None
        self._rows[waiting.level] += waiting.rows
        self._length += 1

    def leave(self, waiting: Waiting) -> bool:
        """Takes it out, from wherever it is, and stops its timer; False where it is not in here any more."""
        level = self._levels[waiting.level]
        if waiting not in level:
            return False
        del level[waiting]
        self._rows[waiting.level] -= waiting.rows
        self._length -= 1
        if waiting.timer is not None:
            waiting.timer.cancel()
        return True

    def last_below(self, level: int) -> Waiting | None:
        """Who would be served last of all that come after a level; None where nobody does."""
        below = next((found for found in reversed(self._levels[level + 1 :]) if found), None)
        return next(reversed(below)) if below else None
