"""Clients that send too much, too slowly, or too many: on real sockets, against uvicorn with our protocol."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httptools")

import uvicorn

from toolchain.serving.http_protocol import MAX_HEADER_BYTES, protocol
from toolchain.serving.limits import App, Bytes, Limits, Message, Receive, Send

TIMEOUT = 0.3


class Echo:
    """Answers with the number of bytes it was sent; ``/wait`` only when it may; ``/big`` with a lot."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.seen = 0
        self.disconnected = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected += 1
                raise RuntimeError("the client has gone")  # as frameworks do
            body += message["body"]
            self.seen += len(message["body"])
            if not message["more_body"]:
                break
        if scope["path"] == "/wait":
            await self.may.wait()
        text = b"x" * (64 << 20) if scope["path"] == "/big" else str(len(body)).encode()
        headers = [(b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})


@contextlib.asynccontextmanager
async def serving(
    app: App, *, timeout: float = TIMEOUT, connections: int = 100
) -> AsyncIterator[tuple[int, uvicorn.Server]]:
    config = uvicorn.Config(
        app, port=0, http=protocol(client_timeout=timeout, max_connections=connections), ws="none", lifespan="off",
        log_config=None, access_log=False,
    )  # fmt: skip
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        yield server.servers[0].sockets[0].getsockname()[1], server
    finally:
        server.force_exit = True
        await server.shutdown()


async def ask(port: int, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Sends bytes as they are, reads to the end of the answer. Status 0: closed without one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 27)
    try:
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        return await read(reader)
    finally:
        writer.close()


async def read(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    async with asyncio.timeout(10):
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0, {}, b""
        headers = {k.lower(): v for k, v in re.findall(r"^([^:\r\n]+): (.*?)\r$", head, re.MULTILINE)}
        return int(head.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


def post(size: int, path: str = "/", extra: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: a\r\n{extra}Content-Length: {size}\r\n\r\n".encode()


def limits(app: App, *, bytes_: int = 1000, in_flight: int = 2, together: int = 1 << 30) -> Limits:
    return Limits(app, max_request_bytes=bytes_, max_in_flight=in_flight, held=Bytes(together))


def test_a_body_within_the_limit_passes_and_one_beyond_is_refused_unread() -> None:
    async def main() -> None:
        app = Echo()
        async with serving(limits(app)) as (port, _):
            assert (await ask(port, post(1000) + b"a" * 1000))[::2] == (200, b"1000")
            seen = app.seen
            status, headers, body = await ask(port, post(1001))  # not a byte of it is sent
            assert status == 413
            assert headers["connection"] == "close"
            assert "1000 bytes" in json.loads(body)["error"]
            assert app.seen == seen

    asyncio.run(main())


def test_a_chunked_body_beyond_the_limit_is_refused_while_it_comes() -> None:
    async def main() -> None:
        app = Echo()
        async with serving(limits(app)) as (port, server):
            head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            chunk = b"190\r\n" + b"a" * 0x190 + b"\r\n"
            assert (await ask(port, head + chunk * 2 + b"0\r\n\r\n"))[2] == b"800"
            status, headers, _ = await ask(port, head + chunk * 100)  # and it never ends
            assert (status, headers["connection"]) == (413, "close")
            await asyncio.sleep(0.05)
            assert not server.server_state.connections
            assert app.seen < 800 + 1500 + (64 << 10)

    asyncio.run(main())


@pytest.mark.parametrize("pieces", [1, 50])
@pytest.mark.parametrize("shape", ["one", "many", "path"])
def test_headers_beyond_the_limit_are_refused(shape: str, pieces: int) -> None:
    def request(size: int) -> bytes:
        if shape == "one":
            return b"GET / HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * size + b"\r\n\r\n"
        if shape == "path":
            return b"GET /" + b"a" * size + b" HTTP/1.1\r\nHost: a\r\n\r\n"
        return b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X-A: " + (b"a" * 91 + b"\r\nX-A: ") * (size // 98) + b"a\r\n\r\n"

    async def main() -> None:
        async with serving(limits(Echo()), timeout=5) as (port, _):
            assert (await ask(port, request(MAX_HEADER_BYTES - 200)))[0] == 200
            data = request(MAX_HEADER_BYTES + 64)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            size = len(data) // pieces + 1
            for start in range(0, len(data), size):
                writer.write(data[start : start + size])
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
                await asyncio.sleep(0)
            status, headers, _ = await read(reader)
            assert (status, headers["connection"]) == (431, "close")
            writer.close()
            # One that never ends is refused when it is too long, not when it has ended.
            status, _, _ = await ask(port, b"GET / HTTP/1.1\r\nX-A: " + b"a" * (MAX_HEADER_BYTES * 2))
            assert status == 431

    asyncio.run(main())


def test_beyond_what_may_be_in_flight_posts_are_refused_and_gets_are_not() -> None:
    async def main() -> None:
        app = Echo()
        inside = limits(app)
        async with serving(inside) as (port, _):
            first = [asyncio.create_task(ask(port, post(1, "/wait") + b"a")) for _ in range(2)]
            while inside.in_flight < 2:
                await asyncio.sleep(0.001)
            status, headers, body = await ask(port, post(1) + b"a")
            assert status == 429
            assert int(headers["retry-after"]) >= 1
            assert "connection" not in headers
            assert "2 requests" in json.loads(body)["error"]
            assert (await ask(port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"))[0] == 200
            app.may.set()
            assert [one[0] for one in await asyncio.gather(*first)] == [200, 200]
            assert inside.in_flight == 0
            assert (await ask(port, post(1) + b"a"))[0] == 200

    asyncio.run(main())


def test_the_bytes_of_all_requests_together_are_bounded() -> None:
    async def main() -> None:
        app = Echo()
        async with serving(limits(app, in_flight=10, together=1500), timeout=5) as (port, _):
            first = asyncio.create_task(ask(port, post(1000, "/wait") + b"a" * 1000))
            await asyncio.sleep(0.05)
            seen = app.seen
            status, headers, body = await ask(port, post(501))  # refused by what it says, before any of it is there
            assert (status, "connection" in headers) == (429, False)
            assert "being handled" in json.loads(body)["error"]
            chunks = (
                b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"190\r\n" + b"a" * 400 + b"\r\n"
            )
            assert (await ask(port, chunks + b"65\r\n" + b"a" * 101 + b"\r\n0\r\n\r\n"))[0] == 429
            assert app.seen <= seen + 400
            assert (await ask(port, post(500) + b"a" * 500))[0] == 200
            app.may.set()
            assert (await first)[0] == 200
            for _ in range(3):
                assert (await ask(port, post(1000) + b"a" * 1000))[0] == 200

    asyncio.run(main())


def test_a_refused_request_leaves_its_connection_usable() -> None:
    async def main() -> None:
        app = Echo()
        async with serving(limits(app, in_flight=1)) as (port, _):
            first = asyncio.create_task(ask(port, post(1, "/wait") + b"a"))
            await asyncio.sleep(0.05)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(3) + b"abc")
            assert (await read(reader))[0] == 429
            app.may.set()
            await first
            writer.write(post(3) + b"abc")
            assert (await read(reader))[::2] == (200, b"3")
            writer.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", 0),
        (b"GE", 408),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX", 408),
        (post(10) + b"abc", 408),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", 408),
    ],
    ids=["nothing", "a word", "headers", "body", "chunks"],
)
def test_a_client_that_stalls_is_cut(sent: bytes, status: int) -> None:
    async def main() -> None:
        app = Echo()
        inside = limits(app)
        async with serving(inside) as (port, server):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            got, _, _ = await read(reader)
            assert got == status
            assert await reader.read() == b""  # and closed
            writer.close()
            await asyncio.sleep(0.05)
            assert inside.in_flight == 0
            assert not server.server_state.connections

    asyncio.run(main())


def test_a_client_that_drips_is_cut_however_it_keeps_on() -> None:
    """Slow loris: there is always one more byte, in the headers or in the body."""

    async def main() -> None:
        app = Echo()
        async with serving(limits(app)) as (port, _):
            for start in (b"GET / HTTP/1.1\r\nX-A: ", post(500)):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(start)
                answered = asyncio.create_task(read(reader))
                drops = 0
                while not answered.done() and drops < 400:
                    writer.write(b"a")
                    drops += 1
                    await asyncio.sleep(0.01)
                assert (await answered)[0] == 408
                writer.close()

    asyncio.run(main())


def test_a_slow_answer_is_not_the_clients_fault() -> None:
    async def main() -> None:
        app = Echo()
        async with serving(limits(app)) as (port, _):
            asked = asyncio.create_task(ask(port, post(1, "/wait") + b"a"))
            await asyncio.sleep(TIMEOUT * 2)
            app.may.set()
            assert (await asked)[0] == 200

    asyncio.run(main())


def test_a_client_that_does_not_read_is_cut() -> None:
    async def main() -> None:
        async with serving(limits(Echo())) as (port, server):
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 10)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
            await asyncio.sleep(0.1)
            assert server.server_state.connections
            for _ in range(100):
                await asyncio.sleep(0.05)
                if not server.server_state.connections:
                    break
            assert not server.server_state.connections
            writer.transport.abort()

    asyncio.run(main())


def test_pauses_between_requests_are_no_stalls() -> None:
    async def main() -> None:
        async with serving(limits(Echo())) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(2):
                writer.write(post(2) + b"ab")
                assert (await read(reader))[0] == 200
                await asyncio.sleep(TIMEOUT * 2)
            writer.close()

    asyncio.run(main())


def test_draining_refuses_work_and_closes_connections() -> None:
    async def main() -> None:
        app = Echo()
        inside = limits(app)
        async with serving(inside) as (port, _):
            before = asyncio.create_task(ask(port, post(1, "/wait") + b"a"))
            await asyncio.sleep(0.05)
            inside.draining = True
            status, headers, _ = await ask(port, post(1) + b"a")
            assert (status, headers["connection"]) == (503, "close")
            status, headers, _ = await ask(port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (status, headers["connection"]) == (200, "close")
            app.may.set()
            status, headers, _ = await before
            assert (status, headers["connection"]) == (200, "close")

    asyncio.run(main())


def test_connections_beyond_the_bound_are_closed() -> None:
    async def main() -> None:
        async with serving(limits(Echo()), timeout=5, connections=3) as (port, _):
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            await asyncio.sleep(0.05)
            assert (await ask(port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"))[0] == 0
            held[0][1].close()
            await asyncio.sleep(0.05)
            assert (await ask(port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"))[0] == 200
            for _, writer in held:
                writer.close()

    asyncio.run(main())


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", post(-1), post(1)[:-4] + b"x\r\n\r\n"])
def test_what_is_not_http_is_a_bad_request(sent: bytes) -> None:
    async def main() -> None:
        async with serving(limits(Echo())) as (port, _):
            status, headers, body = await ask(port, sent)
            assert (status, headers["connection"]) == (400, "close")
            assert "HTTP" in json.loads(body)["error"]

    asyncio.run(main())
