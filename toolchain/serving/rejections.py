"""Versions of a model that may not be used, why, and when they are tried again."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from toolchain.serving.residency import Key

#: The first and the longest wait before a version that failed to load is tried again.
_RETRY_S, _MOST_RETRY_S = 2.0, 300.0


@dataclasses.dataclass(frozen=True, slots=True)
class Rejection:
    """One version that may not be used.

    Attributes:
        why: in words.
        retry_ns: ``time.monotonic_ns()`` when it may be tried again; None where only other files help.
        failures: how often it failed to load.
    """

    why: str
    retry_ns: int | None = None
    failures: int = 1


class Rejections:
    """Those of one model, by what would be loaded: other files or other options are another version."""

    def __init__(self) -> None:
        self._all: dict[Key, Rejection] = {}

    def why(self, key: Key) -> str | None:
        """Why a version may not be used; None where it may, or may be tried again."""
        found = self._all.get(key)
        return None if found is None else found.why

    def bars(self, key: Key, now_ns: int) -> bool:
        """Whether a version may not be used now."""
        found = self._all.get(key)
        return found is not None and (found.retry_ns is None or found.retry_ns > now_ns)

    def failed(self, key: Key, why: str, now_ns: int) -> float | None:
        """A version could not be loaded.

        Returns:
            Seconds until it is tried again, longer each time; None where the reason is the one of before.
        """
        before = self._all.get(key)
        failures = before.failures + 1 if before else 1
        wait = min(_RETRY_S * 2 ** (failures - 1), _MOST_RETRY_S)
        self._all[key] = Rejection(why, now_ns + int(wait * 1e9), failures)
        return wait if before is None or before.why != why else None

    def bar(self, key: Key, why: str) -> None:
        """A version may not be used until its files change."""
        self._all[key] = Rejection(why)

    def bar_too(self, key: Key, why: str) -> None:
        """As ``bar``, unless it is rejected already."""
        self._all.setdefault(key, Rejection(why))

    def forgive(self, key: Key) -> None:
        """It works now."""
        self._all.pop(key, None)

    def clear(self) -> None:
        """All may be tried again."""
        self._all.clear()

    def keep(self, keys: Collection[Key]) -> None:
        """Forgets what is not there any more."""
        self._all = {key: one for key, one in self._all.items() if key in keys}

    def due(self, now_ns: int) -> bool:
        """Whether something may be tried again."""
        return any(one.retry_ns is not None and one.retry_ns <= now_ns for one in self._all.values())
