"""The versions of one model: which answers, which is on trial, which may be asked for by number.

What is asked of it changes nothing; ``changeover.py`` changes it.
"""

from __future__ import annotations

import os
import time
from typing import Any

from toolchain.serving import matching
from toolchain.serving.base import NotFound, Request, Unavailable
from toolchain.serving.options import ModelOptions
from toolchain.serving.rejections import Rejections
from toolchain.serving.repository import VERSION_NAME, Found, selected
from toolchain.serving.residency import Entry, entry_key
from toolchain.serving.rollout import Trial


class Lineup:
    """One model. Used on the event loop's thread.

    Attributes:
        found: what is on disk of it.
        stable: what answers where no version is asked for.
        candidate: what is on trial beside it.
        trial: how that is going; None where there is none.
        by_number: what is answered by where it is asked for, ``stable`` included.
        former: what was in service just now and took other inputs: requests that were read for it are still to come.
        rejected: versions that may not be used.
        unloaded: an operator unloaded it.
    """

    def __init__(self, found: Found) -> None:
        self.found = found
        self.stable: Entry | None = None
        self.candidate: Entry | None = None
        self.trial: Trial | None = None
        self.by_number: dict[int, Entry] = {}
        self.former: Entry | None = None
        self.rejected = Rejections()
        self.unloaded = False

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
        some = (*self.by_number.values(), self.stable, self.candidate)
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
            return self._numbered(version)
        stable, trial = self.stable, self.trial
        if trial is None:
            if stable is None:
                raise self._unavailable()
            former = self.former
            if (
                former is not None
                and request is not None
                and not matching.fits(request, stable.info)
                and matching.fits(request, former.info)
            ):
                return former
            return stable
        assert self.candidate is not None
        if request is None or stable is None:
            return self.candidate if trial.mode == "all" or stable is None else stable
        return self.candidate if trial.takes() else stable

    def versions(self) -> tuple[int, ...]:
        """Those that may be asked for, ascending."""
        return tuple(sorted({*self.wanted(), *(entry.version.number for entry in self.entries)}))

    def index(self) -> list[dict[str, Any]]:
        """Every version on disk or in memory: name, version, state and reason, as the protocol has it, and how long it
        took to load, where it was."""
        rows: dict[int, tuple[str, str]] = {}
        seconds = {entry.version.number: entry.load_seconds for entry in self.entries if entry.load_seconds}
        reason = "unloaded by an operator" if self.unloaded else self.found.problem
        for version in self.found.versions:
            rejected = self.rejected.why(entry_key(version, self.options))
            wanted = version.number in self._selected()
            rows[version.number] = (
                "UNAVAILABLE",
                rejected or reason or ("" if wanted else "not selected by the version policy"),
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
                "reason": self._told(why),
                "load_seconds": seconds.get(number),
            }
            for number, (state, why) in sorted(rows.items())
        ] or [
            {
                "name": self.name,
                "version": "",
                "state": "UNAVAILABLE",
                "reason": self._told(reason) or "it has no version",
                "load_seconds": None,
            }
        ]

    def _told(self, why: str) -> str:
        """A reason as clients may read it: paths begin at the model, and not where that lies on this machine."""
        for place in (self.found.folder, *(version.path for version in self.found.versions)):
            if place is not None:
                for parent in {str(place.parent), os.path.realpath(place.parent)}:
                    why = why.replace(parent + os.sep, "")
        return why

    def wanted(self) -> tuple[int, ...]:
        """What the policy takes of what is on disk and not rejected, ascending."""
        if self.unloaded:
            return ()
        now = time.monotonic_ns()
        numbers = [
            version.number
            for version in self.found.versions
            if not self.rejected.bars(entry_key(version, self.options), now)
        ]
        return selected(self.options.version_policy, numbers, self.found.in_service)

    def _numbered(self, version: str) -> Entry:
        number = int(version) if VERSION_NAME.fullmatch(version) else 0
        entry = self.by_number.get(number)
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
