"""Minutes of load while versions are switched, workers are killed, cold models are asked for: what fails, what grows?

    python benchmarks/serving_soak.py --artifact artifacts/efficientnet_lite0 [--minutes 10] [--load 0.7] [--workers 2]
    python benchmarks/serving_soak.py --switches 40        # in one process: memory after each

Serves a repository of the artifact under its own name and of ``--cold`` copies under other names that are loaded when
they are asked for. A short closed loop finds what the server can do; then requests come as a Poisson process at a share
of that, over HTTP. Meanwhile, in turn: a new version of the artifact arrives by rename; a worker is killed.

Every request must be answered, and rightly, but those of a killed worker: each connection that the worker had when it
was killed excuses the one request that broke on it. Whose a connection is says the kernel: the worker is stopped,
its sockets are read from ``/proc``, and then it is killed. Prints what failed otherwise, and the memory of all
processes over time.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _serving_servers import BROKEN, ROOT, Load, Server, finish, load, ours, start
from serving import model_job, table

sys.path.insert(0, str(ROOT))

#: How long a new version is on trial, seconds: all requests go to it, and the one before waits in memory.
TRIAL_SECONDS = 5
#: Requests of a connection. One that was kept for good would stay with the worker that was left when another was
#: killed, and the one that came back would have nothing to do.
REUSE = 20
_ESTABLISHED = "01"


@dataclasses.dataclass(frozen=True)
class Kill:
    """A worker that was killed.

    Attributes:
        at_ns: ``time.monotonic_ns()`` when it was stopped.
        ports: the clients' ends of its connections.
    """

    at_ns: int
    ports: frozenset[int]


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
    """The processes right below the first one; a process that tests a new version is below a worker."""
    return [int(word) for word in Path(f"/proc/{root}/task/{root}/children").read_text().split()]


def kill(pid: int, port: int) -> Kill:
    """Kills a worker, and says which connections it had to a port, those included that it had not accepted yet.

    Whose an unaccepted one is the kernel does not say: it was the worker's if it went with it.
    """
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic_ns()
    seen = _connections(port)
    ports, unaccepted = set(), set(seen.get(0, ()))
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(link)
        if target.startswith("socket:["):
            ports |= seen.get(int(target[8:-1]), set())
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists():  # its sockets are closed when its last thread has ended
        unaccepted |= _connections(port).get(0, set())
        time.sleep(0.002)
    left = set().union(*_connections(port).values())
    return Kill(begin, frozenset(ports | (unaccepted - left)))


def _connections(port: int) -> dict[int, set[int]]:
    """Of all connections to a port of this machine: inode of the server's end (0: not accepted) → clients' ports."""
    found: dict[int, set[int]] = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == _ESTABLISHED and int(words[1].partition(":")[2], 16) == port:
            found.setdefault(int(words[9]), set()).add(int(words[2].partition(":")[2], 16))
    return found


def repository(folder: Path, artifact: Path, cold: int) -> tuple[str, ...]:
    """Fills the folder; names of the cold models, which are copies of the artifact."""
    shutil.copytree(artifact, folder / artifact.name / "1")
    (folder / artifact.name / "serving.yaml").write_text(f"rollout: {{trial_seconds: {TRIAL_SECONDS}}}\n")
    names = tuple(f"cold{i}" for i in range(cold))
    for name in names:
        shutil.copytree(artifact, folder / name / "1")
        (folder / name / "serving.yaml").write_text("preload: false\n")
    return names


def add_version(model: Path, version: int) -> None:
    """A version arrives by rename, and the one three before it goes."""
    arriving = model / f".{version}.arriving"
    shutil.copytree(model / str(version - 1), arriving)
    arriving.rename(model / str(version))
    if version > 3:
        shutil.rmtree(model / str(version - 3))


def served_version(server: Server, model: str) -> str:
    """The newest version that a worker offers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=30)
    try:
        connection.request("GET", f"/v2/models/{model}")
        return str(json.loads(connection.getresponse().read())["versions"][-1])
    finally:
        connection.close()


def judged(seen: Load, kills: list[Kill]) -> dict[str, Any]:
    """Which failures are those of a killed worker, and which are not explained."""
    broken = seen.names.index(BROKEN) if BROKEN in seen.names else -1
    connections = {(number, port) for number, one in enumerate(kills) for port in one.ports}
    excused, other = 0, {}
    where = []
    for intended, latency, status, late, port in seen.rows[seen.rows[:, 2] != 0].tolist():
        mine = [
            (number, port)
            for number, one in enumerate(kills)
            if (number, port) in connections and intended + late < one.at_ns + 1e9 and one.at_ns <= intended + latency
        ]
        if status == broken and mine:
            connections.remove(mine[0])  # it excuses one request
            excused += 1
        else:
            other[seen.names[status]] = other.get(seen.names[status], 0) + 1
            after = [(intended + latency - one.at_ns) / 1e9 for one in kills]
            where.append([seen.names[status], port, latency / 1e9, [round(each, 2) for each in after]])
    for line in where[:40]:  # status, port, seconds, and how long after each kill it ended
        print("not explained:", *line, file=sys.stderr)
    return {"requests": len(seen.rows), "of_killed_workers": excused, "failed": other}


def growth(memory: list[tuple[float, float]], after: float) -> float:
    """MB a minute: the slope of the straight line through the samples after so many seconds."""
    some = np.array([sample for sample in memory if sample[0] >= after])
    return float(np.polyfit(some[:, 0], some[:, 1], 1)[0]) * 60 if len(some) > 2 else 0.0


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """The minutes of load."""
    artifact = options.artifact.resolve()
    options.seconds, options.protocol, options.channels = 3.0, "http", 1
    job = model_job(artifact, options)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "models"
        cold = repository(folder, artifact, options.cold)
        more = ["--workers", str(options.workers), *options.serve.split()]
        with ours(folder, job, *more) as server:
            load(server, dataclasses.replace(job, concurrency=32))
            capacity = options.capacity or load(server, dataclasses.replace(job, concurrency=32)).rate
            seconds = options.minutes * 60
            one = dataclasses.replace(
                job,
                rate=options.load * capacity,
                seconds=seconds,
                warmup=0.0,
                concurrency=1024,
                timeout=120.0,
                reuse=REUSE,
            )
            slow = dataclasses.replace(one, model=cold[0], models=cold, every=1, rate=2.0)
            places = [Path(work) / name for name in ("main", "cold")]
            for place in places:
                place.mkdir()
            clients = [start(server, one, places[0]), start(server, slow, places[1])]
            kills, version, memory = _disturb(options, server, folder / artifact.name, seconds)
            seen = [finish(client, j, place) for client, j, place in zip(clients, (one, slow), places, strict=True)]
            last = served_version(server, artifact.name)
    return {
        "capacity": capacity,
        "rate": one.rate,
        "minutes": options.minutes,
        "versions": version,
        "in service": last,
        "kills": len(kills),
        "main": [{**judged(seen[0], kills), "p50_ms": seen[0].ms(50), "p99_ms": seen[0].ms(99)}],
        "cold": [{**judged(seen[1], kills), "p50_ms": seen[1].ms(50), "p99_ms": seen[1].ms(99)}],
        "MB a minute, after the first": growth(memory, 60),
        "memory": [{"second": second, "mb": mb} for second, mb in memory],
    }


def _disturb(
    options: argparse.Namespace, server: Server, model: Path, seconds: float
) -> tuple[list[Kill], int, list[tuple[float, float]]]:
    """Until the time is over: new versions, kills, and the memory now and then."""
    pid = server.process.pid
    begin = time.monotonic()
    kills: list[Kill] = []
    memory: list[tuple[float, float]] = []
    version, turn = 1, 0
    # the last new version has time to come into service in all workers
    while (now := time.monotonic() - begin) < seconds - 3 * TRIAL_SECONDS:
        memory.append((round(now, 1), round(memory_mb(processes(pid)), 1)))
        time.sleep(min(options.every, seconds / 8) / 2)
        turn += 1
        if turn % 2:
            continue
        if turn % 4 == 2:
            version += 1
            add_version(model, version)
        elif options.workers > 1 and (alive := workers(pid)):
            kills.append(kill(alive[turn // 4 % len(alive)], server.ports["http"]))
    memory.append((round(time.monotonic() - begin, 1), round(memory_mb(processes(pid)), 1)))
    return kills, version, memory


def switches(options: argparse.Namespace) -> dict[str, Any]:
    """One process, so many switches of versions under a little load: the memory after each."""
    artifact = options.artifact.resolve()
    options.seconds, options.protocol, options.channels = 2.0, "http", 1
    job = model_job(artifact, options)
    memory = []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "models"
        repository(folder, artifact, 0)
        (folder / artifact.name / "serving.yaml").write_text("rollout: {trial_seconds: 0, trial_requests: 0}\n")
        with ours(folder, job, *options.serve.split()) as server:
            load(server, dataclasses.replace(job, concurrency=16))
            for version in range(2, options.switches + 2):
                add_version(folder / artifact.name, version)
                end = time.monotonic() + 60
                while served_version(server, artifact.name) != str(version):
                    if time.monotonic() > end:
                        raise SystemExit(f"version {version} does not come into service")
                    time.sleep(0.05)
                load(server, dataclasses.replace(job, concurrency=16, seconds=0.5, warmup=0.0))
                memory.append((float(version - 1), round(memory_mb([server.process.pid]), 1)))
    some = np.array(memory)
    return {
        "MB a switch, after the fifth": float(np.polyfit(some[5:, 0], some[5:, 1], 1)[0]),
        "memory": [{"switch": int(number), "mb": mb} for number, mb in memory],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=ROOT / "artifacts" / "efficientnet_lite0")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--capacity", type=float, default=0.0, help="requests a second; 0 measures it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cold", type=int, default=3)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between disturbances")
    parser.add_argument("--switches", type=int, default=0, help="memory over so many switches, in place of the load")
    parser.add_argument("--serve", default="", help="more options of toolchain serve, in one text")
    options = parser.parse_args()
    found = switches(options) if options.switches else soak(options)
    for name, rows in found.items():
        print(f"\n{name}\n\n{table(rows)}" if isinstance(rows, list) else f"{name}: {rows}")
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
