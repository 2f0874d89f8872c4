"""Large bodies: where they are received, that they are left alone till somebody asks, and what comes after them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.util
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httptools")

import uvicorn
from standin import Few

from toolchain.serving.base import InvalidRequest, Overloaded, Request, Response
from toolchain.serving.http_app import REFUSAL_SECONDS, make_app
from toolchain.serving.http_protocol import CONNECTION, LARGE, LimitedProtocol, protocol
from toolchain.serving.limits import App, Message, Receive, Send
from toolchain.serving.options import ServerOptions

LOOPS = ["asyncio", *(["uvloop"] if importlib.util.find_spec("uvloop") else [])]


def on(loop: str, scene: Callable[[], object]) -> None:
    """Runs a scene on one of the event loops that the server may have."""
    factory = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(scene())  # type: ignore[arg-type]


async def reply(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class App_:
    """``/whole``: takes the body where it lies; ``/refuse``: does not look at it; else: through ``receive``."""

    def __init__(self) -> None:
        self.large: list[int] = []
        self.bodies: list[bytes] = []
        self.addresses: list[int] = []
        self.errors: list[Exception] = []
        self.left = asyncio.Event()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        connection: LimitedProtocol = scope["extensions"][CONNECTION]
        self.large.append(connection.large)
        if scope["path"] == "/refuse":
            await reply(send, 429, b"full")
            return
        if scope["path"] == "/slow":
            connection.on_left = self.left.set
            await self.left.wait()
            return
        if scope["path"].startswith("/whole") and connection.large:
            lead = int(scope["path"][6:] or "0")
            try:
                body = await connection.whole(lead=lead)
            except InvalidRequest as error:
                self.errors.append(error)
                raise
            assert body.readonly
            self.addresses.append(np.frombuffer(body, np.uint8).ctypes.data + lead)
            self.bodies.append(bytes(body))
        else:
            parts = []
            while True:
                message = await receive()
                parts.append(message["body"])
                if not message["more_body"]:
                    break
            self.bodies.append(b"".join(parts))
        await reply(send, 200, b"%d" % len(self.bodies[-1]))


@contextlib.asynccontextmanager
async def serving(app: App, *, timeout: float = 5.0, age: float = 0.0) -> AsyncIterator[int]:
    made = protocol(client_timeout=timeout, max_connections=100, max_age=age)
    config = uvicorn.Config(
        app, port=0, http=made, ws="none", lifespan="off", log_config=None, access_log=False,  # type: ignore[arg-type]
    )  # fmt: skip
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.force_exit = True
        await server.shutdown()


def post(path: str, body: bytes, extra: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: a\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return int(head.split()[1]), await reader.readexactly(length)


def data(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.mark.parametrize("loop", LOOPS)
def test_large_bodies_arrive_whole_and_aligned_whatever_comes_between(loop: str) -> None:
    async def main() -> None:
        app = App_()
        async with serving(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            sizes = [LARGE - 1, LARGE, LARGE + 1, 5, 700_001, 0, 3 << 20]
            bodies = [data(size, size) for size in sizes]
            for number, body in enumerate(bodies):
                for path in (f"/whole{37 * number}", "/pieces"):
                    writer.write(post(path, body))
                    assert await answer(reader) == (200, b"%d" % len(body))
            assert app.bodies == [body for body in bodies for _ in range(2)]
            assert app.large == [size if size >= LARGE else 0 for size in sizes for _ in range(2)]
            assert len(app.addresses) == 4
            assert not any(address % 64 for address in app.addresses)
            writer.close()

    on(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_body_that_nobody_reads_is_thrown_away_and_its_connection_goes_on(loop: str) -> None:
    async def main() -> None:
        app = App_()
        async with serving(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            body = data(2_000_003)
            for _ in range(3):
                writer.write(post("/refuse", body))
                assert await answer(reader) == (429, b"full")
                writer.write(post("/whole", body))
                assert await answer(reader) == (200, b"2000003")
            assert app.bodies == [body] * 3
            writer.close()

    on(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_refusal_does_not_wait_for_the_body(loop: str) -> None:
    async def main() -> None:
        app = App_()
        async with serving(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            whole = post("/refuse", data(500_000))
            writer.write(whole[:1000])  # and the rest has not been sent
            assert await answer(reader) == (429, b"full")
            writer.write(whole[1000:] + post("/pieces", b"abc"))
            assert await answer(reader) == (200, b"3")
            writer.close()

    on(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_requests_behind_each_other_in_one_write(loop: str) -> None:
    async def main() -> None:
        app = App_()
        async with serving(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            bodies = [data(size, size) for size in (3, 200_000, 10, 100_000, 300_000)]
            writer.write(b"".join(post("/whole", body) for body in bodies))
            for body in bodies:
                assert await answer(reader) == (200, b"%d" % len(body))
            assert app.bodies == bodies
            writer.close()

    on(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_nothing_of_a_body_is_sent_before_the_client_is_told_to(loop: str) -> None:
    async def main() -> None:
        app = App_()
        async with serving(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            body = data(200_000)
            head = post("/whole", body, "Expect: 100-continue\r\n")[: -len(body)]
            writer.write(head)
            async with asyncio.timeout(10):
                assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert await answer(reader) == (200, b"200000")
            writer.write(post("/refuse", body, "Expect: 100-continue\r\n")[: -len(body)])
            assert (await answer(reader))[0] == 429
            writer.close()

    on(loop, main)


def test_a_client_that_leaves_or_stalls_in_a_large_body() -> None:
    async def main() -> None:
        app = App_()
        async with serving(app, timeout=0.3) as port:
            whole = post("/whole", data(500_000))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(whole[:300_000])
            await writer.drain()
            while not app.large:
                await asyncio.sleep(0.001)
            writer.close()
            async with asyncio.timeout(5):
                while not app.errors:
                    await asyncio.sleep(0.001)
            assert "left" in str(app.errors[0])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(whole[:300_000])
            assert (await answer(reader))[0] == 408
            assert await reader.read() == b""
            writer.close()

    asyncio.run(main())


def test_whoever_answers_is_told_that_the_client_left() -> None:
    async def main() -> None:
        app = App_()
        async with serving(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post("/pieces", b"abc"))
            await answer(reader)
            writer.write(post("/slow", b""))
            while len(app.large) < 2:
                await asyncio.sleep(0.001)
            assert not app.left.is_set()
            writer.close()
            async with asyncio.timeout(5):
                await app.left.wait()

    asyncio.run(main())


def test_a_request_whose_client_leaves_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        ended = asyncio.Event()

        class Waits(Few):
            async def infer(self, request: Request) -> Response:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    ended.set()
                    raise
                raise AssertionError("nobody left")

        app = make_app(Waits(tmp_path, ("double",)), options=ServerOptions())
        text = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}'
        async with serving(app) as port:  # type: ignore[arg-type]
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post("/v2/models/double/infer", text))
            await asyncio.sleep(0.1)
            assert not ended.is_set()
            writer.close()
            async with asyncio.timeout(5):
                await ended.wait()

    asyncio.run(main())


def test_a_large_inference_is_read_where_it_may_come_in_and_not_where_it_may_not(tmp_path: Path) -> None:
    async def main() -> None:
        class Full(Few):
            full = False
            expected = 0

            @contextlib.contextmanager
            def expecting(self, model: str, version: str = "") -> Iterator[None]:
                if self.full:
                    raise Overloaded("full")
                self.expected += 1
                yield

        few = Full(tmp_path, ("copy_fp32",))
        rows = np.random.default_rng(0).standard_normal((8, 3), np.float32)
        head = {
            "inputs": [
                {"name": "x", "shape": [8, 3], "datatype": "FP32", "parameters": {"binary_data_size": rows.nbytes}}
            ],
            "id": "a" * LARGE,
        }
        text = json.dumps(head).encode()
        whole = post(
            "/v2/models/copy_fp32/infer", text + rows.tobytes(), f"Inference-Header-Content-Length: {len(text)}\r\n"
        )
        async with serving(make_app(few, options=ServerOptions())) as port:  # type: ignore[arg-type]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(whole)
            status, body = await answer(reader)
            assert status == 200
            assert json.loads(body)["outputs"][0]["data"] == pytest.approx(rows.ravel().tolist())
            assert few.expected == 1
            assert few.seen[0].inputs["x"].flags.aligned
            few.full = True
            began = time.monotonic()
            writer.write(whole[:2000])
            assert (await answer(reader))[0] == 429
            assert time.monotonic() - began >= REFUSAL_SECONDS  # whoever comes back at once has to wait
            few.full = False
            writer.write(whole[2000:] + whole)
            assert (await answer(reader))[0] == 200
            writer.close()

    asyncio.run(main())


@pytest.mark.parametrize("loop", LOOPS)
def test_an_old_connection_is_closed_by_an_answer_that_says_so(loop: str) -> None:
    """Not before it is old, not in the middle of a body, and not while another request waits for its answer."""

    async def main() -> None:
        async with serving(App_(), age=0.3) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post("/whole0", b"young"))
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"connection: close" not in head.lower()
            await reader.readexactly(1)
            await asyncio.sleep(0.5)
            # refused before its body is read: to close now would have the kernel throw the answer away
            writer.write(post("/refuse", data(LARGE)))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.split()[1] == b"429"
            assert b"connection: close" not in head.lower()
            await reader.readexactly(4)
            # two at once: the first is not the last
            writer.write(post("/pieces", b"one") + post("/pieces", b"three"))
            assert await answer(reader) == (200, b"3")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.split()[1] == b"200"
            if b"connection: close" not in head.lower():  # it came as one of several
                await reader.readexactly(1)
                writer.write(post("/whole0", data(3 * LARGE)))
                head = await reader.readuntil(b"\r\n\r\n")
            assert b"connection: close" in head.lower()
            rest = await asyncio.wait_for(reader.read(), 5)
            assert rest in (b"5", b"%d" % (3 * LARGE))
            writer.close()

    on(loop, main)


def test_clients_that_keep_connections_fail_at_nothing_when_those_are_renewed() -> None:
    """http.client reuses a connection unless the answer closes it, and does not try again."""

    async def main() -> None:
        app = App_()
        async with serving(app, age=0.02) as port:
            opened = 0

            def client(seed: int) -> None:
                nonlocal opened
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                for done in range(400):
                    body = data(2 * LARGE if done % 50 == 7 else 100, seed)
                    opened += connection.sock is None
                    connection.request("POST", "/whole0", body)
                    answer = connection.getresponse()
                    assert (answer.status, answer.read()) == (200, b"%d" % len(body))
                connection.close()

            await asyncio.gather(*(asyncio.to_thread(client, seed) for seed in range(4)))
            assert opened >= 8, "no connection was renewed"

    asyncio.run(main())
