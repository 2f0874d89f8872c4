"""How much memory the process has, where that is going, and what is done about it.

Resident memory is read four times a second. Where it will be some seconds ahead is told by a straight line through the
last samples (least squares). As the prediction nears the cap, relief is given in one order, cheapest first::

    share of the cap:      0.85                    0.92                    0.98
    relief:       NONE ──→ SHRINK batches ───────→ EVICT idle sessions ──→ REFUSE new work

A level is left only when both what is measured and what is predicted lie 0.05 below where it was entered, so that the
server does not swing between two of them (Schmitt 1938). Work is refused on what *is*, never on what is predicted, and
only once nothing idle is left to evict.
"""

from __future__ import annotations

import collections
import ctypes
import enum
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

#: Where a level begins, as a share of the cap.
SHARES = {1: 0.85, 2: 0.92, 3: 0.98}
#: How far below that it ends.
_SLACK = 0.05
#: Samples that the trend is fitted to, and how far ahead it is followed.
_SAMPLES = 20
HORIZON_S = 5.0
#: A cgroup without a limit says a number near 2**63, or "max".
_NO_LIMIT = 1 << 60
#: Pools of the C library for all threads, and the number of that option in glibc's malloc.h.
ARENAS, _M_ARENA_MAX = 2, -8


class Relief(enum.IntEnum):
    """What is done against a lack of memory; each includes those before."""

    NONE = 0
    SHRINK = 1
    EVICT = 2
    REFUSE = 3


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; on systems without /proc, the most that it ever was."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _page_size()
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def machine_bytes() -> int | None:
    """The most that this process can have: the machine's memory, or what its cgroup is allowed. None: not known."""
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * _page_size())
    if (limit := cgroup_limit()) is not None:
        found.append(limit)
    return min(found, default=None)


def cgroup_limit(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """The memory limit of this process's cgroup, version 2 or 1, with those above it; None where there is none.

    Inside a container the path in ``/proc/self/cgroup`` is often not visible, and the mount itself is the group: so
    each ancestor is asked, the mount included.
    """
    try:
        lines = membership.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    limits: list[int] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            limits += _number(base.joinpath(*parts[:depth], name))
    return min(limits, default=None)


def _number(path: Path) -> list[int]:
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() and int(text) < _NO_LIMIT else []


def give_back() -> None:
    """Hands memory that was freed back to the system, where the C library keeps it (glibc). Takes milliseconds."""
    trim = _libc("malloc_trim", ctypes.c_size_t)
    if trim is not None:
        trim(0)


def few_arenas() -> None:
    """Has threads share the pools that the C library takes memory from (glibc), unless the environment says how many.

    By itself glibc gives each thread one of its own, up to eight a core. What a version leaves in the pool of the
    thread that loaded it is of no use to the thread that loads the next one: over 40 switches of EfficientNet-Lite0
    a process went up and down between 101 and 134 MB, and with two pools it stayed at 97 to 101.
    """
    tune = _libc("mallopt", ctypes.c_int, ctypes.c_int)
    if tune is not None and "MALLOC_ARENA_MAX" not in os.environ:
        tune(_M_ARENA_MAX, ARENAS)


class Watch:
    """Samples of resident memory, and what follows from them.

    Args:
        cap: bytes that the process may have; None gives no relief, and only watches.
    """

    def __init__(self, cap: int | None) -> None:
        self.cap = cap
        self.level = Relief.NONE
        self._samples: collections.deque[tuple[float, int]] = collections.deque(maxlen=_SAMPLES)

    @property
    def resident(self) -> int:
        """Bytes at the last sample."""
        return self._samples[-1][1] if self._samples else 0

    def trend(self) -> float:
        """Bytes a second: the slope of the line through the samples; 0 before there are five."""
        if len(self._samples) < 5:
            return 0.0
        count = len(self._samples)
        mean_t = sum(t for t, _ in self._samples) / count
        mean_b = sum(b for _, b in self._samples) / count
        spread = sum((t - mean_t) ** 2 for t, _ in self._samples)
        return sum((t - mean_t) * (b - mean_b) for t, b in self._samples) / spread if spread else 0.0

    def predicted(self) -> int:
        """Bytes some seconds ahead. Memory that falls is not believed to fall on."""
        return self.resident + int(max(self.trend(), 0.0) * HORIZON_S)

    def forget_trend(self) -> None:
        """After something large was loaded or freed on purpose: a step is no trend."""
        if self._samples:
            last = self._samples[-1]
            self._samples.clear()
            self._samples.append(last)

    def sample(self, now_ns: int, resident: int) -> Relief:
        """Takes a sample and says what is to be done now.

        Args:
            now_ns: ``time.monotonic_ns()``.
            resident: bytes.
        """
        self._samples.append((now_ns * 1e-9, resident))
        if self.cap is None:
            return self.level
        predicted = self.predicted()
        wanted = Relief.NONE
        for level in (Relief.SHRINK, Relief.EVICT, Relief.REFUSE):
            entered = SHARES[level] * self.cap
            leaves = level <= self.level and max(resident, predicted) >= entered - _SLACK * self.cap
            # REFUSE by what is measured: a trend alone must not turn clients away.
            enters = (resident if level is Relief.REFUSE else predicted) >= entered
            if (enters or (leaves and level <= self.level)) and wanted == level - 1:
                wanted = level
        self.level = wanted
        return wanted


def _page_size() -> int:
    return os.sysconf("SC_PAGE_SIZE")


@functools.cache
def _libc(name: str, *arguments: Any) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library
        return None
    found.argtypes, found.restype = list(arguments), ctypes.c_int
    return cast("Callable[..., int]", found)
