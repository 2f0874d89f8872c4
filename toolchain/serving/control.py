"""The ways between supervisor and workers: HTTP on Unix sockets that only this user can open.

A worker answers ``/metrics``, ``/counts``, ``/stats``, ``/alive``, ``/result/<task>`` and what the admin port has. The
supervisor asks all and tells the sum, and asks each whether it is alive; a worker asks another for a task, and the
supervisor for the numbers of all.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

from toolchain.serving.base import NotFound, Unavailable


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Which of several workers this process is, and the way to the others.

    Attributes:
        number: from 1.
        folder: of the sockets.
    """

    number: int
    folder: Path

    @property
    def socket(self) -> Path:
        """Its own."""
        return worker_socket(self.folder, self.number)

    async def numbers(self) -> dict[str, Any]:
        """Those of all workers together, as ``stats.merge`` has them. Raises Unavailable."""
        answer: dict[str, Any] = await self._supervisor("/stats")
        return answer

    async def counts(self) -> list[dict[str, Any]]:
        """Those of all workers together, as ``describe.statistics`` has them. Raises Unavailable."""
        answer: list[dict[str, Any]] = await self._supervisor("/counts")
        return answer

    async def _supervisor(self, where: str) -> Any:
        try:
            status, body = await ask(supervisor_socket(self.folder), where)
        except OSError as error:
            raise Unavailable(f"the supervisor does not answer: {error}", hint="ask again in a moment") from error
        if status != 200:
            raise Unavailable("the supervisor has no numbers now", hint="ask again in a moment")
        return json.loads(body)

    async def task(self, number: int, name: str) -> tuple[str, bytes]:
        """A task of another worker, as ``Tasks.tell`` has it.

        Args:
            number: of the worker.
            name: of the task, checked to be one.

        Raises:
            NotFound: it has none of that name.
            Unavailable: it does not answer now.
        """
        socket = worker_socket(self.folder, number)
        if not socket.exists():
            raise NotFound("there is no such task", hint="a worker that died takes its tasks along")
        try:
            status, answer = await ask(socket, f"/result/{name}")
        except OSError:
            raise Unavailable("the worker that has the task does not answer", hint="ask again in a moment") from None
        if status == NotFound.http:
            raise NotFound("there is no such task", hint="results are kept for a while only")
        if status != 200:
            raise Unavailable("the worker that has the task cannot tell of it now", hint="ask again in a moment")
        model, _, body = answer.partition(b"\n")
        return json.loads(model), body


def worker_socket(folder: Path, number: int) -> Path:
    """Where a worker is asked."""
    return folder / f"worker-{number}.sock"


def supervisor_socket(folder: Path) -> Path:
    """Where the supervisor is asked."""
    return folder / "supervisor.sock"


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
