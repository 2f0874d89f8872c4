"""The way from the supervisor to a worker: HTTP on a Unix socket that only this user can open.

A worker answers ``/metrics``, ``/stats`` and what the admin port has; the supervisor asks all and tells the sum.
"""

from __future__ import annotations

import asyncio
from pathlib import Path


async def ask(socket: Path, path: str, *, method: str = "GET", timeout: float = 5.0) -> tuple[int, bytes]:
    """One request, on a connection of its own.

    Returns:
        Status and body.

    Raises:
        OSError: there is nobody, or they went while they answered; TimeoutError (an OSError) where they are too slow.
    """
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_unix_connection(str(socket))
        try:
            writer.write(
                f"{method} {path} HTTP/1.1\r\nHost: worker\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
            )
            answer = await _all(reader)
        finally:
            writer.close()
    head, separator, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if not separator or len(words) < 3 or not words[1].isdigit():
        raise ConnectionError("the worker went while it answered")
    return int(words[1]), body


async def _all(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while part := await reader.read(1 << 20):
        parts.append(part)
    return b"".join(parts)
