"""Small models, sessions that do as they are told, and a version in memory, for the tests of serving."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser

import runtimes
from runtimes import TensorSpec
from toolchain.serving.adaptive import Controller
from toolchain.serving.base import ModelInfo, Request
from toolchain.serving.loaded import Loaded
from toolchain.serving.options import Batching, ModelOptions
from toolchain.serving.result_cache import ResultCache
from toolchain.serving.statistics import Statistics

#: Two outputs, so that handing out by name shows.
AFFINE = """
<ir_version: 9, opset_import: ["": 17]>
affine (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) <float two = {2.0}> { y = Mul(x, two) z = Neg(x) }
"""


def load(text: str, folder: Path) -> runtimes.Session:
    """A session of a graph in ONNX text."""
    path = folder / "model.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    return runtimes.load(path)


class Scripted(runtimes.Session):
    """y = 2 x on rows of four numbers, as slow and as faulty as it is told; it remembers what it was given.

    Attributes:
        gate: runs wait until it is set.
        started: set when a run has begun.
        seen: the inputs of every run.
        poison: a run fails if this number is in its inputs.
        seconds: what a run takes, by its rows.
    """

    target = runtimes.Target("ort-cpu")
    info: Mapping[str, str] = {}

    def __init__(self, *, seconds: Mapping[int, float] | float = 0.0, gated: bool = False) -> None:
        self.inputs = (TensorSpec("x", "float32", ("n", 4)),)
        self.outputs = (TensorSpec("y", "float32", ("n", 4)),)
        self.gate = threading.Event()
        if not gated:
            self.gate.set()
        self.started = threading.Event()
        self.seen: list[np.ndarray] = []
        self.poison: float | None = None
        self.seconds = seconds
        self.closed = False

    def run(self, feeds: Mapping[str, Any], /, *, outputs: str = "host") -> dict[str, Any]:
        x = feeds["x"]
        self.seen.append(x)
        self.started.set()
        assert self.gate.wait(20)
        seconds = self.seconds if isinstance(self.seconds, float) else self.seconds[len(x)]
        if seconds:
            time.sleep(seconds)
        if self.poison is not None and self.poison in x:
            raise runtimes.RunFailed("poisoned")
        return {"y": x * 2}

    def bind(self, shapes: Mapping[str, Sequence[int]], /) -> runtimes.Binding:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True

    @property
    def rows(self) -> list[int]:
        """Of every run."""
        return [len(x) for x in self.seen]


def request(value: float = 1.0, rows: int = 1, **more: Any) -> Request:
    """A request whose input is ``rows`` times the same number."""
    more.setdefault("received_ns", time.monotonic_ns())
    return Request("m", "", {"x": np.full((rows, 4), value, np.float32)}, **more)


def make(
    session: runtimes.Session,
    *,
    cache: ResultCache | None = None,
    slo_p99_ms: float | None = None,
    most: int = 64,
    known: Mapping[int, int] | None = None,
    **batching: Any,
) -> Loaded:
    """A version in memory.

    Args:
        most: ``max_batch_size``.
        known: nanoseconds that batches of some sizes are believed to take, as if they had been run.
    """
    options = ModelOptions(batching=Batching(**batching))
    info = ModelInfo("m", "1", tuple(session.inputs), tuple(session.outputs), max_batch_size=most)
    controller = Controller(options.batching, max_batch_size=most, slo_p99_ms=slo_p99_ms)
    for rows, ns in (known or {}).items():
        for _ in range(9 if rows <= most else 0):
            controller.ran(rows, ns)
    return Loaded(
        info,
        session,
        options,
        statistics=Statistics(),
        executor=concurrent.futures.ThreadPoolExecutor(options.batching.instances),
        controller=controller,
        cache=cache,
    )


#: Every size is believed to take the same, so that batches are as large as may be.
FLAT = {size: 1_000_000 for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)}
