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
