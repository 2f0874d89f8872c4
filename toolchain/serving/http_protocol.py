"""HTTP/1.1 on one connection: uvicorn's protocol, with bounds on clients, and large bodies received where they stay.

uvicorn has no bound on headers (llhttp takes any size) and none on time (a connection that sends a byte a minute is
kept for ever). Here bytes of a header are counted, and one timer holds for a whole request.

uvicorn takes a body through the parser, in pieces that are copied four times: 0.3 ms for 600 kB, where one row of a
small network takes 2. A body of known length from ``LARGE`` on is left in the socket until somebody asks for it:

* ``whole`` receives it into the memory that it stays in, aligned for what is in it, and the kernel's copy is the last;
* ``receive`` of ASGI goes on as ever;
* whoever answers without reading it (a queue is full) has it thrown away as it comes, and keeps the connection.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any, ClassVar

import httptools
import numpy as np
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from toolchain.serving.base import InvalidRequest, ServingError
from toolchain.serving.limits import answer

#: Of the request line and all headers of one request, bytes. Tokens and trace contexts are far below it.
MAX_HEADER_BYTES = 32 << 10
#: Of a connection on which nothing is asked, seconds.
KEEP_ALIVE_SECONDS = 75
#: Bodies of so many bytes wait in the socket until they are asked for.
LARGE = 64 << 10
#: The name under which a scope's ``extensions`` have its ``LimitedProtocol``.
CONNECTION = "toolchain.connection"
#: A cache line, and the widest vector register.
_ALIGNMENT = 64

#: What comes that has no place of its own is received here. One for all: it is read before the loop turns to another.
_SCRATCH = memoryview(bytearray(256 << 10))
#: What goes through the parser, in pieces below ``LARGE``: the first holds no large body whole.
_PARSED = _SCRATCH[:LARGE]


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


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with bounds on headers, on connections, and on the time that a client may take.

    ``client_timeout`` holds for sending a request, first byte to last, and for taking an answer that does not fit the
    socket's buffer. A connection beyond ``max_connections`` is closed at once. One that is older than ``max_age``
    seconds (0: for good) is closed with its next answer, which says so (``Connection: close``): the client opens
    another, which may come to another process. A tenth more or less, so that not all are renewed at the same time.

    Attributes:
        large: the length of the body that the request under way has and nobody has asked for; 0 where there is none.
        on_left: is called once if the client leaves before it was answered. For whoever answers, until then.
        gone: the client has left.
    """

    large: int
    on_left: Callable[[], object] | None
    gone: bool

    client_timeout: ClassVar[float] = 30.0
    max_connections: ClassVar[int] = 1 << 16
    max_age: ClassVar[float] = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._extensions: dict[str, dict[object, object]] = {CONNECTION: self}  # type: ignore[dict-item]
        self.large = 0
        self.on_left = None
        self.gone = False
        self._seen = 0  # bytes of a large body that came through the parser
        self._into: memoryview | None = None  # where the rest of the body is received
        self._skip = 0  # bytes of a body that nobody wants
        self._unfinished = 0  # bytes that came since headers began and did not end them
        self._header_bytes = 0
        self._in_headers = False
        self._refusal: ServingError | None = None
        age = self.max_age * random.uniform(0.9, 1.1)
        self._ends = self.loop.time() + age if age else math.inf
        self._last = False  # its answer closes the connection
        self._write_timer: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = self.loop.call_later(self.client_timeout, self._too_slow)
        if len(self.connections) > self.max_connections:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.resume_writing()
        super().connection_lost(exc)
        self.gone = True
        left, self.on_left = self.on_left, None
        if left is not None:
            left()

    def get_buffer(self, _hint: int) -> memoryview:
        if self._into is not None:
            return self._into
        return _SCRATCH[: self._skip] if self._skip else _PARSED

    def buffer_updated(self, count: int) -> None:
        if self._into is not None:
            self._into = self._into[count:]
            if not self._into:
                self._end_of_body()
        elif self._skip:
            self._skip -= count
            if not self._skip:
                self._end_of_body()
        else:
            self.data_received(bytes(_PARSED[:count]))

    async def whole(self, *, lead: int = 0) -> memoryview:
        """The body of ``large`` bytes, read-only, in memory of its own.

        Args:
            lead: the byte that lies on a cache line: where the data begins in it.

        Raises:
            InvalidRequest: the client left.
        """
        cycle, size = self.cycle, self.large
        raw = np.empty(size + _ALIGNMENT, np.uint8)
        start = -(raw.ctypes.data + lead) % _ALIGNMENT
        body = raw[start : start + size].data
        body[: self._seen] = cycle.body
        self._into, self.large = body[self._seen :], 0
        cycle.body = bytearray()
        if cycle.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            cycle.waiting_for_100_continue = False
        self.flow.resume_reading()
        while cycle.more_body and not cycle.disconnected:
            await cycle.message_event.wait()
            cycle.message_event.clear()
        if cycle.disconnected:
            raise InvalidRequest("the client left before its request was whole")
        return body.toreadonly()

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
        if self._last and not self.cycle.response_started:  # it was not the last: the client does not wait for answers
            self._last, self.cycle.keep_alive = False, True
        super().on_message_begin()
        self.scope["extensions"] = self._extensions
        self._header_bytes = 0
        self._length = 0
        self._in_headers = True
        self._stop_timer()
        self._timer = self.loop.call_later(self.client_timeout, self._too_slow)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        if len(name) == 14 and name.lower() == b"content-length":
            self._length = int(value)  # the parser has seen that it is a number
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        super().on_headers_complete()
        # One that waits behind another on its connection goes the ordinary way.
        if self._length >= LARGE and not self.pipeline and not self.parser.should_upgrade():
            self.large, self._seen = self._length, 0
            self.flow.pause_reading()

    def on_body(self, body: bytes) -> None:
        self._seen += len(body)
        super().on_body(body)

    def on_response_complete(self) -> None:
        self.on_left = None
        if self.large or self._into is not None:
            self._skip = len(self._into) if self._into is not None else self.large - self._seen
            self._into, self.large = None, 0
        super().on_response_complete()

    def on_message_complete(self) -> None:
        self._stop_timer()
        self.large = 0
        super().on_message_complete()
        # Whole, and the only one: what came and was not read would make the kernel reset the connection.
        if self.loop.time() >= self._ends and self.cycle.keep_alive and not self.pipeline:
            self._last = not self.cycle.response_started
            self.cycle.keep_alive = not self._last

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

    def _end_of_body(self) -> None:
        """The rest of a body came past the parser, which waits for it: another one takes the next request."""
        self._into, self._skip = None, 0
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.on_message_complete()

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


def protocol(*, client_timeout: float, max_connections: int, max_age: float = 0.0) -> type[asyncio.BufferedProtocol]:
    """The protocol with these bounds: uvicorn makes one for each connection and hands it nothing of ours."""
    bounds = {"client_timeout": client_timeout, "max_connections": max_connections, "max_age": max_age}
    bounded = type("BoundedProtocol", (LimitedProtocol,), bounds)

    class Connection(asyncio.BufferedProtocol):
        """What the transport calls: uvloop takes nothing for buffered that is an ``asyncio.Protocol`` as well."""

        def __init__(self, **of_uvicorn: Any) -> None:
            inner = bounded(**of_uvicorn)
            for name in (
                "connection_made", "connection_lost", "eof_received", "pause_writing", "resume_writing", "get_buffer",
                "buffer_updated",
            ):  # fmt: skip
                setattr(self, name, getattr(inner, name))

    return Connection
