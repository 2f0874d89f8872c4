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
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from runtimes import Error
from toolchain.serving import (
    admin,
    describe,
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
from toolchain.serving.calls import HttpCalls, Observed, Observer
from toolchain.serving.control import Place
from toolchain.serving.limits import App, Bytes, Limits
from toolchain.serving.listening import CannotServe, GrpcServer, HttpServer, bind, connection_age
from toolchain.serving.logs import Logs, RequestLog
from toolchain.serving.models import Models
from toolchain.serving.options import ServerOptions
from toolchain.serving.shared_memory import MEMORY, Regions
from toolchain.serving.tasks import Tasks
from toolchain.serving.tls import Certificate

_log = logging.getLogger("toolchain.serving")

#: How long a server that shuts down goes on taking work after it said that it is not ready, seconds.
LAME_DUCK_SECONDS = 0.5
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


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
            rpc = GrpcServer(
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
