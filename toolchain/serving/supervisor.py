"""``--workers N``: processes that share the ports, and the one that watches over them.

    supervisor ─ stdin (a line of JSON; its end is the end of the supervisor) → worker 1 … N
               ← stdout (a line when ready) ─
               ← Unix socket: is it alive, metrics, stats, admin ─

Each worker listens on the same ports (SO_REUSEPORT: the kernel spreads connections over them) and loads the models
itself; weights that are mapped are shared through the page cache. The supervisor holds the ports, so that they stay
ours while a worker is away; it serves the metrics of all workers as one page, and the admin port. A worker that dies
is started again, later and later if it goes on dying; workers that die as they begin, several times in a row, end the
server with their last words. One that lives and does not answer is asked to say where it is, and killed. Bounds of
memory and of requests in flight are divided among the workers.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import logging
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolchain import child
from toolchain.serving import admin, counts, metrics_page, own_folder, stats
from toolchain.serving.auth import Auth
from toolchain.serving.base import NotFound, Unavailable
from toolchain.serving.control import ask, supervisor_socket, worker_socket
from toolchain.serving.listening import CannotServe, HttpServer, bind
from toolchain.serving.logs import Logs
from toolchain.serving.options import ServerOptions
from toolchain.serving.server import Ports, check_options, signals, warn_about

_log = logging.getLogger("toolchain.serving")

#: Waits before a worker is started again, seconds: doubled each time, up to the last.
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
#: A worker that was ready for so long, seconds, is not one that dies as it begins.
SETTLED_SECONDS = 10.0
#: So many deaths at the beginning, of all workers together and with none that settled between, end the server.
EARLY_DEATHS = 5
#: How often the counts of workers are fetched, seconds: what a worker counted since dies with it.
_LOOK_SECONDS = 2.0
#: How long a worker may take to tell its counts, seconds; else those count that it told before. Whoever asked the
#: supervisor waits for longer.
_COUNT_SECONDS = 2.0
_LAST_WORDS = 20
#: How often each worker is asked whether it lives, how long it may take to say so, and how often it may not, seconds.
#: A machine that stood still misses one; a loop that is stuck misses all.
BEAT_SECONDS, BEAT_TIMEOUT, BEATS = 2.0, 5.0, 3
#: How long a worker that hangs has to write where.
_DUMP_SECONDS = 0.5


def divided(options: ServerOptions) -> ServerOptions:
    """The options of one worker: its part of the bounds, and no metrics or admin port of its own."""
    count = options.workers
    cache = options.result_cache
    return options.model_copy(
        update={
            "max_memory": None if options.max_memory is None else max(options.max_memory // count, 1),
            "max_in_flight": -(-options.max_in_flight // count),
            "max_in_flight_bytes": max(-(-options.max_in_flight_bytes // count), options.max_request_bytes),
            "result_cache": cache.model_copy(update={"max_bytes": cache.max_bytes // count}),
            "metrics_port": None,
            "admin_port": None,
        }
    )


class Worker:
    """One place for a worker: the process that fills it now, and what became of those before."""

    def __init__(self, number: int, folder: Path, start: dict[str, Any]) -> None:
        self.number = number
        self.socket = worker_socket(folder, number)
        self.ready = asyncio.Event()
        self.restarts = 0
        self.error: str | None = None
        self.words: collections.deque[str] = collections.deque(maxlen=_LAST_WORDS)
        self.index: list[dict[str, Any]] = []
        self._start = {**start, "number": number, "folder": str(folder)}
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None where there is none."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    async def run(self) -> int:
        """Starts a process and returns how it ended: an exit code, or minus the number of a signal."""
        self.ready.clear()
        self.words.clear()
        self.error = None
        self.socket.unlink(missing_ok=True)
        self._process = process = await asyncio.create_subprocess_exec(
            *child.command("toolchain.serving.worker"),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            # Ctrl-C in a terminal goes to all of a session: they would be told twice, which stops at once.
            start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(json.dumps(self._start).encode() + b"\n")
        try:
            await asyncio.gather(self._hear(process), self._forward(process))
            return await process.wait()
        finally:
            self.ready.clear()
            if process.returncode is None:
                process.kill()
                await process.wait()

    def tell(self, number: int) -> None:
        """Sends a signal, where there is a process."""
        if self.pid is not None and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def watch(self) -> None:
        """Asks the process now and then whether it lives, and kills one that hangs: it is replaced then."""
        missed, pid = 0, None
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            if self.pid != pid:
                missed, pid = 0, self.pid
            if pid is None or not self.socket.exists():
                continue
            try:
                await ask(self.socket, "/alive", timeout=BEAT_TIMEOUT)
            except TimeoutError:
                missed += 1
            except OSError:
                missed = 0  # nobody listens: it begins, or it ends
            else:
                missed = 0
            if missed >= BEATS and self.pid == pid:
                _log.error("worker %d has not answered %d times: it hangs, here, and is killed", self.number, missed)
                self.tell(signal.SIGUSR1)
                await asyncio.sleep(_DUMP_SECONDS)
                self.tell(signal.SIGKILL)

    async def _hear(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            told = json.loads(line)
            if "error" in told:
                self.error = told["error"]
            else:
                self.index = told["index"]
                self.ready.set()

    async def _forward(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while line := await process.stderr.read(1 << 16):
            text = line.decode(errors="replace")
            self.words.extend(text.splitlines())
            sys.stderr.write(text)
            sys.stderr.flush()


class Supervisor:
    """The workers, and what they have together.

    Args:
        path: what is served.
        options: of the whole server, its ports filled in.
        folder: for sockets; only this user may open it.
    """

    def __init__(self, path: Path, options: ServerOptions, folder: Path) -> None:
        start = {
            "path": str(path.absolute()),
            "options": divided(options).model_dump(mode="json"),
        }
        self.workers = [Worker(number, folder, start) for number in range(1, options.workers + 1)]
        self.stop = asyncio.Event()
        self.failed: CannotServe | None = None
        self._early = 0
        self._ever_ready = False
        self._combined = metrics_page.Combined()
        self._counted = counts.Combined()
        #: by number of the worker, what it answered last
        self._pages: dict[int, bytes] = {}
        self._counts: dict[int, bytes] = {}

    async def keep(self, worker: Worker) -> None:
        """Keeps one place filled until the server stops."""
        wait = FIRST_WAIT
        while not self.stop.is_set():
            running = asyncio.create_task(worker.run())
            ready_at = None
            becoming = asyncio.create_task(worker.ready.wait())
            await asyncio.wait((running, becoming), return_when=asyncio.FIRST_COMPLETED)
            if becoming.done():
                ready_at = time.monotonic()
                self._ever_ready = True
            becoming.cancel()
            code = await running
            if (page := self._pages.pop(worker.number, None)) is not None:
                self._combined.retire(page.decode())
            if (counted := self._counts.pop(worker.number, None)) is not None:
                self._counted.retire(json.loads(counted))
            if self.stop.is_set():
                return
            settled = ready_at is not None and time.monotonic() - ready_at >= SETTLED_SECONDS
            if settled:
                self._early, wait = 0, FIRST_WAIT
            else:
                self._early += 1
            if worker.error is not None and not self._ever_ready:
                self._give_up(CannotServe(worker.error))
                return
            if self._early >= EARLY_DEATHS:
                words = "\n".join(worker.words) or "it said nothing"
                self._give_up(
                    CannotServe(
                        f"{self._early} workers died as they began; the last one {_ended(code)} and said:\n{words}",
                        hint="run it with --workers 1 to look closer",
                    )
                )
                return
            worker.restarts += 1
            _log.error("worker %d %s; it is started again in %.1f s", worker.number, _ended(code), wait)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _give_up(self, error: CannotServe) -> None:
        self.failed = self.failed or error
        self.stop.set()

    async def operate(self, method: str, where: str) -> admin.Answer:
        """What all workers are asked together: metrics, stats, and the admin port."""
        if (method, where) == ("POST", "/drain"):
            self.stop.set()
            return admin.as_json({})
        if where == "/metrics":
            return 200, metrics_page.CONTENT_TYPE, (await self.metrics()).encode()
        answers = await self._ask_all(where, method)
        if not answers:
            raise Unavailable("no worker answers now")
        if where == "/stats":
            return admin.as_json(stats.merge([json.loads(body) for _, _, body in answers]))
        failed = [answer for answer in answers if answer[1] != 200]
        _, status, body = (failed or answers)[0]
        return status, "application/json", body

    async def measured(self, method: str, where: str) -> admin.Answer:
        """What the metrics port has."""
        if where != "/metrics":
            raise NotFound("GET /metrics is all there is")
        return await self.operate(method, where)

    async def numbers(self, method: str, where: str) -> admin.Answer:
        """What workers ask of the supervisor."""
        if where == "/counts":
            parts = await self._latest(where, self._counts)
            return admin.as_json(self._counted.of([json.loads(part) for part in parts]))
        if where != "/stats":
            raise NotFound("GET /stats and GET /counts are all there is")
        return await self.operate(method, where)

    async def metrics(self) -> str:
        """The page of all workers."""
        alive = [page.decode() for page in await self._latest("/metrics", self._pages)]
        restarts = sum(worker.restarts for worker in self.workers)
        ready = sum(worker.ready.is_set() for worker in self.workers)
        return self._combined.page(alive) + (
            "# HELP toolchain_workers Workers that answer\n# TYPE toolchain_workers gauge\n"
            f"toolchain_workers {ready}\n"
            "# HELP toolchain_worker_restarts Workers that died and were started again\n"
            f"# TYPE toolchain_worker_restarts counter\ntoolchain_worker_restarts {restarts}\n"
        )

    async def look(self) -> None:
        """Fetches the counts of all workers now and then."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await asyncio.gather(self._latest("/metrics", self._pages), self._latest("/counts", self._counts))

    async def _latest(self, where: str, known: dict[int, bytes]) -> list[bytes]:
        """The counts of all workers, now or, of one that does not answer, as they were; kept in ``known``."""

        async def one(worker: Worker) -> None:
            pid = worker.pid
            try:
                status, body = await ask(worker.socket, where, timeout=_COUNT_SECONDS)
            except OSError as error:
                _log.warning("worker %d does not answer: %s", worker.number, error)
                return
            # What a process said that has ended since is in the sum already.
            if status == 200 and pid is not None and worker.pid == pid:
                known[worker.number] = body

        await asyncio.gather(*(one(worker) for worker in self.workers if worker.ready.is_set()))
        return [known[worker.number] for worker in self.workers if worker.number in known]

    async def _ask_all(self, where: str, method: str) -> list[tuple[int, int, bytes]]:
        """Number, status and body of all that answer."""

        async def one(worker: Worker) -> tuple[int, int, bytes] | None:
            try:
                # to load a model takes what it takes
                status, body = await ask(worker.socket, where, method=method, timeout=5 if method == "GET" else 600)
            except OSError as error:
                _log.warning("worker %d does not answer: %s", worker.number, error)
                return None
            return worker.number, status, body

        asked = [one(worker) for worker in self.workers if worker.ready.is_set()]
        return [answer for answer in await asyncio.gather(*asked) if answer is not None]


def _ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def _reserve(options: ServerOptions, stack: contextlib.ExitStack) -> ServerOptions:
    """Binds the ports that workers share, and fills in those that were left open. They do not listen: no connection
    comes to the supervisor."""
    if not hasattr(socket, "SO_REUSEPORT"):
        raise CannotServe("this system lets no processes share a port", where="--workers", hint="--workers 1")
    update: dict[str, int] = {}
    for name, what in (("http_port", "HTTP"), ("grpc_port", "gRPC")):
        port = getattr(options, name)
        if port is None:
            continue
        bind(options.host, port, what=what).close()  # is it free? Another server that shares it would not show below.
        held = bind(options.host, port, what=what, reuse=True)
        stack.callback(held.close)
        update[name] = held.getsockname()[1]
    return options.model_copy(update=update)


async def supervise(path: Path, options: ServerOptions, *, ready: Callable[[Ports], None]) -> None:
    """Serves with several workers until a signal comes, and returns when all that was in flight is answered.

    Args:
        path: an artifact, an ONNX file, or a repository.
        options: how it runs.
        ready: called once, when all workers are.

    Raises:
        CannotServe: a port is busy, or workers do not start, with what they said.
        Error: see ``server.serve``.
    """
    check_options(options)
    logs = Logs(options.log_format)
    logs.start()
    with contextlib.ExitStack() as stack:
        stack.callback(logs.stop)
        options = _reserve(options, stack)
        admin_auth = Auth(None if options.admin_tokens is None else Path(options.admin_tokens))
        warn_about(options)
        folder = stack.enter_context(own_folder.made())
        watcher = Supervisor(path, options, folder)
        https: list[HttpServer] = []
        found: dict[str, int] = {}
        for what, port, host, app in (
            ("metrics", options.metrics_port, options.host, admin.application(watcher.measured)),
            ("admin", options.admin_port, "127.0.0.1", admin.application(watcher.operate, auth=admin_auth)),
        ):
            if port is not None:
                bound = bind(host, port, what=what)
                stack.callback(bound.close)
                found[what] = bound.getsockname()[1]
                https.append(HttpServer(app, options, bound=bound))
        https.append(HttpServer(admin.application(watcher.numbers), options, unix=supervisor_socket(folder)))
        for each in https:
            await each.start()

        def kill() -> None:
            for worker in watcher.workers:
                worker.tell(signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)

        with signals(watcher.stop, kill):
            keeping = [asyncio.create_task(watcher.keep(worker)) for worker in watcher.workers]
            looking = [asyncio.create_task(worker.watch()) for worker in watcher.workers]
            looking.append(asyncio.create_task(watcher.look()))
            telling = asyncio.create_task(_tell(watcher, options, found, ready))
            await watcher.stop.wait()
            for task in looking:
                task.cancel()
            telling.cancel()
            for worker in watcher.workers:
                worker.tell(signal.SIGTERM)
            # they keep to drain_seconds themselves; beyond that something is wrong with them
            _, stuck = await asyncio.wait(keeping, timeout=options.drain_seconds + 10)
            if stuck:
                _log.error("%d workers did not end in time, and are ended", len(stuck))
                kill()
                await asyncio.wait(stuck, timeout=5)
        for each in https:
            await each.stop(1)
        for task in keeping:
            if task.done():
                task.result()
        if watcher.failed is not None:
            raise watcher.failed


async def _tell(
    watcher: Supervisor, options: ServerOptions, found: dict[str, int], ready: Callable[[Ports], None]
) -> None:
    for worker in watcher.workers:
        await worker.ready.wait()
    ports = Ports(
        options.host, options.http_port, options.grpc_port, found.get("metrics"), found.get("admin"),
        options.tls_certificate is not None, tuple(watcher.workers[0].index),
    )  # fmt: skip
    ready(ports)
