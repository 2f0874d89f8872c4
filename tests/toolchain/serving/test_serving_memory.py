"""Resident memory, the limits of control groups, the trend, and the order in which relief is given."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from toolchain.serving import memory
from toolchain.serving.memory import Relief, Watch

MB = 1 << 20


def test_resident_memory_is_what_was_written_to() -> None:
    before = memory.resident_bytes()
    held = np.ones(64 * MB, np.uint8)
    grown = memory.resident_bytes() - before
    assert 60 * MB < grown < 80 * MB
    del held
    memory.give_back()
    assert memory.resident_bytes() - before < 16 * MB


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "4096", "memory.max": "8192"}, 4096),
        ("0::/a/b\n", {"memory.max": "8192\n"}, 8192),  # in a container: the path is not visible
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/../x\n", {"x/memory.max": "5"}, 5),
        ("5:cpu:/a\n4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "7", "a/memory.max": "1"}, 7),
        ("4:hugetlb,memory:/a\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("nonsense\n", {}, None),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, groups: str, files: dict[str, str], limit: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(groups)
    assert memory.cgroup_limit(tmp_path, tmp_path / "membership") == limit
    assert memory.cgroup_limit(tmp_path, tmp_path / "nothing") is None


def run(watch: Watch, sizes: list[float], *, start: int = 0) -> list[Relief]:
    """Samples each half second, in percent of the cap."""
    return [
        watch.sample(int((start + i) * 5e8), int(size * watch.cap / 100)) for i, size in enumerate(sizes) if watch.cap
    ]


def test_the_trend_is_the_slope_and_is_followed_upwards_only() -> None:
    watch = Watch(1000 * MB)
    for i in range(10):
        watch.sample(i * 500_000_000, (100 + i) * MB)
    assert watch.trend() == pytest.approx(2 * MB)
    assert watch.predicted() == pytest.approx((109 + 2 * memory.HORIZON_S) * MB, rel=1e-6)
    for i in range(10, 40):
        watch.sample(i * 500_000_000, (140 - i) * MB)
    assert watch.trend() < 0
    assert watch.predicted() == watch.resident
    watch.forget_trend()
    assert (watch.trend(), watch.resident) == (0.0, 101 * MB)


def test_relief_comes_in_order_and_goes_later_than_it_came() -> None:
    watch = Watch(1000 * MB)
    flat = [80.0] * 20
    assert set(run(watch, flat)) == {Relief.NONE}
    for level, percent in ((Relief.SHRINK, 86), (Relief.EVICT, 93), (Relief.REFUSE, 98.5)):
        assert run(watch, [percent] * 30, start=100 * level)[-1] is level
        assert run(watch, [percent - 4] * 30, start=100 * level + 40)[-1] is level
    assert run(watch, [92] * 30, start=500)[-1] is Relief.EVICT
    assert run(watch, [86] * 30, start=600)[-1] is Relief.SHRINK
    assert run(watch, [81] * 30, start=700)[-1] is Relief.SHRINK
    assert run(watch, [79] * 30, start=800)[-1] is Relief.NONE
    assert run(watch, [84] * 30, start=900)[-1] is Relief.NONE


def test_growth_is_met_before_it_arrives_but_refuses_nobody() -> None:
    watch = Watch(1000 * MB)
    levels = run(watch, [40 + 2 * i for i in range(20)])  # 40 MB a second: 20 % within the horizon
    assert levels[0] is Relief.NONE
    assert levels[15] is Relief.SHRINK
    assert levels[17] is Relief.EVICT
    assert levels[19] is Relief.EVICT  # 98 % in five seconds, and 78 % now


def test_without_a_cap_nothing_is_done() -> None:
    watch = Watch(None)
    for i in range(20):
        assert watch.sample(i * 500_000_000, i << 40) is Relief.NONE


#: Eight threads that all hold memory at the same time; then glibc says how many pools there are.
_POOLS = """if True:
    import ctypes, os, sys, threading
    from toolchain.serving import memory
    memory.few_arenas()
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
    meet = threading.Barrier(8)
    def hold():
        meet.wait()
        libc.malloc(ctypes.c_size_t(1000))
        meet.wait()
    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    sys.stdout.flush()
    stream = ctypes.c_void_p(libc.fdopen(1, b"w"))
    libc.malloc_info(0, stream)
    libc.fflush(stream)
"""


@pytest.mark.parametrize("said", [None, "5"])
def test_threads_share_a_few_pools_unless_the_environment_says_how_many(said: str | None) -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_info"):
        pytest.skip("another C library")
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    if said is not None:
        environment["MALLOC_ARENA_MAX"] = said
    done = subprocess.run(
        [sys.executable, "-c", _POOLS], cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True,
        check=True, timeout=60,
    )  # fmt: skip
    pools = done.stdout.count("<heap nr=")
    assert pools == int(said or memory.ARENAS)
