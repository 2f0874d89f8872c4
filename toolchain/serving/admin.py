"""The admin port, on the loopback address and with tokens of its own: load, unload, switches of versions, drain.

``POST /v2/repository/models/<name>/load`` and ``…/unload`` are Triton's model repository extension; they stand here and
not on the port that everybody has. With several workers the supervisor hands each request on to all of them.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from runtimes import Error
from toolchain.serving import wire
from toolchain.serving.auth import Auth
from toolchain.serving.base import NotFound, ServingError
from toolchain.serving.limits import App, Message, Receive, Send

if TYPE_CHECKING:
    from toolchain.serving.models import Models

#: (method, path) → status, content type, body.
Answer = tuple[int, str, bytes]
Handler = Callable[[str, str], Awaitable[Answer]]


def as_json(value: Any, status: int = 200) -> Answer:
    """An answer in JSON."""
    return status, "application/json", json.dumps(value).encode()


def application(handler: Handler, *, auth: Auth | None = None) -> App:
    """ASGI around a function of method and path. Errors are told as the protocol does, ``{"error": ...}``."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            if auth is not None:
                header = dict(scope["headers"]).get(b"authorization")
                auth.check(None, None if header is None else header.decode("latin-1"))
            status, kind, body = await handler(scope["method"], scope["path"])
        except ServingError as error:
            status, kind, body = as_json({"error": wire.message(error)}, error.http)
        except Error as error:
            status, kind, body = as_json({"error": " ".join(str(error).split())}, 500)
        headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def handler(models: Models, drain: Callable[[], None]) -> Handler:
    """What the admin port does in this process.

    Args:
        models: those that are served.
        drain: begins a shutdown.
    """

    async def handle(method: str, path: str) -> Answer:
        match method, path.strip("/").split("/"):
            case "POST", ["v2", "repository", "models", name, "load"]:
                await models.load(name)
            case "POST", ["v2", "repository", "models", name, "unload"]:
                await models.unload(name)
            case "POST", ["v2", "repository", "models", name, "rollback"]:
                return as_json({"version": await models.rollback(name)})
            case (("GET" | "POST"), ["v2", "repository", "index"]):
                return as_json(models.index())
            case "GET", ["switches"]:
                return as_json(models.switches)
            case "GET", ["resources"]:
                return as_json(models.resources())
            case "POST", ["drain"]:
                drain()
            case _:
                raise NotFound(
                    f"nothing is at {method} {path[:200]}",
                    hint="POST /v2/repository/models/NAME/load, …/unload, …/rollback, POST /drain, GET /switches, "
                    "GET /resources, GET /v2/repository/index",
                )
        return as_json({})

    return handle
