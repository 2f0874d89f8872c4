"""What the server's core costs beside the model: ``Loaded.infer`` against the bare session, with no network between.

    python benchmarks/serving_core.py [ARTIFACT]

One node, with one client and with eight, in turns with as many bare runs. With an artifact that has a batch axis: its
rows a second with 32 clients of one row each, in turns with the bare session at each batch size.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx.parser

import runtimes
from toolchain.seeded import seeded_inputs
from toolchain.serving.base import ModelInfo, Request
from toolchain.serving.loaded import Loaded
from toolchain.serving.options import ModelOptions
from toolchain.serving.statistics import Statistics

ONE_NODE = '<ir_version: 9, opset_import: ["": 17]> g (float[n, 16] x) => (float[n, 16] y) { y = Relu(x) }'
ROUNDS = 7
SIZES = (1, 2, 4, 8, 16, 32)


def served(session: runtimes.Session) -> Loaded:
    info = ModelInfo("m", "1", session.inputs, session.outputs, max_batch_size=64)
    executor = concurrent.futures.ThreadPoolExecutor(1)
    return Loaded(info, session, ModelOptions(), statistics=Statistics(), executor=executor)


async def clients(loaded: Loaded, feeds: dict[str, np.ndarray], count: int, each: int) -> float:
    """Seconds for ``count`` clients that each send ``each`` requests, one after the other."""

    async def client() -> None:
        for _ in range(each):
            await loaded.infer(Request("m", "", feeds, received_ns=time.monotonic_ns()))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(count)))
    return time.perf_counter() - began


def bare(session: runtimes.Session, feeds: dict[str, np.ndarray], runs: int) -> float:
    began = time.perf_counter()
    for _ in range(runs):
        session.run(feeds)
    return time.perf_counter() - began


async def one_node() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(onnx.parser.parse_model(ONE_NODE).SerializeToString())
        session = runtimes.load(path)
    loaded, feeds, runs = served(session), seeded_inputs(session.inputs), 4000
    await clients(loaded, feeds, 8, 200)
    rounds = [
        (
            bare(session, feeds, runs) / runs,
            await clients(loaded, feeds, 1, runs) / runs,
            await clients(loaded, feeds, 8, runs // 8) / runs,
        )
        for _ in range(ROUNDS)
    ]
    names = ("bare", "one client", "eight clients")
    return {f"{name}, us": 1e6 * min(times) for name, times in zip(names, zip(*rounds, strict=True), strict=True)}


async def batched(path: str) -> dict[str, float]:
    session = runtimes.load(path)
    loaded = served(session)
    row = seeded_inputs(session.inputs)
    whole = {n: {name: np.concatenate([array] * n) for name, array in row.items()} for n in SIZES}
    for feeds in whole.values():
        session.run(feeds)
    await clients(loaded, row, 32, 12)
    rates: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for n, feeds in whole.items():
            rates.setdefault(f"bare at {n}, rows/s", []).append(n / bare(session, feeds, 1))
        rates.setdefault("32 clients, rows/s", []).append(32 * 3 / await clients(loaded, row, 32, 3))
    found = {name: statistics.median(values) for name, values in rates.items()}
    sizes = sorted((count.infer.count, rows) for rows, count in loaded.statistics.batches.items())
    best = max(value for name, value in found.items() if name.startswith("bare"))
    return {**found, "against the best bare": found["32 clients, rows/s"] / best, "commonest batch": sizes[-1][1]}


def main() -> None:
    found = asyncio.run(one_node())
    if len(sys.argv) > 1:
        found |= asyncio.run(batched(sys.argv[1]))
    for name, value in found.items():
        print(f"{name:<28} {value:10.2f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
