"""Request ids, lines in the log and spans: what a call leaves behind."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
import time
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("uvicorn")

from toolchain.serving import logs, tracing
from toolchain.serving.base import Hosted, ModelFailed, NotFound, Request, Response, ServingError, Unavailable
from toolchain.serving.calls import HttpCalls, Observed, Observer
from toolchain.serving.limits import Message, Receive, Send
from toolchain.serving.logs import FAILED_PER_SECOND, Logs, RequestLog


class Answers:
    """A model that answers, or fails as it is told."""

    error: ServingError | None = None

    async def infer(self, request: Request) -> Response:
        await asyncio.sleep(0.002)
        if self.error is not None:
            raise self.error
        return Response(request.model, "7", {}, queue_ns=500_000, compute_ns=1_000_000)


def through_http(
    observer: Observer, headers: dict[str, str], *, error: ServingError | None = None, path: str = "/v2/models/m/infer"
) -> list[Message]:
    """One request through ``HttpCalls`` and ``Observed``; what was sent."""
    inside = Answers()
    inside.error = error
    observed = Observed(cast(Hosted, inside), observer)

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        status = 200
        try:
            await observed.infer(Request("m", "", {"x": np.zeros(1)}, id="theirs", received_ns=time.monotonic_ns()))
        except ServingError as raised:
            status = raised.http
        await send({"type": "http.response.start", "status": status, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b""})

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {
        "type": "http", "method": "POST", "path": path, "client": ("10.0.0.1", 77), "query_string": b"secret=1",
        "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }  # fmt: skip
    asyncio.run(HttpCalls(app, observer)(scope, receive, send))
    return sent


def lines(form: Any, which: Any, act: Any) -> list[str]:
    stream = io.StringIO()
    writer = Logs(form, stream)
    writer.start()
    try:
        act(Observer(RequestLog(which), None))
    finally:
        writer.stop()
    return stream.getvalue().splitlines()


def request_id(sent: list[Message]) -> str:
    return str(dict(sent[0]["headers"])[b"x-request-id"].decode())


def test_a_request_id_is_taken_over_or_made_up() -> None:
    observer = Observer(RequestLog("none"), None)
    assert request_id(through_http(observer, {"x-request-id": "abc-1"})) == "abc-1"
    made = {request_id(through_http(observer, {})) for _ in range(5)}
    assert len(made) == 5
    for bad in ("", "a b", "x" * 200, "a\x01"):
        assert request_id(through_http(observer, {"x-request-id": bad})) not in ("", bad)


def test_a_line_of_json_says_who_what_and_how_long() -> None:
    headers = {"x-request-id": "abc-1", "authorization": "Bearer very-secret"}
    written = lines("json", "all", lambda observer: through_http(observer, headers))
    assert len(written) == 1
    line = json.loads(written[0])
    assert line["ts"].endswith("Z")
    assert 2 <= line.pop("ms") < 1000
    del line["ts"]
    assert line == {
        "level": "info", "logger": "toolchain.serving.requests", "message": "answered", "request_id": "abc-1",
        "id": "theirs", "client": "10.0.0.1:77", "call": "POST /v2/models/m/infer", "model": "m", "version": "7",
        "status": 200, "queue_ms": 0.5, "compute_ms": 1.0,
    }  # fmt: skip
    assert "secret" not in written[0]


def test_only_failures_get_a_line_where_that_is_said() -> None:
    def act(observer: Observer) -> None:
        through_http(observer, {})
        through_http(observer, {}, error=NotFound("no such thing"))
        through_http(observer, {}, error=ModelFailed("it broke"))

    told = [json.loads(line) for line in lines("json", "failed", act)]
    assert [(t["level"], t["status"], t["message"]) for t in told] == [
        ("warning", 404, "no such thing"),
        ("error", 500, "it broke"),
    ]
    not_yet = lambda observer: through_http(observer, {}, error=Unavailable("later"), path="/v2/health/ready")  # noqa: E731
    assert lines("json", "failed", not_yet) == []  # who asks whether it is ready is answered
    elsewhere = lambda observer: through_http(observer, {}, error=Unavailable("later"))  # noqa: E731
    assert len(lines("json", "failed", elsewhere)) == 1
    assert lines("json", "none", act) == []


def test_a_line_cannot_be_forged() -> None:
    act = lambda observer: through_http(observer, {}, error=NotFound("x"), path="/a\nerror forged\x1b[31m")  # noqa: E731
    for form in ("json", "text"):
        written = lines(form, "failed", act)
        assert len(written) == 1
        assert "\x1b" not in written[0]


def test_a_flood_of_failures_is_counted_and_not_written() -> None:
    def act(observer: Observer) -> None:
        for _ in range(FAILED_PER_SECOND * 3):
            observer.log.line(failed=True, defect=False, message="refused", fields={})
        observer.log._second -= 1  # a second later
        observer.log.line(failed=True, defect=False, message="refused", fields={})

    written = lines("text", "failed", act)
    assert len(written) <= 2 * FAILED_PER_SECOND + 2
    assert any("more requests failed" in line for line in written)


def test_outside_of_a_call_failures_are_told_all_the_same() -> None:
    """As in a gRPC stream, and in all of gRPC where only failures are told."""

    def act(observer: Observer) -> None:
        inside = Answers()
        inside.error = NotFound("no such model")
        observed = Observed(cast(Hosted, inside), observer)
        with pytest.raises(NotFound):
            asyncio.run(observed.infer(Request("m", "", {}, id="theirs")))

    line = json.loads(lines("json", "failed", act)[0])
    assert (line["id"], line["model"], line["status"]) == ("theirs", "m", "NOT_FOUND")


def test_a_reader_that_does_not_read_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = threading.Event()

    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            reads.wait()
            return super().write(text)

    monkeypatch.setattr(logs, "QUEUE", 3)
    stream = Stuck()
    writer = Logs("text", stream)
    writer.start()
    log = logging.getLogger("toolchain.serving")
    for number in range(100):  # would wait for ever if a line waited for its reader
        log.info("line %d", number)
    reads.set()
    while "line 0" not in stream.getvalue():
        time.sleep(0.01)
    time.sleep(0.1)
    log.info("the last")
    writer.stop()
    written = stream.getvalue().splitlines()
    assert 3 <= sum(" line " in line for line in written) <= 4
    assert any("9" in line and "lines were dropped" in line for line in written)
    assert "the last" in written[-1]


def test_spans_hang_in_the_clients_trace() -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracer = tracing.Tracer(exporter)
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    through_http(Observer(RequestLog("none"), tracer), {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "r1"})
    through_http(Observer(RequestLog("none"), tracer), {"traceparent": "nonsense"}, error=ModelFailed("it broke"))
    tracer.stop()
    spans = exporter.get_finished_spans()
    mine = {span.name: span for span in spans if f"{span.context.trace_id:032x}" == trace}
    root = mine.pop("POST /v2/models/m/infer")
    assert f"{root.parent.span_id:016x}" == parent
    assert dict(root.attributes) == {
        "request.id": "r1", "client.address": "10.0.0.1:77", "model": "m", "version": "7", "status": 200,
    }  # fmt: skip
    assert set(mine) == {"decode", "queue", "compute", "encode"}
    assert all(span.parent.span_id == root.context.span_id for span in mine.values())
    assert mine["queue"].end_time - mine["queue"].start_time == 500_000
    assert mine["compute"].start_time == mine["queue"].end_time
    assert mine["compute"].end_time - mine["compute"].start_time == 1_000_000
    assert root.start_time <= mine["decode"].start_time
    assert mine["encode"].end_time <= root.end_time
    assert abs(root.end_time - time.time_ns()) < 10e9
    other = [span for span in spans if f"{span.context.trace_id:032x}" != trace]
    assert {span.name for span in other} == {"POST /v2/models/m/infer", "decode", "encode"}
    assert not next(span for span in other if span.parent is None).status.is_ok


@pytest.mark.parametrize(
    ("environment", "option", "wanted"),
    [
        ({}, False, False), ({}, True, True), ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}, False, True),
        ({"OTEL_TRACES_EXPORTER": "console"}, False, True), ({"OTEL_TRACES_EXPORTER": "none"}, True, False),
        ({"OTEL_SDK_DISABLED": "true"}, True, False),
    ],
)  # fmt: skip
def test_traces_are_off_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], option: bool, wanted: bool
) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tracing.asked(option) is wanted
