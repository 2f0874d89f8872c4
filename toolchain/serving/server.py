"""The server as one process: HTTP, gRPC, metrics and admin on one event loop, from the first port to the last answer.

    bind ports → answer "alive" → load models → ready → … → SIGTERM → not ready → refuse new work → answer the rest → 0

Ports are open before models are loaded, so that whoever watches sees a server that lives and is not ready. A shutdown
says "not ready" first and goes on answering for a moment, because load balancers look now and then; then new work is
refused (503, UNAVAILABLE), what is in flight has ``drain_seconds``, and a second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import uvicorn

from runtimes import Error
from toolchain.serving import (
    admin,
    describe,
    grpc_app,
    http_app,
    memory,
    metrics_page,
    own_folder,
    page_routes,
    repository,
    stats,
    tracing,
)
from toolchain.serving.auth import Auth
from toolchain.serving.calls import GrpcCalls, HttpCalls, Observed, Observer
from toolchain.serving.control import Place
from toolchain.serving.http_protocol import KEEP_ALIVE_SECONDS, protocol
from toolchain.serving.limits import App, Bytes, Limits
from toolchain.serving.logs import Logs, RequestLog
from toolchain.serving.models import Models
from toolchain.serving.options import ServerOptions
from toolchain.serving.shared_memory import MEMORY, Regions
from toolchain.serving.tasks import Tasks
from toolchain.serving.tls import Certificate

_log = logging.getLogger("toolchain.serving")

#: How long a server that shuts down goes on taking work after it said that it is not ready, seconds.
LAME_DUCK_SECONDS = 0.5
#: Files that a server has open beside HTTP connections: models that load, logs, sockets of its own, gRPC.
_OWN_FILES = 256
#: How long clients may keep connections where several workers share them: they stay with their worker, and one that is
#: started again gets none before some are renewed. Seconds.
CONNECTION_SECONDS = 30.0
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class CannotServe(Error):
    """The server cannot start: a port is busy, or options do not fit each other."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ports:
    """Where the server listens, and what it serves.

    Attributes:
        host: of HTTP, gRPC and metrics.
        http, grpc, metrics, admin: ports; None where there is none.
        tls: whether HTTP and gRPC are encrypted.
        index: every version of every model, as ``Hosted.index`` has them.
    """

    host: str
    http: int | None
    grpc: int | None
    metrics: int | None
    admin: int | None
    tls: bool
    index: tuple[dict[str, Any], ...] = ()


def check_options(options: ServerOptions) -> None:
    """What can be known to be wrong before anything is opened. Raises CannotServe."""
    if (options.tls_certificate is None) != (options.tls_key is None):
        raise CannotServe("TLS takes a certificate and its key", hint="--tls-certificate CERT.pem --tls-key KEY.pem")
    if options.admin_port is not None and options.admin_tokens is None:
        raise CannotServe("the admin port takes tokens of its own", hint="--admin-tokens FILE, or leave it out")
    if options.http_port is None and options.grpc_port is None:
        raise CannotServe("neither HTTP nor gRPC is to be served", hint="leave one of the ports on")
    if options.max_in_flight_bytes < options.max_request_bytes:
        raise CannotServe(
            f"a request may have {options.max_request_bytes} bytes, and all together {options.max_in_flight_bytes}",
            hint="raise --max-in-flight-size, or lower --max-request-size",
        )
    if options.shared_memory and options.host not in _LOOPBACK:
        raise CannotServe(
            f"shared memory is for clients on this machine, and others reach {options.host}", where="--shared-memory",
            hint="--host 127.0.0.1, or leave it out: who may register memory has the server write into it",
        )  # fmt: skip
    if options.shared_memory and not MEMORY.is_dir():
        raise CannotServe(f"this system keeps no shared memory in {MEMORY}", where="--shared-memory")
    ports = [p for p in (options.http_port, options.grpc_port, options.metrics_port, options.admin_port) if p]
    if len(set(ports)) != len(ports):
        raise CannotServe("two services are to have the same port", hint="0 takes any free one")


def bind(host: str, port: int, *, what: str, reuse: bool = False) -> socket.socket:
    """A socket that is bound and does not listen yet. ``reuse`` shares the port with others that do the same.

    Raises:
        CannotServe: the port is taken, or the address is none of this machine.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, number)
    except OSError as error:
        raise CannotServe(f"not an address of this machine: {error.strerror}", where=f"{what}, {host}") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address)
        made.setblocking(False)
        return made
    except OSError as error:
        made.close()
        option = f"--{what.lower()}-port"
        raise CannotServe(
            f"cannot listen: {error.strerror}", where=f"{what}, {host}:{port}", hint=f"{option} N; 0 takes any free one"
        ) from error


def connection_limit(options: ServerOptions) -> int:
    """HTTP connections at most: twice the requests that may be in flight, and no more than files may be open.

    A server that has run out of files can neither look at its repository nor at its memory. So the soft limit is
    raised as far as the hard one lets it, and what is left without room for the server's own files is not taken.
    """
    wanted = 2 * options.max_in_flight + 64
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < wanted + _OWN_FILES:
        most = wanted + _OWN_FILES
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(16, min(wanted, soft - _OWN_FILES))


def connection_age(options: ServerOptions) -> float:
    """How long clients may keep connections, seconds; 0: for good."""
    if options.connection_seconds is not None:
        return options.connection_seconds
    return CONNECTION_SECONDS if options.workers > 1 else 0.0


class _Uvicorn(uvicorn.Server):
    """uvicorn without hands on signals: they are the whole server's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """A uvicorn server, as a task."""

    def __init__(
        self, app: App, options: ServerOptions, *, bound: socket.socket | None = None, unix: Path | None = None,
        certificate: Certificate | None = None, shared: bool = False, max_age: float = 0.0,
    ) -> None:  # fmt: skip
        self._bound = bound
        self.shared = shared
        config = uvicorn.Config(
            app,
            uds=None if unix is None else str(unix),
            http=protocol(  # type: ignore[arg-type]  # uvicorn only makes them
                client_timeout=options.client_timeout_seconds,
                max_connections=connection_limit(options),
                max_age=max_age,
            ),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            ssl_context_factory=None if certificate is None else lambda _config, _default: certificate.context,
        )
        self.server = _Uvicorn(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self.server.serve(sockets=[self._bound] if self._bound else None))
        while not self.server.started:
            if self._task.done():
                await self._task
                raise CannotServe("the HTTP server ended as it began")
            await asyncio.sleep(0.005)

    async def stop(self, seconds: float) -> None:
        """Takes no more, and waits for what is in flight."""
        if self._task is None:
            return
        self.server.config.timeout_graceful_shutdown = max(1, round(seconds))
        self.server.should_exit = True
        await self._task


def grpc_options(options: ServerOptions, *, reuse: bool) -> list[tuple[str, Any]]:
    """Channel arguments of the gRPC server: sizes, streams, and how often clients may ping.

    ``so_reuseport`` is gRPC's default, which lets a second server take half of the first one's connections in silence.
    A client may ping each 10 s, also while nothing is asked: those that keep connections alive do so.
    """
    age = connection_age(options)
    return [
        ("grpc.so_reuseport", int(reuse)),
        # What is in flight is answered, however long it takes; gRPC adds or takes a tenth of the age by itself.
        *([("grpc.max_connection_age_ms", max(int(age * 1000), 1))] if age else []),
        # a tensor and what the protocol puts around it
        ("grpc.max_receive_message_length", options.max_request_bytes + (64 << 10)),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.absolute_max_metadata_size", 32 << 10),
        ("grpc.max_concurrent_streams", min(options.max_in_flight, 1 << 20)),
        ("grpc.server_handshake_timeout_ms", int(options.client_timeout_seconds * 1000)),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 3),
    ]


class _Grpc:
    """A grpc.aio server."""

    def __init__(
        self, hosted: Observed, options: ServerOptions, *, auth: Auth | None, observer: Observer, reuse: bool,
        certificate: Certificate | None, held: Bytes, regions: Regions | None, everywhere: describe.Everywhere | None,
    ) -> None:  # fmt: skip
        watched = observer.tracer is not None or observer.log.which == "all"
        self._server = grpc.aio.server(
            options=grpc_options(options, reuse=reuse),
            maximum_concurrent_rpcs=options.max_in_flight,
            interceptors=[GrpcCalls(observer)] if watched else None,
        )
        self._servicer = grpc_app.make_servicer(
            hosted, options=options, auth=auth, held=held, regions=regions, everywhere=everywhere
        )
        self._servicer.add_to(self._server)
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"{host}:{options.grpc_port}"
        try:
            if certificate is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, certificate.credentials())
        except RuntimeError as error:
            raise CannotServe(
                "cannot listen: address already in use, or not of this machine", where=f"gRPC, {address}",
                hint="--grpc-port N; 0 takes any free one",
            ) from error  # fmt: skip

    async def start(self) -> None:
        await self._server.start()

    async def stop(self, seconds: float) -> None:
        """Refuses new calls with UNAVAILABLE, and waits for those in flight."""
        self._servicer.drain()
        await self._server.stop(seconds)


@contextlib.contextmanager
def signals(stop: asyncio.Event, at_once: Callable[[], None] = lambda: None) -> Iterator[None]:
    """The first SIGTERM or SIGINT sets ``stop``; the second ends the process, wherever it is, after ``at_once``."""
    loop = asyncio.get_running_loop()

    def told(number: int) -> None:
        if stop.is_set():
            sys.stderr.write("stopped at once: what was in flight was not answered\n")
            sys.stderr.flush()
            at_once()
            os._exit(128 + number)
        _log.info("%s: shutting down; once more stops at once", signal.Signals(number).name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told, number)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def warn_about(options: ServerOptions) -> None:
    """Says what is left open to the network."""
    if options.host in _LOOPBACK:
        return
    if options.tokens is None:
        _log.warning("everybody who reaches %s may use the models: --tokens FILE asks for tokens", options.host)
    if options.tls_certificate is None:
        where = "tokens and data" if options.tokens else "data"
        _log.warning("%s travel in the clear on %s: --tls-certificate and --tls-key", where, options.host)


@contextlib.asynccontextmanager
async def running(
    path: Path,
    options: ServerOptions,
    *,
    stop: asyncio.Event,
    place: Place | None = None,
) -> AsyncIterator[Ports]:
    """A server that answers inside the block, and shuts down in order as it is left.

    Args:
        path: an artifact, an ONNX file, or a repository.
        options: how it runs. ``workers`` is not looked at: this is one.
        stop: set by ``POST /drain`` on the admin port.
        place: of this worker among several: it shares the ports, and answers metrics, stats and admin on its socket.

    Raises:
        CannotServe, InvalidTokens, InvalidCertificate, TracingUnavailable: before anything is loaded.
        Error: there is nothing to serve at ``path``.
    """
    check_options(options)
    worker = place is not None
    async with contextlib.AsyncExitStack() as stack:
        auth = Auth(None if options.tokens is None else Path(options.tokens))
        admin_auth = Auth(None if options.admin_tokens is None else Path(options.admin_tokens))
        certificate = None
        if options.tls_certificate is not None and options.tls_key is not None:
            certificate = Certificate(Path(options.tls_certificate), Path(options.tls_key))
        observer = Observer(RequestLog(options.log_requests), None)
        if tracing.asked(options.trace):
            observer.tracer = tracing.Tracer()
            stack.callback(observer.tracer.stop)
        shared = None
        if place is not None:
            stack.enter_context(
                own_folder.held(place.folder)
            )  # also when the supervisor is killed, until this one goes
            shared = place.folder / "standing"
        models = Models(options, repository.open_source(path), shared=shared)
        if options.max_memory is not None and (own_bytes := memory.resident_bytes()) >= options.max_memory:
            raise CannotServe(
                f"the server itself takes {own_bytes / 1e6:.0f} MB, and may have {options.max_memory / 1e6:.0f} MB",
                where="--max-memory", hint="allow it that and what the models take",
            )  # fmt: skip
        observed = Observed(models, observer)

        async def own() -> dict[str, Any]:
            return stats.collect(models)

        tasks = Tasks(place=place)
        held = Bytes(options.max_in_flight_bytes)
        regions = None
        if options.shared_memory:
            # Of several workers the supervisor has the folder, which goes with it.
            regions = Regions((place.folder if place else stack.enter_context(own_folder.made())) / "regions", held)
        wanted = auth if auth.wanted else None
        everywhere = None if place is None else place.counts
        app = http_app.make_app(
            observed, options=options, auth=wanted, tasks=tasks, regions=regions, everywhere=everywhere
        )
        page_routes.add_to(app, own if place is None else place.numbers, auth=wanted)
        limits = Limits(
            app, max_request_bytes=options.max_request_bytes, max_in_flight=options.max_in_flight, held=held
        )
        administer = admin.handler(models, stop.set)

        async def operate(method: str, where: str) -> admin.Answer:
            match where:
                case "/metrics":
                    return 200, metrics_page.CONTENT_TYPE, metrics_page.render(models).encode()
                case "/stats":
                    return admin.as_json(stats.collect(models))
                case "/counts":
                    return admin.as_json(await describe.statistics(models))
                case "/alive":
                    return admin.as_json({})
                case _ if where.startswith("/result/"):
                    owner, body = tasks.tell(where.removeprefix("/result/"))
                    return 200, "application/json", json.dumps(owner).encode() + b"\n" + body
            return await administer(method, where)

        async def measured(method: str, where: str) -> admin.Answer:
            if where != "/metrics":
                return admin.as_json({"error": "GET /metrics is all there is"}, 404)
            return await operate(method, where)

        https: list[HttpServer] = []
        found: dict[str, int] = {}

        def listen(what: str, port: int, app: App, host: str = options.host, *, shared: bool = False) -> None:
            bound = bind(host, port, what=what, reuse=shared and worker)
            stack.callback(bound.close)
            found[what] = bound.getsockname()[1]
            of_tls = certificate if shared else None
            age = connection_age(options) if shared else 0.0
            made = HttpServer(app, options, bound=bound, certificate=of_tls, shared=shared and worker, max_age=age)
            https.append(made)

        if options.http_port is not None:
            listen("HTTP", options.http_port, HttpCalls(limits, observer), shared=True)
        if place is not None:
            https.append(HttpServer(admin.application(operate), options, unix=place.socket))
        else:
            if options.metrics_port is not None:
                listen("metrics", options.metrics_port, admin.application(measured))
            if options.admin_port is not None:
                listen("admin", options.admin_port, admin.application(administer, auth=admin_auth), "127.0.0.1")
        rpc = None
        if options.grpc_port is not None:
            rpc = _Grpc(
                observed, options, auth=wanted, observer=observer, reuse=worker, certificate=certificate, held=held,
                regions=regions, everywhere=everywhere,
            )  # fmt: skip
            found["gRPC"] = rpc.port
        # A port that workers share is opened when there is something to answer with: others answer meanwhile.
        for each in https:
            if not each.shared:
                await each.start()
        if rpc is not None and not worker:
            await rpc.start()
        watching = asyncio.create_task(_keep_fresh(auth, admin_auth, certificate))
        try:
            await _unless(stop, models.start())
            if worker and not stop.is_set():
                for each in https:
                    if each.shared:
                        await each.start()
                if rpc is not None:
                    await rpc.start()
            ports = Ports(
                options.host, found.get("HTTP"), found.get("gRPC"), found.get("metrics"), found.get("admin"),
                certificate is not None, tuple(models.index()),
            )  # fmt: skip
            yield ports
        finally:
            observed.draining = True
            _log.info("draining: %d s at most for what is in flight", options.drain_seconds)
            await asyncio.sleep(min(LAME_DUCK_SECONDS, options.drain_seconds / 4))
            limits.draining = True
            watching.cancel()

            async def stop_http() -> None:
                end = time.monotonic() + options.drain_seconds
                await tasks.drained(options.drain_seconds)  # while results can be fetched
                left = max(end - time.monotonic(), 0)
                await asyncio.gather(*(each.stop(left) for each in https))

            await asyncio.gather(stop_http(), *([] if rpc is None else [rpc.stop(options.drain_seconds)]))
            await models.stop()


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Does some work, or leaves it where the server is told to stop."""
    doing = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((doing, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        if not doing.done():
            doing.cancel()
    if doing.done():
        await doing


async def _keep_fresh(auth: Auth, admin_auth: Auth, certificate: Certificate | None) -> None:
    """Looks each second whether tokens or the certificate were replaced."""
    while True:
        await asyncio.sleep(1.0)
        for what, each in (("tokens", auth), ("admin tokens", admin_auth), ("certificate", certificate)):
            if each is None:
                continue
            try:
                if await asyncio.to_thread(each.refresh):
                    _log.info("new %s are in use", what)
            except Error as error:
                _log.error("the %s of before stay in use: %s", what, error)


async def serve(
    path: Path,
    options: ServerOptions,
    *,
    ready: Callable[[Ports], None],
    place: Place | None = None,
) -> None:
    """Serves until a signal comes, and returns when all that was in flight is answered.

    Args:
        path: an artifact, an ONNX file, or a repository.
        options: how it runs.
        ready: called once, when models that are to be preloaded are.
        place: of a worker, see ``running``.

    Raises:
        Error: it cannot start; see ``running``.
    """
    logs = Logs(options.log_format)
    logs.start()
    memory.few_arenas()
    stop = asyncio.Event()
    try:
        if place is None:
            warn_about(options)
        with signals(stop):
            async with running(path, options, stop=stop, place=place) as ports:
                if not stop.is_set():
                    ready(ports)
                await stop.wait()
    finally:
        logs.stop()
