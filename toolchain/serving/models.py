"""All models of a server: what the transports ask, what the disk says, what memory allows, put together.

Everything here is used on the event loop's thread. Two things go on in the background: a look at the repository every
``poll_seconds``, and four times a second a look at trials, memory and what may be loaded ahead.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtimes import Error, InvalidArtifact
from toolchain.serving import memory
from toolchain.serving.answering import Answering
from toolchain.serving.base import (
    ModelInfo,
    NotFound,
    Overloaded,
    Request,
    Response,
    Unavailable,
)
from toolchain.serving.changeover import Changeover, Switch
from toolchain.serving.lineup import Lineup
from toolchain.serving.loaded import Loaded
from toolchain.serving.memory import Relief
from toolchain.serving.options import ModelOptions, ServerOptions
from toolchain.serving.relief import Reliever
from toolchain.serving.repository import Found, Snapshot, Source
from toolchain.serving.residency import Entry, Residency, by_model, failure
from toolchain.serving.result_cache import ResultCache
from toolchain.serving.standing import Known, Standing
from toolchain.serving.statistics import Statistics

_log = logging.getLogger(__name__)

_TICK_S = 0.25
#: How long a model's files are to be away before it is.
_GONE_S = 1.0
#: How long the counts of a version stay that is neither on disk nor in memory, and how often that is looked at.
_COUNTS_S, _TIDY_S = 900.0, 30.0
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
        shared: a folder in which workers tell each other of versions; None: there is one process.
    """

    def __init__(
        self,
        options: ServerOptions,
        source: Source,
        *,
        resident: Callable[[], int] = memory.resident_bytes,
        shared: Path | None = None,
    ) -> None:
        self.options = options
        self.source = source
        self._switches: deque[Switch] = deque(maxlen=_SWITCHES)
        self._models: dict[str, Changeover] = {}
        self._missing: dict[str, float] = {}
        self._forgotten: dict[tuple[str, str], float] = {}
        self._remarks: frozenset[str] = frozenset()
        self._statistics: dict[tuple[str, str], Statistics] = {}
        self._runs = concurrent.futures.ThreadPoolExecutor(_RUNS, "serving-run")
        self._disk = concurrent.futures.ThreadPoolExecutor(1, "serving-disk")
        self._standing = Standing(shared, self._disk)
        self._known: dict[str, Known] = {}
        self._forgiven = 0
        self._cache = ResultCache(options.result_cache) if options.result_cache.max_bytes else None
        caps = [cap for cap in (options.max_memory, _share_of_machine(options.workers)) if cap is not None]
        cap = min(caps, default=None)
        self._residency = Residency(options, cap=cap, runs=self._runs, cache=self._cache, resident=resident)
        self._relief = Reliever(cap, residency=self._residency, cache=self._cache, resident=resident)
        self._answering = Answering(self._residency)
        self._tasks: list[asyncio.Task[None]] = []
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
        return tuple(sorted(self._models))

    def is_ready(self, model: str | None = None, version: str = "") -> bool:
        """Whether a model, or for None anything at all, can answer at once or after loading. Raises NotFound."""
        if model is None:
            return any(self.is_ready(name) for name in self._models)
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
        return [row for name in sorted(self._models) for row in self._models[name].lineup.index()]

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
            **self._relief.to_json(),
            "room_bytes": None if room == float("inf") else round(room),
            "batch_share": self._residency.share,
            "models": by_model(self._residency.entries),
            **{name: self._residency.counts[name] for name in ("loads", "evictions", "prefetches")},
        }

    def expecting(self, model: str, version: str = "") -> contextlib.AbstractContextManager[None]:
        """Around the reading of a large request. Raises NotFound, Unavailable, Overloaded."""
        entry = self._lineup(model).pick(version)
        if self._relief.refusing:
            raise self._out_of_memory(entry)
        # Where a version is on trial another one may take it; one that is not in memory has no queue yet.
        return contextlib.nullcontext() if entry.loaded is None else entry.loaded.expecting()

    async def infer(self, request: Request) -> Response:
        """Answers a request. Raises ServingError; nothing else leaves it but cancellation."""
        found = self._models.get(request.model) or self._model(request.model)
        if self._stopping:
            raise Unavailable("the server is shutting down")
        entry = found.lineup.pick(request.version, request)
        if self._relief.refusing:
            raise self._out_of_memory(entry)
        return await self._answering.answer(found, entry, request)

    # What the server and its operator ask.

    async def start(self) -> None:
        """Takes the first look at the disk, and returns when what is to be loaded ahead was loaded, or failed. What is
        ready earlier answers earlier.

        Raises:
            InvalidArtifact: the source cannot be read.
            Error: it is one artifact or one file, and cannot be loaded. In a folder of models or versions another may
                come, so there it is tried again.
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
        if self.source.kind in ("artifact", "file"):
            for found in self._models.values():
                if found.failure is not None:
                    await self.stop()
                    raise found.failure

    async def stop(self) -> None:
        """Takes no more requests, answers those that are in, and frees everything."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        self._relief.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._answering.stop()
        await asyncio.gather(*(one.stop() for one in self._models.values()))
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
        if model in self._models:
            self._models[model].forgive()
            self._forgiven += 1
        await self.refresh()
        found = self._model(model)
        entry = found.lineup.pick("")
        try:
            await self._residency.acquire(entry)
        except Error as error:
            found.rejected_at_use(entry, error)
            raise failure(error) from error

    async def unload(self, model: str) -> None:
        """Takes a model out of service after its last answer, until ``load``. Raises NotFound."""
        found = self._model(model)
        found.unload()
        await found.settled()

    async def rollback(self, model: str) -> str:
        """Goes back from the newest version of a model by hand, until its files change or ``load``.

        Returns:
            The version that is in service then.

        Raises:
            NotFound: there is no such model, or no version to go back to.
        """
        found = self._model(model)
        found.roll_back("by hand")
        await found.settled()
        return str(found.lineup.pick("").version.number)

    async def _settled(self) -> None:
        for found in list(self._models.values()):
            await found.settled()

    # How a request is answered.

    def _out_of_memory(self, entry: Entry) -> Overloaded:
        self._relief.counts["refusals"] += 1
        entry.statistics.rejected("REJECTED")
        return Overloaded("the server is out of memory", hint="send it again later")

    def _model(self, model: str) -> Changeover:
        found = self._models.get(model)
        if found is None:
            raise NotFound(f"there is no model {model!r}", hint=f"there are: {', '.join(self.names()) or 'none'}")
        return found

    def _lineup(self, model: str) -> Lineup:
        return self._model(model).lineup

    # What goes on in the background.

    async def _look(self) -> Snapshot:
        loop = asyncio.get_running_loop()
        forgiven = self._forgiven
        known = await loop.run_in_executor(self._disk, self._standing.read)
        snapshot = await loop.run_in_executor(self._disk, self.source.scan, self.options.defaults)
        # What was read before an operator forgave it would be held against the version again.
        self._known = known if forgiven == self._forgiven else {}
        return snapshot

    def _take(self, snapshot: Snapshot) -> None:
        for remark in sorted(set(snapshot.remarks) - self._remarks):
            _log.warning("%s: %s", self.source.path, remark)
        self._remarks = frozenset(snapshot.remarks)
        for name, found in snapshot.models.items():
            known = self._models.get(name)
            if known is None:
                self._models[name] = self._new(found)
                continue
            if found.versions:
                self._missing.pop(name, None)
            if found.versions or self._gone(name):
                known.update(found)
            known.learn(self._known.get(name, Known()))
        for name in [name for name in self._models if name not in snapshot.models and self._gone(name)]:
            del self._missing[name]
            self._models.pop(name).withdraw("the model was removed")

    def _gone(self, name: str) -> bool:
        """Whether a model has had no version for a while: a folder that is replaced by two renames is away briefly."""
        now = time.monotonic()
        return now - self._missing.setdefault(name, now) >= _GONE_S

    def _new(self, found: Found) -> Changeover:
        def statistics(number: int) -> Statistics:
            return self.statistics(found.name, str(number))

        made = Changeover(
            Lineup(found),
            residency=self._residency,
            statistics=statistics,
            on_switch=self._switched,
            standing=self._standing,
        )
        made.learn(self._known.get(found.name, Known()))
        for number, why in found.problems.items():
            _log.warning("%s version %d is not taken: %s", found.name, number, why)
        if found.problem:
            _log.warning("model %r is not served: %s", found.name, found.problem)
        else:
            made.reconcile()
        return made

    def _switched(self, switch: Switch) -> None:
        self._switches.append(switch)
        old, new = (version or "none" for version in (switch.old, switch.new))
        _log.info("model %r: %s → %s, %s: %s", switch.model, old, new, switch.what, switch.why)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.options.poll_seconds)
            try:
                self._take(await self._look())
            except OSError as error:
                _log.warning("the repository cannot be read now: %s", error)
            except Exception:  # noqa: BLE001 - a fault in one look must not end all looks
                _log.exception("looking at the repository failed")

    def _tidy(self, now: float) -> None:
        """Forgets what is left of versions that are gone: counts after a while, answers when they are too old."""
        there = {(row["name"], row["version"]) for row in self.index()}
        self._forgotten = {key: self._forgotten.get(key, now) for key in self._statistics if key not in there}
        for key in [key for key, since in self._forgotten.items() if now - since >= _COUNTS_S]:
            del self._statistics[key], self._forgotten[key]
        if self._cache is not None:
            self._cache.forget_old()

    async def _tick(self) -> None:
        last = tidied = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            try:
                if now - tidied >= _TIDY_S:
                    tidied = now
                    self._tidy(now)
                for found in list(self._models.values()):
                    found.tick(time.monotonic_ns())
                self._residency.count_uses(now - last)
                await self._relief.step(now)
                if self._relief.watch.level is Relief.NONE:
                    self._residency.prefetch()
            except Exception:  # noqa: BLE001 - likewise
                _log.exception("looking after the models failed")
            last = now


def _share_of_machine(workers: int) -> int | None:
    total = memory.machine_bytes()
    return None if total is None else total // max(workers, 1)
