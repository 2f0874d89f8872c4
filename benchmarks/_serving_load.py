"""A client in a process of its own that loads a server and writes down what every request met.

    python benchmarks/_serving_load.py '{"protocol": "grpc", "port": 8001, ...}' OUT.npz      (see ``Job``)

Bodies are made once, and answers are compared with the expected bytes and not decoded, so the client takes little of
the machine. Closed loop: so many requests are always under way. Open loop: arrivals of a Poisson process of a given
rate, from a seed; whatever the server does, the next one is sent when its time has come, and latency counts from then
(Schroeder, Wierman, Harchol-Balter, NSDI 2006; there is no coordinated omission).

With ``shared_memory`` a request names a region that is its own while it is under way, and the input is copied into that
before each: what a client on the same machine does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import mmap
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

#: What a request that was answered rightly is counted as; others by their status, or these.
OK, BROKEN, WRONG = "ok", "broken", "wrong answer"
#: How a request ended, the body of its answer, and the client's port; 0 where that is not known.
Answer = tuple[str, bytes, int]


@dataclasses.dataclass(frozen=True)
class Job:
    """What to send, and how.

    Attributes:
        protocol: ``http`` (binary tensors), ``json`` (for servers that do not take those) or ``grpc``.
        port: on the loopback address.
        model: its name.
        input, shape: of the one float32 input, which is filled from a seed.
        seconds: how long requests are sent.
        concurrency: requests under way; in an open loop the most connections of HTTP.
        rate: requests a second in an open loop; 0 is a closed loop.
        warmup: seconds before that, not written down.
        expected: the last bytes of a right answer, hex; "" takes those of the first answer.
        timeout: seconds after which a request is given up.
        channels: connections of gRPC.
        models: in place of ``model``: a request in ``every`` goes to one of these, in turn.
        path: of HTTP, with the model's name for ``{}``.
        reuse: requests of one connection of HTTP; 0 is no bound.
        shared_memory: inputs go through shared memory (``http`` and ``grpc``); answers come as ever.
    """

    protocol: str
    port: int
    model: str
    input: str
    shape: tuple[int, ...]
    seconds: float
    concurrency: int = 1
    rate: float = 0.0
    warmup: float = 0.5
    seed: int = 0
    expected: str = ""
    timeout: float = 30.0
    channels: int = 1
    models: tuple[str, ...] = ()
    every: int = 0
    path: str = "/v2/models/{}/infer"
    reuse: int = 0
    shared_memory: bool = False

    def array(self) -> np.ndarray:
        """The input: float32, the same for the same shape."""
        return np.random.default_rng(7).standard_normal(self.shape, np.float32)


class Region:
    """Shared memory of one request at a time.

    Attributes:
        name: that it is registered by.
        bodies: model → the request that names it.
    """

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self.bodies: dict[str, bytes] = {}
        self._path = Path("/dev/shm") / name
        with self._path.open("xb+") as file:
            file.truncate(size)
            self._memory = mmap.mmap(file.fileno(), size)

    def fill(self, data: memoryview) -> None:
        """Copies an input into it."""
        self._memory[:] = data

    def close(self) -> None:
        self._memory.close()
        self._path.unlink(missing_ok=True)


class Pool:
    """Regions of requests that are under way; a new one is made and registered where none is free.

    Args:
        data: the input.
        register, unregister: at the server.
        body: makes the request to a model that names a region.
    """

    def __init__(
        self,
        job: Job,
        register: Callable[[Region], Awaitable[None]],
        unregister: Callable[[Region], Awaitable[None]],
        body: Callable[[str, Region], bytes],
    ) -> None:
        self._data = memoryview(job.array().tobytes())
        self._models = (job.model, *job.models)
        self._register, self._unregister, self._body = register, unregister, body
        self._free: list[Region] = []
        self._all: list[Region] = []

    async def send(self, model: str, send: Callable[[bytes], Awaitable[Answer]]) -> Answer:
        """Has a request sent whose input lies in a region. That of one which was not answered may still be read: it is
        not used again."""
        if self._free:
            region = self._free.pop()
        else:
            region = Region(f"load-{os.getpid()}-{len(self._all)}", len(self._data))
            self._all.append(region)
            await self._register(region)
            region.bodies = {each: self._body(each, region) for each in self._models}
        region.fill(self._data)
        answer = await send(region.bodies[model])
        if answer[0] not in (BROKEN, "timeout", "DEADLINE_EXCEEDED"):
            self._free.append(region)
        return answer

    async def close(self) -> None:
        for region in self._all:
            region.close()
        for region in self._all:
            await self._unregister(region)


class Http:
    """Requests over keep-alive connections: as many as are under way at once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.bodies = {model: self._body(model) for model in (job.model, *job.models)}
        self.idle: list[_Connection] = []
        self.pool = Pool(job, self._register, self._unregister, self._body) if job.shared_memory else None

    def _body(self, model: str, region: Region | None = None) -> bytes:
        job, array = self.job, self.job.array()
        spec: dict[str, Any] = {"name": job.input, "datatype": "FP32", "shape": job.shape}
        if region is not None:
            spec["parameters"] = {"shared_memory_region": region.name, "shared_memory_byte_size": region.size}
            head = json.dumps({"inputs": [spec], "parameters": {"binary_data_output": True}}).encode()
            return _post(job.path.format(model), {"Content-Type": "application/json"}, head)
        if job.protocol == "json":
            body = json.dumps({"inputs": [{**spec, "data": array.ravel().tolist()}]}).encode()
            return _post(job.path.format(model), {"Content-Type": "application/json"}, body)
        raw = array.tobytes()
        spec["parameters"] = {"binary_data_size": len(raw)}
        head = json.dumps({"inputs": [spec], "parameters": {"binary_data_output": True}}).encode()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        return _post(job.path.format(model), headers, head + raw)

    async def _register(self, region: Region) -> None:
        body = json.dumps({"key": f"/{region.name}", "offset": 0, "byte_size": region.size}).encode()
        status, said, _ = await self._send(_post(f"/v2/systemsharedmemory/region/{region.name}/register", {}, body))
        if status != OK:
            raise SystemExit(f"a region is not registered: {said.decode() or status}")

    async def _unregister(self, region: Region) -> None:
        await self._send(_post(f"/v2/systemsharedmemory/region/{region.name}/unregister", {}, b""))

    async def call(self, model: str) -> Answer:
        """Sends one request; its status, the body of its answer, and the client's port; 0 where none was had."""
        return await (self._send(self.bodies[model]) if self.pool is None else self.pool.send(model, self._send))

    async def _send(self, body: bytes) -> Answer:
        connection = None
        while self.idle and connection is None:
            popped = self.idle.pop()
            connection = popped if popped.open else None  # the server closed it while nothing was asked
        if connection is None:
            loop = asyncio.get_running_loop()
            try:
                _, connection = await loop.create_connection(_Connection, "127.0.0.1", self.job.port)
            except OSError:
                return BROKEN, b"", 0
        done: asyncio.Future[tuple[str, bytes]] = asyncio.get_running_loop().create_future()
        connection.begin(body, done)
        try:
            async with asyncio.timeout(self.job.timeout):
                answer = await done
        except TimeoutError:
            connection.transport.abort()
            return "timeout", b"", connection.port
        connection.used += 1
        if connection.used == self.job.reuse:
            connection.transport.close()
        elif connection.open:
            self.idle.append(connection)
        return (*answer, connection.port)

    async def close(self) -> None:
        if self.pool is not None:
            await self.pool.close()
        for connection in self.idle:
            connection.transport.abort()


def _post(path: str, headers: dict[str, str], body: bytes) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *(f"{k}: {v}" for k, v in headers.items()), "", ""]).encode() + body


class _Connection(asyncio.Protocol):
    """One request at a time; reads the status line, the length and the body, and nothing else."""

    transport: asyncio.Transport
    used = 0
    done: asyncio.Future[tuple[str, bytes]] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.port = int(transport.get_extra_info("sockname")[1])
        self.open = True

    def begin(self, request: bytes, done: asyncio.Future[tuple[str, bytes]]) -> None:
        self.done, self.buffer = done, bytearray()
        if not self.open:
            self._finish(BROKEN)
            return
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self.done is None:  # nobody asked: a server that closes may say so first
            return
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end].lower()
        at = head.find(b"content-length:")
        if at < 0:  # no server here answers in chunks
            self.transport.abort()
            self._finish(BROKEN)
            return
        length = int(head[at + 15 :].split(b"\r\n", 1)[0])
        if len(self.buffer) < end + 4 + length:
            return
        if b"connection: close" in head:
            self.open = False
            self.transport.close()
        status = head[9:12].decode()
        self._finish(OK if status == "200" else status, bytes(self.buffer[end + 4 :]))

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._finish(BROKEN)

    def _finish(self, status: str, body: bytes = b"") -> None:
        done, self.done = self.done, None
        if done is not None and not done.done():
            done.set_result((status, body))


class Grpc:
    """Requests over grpc.aio, as bytes both ways."""

    def __init__(self, job: Job) -> None:
        import grpc
        from tritonclient.grpc import service_pb2 as pb

        self.job = job
        self.pb = pb
        self.errors = grpc.aio.AioRpcError
        self.bodies = {model: self._body(model) for model in (job.model, *job.models)}
        self.pool = Pool(job, self._register, self._unregister, self._body) if job.shared_memory else None
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        self.channels = [
            grpc.aio.insecure_channel(f"127.0.0.1:{job.port}", options=unlimited) for _ in range(job.channels)
        ]
        self.methods = [channel.unary_unary("/inference.GRPCInferenceService/ModelInfer") for channel in self.channels]
        self.turn = 0

    def _body(self, model: str, region: Region | None = None) -> bytes:
        request = self.pb.ModelInferRequest(model_name=model)
        spec = request.inputs.add(name=self.job.input, datatype="FP32", shape=self.job.shape)
        if region is None:
            request.raw_input_contents.append(self.job.array().tobytes())
        else:
            spec.parameters["shared_memory_region"].string_param = region.name
            spec.parameters["shared_memory_byte_size"].int64_param = region.size
        body: bytes = request.SerializeToString()
        return body

    async def _register(self, region: Region) -> None:
        message = self.pb.SystemSharedMemoryRegisterRequest(
            name=region.name, key=f"/{region.name}", byte_size=region.size
        )
        await self._ask("Register", message.SerializeToString())

    async def _unregister(self, region: Region) -> None:
        await self._ask("Unregister", self.pb.SystemSharedMemoryUnregisterRequest(name=region.name).SerializeToString())

    async def _ask(self, what: str, message: bytes) -> None:
        method = self.channels[0].unary_unary(f"/inference.GRPCInferenceService/SystemSharedMemory{what}")
        try:
            await method(message, timeout=self.job.timeout)
        except self.errors as error:
            raise SystemExit(f"SystemSharedMemory{what}: {error.details()}") from None

    async def call(self, model: str) -> Answer:
        """Sends one request; its status, its answer, and 0 for a port that is not known."""
        return await (self._send(self.bodies[model]) if self.pool is None else self.pool.send(model, self._send))

    async def _send(self, body: bytes) -> Answer:
        self.turn += 1
        try:
            answer = await self.methods[self.turn % len(self.methods)](body, timeout=self.job.timeout)
            return OK, answer, 0
        except self.errors as error:
            code = error.code().name
            if code == "UNAVAILABLE" and any(
                word in (error.details() or "")
                for word in ("ocket closed", "onnection reset", "failed to connect", "GOAWAY")
            ):
                return BROKEN, b"", 0
            return code, b"", 0

    async def close(self) -> None:
        if self.pool is not None:
            await self.pool.close()
        for channel in self.channels:
            await channel.close()


class Log:
    """When each request should have been sent, how long it took from then, how it ended, and on which connection."""

    def __init__(self) -> None:
        self.names = [OK]
        self.rows: list[tuple[int, int, int, int, int]] = []

    def add(self, intended: int, late: int, status: str, port: int) -> None:
        if status not in self.names:
            self.names.append(status)
        self.rows.append((intended, time.monotonic_ns() - intended, self.names.index(status), late, port))


async def run(job: Job) -> Log:
    """Does what the job says."""
    client = Grpc(job) if job.protocol == "grpc" else Http(job)
    try:
        return await _run(job, client)
    finally:
        await client.close()


async def _run(job: Job, client: Grpc | Http) -> Log:
    log = Log()
    expected = bytes.fromhex(job.expected)
    if not expected:
        status, body, _ = await client.call(job.model)
        if status != OK:
            raise SystemExit(f"the first request ended with {status}")
        expected = body[-64:]
    sent = 0

    async def one(intended: int, into: Log | None) -> None:
        nonlocal sent
        sent += 1
        other = job.every and sent % job.every == 0
        model = job.models[sent // job.every % len(job.models)] if other else job.model
        late = time.monotonic_ns() - intended
        status, body, port = await client.call(model)
        if status == OK and not other and not body.endswith(expected):
            status = WRONG
        if into is not None:
            into.add(intended, late, status, port)

    async def closed(seconds: float, into: Log | None) -> None:
        end = time.monotonic_ns() + int(seconds * 1e9)

        async def worker() -> None:
            while (now := time.monotonic_ns()) < end:
                await one(now, into)

        await asyncio.gather(*(worker() for _ in range(job.concurrency)))

    async def opened(seconds: float, into: Log | None) -> None:
        rng = np.random.default_rng(job.seed)
        gaps = rng.exponential(1e9 / job.rate, int(job.rate * seconds * 1.2) + 20)
        times = np.cumsum(gaps)
        start = time.monotonic_ns()
        tasks: set[asyncio.Task[None]] = set()
        for at in times[times < seconds * 1e9].astype(np.int64).tolist():
            wait = start + at - time.monotonic_ns()
            if wait > 0:
                await asyncio.sleep(wait * 1e-9)
            task = asyncio.create_task(one(start + at, into))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    loop = opened if job.rate else closed
    if job.warmup:
        await loop(job.warmup, None)
    await loop(job.seconds, log)
    return log


def main() -> None:
    said = json.loads(sys.argv[1])
    job = Job(**{**said, "shape": tuple(said["shape"]), "models": tuple(said.get("models", ()))})
    log = uvloop.run(run(job))
    rows = np.array(log.rows, np.int64).reshape(-1, 5)
    np.savez(sys.argv[2], rows=rows, names=np.array(log.names))


if __name__ == "__main__":
    main()
