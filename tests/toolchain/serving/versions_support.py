"""Artifacts of very small models, and servers of models over them, for the tests of versions and memory."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from runtimes._selftest import vectors_content
from toolchain.serving.base import Request, Response
from toolchain.serving.models import Models
from toolchain.serving.options import ServerOptions
from toolchain.serving.repository import open_source

X = np.arange(4, dtype=np.float32).reshape(2, 2)


def scaled(factor: float) -> str:
    """A graph whose answer says which version it is: y = factor * x."""
    return f"g (float[n, 2] x) => (float[n, 2] y) <float f = {{{factor}}}> {{ y = Mul(x, f) }}"


def slow(factor: float, *, times: int) -> str:
    """The same, after so many multiplications of large matrices that change nothing."""
    work = "".join(f"a{i + 1} = MatMul(a{i}, big)\n" for i in range(times))
    return (
        f"g (float[n, 2] x) => (float[n, 2] y) <float f = {{{factor}}}, float zero = {{0.0}}, "
        "int64[2] side = {512, 512}>"
        "{ m = ReduceMean <keepdims = 0> (x) z = Mul(m, zero) big = Expand(z, side) a0 = Identity(big)\n"
        f"{work} r = ReduceSum <keepdims = 0> (a{times}) q = Mul(x, f) y = Add(q, r) }}"
    )


def model_bytes(graph: str, *, padding: int = 0) -> bytes:
    """The ONNX file of a graph; ``padding`` bytes of weights are added that only a second output reads."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 17]>\n{graph}')
    if padding:
        raw = np.random.default_rng(0).integers(0, 255, padding, np.uint8).tobytes()
        graph_ = model.graph
        graph_.initializer.add(name="pad", data_type=onnx.TensorProto.UINT8, dims=[padding], raw_data=raw)
        graph_.node.add(op_type="Cast", input=["x"], output=["at"]).attribute.append(
            onnx.helper.make_attribute("to", 7)
        )
        graph_.node.add(op_type="Gather", input=["pad", "at"], output=["padded"])
        graph_.output.add().CopyFrom(onnx.helper.make_tensor_value_info("padded", onnx.TensorProto.UINT8, ["n", 2]))
    content: bytes = model.SerializeToString()
    return content


def write_artifact(
    folder: Path,
    factor: float = 2.0,
    *,
    graph: str | None = None,
    expected: np.ndarray | None = None,
    feeds: dict[str, np.ndarray] | None = None,
    padding: int = 0,
    more: Mapping[str, bytes] | None = None,
    **metadata: Any,
) -> Path:
    """Writes an artifact of one variant, with a self-test of one case, whole at once: by rename.

    Args:
        expected: what the self-test wants; the truth where nothing is said.
        more: files that nobody opens, by their path.
    """
    hidden = folder.with_name(f".{folder.name}-{os.urandom(4).hex()}")
    (hidden / "v").mkdir(parents=True)
    (hidden / "v" / "model.onnx").write_bytes(model_bytes(graph or scaled(factor), padding=padding))
    feeds = feeds or {"x": X}
    vectors = {f"inputs/0/{name}": array for name, array in feeds.items()}
    vectors["outputs/0/v/y"] = X * np.float32(factor) if expected is None else expected
    (hidden / "selftest.safetensors").write_bytes(vectors_content(vectors))
    for name, content in (more or {}).items():
        (hidden / name).parent.mkdir(parents=True, exist_ok=True)
        (hidden / name).write_bytes(content)
    files = {
        path.relative_to(hidden).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
        for path in sorted(hidden.rglob("*"))
        if path.is_file()
    }
    ours = {"target": "ort-cpu", "precision": "fp32", "model_file": "model.onnx"}
    ort = {"model_file": "model.onnx", "session_options": {}}
    variant = {
        "variant_directory": "v", "ep": "CPUExecutionProvider", "executor_info": {"ort": ort, "toolchain": ours}
    }  # fmt: skip
    test = {"file": "selftest.safetensors", "cases": 1, "variants": {"v": {"outputs": "v", "max_error": 1e-6}}}
    manifest = {
        "schema_version": "1.0",
        "package_name": "tiny",
        "package_version": "1",
        "layout": "portable",
        "components": {"model": {"variants": {"v": variant}}},
        "additional_metadata": {"toolchain": {"schema": 1, "files": files, "selftest": test, **metadata}},
    }
    (hidden / "manifest.json").write_text(json.dumps(manifest))
    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden.rename(folder)
    return folder


def request(model: str, version: str = "", *, x: np.ndarray = X, **more: Any) -> Request:
    return Request(model, version, {"x": x}, received_ns=time.monotonic_ns(), **more)


def factor_of(response: Response) -> float:
    """Which version answered, by what it computed."""
    return float(response.outputs["y"][0, 1])


@contextlib.asynccontextmanager
async def serving(path: Path, **options: Any) -> AsyncIterator[Models]:
    """Models over a folder, looked at every 50 ms where nothing else is said."""
    more = {name: options.pop(name) for name in ("resident", "shared") if options.get(name) is not None}
    options.setdefault("poll_seconds", 0.05)
    models = Models(ServerOptions(**options), open_source(path), **more)
    await models.start()
    try:
        yield models
    finally:
        await models.stop()


async def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    """Waits for something, and fails where it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.01)


def states(models: Models) -> dict[tuple[str, str], str]:
    return {(row["name"], row["version"]): row["state"] for row in models.index()}


def reason(models: Models, model: str, version: str) -> str:
    return next((str(row["reason"]) for row in models.index() if (row["name"], row["version"]) == (model, version)), "")
