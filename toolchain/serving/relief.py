"""What is done where memory is short: batches are cut, idle versions evicted, new work refused, in that order.

``memory.Watch`` says which of it, four times a second; one step is taken at a time, and what it freed is looked at
before the next. When there is room again, batches grow back step by step. Sessions give back what their largest
batches took as batches are cut, and, short or not, when they do not need it any more (``trimming``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from runtimes import Error
from toolchain.serving import memory
from toolchain.serving.memory import Relief
from toolchain.serving.residency import Entry, Residency
from toolchain.serving.result_cache import ResultCache

_log = logging.getLogger(__name__)

#: Between two cuts of the batches, and between two evictions, while memory stays short.
_STEP_S = 2.0
#: Batches are not cut further than to this share.
_LEAST_SHARE = 0.125
#: A session that gave back less is not spoken of, bytes.
_WORTH_SAYING = 1 << 20


class Reliever:
    """Looks after the memory of one server. Used on the event loop's thread.

    Args:
        cap: bytes that the process may have; None: no bound.
        residency: what is in memory; told of it when batches are cut.
        cache: of results, forgotten when batches are cut; None where it is off.
        resident: gives the bytes that the process has in memory.

    Attributes:
        watch: what memory does.
        refusing: new work is to be refused.
        counts: ``shrinks``, ``relief_evictions``, ``refusals``, ``trims``.
    """

    def __init__(
        self, cap: int | None, *, residency: Residency, cache: ResultCache | None, resident: Callable[[], int]
    ) -> None:
        self.watch = memory.Watch(cap)
        self.refusing = False
        self.counts: Counter[str] = Counter()
        self._residency = residency
        self._cache = cache
        self._resident = resident
        self._last_step = 0.0
        self._trimming: dict[Entry, asyncio.Task[None]] = {}
        residency.on_step = self.watch.forget_trend

    def to_json(self) -> dict[str, Any]:
        """Sizes in bytes, and what was done."""
        return {
            "resident_bytes": self._resident(),
            "cap_bytes": self.watch.cap,
            "trend_bytes_per_second": round(self.watch.trend()),
            "predicted_bytes": self.watch.predicted(),
            "relief": self.watch.level.name.lower(),
            **{name: self.counts[name] for name in ("shrinks", "relief_evictions", "refusals", "trims")},
        }

    async def step(self, now: float) -> None:
        """Does what the level of memory asks for, the cheapest first.

        Args:
            now: ``time.monotonic()``.
        """
        before = self.watch.level
        resident = self._resident()
        level = self.watch.sample(time.monotonic_ns(), resident)
        self._residency.observe(resident)
        victim = self._residency.least_recent() if level >= Relief.EVICT else None
        self.refusing = level is Relief.REFUSE and victim is None
        for entry in self._residency.entries:
            if entry.loaded is not None and entry.loaded.keeps_too_much(now):
                self._trim(entry)
        if level is not before:
            _log.warning(
                "memory: %s → %s, %d of %d MB, %+.1f MB/s",
                before.name.lower(), level.name.lower(), self.watch.resident >> 20, (self.watch.cap or 0) >> 20,
                self.watch.trend() / 1e6,
            )  # fmt: skip
            if level < before:
                self._last_step = now
        if now - self._last_step < _STEP_S and (level is not Relief.REFUSE or victim is None):
            return
        everything = [entry for entry in self._residency.entries if entry.loaded is not None]
        if level >= Relief.SHRINK and self._residency.share > _LEAST_SHARE:
            self._last_step = now
            self._residency.share /= 2
            self.counts["shrinks"] += 1
            _log.warning("memory: batches are cut to %.0f %%", self._residency.share * 100)
            for entry in everything:
                if entry.loaded is not None:
                    entry.loaded.shrink(0.5)
                self._trim(entry)
            if self._cache is not None:
                self._cache.clear()
        elif victim is not None:
            self._last_step = now
            self.counts["relief_evictions"] += 1
            await self._residency.evict(victim, "memory is short")
        elif level is Relief.NONE and self._residency.share < 1:
            self._last_step = now
            self._residency.share = min(self._residency.share * 2, 1.0)
            _log.info("memory: batches may be %.0f %% again", self._residency.share * 100)
            for entry in everything:
                if entry.loaded is not None:
                    entry.loaded.grow()

    def stop(self) -> None:
        """Leaves memory as it is."""
        for task in self._trimming.values():
            task.cancel()

    def _trim(self, entry: Entry) -> None:
        """Has a version give back what it keeps, in the background: threads may all be busy."""
        if entry not in self._trimming:
            self._trimming[entry] = task = asyncio.create_task(self._trimmed(entry))
            task.add_done_callback(lambda _: self._trimming.pop(entry, None))

    async def _trimmed(self, entry: Entry) -> None:
        if entry.loaded is None:
            return
        before = self._resident()
        try:
            await entry.loaded.trim(time.monotonic())
        except Error as error:
            _log.warning("%s gives no memory back: %s", entry, error.what)
            return
        await self._residency.in_loader(memory.give_back)
        self.counts["trims"] += 1
        self.watch.forget_trend()
        freed = before - self._resident()
        if freed >= _WORTH_SAYING:
            _log.info("%s gave %d MB back", entry, freed >> 20)
