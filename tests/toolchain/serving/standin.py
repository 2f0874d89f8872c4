"""Models for tests of the transports: real sessions of small ONNX graphs behind the seam, run at once on the loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import onnx
import uvicorn

import runtimes
from toolchain.serving import grpc_app, http_app
from toolchain.serving.base import DeadlineExceeded, ModelInfo, NotFound, Request, Response
from toolchain.serving.limits import Bytes
from toolchain.serving.models import Models
from toolchain.serving.options import Batching, ModelOptions, ServerOptions
from toolchain.serving.shared_memory import Regions
from toolchain.serving.statistics import Statistics

NUMERIC = {
    "BOOL": "bool", "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8",
    "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "FP16": "float16", "FP32": "float", "FP64": "double",
    "BF16": "bfloat16",
}  # fmt: skip


def text(name: str, inputs: str, outputs: str, body: str) -> str:
    """A graph in ONNX text."""
    return f'<ir_version: 10, opset_import: ["" : 21]> {name} ({inputs}) => ({outputs}) {{ {body} }}'


#: Name → graph. "pair" takes two inputs and gives two outputs; "copy_…" are for each element type.
GRAPHS = {
    "double": text("double", "float[N, 4] x", "float[N, 4] y", "y = Add(x, x)"),
    "pair": text("pair", "int32[N, M] a, int32[N, M] b", "int32[N, M] total, int32[N, M] less",
                 "total = Add(a, b)  less = Sub(a, b)"),
    "scalar": text("scalar", "float x", "float y", "y = Neg(x)"),
    "words": text("words", "string[N] s", "string[N] t", "t = StringConcat(s, s)"),
    "half": text("half", "float[N, 2] x", "float16[N, 2] y", "y = Cast<to = 10>(x)"),
    "divide": text("divide", "float[2] x, float[2] y", "float[2] z", "z = Div(x, y)"),
    "image": text("image", "float[N, 3, 8, 8] pixels", "float[N, 3] logits",
                  "m = ReduceMean<keepdims = 0>(pixels, axes)").replace("=> (float[N, 3] logits) {",
                  "=> (float[N, 3] logits) <int64[2] axes = {2, 3}> {").replace("m = Reduce", "logits = Reduce"),
    **{
        f"copy_{name.lower()}": text("copy", f"{kind}[N, 3] x", f"{kind}[N, 3] y", "y = Reshape(x, s)").replace(
            f"=> ({kind}[N, 3] y) {{", f"=> ({kind}[N, 3] y) <int64[2] s = {{0, 3}}> {{"
        )
        for name, kind in NUMERIC.items()
    },
}  # fmt: skip
LABELS = ("red", "green", "blue")
PREPROCESSING = {
    "size": [8, 8], "layout": "NCHW", "resize": [8, 8], "interpolation": "nearest", "crop": None,
    "rescale": 1 / 255, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "channel_order": "RGB",
}  # fmt: skip


class Few:
    """``base.Hosted`` over real sessions: everything runs at once and on the loop."""

    def __init__(self, folder: Path, names: tuple[str, ...] = tuple(GRAPHS)) -> None:
        self._sessions: dict[str, runtimes.Session] = {}
        self._infos: dict[str, ModelInfo] = {}
        self._statistics: dict[tuple[str, str], Statistics] = {}
        #: Every request that reached a model.
        self.seen: list[Request] = []
        #: Seconds that each request takes.
        self.delay = 0.0
        #: What infer raises in place of answering.
        self.fails: Exception | None = None
        for name in names:
            path = folder / f"{name}.onnx"
            onnx.save(onnx.parser.parse_model(GRAPHS[name]), path)
            session = self._sessions[name] = runtimes.load(path, target="ort-cpu")
            first = session.inputs[0].shape
            self._infos[name] = ModelInfo(
                name, "1", session.inputs, session.outputs,
                max_batch_size=8 if first and isinstance(first[0], str) else 0,
                platform="ort-cpu",
                labels=LABELS if name == "image" else (),
                preprocessing=PREPROCESSING if name == "image" else None,
            )  # fmt: skip
            self._statistics[name, "1"] = Statistics()

    def info(self, model: str, version: str = "") -> ModelInfo:
        if version not in self.versions(model) and version:
            raise NotFound(f"model {model!r} has no version {version!r}")
        return self._infos[model]

    def versions(self, model: str) -> tuple[str, ...]:
        if model not in self._infos:
            raise NotFound(f"no model is called {model!r}")
        return ("1",)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._infos))

    def is_ready(self, model: str | None = None, version: str = "") -> bool:
        if model is not None:
            self.info(model, version)
        return True

    def expecting(self, model: str, version: str = "") -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    async def infer(self, request: Request) -> Response:
        self.seen.append(request)
        if self.fails is not None:
            raise self.fails
        if self.delay:
            await asyncio.sleep(self.delay)
        if request.deadline_ns is not None and time.monotonic_ns() > request.deadline_ns:
            raise DeadlineExceeded("the request waited longer than it allows")
        session = self._sessions[request.model]
        start = time.monotonic_ns()
        outputs = session.run(request.inputs)
        took = time.monotonic_ns() - start
        counts = self._statistics[request.model, "1"]
        rows = next(iter(request.inputs.values())).shape[0] if self._infos[request.model].max_batch_size else 1
        counts.executed(rows, input_ns=1, infer_ns=took, output_ns=1)
        counts.succeeded(total_ns=took, queue_ns=0, input_ns=1, infer_ns=took, output_ns=1)
        wanted = request.outputs or tuple(outputs)
        return Response(request.model, "1", {name: outputs[name] for name in wanted}, request.id)

    def model_options(self, model: str) -> ModelOptions:
        self.versions(model)
        return ModelOptions(batching=Batching(preferred_batch_size=(4, 8), max_queue_delay_us=100))

    def index(self) -> list[dict[str, Any]]:
        return [{"name": name, "version": "1", "state": "READY", "reason": ""} for name in self.names()]

    def all_statistics(self) -> Mapping[tuple[str, str], Statistics]:
        return self._statistics

    def cache_statistics(self) -> dict[str, Any]:
        return {"hits": 0, "misses": 0, "entries": 0, "bytes": 0}

    def resources(self) -> dict[str, Any]:
        return {"resident_bytes": 1, "cap_bytes": None}


@contextlib.contextmanager
def running(
    served: Any, options: ServerOptions | None = None, *, auth: Any = None, regions: Path | None = None
) -> Iterator[tuple[int, int]]:
    """HTTP and gRPC of ``served`` on free ports of the loopback address, in a thread of their own: (HTTP, gRPC).

    ``regions``: the folder of regions in shared memory; None serves none.
    """
    options = options or ServerOptions()
    held = Bytes(options.max_in_flight_bytes)
    known = None if regions is None else Regions(regions, held)
    ports: Future[tuple[int, int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        if isinstance(served, Models):
            await served.start()
        app = http_app.make_app(served, options=options, auth=auth, regions=known)
        # The protocol is named, or asyncio would leave Nagle's algorithm on: 40 ms a request.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
        http = asyncio.create_task(server.serve(sockets=[listener]))
        rpc = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])
        grpc_app.make_servicer(served, options=options, auth=auth, held=held, regions=known).add_to(rpc)
        port = rpc.add_insecure_port("127.0.0.1:0")
        await rpc.start()
        ports.set_result((listener.getsockname()[1], port, asyncio.get_running_loop(), stop))
        await stop.wait()
        server.should_exit = True
        await http
        await rpc.stop(0)
        if isinstance(served, Models):
            await served.stop()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if not ports.done():
                ports.set_exception(error)
            raise

    thread = threading.Thread(target=run, name="server")
    thread.start()
    http_port, grpc_port, loop, stop = ports.result(30)
    try:
        yield http_port, grpc_port
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)


def fetch(port: int, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a GET, or with a body of a POST."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, named)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()
