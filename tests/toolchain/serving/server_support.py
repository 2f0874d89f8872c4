"""``toolchain serve`` as a child process, for the tests of the whole server."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("tritonclient.grpc")
pytest.importorskip("prometheus_client")

import onnx
import onnx.parser
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[3]
ADD = """<ir_version: 9, opset_import: ["": 17]>
g (float[n, 3] x) => (float[n, 3] y) { one = Constant <value = float {1.0}> () y = Add (x, one) }"""
#: Runs for some seconds, by multiplying as long as it is told.
SLOW = """<ir_version: 9, opset_import: ["": 17]>
g (int64[1] x, float[600, 600] w) => (float[600, 600] y) {
  yes = Constant <value = bool {1}> ()
  y = Loop (x, yes, w) <body = b (int64 i, bool go, float[600, 600] a) => (bool on, float[600, 600] c)
    { on = Identity (go) s = Constant <value = float {0.001}> () m = MatMul (a, a) c = Mul (m, s) }>
}"""


def save(text: str, path: Path) -> Path:
    """A model in ONNX's text form as a file."""
    onnx.save(onnx.parser.parse_model(text), path)
    return path


class Server:
    """``toolchain serve`` as a child, ready."""

    def __init__(self, path: Path, *options: str, wait: bool = True, environment: dict[str, str] | None = None) -> None:
        ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "toolchain", "serve", str(path), *ports, *options],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OTEL_SDK_DISABLED": "true", **(environment or {})},
        )  # fmt: skip
        self.out: list[str] = []
        self.err: list[str] = []
        self.readers = [
            threading.Thread(target=lambda: self.out.extend(iter(self.process.stdout.readline, ""))),  # type: ignore
            threading.Thread(target=lambda: self._listen(self.process.stderr)),
        ]
        for reader in self.readers:
            reader.start()
        if wait:
            self.until(lambda: any(line.startswith("model") for line in self.out))

    def _listen(self, stream: Any) -> None:
        for line in iter(stream.readline, ""):
            self.err.append(line)

    def until(self, true: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def said(self) -> str:
        return "".join(self.out + self.err)

    def port(self, name: str) -> int:
        line = next(line for line in self.out if line.startswith(name))
        return int(re.search(r":(\d+)", line)[1])  # type: ignore[index]

    def ask(
        self, method: str, path: str, body: bytes | None = None, *, port: str = "HTTP", **headers: str
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port(port), timeout=30)
        try:
            connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def infer(self, value: float = 1.0, name: str = "add") -> tuple[int, Any]:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [value] * 3}]
        status, body = self.ask("POST", f"/v2/models/{name}/infer", json.dumps({"inputs": inputs}).encode())
        return status, json.loads(body)

    def metric(self, name: str) -> float:
        status, body = self.ask("GET", "/metrics", port="metrics")
        assert status == 200
        return sum(
            sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
            if sample.name.removesuffix("_total") == name
        )

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        for reader in self.readers:
            reader.join(10)
        return code


@contextlib.contextmanager
def served(path: Path, *options: str, **more: Any) -> Iterator[Server]:
    server = Server(path, *options, **more)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
