"""What the application is spared: bodies that are too large, more requests at once than are to be handled.

ASGI around the application. What can be bounded before all headers of a request are there is in ``http_protocol``.

A request that is too large is answered and its connection closed without reading the rest of it (RFC 9110, 15.5.14).
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from toolchain.serving import wire
from toolchain.serving.base import Overloaded, ServingError, TooLarge, Unavailable

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

#: How long the refusal of a request with much data is held back: whoever comes back at once would keep the processor
#: from those that were let in.
REFUSAL_SECONDS = 0.05


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


class Bytes:
    """The bytes of all requests that are being handled, over HTTP and gRPC.

    Args:
        most: that there may be.

    Attributes:
        held: that there are.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.held = 0

    def take(self, count: int) -> None:
        """Raises Overloaded where there is no room for so many more."""
        if self.held + count > self._most:
            raise Overloaded(f"{self.held >> 20} MiB of requests are being handled", hint="send it again later")
        self.held += count

    def give(self, count: int) -> None:
        """As many are not held any more."""
        self.held -= count


class Limits:
    """ASGI around an application.

    Args:
        app: what is inside.
        max_request_bytes: of one body.
        max_in_flight: POST requests that are handled at once. Others are not counted: whoever asks whether the server
            lives, or for its metrics, is answered when it is full.
        held: bounds the bytes of all requests; taken for what a request says that it has, before that is read.

    Attributes:
        in_flight: requests that are being handled.
        draining: a shutdown has begun: new POST requests get 503, all answers close their connection.
    """

    def __init__(self, app: App, *, max_request_bytes: int, max_in_flight: int, held: Bytes) -> None:
        self._app = app
        self._held = held
        self.max_request_bytes = max_request_bytes
        self._max_in_flight = max_in_flight
        self.in_flight = 0
        self.draining = False

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counted = scope["method"] == "POST"
        size = 0
        refused: ServingError | None = None
        if counted and self.draining:
            refused = Unavailable("the server is shutting down")
        elif counted and self.in_flight >= self._max_in_flight:
            refused = Overloaded(f"{self.in_flight} requests are being handled", hint="send it again later")
        else:
            for name, value in scope["headers"]:
                if name == b"content-length":
                    size = int(value)
            try:
                if size > self.max_request_bytes:
                    raise self.too_large()
                self._held.take(size)
            except ServingError as error:
                refused = error
        if refused is not None:
            # Not closed where the queue is full: whoever comes back would have to connect again, which is dearer.
            for message in answer(refused, close=not isinstance(refused, Overloaded)):
                await send(message)
            return
        self.in_flight += counted
        bounded = _Bounded(receive, send, self, self._held, size)
        try:
            await self._app(scope, bounded.receive, bounded.send)
        except Exception:
            if not bounded.cut:
                raise
        finally:
            self.in_flight -= counted
            self._held.give(bounded.held)

    def too_large(self) -> TooLarge:
        """What a request that is too large is told."""
        return TooLarge(f"the request is larger than {self.max_request_bytes} bytes, the most that is taken")


class _Bounded:
    """One request's ``receive`` and ``send``: counts what comes, and answers where it is too much.

    Attributes:
        held: bytes that were taken for it: those that it said it has, or those that came without a word.
        cut: it was answered here.
    """

    __slots__ = ("_all", "_limits", "_read", "_receive", "_send", "_started", "cut", "held")

    def __init__(self, receive: Receive, send: Send, limits: Limits, of_all: Bytes, held: int) -> None:
        self._all = of_all
        self.held = held
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
            try:
                if self._read > self._limits.max_request_bytes:
                    raise self._limits.too_large()
                if self._read > self.held:
                    self._all.take(self._read - self.held)
                    self.held = self._read
            except ServingError as error:
                self.cut = True
                if not self._started:
                    for part in answer(error, close=True):
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
