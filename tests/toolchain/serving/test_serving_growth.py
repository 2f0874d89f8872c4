"""Many switches of versions in one process: what is gone is gone, sessions and memory alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

SWITCHES, WARM, PADDING = 40, 10, 4 << 20

#: After each switch, waits until one session lives, and prints the memory of the process (Pss), bytes. Versions are not
#: tested in processes of their own here, which would take most of the time and none of the memory.
SCENE = """if True:
    import asyncio, gc, sys
    from pathlib import Path

    import runtimes
    from runtimes import _selftest
    from toolchain.serving import memory
    from toolchain.serving.options import Batching, ModelOptions, Rollout
    from versions_support import request, serving, until, write_artifact

    _selftest.selftest_apart = lambda *args, **options: ()
    memory.few_arenas()
    root = Path(sys.argv[1])
    switches, padding = int(sys.argv[2]), int(sys.argv[3])
    at_once = ModelOptions(batching=Batching(instances=1), rollout=Rollout(trial_seconds=0, trial_requests=0))

    def pss():
        for line in open("/proc/self/smaps_rollup"):
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10

    def sessions():
        return sum(isinstance(one, runtimes.Session) for one in gc.get_objects())

    async def run():
        gc.disable()
        write_artifact(root / "a" / "1", 1.0, padding=padding)
        async with serving(root, poll_seconds=0.02, defaults=at_once) as models:
            for version in range(2, switches + 2):
                write_artifact(root / "a" / str(version), float(version), padding=padding)
                await until(lambda: models.info("a").version == str(version))
                await asyncio.gather(*(models.infer(request("a")) for _ in range(20)))
                # the one before leaves after its last answer, by its last reference: nothing is collected here
                await until(lambda: sessions() == 1)
                print(pss(), flush=True)
        assert sessions() == 0

    asyncio.run(run())
"""


def test_neither_sessions_nor_memory_grow_with_switches(tmp_path: Path) -> None:
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("the system does not tell a process's own memory")
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(here), str(here.parents[2])]!r}\n{SCENE}",
         str(tmp_path), str(SWITCHES), str(PADDING)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [int(line) for line in done.stdout.splitlines()]
    assert len(seen) == SWITCHES
    # One version that stayed would be 4 MB or more, thirty of them 120 MB.
    memory = seen[WARM:]
    half = len(memory) // 2
    assert max(memory[half:]) - max(memory[:half]) < 4 * PADDING, [size >> 20 for size in memory]
