"""Traces as a collector gets them: OTLP over HTTP, from a whole server."""

from __future__ import annotations

import gzip
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_support import ADD, save, served

from toolchain.serving import tracing

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HTTP = {"OTEL_SDK_DISABLED": "false", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}


class Collector:
    """A collector on the loopback address, with all spans that it was sent."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages

        self.spans: list[Any] = []
        self.services: set[str] = set()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
                for resource in messages.ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.services |= {
                        each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
                    }
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                answer = messages.ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="sending traces needs the trace extra")
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(ADD, tmp_path / "add.onnx")


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_collector_gets_the_spans_of_http_and_grpc(model: Path, collector: Collector, workers: str) -> None:
    import numpy as np
    import tritonclient.grpc as grpcclient

    environment = {**HTTP, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_SERVICE_NAME": "mine"}
    with served(model, "--workers", workers, environment=environment) as server:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1.0] * 3}]
        status, _ = server.ask(
            "POST", "/v2/models/add/infer", json.dumps({"inputs": inputs}).encode(),
            traceparent=f"00-{TRACE}-{PARENT}-01", x_request_id="r-1",
        )  # fmt: skip
        assert status == 200
        given = grpcclient.InferInput("x", [1, 3], "FP32")
        given.set_data_from_numpy(np.ones((1, 3), np.float32))
        client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.port('gRPC')}")
        client.infer("add", [given], headers={"x-request-id": "r-2"})
        assert server.ask("POST", "/v2/models/none/infer", b"{}")[0] == 404
        client.close()
        assert server.end() == 0, server.err  # what is not sent yet is sent at the end
    assert collector.services == {"mine"}
    requests = {attributes(span).get("request.id"): span for span in collector.spans if span.kind == 2}
    over_http = requests["r-1"]
    assert (over_http.trace_id.hex(), over_http.parent_span_id.hex()) == (TRACE, PARENT)
    for name in ("r-1", "r-2"):
        said = attributes(requests[name])
        assert (said["model"], said["version"]) == ("add", "1")
        steps = {span.name: span for span in collector.spans if span.parent_span_id == requests[name].span_id}
        assert set(steps) == {"decode", "queue", "compute", "encode"}
        assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in steps.values())
        assert all(span.start_time_unix_nano >= requests[name].start_time_unix_nano for span in steps.values())
    assert attributes(over_http)["status"] == 200
    assert any(attributes(span).get("status") == 404 for span in requests.values())


def test_a_collector_that_is_away_holds_nothing_up(model: Path, collector: Collector) -> None:
    collector.server.shutdown()
    collector.server.server_close()
    with served(model, environment={**HTTP, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}) as server:
        for _ in range(20):
            assert server.infer()[0] == 200
        assert server.end() == 0, server.err
    assert not any("Traceback" in line for line in server.err), server.err


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "otlp, console or none"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "grpc .* or http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "udp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "TRACES_PROTOCOL"),
    ],
)
def test_what_the_environment_may_not_say(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], told: str
) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="traces need the trace extra")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(tracing.TracingUnavailable) as caught:
        tracing.Tracer()
    assert re.search(told, str(caught.value))
