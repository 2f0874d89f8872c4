"""The HTTP routes of the shared memory extension: which regions are registered, one more, one or all of them less."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import fastapi
from fastapi import Response

from toolchain.serving import http_body, oip_json
from toolchain.serving.base import InvalidRequest, PermissionDenied, Unsupported
from toolchain.serving.shared_memory import Regions  # FastAPI reads the annotations

if TYPE_CHECKING:
    from toolchain.serving.auth import Auth

OFF = "shared memory is not served here; toolchain serve --shared-memory does"
NO_CUDA = "CUDA shared memory is not served"
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"type": "object"},
                "example": {"key": "/input", "offset": 0, "byte_size": 602112},
            }
        },
    }
}


def router(regions: Regions | None, *, max_bytes: int, auth: Auth | None) -> fastapi.APIRouter:
    """The routes.

    Args:
        regions: None where none are served: all routes say so.
        max_bytes: of a body.
        auth: asked for every route: any token will do.
    """

    async def served(request: fastapi.Request) -> Regions:
        if auth is not None:
            auth.check(None, request.headers.get("authorization"))
        if regions is None:
            raise Unsupported(OFF)
        if request.method == "POST":
            refuse_pages(dict(request.scope["headers"]))
        if request.path_params.get("name") == "":  # which is not to mean all of them
            raise InvalidRequest("the region has no name", hint=f"{base}/region/NAME/…")
        return regions

    made = fastapi.APIRouter(tags=["Shared memory"])
    base = "/v2/systemsharedmemory"
    one = base + "/region/{name:path}"
    needed = fastapi.Depends(served)

    @made.get(base + "/status", summary="All regions that are registered")
    async def status_of_all(known: Regions = needed) -> Response:
        return _json([region.as_json() for region in await asyncio.to_thread(known.status)])

    @made.get(one + "/status", summary="A region that is registered")
    async def status(name: str, known: Regions = needed) -> Response:
        return _json([region.as_json() for region in await asyncio.to_thread(known.status, name)])

    @made.post(one + "/register", summary="Makes a part of shared memory known as a region", openapi_extra=_BODY)
    async def register(name: str, request: fastapi.Request, known: Regions = needed) -> Response:
        # Read here and not by FastAPI, which would ask for a Content-Type that Triton's clients do not send.
        headers = dict(request.scope["headers"])
        said: Any = oip_json.load_json(await http_body.read(request.receive, headers, max_bytes=max_bytes))
        if not isinstance(said, dict):
            raise InvalidRequest("the body is no object", hint='send {"key": "/NAME", "offset": 0, "byte_size": 4}')
        values: dict[str, Any] = {"key": None, "offset": 0, "byte_size": None, **said}
        await asyncio.to_thread(
            known.register, name, values["key"], offset=values["offset"], byte_size=values["byte_size"]
        )
        return _json({})

    @made.post(base + "/unregister", summary="Forgets all regions")
    async def unregister_all(known: Regions = needed) -> Response:
        await asyncio.to_thread(known.unregister)
        return _json({})

    @made.post(one + "/unregister", summary="Forgets a region")
    async def unregister(name: str, known: Regions = needed) -> Response:
        await asyncio.to_thread(known.unregister, name)
        return _json({})

    # There are none, so nothing is left to do: perf_analyzer asks for it before it registers other memory.
    @made.post("/v2/cudasharedmemory/unregister", include_in_schema=False, dependencies=[needed])
    async def unregister_none() -> Response:
        return _json({})

    @made.api_route("/v2/cudasharedmemory/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
    async def cuda(rest: str) -> Response:
        raise Unsupported(NO_CUDA)

    return made


def refuse_pages(headers: Mapping[bytes, bytes]) -> None:
    """Raises PermissionDenied for what comes from a page in a browser.

    Any page that somebody looks at on this machine may send a POST here, and needs no answer to it.
    """
    if b"origin" in headers:
        raise PermissionDenied("a page in a browser has no shared memory", hint="send it without the header Origin")


def _json(values: Any) -> Response:
    return Response(oip_json.dump_json(values), media_type="application/json")
