"""The page at ``/``, and the one at ``/docs``, out of ``page/``; and ``/stats``, which the first looks at.

``/docs`` shows ``/openapi.json``. It is ours because FastAPI's own loads its script from a network that a server may
not have, and would run it with the token that a reader types in. The pages may load nothing from anywhere else, run no
other script, and stand in no frame: their Content-Security-Policy says so, and tests hold that they work under it.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import fastapi
from fastapi import Response

from toolchain.serving.auth import Auth

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
}


def add_to(app: fastapi.FastAPI, numbers: Callable[[], Awaitable[dict[str, Any]]], *, auth: Auth | None) -> None:
    """Adds the pages to an application.

    Args:
        app: what answers HTTP.
        numbers: what ``/stats`` tells.
        auth: asked for ``/stats``; the pages themselves hold nothing and are for everybody.
    """
    folder = Path(__file__).parent / "page"
    for path, (name, kind) in _FILES.items():
        app.add_api_route(path, _file((folder / name).read_bytes(), kind), include_in_schema=False, methods=["GET"])

    @app.get("/stats", summary="What the page shows: counts and states of all models", tags=["For people"])
    async def stats(request: fastapi.Request) -> Response:
        if auth is not None:
            auth.check(None, request.headers.get("authorization"))
        return Response(json.dumps(await numbers()), media_type="application/json")


def _file(content: bytes, kind: str) -> Callable[[], Response]:
    def answer() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return answer
