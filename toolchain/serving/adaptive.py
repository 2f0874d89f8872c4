"""How many rows a batch may have, how long it may be waited for, and who is let in: from what runs took.

*What a run takes.* For each size of a batch (1, 2, 3, 4, 6, 8, 12, … and those that are preferred) the median of its
last nine runs is kept, from handing the batch to a thread to having its outputs: what a run costs beside the model
counts too. Between sizes it is interpolated: a run costs a + b·n about any n, but on real processors not with the
same a and b everywhere, since large batches fall out of the caches.

*Batch size.* The smallest size that gives at least 97 % of the most rows a second that any size gives: beyond it
latency and memory grow, and nothing is won. Sizes are found by use, as TCP's slow start finds a window: the next larger
is tried when so many rows wait, until two doublings have won nothing. Every 64th full batch looks again at a size
beside, since machines and neighbours change. Where sizes are preferred by the options, those are taken at their word:
the largest that is allowed.

*With an SLO* a request that comes while a batch runs waits for the rest of that and then for its own, so a size is
allowed if twice its run fits into a share of the SLO. The share follows additive increase and multiplicative decrease,
as in Clipper (Crankshaw et al., NSDI 2017, section 4.3.1), but per request and with steps such that it settles where
fewer than one request in 100 is late, for a 99th percentile that holds. As TCP cuts its window once a round trip, late
answers to what was let in before the last cut say nothing new. The delay (as Triton's
``max_queue_delay_microseconds``) is what of it the rest of the share has room for.

*Admission.* A request is refused at once if its answer would come later than the share of the SLO, reckoned from what
runs now and who waits before it. A queue that only has a bound on its length grows under overload until every answer in
it is late: throughput stays, goodput is gone. Refused at the door, what is in the queue is in time, and batches stay
full. That is CoDel's insight (Nichols and Jacobson 2012), that the time in the queue is to be bounded and not its
length, but with the time known before it has passed, because the server knows what runs take.
"""

from __future__ import annotations

import bisect
import statistics
from collections import deque
from collections.abc import Sequence

from toolchain.serving.options import Batching

#: Runs of one size that its time is the median of.
_KEPT = 9
#: Runs of a size before it is compared with others: the first has to allocate.
_ENOUGH = 2
#: A larger size has to give more than so much more to be worth its latency and its memory.
_WORTH = 1 / 0.97
#: Full batches between two looks at another size; with an SLO, where a look makes those who wait late, four times that.
_LOOK = 64
#: The share of the SLO that is planned with: where it begins, its bounds, and its steps for a request in time and a
#: late one. 0.0001 / 0.04: it stands still where one in 400 is late; where a stall makes a batch or two late at once,
#: which cuts once, where fewer than one in 100 are.
_SHARE, _LEAST_SHARE, _MOST_SHARE, _UP, _DOWN = 0.8, 0.5, 0.9, 0.0001, 0.04
#: The most that late requests of one batch take from the share: one stall is one event, however many it hit.
_MOST_DOWN = 0.8


class Pace:
    """What runs take, by rows.

    Args:
        sizes: ascending, beginning with 1; a run of another size counts as one of the next smaller.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self._runs = [deque[float](maxlen=_KEPT) for _ in self.sizes]
        self._points: list[tuple[int, float]] = []  # of the sizes that were run, ascending
        #: predicted nanoseconds of each size; empty before the first run
        self.of_sizes: tuple[float, ...] = ()

    def add(self, rows: int, ns: int) -> None:
        """A run of ``rows`` rows that took ``ns`` nanoseconds."""
        place = bisect.bisect_right(self.sizes, rows) - 1
        size = self.sizes[place]
        self._runs[place].append(ns * size / rows)
        self._points = [
            (size, statistics.median_low(runs)) for size, runs in zip(self.sizes, self._runs, strict=True) if runs
        ]
        self.of_sizes = tuple([self.predict(size) for size in self.sizes])

    def known(self, size: int) -> bool:
        """Whether a size was run often enough to be compared with others."""
        return len(self._runs[self.sizes.index(size)]) >= _ENOUGH

    def predict(self, rows: int) -> float:
        """Nanoseconds that a run of ``rows`` rows takes; 0 before the first run."""
        points = self._points
        if not points:
            return 0.0
        place = bisect.bisect_left(points, (rows, 0.0))
        if place < len(points):
            many, long = points[place]
            if many == rows or place == 0:
                return long
            few, short = points[place - 1]
            return short + (long - short) * (rows - few) / (many - few)
        few, short = points[-1]
        if len(points) == 1:
            return short * rows / few
        fewer, shorter = points[-2]
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
        self._cut_ns = 0
        self._delay_ns = batching.max_queue_delay_us * 1000
        self._instances = batching.instances
        #: the sizes that a batch is to have, ascending; none where the options prefer none
        self.preferred = tuple(sorted({size for size in batching.preferred_batch_size if size <= most}))
        grid = {size for power in range(most.bit_length()) for size in (1 << power, 3 << power) if size <= most}
        self.pace = Pace(sorted({*grid, *self.preferred, most}))
        self._full = 0
        self._planned: tuple[int, int] | None = None

    @property
    def cap(self) -> int:
        """Rows that a batch may have at most, whatever was measured: fewer while memory is short."""
        return self._cap

    def shrink(self, share: float) -> None:
        """Cuts the largest batch to a share of what it is now, to one row at least."""
        self._cap = max(1, int(self._cap * share))
        self._planned = None

    def grow(self) -> None:
        """Doubles the largest batch, up to what the options say."""
        self._cap = min(self._most, self._cap * 2)
        self._planned = None

    def limit(self, waiting: int) -> int:
        """Rows for a batch now.

        Args:
            waiting: rows that could go into it.
        """
        best, new = self._plan()
        return new if best < new <= waiting else best

    def look(self, waiting: int) -> int:
        """As ``limit``, for a batch that is run now: now and then another size, to see what it takes today."""
        limit = self.limit(waiting)
        if waiting < limit or self.preferred:
            return limit
        self._full += 1
        every = _LOOK if self._slo_ns is None else 4 * _LOOK
        if self._full % every:
            return limit
        place = self.pace.sizes.index(limit)
        beside = self.pace.sizes[max(place - 2, 0) : place] + self.pace.sizes[place + 1 : place + 3]
        others = [size for size in beside if size <= waiting and self._allows(size)]
        return others[self._full // every % len(others)] if others else limit

    @property
    def has_slo(self) -> bool:
        """Whether there is a latency to hold."""
        return self._slo_ns is not None

    @property
    def delay_ns(self) -> int:
        """How long the first request of a batch may wait for others."""
        if self._slo_ns is None or not self._delay_ns:
            return self._delay_ns
        run = self.pace.predict(self._plan()[0])
        return int(min(self._delay_ns, max(0.0, self._share * self._slo_ns - 2 * run)))

    def ran(self, rows: int, ns: int) -> None:
        """A run of ``rows`` rows took ``ns`` nanoseconds, from handing it over to having its outputs."""
        self.pace.add(rows, ns)
        self._planned = None

    def answered(self, queued_ns: Sequence[int], now_ns: int) -> None:
        """The requests of one batch were answered.

        Args:
            queued_ns: when each came to the queue.
            now_ns: by the same clock.
        """
        if self._slo_ns is None:
            return
        late = [queued for queued in queued_ns if now_ns - queued > self._slo_ns]
        news = sum(queued >= self._cut_ns for queued in late)
        if news:
            self._share *= max(_MOST_DOWN, (1 - _DOWN) ** news)
            self._cut_ns = now_ns
        self._share = min(max(self._share + _UP * (len(queued_ns) - len(late)), _LEAST_SHARE), _MOST_SHARE)
        self._planned = None

    def wait_ns(self, ahead: int, running: int, running_ns: int) -> float:
        """How long a new request would wait until its own batch begins.

        Args:
            ahead: rows that wait before it.
            running: rows that run now, 0 where an instance is free.
            running_ns: how long they have.
        """
        _, size = self._plan()
        rest = max(0.0, self.pace.predict(running) - running_ns) if running else 0.0
        return rest + ahead // size * self.pace.predict(size) / self._instances

    def too_late(self, wait_ns: float, rows: int) -> bool:
        """Whether a request would be answered beyond the SLO.

        Args:
            wait_ns: as ``wait_ns`` says.
            rows: of the request.
        """
        if self._slo_ns is None:
            return False
        own = self.pace.predict(max(rows, self._plan()[1]))
        return wait_ns + own > self._share * self._slo_ns

    def _allows(self, size: int) -> bool:
        """Whether a size is within the cap and, with an SLO, a wait and a run of it within its share."""
        if size > self._cap:
            return False
        return self._slo_ns is None or 2 * self.pace.predict(size) <= self._share * self._slo_ns

    def _plan(self) -> tuple[int, int]:
        """The size for batches, and the size to plan with: a larger one where that is still to be tried.

        Who is let in is reckoned with the latter: else there would never be enough in the queue to try it.
        """
        if self._planned is None:
            self._planned = self._made_plan()
        return self._planned

    def _made_plan(self) -> tuple[int, int]:
        sizes = self.pace.sizes
        allowed = [size for size in sizes if self._allows(size)] or [sizes[0]]
        if self.preferred:
            size = max((size for size in self.preferred if size in allowed), default=allowed[-1])
            return size, size
        known = [size for size in allowed if self.pace.known(size)]
        if not known:
            return allowed[0], allowed[0]
        rates = [size / max(self.pace.predict(size), 1.0) for size in known]
        best = next(size for size, rate in zip(known, rates, strict=True) if rate * _WORTH >= max(rates))
        new = next((size for size in allowed if size not in known), best)
        return best, new if best < new <= 4 * best or sizes.index(new) - sizes.index(best) == 1 else best
