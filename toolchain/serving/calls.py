"""Who called: the id, the client and the trace of a request, from the transport to its line in the log.

A transport opens a ``Call`` (``HttpCalls`` around the ASGI application, ``GrpcCalls`` in the gRPC server), what answers
fills in which model it was and how long it took (``Observed``), and the transport closes it: one line, one span.
Without a ``Call``, as in a gRPC stream, ``Observed`` writes the line. ``x-request-id`` is taken over where a client
sends one, made up where not, and handed back.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc

from toolchain.serving.base import Hosted, ModelInfo, Request, Response, ServingError
from toolchain.serving.limits import App, Message, Receive, Send
from toolchain.serving.logs import RequestLog
from toolchain.serving.options import ModelOptions
from toolchain.serving.statistics import Statistics
from toolchain.serving.tracing import Tracer

#: What a context of grpc.aio says its status is, to the name of it.
_STATUS = {code.value[0]: code.name for code in grpc.StatusCode}
_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclasses.dataclass(slots=True)
class Call:
    """One call, while it is handled.

    Attributes:
        id: the request id.
        client: address and port.
        what: method and path, or the RPC.
        started_ns: ``time.monotonic_ns()``.
        span: of the tracer; None where it is off.
        response: what the model answered; error: or why it did not.
        infer_ns, infer_end_ns: when the model was asked, and when it had answered.
    """

    id: str
    client: str
    what: str
    started_ns: int
    span: Any = None
    request: Request | None = None
    response: Response | None = None
    error: ServingError | None = None
    infer_ns: int = 0
    infer_end_ns: int = 0


CALL: contextvars.ContextVar[Call | None] = contextvars.ContextVar("call", default=None)


def _milliseconds(ns: int) -> float:
    return round(ns * 1e-6, 3)


class Observer:
    """Writes lines and spans of calls. ``tracer`` None writes no spans."""

    def __init__(self, log: RequestLog, tracer: Tracer | None) -> None:
        self.log = log
        self.tracer = tracer

    def open(self, call_id: str | None, client: str, what: str, carrier: dict[str, str]) -> Call:
        """A new call, also as the current one of this task."""
        kept = call_id if call_id is not None and _ID.fullmatch(call_id) else os.urandom(8).hex()
        call = Call(kept, client, what, time.monotonic_ns())
        if self.tracer is not None:
            call.span = self.tracer.begin(what, carrier, at_ns=call.started_ns)
        CALL.set(call)
        return call

    def close(self, call: Call, *, status: int | str, failed: bool, defect: bool) -> None:
        """The call was answered."""
        now = time.monotonic_ns()
        self.told(
            call, request=call.request, response=call.response, error=call.error, status=status, failed=failed,
            defect=defect, ns=now - call.started_ns,
        )  # fmt: skip
        if self.tracer is None:
            return
        if call.infer_ns:
            self.tracer.step(call.span, "decode", call.started_ns, call.infer_ns)
            if call.response is not None:
                queued = call.infer_ns + call.response.queue_ns
                self.tracer.step(call.span, "queue", call.infer_ns, queued)
                self.tracer.step(call.span, "compute", queued, queued + call.response.compute_ns)
            self.tracer.step(call.span, "encode", call.infer_end_ns, now)
        attributes = {
            "request.id": call.id,
            "client.address": call.client,
            "model": call.request.model if call.request else None,
            "version": call.response.version if call.response else None,
            "status": status,
        }
        self.tracer.end(call.span, attributes, failed=defect, at_ns=now)

    def told(
        self,
        call: Call | None,
        *,
        request: Request | None,
        response: Response | None,
        error: ServingError | None,
        status: int | str,
        failed: bool,
        defect: bool,
        ns: int,
    ) -> None:
        """A line about a request."""
        if self.log.which == "none" or (self.log.which == "failed" and not failed):
            return
        fields = {
            "request_id": None if call is None else call.id,
            "id": request.id or None if request else None,
            "client": call.client if call is not None else None,
            "call": call.what if call is not None else "stream",
            "model": request.model if request else None,
            "version": response.version if response else request.version or None if request else None,
            "status": status,
            "ms": _milliseconds(ns),
            "queue_ms": _milliseconds(response.queue_ns) if response else None,
            "compute_ms": _milliseconds(response.compute_ns) if response else None,
            "cached": True if response and response.cached else None,
        }
        message = "refused" if failed and error is None else error.what if error else "answered"
        self.log.line(failed=failed, defect=defect, message=message, fields=fields)


class Observed(Hosted):
    """What answers, watched, and not ready any more once the server shuts down. The rest of it is ``hosted``'s own.

    Attributes:
        draining: a shutdown has begun. What is asked is still answered; new work is refused by the transports.
    """

    def __init__(self, hosted: Hosted, observer: Observer) -> None:
        self._hosted = hosted
        self._observer = observer
        self.draining = False

    def info(self, model: str, version: str = "") -> ModelInfo:
        return self._hosted.info(model, version)

    def versions(self, model: str) -> tuple[str, ...]:
        return self._hosted.versions(model)

    def names(self) -> tuple[str, ...]:
        return self._hosted.names()

    def model_options(self, model: str) -> ModelOptions:
        return self._hosted.model_options(model)

    def index(self) -> list[dict[str, Any]]:
        return self._hosted.index()

    def all_statistics(self) -> Mapping[tuple[str, str], Statistics]:
        return self._hosted.all_statistics()

    def cache_statistics(self) -> dict[str, Any]:
        return self._hosted.cache_statistics()

    def resources(self) -> dict[str, Any]:
        return self._hosted.resources()

    def is_ready(self, model: str | None = None, version: str = "") -> bool:
        return self._hosted.is_ready(model, version) and not self.draining

    def expecting(self, model: str, version: str = "") -> contextlib.AbstractContextManager[None]:
        return self._hosted.expecting(model, version)

    async def infer(self, request: Request) -> Response:
        call = CALL.get()
        begun = time.monotonic_ns()
        response = error = None
        try:
            response = await self._hosted.infer(request)
            return response
        except ServingError as raised:
            error = raised
            raise
        finally:
            if call is not None:
                call.request, call.response, call.error = request, response, error
                call.infer_ns, call.infer_end_ns = begun, time.monotonic_ns()
            elif error is not None or self._observer.log.which == "all":
                self._observer.told(
                    None, request=request, response=response, error=error,
                    status=error.grpc if error else "OK" if response else "CANCELLED", failed=response is None,
                    defect=error is not None and error.http == 500, ns=time.monotonic_ns() - begun,
                )  # fmt: skip


class HttpCalls:
    """ASGI around an application: opens and closes calls, and hands request ids back."""

    def __init__(self, app: App, observer: Observer) -> None:
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked: str | None = None
        carrier: dict[str, str] = {}
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                asked = value.decode("latin-1")
            elif name in (b"traceparent", b"tracestate"):
                carrier[name.decode()] = value.decode("latin-1")
        client = scope["client"]
        call = self._observer.open(
            asked, f"{client[0]}:{client[1]}" if client else "", f"{scope['method']} {scope['path'][:200]}", carrier
        )
        status = 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", call.id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, named)
        except BaseException:
            status = status or 500
            raise
        finally:
            # 0: the client went before it was answered. "Not ready yet" is an answer to whoever asks for that.
            failed = not 200 <= status < 400 and not (status == 503 and scope["path"].endswith("/ready"))
            self._observer.close(call, status=status, failed=failed, defect=status == 500)


class GrpcCalls(grpc.aio.ServerInterceptor):
    """The same for gRPC, only where lines for all requests, or traces, are asked for: it costs each call a little."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        carrier = {
            name: value
            for name, value in handler_call_details.invocation_metadata
            if name in ("x-request-id", "traceparent", "tracestate")
        }
        what = handler_call_details.method.rpartition("/")[2]
        inner = handler.unary_unary

        async def answered(request: Any, context: Any) -> Any:
            call = self._observer.open(carrier.get("x-request-id"), context.peer().partition(":")[2], what, carrier)
            context.set_trailing_metadata((("x-request-id", call.id),))
            broken = False
            try:
                return await inner(request, context)
            except grpc.aio.AbortError:
                raise
            except BaseException:
                broken = True
                raise
            finally:
                status = _STATUS.get(context.code() or 0, "UNKNOWN")
                self._observer.close(
                    call, status="UNKNOWN" if broken and status == "OK" else status,
                    failed=broken or status != "OK", defect=broken or status == "INTERNAL",
                )  # fmt: skip

        return grpc.unary_unary_rpc_method_handler(
            answered, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )
