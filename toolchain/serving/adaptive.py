"""How many rows a batch may have, how long it may be waited for, and who is let in: from what runs took.

*What a run takes.* For each size of a batch (powers of two, and those that are preferred) the median of its last nine
runs is kept, from handing the batch to a thread to having its outputs: what a run costs beside the model counts too.
Between sizes it is interpolated: a run costs a + b·n about any n, but on real processors not with the same a and b
everywhere, since large batches fall out of the caches.

*Batch size.* The smallest size that gives at least 95 % of the most rows a second that any size gives: beyond it
latency and memory grow, and nothing is won. Sizes are found by use, as TCP's slow start finds a window: a size twice as
large as the largest known is tried when so many rows wait, until two doublings in a row have won nothing. Every 64th
full batch looks again at one of the other sizes, since machines and neighbours change. Where sizes are preferred by
the options, those are taken at their word: the largest that is allowed.

*With an SLO* a request that comes while a batch runs waits for the rest of that and then for its own, so a size is
allowed if twice its run fits into a share of the SLO. The share follows additive increase and multiplicative decrease,
as in Clipper (Crankshaw et al., NSDI 2017, section 4.3.1), but per request and with steps such that it settles where
about one request in 200 is late, for a 99th percentile that holds. The delay (as Triton's
``max_queue_delay_microseconds``) is what of it the rest of the share has room for.

*Admission.* A request is refused at once if its answer would come later than the share of the SLO, reckoned from what
runs now and who waits before it. A queue that only has a bound on its length grows under overload until every answer in
it is late: throughput stays, goodput is gone. Refused at the door, what is in the queue is in time, and batches stay
full. That is CoDel's insight (Nichols and Jacobson 2012), that the time in the queue is to be bounded and not its
length, but with the time known before it has passed, because the server knows what runs take.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from toolchain.serving.options import Batching

#: Runs of one size that its time is the median of.
_KEPT = 9
#: Runs of a size before it is compared with others: the first has to allocate.
_ENOUGH = 2
#: A larger size has to give more than so much more to be worth its latency and its memory.
_WORTH = 1 / 0.95
#: Full batches between two looks at another size.
_LOOK = 64
#: The share of the SLO that is planned with: where it begins, its bounds, and its steps for a request in time and a
#: late one. 0.0002 / 0.04: it stands still where one in 200 is late.
_SHARE, _LEAST_SHARE, _MOST_SHARE, _UP, _DOWN = 0.8, 0.5, 0.9, 0.0002, 0.04
#: The most that late requests of one batch take from the share: one stall is one event, however many it hit.
_MOST_DOWN = 0.8


class Pace:
    """What runs take, by rows.

    Args:
        sizes: ascending, beginning with 1; a run of another size counts as one of the next smaller.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self._runs: dict[int, deque[float]] = {}
        self._median: dict[int, float] = {}

    def add(self, rows: int, ns: int) -> None:
        """A run of ``rows`` rows that took ``ns`` nanoseconds."""
        size = next((size for size in reversed(self.sizes) if size <= rows), self.sizes[0])
        runs = self._runs.get(size)
        if runs is None:
            runs = self._runs[size] = deque(maxlen=_KEPT)
        runs.append(ns * size / rows)
        self._median[size] = statistics.median_low(runs)

    def known(self, size: int) -> bool:
        """Whether a size was run often enough to be compared with others."""
        return len(self._runs.get(size, ())) >= _ENOUGH

    def rate(self, size: int) -> float:
        """Rows a nanosecond at a known size."""
        return size / max(self._median[size], 1.0)

    def predict(self, rows: int) -> float | None:
        """Nanoseconds that a run of ``rows`` rows takes; None before the first run."""
        points = sorted(self._median.items())
        if not points:
            return None
        below = [point for point in points if point[0] <= rows]
        above = [point for point in points if point[0] >= rows]
        if not below:
            return above[0][1]
        if above:
            (few, short), (many, long) = below[-1], above[0]
            return short if many == few else short + (long - short) * (rows - few) / (many - few)
        few, short = below[-1]
        if len(below) == 1:
            return short * rows / few
        fewer, shorter = below[-2]
        # Each further row costs what the last ones cost: not less than nothing, and not more than a row on average.
        slope = min(max((short - shorter) / (few - fewer), 0.0), short / few)
        return short + slope * (rows - few)


class Controller:
    """Adapts one model's batches to what is measured.

    Args:
        batching: its options; those that bound are kept: no batch is larger and no wait longer than they say.
        max_batch_size: rows at most, as in ``ModelInfo``; 0 is batches of one request.
        slo_p99_ms: the latency to hold, from a request's arrival at the queue to its answer; None: the most throughput.
    """

    def __init__(self, batching: Batching, *, max_batch_size: int, slo_p99_ms: float | None = None) -> None:
        most = max(max_batch_size, 1)
        self._cap = self._most = most
        self._slo_ns = None if slo_p99_ms is None else slo_p99_ms * 1e6
        self._share = _SHARE
        self._delay_ns = batching.max_queue_delay_us * 1000
        self._instances = batching.instances
        #: the sizes that a batch is to have, ascending; none where the options prefer none
        self.preferred = tuple(sorted({size for size in batching.preferred_batch_size if size <= most}))
        self.pace = Pace(sorted({*(1 << power for power in range(most.bit_length())), *self.preferred, most}))
        self._full = 0

    @property
    def cap(self) -> int:
        """Rows that a batch may have at most, whatever was measured: fewer while memory is short."""
        return self._cap

    def shrink(self, share: float) -> None:
        """Cuts the largest batch to a share of what it is now, to one row at least."""
        self._cap = max(1, int(self._cap * share))

    def grow(self) -> None:
        """Doubles the largest batch, up to what the options say."""
        self._cap = min(self._most, self._cap * 2)

    def limit(self, waiting: int) -> int:
        """Rows for a batch now.

        Args:
            waiting: rows that could go into it.
        """
        allowed = self._allowed()
        if self.preferred:
            return max((size for size in self.preferred if size in allowed), default=allowed[-1])
        best = self._best(allowed)
        new = next((size for size in allowed if not self.pace.known(size)), None)
        if new is not None and new <= waiting and new in self._near(best):
            return new
        return best

    def look(self, waiting: int) -> int:
        """As ``limit``, for a batch that is run now: now and then another size, to see what it takes today."""
        limit = self.limit(waiting)
        if waiting < limit or self.preferred:
            return limit
        self._full += 1
        if self._full % _LOOK:
            return limit
        allowed = self._allowed()
        others = [size for size in self._near(limit) if size != limit and size <= waiting and size in allowed]
        return others[self._full // _LOOK % len(others)] if others else limit

    @property
    def has_slo(self) -> bool:
        """Whether there is a latency to hold."""
        return self._slo_ns is not None

    @property
    def delay_ns(self) -> int:
        """How long the first request of a batch may wait for others."""
        if self._slo_ns is None or not self._delay_ns:
            return self._delay_ns
        run = self.pace.predict(self._best(self._allowed())) or 0.0
        return int(min(self._delay_ns, max(0.0, self._share * self._slo_ns - 2 * run)))

    def ran(self, rows: int, ns: int) -> None:
        """A run of ``rows`` rows took ``ns`` nanoseconds, from handing it over to having its outputs."""
        self.pace.add(rows, ns)

    def answered(self, totals_ns: Sequence[int]) -> None:
        """The requests of one batch were answered, each so long after it came to the queue."""
        if self._slo_ns is None:
            return
        late = sum(total > self._slo_ns for total in totals_ns)
        if late:
            self._share *= max(_MOST_DOWN, (1 - _DOWN) ** late)
        self._share = min(max(self._share + _UP * (len(totals_ns) - late), _LEAST_SHARE), _MOST_SHARE)

    def wait_ns(self, ahead: int, running: int, running_ns: int) -> float:
        """How long a new request would wait until its own batch begins.

        Args:
            ahead: rows that wait before it.
            running: rows that run now, 0 where an instance is free.
            running_ns: how long they have.
        """
        limit = self.limit(ahead)
        whole = self.pace.predict(limit) or 0.0
        rest = max(0.0, (self.pace.predict(running) or 0.0) - running_ns) if running else 0.0
        return rest + ahead // limit * whole / self._instances

    def too_late(self, wait_ns: float, rows: int) -> bool:
        """Whether a request would be answered beyond the SLO.

        Args:
            wait_ns: as ``wait_ns`` says.
            rows: of the request.
        """
        if self._slo_ns is None:
            return False
        own = self.pace.predict(max(rows, self.limit(rows))) or 0.0
        return wait_ns + own > self._share * self._slo_ns

    def _allowed(self) -> list[int]:
        """Sizes within the cap and, with an SLO, within its share; at least the smallest."""
        found = [size for size in self.pace.sizes if size <= self._cap]
        if self._slo_ns is not None:
            budget = self._share * self._slo_ns
            found = [size for size in found if 2 * (self.pace.predict(size) or 0.0) <= budget]
        return found or [self.pace.sizes[0]]

    def _near(self, size: int) -> tuple[int, ...]:
        """Sizes up to two doublings beyond one."""
        return self.pace.sizes[: self.pace.sizes.index(size) + 3]

    def _best(self, allowed: Sequence[int]) -> int:
        """The smallest of the allowed sizes that gives nearly the most; where none is known, the smallest."""
        known = [size for size in allowed if self.pace.known(size)]
        if not known:
            return allowed[0]
        most = max(map(self.pace.rate, known))
        return next(size for size in known if self.pace.rate(size) * _WORTH >= most)
