"""Work that is asked for now and fetched later: a bounded number of it, of bounded size, for a bounded time."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Coroutine
from typing import Literal

from toolchain.serving import wire
from toolchain.serving.base import ModelFailed, NotFound, Overloaded, ServingError


@dataclasses.dataclass(slots=True)
class Task:
    """One piece of work.

    Attributes:
        model: whose it is.
        state: ``pending``, ``done`` or ``failed``.
        result: JSON text, when it is done.
        error: what went wrong, when it failed; ``status`` is the HTTP status that it would have had.
        size: bytes that it holds in memory: of the request while it is pending, then of the result.
        expires_ns: ``time.monotonic_ns()`` when it is forgotten; counted anew when it ends.
    """

    model: str
    state: Literal["pending", "done", "failed"]
    size: int
    expires_ns: int
    result: bytes = b""
    error: str = ""
    status: int = 200


class Tasks:
    """All of it. Used on the event loop's thread.

    Args:
        limit: tasks at most, whether they are pending or wait to be fetched.
        max_bytes: of their requests and results.
        seconds: for how long a result is kept, and how long work may take at most.
    """

    def __init__(self, *, limit: int = 256, max_bytes: int = 256 << 20, seconds: float = 300.0) -> None:
        self._limit = limit
        self._max_bytes = max_bytes
        self._ns = int(seconds * 1e9)
        self._tasks: dict[str, Task] = {}
        self._bytes = 0
        self._running: dict[str, asyncio.Task[None]] = {}

    def start(self, model: str, work: Coroutine[object, object, bytes], *, size: int) -> str:
        """Starts work and returns the name to ask for it by, which cannot be guessed.

        Args:
            model: whose work it is.
            work: gives JSON text; a ServingError that it raises is kept.
            size: bytes of the request that it holds on to.

        Raises:
            Overloaded: there are too many tasks, or they hold too much.
        """
        self._forget_old()
        if len(self._tasks) >= self._limit or self._bytes + size > self._max_bytes:
            work.close()
            raise Overloaded(
                f"{len(self._tasks)} tasks of {self._bytes} bytes are kept, and there is no room for another",
                hint=f"results are kept for {self._ns / 1e9:g} s: ask again later, or without mode=async",
            )
        name = secrets.token_urlsafe(16)
        task = self._tasks[name] = Task(model, "pending", size, time.monotonic_ns() + self._ns)
        self._bytes += size
        self._running[name] = asyncio.get_running_loop().create_task(self._run(name, task, work))
        return name

    def get(self, name: str) -> Task:
        """The state of a task. Raises NotFound where there is none of that name, or it is too old."""
        self._forget_old()
        task = self._tasks.get(name)
        if task is None:
            raise NotFound("there is no such task", hint=f"results are kept for {self._ns / 1e9:g} s")
        return task

    async def _run(self, name: str, task: Task, work: Coroutine[object, object, bytes]) -> None:
        try:
            result = await work
        except ServingError as error:
            task.state, task.error, task.status = "failed", wire.message(error), error.http
            size = len(task.error)
        except Exception as error:  # noqa: BLE001 - nobody awaits it: told by its state, and to the loop's handler
            task.state, task.error, task.status = "failed", "the server failed", ModelFailed.http
            size = len(task.error)
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"task {name} of model {task.model} failed", "exception": error}
            )
        else:
            size = len(result)
            if self._bytes - task.size + size > self._max_bytes:
                task.state, task.status = "failed", Overloaded.http
                task.error = "the result is larger than the room that is left for results"
                size = len(task.error)
            else:
                task.state, task.result = "done", result
        finally:
            self._running.pop(name, None)
        self._bytes += size - task.size
        task.size = size
        task.expires_ns = time.monotonic_ns() + self._ns

    def _forget_old(self) -> None:
        now = time.monotonic_ns()
        for name in [name for name, task in self._tasks.items() if task.expires_ns <= now]:
            self._bytes -= self._tasks.pop(name).size
            running = self._running.pop(name, None)
            if running is not None:
                running.cancel()
