"""Starts servers and has a client load them; used by ``serving.py`` and ``serving_soak.py``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _serving_load import BROKEN, OK, Job

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
_TOOLCHAIN = "from toolchain.__main__ import main; main()"


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        name: in tables.
        ports: protocol, as ``Job`` has it, → port; what it does not speak is not in it.
        process: its first one.
        path: of inference over HTTP.
    """

    name: str
    ports: dict[str, int]
    process: subprocess.Popen[bytes]
    path: str = "/v2/models/{}/infer"


@dataclasses.dataclass(frozen=True)
class Load:
    """What a client saw.

    Attributes:
        seconds: that it sent for.
        statuses: how many requests ended how.
        ok_ns: latencies of the right answers, from when they should have been sent.
        late_p99_ms: how much after its time the client sent: it was short of processor time itself.
        rows: a row for each request: intended time, latency, index of the status, lateness, the client's port;
            nanoseconds.
        names: of the statuses.
    """

    seconds: float
    statuses: dict[str, int]
    ok_ns: np.ndarray
    late_p99_ms: float
    rows: np.ndarray
    names: list[str]

    @property
    def rate(self) -> float:
        """Right answers a second."""
        return len(self.ok_ns) / self.seconds

    @property
    def failed(self) -> dict[str, int]:
        return {name: count for name, count in self.statuses.items() if name != OK}

    def goodput(self, slo_ms: float) -> float:
        """Right answers within the bound a second."""
        return float((self.ok_ns <= slo_ms * 1e6).sum()) / self.seconds

    def ms(self, percentile: int) -> float | None:
        return percentile_ms(self.ok_ns, percentile)


def percentile_ms(ns: np.ndarray, percentile: int) -> float | None:
    """A percentile, or None where there are too few samples to state it (MLPerf: 662 for the 99th, 64 for the 90th)."""
    if len(ns) < {50: 1, 90: 64, 99: 662}[percentile]:
        return None
    return float(np.percentile(ns, percentile)) / 1e6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(name: str, command: Sequence[str], ports: dict[str, int], job: Job, **more: Any) -> Iterator[Server]:
    """Starts a server, waits until it answers the job, and ends it.

    Args:
        name: in tables.
        command: starts it.
        ports: as in ``Server``; the first one is asked.
        job: model, input and shape are asked for.
        more: fields of ``Server``.
    """
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        # A session of its own, so that workers of a peer that leaves some behind are ended with it.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, process_group=0)
        server = Server(name, ports, process, **more)
        try:
            _wait(server, job, log.name)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait(server: Server, job: Job, log: str) -> None:
    protocol = next(iter(server.ports))
    for _ in range(60):
        if server.process.poll() is not None:
            break
        try:
            load(server, dataclasses.replace(job, protocol=protocol, seconds=0.05, warmup=0.0, rate=0.0, timeout=5.0))
            return
        except ClientFailed:
            time.sleep(0.5)
    raise SystemExit(f"{server.name} does not answer:\n{Path(log).read_text()[-4000:]}")


class ClientFailed(Exception):
    """The client could not do its job: the first request failed."""


def load(server: Server, job: Job) -> Load:
    """Has a client in a process of its own do the job, on the server's port and path for its protocol."""
    with tempfile.TemporaryDirectory() as folder:
        return finish(start(server, job, Path(folder)), job, Path(folder))


def start(server: Server, job: Job, folder: Path) -> subprocess.Popen[str]:
    """The client's process; ``finish`` waits for it."""
    job = dataclasses.replace(job, port=server.ports[job.protocol], path=server.path)
    said = json.dumps(dataclasses.asdict(job))
    command = [sys.executable, str(HERE / "_serving_load.py"), said, str(folder / "load.npz")]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(client: subprocess.Popen[str], job: Job, folder: Path) -> Load:
    """Waits for the client and reads what it saw."""
    _, said = client.communicate()
    if client.returncode:
        raise ClientFailed(said.strip().splitlines()[-1] if said.strip() else f"exit {client.returncode}")
    with np.load(folder / "load.npz") as file:
        rows, names = file["rows"], [str(name) for name in file["names"]]
    counts = np.bincount(rows[:, 2], minlength=len(names))
    return Load(
        seconds=job.seconds,
        statuses=dict(zip(names, counts.tolist(), strict=True)),
        ok_ns=rows[rows[:, 2] == 0, 1],
        late_p99_ms=float(np.percentile(rows[:, 3], 99)) / 1e6 if len(rows) else 0.0,
        rows=rows,
        names=names,
    )


def ours(path: Path, job: Job, *options: str, name: str = "toolchain") -> contextlib.AbstractContextManager[Server]:
    """``toolchain serve`` of the working tree."""
    http, grpc = free_port(), free_port()
    command = [sys.executable, "-c", _TOOLCHAIN, "serve", str(path), "--http-port", str(http), "--grpc-port", str(grpc)]
    command += ["--metrics-port", str(free_port()), *options]
    return running(name, command, {"http": http, "json": http, "grpc": grpc}, job)


def bare(protocol: str, model: Path, job: Job, *, threads: int = 1) -> contextlib.AbstractContextManager[Server]:
    """The least that a server can do (``_serving_bare.py``); 0 threads is ONNX Runtime's own choice."""
    port = free_port()
    command = [sys.executable, str(HERE / "_serving_bare.py"), protocol, str(model), str(port), str(threads)]
    return running("bare", command, {protocol: port}, job)


def peer(name: str, python: str, model: Path, job: Job) -> contextlib.AbstractContextManager[Server]:
    """MLServer, LitServe or Triton, in the interpreter of an environment that has it."""
    http, grpc = free_port(), free_port()
    command = [python, str(HERE / f"_serving_{name}.py"), str(model), str(http), str(grpc)]
    # MLServer answers 422 to binary tensors; LitServe has its own route, and no gRPC
    ports = {
        "mlserver": {"json": http, "grpc": grpc},
        "litserve": {"json": http},
        "pytriton": {"http": http, "grpc": grpc},
    }[name]
    path = "/predict" if name == "litserve" else "/v2/models/{}/infer"
    return running(name, command, ports, job, path=path)


__all__ = [
    "BROKEN",
    "OK",
    "ROOT",
    "ClientFailed",
    "Job",
    "Load",
    "Server",
    "bare",
    "finish",
    "free_port",
    "load",
    "ours",
    "peer",
    "percentile_ms",
    "running",
    "start",
]
