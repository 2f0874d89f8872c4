"""OpenTelemetry traces: a span for a request, and in it decode, queue, compute and encode.

An extra (``pip install .[trace]``), and off unless ``--trace`` or OpenTelemetry's own environment asks for it; then
nothing here is imported. A client's W3C trace context (``traceparent``, ``tracestate``) is taken over, so that the
request's span hangs in the client's trace. What OpenTelemetry's environment says holds: ``OTEL_SERVICE_NAME``,
``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_TRACES_SAMPLER``; ``OTEL_TRACES_EXPORTER=console`` prints spans.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from runtimes import Error


class TracingUnavailable(Error):
    """Traces were asked for, and the packages that write them are not installed."""


def asked(trace: bool) -> bool:
    """Whether traces are wanted, by the option or by the environment."""
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "")
    if exporter == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return trace or bool(exporter) or bool(os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"))


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
        self._provider.add_span_processor(BatchSpanProcessor(exporter or _exporter()))
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
        self._provider.force_flush(5_000)
        self._provider.shutdown()


def _exporter() -> Any:
    if os.environ.get("OTEL_TRACES_EXPORTER") == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise TracingUnavailable(
            f"sending traces needs a package that is not installed: {error.name}",
            hint="pip install 'onnx-toolchain[trace]', or OTEL_TRACES_EXPORTER=console to print them",
        ) from error
    return OTLPSpanExporter()
