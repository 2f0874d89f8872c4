"""Small graphs for TensorRT, and machines that are not this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runtime_support import save_model

import runtimes
from runtimes import tensorrt_engine
from runtimes._driver import Driver, Gpu

ADA = Gpu("NVIDIA RTX 4090", (8, 9))
AMPERE = Gpu("NVIDIA RTX 3090", (8, 6))
HOPPER = Gpu("NVIDIA H100", (9, 0))
TURING = Gpu("NVIDIA RTX 2080", (7, 5))
NO_DRIVER = Driver(None, (), "there is no NVIDIA driver: libcuda.so.1 was not found")

RELU = "g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }"
FIXED = "g (float[4, 3] x) => (float[4, 3] y) { y = Relu(x) }"


def require_rtx() -> None:
    """Skips where TensorRT-RTX is not installed."""
    state = runtimes.backend("tensorrt-rtx").can_compile(runtimes.Target("tensorrt-rtx", "sm89"))
    if not state.available:
        pytest.skip(f"tensorrt-rtx: {state.reason}")


def on_machine(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, cuda: tuple[int, int] = (13, 1)) -> None:
    """Lets the driver say that these GPUs are here; none is a machine without a driver."""
    state = Driver(cuda, gpus) if gpus else NO_DRIVER
    for module in ("tensorrt_engine", "_tensorrt_fingerprint", "_cuda"):
        monkeypatch.setattr(f"runtimes.{module}.driver", lambda: state)
    monkeypatch.setattr("runtimes._cuda_packages.name", lambda: "cuda-bindings 13.0")


class Taken(list[Any]):
    """What reached the deserialiser: (plan, info) of each session that was made."""


def catch_sessions(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """Puts a stand-in in place of what deserialises plans."""
    from runtimes import _tensorrt_session

    taken = Taken()

    def make_session(api: Any, plan: bytes, target: runtimes.Target, **given: Any) -> str:
        taken.append((bytes(plan), given))
        return "a session"

    monkeypatch.setattr(_tensorrt_session, "make_session", make_session)
    return taken


def compile_text(folder: Path, text: str, target: str = "tensorrt-rtx:sm86,sm89", **options: Any) -> runtimes.Compiled:
    """Compiles a graph in ONNX text into ``folder/engine``."""
    model = save_model(folder / "given.onnx", text)
    return runtimes.compile(model, target, folder / "engine", options=options or None)


RTX = tensorrt_engine.RTX
