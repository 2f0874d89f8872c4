"""How versions of one model come and go: loaded, on trial, in service, rolled back, retired.

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

from runtimes import Error
from toolchain.serving import loading, matching
from toolchain.serving.base import ModelInfo, NotFound, Overloaded, Unavailable
from toolchain.serving.lineup import Lineup
from toolchain.serving.repository import Found, Version
from toolchain.serving.residency import Entry, Residency, entry_key
from toolchain.serving.rollout import Trial
from toolchain.serving.standing import Known, Standing, fingerprint
from toolchain.serving.statistics import Statistics

_log = logging.getLogger(__name__)

#: How long a request may take from being read to being answered, after a switch to other inputs.
_FORMER_S = 5.0


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


class Changeover:
    """Brings versions of one model into service and out of it. All of it is used on the event loop's thread.

    Args:
        lineup: what it changes.
        residency: loads and evicts.
        statistics: gives the counts of a version, by its number.
        on_switch: is told of every switch.
        standing: is told what other workers should know.
    """

    def __init__(
        self,
        lineup: Lineup,
        *,
        residency: Residency,
        statistics: Callable[[int], Statistics],
        on_switch: Callable[[Switch], None],
        standing: Standing,
    ) -> None:
        self.lineup = lineup
        self._standing = standing
        self._known = Known()
        self._residency = residency
        self._statistics = statistics
        self._on_switch = on_switch
        self._task: asyncio.Task[None] | None = None
        self._again = False
        self._beside: set[asyncio.Task[None]] = set()
        self._retiring: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        #: why the last version that could not be loaded could not
        self.failure: Error | None = None

    def update(self, found: Found) -> None:
        """Takes what a look at the disk found, and begins what follows from it."""
        if found.problem:
            if found.problem != self.lineup.found.problem:
                _log.warning("model %r stays as it is: %s", self.lineup.name, found.problem)
            self.lineup.found = dataclasses.replace(self.lineup.found, problem=found.problem)
            return
        for number, why in found.problems.items():
            if self.lineup.found.problems.get(number) != why:
                _log.warning("%s version %d is not taken: %s", self.lineup.name, number, why)
        self.lineup.found = found
        there = {entry_key(version, found.options) for version in found.versions}
        self.lineup.rejected.keep(there)
        for entry in self.lineup.entries:  # of what needs no other session
            entry.options = entry.options.model_copy(
                update={name: getattr(found.options, name) for name in ("version_policy", "rollout", "preload", "pin")}
            )
        self.reconcile()

    def learn(self, known: Known) -> None:
        """Takes what other workers found out: what they rolled back is not tried here, or not any longer."""
        self._known = known
        candidate, stable = self.lineup.candidate, self.lineup.stable
        for version in self.lineup.found.versions:
            key = entry_key(version, self.lineup.options)
            why = known.barred.get(fingerprint(key))
            if why is None or self.lineup.rejected.why(key) is not None:
                continue
            if key in [entry.key for entry in (candidate, stable) if entry is not None]:
                # Also one that passed here: which version answers is not to depend on the worker.
                with contextlib.suppress(NotFound):  # this one has no other
                    self.roll_back(f"by another worker: {why}", tell=False)
            else:
                self.lineup.rejected.bar(key, f"rolled back by another worker: {why}")

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
        if self.lineup.trial is not None and (verdict := self.lineup.trial.verdict(now_ns)) is not None:
            if verdict.passed:
                self._promote(verdict.why)
            else:
                self.roll_back(verdict.why)
        if self._task is None and self.lineup.rejected.due(now_ns):
            self.reconcile()

    def roll_back(self, why: str, *, tell: bool = True) -> str:
        """Ends a trial, or goes back from the version in service to the one below it on disk.

        Args:
            why: in words.
            tell: other workers, who do the same.

        Returns:
            The version that is gone back to.

        Raises:
            NotFound: there is none.
        """
        if self.lineup.trial is not None and self.lineup.candidate is not None and self.lineup.stable is not None:
            failed, stable = self.lineup.candidate, self.lineup.stable
            self._end_trial()
            self.lineup.rejected.bar(failed.key, f"rolled back: {why}")
            for one in self.lineup.found.versions:  # what lies between is not proved either, and nobody asked for it
                if stable.version.number < one.number < failed.version.number:
                    passed_over = f"passed over: version {failed.version.number} was rolled back"
                    self.lineup.rejected.bar_too(entry_key(one, self.lineup.options), passed_over)
            if tell:
                self._standing.bars(self.lineup.name, failed.key, why)
            self._standing.serves(stable.version)
            self._note(failed, stable, "rolled back", why)
            self._retire(failed)
            self.reconcile()
            return str(stable.version.number)
        current = self.lineup.stable
        older = [
            one
            for one in self.lineup.found.versions
            if current is not None
            and one.number < current.version.number
            and self.lineup.rejected.why(entry_key(one, self.lineup.options)) is None
        ]
        if current is None or not older:
            raise NotFound(f"model {self.lineup.name!r} has no version to go back to")
        self.lineup.rejected.bar(current.key, f"rolled back: {why}")
        if tell:
            self._standing.bars(self.lineup.name, current.key, why)
        self.reconcile()
        return str(older[-1].number)

    def forgive(self) -> None:
        """Versions that were rejected may be tried again, and what an operator unloaded is served again."""
        self.lineup.rejected.clear()
        self._standing.forgives(self.lineup.name)
        self._known = dataclasses.replace(self._known, barred={})
        self.lineup.unloaded = False

    def withdraw(self, why: str) -> None:
        """Ends all versions, each after its last answer."""
        if self.lineup.stable is not None:
            self._note(self.lineup.stable, None, "withdrawn", why)
        self._end_trial()
        entries = self.lineup.entries
        self.lineup.stable = None
        self.lineup.by_number.clear()
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

    def unload(self) -> None:
        """Begins to take the model out of service, until ``forgive``."""
        self.lineup.unloaded = True
        self.reconcile()

    async def _reconcile(self) -> None:
        try:
            while self._again:
                self._again = False
                await self._step()
        finally:
            self._task = None

    async def _step(self) -> None:
        by_number = {version.number: version for version in self.lineup.found.versions}
        wanted = self.lineup.wanted()
        for number in wanted[:-1]:
            self._serve_beside(by_number[number])
        if not wanted:
            # What is in memory goes on, unless its files are gone or an operator said so.
            if self.lineup.unloaded or not self.lineup.found.versions:
                if self.lineup.entries:
                    self.withdraw("unloaded by an operator" if self.lineup.unloaded else "its files are gone")
            return
        target = by_number[wanted[-1]]
        key = entry_key(target, self.lineup.options)
        proved = self._proved(target)
        if proved is not None:
            await self._bring(proved)
            self._again = True  # and then the newest, on trial
            return
        if self.lineup.candidate is not None and self.lineup.candidate.key != key:
            gone, self.lineup.candidate.reason = self.lineup.candidate, "withdrawn during its trial"
            self._end_trial()
            self._note(gone, self.lineup.stable, "withdrawn", "another version is to be in service")
            self._retire(gone)
        if (
            self.lineup.candidate is None
            and (self.lineup.stable is None or self.lineup.stable.key != key)
            and not await self._bring(target)
        ):
            self._again = True  # the next best
            return
        for number, entry in list(self.lineup.by_number.items()):
            if number not in wanted and entry is not self.lineup.stable and entry is not self.lineup.candidate:
                del self.lineup.by_number[number]
                self._retire(entry)

    def _proved(self, target: Version) -> Version | None:
        """The version that other workers have in service, where this one has none and would begin with a newer one."""
        if self.lineup.stable is not None:
            return None
        now = time.monotonic_ns()
        for version in self.lineup.found.versions:
            if (version.number, version.digest) == self._known.in_service and version.number < target.number:
                barred = self.lineup.rejected.bars(entry_key(version, self.lineup.options), now)
                return None if barred else version
        return None

    def _serve_beside(self, version: Version) -> None:
        """A version that is only answered by where it is asked for."""
        key = entry_key(version, self.lineup.options)
        before = self.lineup.by_number.get(version.number)
        if before is not None and before.key == key:
            return
        if before is not None and before is self.lineup.stable:
            return  # replaced on disk: it leaves with the switch
        entry = self._entry(version)
        self.lineup.by_number[version.number] = entry
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
        beside = self.lineup.by_number.get(version.number)
        if beside is not None and beside.key == entry.key:
            entry = beside  # served by number until now
        try:
            entry.info = entry.info or await self._residency.in_loader(_describe, entry)
            if self.lineup.stable is None:
                self.lineup.by_number[version.number] = entry
                self.lineup.stable = entry
                if entry.info is not None and not entry.options.preload:
                    self._standing.serves(version)
                    self._note(None, entry, "in service", "loaded at its first request")
                    return True
            entry.apart = self.lineup.stable is not entry and entry.loaded is None
            await self._residency.acquire(entry)
        except Error as error:
            if isinstance(error, Overloaded) and self.lineup.stable is entry and entry.info is not None:
                entry.evicted = True
                self._note(None, entry, "in service", "loaded when there is room")
                return True
            self._reject(entry, error)
            return False
        stable = self.lineup.stable
        self.lineup.rejected.forgive(entry.key)
        if stable is None or stable is entry:
            self.lineup.stable = entry
            self._standing.serves(version)
            self._note(None, entry, "in service", "the first version")
        else:
            self._begin_trial(stable, entry)
        return True

    def _begin_trial(self, stable: Entry, entry: Entry) -> None:
        rollout = self.lineup.options.rollout
        if entry.version.digest == stable.version.digest and entry.version.number == stable.version.number:
            return self._switch(stable, entry, "in service", "its options changed")
        if entry.version.number < stable.version.number:
            return self._switch(stable, entry, "in service", "an older version is wanted")
        if not matching.same(stable.info, entry.info):
            self.lineup.former = stable
            return self._switch(stable, entry, "in service", "it takes other inputs, so nothing can be compared")
        if stable.loaded is None or not (rollout.trial_seconds or rollout.trial_requests):
            return self._switch(stable, entry, "in service", "a new version")
        self.lineup.candidate = entry
        self.lineup.trial = Trial(rollout, old=stable.window, now_ns=time.monotonic_ns())
        entry.held = stable.held = True
        share = {
            "canary": f"{rollout.canary or 0:.0%} of requests",
            "shadow": "a copy of requests",
            "all": "all requests",
        }
        self._note(stable, entry, "trial", f"a new version gets {share[self.lineup.trial.mode]}")
        return None

    def _promote(self, why: str) -> None:
        stable, candidate = self.lineup.stable, self.lineup.candidate
        assert stable is not None
        assert candidate is not None
        self._end_trial()
        self._switch(stable, candidate, "passed", why)
        self.reconcile()

    def _switch(self, old: Entry, new: Entry, what: str, why: str) -> None:
        self.lineup.stable = new
        self.lineup.by_number[new.version.number] = new
        self._standing.serves(new.version)
        self._note(old, new, what, why)
        if old.version.number not in self.lineup.wanted() or self.lineup.by_number.get(old.version.number) is not old:
            if self.lineup.by_number.get(old.version.number) is old:
                del self.lineup.by_number[old.version.number]
            self._retire(old)

    def _end_trial(self) -> None:
        for entry in (self.lineup.stable, self.lineup.candidate):
            if entry is not None:
                entry.held = False
        if self.lineup.trial is not None and self.lineup.candidate is not None:
            self.lineup.candidate.window = self.lineup.trial.new
        self.lineup.trial = self.lineup.candidate = None

    def _entry(self, version: Version) -> Entry:
        entry = Entry(
            version,
            self.lineup.options,
            self.lineup.found.folder,
            self._statistics(version.number),
            bytes=version.bytes,
        )
        self._residency.entries.add(entry)
        return entry

    def _reject(self, entry: Entry, error: Error) -> None:
        where = f" ({error.where})" if error.where else ""
        why = f"{error.what}{where}"
        self.failure = error
        wait = self.lineup.rejected.failed(entry.key, why, time.monotonic_ns())
        if wait is not None:
            level = logging.WARNING if isinstance(error, Overloaded | Unavailable) else logging.ERROR
            hint = f"; next: {error.hint}" if error.hint else ""
            _log.log(level, "%s gets no requests: %s; tried again in %.0f s%s", entry, why, wait, hint)
        if self.lineup.stable is entry:
            self.lineup.stable = None
        if self.lineup.by_number.get(entry.version.number) is entry:
            del self.lineup.by_number[entry.version.number]
        self._residency.entries.discard(entry)

    def rejected_at_use(self, entry: Entry, error: Error) -> None:
        """A version that was to be loaded by its first request could not be: the next best takes its place."""
        if self._task is None and not isinstance(error, Overloaded) and entry in self.lineup.entries:
            self._reject(entry, error)
            self.reconcile()

    def _retire(self, entry: Entry) -> None:
        entry.held = False
        self._spawn(self._end(entry), self._retiring)

    async def _end(self, entry: Entry) -> None:
        if entry is self.lineup.former:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _FORMER_S)
            if entry is self.lineup.former:
                self.lineup.former = None
        await self._residency.retire(entry)

    def _spawn(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(_reported)

    def _note(self, old: Entry | None, new: Entry | None, what: str, why: str) -> None:
        numbers = [None if one is None else str(one.version.number) for one in (old, new)]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._on_switch(Switch(now, self.lineup.name, numbers[0], numbers[1], what, why))


def _describe(entry: Entry) -> ModelInfo | None:
    return loading.describe(entry.version, entry.options, entry.folder)


def _reported(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("serving: %s", error, exc_info=error)
