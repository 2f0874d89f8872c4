"""OpenTelemetry traces: a span for a request, and in it decode, queue, compute and encode.

An extra (``pip install .[trace]``), and off unless ``--trace`` or OpenTelemetry's own environment asks for it; then
nothing here is imported. A client's W3C trace context (``traceparent``, ``tracestate``) is taken over, so that the
request's span hangs in the client's trace. What OpenTelemetry's environment says holds: ``OTEL_SERVICE_NAME``,
``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_EXPORTER_OTLP_PROTOCOL``, ``OTEL_TRACES_SAMPLER`` and the others of
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables; ``OTEL_TRACES_EXPORTER=console``
prints spans.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from runtimes import Error

#: How long a server that ends waits for a collector.
FLUSH_SECONDS = 5.0


class TracingUnavailable(Error):
    """Traces were asked for, and the packages that write them are not installed."""


def asked(trace: bool) -> bool:
    """Whether traces are wanted, by the option or by the environment."""
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "")
    if exporter == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return trace or bool(exporter) or any(os.environ.get(name) for name in endpoints)


class Tracer:
    """Makes spans. Times are ``time.monotonic_ns()``; they are told as times of day.

    Args:
        exporter: takes finished spans, a ``SpanExporter``; None takes the one that the environment names.

    Raises:
        TracingUnavailable: the packages are not there.
    """

    def __init__(self, exporter: Any = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise TracingUnavailable(
                f"traces need a package that is not installed: {error.name}",
                hint="pip install 'onnx-toolchain[trace]'",
            ) from error
        name = os.environ.get("OTEL_SERVICE_NAME", "toolchain-serve")
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
        self._exporter = exporter or _exporter()
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("toolchain.serving")
        self._propagator = TraceContextTextMapPropagator()
        self._within = trace.set_span_in_context
        self._server = trace.SpanKind.SERVER
        self._failed = trace.Status(trace.StatusCode.ERROR)
        self._epoch = time.time_ns() - time.monotonic_ns()

    def begin(self, name: str, carrier: Mapping[str, str], *, at_ns: int) -> Any:
        """Opens the span of a request. ``carrier`` holds its headers, names in lower case."""
        return self._tracer.start_span(
            name, context=self._propagator.extract(carrier), kind=self._server, start_time=at_ns + self._epoch
        )

    def step(self, span: Any, name: str, start_ns: int, end_ns: int) -> None:
        """A step of a request that is over."""
        made = self._tracer.start_span(name, context=self._within(span), start_time=start_ns + self._epoch)
        made.end(max(start_ns, end_ns) + self._epoch)

    def end(self, span: Any, attributes: Mapping[str, Any], *, failed: bool, at_ns: int) -> None:
        """Closes the span of a request."""
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if failed:
            span.set_status(self._failed)
        span.end(at_ns + self._epoch)

    def stop(self) -> None:
        """Hands on what is left. Takes as long as the collector does, 5 s at most."""
        # In a thread: OpenTelemetry does not keep to a timeout, and tries a collector that is away for longer.
        flushing = threading.Thread(target=self._provider.force_flush, daemon=True)
        flushing.start()
        flushing.join(FLUSH_SECONDS)
        if flushing.is_alive():
            self._exporter.shutdown()  # it gives up what it tries
        self._provider.shutdown()


def _exporter() -> Any:
    """The exporter that the environment names. Raises TracingUnavailable."""
    named = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if named == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if named != "otlp":
        raise TracingUnavailable(
            f"traces are not written to {named!r}", where="OTEL_TRACES_EXPORTER", hint="otlp, console or none"
        )
    variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    where = next((name for name in variables if os.environ.get(name)), variables[1])
    protocol = os.environ.get(where) or "grpc"
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

            return OverGrpc()
        elif protocol == "http/protobuf":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

            return OverHttp()
    except ImportError as error:
        raise TracingUnavailable(
            f"sending traces over {protocol} needs a package that is not installed: {error.name}",
            hint="pip install 'onnx-toolchain[trace]', or OTEL_TRACES_EXPORTER=console to print them",
        ) from error
    raise TracingUnavailable(
        f"traces are not sent over {protocol!r}", where=where, hint="grpc (port 4317) or http/protobuf (4318)"
    )
