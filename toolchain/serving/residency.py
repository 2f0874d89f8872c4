"""Versions in memory: loads them once however many ask, and evicts the least recently used under a memory cap.

A version takes the bytes of its files, until it was loaded: from then on what resident memory grew by, if nothing else
was loaded meanwhile. What the process takes beyond its versions is looked at whenever nothing is loaded or closed: the
runtimes' own libraries and buffers are in it, and whatever a version was thought to take too little.

Evicted is what nobody uses at the moment, has not been used for longest, and is not pinned. It is loaded again by the
next request, or earlier, when there is room: then the one that was used most goes first, by counts that halve every
five minutes.

Everything here runs on the event loop's thread but ``loading.make`` and ``Session.close``, which have a pool of their
own: other models go on answering.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from runtimes import Error
from toolchain.serving import loading, memory
from toolchain.serving.adaptive import Controller
from toolchain.serving.base import ModelInfo, Overloaded, ServingError, Unavailable
from toolchain.serving.loaded import Loaded
from toolchain.serving.options import ModelOptions, ServerOptions
from toolchain.serving.repository import Version
from toolchain.serving.result_cache import ResultCache
from toolchain.serving.rollout import Window
from toolchain.serving.statistics import Statistics

_log = logging.getLogger(__name__)

#: Number, digest of the files, and what is said about loading it.
Key = tuple[int, str, str]
State = Literal["UNAVAILABLE", "LOADING", "READY", "UNLOADING"]

#: Sessions are loaded up to here, as a share of the cap: relief begins there.
_FILL = memory.SHARES[memory.Relief.SHRINK]
#: How long a load waits for somebody to become idle.
_ROOM_S = 10.0
#: Uses halve in this time.
_HALF_LIFE_S = 300.0
#: Below so many recent uses nothing is fetched back.
_LEAST_USES = 0.5
#: Loads at the same time.
_LOADERS = 2

#: What of a model's options makes another session or batcher of the same version.
_NOT_LOADED = {"version_policy", "rollout", "preload", "pin"}


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """One version of a model with its options, in memory or not.

    Attributes:
        version, options, folder: what it is made of.
        statistics: counts, which outlive it.
        window: what its last requests were like.
        state, reason: as the index of the repository shows them.
        info: what it takes, where that is known: from its files, or from when it was last loaded.
        loaded: in memory.
        task: the load that goes on.
        bytes, measured: what it takes in memory, and whether that was measured.
        in_use: requests that are inside it or wait for it.
        held: it is not to be evicted: a trial goes on.
        apart: it is tested in a process of its own before it is first loaded here.
        evicted: it was in memory, and may come back.
        recent, uses: requests since the last count, and before it, decayed.
        last_used_ns: ``time.monotonic_ns()``.
        load_seconds: of the last load.
    """

    version: Version
    options: ModelOptions
    folder: Path | None
    statistics: Statistics
    window: Window = dataclasses.field(default_factory=Window)
    state: State = "UNAVAILABLE"
    reason: str = ""
    info: ModelInfo | None = None
    loaded: Loaded | None = None
    task: asyncio.Task[Loaded] | None = None
    bytes: int = 0
    measured: bool = False
    in_use: int = 0
    held: bool = False
    apart: bool = False
    evicted: bool = False
    recent: int = 0
    uses: float = 0.0
    last_used_ns: int = 0
    load_seconds: float = 0.0

    @property
    def key(self) -> Key:
        """Entries of one model with equal keys would be loaded alike."""
        return entry_key(self.version, self.options)

    @property
    def idle(self) -> bool:
        """In memory, and nobody would miss it now."""
        loaded = self.loaded
        return (
            self.state == "READY"
            and loaded is not None
            and not self.in_use
            and not self.held
            and not self.options.pin
            and not loaded.busy
        )

    def __str__(self) -> str:
        return f"{self.version.model} version {self.version.number}"


def entry_key(version: Version, options: ModelOptions) -> Key:
    """As ``Entry.key``, of an entry that is not there yet."""
    return version.number, version.digest, options.model_dump_json(exclude=_NOT_LOADED)


class Residency:
    """All versions in memory of one server.

    Args:
        options: the server's.
        cap: bytes that the process may have; None: no bound.
        runs: the pool that sessions run in.
        cache: of results; None where it is off.
        resident: gives the bytes that the process has in memory.
    """

    def __init__(
        self,
        options: ServerOptions,
        *,
        cap: int | None,
        runs: concurrent.futures.Executor,
        cache: ResultCache | None,
        resident: Callable[[], int] = memory.resident_bytes,
    ) -> None:
        self.cap = cap
        #: of their largest batch that versions may have now: less than 1 while memory is short
        self.share = 1.0
        self.counts: Counter[str] = Counter()
        self.entries: set[Entry] = set()
        #: is called after something large was loaded or freed
        self.on_step: Callable[[], None] = lambda: None
        self._options = options
        self._runs = runs
        self._cache = cache
        self._resident = resident
        self._least_base = self._base = resident()
        self._closing = 0
        self._loaders = concurrent.futures.ThreadPoolExecutor(_LOADERS, "serving-load")
        self._loading = 0
        self._loads = 0
        self._room = asyncio.Lock()
        self._idle = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def in_loader(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs what blocks in the pool of loads."""
        return await asyncio.get_running_loop().run_in_executor(self._loaders, function, *args)

    async def acquire(self, entry: Entry) -> Loaded:
        """The version in memory. All who ask meanwhile share one load, and none that gives up ends it.

        Raises:
            Overloaded: there is no room, and nobody became idle.
            Error: it cannot be loaded.
        """
        if entry.loaded is not None:
            return entry.loaded
        if entry.task is None:
            entry.task = asyncio.create_task(self._load(entry))
            entry.task.add_done_callback(_retrieved)
        return await asyncio.shield(entry.task)

    def left(self) -> None:
        """A request left an entry: who waits for room may look again."""
        self._idle.set()

    async def evict(self, entry: Entry, why: str) -> None:
        """Takes a version out of memory once what it has begun is answered. The next request loads it again."""
        loaded = entry.loaded
        if loaded is None:
            return
        entry.loaded = None
        entry.state, entry.reason = "UNLOADING", why
        entry.evicted = True
        self.counts["evictions"] += 1
        _log.info("%s leaves memory: %s", entry, why)
        await self._close(loaded)
        if entry.state == "UNLOADING":  # and not loading again already
            entry.state = "UNAVAILABLE"
        self._idle.set()

    async def retire(self, entry: Entry) -> None:
        """Ends a version for good, after its last answer."""
        entry.reason = "no longer served"
        while entry.in_use or entry.task is not None:
            if entry.task is not None and not entry.in_use:
                await asyncio.wait([entry.task])
                continue
            await asyncio.sleep(0.01)
        self.entries.discard(entry)
        loaded, entry.loaded = entry.loaded, None
        if loaded is not None:
            entry.state = "UNLOADING"
            await self._close(loaded)
        entry.state = "UNAVAILABLE"
        self._idle.set()

    def room(self) -> float:
        """Bytes that may still be loaded; less than nothing where it is too much already."""
        if self.cap is None:
            return float("inf")
        return _FILL * self.cap - self._base - sum(one.bytes for one in self.entries if _takes_memory(one))

    def observe(self, resident: int) -> None:
        """Takes what the process has in memory now for what it takes beyond its versions, where nothing moves."""
        if not self._loading and not self._closing:
            versions = sum(one.bytes for one in self.entries if _takes_memory(one))
            self._base = max(self._least_base, resident - versions)

    def least_recent(self) -> Entry | None:
        """The idle version whose last request is the longest ago."""
        return min((one for one in self.entries if one.idle), key=lambda one: one.last_used_ns, default=None)

    def count_uses(self, seconds: float) -> None:
        """Decays the counts of uses. Called about every second."""
        kept = 0.5 ** (seconds / _HALF_LIFE_S)
        for entry in self.entries:
            entry.uses = entry.uses * kept + entry.recent
            entry.recent = 0

    def prefetch(self) -> Entry | None:
        """Begins to load the evicted version that was used most, where it fits. Returns which."""
        if self._loading:
            return None
        waiting = [
            one for one in self.entries if one.evicted and one.state == "UNAVAILABLE" and one.uses >= _LEAST_USES
        ]
        best = max(waiting, key=lambda one: one.uses, default=None)
        if best is None or best.bytes > self.room():
            return None
        self.counts["prefetches"] += 1
        self.begin(best)
        return best

    def begin(self, entry: Entry) -> None:
        """Loads a version in the background; what fails is in its ``reason``, and in the log."""

        async def load() -> None:
            try:
                await self.acquire(entry)
            except Error as error:
                _log.warning("%s was not loaded: %s", entry, error.what)

        task = asyncio.create_task(load())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Ends the pool, after everything was retired."""
        for task in self._tasks:
            task.cancel()
        self._loaders.shutdown(wait=False, cancel_futures=True)

    async def _close(self, loaded: Loaded) -> None:
        self._closing += 1
        try:
            await loaded.drain()
            loaded.close()
            await self.in_loader(memory.give_back)
        finally:
            self._closing -= 1
        self.on_step()

    async def _load(self, entry: Entry) -> Loaded:
        entry.state, entry.reason = "LOADING", ""
        if not entry.measured:
            entry.bytes = entry.version.bytes
        try:
            async with self._room:
                await self._make_room(entry)
                self._loading += 1
                self._loads += 1
            try:
                before, alone, number = self._resident(), self._loading == 1, self._loads
                make = functools.partial(loading.make, server=self._options, apart=entry.apart)
                made: loading.Made = await self.in_loader(make, entry.version, entry.options, entry.folder)
                await self.in_loader(memory.give_back)
                growth = self._resident() - before
                if alone and number == self._loads:
                    # Less than its files is not believed: it took what others had just left.
                    entry.bytes = max(growth, entry.version.bytes)
                    entry.measured = True
            finally:
                self._loading -= 1
            try:
                loaded = Loaded(
                    made.info,
                    made.session,
                    entry.options,
                    statistics=entry.statistics,
                    executor=self._runs,
                    controller=Controller(
                        entry.options.batching,
                        max_batch_size=made.info.max_batch_size,
                        slo_p99_ms=self._options.slo_p99_ms,
                    ),
                    cache=self._cache,
                )
            except Error:
                made.session.close()
                raise
            if self.share < 1:
                loaded.shrink(self.share)
        except BaseException as error:
            entry.state = "UNAVAILABLE"
            entry.reason = error.what if isinstance(error, Error) else f"loading failed: {error!r}"
            raise
        finally:
            entry.task = None
            self._idle.set()
        entry.loaded = loaded
        entry.info = made.info
        entry.load_seconds = made.seconds
        entry.last_used_ns = time.monotonic_ns()
        entry.state, entry.reason, entry.evicted, entry.apart = "READY", "", False, False
        self.counts["loads"] += 1
        self.on_step()
        _log.info(
            "%s is ready after %.2f s: %s %s, %s%s",
            entry,
            made.seconds,
            made.info.platform,
            made.info.precision,
            f"{entry.bytes / 1e6:.0f} MB{'' if entry.measured else ' by its files'}",
            "".join(f"; {remark}" for remark in made.remarks),
        )
        return loaded

    async def _make_room(self, entry: Entry) -> None:
        if self.cap is None:
            return
        if self._base + entry.bytes > _FILL * self.cap:
            raise Unavailable(
                f"{entry} needs {_mb(entry.bytes)}, and of {_mb(self.cap)} the server itself takes {_mb(self._base)}",
                hint="serve with a larger --max-memory",
            )
        until = time.monotonic() + _ROOM_S
        while self.room() < 0:  # what is to be loaded is counted already
            self._idle.clear()
            victim = self.least_recent()
            if victim is not None:
                await self.evict(victim, f"room for {entry}")
                continue
            try:
                await asyncio.wait_for(self._idle.wait(), min(0.05, until - time.monotonic()))
            except TimeoutError:
                if time.monotonic() >= until:
                    raise Overloaded(
                        f"there is no memory for {entry}: what is loaded is busy or pinned",
                        hint="send it again later, or serve with a larger --max-memory",
                    ) from None


def failure(error: Error) -> ServingError:
    """What a request gets that waited for a load that failed."""
    return error if isinstance(error, ServingError) else Unavailable(f"the model cannot be loaded: {error.what}")


def by_model(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """What each version in memory takes, as JSON values."""
    return [
        {
            "model": one.version.model,
            "version": str(one.version.number),
            "bytes": one.bytes,
            "measured": one.measured,
            "pinned": one.options.pin,
            "load_seconds": round(one.load_seconds, 4),
            "uses": round(one.uses + one.recent, 2),
        }
        for one in sorted(entries, key=lambda one: (one.version.model, one.version.number))
        if one.loaded is not None
    ]


def _takes_memory(entry: Entry) -> bool:
    return entry.state in ("READY", "LOADING")


def _mb(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


def _retrieved(task: asyncio.Task[Any]) -> None:
    """Whoever waited has the error, and where nobody did it is in the entry's reason."""
    if not task.cancelled():
        task.exception()
