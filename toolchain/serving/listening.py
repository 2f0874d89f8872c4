"""Where a server listens: bound sockets, HTTP by uvicorn, gRPC by grpc.aio, and how many connections for how long."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import uvicorn

from runtimes import Error
from toolchain.serving import describe, grpc_app
from toolchain.serving.auth import Auth
from toolchain.serving.calls import GrpcCalls, Observed, Observer
from toolchain.serving.http_protocol import KEEP_ALIVE_SECONDS, protocol
from toolchain.serving.limits import App, Bytes
from toolchain.serving.options import ServerOptions
from toolchain.serving.shared_memory import Regions
from toolchain.serving.tls import Certificate

#: Files that a server has open beside HTTP connections: models that load, logs, sockets of its own, gRPC.
_OWN_FILES = 256
#: How long clients may keep connections where several workers share them: they stay with their worker, and one that is
#: started again gets none before some are renewed. Seconds.
CONNECTION_SECONDS = 30.0


class CannotServe(Error):
    """The server cannot start: a port is busy, or options do not fit each other."""


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


class GrpcServer:
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
