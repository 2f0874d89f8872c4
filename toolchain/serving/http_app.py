"""The HTTP side: Open Inference Protocol v2 over REST, and what predict.py has for people without a client.

FastAPI routes and documents everything. Inference itself is answered before its router is asked, straight on ASGI: what
a request of a small model costs is mostly what lies between the socket and the model.

Errors are ``{"error": "..."}`` with the status of their class in ``base``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import fastapi
import fastapi.exceptions
import pydantic
import starlette.exceptions
from fastapi import Response
from starlette.types import Receive, Scope, Send

from toolchain.serving import describe, http_body, memory_routes, model_config, oip_json, predict, wire
from toolchain.serving.base import (
    Hosted,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServingError,
    Unauthenticated,
    Unavailable,
)
from toolchain.serving.http_protocol import CONNECTION, LimitedProtocol
from toolchain.serving.limits import REFUSAL_SECONDS
from toolchain.serving.options import ServerOptions
from toolchain.serving.tasks import Tasks

if TYPE_CHECKING:
    from toolchain.serving.auth import Auth
    from toolchain.serving.shared_memory import Regions

_log = logging.getLogger("toolchain.serving")
_JSON = b"application/json"


class Problem(pydantic.BaseModel):
    """What every error says."""

    error: str


class _App(fastapi.FastAPI):
    """FastAPI, with inference before its router."""

    infer: _Infer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith("/infer"):
            match scope["path"].split("/"):
                case ["", "v2", "models", model, "infer"]:
                    return await self.infer(scope, receive, send, model, "")
                case ["", "v2", "models", model, "versions", version, "infer"] if version:
                    return await self.infer(scope, receive, send, model, version)
        await super().__call__(scope, receive, send)


class _Infer:
    """The route of inference, as plain ASGI."""

    def __init__(self, served: Hosted, options: ServerOptions, auth: Auth | None, regions: Regions | None) -> None:
        self._served = served
        self._regions = regions
        self._max_bytes = options.max_request_bytes
        self._decoder = oip_json.Decoder(max_bytes=options.max_request_bytes, shared=regions is not None)
        self._encoder = oip_json.Encoder()
        self._auth = auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send, model: str, version: str) -> None:
        received_ns = time.monotonic_ns()
        headers = dict(scope["headers"])
        connection: LimitedProtocol | None = scope["extensions"].get(CONNECTION) if "extensions" in scope else None
        try:
            if self._auth is not None:
                self._auth.check(model, _text(headers.get(b"authorization")))
            info = self._served.info(model, version)
            text = headers.get(b"inference-header-content-length")
            size = None if text is None else _header_size(text)
            body: bytes | memoryview
            if connection is not None and connection.large:
                body = await self._large(connection, headers, model, version, lead=size or 0)
            else:
                body = await http_body.read(receive, headers, max_bytes=self._max_bytes)
            try:
                request, binary = self._decoder.read(body, size, info, version=version, received_ns=received_ns)
            except ServingError:
                describe.count_refused(self._served, info, received_ns)
                raise
            if connection is not None:
                connection.on_left = _cancel_of_this()
            if request.shared is not None and self._regions is not None:
                memory_routes.refuse_pages(headers)
                response = await self._regions.infer(self._served, request, info)
            else:
                response = await self._served.infer(request)
            if oip_json.is_long(response, binary):
                answer, header_size = await asyncio.to_thread(self._encoder.write, response, binary)
            else:
                answer, header_size = self._encoder.write(response, binary)
        except asyncio.CancelledError:
            if connection is None or not connection.gone:
                raise
            return  # nobody is there to be answered
        except Exception as error:  # noqa: BLE001 - whatever it is, the client is answered; _explained logs it
            await _send_error(send, error)
            return
        head = [(b"content-type", _JSON if header_size is None else b"application/octet-stream")]
        if header_size is not None:
            head.append((b"inference-header-content-length", b"%d" % header_size))
        if b"accept-encoding" in headers:
            answer, encoding = await http_body.compressed(answer, headers[b"accept-encoding"])
            if encoding is not None:
                head += ((b"content-encoding", encoding), (b"vary", b"accept-encoding"))
        head.append((b"content-length", b"%d" % len(answer)))
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": answer})

    async def _large(
        self, connection: LimitedProtocol, headers: Mapping[bytes, bytes], model: str, version: str, *, lead: int
    ) -> bytes | memoryview:
        """Reads a large body where it may come in; else its refusal is held back for a moment.

        Clients that send what was refused again at once would keep the processor from those that were let in: a
        hundred of them with 600 kB each left a model a fifth of its throughput. One that waits costs nothing.
        """
        try:
            with self._served.expecting(model, version):
                return await http_body.read_large(connection, headers, lead=lead, max_bytes=self._max_bytes)
        except Overloaded:
            connection.on_left = _cancel_of_this()
            await asyncio.sleep(REFUSAL_SECONDS)
            raise


def make_app(
    served: Hosted,
    *,
    options: ServerOptions,
    auth: Auth | None = None,
    tasks: Tasks | None = None,
    regions: Regions | None = None,
    everywhere: describe.Everywhere | None = None,
) -> fastapi.FastAPI:
    """The application that answers HTTP.

    Args:
        served: the models.
        options: limits on sizes; the rest of them is not looked at.
        auth: asked for every route that names a model or lists them; None lets everyone in.
        tasks: what is asked for with mode=async; None keeps them to this application.
        regions: of shared memory; None serves none.
        everywhere: of several workers, see ``describe.statistics``.
    """
    app = _App(
        title=describe.NAME,
        version=describe.server()["version"],
        summary="Open Inference Protocol v2, and predictions for people without a client.",
        responses={"4XX": {"model": Problem}, "5XX": {"model": Problem}},
        redirect_slashes=False,  # a path that is almost right is wrong
        docs_url=None,  # page_routes has /docs: FastAPI's own page loads its script from somebody else
        redoc_url=None,
    )
    app.infer = _Infer(served, options, auth, regions)
    app.include_router(_health(served, shared_memory=regions is not None))
    app.include_router(_models(served, options, auth, everywhere))
    app.include_router(predict.router(served, options=options, auth=auth, tasks=tasks or Tasks()))
    app.include_router(memory_routes.router(regions, max_bytes=options.max_request_bytes, auth=auth))
    app.add_exception_handler(ServingError, _answer_error)
    app.add_exception_handler(Exception, _answer_error)
    app.add_exception_handler(fastapi.exceptions.RequestValidationError, _answer_error)
    app.add_exception_handler(starlette.exceptions.HTTPException, _answer_error)
    return app


def _health(served: Hosted, *, shared_memory: bool) -> fastapi.APIRouter:
    router = fastapi.APIRouter(tags=["Health"])

    @router.get("/v2/health/live", summary="Whether the server runs")
    async def live() -> Response:
        return Response()

    @router.get("/v2/health/ready", summary="Whether anything can be served")
    async def ready() -> Response:
        return Response(status_code=200 if served.is_ready() else 503)

    @router.get("/v2", summary="Name, version and extensions of the server")
    async def metadata() -> Response:
        return _json(describe.server(shared_memory=shared_memory))

    return router


def _models(
    served: Hosted, options: ServerOptions, auth: Auth | None, everywhere: describe.Everywhere | None
) -> fastapi.APIRouter:
    def allowed(request: fastapi.Request) -> None:
        if auth is not None:
            auth.check(request.path_params.get("model"), request.headers.get("authorization"))

    cached = options.result_cache.max_bytes > 0
    router = fastapi.APIRouter(tags=["Models"], dependencies=[fastapi.Depends(allowed)])

    # Before the routes of one model: a model called "stats" has its own under its versions.
    @router.get("/v2/models/stats", summary="Counts and times of all models")
    async def all_statistics() -> Response:
        return _json({"model_stats": await describe.statistics(served, everywhere=everywhere)})

    @router.post(
        "/v2/repository/index", summary="All versions of all models, with their state", openapi_extra=_INDEX_BODY
    )
    async def index(request: fastapi.Request) -> Response:
        # Read here and not by FastAPI, which would ask for a Content-Type that Triton's clients do not send.
        headers = dict(request.scope["headers"])
        body = await http_body.read(request.receive, headers, max_bytes=options.max_request_bytes)
        wanted = oip_json.load_json(body) if body.strip() else {}
        if not isinstance(wanted, dict) or type(wanted.get("ready", False)) is not bool:
            raise InvalidRequest("the body is no object with ready", hint='send {"ready": true}, or nothing')
        return _json(describe.index(served, ready=wanted.get("ready", False)))

    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        said = _VERSION_PARAMETER if "{version}" in path else {}

        @router.get(path, summary="Inputs, outputs and versions of a model", openapi_extra=said)
        async def metadata(model: str, version: _Version) -> Response:
            return _json(describe.model(served, model, version))

        @router.get(path + "/ready", summary="Whether a model can answer", openapi_extra=said)
        async def ready(model: str, version: _Version) -> Response:
            return Response(status_code=200 if served.is_ready(model, version) else 503)

        @router.get(path + "/config", summary="How a model is served, as Triton has it", openapi_extra=said)
        async def config(model: str, version: _Version) -> Response:
            info = served.info(model, version)
            return _json(model_config.as_json(info, served.model_options(model), cached=cached))

        @router.get(path + "/stats", summary="Counts and times of a model", openapi_extra=said)
        async def statistics(model: str, version: _Version) -> Response:
            counts = await describe.statistics(served, model, version, everywhere=everywhere)
            return _json({"model_stats": counts})

        # Only for the page at /docs: _App answers before the router is asked.
        @router.post(path + "/infer", summary="Runs a model", openapi_extra=_INFER_DOCUMENTATION | said)
        async def infer(model: str, version: _Version) -> Response:
            raise NotFound(f"no model is called {model!r}")

    return router


def _cancel_of_this() -> Callable[[], object]:
    task = asyncio.current_task()
    assert task is not None
    return task.cancel


def _header_size(value: bytes) -> int:
    # Nineteen digits are more than any body has; int() alone takes signs, spaces and underscores.
    if not value.isdigit() or len(value) > 19:
        raise InvalidRequest(f"Inference-Header-Content-Length is {_text(value)!r}", hint="it is a number of bytes")
    return int(value)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


def _json(values: Any) -> Response:
    return Response(oip_json.dump_json(values), media_type="application/json")


def _version(request: fastapi.Request) -> str:
    version: str = request.path_params.get("version", "")
    return version


#: Out of the path where it is there; an argument of the function would be one of the query where it is not.
_Version = Annotated[str, fastapi.Depends(_version)]


def _explained(error: Exception, asked: str = "this path") -> tuple[int, bytes, Mapping[str, str]]:
    """Status, body and headers that tell of an error. ``asked`` is method and path, for those that lead nowhere."""
    headers: dict[str, str] = {}
    if isinstance(error, ServingError):
        status, text = error.http, wire.message(error)
        if isinstance(error, Unauthenticated):
            headers["www-authenticate"] = "Bearer"
        elif status in (429, Unavailable.http):
            headers["retry-after"] = "1"
    elif isinstance(error, fastapi.exceptions.RequestValidationError):
        first = error.errors()[0]
        status, text = 400, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    elif isinstance(error, starlette.exceptions.HTTPException):
        status, text = error.status_code, str(error.detail)
        headers.update(error.headers or {})
        if status in (404, 405):
            admin = " /v2/repository/models/" in asked
            hint = "models are loaded and unloaded on the admin port" if admin else "/docs has what can be asked"
            text = f"nothing is at {asked}; {hint}"
    else:
        _log.error("a request failed in the server", exc_info=error)
        status, text = 500, "the server failed; its log says how"
    return status, oip_json.dump_json({"error": text}), headers


async def _answer_error(request: fastapi.Request, error: Exception) -> Response:
    status, body, headers = _explained(error, f"{request.method} {request.url.path[:200]}")
    return Response(body, status, dict(headers), "application/json")


async def _send_error(send: Send, error: Exception) -> None:
    status, body, headers = _explained(error)
    head = [(b"content-type", _JSON), (b"content-length", b"%d" % len(body))]
    head += [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


_VERSION_PARAMETER: dict[str, Any] = {
    "parameters": [{"name": "version", "in": "path", "required": True, "schema": {"type": "string"}}]
}
_INFER_DOCUMENTATION: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": (
            "The inputs, as JSON or, with `Inference-Header-Content-Length`, as JSON and raw little-endian data after "
            "it: Triton's binary tensor data extension."
        ),
        "content": {
            "application/json": {
                "schema": {"type": "object"},
                "example": {
                    "id": "1",
                    "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1.0, 2.0, 3.0, 4.0]}],
                    "outputs": [{"name": "y"}],
                },
            }
        },
    }
}
_INDEX_BODY: dict[str, Any] = {
    "requestBody": {"content": {"application/json": {"schema": {"type": "object"}, "example": {"ready": True}}}}
}
