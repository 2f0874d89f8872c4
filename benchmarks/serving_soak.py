"""Minutes of load while versions are switched, workers are killed, cold models are asked for: what fails, what grows?

    python benchmarks/serving_soak.py --artifact artifacts/efficientnet_lite0 [--minutes 10] [--load 0.7] [--workers 2]

Serves a repository of the artifact under its own name and of ``--cold`` copies under other names that are loaded when
they are asked for. A short closed loop finds what the server can do; then requests come as a Poisson process at a share
of that. Meanwhile, in turn: a new version of the artifact arrives by rename; a worker is killed. Every request must be
answered, and rightly, but those of a killed worker: their connections break at that moment, or are refused by it.
Prints what failed otherwise, and the memory of all processes over time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _serving_servers import BROKEN, ROOT, Load, finish, load, ours, start
from serving import model_job, table

sys.path.insert(0, str(ROOT))

#: A broken connection within so long of a kill is the killed worker's.
KILL_SECONDS = 1.0


def processes(root: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it ended meanwhile
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def memory_mb(pids: list[int]) -> float:
    """Of all together, memory that they share counted once (Pss)."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def workers(root: int) -> list[int]:
    """The processes below the first one, but for helpers of multiprocessing."""
    found = []
    for pid in processes(root)[1:]:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"resource_tracker" not in command and command:
            found.append(pid)
    return found


def repository(folder: Path, artifact: Path, cold: int) -> tuple[str, ...]:
    """Fills the folder; names of the cold models, which are copies of the artifact."""
    shutil.copytree(artifact, folder / artifact.name / "1")
    names = tuple(f"cold{i}" for i in range(cold))
    for name in names:
        shutil.copytree(artifact, folder / name / "1")
        (folder / name / "serving.yaml").write_text("preload: false\n")
    return names


def judged(seen: Load, kills: list[int]) -> dict[str, Any]:
    """Which failures are those of a killed worker, and which are not explained."""
    rows = seen.rows
    broken = seen.names.index(BROKEN) if BROKEN in seen.names else -1
    excused, other = 0, {}
    for intended, latency, status, _ in rows[rows[:, 2] != 0].tolist():
        ended = intended + latency
        if status == broken and any(0 <= ended - kill < KILL_SECONDS * 1e9 for kill in kills):
            excused += 1
        else:
            other[seen.names[status]] = other.get(seen.names[status], 0) + 1
    return {"requests": len(rows), "of_killed_workers": excused, "failed": other}


def soak(options: argparse.Namespace) -> dict[str, Any]:
    artifact = options.artifact.resolve()
    options.seconds = 3.0
    job = model_job(artifact, options)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "models"
        cold = repository(folder, artifact, options.cold)
        more = ["--workers", str(options.workers), *options.serve.split()]
        with ours(folder, job, *more) as server:
            load(server, dataclasses.replace(job, concurrency=32))
            capacity = load(server, dataclasses.replace(job, concurrency=32)).rate
            seconds = options.minutes * 60
            one = dataclasses.replace(
                job, rate=options.load * capacity, seconds=seconds, warmup=0.0, concurrency=1024, timeout=60.0
            )
            slow = dataclasses.replace(one, model=cold[0], models=cold, every=1, rate=2.0)
            places = [Path(work) / name for name in ("main", "cold")]
            for place in places:
                place.mkdir()
            clients = [start(server, one, places[0]), start(server, slow, places[1])]
            kills, versions, memory = _disturb(options, server.process.pid, folder / artifact.name, seconds)
            seen = [finish(client, j, place) for client, j, place in zip(clients, (one, slow), places, strict=True)]
    return {
        "capacity": capacity,
        "rate": one.rate,
        "minutes": options.minutes,
        "versions": versions,
        "kills": len(kills),
        "main": [{**judged(seen[0], kills), "p50_ms": seen[0].ms(50), "p99_ms": seen[0].ms(99)}],
        "cold": [{**judged(seen[1], kills), "p50_ms": seen[1].ms(50), "p99_ms": seen[1].ms(99)}],
        "memory": [{"second": second, "mb": mb} for second, mb in memory],
    }


def _disturb(
    options: argparse.Namespace, pid: int, model: Path, seconds: float
) -> tuple[list[int], int, list[tuple[float, float]]]:
    """Until the time is over: new versions, kills, and the memory now and then."""
    begin = time.monotonic()
    kills: list[int] = []
    memory: list[tuple[float, float]] = []
    version, turn = 1, 0
    while (now := time.monotonic() - begin) < seconds - 5:
        memory.append((round(now, 1), round(memory_mb(processes(pid)), 1)))
        time.sleep(min(options.every, seconds / 8) / 2)
        turn += 1
        if turn % 2:
            continue
        if turn % 4 == 2:
            version += 1
            arriving = model / f".{version}.arriving"
            shutil.copytree(model / str(version - 1), arriving)
            arriving.rename(model / str(version))
            if version > 3:
                shutil.rmtree(model / str(version - 3))
        elif options.workers > 1 and (alive := workers(pid)):
            kills.append(time.monotonic_ns())
            os.kill(alive[turn % len(alive)], signal.SIGKILL)
    memory.append((round(time.monotonic() - begin, 1), round(memory_mb(processes(pid)), 1)))
    return kills, version, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=ROOT / "artifacts" / "efficientnet_lite0")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cold", type=int, default=3)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between disturbances")
    parser.add_argument("--protocol", choices=("http", "grpc"), default="http")
    parser.add_argument("--channels", type=int, default=8, help="connections of gRPC")
    parser.add_argument("--serve", default="", help="more options of toolchain serve, in one text")
    found = soak(parser.parse_args())
    for name, rows in found.items():
        print(f"\n{name}\n\n{table(rows)}" if isinstance(rows, list) else f"{name}: {rows}")
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
