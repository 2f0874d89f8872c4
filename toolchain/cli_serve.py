"""``toolchain serve``: models behind HTTP and gRPC."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
import typer
from rich.text import Text

from runtimes import Error
from toolchain import console
from toolchain.errors import RecipeError

if TYPE_CHECKING:
    from toolchain.serving.options import ServerOptions
    from toolchain.serving.server import Ports

serving = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

#: What the extra `serve` brings, by the names that are imported.
_PACKAGES = ("fastapi", "grpc", "httptools", "python_multipart", "tritonclient", "uvicorn", "yaml")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@serving.callback()
def _alone() -> None:
    """Here so that the one command keeps its name: without a callback an app of one command is that command."""


class ServeUnavailable(Error):
    """Packages that serve are not installed."""


@serving.command()
def serve(
    path: Annotated[
        Path,
        typer.Argument(
            help="an artifact, an .onnx file, what `toolchain install` wrote, or a folder of models", show_default=False
        ),
    ],
    host: Annotated[str, typer.Option(help="the address of HTTP, gRPC and metrics")] = "127.0.0.1",
    http_port: Annotated[str, typer.Option(metavar="PORT", help="0: any free one; none: no HTTP")] = "8000",
    grpc_port: Annotated[str, typer.Option(metavar="PORT", help="likewise")] = "8001",
    metrics_port: Annotated[str, typer.Option(metavar="PORT", help="likewise")] = "8002",
    admin_port: Annotated[
        str, typer.Option(metavar="PORT", help="load, unload, roll back; on the loopback address, with --admin-tokens")
    ] = "none",
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="resident memory at most: 4G, 512M", show_default="no bound")
    ] = None,
    slo_p99_ms: Annotated[
        float | None,
        typer.Option("--slo-p99-ms", help="latency to hold at the 99th percentile; batches adapt", show_default=False),
    ] = None,
    max_batch_size: Annotated[
        int | None, typer.Option(help="rows of a batch at most; 0: no batching", show_default="64")
    ] = None,
    max_queue_delay_us: Annotated[
        int, typer.Option("--max-queue-delay-us", help="how long a request may wait for others, microseconds")
    ] = 0,
    preferred_batch_size: Annotated[
        list[int] | None, typer.Option(help="run a batch of this size at once; may be said again", show_default=False)
    ] = None,
    instances: Annotated[int, typer.Option(help="batches of a model that run at the same time")] = 1,
    default_timeout_ms: Annotated[
        int | None,
        typer.Option("--default-timeout-ms", help="deadline of requests that bring none", show_default="none"),
    ] = None,
    queue_size: Annotated[int, typer.Option(help="requests of a model that may wait")] = 1024,
    version_policy: Annotated[
        str, typer.Option(metavar="POLICY", help="latest:N, all, or specific:1,3; of models that say nothing else")
    ] = "latest:1",
    workers: Annotated[int, typer.Option(help="processes that share the ports")] = 1,
    threads: Annotated[
        int | None, typer.Option(help="of one session", show_default="the runtime's choice; cores / workers")
    ] = None,
    cache_size: Annotated[str, typer.Option(metavar="SIZE", help="of the result cache; 0: none")] = "0",
    cache_seconds: Annotated[float, typer.Option(help="how long an answer is kept")] = 300.0,
    poll_seconds: Annotated[float, typer.Option(help="how often new versions are looked for; 0: never")] = 2.0,
    max_request_size: Annotated[str, typer.Option(metavar="SIZE", help="of a body or message")] = "64M",
    max_in_flight: Annotated[int, typer.Option(help="requests that are handled at once")] = 4096,
    max_in_flight_size: Annotated[str, typer.Option(metavar="SIZE", help="of all bodies and messages together")] = "1G",
    client_timeout_seconds: Annotated[float, typer.Option(help="that a client may take to send a request")] = 30.0,
    connection_seconds: Annotated[
        float | None,
        typer.Option(help="that a client may keep a connection; 0: for good", show_default="30 with --workers, else 0"),
    ] = None,
    drain_seconds: Annotated[float, typer.Option(help="that a shutdown waits for what is in flight")] = 30.0,
    tokens: Annotated[
        Path | None, typer.Option(help="a file of bearer tokens, a line each: TOKEN [MODEL ...]", show_default=False)
    ] = None,
    admin_tokens: Annotated[Path | None, typer.Option(help="likewise, of the admin port", show_default=False)] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM", show_default=False)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM", show_default=False)] = None,
    shared_memory: Annotated[
        bool, typer.Option("--shared-memory", help="clients on this machine may leave tensors in /dev/shm")
    ] = False,
    target: Annotated[str | None, typer.Option(help="the runtime", show_default="the best here")] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="load compiled code that was not built on this machine")
    ] = False,
    log_format: Annotated[str, typer.Option(help="json or text")] = "text",
    log_requests: Annotated[str, typer.Option(help="which requests get a line: all, failed, none")] = "failed",
    trace: Annotated[bool, typer.Option("--trace", help="OpenTelemetry traces, also by OTEL_... variables")] = False,
) -> None:
    """Serves models: Open Inference Protocol over HTTP and gRPC, batching, versions, metrics, and a page to look at."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ServeUnavailable(
            f"what serves is not installed: {', '.join(missing)}", hint="pip install 'onnx-toolchain[serve]'"
        )
    options = _options(
        host=host,
        http_port=_port(http_port, "--http-port"),
        grpc_port=_port(grpc_port, "--grpc-port"),
        metrics_port=_port(metrics_port, "--metrics-port"),
        admin_port=_port(admin_port, "--admin-port"),
        max_memory=None if max_memory is None else _size(max_memory, "--max-memory"),
        slo_p99_ms=slo_p99_ms,
        workers=workers,
        threads=threads,
        poll_seconds=poll_seconds,
        max_request_bytes=_size(max_request_size, "--max-request-size"),
        max_in_flight=max_in_flight,
        max_in_flight_bytes=_size(max_in_flight_size, "--max-in-flight-size"),
        client_timeout_seconds=client_timeout_seconds,
        connection_seconds=connection_seconds,
        drain_seconds=drain_seconds,
        tokens=_absolute(tokens),
        admin_tokens=_absolute(admin_tokens),
        tls_certificate=_absolute(tls_certificate),
        tls_key=_absolute(tls_key),
        result_cache={"max_bytes": _size(cache_size, "--cache-size"), "max_age_seconds": cache_seconds},
        shared_memory=shared_memory,
        trust=trust,
        log_format=log_format,
        log_requests=log_requests,
        trace=trace,
        defaults={
            "target": target,
            "batching": {
                "max_batch_size": max_batch_size,
                "max_queue_delay_us": max_queue_delay_us,
                "preferred_batch_size": tuple(preferred_batch_size or ()),
                "instances": instances,
                "default_timeout_ms": default_timeout_ms,
                "queue_size": queue_size,
            },
            "version_policy": _policy(version_policy),
        },
    )
    from toolchain.serving.loop import run
    from toolchain.serving.repository import open_source

    open_source(path)  # what is wrong with the path is told before anything begins
    if options.workers > 1:
        from toolchain.serving.supervisor import supervise

        run(supervise(path, options, ready=_show))
    else:
        from toolchain.serving.server import serve as serve_here

        run(serve_here(path, options, ready=_show))


def _show(ports: Ports) -> None:
    """A line for each port and each model, when the server is ready. Not wrapped: programs read them."""
    host = f"[{ports.host}]" if ":" in ports.host else ports.host
    s = "s" if ports.tls else ""
    lines = [
        ("HTTP", ports.http, f"http{s}://{host}:{ports.http}  page at /, API at /docs"),
        ("gRPC", ports.grpc, f"{host}:{ports.grpc}"),
        ("metrics", ports.metrics, f"http://{host}:{ports.metrics}/metrics"),
        ("admin", ports.admin, f"http://127.0.0.1:{ports.admin}"),
    ]
    for name, port, text in lines:
        if port is not None:
            console.out.print(Text(f"{name:<8} {text}"), soft_wrap=True)
    if not ports.index:
        console.out.print(
            Text(f"{'models':<8} none yet: the folder has no NAME/VERSION/ with an artifact"), soft_wrap=True
        )
    for entry in ports.index:
        reason = f", {entry['reason']}" if entry["reason"] else ""
        version = f" version {entry['version']}" if entry["version"] else ""
        console.out.print(
            Text(f"{'model':<8} {entry['name']}{version}: {entry['state'].lower()}{reason}"), soft_wrap=True
        )
    console.out.file.flush()


def _options(**values: Any) -> ServerOptions:
    from toolchain.serving.options import ServerOptions

    try:
        return ServerOptions.model_validate(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        option = "--" + "-".join(str(part) for part in first["loc"] if part not in ("defaults", "batching"))
        raise RecipeError(
            f"{first['msg'][:1].lower()}{first['msg'][1:]}: {first['input']!r}", where=option.replace("_", "-"),
            hint="toolchain serve --help has the options",
        ) from error  # fmt: skip


def _port(text: str, option: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal() or int(text) > 65535:
        raise RecipeError(f"not a port: {text!r}", where=option, hint="0 to 65535, or none")
    return int(text)


def _size(text: str, option: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise RecipeError(f"not a size: {text!r}", where=option, hint="write 4G, 512M or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _policy(text: str) -> dict[str, Any]:
    name, _, rest = text.partition(":")
    numbers = rest.split(",") if rest else []
    if name == "all" and not rest:
        return {"all": True}
    if name == "latest" and len(numbers) <= 1 and all(number.isdecimal() for number in numbers):
        return {"latest": int(rest or "1")}
    if name == "specific" and numbers and all(number.isdecimal() for number in numbers):
        return {"specific": tuple(int(number) for number in numbers)}
    raise RecipeError(
        f"not a version policy: {text!r}", where="--version-policy", hint="write latest:2, all, or specific:1,3"
    )


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())
