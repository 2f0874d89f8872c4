"""What serving costs, and what it holds: overhead against bare servers and peers, and batching under load.

    python benchmarks/serving.py overhead [--rounds 3] [--seconds 1.5] [--peer mlserver=ENV/bin/python ...]
    python benchmarks/serving.py batching --artifact artifacts/efficientnet_lite0 [--slo-p99-ms 100] [--shared-memory]

All servers run at the same time on the loopback address and are loaded by the same client in turn, so what the machine
does besides falls on all. ``overhead`` serves a model of one node. ``batching`` compares with ``Session.run`` of the
same artifact at its best batch size, measured in the same rounds, with nobody else at work; the server shares the
processor with its client. Peers that are not named are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _serving_servers import ROOT, Job, Load, bare, load, ours, peer, percentile_ms

sys.path.insert(0, str(ROOT))

#: Batch sizes that the bare session is tried with.
BATCHES = (1, 4, 8, 16, 32)
CONCURRENCY = (1, 8, 32, 128)
#: Of the most that the server answered in a closed loop.
LOADS = (0.2, 0.5, 0.8, 1.0, 2.0)


def one_node_model(folder: Path) -> Path:
    """Relu of float32 [N, 16], as ``one.onnx``."""
    import onnx.parser

    text = '<ir_version: 8, opset_import: ["": 17]> one (float[N, 16] x) => (float[N, 16] y) { y = Relu(x) }'
    path = folder / "one.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    return path


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """The one-node model through every server; infer/s as medians over rounds, p99 over all requests."""
    seen: dict[tuple[str, int, str], list[Load]] = {}
    job = Job(protocol="", port=0, model="one", input="x", shape=(1, 16), seconds=options.seconds, warmup=0.3)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = one_node_model(Path(folder))
        servers = [stack.enter_context(bare(protocol, model, job)) for protocol in ("grpc", "http")]
        if not options.without_ours:
            servers.append(stack.enter_context(ours(model, job)))
        for said in options.peer:
            name, _, python = said.partition("=")
            servers.append(stack.enter_context(peer(name, python, model, job)))
        for _ in range(options.rounds):
            for concurrency in (1, 8):
                for protocol in ("grpc", "http", "json"):
                    for server in servers:
                        if protocol not in server.ports or (protocol == "json" and "http" in server.ports):
                            continue
                        one = dataclasses.replace(job, protocol=protocol, concurrency=concurrency)
                        seen.setdefault((protocol, concurrency, server.name), []).append(load(server, one))
    rows = []
    for (protocol, concurrency, name), loads in sorted(seen.items()):
        reference = seen.get(("http" if protocol == "json" else protocol, concurrency, "bare"))
        rates = [one.rate for one in loads]
        rows.append(
            {
                "protocol": protocol,
                "concurrency": concurrency,
                "server": name,
                "infer_per_s": statistics.median(rates),
                "of_bare": statistics.median(r / b.rate for r, b in zip(rates, reference, strict=True))
                if reference
                else None,
                "p50_ms": percentile_ms(np.concatenate([one.ok_ns for one in loads]), 50),
                "p99_ms": percentile_ms(np.concatenate([one.ok_ns for one in loads]), 99),
                "failed": sum((sum(one.failed.values()) for one in loads), 0),
            }
        )
    return {"overhead": rows}


def bare_session(artifact: Path, shape: tuple[int, ...], seconds: float) -> dict[int, float]:
    """Rows a second of ``Session.run`` at each batch size, in this process."""
    import runtimes

    found = {}
    with runtimes.load(artifact) as session:
        name = session.inputs[0].name
        for rows in BATCHES:
            feeds = {name: np.random.default_rng(0).standard_normal((rows, *shape[1:]), np.float32)}
            session.run(feeds)
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                session.run(feeds)
                count += rows
            found[rows] = count / (time.perf_counter() - start)
    return found


def batching(options: argparse.Namespace) -> dict[str, Any]:
    """A real model in a closed loop, then with Poisson arrivals at shares of what the closed loop reached."""
    artifact = options.artifact.resolve()
    job = model_job(artifact, options)
    slo = options.slo_p99_ms
    rounds: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        served = artifact
        if options.serving_yaml:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            served = folder / "models"
            shutil.copytree(artifact, served / artifact.name / "1")
            (served / artifact.name / "serving.yaml").write_text(options.serving_yaml)
        more = ["--slo-p99-ms", str(slo)] if slo else []
        more += ["--shared-memory"] if options.shared_memory else []
        server = stack.enter_context(ours(served, job, *more, *options.serve.split()))
        plain = None
        as_ever = dataclasses.replace(job, shared_memory=False)
        if options.graph:
            plain = stack.enter_context(bare(options.protocol, options.graph.resolve(), as_ever, threads=0))
        for _ in range(options.rounds):
            found: dict[str, Any] = {"session": bare_session(artifact, job.shape, options.seconds / 4)}
            if plain is not None:
                found["plain"] = load(plain, dataclasses.replace(as_ever, concurrency=8)).rate
            found["closed"] = {c: load(server, dataclasses.replace(job, concurrency=c)) for c in options.concurrency}
            rounds.append(found)
        capacity = statistics.median(max(one.rate for one in r["closed"].values()) for r in rounds)
        opened = {}
        for share in options.loads:
            rate = share * capacity
            # enough for a 99th percentile, and long enough that a queue would show
            seconds = max(options.open_seconds, 800 / rate)
            one = dataclasses.replace(job, rate=rate, seconds=seconds, concurrency=1024, seed=round(share * 100))
            opened[share] = load(server, one)
    best = [max(r["session"].values()) for r in rounds]
    goodput = {share: one.goodput(slo or 1e9) for share, one in opened.items()}
    most = max(goodput.values(), default=0.0)
    closed = []
    for c in options.concurrency:
        loads = [r["closed"][c] for r in rounds]
        ok_ns = np.concatenate([one.ok_ns for one in loads])
        closed.append(
            {
                "concurrency": c,
                "infer_per_s": statistics.median(one.rate for one in loads),
                "of_session": statistics.median(one.rate / b for one, b in zip(loads, best, strict=True)),
                "p50_ms": percentile_ms(ok_ns, 50),
                "p99_ms": percentile_ms(ok_ns, 99),
                "failed": _sum([one.failed for one in loads]),
            }
        )
    return {
        "session": {rows: statistics.median(r["session"][rows] for r in rounds) for rows in BATCHES},
        "plain_server_of_session": statistics.median(r["plain"] / b for r, b in zip(rounds, best, strict=True))
        if plain
        else None,
        "closed": closed,
        "capacity": capacity,
        "slo_ms": slo,
        "open": [
            {
                "load": share,
                "rate": share * capacity,
                "answered_per_s": one.rate,
                "goodput_per_s": goodput[share],
                "of_most": goodput[share] / most if most else 0.0,
                "p50_ms": one.ms(50),
                "p99_ms": one.ms(99),
                "client_late_p99_ms": one.late_p99_ms,
                "failed": one.failed,
            }
            for share, one in opened.items()
        ],
    }


def model_job(artifact: Path, options: argparse.Namespace) -> Job:
    """Asks for the artifact's one float32 input, one row."""
    import runtimes

    with runtimes.load(artifact) as session:
        (spec,) = session.inputs
        if spec.dtype != "float32" or spec.shape is None or not all(isinstance(size, int) for size in spec.shape[1:]):
            raise SystemExit(f"a model with one float32 input of fixed size is wanted, not {spec}")
        shape = (1, *(int(size) for size in spec.shape[1:]))
    return Job(
        protocol=options.protocol,
        port=0,
        model=artifact.name,
        input=spec.name,
        shape=shape,
        seconds=options.seconds,
        channels=options.channels,
        shared_memory=options.shared_memory,
    )


def _sum(counts: list[dict[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            found[name] = found.get(name, 0) + count
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
        return "-" if value is None or value == {} else str(value)

    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(cell(value) for value in row.values()) + " |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("overhead")
    part.add_argument("--peer", action="append", default=[], help="mlserver, litserve or pytriton, = its interpreter")
    part.add_argument("--without-ours", action="store_true")
    part.add_argument("--rounds", type=int, default=3)
    part.add_argument("--seconds", type=float, default=1.5)
    part.set_defaults(run=overhead)
    part = parts.add_parser("batching")
    part.add_argument("--artifact", type=Path, default=ROOT / "artifacts" / "efficientnet_lite0")
    part.add_argument("--graph", type=Path, help="the same model for a bare server: its ONNX file")
    part.add_argument("--slo-p99-ms", type=float, default=100.0, help="0: none")
    part.add_argument("--protocol", choices=("http", "grpc"), default="http")
    part.add_argument("--channels", type=int, default=4, help="connections of gRPC")
    part.add_argument("--shared-memory", action="store_true", help="inputs through shared memory")
    part.add_argument("--concurrency", type=int, nargs="+", default=CONCURRENCY)
    part.add_argument("--loads", type=float, nargs="*", default=LOADS)
    part.add_argument("--rounds", type=int, default=2)
    part.add_argument("--seconds", type=float, default=3.0)
    part.add_argument("--open-seconds", type=float, default=5.0)
    part.add_argument("--serve", default="", help="more options of toolchain serve, in one text")
    part.add_argument("--serving-yaml", default="", help="of the model")
    part.set_defaults(run=batching)
    options = parser.parse_args()
    found = options.run(options)
    for name, rows in found.items():
        if isinstance(rows, list) and rows:
            print(f"\n{name}\n\n{table(rows)}")
        elif not isinstance(rows, list):
            print(f"\n{name}: {rows}")
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
