"""Open Inference Protocol over HTTP, with Triton's own client and with sockets that send rubbish."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import socket
import time
import zlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from standin import NUMERIC, Few, fetch, running
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from toolchain.serving.base import DeadlineExceeded, Overloaded, Unauthenticated, Unavailable
from toolchain.serving.options import ServerOptions

LIMIT = 1 << 20


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Few:
    return Few(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def port(few: Few) -> Iterator[int]:
    with running(few, ServerOptions(max_request_bytes=LIMIT)) as (http, _):
        yield http


@pytest.fixture
def client(port: int) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{port}", concurrency=4) as made:
        yield made


def given(name: str, array: np.ndarray, *, binary: bool = True) -> triton.InferInput:
    from tritonclient.utils import np_to_triton_dtype

    made = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def raw(port: int, data: bytes, *, half_close: bool = False) -> bytes:
    """What comes back on a connection that sends ``data``."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while b"\r\n\r\n" not in received:
            part = connection.recv(65536)
            if not part:
                break
            received += part
        return received


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def test_health_and_metadata(client: triton.InferenceServerClient, port: int) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("double")
    assert client.is_model_ready("double", "1")
    assert not client.is_model_ready("double", "2")
    assert not client.is_model_ready("nope")
    assert client.get_server_metadata()["extensions"] == [
        "binary_tensor_data", "model_configuration", "parameters", "schedule_policy", "statistics",
    ]  # fmt: skip
    for version in ("", "1"):
        assert client.get_model_metadata("pair", version) == {
            "name": "pair",
            "versions": ["1"],
            "platform": "ort-cpu",
            "inputs": [
                {"name": "a", "datatype": "INT32", "shape": [-1, -1]},
                {"name": "b", "datatype": "INT32", "shape": [-1, -1]},
            ],
            "outputs": [
                {"name": "total", "datatype": "INT32", "shape": [-1, -1]},
                {"name": "less", "datatype": "INT32", "shape": [-1, -1]},
            ],
        }
    config = client.get_model_config("pair")
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (8, [-1])
    assert {entry["name"] for entry in client.get_model_repository_index()} == set(NUMERIC_AND_OTHERS)
    for path in ("/v2/models/nope", "/v2/models/nope/config", "/v2/models/nope/stats", "/v2/models/double/versions/9"):
        status, _, body = fetch(port, path)
        assert status == 404
        assert "error" in json.loads(body)


NUMERIC_AND_OTHERS = [f"copy_{name.lower()}" for name in NUMERIC] + [
    "double", "pair", "scalar", "words", "half", "divide", "image",
]  # fmt: skip


@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("name", NUMERIC)
def test_every_numeric_dtype(
    client: triton.InferenceServerClient, name: str, binary_in: bool, binary_out: bool
) -> None:
    dtype = ml_dtypes.bfloat16 if name == "BF16" else triton_to_np_dtype(name)
    values = [[0, 1, 1], [1, 0, 1]] if name == "BOOL" else [[0, 1, 2], [100, 101, 102]]
    array = np.array(values, dtype)
    output = triton.InferRequestedOutput("y", binary_data=binary_out)
    if name == "BF16" and not binary_in:
        pytest.skip("the client itself refuses")
    inputs = [given("x", array, binary=binary_in)]
    if name in ("FP16", "BF16") and not (binary_in and binary_out):
        with pytest.raises(InferenceServerException, match="JSON has no form") as caught:
            client.infer(f"copy_{name.lower()}", inputs, outputs=[output])
        assert caught.value.status() == "400"
        return
    got = client.infer(f"copy_{name.lower()}", inputs, outputs=[output], request_id="5")
    assert got.get_response()["id"] == "5"
    result = got.as_numpy("y")
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, array)


def test_extremes_survive_json(client: triton.InferenceServerClient) -> None:
    for name in ("INT64", "UINT64", "INT8", "FP32", "FP64"):
        dtype = triton_to_np_dtype(name)
        limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.finfo(dtype)
        array = np.array([[limits.min, limits.max, 1]], dtype)
        output = triton.InferRequestedOutput("y", binary_data=False)
        got = client.infer(f"copy_{name.lower()}", [given("x", array, binary=False)], outputs=[output])
        np.testing.assert_array_equal(got.as_numpy("y"), array)


def test_numbers_that_json_lacks_in_an_answer(client: triton.InferenceServerClient) -> None:
    inputs = [given("x", np.array([0, 1], np.float32)), given("y", np.zeros(2, np.float32))]
    for binary in (True, False):
        got = client.infer("divide", inputs, outputs=[triton.InferRequestedOutput("z", binary_data=binary)])
        np.testing.assert_array_equal(got.as_numpy("z"), [np.nan, np.inf])


def test_strings(client: triton.InferenceServerClient) -> None:
    words = np.array(["a", "grün", ""], object)
    for binary in (True, False):
        got = client.infer(
            "words", [given("s", words, binary=binary)], outputs=[triton.InferRequestedOutput("t", binary_data=binary)]
        )
        wanted = [word + word for word in words]
        assert [t.decode() if isinstance(t, bytes) else t for t in got.as_numpy("t")] == wanted


def test_strings_for_a_model_of_numbers(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="BYTES, and the model takes FP32") as caught:
        client.infer("double", [given("x", np.array([["a"] * 4], object))])
    assert caught.value.status() == "400"


def test_several_outputs_and_their_order(client: triton.InferenceServerClient) -> None:
    a, b = np.array([[5, 7]], np.int32), np.array([[1, 2]], np.int32)
    inputs = [given("a", a, binary=False), given("b", b)]
    got = client.infer("pair", inputs)
    np.testing.assert_array_equal(got.as_numpy("total"), a + b)
    np.testing.assert_array_equal(got.as_numpy("less"), a - b)
    mixed = [triton.InferRequestedOutput("less"), triton.InferRequestedOutput("total", binary_data=False)]
    got = client.infer("pair", inputs[::-1], outputs=mixed, model_version="1")
    assert [output["name"] for output in got.get_response()["outputs"]] == ["less", "total"]
    np.testing.assert_array_equal(got.as_numpy("total"), a + b)
    np.testing.assert_array_equal(got.as_numpy("less"), a - b)
    got = client.infer("pair", inputs, outputs=mixed[:1])
    assert got.as_numpy("total") is None


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression_both_ways(client: triton.InferenceServerClient, algorithm: str) -> None:
    array = np.zeros((8, 4), np.float32)
    got = client.infer(
        "double", [given("x", array)], request_compression_algorithm=algorithm, response_compression_algorithm=algorithm
    )
    np.testing.assert_array_equal(got.as_numpy("y"), array)
    # One that is large enough to be worth it comes compressed.
    text = np.array(["x" * 5000], object)
    got = client.infer("words", [given("s", text)], response_compression_algorithm=algorithm)
    assert got.as_numpy("t")[0] == b"x" * 10_000


def test_an_answer_is_compressed_only_where_it_is_asked_for(port: int) -> None:
    body = json.dumps({"inputs": [{"name": "s", "shape": [1], "datatype": "BYTES", "data": ["x" * 5000]}]}).encode()
    for wish, wanted in (("gzip", "gzip"), ("br, deflate;q=0.5", "deflate"), ("gzip;q=0", None), ("br", None)):
        status, headers, answer = fetch(port, "/v2/models/words/infer", body, Accept_Encoding=wish)
        assert status == 200
        assert headers.get("content-encoding") == wanted
        plain = {"gzip": gzip.decompress, "deflate": zlib.decompress, None: bytes}[wanted](answer)
        assert json.loads(plain)["outputs"][0]["data"] == ["x" * 10_000]


def test_async_infer_and_the_asyncio_client(client: triton.InferenceServerClient, port: int) -> None:
    arrays = [np.full((1, 4), number, np.float32) for number in range(20)]
    waiting = [client.async_infer("double", [given("x", array)], request_id=str(i)) for i, array in enumerate(arrays)]
    for number, one in enumerate(waiting):
        got = one.get_result()
        assert got.get_response()["id"] == str(number)
        np.testing.assert_array_equal(got.as_numpy("y"), arrays[number] * 2)

    async def run() -> list[Any]:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{port}") as aio:
            return list(await asyncio.gather(*(aio.infer("double", [given("x", array)]) for array in arrays)))

    for array, got in zip(arrays, asyncio.run(run()), strict=True):
        np.testing.assert_array_equal(got.as_numpy("y"), array * 2)


def test_statistics(client: triton.InferenceServerClient, port: int) -> None:
    before = client.get_inference_statistics("half")["model_stats"][0]
    client.infer("half", [given("x", np.zeros((3, 2), np.float32))])
    after = client.get_inference_statistics("half", "1")["model_stats"][0]
    assert after["inference_count"] - before["inference_count"] == 3
    assert after["execution_count"] - before["execution_count"] == 1
    assert after["inference_stats"].keys() == {
        "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss",
    }  # fmt: skip
    assert [batch["batch_size"] for batch in after["batch_stats"]] == [3]
    everything = json.loads(fetch(port, "/v2/models/stats")[2])["model_stats"]
    assert {entry["name"] for entry in everything} == set(NUMERIC_AND_OTHERS)
    assert fetch(port, "/v2/models/half/versions/7/stats")[0] == 404


def test_the_repository_index_takes_what_its_client_may_send(port: int) -> None:
    for body in (b"", b"{}", b'{"ready": true}', b'{"ready": false}'):
        # urllib says that a body is a form where nothing else is said.
        status, _, answer = fetch(port, "/v2/repository/index", body)
        assert status == 200
        assert json.loads(answer)[0].keys() == {"name", "version", "state", "reason"}
    for body in (b"[]", b'{"ready": 1}', b"{", b"null"):
        assert fetch(port, "/v2/repository/index", body)[0] == 400


def test_priority_and_timeout_reach_the_model(few: Few, client: triton.InferenceServerClient) -> None:
    few.seen.clear()
    before = time.monotonic_ns()
    client.infer("double", [given("x", np.zeros((1, 4), np.float32))], priority=3, timeout=2_000_000)
    (request,) = few.seen
    assert request.priority == 3
    assert request.deadline_ns is not None
    assert 0 <= request.deadline_ns - before - 2_000_000_000 < 1_000_000_000
    assert before <= request.received_ns <= time.monotonic_ns()


@pytest.mark.parametrize(
    ("error", "status", "header"),
    [
        (Overloaded("full", hint="later"), 429, "retry-after"),
        (Unavailable("loading"), 503, "retry-after"),
        (DeadlineExceeded("late"), 504, None),
        (Unauthenticated("no token"), 401, "www-authenticate"),
        (RuntimeError("a secret path"), 500, None),
    ],
)
def test_errors_of_the_model(few: Few, port: int, error: Exception, status: int, header: str | None) -> None:
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
    few.fails = error
    try:
        got, headers, answer = fetch(port, "/v2/models/double/infer", body)
    finally:
        few.fails = None
    assert got == status
    assert header is None or header in headers
    text = json.loads(answer)["error"]
    assert "secret" not in text
    assert status == 500 or text.startswith(str(error.args[0]))
    assert fetch(port, "/v2/models/double/infer", body)[0] == 200


def test_unknown_paths_and_methods_say_so_in_json(port: int) -> None:
    for path, body, status in (
        ("/nope", None, 404),
        ("/v2/models/a/b/c/infer", b"{}", 404),
        ("/v2/models//infer", b"{}", 404),
        ("/v2/models/nope/infer", b"{}", 404),
        ("/v2/models/..%2f..%2fetc/infer", b"{}", 404),
        ("/v2/models/double/versions/2/infer", b"{}", 404),
        ("/v2/models/double/infer", None, 405),
    ):
        got, headers, answer = fetch(port, path, body)
        assert (path, got) == (path, status)
        assert "error" in json.loads(answer)
        assert headers["content-type"] == "application/json"


def test_the_documentation_names_every_route(port: int) -> None:
    paths = json.loads(fetch(port, "/openapi.json")[2])["paths"]
    assert {"/v2/models/{model}/infer", "/predict/{model}", "/result/{task}", "/health"} <= paths.keys()
    assert "application/json" in paths["/v2/models/{model}/infer"]["post"]["requestBody"]["content"]
    for path, methods in paths.items():
        for method, operation in methods.items():
            named = {one["name"] for one in operation.get("parameters", []) if one["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path)), (method, path)


def test_a_path_that_leads_nowhere_says_what_to_do(port: int) -> None:
    for path, hint in (("/v3", "/docs"), ("/v2/repository/models/double/load", "admin port")):
        status, _, answer = fetch(port, path, b"{}")
        text = json.loads(answer)["error"]
        assert (status, f"POST {path}" in text, hint in text) == (404, True, True), text


X = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}
HEADER = json.dumps({"inputs": [X]}).encode()
INFER = "/v2/models/double/infer"


def test_raw_sockets_can_send_a_good_request(port: int) -> None:
    header = json.dumps({"inputs": [X], "parameters": {"binary_data_output": True}}).encode()
    body = header + np.ones(4, np.float32).tobytes()
    assert raw(port, post(INFER, body, f"Inference-Header-Content-Length: {len(header)}")).startswith(b"HTTP/1.1 200")
    status, headers, answer = fetch(port, INFER, body, Inference_Header_Content_Length=str(len(header)))
    assert status == 200
    assert headers["content-type"] == "application/octet-stream"
    assert answer[int(headers["inference-header-content-length"]) :] == np.full(4, 2, np.float32).tobytes()


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (HEADER + b"\0" * 15, (f"Inference-Header-Content-Length: {len(HEADER)}",), b"400"),
        (HEADER + b"\0" * 17, (f"Inference-Header-Content-Length: {len(HEADER)}",), b"400"),
        (HEADER + b"\0" * 16, (f"Inference-Header-Content-Length: {len(HEADER) + 1}",), b"400"),
        (HEADER + b"\0" * 16, ("Inference-Header-Content-Length: 999999",), b"400"),
        (HEADER + b"\0" * 16, ("Inference-Header-Content-Length: -1",), b"400"),
        (HEADER + b"\0" * 16, ("Inference-Header-Content-Length: 1_0",), b"400"),
        (HEADER + b"\0" * 16, ("Inference-Header-Content-Length: " + "9" * 500,), b"400"),
        (HEADER + b"\0" * 16, ("Inference-Header-Content-Length: \xb2".encode().decode("latin-1"),), b"400"),
        (HEADER + b"\0" * 16, (), b"400"),
        (b"", (), b"400"),
        (b"\xff\xfe\x00", (), b"400"),
        (b"[" * 100_000, (), b"400"),
        (b'{"inputs": [{"name": "x", "shape": [1' + b"0" * 5000 + b'], "datatype": "FP32", "data": []}]}', (), b"400"),
        (b'{"inputs": [{"name": "x", "shape": [-1, 4], "datatype": "FP32", "data": []}]}', (), b"400"),
        (b"not gzip", ("Content-Encoding: gzip",), b"400"),
        (gzip.compress(HEADER)[:-5], ("Content-Encoding: gzip",), b"400"),
        (zlib.compress(HEADER) + b"more", ("Content-Encoding: deflate",), b"400"),
        (HEADER, ("Content-Encoding: br",), b"400"),
        (gzip.compress(bytes(20 << 20), 9), ("Content-Encoding: gzip",), b"413"),
        (bytes(LIMIT + 1), (), b"413"),
    ],
)
def test_malformed_requests(port: int, body: bytes, headers: tuple[str, ...], status: bytes) -> None:
    answer = raw(port, post(INFER, body, *headers))
    assert answer.split(b" ", 2)[1] == status
    assert fetch(port, "/v2/health/live")[0] == 200


def test_a_body_that_ends_early_harms_nobody(port: int) -> None:
    start = post(INFER, HEADER)[: -len(HEADER) // 2]
    assert not raw(port, start, half_close=True).startswith(b"HTTP/1.1 200")
    assert fetch(port, "/v2/health/live")[0] == 200


def test_a_chunked_body_beyond_the_limit(port: int) -> None:
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head)
        connection.settimeout(10)
        for _ in range(20):
            connection.sendall(chunk)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


class _OneToken:
    def check(self, model: str | None, authorization: str | None) -> None:
        if authorization != f"Bearer for {model}":
            raise Unauthenticated("a token is wanted")


def test_tokens_are_asked_for_by_model(few: Few) -> None:
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
    with running(few, auth=_OneToken()) as (port, _):
        assert fetch(port, "/v2/health/ready")[0] == 200
        for path, data in (
            (INFER, body),
            ("/v2/models/double", None),
            ("/v2/models/double/config", None),
            ("/v2/models/double/stats", None),
            ("/predict/double", b"[1, 2, 3, 4]"),
        ):
            status, headers, _ = fetch(port, path, data)
            assert (path, status, headers.get("www-authenticate")) == (path, 401, "Bearer")
            assert fetch(port, path, data, Authorization="Bearer for pair")[0] == 401
            assert fetch(port, path, data, Authorization="Bearer for double")[0] == 200
        for path in ("/v2/models/stats", "/cache/stats", "/resource/stats"):
            assert fetch(port, path)[0] == 401
            assert fetch(port, path, Authorization="Bearer for None")[0] == 200
