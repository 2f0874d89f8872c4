"""What a client of the HTTP port may take: bytes of headers and body, time to send them, requests in flight.

Two halves, because an ASGI application is only called when all headers are there. ``LimitedProtocol`` is uvicorn's own
protocol with a count of the bytes of a header and one timer for a whole request: uvicorn has neither (llhttp takes
headers of any size, and a connection that sends a byte a minute is kept for ever). ``Limits`` is ASGI around the
application: sizes of bodies, and how many requests are handled at once.

A request that is too large is answered and its connection closed without reading the rest of it (RFC 9110, 15.5.14).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from toolchain.serving import wire
from toolchain.serving.base import InvalidRequest, Overloaded, ServingError, TooLarge, Unavailable

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

#: Of the request line and all headers of one request, bytes. Tokens and trace contexts are far below it.
MAX_HEADER_BYTES = 32 << 10
#: Of a connection on which nothing is asked, seconds.
KEEP_ALIVE_SECONDS = 75


class HeadersTooLarge(ServingError):
    """The headers of a request are beyond ``MAX_HEADER_BYTES``."""

    http = 431
    grpc = "RESOURCE_EXHAUSTED"

    def __init__(self) -> None:
        super().__init__(f"the headers are larger than {MAX_HEADER_BYTES} bytes")


class RequestTimeout(ServingError):
    """A client took too long to send its request."""

    http = 408
    grpc = "DEADLINE_EXCEEDED"

    def __init__(self) -> None:
        super().__init__("the request did not arrive in time")


def answer(error: ServingError, *, close: bool = False) -> tuple[Message, Message]:
    """The two messages of an answer that tells an error as the protocol does, ``{"error": ...}``."""
    body = json.dumps({"error": wire.message(error)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.http in (429, 503):
        headers.append((b"retry-after", b"1"))
    if close:
        headers.append((b"connection", b"close"))
    return (
        {"type": "http.response.start", "status": error.http, "headers": headers},
        {"type": "http.response.body", "body": body},
    )


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with bounds on headers, on connections, and on the time that a client may take.

    ``client_timeout`` holds for sending a request, first byte to last, and for taking an answer that does not fit the
    socket's buffer. A connection beyond ``max_connections`` is closed at once.
    """

    client_timeout: ClassVar[float] = 30.0
    max_connections: ClassVar[int] = 1 << 16

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unfinished = 0  # bytes that came since headers began and did not end them
        self._header_bytes = 0
        self._in_headers = False
        self._refusal: ServingError | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = self.loop.call_later(self.client_timeout, self._too_slow)
        if len(self.connections) > self.max_connections:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():  # what a client goes on to send after it was refused
            return
        super().data_received(data)
        if not self._in_headers:
            self._unfinished = 0
            return
        self._unfinished += len(data)
        if self._unfinished > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refusal = HeadersTooLarge()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0
        self._in_headers = True
        self._stop_timer()
        self._timer = self.loop.call_later(self.client_timeout, self._too_slow)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_timer()
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.client_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, or too large, in the form of all errors, and closes."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started or self.pipeline:  # another answer is under way
                self.transport.close()
                return
            # it is the body that is wrong: the application hears that the client is gone, and says nothing
            self.cycle.response_complete = self.cycle.disconnected = True
            self.cycle.message_event.set()
        start, body = answer(self._refusal or InvalidRequest("this is not HTTP/1.1"), close=True)
        headers = b"".join(name + b": " + value + b"\r\n" for name, value in start["headers"])
        self.transport.write(STATUS_LINE[start["status"]] + headers + b"\r\n" + body["body"])
        self.transport.close()

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            self._refusal = HeadersTooLarge()
            raise self._refusal  # the parser stops, and uvicorn calls send_400_response

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self.flow.read_paused:  # it is us who do not read
            self._timer = self.loop.call_later(self.client_timeout, self._too_slow)
            return
        if self._in_headers:
            self._refusal = RequestTimeout()
            self.send_400_response("")
            return
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:  # it waits for the rest of the body
            if not cycle.response_started:
                self._refusal = RequestTimeout()
                self.send_400_response("")
                return
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()


def protocol(*, client_timeout: float, max_connections: int) -> type[LimitedProtocol]:
    """The protocol with these bounds: uvicorn makes one for each connection and hands it nothing of ours."""
    bounds = {"client_timeout": client_timeout, "max_connections": max_connections}
    return type("BoundedProtocol", (LimitedProtocol,), bounds)


class Limits:
    """ASGI around an application.

    Args:
        app: what is inside.
        max_request_bytes: of one body.
        max_in_flight: POST requests that are handled at once. Others are not counted: whoever asks whether the server
            lives, or for its metrics, is answered when it is full.

    Attributes:
        in_flight: requests that are being handled.
        draining: a shutdown has begun: new POST requests get 503, all answers close their connection.
    """

    def __init__(self, app: App, *, max_request_bytes: int, max_in_flight: int) -> None:
        self._app = app
        self.max_request_bytes = max_request_bytes
        self._max_in_flight = max_in_flight
        self.in_flight = 0
        self.draining = False

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counted = scope["method"] == "POST"
        refused: ServingError | None = None
        if counted and self.draining:
            refused = Unavailable("the server is shutting down")
        elif counted and self.in_flight >= self._max_in_flight:
            refused = Overloaded(f"{self.in_flight} requests are being handled", hint="send it again later")
        else:
            for name, value in scope["headers"]:
                if name == b"content-length" and int(value) > self.max_request_bytes:
                    refused = self.too_large()
        if refused is not None:
            # Not closed where the queue is full: whoever comes back would have to connect again, which is dearer.
            for message in answer(refused, close=not isinstance(refused, Overloaded)):
                await send(message)
            return
        self.in_flight += counted
        bounded = _Bounded(receive, send, self)
        try:
            await self._app(scope, bounded.receive, bounded.send)
        except Exception:
            if not bounded.cut:
                raise
        finally:
            self.in_flight -= counted

    def too_large(self) -> TooLarge:
        """What a request that is too large is told."""
        return TooLarge(f"the request is larger than {self.max_request_bytes} bytes, the most that is taken")


class _Bounded:
    """One request's ``receive`` and ``send``: counts what comes, and answers where it is too much."""

    __slots__ = ("_limits", "_read", "_receive", "_send", "_started", "cut")

    def __init__(self, receive: Receive, send: Send, limits: Limits) -> None:
        self._receive = receive
        self._send = send
        self._limits = limits
        self._read = 0
        self._started = False
        self.cut = False

    async def receive(self) -> Message:
        if self.cut:
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.request":
            self._read += len(message["body"])
            if self._read > self._limits.max_request_bytes:
                self.cut = True
                if not self._started:
                    for part in answer(self._limits.too_large(), close=True):
                        await self._send(part)
                return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        if self.cut:
            return
        if message["type"] == "http.response.start":
            self._started = True
            if self._limits.draining:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
        await self._send(message)
