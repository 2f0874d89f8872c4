"""The versions of one model: which answers, which is on trial, which may be asked for by number.

::

    on disk ──policy→ wanted ──the newest that is not rejected→ target
    target ──load, self-test, warm-up→ ready ──→ in service at once          the first, an older one, only other options
                                            └──→ trial ──passed→ in service, the old one drains and is closed
                                                       └─failed→ rejected, the old one is as it was

A version that cannot be loaded or fails its self-test never gets a request, and is tried again later, at growing
intervals: a copy that was not done yet is then whole. One that failed its trial is not tried again until its files
change. The old version stays in memory until its last answer is out, and through a trial, so going back is at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from runtimes import Error, TensorSpec
from toolchain.serving import loading
from toolchain.serving.base import ModelInfo, NotFound, Overloaded, Request, Unavailable
from toolchain.serving.options import ModelOptions
from toolchain.serving.repository import VERSION_NAME, Found, Version, selected
from toolchain.serving.residency import Entry, Residency, entry_key
from toolchain.serving.rollout import Trial
from toolchain.serving.statistics import Statistics

_log = logging.getLogger(__name__)

#: The first and the longest wait before a version that failed to load is tried again.
_RETRY_S, _MOST_RETRY_S = 2.0, 300.0

#: How long a request may take from being read to being answered, after a switch to other inputs.
_FORMER_S = 5.0

Key = tuple[int, str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Switch:
    """One line of the log of switches.

    Attributes:
        time: RFC 3339, UTC.
        model: its name.
        old, new: versions; None where there was none, or is none any more.
        what: "in service", "trial", "passed", "rolled back" or "withdrawn".
        why: in words.
    """

    time: str
    model: str
    old: str | None
    new: str | None
    what: str
    why: str

    def to_json(self) -> dict[str, Any]:
        """With the names ``from`` and ``to``."""
        return {
            "time": self.time, "model": self.model, "from": self.old, "to": self.new, "what": self.what, "why": self.why
        }  # fmt: skip


@dataclasses.dataclass(slots=True)
class _Rejected:
    why: str
    retry_ns: int | None
    failures: int = 1


class Lineup:
    """One model. All of it is used on the event loop's thread.

    Args:
        found: what is on disk of it.
        residency: loads and evicts.
        statistics: gives the counts of a version, by its number.
        on_switch: is told of every switch.
    """

    def __init__(
        self,
        found: Found,
        *,
        residency: Residency,
        statistics: Callable[[int], Statistics],
        on_switch: Callable[[Switch], None],
    ) -> None:
        self.found = found
        #: what is answered by where no version is asked for
        self.stable: Entry | None = None
        #: what is on trial beside it
        self.candidate: Entry | None = None
        self.trial: Trial | None = None
        #: an operator unloaded it
        self.unloaded = False
        self._entries: dict[int, Entry] = {}
        self._rejected: dict[Key, _Rejected] = {}
        self._residency = residency
        self._statistics = statistics
        self._on_switch = on_switch
        self._task: asyncio.Task[None] | None = None
        self._again = False
        self._beside: set[asyncio.Task[None]] = set()
        self._retiring: set[asyncio.Task[None]] = set()
        #: what was in service just now and took other inputs: requests that were read for it are still to come
        self._former: Entry | None = None
        self._stopping = asyncio.Event()

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def options(self) -> ModelOptions:
        """How it is served now."""
        return self.found.options

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All versions that may answer, the one on trial included."""
        some = (*self._entries.values(), self.stable, self.candidate)
        return tuple(dict.fromkeys(one for one in some if one is not None))

    def pick(self, version: str, request: Request | None = None) -> Entry:
        """The version that answers.

        Args:
            version: the one asked for; "" lets the server choose.
            request: what is asked, to be given to a version that takes it; None only asks who would answer now.

        Raises:
            NotFound: the policy has no such version.
            Unavailable: it cannot answer, and why.
        """
        if version:
            return self._by_number(version)
        stable, trial = self.stable, self.trial
        if trial is None:
            if stable is None:
                raise self._unavailable()
            former = self._former
            if former is not None and request is not None and not _fits(request, stable) and _fits(request, former):
                return former
            return stable
        assert self.candidate is not None
        if request is None or stable is None:
            return self.candidate if trial.mode == "all" or stable is None else stable
        return self.candidate if trial.takes() else stable

    def versions(self) -> tuple[int, ...]:
        """Those that may be asked for, ascending."""
        return tuple(sorted({*self._wanted(), *(entry.version.number for entry in self.entries)}))

    def update(self, found: Found) -> None:
        """Takes what a look at the disk found, and begins what follows from it."""
        if found.problem:
            if found.problem != self.found.problem:
                _log.warning("model %r stays as it is: %s", self.name, found.problem)
            self.found = dataclasses.replace(self.found, problem=found.problem)
            return
        for number, why in found.problems.items():
            if self.found.problems.get(number) != why:
                _log.warning("%s version %d is not taken: %s", self.name, number, why)
        self.found = found
        there = {entry_key(version, found.options) for version in found.versions}
        self._rejected = {key: one for key, one in self._rejected.items() if key in there}
        for entry in self.entries:  # of what needs no other session
            entry.options = entry.options.model_copy(
                update={name: getattr(found.options, name) for name in ("version_policy", "rollout", "preload", "pin")}
            )
        self.reconcile()

    def reconcile(self) -> None:
        """Begins to bring into service what should be, unless that goes on already."""
        self._again = True
        if self._task is None:
            self._task = asyncio.create_task(self._reconcile())
            self._task.add_done_callback(_reported)

    async def settled(self) -> None:
        """Returns when nothing is being brought into service, and what is to be loaded ahead is."""
        while going := [task for task in (self._task, *self._beside) if task is not None]:
            await asyncio.wait(going)

    def tick(self, now_ns: int) -> None:
        """Judges a trial, and tries again what failed to load. Called a few times a second."""
        if self.trial is not None and (verdict := self.trial.verdict(now_ns)) is not None:
            if verdict.passed:
                self._promote(verdict.why)
            else:
                self.roll_back(verdict.why)
        if self._task is None and any(
            one.retry_ns is not None and one.retry_ns <= now_ns for one in self._rejected.values()
        ):
            self.reconcile()

    def roll_back(self, why: str) -> str:
        """Ends a trial, or goes back from the version in service to the one below it on disk.

        Returns:
            The version that is gone back to.

        Raises:
            NotFound: there is none.
        """
        if self.trial is not None and self.candidate is not None and self.stable is not None:
            failed, stable = self.candidate, self.stable
            self._end_trial()
            self._rejected[failed.key] = _Rejected(f"rolled back: {why}", None)
            for one in self.found.versions:  # what lies between is not proved either, and nobody asked for it
                if stable.version.number < one.number < failed.version.number:
                    passed_over = _Rejected(f"passed over: version {failed.version.number} was rolled back", None)
                    self._rejected.setdefault(entry_key(one, self.options), passed_over)
            self._note(failed, stable, "rolled back", why)
            self._retire(failed)
            self.reconcile()
            return str(stable.version.number)
        current = self.stable
        older = [
            one
            for one in self.found.versions
            if current is not None
            and one.number < current.version.number
            and entry_key(one, self.options) not in self._rejected
        ]
        if current is None or not older:
            raise NotFound(f"model {self.name!r} has no version to go back to")
        self._rejected[current.key] = _Rejected(f"rolled back: {why}", None)
        self.reconcile()
        return str(older[-1].number)

    def forgive(self) -> None:
        """Versions that were rejected may be tried again, and what an operator unloaded is served again."""
        self._rejected.clear()
        self.unloaded = False

    def withdraw(self, why: str) -> None:
        """Ends all versions, each after its last answer."""
        if self.stable is not None:
            self._note(self.stable, None, "withdrawn", why)
        self._end_trial()
        entries = self.entries
        self.stable = None
        self._entries.clear()
        for entry in entries:
            self._retire(entry)

    async def stop(self) -> None:
        """Ends what goes on in the background, and all versions."""
        self._stopping.set()
        if going := [task for task in (self._task, *self._beside) if task is not None]:
            for task in going:
                task.cancel()
            await asyncio.wait(going)
        self.withdraw("the server stops")
        while self._retiring:
            await asyncio.wait(self._retiring)

    def index(self) -> list[dict[str, Any]]:
        """Every version on disk or in memory: name, version, state and reason, as the protocol has it, and how long it
        took to load, where it was."""
        rows: dict[int, tuple[str, str]] = {}
        seconds = {entry.version.number: entry.load_seconds for entry in self.entries if entry.load_seconds}
        reason = "unloaded by an operator" if self.unloaded else self.found.problem
        for version in self.found.versions:
            rejected = self._rejected.get(entry_key(version, self.options))
            wanted = version.number in self._selected()
            rows[version.number] = (
                "UNAVAILABLE",
                rejected.why if rejected else reason or ("" if wanted else "not selected by the version policy"),
            )
        for number, why in self.found.problems.items():
            rows[number] = ("UNAVAILABLE", why)
        for entry in self.entries:
            word = "on trial" if entry is self.candidate else ""
            rows[entry.version.number] = (entry.state, entry.reason or word or self.found.problem)
        return [
            {
                "name": self.name,
                "version": str(number),
                "state": state,
                "reason": why,
                "load_seconds": seconds.get(number),
            }
            for number, (state, why) in sorted(rows.items())
        ] or [
            {
                "name": self.name,
                "version": "",
                "state": "UNAVAILABLE",
                "reason": reason or "it has no version",
                "load_seconds": None,
            }
        ]

    def _by_number(self, version: str) -> Entry:
        number = int(version) if VERSION_NAME.fullmatch(version) else 0
        entry = self._entries.get(number)
        if entry is not None:
            return entry
        if self.candidate is not None and self.candidate.version.number == number:
            return self.candidate
        if number in self._selected() or number in self.found.problems:
            raise self._unavailable(number)
        offered = ", ".join(map(str, self.versions())) or "none"
        raise NotFound(f"model {self.name!r} has no version {version!r}", hint=f"versions that are served: {offered}")

    def _unavailable(self, number: int | None = None) -> Unavailable:
        if self.unloaded:
            return Unavailable(f"model {self.name!r} was unloaded by an operator")
        reasons = [
            f"version {row['version']}: {row['reason'] or row['state'].lower()}" if row["version"] else row["reason"]
            for row in self.index()
            if number is None or row["version"] == str(number)
        ]
        return Unavailable(f"model {self.name!r} cannot answer now: {'; '.join(reasons) or 'it has no version'}")

    def _selected(self) -> tuple[int, ...]:
        """What the policy takes of what is on disk, whether it works or not."""
        numbers = [version.number for version in self.found.versions]
        return selected(self.options.version_policy, numbers, self.found.in_service)

    def _wanted(self) -> tuple[int, ...]:
        """What the policy takes of what is on disk and not rejected."""
        if self.unloaded:
            return ()
        now = time.monotonic_ns()
        numbers = []
        for version in self.found.versions:
            rejected = self._rejected.get(entry_key(version, self.options))
            if rejected is None or (rejected.retry_ns is not None and rejected.retry_ns <= now):
                numbers.append(version.number)
        return selected(self.options.version_policy, numbers, self.found.in_service)

    async def _reconcile(self) -> None:
        try:
            while self._again:
                self._again = False
                await self._step()
        finally:
            self._task = None

    async def _step(self) -> None:
        by_number = {version.number: version for version in self.found.versions}
        wanted = self._wanted()
        for number in wanted[:-1]:
            self._serve_beside(by_number[number])
        if not wanted:
            # What is in memory goes on, unless its files are gone or an operator said so.
            if self.unloaded or not self.found.versions:
                if self.entries:
                    self.withdraw("unloaded by an operator" if self.unloaded else "its files are gone")
            return
        target = by_number[wanted[-1]]
        key = entry_key(target, self.options)
        if self.candidate is not None and self.candidate.key != key:
            gone, self.candidate.reason = self.candidate, "withdrawn during its trial"
            self._end_trial()
            self._note(gone, self.stable, "withdrawn", "another version is to be in service")
            self._retire(gone)
        if self.candidate is None and (self.stable is None or self.stable.key != key) and not await self._bring(target):
            self._again = True  # the next best
            return
        for number, entry in list(self._entries.items()):
            if number not in wanted and entry is not self.stable and entry is not self.candidate:
                del self._entries[number]
                self._retire(entry)

    def _serve_beside(self, version: Version) -> None:
        """A version that is only answered by where it is asked for."""
        key = entry_key(version, self.options)
        before = self._entries.get(version.number)
        if before is not None and before.key == key:
            return
        if before is not None and before is self.stable:
            return  # replaced on disk: it leaves with the switch
        entry = self._entry(version)
        self._entries[version.number] = entry
        if before is not None:
            self._retire(before)
        self._spawn(self._describe_and_load(entry), self._beside)

    async def _describe_and_load(self, entry: Entry) -> None:
        try:
            entry.info = await self._residency.in_loader(_describe, entry)
            if entry.options.preload:
                await self._residency.acquire(entry)
        except Overloaded:
            entry.evicted = True
        except Error as error:
            self._reject(entry, error)

    async def _bring(self, version: Version) -> bool:
        """Loads and tests a version, and puts it into service or on trial. Returns whether it can be used."""
        entry = self._entry(version)
        beside = self._entries.get(version.number)
        if beside is not None and beside.key == entry.key:
            entry = beside  # served by number until now
        try:
            entry.info = entry.info or await self._residency.in_loader(_describe, entry)
            if self.stable is None:
                self._entries[version.number] = entry
                self.stable = entry
                if entry.info is not None and not entry.options.preload:
                    self._note(None, entry, "in service", "loaded at its first request")
                    return True
            entry.apart = self.stable is not entry and entry.loaded is None
            await self._residency.acquire(entry)
        except Error as error:
            if isinstance(error, Overloaded) and self.stable is entry and entry.info is not None:
                entry.evicted = True
                self._note(None, entry, "in service", "loaded when there is room")
                return True
            self._reject(entry, error)
            return False
        stable = self.stable
        self._rejected.pop(entry.key, None)
        if stable is None or stable is entry:
            self.stable = entry
            self._note(None, entry, "in service", "the first version")
        else:
            self._begin_trial(stable, entry)
        return True

    def _begin_trial(self, stable: Entry, entry: Entry) -> None:
        rollout = self.options.rollout
        same = stable.info is not None and entry.info is not None and _signature(stable.info) == _signature(entry.info)
        if entry.version.digest == stable.version.digest and entry.version.number == stable.version.number:
            return self._switch(stable, entry, "in service", "its options changed")
        if entry.version.number < stable.version.number:
            return self._switch(stable, entry, "in service", "an older version is wanted")
        if not same:
            self._former = stable
            return self._switch(stable, entry, "in service", "it takes other inputs, so nothing can be compared")
        if stable.loaded is None or not (rollout.trial_seconds or rollout.trial_requests):
            return self._switch(stable, entry, "in service", "a new version")
        self.candidate = entry
        self.trial = Trial(rollout, old=stable.window, now_ns=time.monotonic_ns())
        entry.held = stable.held = True
        share = {
            "canary": f"{rollout.canary or 0:.0%} of requests",
            "shadow": "a copy of requests",
            "all": "all requests",
        }
        self._note(stable, entry, "trial", f"a new version gets {share[self.trial.mode]}")
        return None

    def _promote(self, why: str) -> None:
        stable, candidate = self.stable, self.candidate
        assert stable is not None
        assert candidate is not None
        self._end_trial()
        self._switch(stable, candidate, "passed", why)
        self.reconcile()

    def _switch(self, old: Entry, new: Entry, what: str, why: str) -> None:
        self.stable = new
        self._entries[new.version.number] = new
        self._note(old, new, what, why)
        if old.version.number not in self._wanted() or self._entries.get(old.version.number) is not old:
            if self._entries.get(old.version.number) is old:
                del self._entries[old.version.number]
            self._retire(old)

    def _end_trial(self) -> None:
        for entry in (self.stable, self.candidate):
            if entry is not None:
                entry.held = False
        if self.trial is not None and self.candidate is not None:
            self.candidate.window = self.trial.new
        self.trial = self.candidate = None

    def _entry(self, version: Version) -> Entry:
        entry = Entry(version, self.options, self.found.folder, self._statistics(version.number), bytes=version.bytes)
        self._residency.entries.add(entry)
        return entry

    def _reject(self, entry: Entry, error: Error) -> None:
        before = self._rejected.get(entry.key)
        failures = before.failures + 1 if before else 1
        wait = min(_RETRY_S * 2 ** (failures - 1), _MOST_RETRY_S)
        where = f" ({error.where})" if error.where else ""
        why = f"{error.what}{where}"
        self._rejected[entry.key] = _Rejected(why, time.monotonic_ns() + int(wait * 1e9), failures)
        if before is None or before.why != why:
            level = logging.WARNING if isinstance(error, Overloaded | Unavailable) else logging.ERROR
            _log.log(level, "%s gets no requests: %s; tried again in %.0f s", entry, why, wait)
        if self.stable is entry:
            self.stable = None
        if self._entries.get(entry.version.number) is entry:
            del self._entries[entry.version.number]
        self._residency.entries.discard(entry)

    def rejected_at_use(self, entry: Entry, error: Error) -> None:
        """A version that was to be loaded by its first request could not be: the next best takes its place."""
        if self._task is None and not isinstance(error, Overloaded) and entry in self.entries:
            self._reject(entry, error)
            self.reconcile()

    def _retire(self, entry: Entry) -> None:
        entry.held = False
        self._spawn(self._end(entry), self._retiring)

    async def _end(self, entry: Entry) -> None:
        if entry is self._former:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _FORMER_S)
            if entry is self._former:
                self._former = None
        await self._residency.retire(entry)

    def _spawn(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(_reported)

    def _note(self, old: Entry | None, new: Entry | None, what: str, why: str) -> None:
        numbers = [None if one is None else str(one.version.number) for one in (old, new)]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._on_switch(Switch(now, self.name, numbers[0], numbers[1], what, why))


def _describe(entry: Entry) -> ModelInfo | None:
    return loading.describe(entry.version, entry.options, entry.folder)


def _fits(request: Request, entry: Entry) -> bool:
    info = entry.info
    return info is not None and all(
        (array := request.inputs.get(spec.name)) is not None
        and (spec.shape is None or len(spec.shape) == array.ndim)
        and all(
            not isinstance(want, int) or want == size for want, size in zip(spec.shape or (), array.shape, strict=False)
        )
        for spec in info.inputs
    )


def _signature(info: ModelInfo) -> tuple[Any, ...]:
    """What a request that was checked against one version may rely on in another."""
    return (_specs(info.inputs), _specs(info.outputs), info.max_batch_size)


def _specs(specs: tuple[TensorSpec, ...]) -> tuple[Any, ...]:
    fixed = [
        None if one.shape is None else tuple(d if isinstance(d, int) else None for d in one.shape) for one in specs
    ]
    return tuple(sorted((one.name, one.dtype, str(shape)) for one, shape in zip(specs, fixed, strict=True)))


def _reported(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("serving: %s", error, exc_info=error)
