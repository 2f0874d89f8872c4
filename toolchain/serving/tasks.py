"""Work that is asked for now and fetched later: a bounded number of it, of bounded size, for a bounded time.

Of several workers, each has its own tasks, and their names begin with its number, ``2.Zk3…``: whichever worker is asked
for a result knows who has it, and asks there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import secrets
import time
from collections.abc import Coroutine
from typing import Literal

from toolchain.serving import wire
from toolchain.serving.base import ModelFailed, NotFound, Overloaded, ServingError
from toolchain.serving.control import Place

#: How long a shutdown waits for results to be fetched that nobody has fetched yet, seconds.
FETCH_SECONDS = 5.0
#: A number of a worker, and the rest of a name. What is asked of another worker goes into a line of HTTP.
_NAME = re.compile(r"(?:([1-9][0-9]{0,3})\.)?[A-Za-z0-9_-]{1,64}")


@dataclasses.dataclass(slots=True)
class Task:
    """One piece of work.

    Attributes:
        model: whose it is.
        state: ``pending``, ``done`` or ``failed``.
        result: JSON text, when it is done.
        error: what went wrong, when it failed; ``status`` is the HTTP status that it would have had.
        fetched: somebody saw how it ended.
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
    fetched: bool = False


class Tasks:
    """All of it. Used on the event loop's thread.

    Args:
        limit: tasks at most, whether they are pending or wait to be fetched.
        max_bytes: of their requests and results.
        seconds: for how long a result is kept, and how long work may take at most.
        place: of this worker among several; None: there is no other.
    """

    def __init__(
        self, *, limit: int = 256, max_bytes: int = 256 << 20, seconds: float = 300.0, place: Place | None = None
    ) -> None:
        self._place = place
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
        name = ("" if self._place is None else f"{self._place.number}.") + secrets.token_urlsafe(16)
        task = self._tasks[name] = Task(model, "pending", size, time.monotonic_ns() + self._ns)
        self._bytes += size
        self._running[name] = asyncio.get_running_loop().create_task(self._run(name, task, work))
        return name

    def get(self, name: str) -> Task:
        """The state of a task. Raises NotFound where there is none of that name, or it is too old."""
        self._forget_old()
        task = self._tasks.get(name)
        if task is None:
            raise self._unknown()
        return task

    def tell(self, name: str) -> tuple[str, bytes]:
        """Whose work a task of this process is, and its state as JSON. Raises NotFound."""
        task = self.get(name)
        if task.state == "pending":
            return task.model, b'{"task":"%s","state":"pending"}' % name.encode()
        task.fetched = True
        if task.state == "done":
            return task.model, b'{"task":"%s","state":"done","result":%s}' % (name.encode(), task.result)
        said = {"task": name, "state": "failed", "error": task.error, "status": task.status}
        return task.model, json.dumps(said).encode()

    async def find(self, name: str) -> tuple[str, bytes]:
        """As ``tell``, of whichever worker has the task.

        Raises:
            NotFound: nobody has it, or who had it has died.
            Unavailable: the worker that has it does not answer now.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise self._unknown()
        if self._place is None or match[1] is None or int(match[1]) == self._place.number:
            return self.tell(name)
        return await self._place.task(int(match[1]), name)

    async def drained(self, seconds: float) -> None:
        """Waits until nothing is pending, and for a few seconds until all results were fetched.

        Args:
            seconds: at most.
        """
        end = time.monotonic() + seconds
        if self._running:
            await asyncio.wait(self._running.values(), timeout=seconds)
        end = min(end, time.monotonic() + FETCH_SECONDS)
        while time.monotonic() < end and any(not task.fetched for task in self._tasks.values()):
            await asyncio.sleep(0.05)
            self._forget_old()

    def _unknown(self) -> NotFound:
        return NotFound("there is no such task", hint=f"results are kept for {self._ns / 1e9:g} s")

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
