"""Bodies of HTTP: read whole within a limit, as they were before they were compressed, and compressed where asked.

Compression is zlib's own deflate and gzip (RFC 9110, 8.4.1), which is what Triton's clients speak.
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.types import Receive

from toolchain.serving.base import InvalidRequest, TooLarge

if TYPE_CHECKING:
    from toolchain.serving.http_protocol import LimitedProtocol

#: Smaller answers are not worth compressing.
COMPRESSED_FROM = 1024


async def read(receive: Receive, headers: Mapping[bytes, bytes], *, max_bytes: int) -> bytes:
    """The whole body of a request, decompressed (in a thread).

    Args:
        receive: of ASGI.
        headers: of the request.
        max_bytes: that are taken.

    Raises:
        TooLarge: as soon as it is beyond ``max_bytes``, before or after decompression.
        InvalidRequest: the client left, or the body is not of its Content-Encoding.
    """
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        body: bytes = message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    else:
        parts: list[bytes] = []
        size = 0
        while message["type"] == "http.request":
            part = message.get("body", b"")
            size += len(part)
            if size > max_bytes:
                raise _too_large(max_bytes)
            parts.append(part)
            if not message.get("more_body"):
                break
            message = await receive()
        else:
            raise InvalidRequest("the client left before its request was whole")
        body = b"".join(parts)
    encoding = _encoding(headers)
    return body if encoding is None else await asyncio.to_thread(decompressed, body, encoding, max_bytes=max_bytes)


async def read_large(
    connection: LimitedProtocol, headers: Mapping[bytes, bytes], *, lead: int, max_bytes: int
) -> bytes | memoryview:
    """As ``read``, of a body that waits on its connection (``LimitedProtocol.large``).

    Args:
        connection: it waits there.
        headers: of the request.
        lead: the byte that is to be aligned, if the body is not compressed.
        max_bytes: that are taken.

    Raises:
        TooLarge, InvalidRequest: as ``read``.
    """
    if connection.large > max_bytes:
        raise _too_large(max_bytes)
    body = await connection.whole(lead=lead)
    encoding = _encoding(headers)
    return body if encoding is None else await asyncio.to_thread(decompressed, body, encoding, max_bytes=max_bytes)


def _encoding(headers: Mapping[bytes, bytes]) -> bytes | None:
    encoding = headers.get(b"content-encoding", b"").strip().lower()
    return None if encoding in (b"", b"identity") else encoding


def decompressed(body: bytes | memoryview, encoding: bytes, *, max_bytes: int) -> bytes:
    """What ``body`` was before it was compressed; never more than ``max_bytes`` of it are made.

    Raises:
        InvalidRequest: another encoding than gzip and deflate, or not of it, or cut short.
        TooLarge: it was larger.
    """
    if encoding not in (b"gzip", b"deflate"):
        known = encoding[:40].decode("latin-1")
        raise InvalidRequest(f"Content-Encoding {known!r} is not known", hint="gzip, deflate or none")
    name = encoding.decode()
    bits = zlib.MAX_WBITS | 16 if encoding == b"gzip" else zlib.MAX_WBITS
    parts: list[bytes] = []
    size = 0
    while body or not parts:
        member = zlib.decompressobj(bits)
        try:
            part = member.decompress(body, max_bytes - size + 1)
        except zlib.error as error:
            raise InvalidRequest(f"the body is not {name}: {error}") from None
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        if not member.eof:
            raise InvalidRequest(f"the body is cut short: its {name} has no end")
        parts.append(part)
        # Several gzip members are one file (RFC 1952, 2.2); after deflate nothing may come.
        body = member.unused_data
        if body and encoding == b"deflate":
            raise InvalidRequest("the body goes on after the end of its deflate")
    return b"".join(parts)


async def compressed(answer: bytes, accept_encoding: bytes) -> tuple[bytes, bytes | None]:
    """An answer, compressed (in a thread) where the client asks for it and it is worth it, and how."""
    if len(answer) < COMPRESSED_FROM:
        return answer, None
    encoding = _accepted(accept_encoding)
    if encoding is None:
        return answer, None
    compress = gzip.compress if encoding == b"gzip" else zlib.compress
    return await asyncio.to_thread(compress, answer, 1), encoding


def _accepted(header: bytes) -> bytes | None:
    """The first of our encodings that the client takes (RFC 9110, 12.5.3)."""
    for item in header.lower().split(b","):
        name, _, weight = item.partition(b";")
        refused = weight.strip().startswith(b"q=0") and not weight.strip(b" q=0.")
        if name.strip() in (b"gzip", b"deflate") and not refused:
            return bytes(name.strip())
    return None


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the body is larger than {max_bytes} bytes")
