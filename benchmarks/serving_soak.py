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
import contextlib
import ctypes
import dataclasses
import http.client
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _serving_bad import BAD, make_bad
from _serving_servers import BROKEN, ROOT, Job, Load, Server, finish, free_port, load, ours, start
from serving import model_job, table

sys.path.insert(0, str(ROOT))

#: Of the admin port.
TOKEN = "soak-0123456789"
#: How long a new version is on trial, seconds: all requests go to it, and the one before waits in memory.
TRIAL_SECONDS = 5
#: What serving.yaml says of new versions, by ``--rollout``.
ROLLOUTS = {"all": {}, "canary": {"canary": 0.2}, "shadow": {"shadow": True}}
#: Requests of a connection. One that was kept for good would stay with the worker that was left when another was
#: killed, and the one that came back would have nothing to do.
REUSE = 20
#: A system call of Linux 5.6 that Python has no name for; its number is the same on all architectures.
_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True)
class Kill:
    """A worker that was killed.

    Attributes:
        at_ns: ``time.monotonic_ns()`` when it was stopped.
        gone_ns: when the last of its connections was closed.
        ports: the clients' ends of its connections.
        queued: how many of them it had not accepted.
    """

    at_ns: int
    gone_ns: int
    ports: frozenset[int]
    queued: int


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

    All of its threads are stopped first, so that it accepts and closes nothing any more. Its sockets are then looked at
    through copies of ours (pidfd_getfd), which tell for whom they are without any doubt. The copy of the one that
    listens is held beyond the death: what is in its queue then is what the kernel had given to this worker.
    """
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic_ns()
    while not _stopped(pid):
        time.sleep(0.001)
    process = os.pidfd_open(pid)
    ports, listening = set(), []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if not os.readlink(link).startswith("socket:["):
            continue
        copy = _copied(process, int(link.name))
        if copy.family != socket.AF_INET or copy.getsockname()[1] != port:
            copy.close()
        elif copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listening.append(copy)
        else:
            with contextlib.suppress(OSError):  # its client left
                ports.add(copy.getpeername()[1])
            copy.close()
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists():  # its sockets are closed when its last thread has ended
        time.sleep(0.002)
    os.close(process)
    queued = set()
    for each in listening:
        each.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, (_, client) = each.accept()
                queued.add(client)
                connection.close()
        each.close()
    return Kill(begin, time.monotonic_ns(), frozenset(ports | queued), len(queued))


def _stopped(pid: int) -> bool:
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return all(state in "TZ" for state in states)


def _copied(process: int, number: int) -> socket.socket:
    """A socket of another process, by its number there."""
    found = _libc.syscall(_PIDFD_GETFD, process, number, 0)
    if found < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return socket.socket(fileno=found)


def repository(folder: Path, artifact: Path, cold: int, rollout: dict[str, Any]) -> tuple[str, ...]:
    """Fills the folder; names of the cold models, which are copies of the artifact."""
    shutil.copytree(artifact, folder / artifact.name / "1")
    (folder / artifact.name / "serving.yaml").write_text(json.dumps({"rollout": rollout}))
    names = tuple(f"cold{i}" for i in range(cold))
    for name in names:
        shutil.copytree(artifact, folder / name / "1")
        (folder / name / "serving.yaml").write_text("preload: false\n")
    return names


def add_version(artifact: Path, model: Path, version: int, *, bad: str = "", job: Job | None = None) -> None:
    """A version arrives by rename, and the one four before it goes: the one in service is two before a bad one."""
    arriving = model / f".{version}.arriving"
    shutil.copytree(artifact, arriving)
    manifest = json.loads((arriving / "manifest.json").read_text())
    manifest["description"] = f"version {version}"  # else it would be the same one under another number
    (arriving / "manifest.json").write_text(json.dumps(manifest))
    if bad and job is not None:
        make_bad(arriving, bad, job.array())
    arriving.rename(model / str(version))
    if version > 4:
        shutil.rmtree(model / str(version - 4))


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
            if (number, port) in connections and intended + late < one.gone_ns + 1e9 and one.at_ns <= intended + latency
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
    options.seconds, options.protocol, options.channels, options.shared_memory = 3.0, "http", 1, False
    job = model_job(artifact, options)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "models"
        rollout = {"trial_seconds": TRIAL_SECONDS, **ROLLOUTS[options.rollout]}
        cold = repository(folder, artifact, options.cold, rollout)
        tokens = Path(work) / "tokens"
        tokens.write_text(TOKEN)
        tokens.chmod(0o600)
        admin = free_port()
        more = ["--workers", str(options.workers), "--admin-port", str(admin), "--admin-tokens", str(tokens)]
        with ours(folder, job, *more, *options.serve.split()) as server:
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
            log = Switches(admin)
            kills, version, memory = _disturb(options, server, folder / artifact.name, seconds, job, log)
            seen = [finish(client, j, place) for client, j, place in zip(clients, (one, slow), places, strict=True)]
            last = served_version(server, artifact.name)
    return {
        "capacity": capacity,
        "rate": one.rate,
        "minutes": options.minutes,
        "versions": version,
        "in service": last,
        "kills": len(kills),
        "connections of killed workers": sum(len(one.ports) for one in kills),
        "of those not accepted": sum(one.queued for one in kills),
        "main": [{**judged(seen[0], kills), "p50_ms": seen[0].ms(50), "p99_ms": seen[0].ms(99)}],
        "cold": [{**judged(seen[1], kills), "p50_ms": seen[1].ms(50), "p99_ms": seen[1].ms(99)}],
        "MB a minute, after the first": growth(memory, 60),
        "memory": [{"second": second, "mb": mb} for second, mb in memory],
        "switches": log.rows(),
    }


class Switches:
    """The log of switches of workers, fetched now and then: what a killed one had is gone."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._seen: dict[str, dict[str, Any]] = {}

    def fetch(self) -> None:
        """Asks the supervisor, which asks its workers and hands on what one of them says."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.request("GET", "/switches", headers={"Authorization": f"Bearer {TOKEN}"})
            for one in json.loads(connection.getresponse().read()):
                self._seen[json.dumps(one)] = one
        except (OSError, http.client.HTTPException):
            pass  # none of them answers now
        finally:
            connection.close()

    def rows(self) -> list[dict[str, Any]]:
        """All that were seen, in their order."""
        return sorted(self._seen.values(), key=lambda one: one["time"])


def _disturb(
    options: argparse.Namespace, server: Server, model: Path, seconds: float, job: Job, log: Switches
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
        log.fetch()
        time.sleep(min(options.every, seconds / 8) / 2)
        turn += 1
        if turn % 2:
            continue
        if turn % 4 == 2:
            version += 1
            bad = options.bad if version % 2 else ""  # 2 is good, 3 is bad
            add_version(options.artifact.resolve(), model, version, bad=bad, job=job)
        elif options.workers > 1 and (alive := workers(pid)):
            kills.append(kill(alive[turn // 4 % len(alive)], server.ports["http"]))
    memory.append((round(time.monotonic() - begin, 1), round(memory_mb(processes(pid)), 1)))
    time.sleep(max(0.0, seconds - (time.monotonic() - begin) - 1))
    log.fetch()
    return kills, version, memory


def switches(options: argparse.Namespace) -> dict[str, Any]:
    """One process, so many switches of versions under a little load: the memory after each."""
    artifact = options.artifact.resolve()
    options.seconds, options.protocol, options.channels, options.shared_memory = 2.0, "http", 1, False
    job = model_job(artifact, options)
    memory = []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "models"
        repository(folder, artifact, 0, {"trial_seconds": 0, "trial_requests": 0})
        with ours(folder, job, *options.serve.split()) as server:
            load(server, dataclasses.replace(job, concurrency=16))
            for version in range(2, options.switches + 2):
                add_version(artifact, folder / artifact.name, version)
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
    parser.add_argument("--rollout", choices=sorted(ROLLOUTS), default="all", help="how new versions are tried")
    parser.add_argument("--bad", choices=BAD, default="", help="every second new version fails, or is slow")
    parser.add_argument("--switches", type=int, default=0, help="memory over so many switches, in place of the load")
    parser.add_argument("--serve", default="", help="more options of toolchain serve, in one text")
    options = parser.parse_args()
    found = switches(options) if options.switches else soak(options)
    for name, rows in found.items():
        print(f"\n{name}\n\n{table(rows)}" if isinstance(rows, list) else f"{name}: {rows}")
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
