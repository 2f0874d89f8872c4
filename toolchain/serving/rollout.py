"""A new version on trial: which requests it gets, and when it has passed or failed.

How many requests it takes to judge is not a number but a question of what they show, so each rule is a test with a
one-sided confidence of 99 %, asked after every quarter of a second:

*Errors.* The new version is rolled back when the lower bound of its error rate (the score interval of Wilson 1927) is
above ``max_error_rate`` and above the upper bound of the old version's rate: a poisoned request or an overload that
both suffer from is nobody's fault.

*Latency.* That the 99th percentile lies beyond a bound means that more than 1 % of requests do. So the new version is
rolled back when the lower bound of the share of its requests that took longer than ``max_p99_ratio`` times the old
version's 99th percentile is above 1 %. This is the test of a quantile by counting (Conover 1999, section 3.2), the same
as MLPerf's early stopping uses; it says no after four slow requests of a hundred, and needs no 662 to do so. The old
version's percentile is read from its last 2000 requests, of which there have to be a hundred.

One or two failed or slow requests decide nothing: since the question is asked often, there have to be three.

The trial is passed after ``trial_seconds`` and ``trial_requests`` without either.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import deque
from typing import Literal

from toolchain.serving.options import Rollout

#: Requests that a window remembers.
WINDOW = 2000
#: One-sided 99 % of the normal distribution.
_Z = 2.326
_LEAST = 3
#: Requests that the old version's percentile or error rate is read from, at least.
_LEAST_OLD = 100


class Window:
    """The last requests of a version: whether each was answered, and how long it took."""

    __slots__ = ("_last", "failures")

    def __init__(self) -> None:
        self._last: deque[int] = deque(maxlen=WINDOW)
        self.failures = 0

    @property
    def count(self) -> int:
        return len(self._last)

    def answered(self, ns: int) -> None:
        """A request that took ``ns`` nanoseconds."""
        self._push(ns)

    def failed(self) -> None:
        """A request that the version failed at."""
        self._push(-1)
        self.failures += 1

    def _push(self, value: int) -> None:
        last = self._last
        if len(last) == WINDOW and last[0] < 0:
            self.failures -= 1
        last.append(value)

    def p99_ns(self) -> int | None:
        """The 99th percentile of what was answered; None where that is fewer than a hundred."""
        times = sorted(ns for ns in self._last if ns >= 0)
        return times[math.ceil(0.99 * len(times)) - 1] if len(times) >= _LEAST_OLD else None

    def slower_than(self, ns: float) -> int:
        """How many took longer."""
        return sum(1 for one in self._last if one > ns)


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """How a trial ended, and why, in words for the log."""

    passed: bool
    why: str


class Trial:
    """One new version beside the old one.

    Args:
        options: of the model.
        old: what the old version's requests were like, and go on being.
        now_ns: ``time.monotonic_ns()``.
        seed: of the choice between the two.
    """

    def __init__(self, options: Rollout, *, old: Window, now_ns: int, seed: int | None = None) -> None:
        self.options = options
        self.old = old
        self.new = Window()
        self.requests = 0
        #: when each request that the new version has not answered yet began; one that hangs is slow too
        self.running: dict[object, int] = {}
        self._began_ns = now_ns
        self._random = random.Random(seed)

    @property
    def mode(self) -> Literal["canary", "shadow", "all"]:
        """Who is answered by the new version: a share, nobody, or everybody."""
        if self.options.shadow:
            return "shadow"
        return "all" if self.options.canary is None else "canary"

    def takes(self) -> bool:
        """Whether the next request is the new version's to answer."""
        if self.options.shadow:
            return False
        return self.options.canary is None or self._random.random() < self.options.canary

    def answered(self, ns: int) -> None:
        """The new version answered a request in ``ns`` nanoseconds."""
        self.requests += 1
        self.new.answered(ns)

    def failed(self) -> None:
        """The new version failed at a request."""
        self.requests += 1
        self.new.failed()

    def verdict(self, now_ns: int) -> Verdict | None:
        """How the trial ended; None while it goes on."""
        new, old, options = self.new, self.old, self.options
        if new.failures >= _LEAST:
            normal = _bounds(old.failures, old.count)[1] if old.count >= _LEAST_OLD else 0.0
            if _bounds(new.failures, new.count)[0] > max(options.max_error_rate, normal):
                return Verdict(
                    False,
                    f"{new.failures} of {new.count} requests failed, and {options.max_error_rate:.2%} may; "
                    f"of the old version {old.failures} of {old.count}",
                )
        p99 = old.p99_ns() if options.max_p99_ratio is not None else None
        if p99 is not None and options.max_p99_ratio is not None:
            bound = p99 * options.max_p99_ratio
            hanging = sum(1 for began in self.running.values() if now_ns - began > bound)
            slow, count = new.slower_than(bound) + hanging, new.count + hanging
            if slow >= _LEAST and _bounds(slow, count)[0] > 0.01:
                return Verdict(
                    False,
                    f"{slow} of {count} requests took more than {options.max_p99_ratio:g} times the old version's "
                    f"p99 of {p99 / 1e6:.2f} ms",
                )
        elapsed = (now_ns - self._began_ns) * 1e-9
        if elapsed >= options.trial_seconds and self.requests >= options.trial_requests:
            return Verdict(True, f"{self.requests} requests in {elapsed:.0f} s, {new.failures} of the last ones failed")
        return None


def _bounds(hits: int, count: int) -> tuple[float, float]:
    """The lower and upper bound of a share of which ``hits`` of ``count`` were seen (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    share, z2 = hits / count, _Z * _Z
    middle = share + z2 / (2 * count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    scale = 1 + z2 / count
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)
