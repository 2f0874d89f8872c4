"""All models of a server: what the transports ask, what the disk says, what memory allows, put together.

Everything here is used on the event loop's thread. Two things go on in the background: a look at the repository every
``poll_seconds``, and four times a second a look at trials, memory and what may be loaded ahead.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

from runtimes import Error, InvalidArtifact
from toolchain.serving import memory
from toolchain.serving.base import (
    DeadlineExceeded,
    ModelFailed,
    ModelInfo,
    NotFound,
    Overloaded,
    Request,
    Response,
    ServingError,
    Unavailable,
)
from toolchain.serving.lineup import Lineup, Switch
from toolchain.serving.loaded import Loaded
from toolchain.serving.memory import Relief
from toolchain.serving.options import ModelOptions, ServerOptions
from toolchain.serving.repository import Found, Snapshot, Source
from toolchain.serving.residency import Entry, Residency, by_model, failure
from toolchain.serving.result_cache import ResultCache
from toolchain.serving.rollout import Trial, Window
from toolchain.serving.statistics import Statistics

_log = logging.getLogger(__name__)

_TICK_S = 0.25
#: Between two cuts of the batches, and between two evictions, while memory stays short.
_STEP_S = 2.0
#: Batches are not cut further than to this share.
_LEAST_SHARE = 0.125
#: Copies of requests that a version on trial in the shadow works on at once; more are left out.
_SHADOWS = 16
#: How long a model's files are to be away before it is.
_GONE_S = 1.0
#: Switches that are remembered.
_SWITCHES = 1000
#: Threads that sessions run in. They are made as they are needed, and bounded by the instances of what is loaded.
_RUNS = 256


class Models:
    """The models of one server. Implements ``base.Hosted``.

    Args:
        options: the server's.
        source: where the models lie.
        resident: gives the bytes that the process has in memory.
    """

    def __init__(
        self, options: ServerOptions, source: Source, *, resident: Callable[[], int] = memory.resident_bytes
    ) -> None:
        self.options = options
        self.source = source
        self._switches: deque[Switch] = deque(maxlen=_SWITCHES)
        self._resident = resident
        self._lineups: dict[str, Lineup] = {}
        self._missing: dict[str, float] = {}
        self._remarks: frozenset[str] = frozenset()
        self._statistics: dict[tuple[str, str], Statistics] = {}
        self._runs = concurrent.futures.ThreadPoolExecutor(_RUNS, "serving-run")
        self._disk = concurrent.futures.ThreadPoolExecutor(1, "serving-disk")
        self._cache = ResultCache(options.result_cache) if options.result_cache.max_bytes else None
        caps = [cap for cap in (options.max_memory, _share_of_machine(options.workers)) if cap is not None]
        self._watch = memory.Watch(min(caps, default=None))
        self._residency = Residency(options, cap=self._watch.cap, runs=self._runs, cache=self._cache, resident=resident)
        self._residency.on_step = self._watch.forget_trend
        self._tasks: list[asyncio.Task[None]] = []
        self._shadows: set[asyncio.Task[None]] = set()
        self._relief: Counter[str] = Counter()
        self._last_step = 0.0
        self._refusing = False
        self._stopping = False

    # What the transports ask.

    def info(self, model: str, version: str = "") -> ModelInfo:
        """What a model takes; loads nothing. Raises NotFound, Unavailable."""
        entry = self._lineup(model).pick(version)
        if entry.info is None:
            raise Unavailable(f"model {model!r} is being loaded", hint="ask again in a moment")
        return entry.info

    def versions(self, model: str) -> tuple[str, ...]:
        """The versions that may be asked for, ascending. Raises NotFound."""
        return tuple(map(str, self._lineup(model).versions()))

    def names(self) -> tuple[str, ...]:
        """All models, sorted, whether ready or not."""
        return tuple(sorted(self._lineups))

    def is_ready(self, model: str | None = None, version: str = "") -> bool:
        """Whether a model, or for None anything at all, can answer at once or after loading. Raises NotFound."""
        if model is None:
            return any(self.is_ready(name) for name in self._lineups)
        lineup = self._lineup(model)
        if self._stopping:
            return False
        try:
            entry = lineup.pick(version)
        except Unavailable:
            return False
        # Loading for the first time it is not proved yet; loading again it is, and who asks will be answered.
        return entry.state == "READY" or (entry.info is not None and (entry.state != "LOADING" or entry.evicted))

    def model_options(self, model: str) -> ModelOptions:
        """How a model is served. Raises NotFound."""
        return self._lineup(model).options

    def index(self) -> list[dict[str, Any]]:
        """Every version of every model, on disk or in memory: name, version, state, reason."""
        return [row for name in sorted(self._lineups) for row in self._lineups[name].index()]

    def statistics(self, model: str, version: str) -> Statistics:
        """The counts of a version, made where there are none."""
        found = self._statistics.get((model, version))
        if found is None:
            found = self._statistics[model, version] = Statistics()
        return found

    def all_statistics(self) -> Mapping[tuple[str, str], Statistics]:
        """(model, version) → its counts."""
        return self._statistics

    @property
    def switches(self) -> list[dict[str, Any]]:
        """The last switches of versions, oldest first, as JSON values: time, model, from, to, what, why."""
        return [switch.to_json() for switch in self._switches]

    def cache_statistics(self) -> dict[str, Any]:
        """Of the result cache, as JSON values."""
        return {"enabled": self._cache is not None, **(self._cache.statistics() if self._cache else {})}

    def loaded(self, model: str, version: str = "") -> Loaded | None:
        """A version in memory; None where it is not. Raises NotFound, Unavailable."""
        return self._lineup(model).pick(version).loaded

    def resources(self) -> dict[str, Any]:
        """Memory and what was done about it, as JSON values; sizes in bytes."""
        room = self._residency.room()
        return {
            "resident_bytes": self._resident(),
            "cap_bytes": self._watch.cap,
            "trend_bytes_per_second": round(self._watch.trend()),
            "predicted_bytes": self._watch.predicted(),
            "relief": self._watch.level.name.lower(),
            "room_bytes": None if room == float("inf") else round(room),
            "batch_share": self._residency.share,
            "models": by_model(self._residency.entries),
            **{name: self._residency.counts[name] for name in ("loads", "evictions", "prefetches")},
            **{name: self._relief[name] for name in ("shrinks", "relief_evictions", "refusals")},
        }

    def expecting(self, model: str, version: str = "") -> contextlib.AbstractContextManager[None]:
        """Around the reading of a large request. Raises NotFound, Unavailable, Overloaded."""
        entry = self._lineup(model).pick(version)
        if self._refusing:
            raise self._out_of_memory(entry)
        # Where a version is on trial another one may take it; one that is not in memory has no queue yet.
        return contextlib.nullcontext() if entry.loaded is None else entry.loaded.expecting()

    async def infer(self, request: Request) -> Response:
        """Answers a request. Raises ServingError; nothing else leaves it but cancellation."""
        lineup = self._lineups.get(request.model) or self._lineup(request.model)
        if self._stopping:
            raise Unavailable("the server is shutting down")
        entry = lineup.pick(request.version, request)
        if self._refusing:
            raise self._out_of_memory(entry)
        trial = lineup.trial
        if trial is None:
            return await self._answer(lineup, entry, request, entry.window)
        return await self._on_trial(lineup, trial, entry, request)

    # What the server and its operator ask.

    async def start(self) -> None:
        """Takes the first look at the disk, and returns when what is to be loaded ahead was loaded, or failed. What is
        ready earlier answers earlier.

        Raises:
            InvalidArtifact: the source cannot be read.
        """
        try:
            snapshot = await self._look()
        except OSError as error:
            raise InvalidArtifact(f"cannot be read: {error}", where=str(self.source.path)) from error
        self._take(snapshot)
        self._tasks.append(asyncio.create_task(self._tick()))
        if self.options.poll_seconds:
            self._tasks.append(asyncio.create_task(self._poll()))
        await self._settled()

    async def stop(self) -> None:
        """Takes no more requests, answers those that are in, and frees everything."""
        self._stopping = True
        for task in (*self._tasks, *self._shadows):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._shadows, return_exceptions=True)
        await asyncio.gather(*(lineup.stop() for lineup in self._lineups.values()))
        self._residency.close()
        self._disk.shutdown(wait=False)
        self._runs.shutdown(wait=False)
        if self._cache is not None:
            self._cache.close()

    async def refresh(self) -> None:
        """Looks at the disk now, and waits until what follows from it is in service."""
        self._take(await self._look())
        await self._settled()

    async def load(self, model: str) -> None:
        """Loads a model: also one that was unloaded, and versions that failed before.

        Raises:
            NotFound: there is no such model on disk.
            Unavailable: it cannot be loaded, and why.
        """
        if model in self._lineups:
            self._lineups[model].forgive()
        await self.refresh()
        lineup = self._lineup(model)
        entry = lineup.pick("")
        try:
            await self._residency.acquire(entry)
        except Error as error:
            lineup.rejected_at_use(entry, error)
            raise failure(error) from error

    async def unload(self, model: str) -> None:
        """Takes a model out of service after its last answer, until ``load``. Raises NotFound."""
        lineup = self._lineup(model)
        lineup.unloaded = True
        lineup.reconcile()
        await lineup.settled()

    async def rollback(self, model: str) -> str:
        """Goes back from the newest version of a model by hand, until its files change or ``load``.

        Returns:
            The version that is in service then.

        Raises:
            NotFound: there is no such model, or no version to go back to.
        """
        lineup = self._lineup(model)
        lineup.roll_back("by hand")
        await lineup.settled()
        return str(lineup.pick("").version.number)

    async def _settled(self) -> None:
        for lineup in list(self._lineups.values()):
            await lineup.settled()

    # How a request is answered.

    def _out_of_memory(self, entry: Entry) -> Overloaded:
        self._relief["refusals"] += 1
        entry.statistics.rejected("REJECTED")
        return Overloaded("the server is out of memory", hint="send it again later")

    def _lineup(self, model: str) -> Lineup:
        lineup = self._lineups.get(model)
        if lineup is None:
            raise NotFound(f"there is no model {model!r}", hint=f"there are: {', '.join(self.names()) or 'none'}")
        return lineup

    async def _answer(self, lineup: Lineup, entry: Entry, request: Request, window: Window | Trial) -> Response:
        entry.in_use += 1
        entry.recent += 1
        try:
            loaded = entry.loaded
            if loaded is None:
                loaded = await self._wait(lineup, entry, request)
            began = entry.last_used_ns = time.monotonic_ns()
            response = await loaded.infer(request)
            if not response.cached:
                window.answered(time.monotonic_ns() - began)
            return response
        except ModelFailed:
            window.failed()
            raise
        except ServingError:
            raise
        except Exception as error:
            window.failed()
            entry.statistics.rejected("OTHER")
            _log.exception("%s: a request failed", entry)
            raise ModelFailed(f"{type(error).__name__} while the request was handled") from error
        finally:
            entry.in_use -= 1
            if not entry.in_use:
                self._residency.left()

    async def _wait(self, lineup: Lineup, entry: Entry, request: Request) -> Loaded:
        """The version, once it is loaded; or what took its place where it cannot be."""
        left = None if request.deadline_ns is None else max(request.deadline_ns - time.monotonic_ns(), 0) * 1e-9
        try:
            return await asyncio.wait_for(self._residency.acquire(entry), left)
        except TimeoutError:
            entry.statistics.rejected("REJECTED")
            raise DeadlineExceeded(f"the deadline passed while {entry} was loaded") from None
        except Error as error:
            lineup.rejected_at_use(entry, error)
            await lineup.settled()
            other = lineup.stable
            if not request.version and other is not None and other is not entry and other.loaded is not None:
                return other.loaded
            entry.statistics.rejected("OTHER")
            raise failure(error) from error

    async def _on_trial(self, lineup: Lineup, trial: Trial, entry: Entry, request: Request) -> Response:
        """A request while a version is on trial: what that fails at, the old version answers."""
        stable, candidate = lineup.stable, lineup.candidate
        if entry is not candidate or stable is None:
            response = await self._answer(lineup, entry, request, entry.window)
            if trial.mode == "shadow" and candidate is not None and entry is stable:
                self._copy_to(lineup, trial, candidate, request)
            return response
        try:
            return await self._tried(lineup, trial, candidate, request)
        except (ModelFailed, Unavailable):
            if request.version:
                raise
            return await self._answer(lineup, stable, request, stable.window)

    async def _tried(self, lineup: Lineup, trial: Trial, entry: Entry, request: Request) -> Response:
        token = object()
        trial.running[token] = time.monotonic_ns()
        try:
            return await self._answer(lineup, entry, request, trial)
        finally:
            del trial.running[token]

    def _copy_to(self, lineup: Lineup, trial: Trial, entry: Entry, request: Request) -> None:
        if len(self._shadows) >= _SHADOWS:
            return

        async def copy() -> None:
            # What became of it is counted in the trial.
            with contextlib.suppress(ServingError):
                await self._tried(lineup, trial, entry, dataclasses.replace(request, deadline_ns=None, received_ns=0))

        task = asyncio.create_task(copy())
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    # What goes on in the background.

    async def _look(self) -> Snapshot:
        return await asyncio.get_running_loop().run_in_executor(self._disk, self.source.scan, self.options.defaults)

    def _take(self, snapshot: Snapshot) -> None:
        for remark in sorted(set(snapshot.remarks) - self._remarks):
            _log.warning("%s: %s", self.source.path, remark)
        self._remarks = frozenset(snapshot.remarks)
        for name, found in snapshot.models.items():
            lineup = self._lineups.get(name)
            if lineup is None:
                self._lineups[name] = self._new(found)
                continue
            if found.versions:
                self._missing.pop(name, None)
            if found.versions or self._gone(name):
                lineup.update(found)
        for name in [name for name in self._lineups if name not in snapshot.models and self._gone(name)]:
            del self._missing[name]
            self._lineups.pop(name).withdraw("the model was removed")

    def _gone(self, name: str) -> bool:
        """Whether a model has had no version for a while: a folder that is replaced by two renames is away briefly."""
        now = time.monotonic()
        return now - self._missing.setdefault(name, now) >= _GONE_S

    def _new(self, found: Found) -> Lineup:
        def statistics(number: int) -> Statistics:
            return self.statistics(found.name, str(number))

        lineup = Lineup(found, residency=self._residency, statistics=statistics, on_switch=self._switched)
        for number, why in found.problems.items():
            _log.warning("%s version %d is not taken: %s", found.name, number, why)
        if found.problem:
            _log.warning("model %r is not served: %s", found.name, found.problem)
        else:
            lineup.reconcile()
        return lineup

    def _switched(self, switch: Switch) -> None:
        self._switches.append(switch)
        _log.info("model %r: %s → %s, %s: %s", switch.model, switch.old, switch.new, switch.what, switch.why)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.options.poll_seconds)
            try:
                self._take(await self._look())
            except OSError as error:
                _log.warning("the repository cannot be read now: %s", error)
            except Exception:  # noqa: BLE001 - a fault in one look must not end all looks
                _log.exception("looking at the repository failed")

    async def _tick(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            try:
                for lineup in list(self._lineups.values()):
                    lineup.tick(time.monotonic_ns())
                self._residency.count_uses(now - last)
                await self._relieve(now)
                if self._watch.level is Relief.NONE:
                    self._residency.prefetch()
            except Exception:  # noqa: BLE001 - likewise
                _log.exception("looking after the models failed")
            last = now

    async def _relieve(self, now: float) -> None:
        """Does what the level of memory asks for, the cheapest first."""
        before = self._watch.level
        resident = self._resident()
        level = self._watch.sample(time.monotonic_ns(), resident)
        self._residency.observe(resident)
        victim = self._residency.least_recent() if level >= Relief.EVICT else None
        self._refusing = level is Relief.REFUSE and victim is None
        if level is not before:
            _log.warning(
                "memory: %s → %s, %d of %d MB, %+.1f MB/s",
                before.name.lower(), level.name.lower(), self._watch.resident >> 20, (self._watch.cap or 0) >> 20,
                self._watch.trend() / 1e6,
            )  # fmt: skip
            if level < before:
                self._last_step = now
        if now - self._last_step < _STEP_S and (level is not Relief.REFUSE or victim is None):
            return
        everything = [entry.loaded for entry in self._residency.entries if entry.loaded is not None]
        if level >= Relief.SHRINK and self._residency.share > _LEAST_SHARE:
            self._last_step = now
            self._residency.share /= 2
            self._relief["shrinks"] += 1
            _log.warning("memory: batches are cut to %.0f %%", self._residency.share * 100)
            for loaded in everything:
                loaded.shrink(0.5)
            if self._cache is not None:
                self._cache.clear()
        elif victim is not None:
            self._last_step = now
            self._relief["relief_evictions"] += 1
            await self._residency.evict(victim, "memory is short")
        elif level is Relief.NONE and self._residency.share < 1:
            self._last_step = now
            self._residency.share = min(self._residency.share * 2, 1.0)
            _log.info("memory: batches may be %.0f %% again", self._residency.share * 100)
            for loaded in everything:
                loaded.grow()


def _share_of_machine(workers: int) -> int | None:
    total = memory.machine_bytes()
    return None if total is None else total // max(workers, 1)
