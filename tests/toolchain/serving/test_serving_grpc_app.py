"""Open Inference Protocol over gRPC, with Triton's own clients and with bare messages."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Iterator
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from standin import NUMERIC, Few, running
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

from toolchain.serving import grpc_app
from toolchain.serving.base import DeadlineExceeded, Overloaded, Unauthenticated
from toolchain.serving.options import ServerOptions


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Few:
    return Few(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def address(few: Few) -> Iterator[str]:
    with running(few, ServerOptions(max_request_bytes=1 << 20)) as (_, port):
        yield f"127.0.0.1:{port}"


@pytest.fixture
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as made:
        yield made


@pytest.fixture
def stub(address: str) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def given(name: str, array: np.ndarray) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("double")
    metadata = client.get_server_metadata(as_json=True)
    assert metadata["extensions"] == [
        "binary_tensor_data", "model_configuration", "parameters", "schedule_policy", "statistics",
    ]  # fmt: skip
    model = client.get_model_metadata("pair")
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in model.inputs] == [
        ("a", "INT32", [-1, -1]), ("b", "INT32", [-1, -1]),
    ]  # fmt: skip
    assert [tensor.name for tensor in model.outputs] == ["total", "less"]
    assert client.get_model_config("pair").config.max_batch_size == 8
    assert "double" in {model.name for model in client.get_model_repository_index().models}


@pytest.mark.parametrize("name", NUMERIC)
def test_every_numeric_dtype(client: triton.InferenceServerClient, name: str) -> None:
    dtype = ml_dtypes.bfloat16 if name == "BF16" else triton_to_np_dtype(name)
    array = np.array([[0, 1, 1], [1, 0, 1]] if name == "BOOL" else [[0, 1, 2], [100, 101, 102]], dtype)
    got = client.infer(f"copy_{name.lower()}", [given("x", array)], request_id="5")
    assert got.get_response().id == "5"
    assert got.as_numpy("y").dtype == dtype
    np.testing.assert_array_equal(got.as_numpy("y"), array)


def test_strings(client: triton.InferenceServerClient) -> None:
    got = client.infer("words", [given("s", np.array(["a", "grün", ""], object))])
    assert [t.decode() for t in got.as_numpy("t")] == ["aa", "grüngrün", ""]
    with pytest.raises(InferenceServerException, match="BYTES, and the model takes FP32") as caught:
        client.infer("double", [given("x", np.array([["a"] * 4], object))])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_several_outputs_versions_and_compression(client: triton.InferenceServerClient) -> None:
    a, b = np.array([[5, 7]], np.int32), np.array([[1, 2]], np.int32)
    inputs = [given("b", b), given("a", a)]
    got = client.infer("pair", inputs)
    np.testing.assert_array_equal(got.as_numpy("total"), a + b)
    np.testing.assert_array_equal(got.as_numpy("less"), a - b)
    wanted = [triton.InferRequestedOutput("less"), triton.InferRequestedOutput("total")]
    got = client.infer("pair", inputs, model_version="1", outputs=wanted, compression_algorithm="gzip")
    assert [output.name for output in got.get_response().outputs] == ["less", "total"]
    np.testing.assert_array_equal(got.as_numpy("less"), a - b)


def test_async_infer_and_the_asyncio_client(client: triton.InferenceServerClient, address: str) -> None:
    arrays = [np.full((1, 4), number, np.float32) for number in range(20)]
    done: queue.Queue[tuple[Any, Any]] = queue.Queue()
    for number, array in enumerate(arrays):
        client.async_infer(
            "double", [given("x", array)], lambda result, error: done.put((result, error)), request_id=str(number)
        )
    for _ in arrays:
        result, error = done.get(timeout=20)
        assert error is None
        np.testing.assert_array_equal(result.as_numpy("y"), arrays[int(result.get_response().id)] * 2)

    async def run() -> list[Any]:
        async with triton_aio.InferenceServerClient(address) as aio:
            return list(await asyncio.gather(*(aio.infer("double", [given("x", array)]) for array in arrays)))

    for array, got in zip(arrays, asyncio.run(run()), strict=True):
        np.testing.assert_array_equal(got.as_numpy("y"), array * 2)


def test_a_stream_answers_each_request_in_order_and_goes_on_after_an_error(
    client: triton.InferenceServerClient,
) -> None:
    done: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: done.put((result, error)))
    for number in range(300):
        model = "nope" if number == 5 else "double"
        array = np.full((1, 4), number, np.float32)
        client.async_stream_infer(model, [given("x", array)], request_id=str(number))
    answers = [done.get(timeout=20) for _ in range(300)]
    client.stop_stream()
    for number, (result, error) in enumerate(answers):
        if number == 5:
            assert result is None
            assert "nope" in str(error)
        else:
            assert error is None
            assert result.get_response().id == str(number)
            assert result.as_numpy("y")[0, 0] == 2 * number


def test_the_asyncio_client_streams(address: str) -> None:
    async def requests() -> Any:
        for number in range(10):
            yield {"model_name": "double", "inputs": [given("x", np.full((1, 4), number, np.float32))]}

    async def run() -> list[float]:
        async with triton_aio.InferenceServerClient(address) as aio:
            return [
                float(result.as_numpy("y")[0, 0]) async for result, error in aio.stream_infer(requests()) if not error
            ]

    assert asyncio.run(run()) == [2.0 * number for number in range(10)]


def test_a_stream_that_is_left_harms_nobody(few: Few, client: triton.InferenceServerClient, address: str) -> None:
    few.delay = 0.2
    try:
        with triton.InferenceServerClient(address) as leaving:
            leaving.start_stream(lambda result, error: None)
            for _ in range(20):
                leaving.async_stream_infer("double", [given("x", np.zeros((1, 4), np.float32))])
            leaving.stop_stream(cancel_requests=True)
    finally:
        few.delay = 0.0
    assert client.infer("double", [given("x", np.ones((1, 4), np.float32))]).as_numpy("y")[0, 0] == 2


def test_statistics(client: triton.InferenceServerClient) -> None:
    before = client.get_inference_statistics("half").model_stats[0]
    client.infer("half", [given("x", np.zeros((3, 2), np.float32))])
    (after,) = client.get_inference_statistics("half", "1").model_stats
    assert after.inference_count - before.inference_count == 3
    assert after.inference_stats.success.count - before.inference_stats.success.count == 1
    assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
    assert [batch.batch_size for batch in after.batch_stats] == [3]
    assert len(client.get_inference_statistics().model_stats) > 10


def test_deadline_priority_and_timeout_reach_the_model(few: Few, client: triton.InferenceServerClient) -> None:
    inputs = [given("x", np.zeros((1, 4), np.float32))]
    few.seen.clear()
    before = time.monotonic_ns()
    client.infer("double", inputs)
    client.infer("double", inputs, priority=2, timeout=1_000_000)
    client.infer("double", inputs, timeout=60_000_000, client_timeout=5.0)
    none, by_timeout, by_deadline = few.seen
    assert (none.deadline_ns, none.priority) == (None, 0)
    assert by_timeout.priority == 2
    assert by_timeout.deadline_ns is not None
    assert by_deadline.deadline_ns is not None
    assert 0 < by_timeout.deadline_ns - before - 1_000_000_000 < 1_000_000_000
    assert 4_000_000_000 < by_deadline.deadline_ns - before < 6_000_000_000


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Overloaded("full", hint="later"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (RuntimeError("a secret path"), grpc.StatusCode.INTERNAL),
    ],
)
def test_errors_of_the_model(
    few: Few, client: triton.InferenceServerClient, error: Exception, status: grpc.StatusCode
) -> None:
    few.fails = error
    try:
        with pytest.raises(InferenceServerException) as caught:
            client.infer("double", [given("x", np.zeros((1, 4), np.float32))])
    finally:
        few.fails = None
    assert caught.value.status() == str(status)
    assert "secret" not in str(caught.value.message())
    assert isinstance(error, RuntimeError) or str(caught.value.message()).startswith(str(error.args[0]))


def test_unknown_names(client: triton.InferenceServerClient) -> None:
    for call in (
        lambda: client.get_model_metadata("nope"),
        lambda: client.get_model_config("nope"),
        lambda: client.get_inference_statistics("nope"),
        lambda: client.is_model_ready("nope"),
        lambda: client.infer("nope", [given("x", np.zeros((1, 4), np.float32))]),
        lambda: client.infer("double", [given("x", np.zeros((1, 4), np.float32))], model_version="3"),
    ):
        with pytest.raises(InferenceServerException) as caught:
            call()
        assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_every_other_call_says_that_it_is_not_served(client: triton.InferenceServerClient) -> None:
    for call, why in (
        (lambda: client.load_model("double"), "admin port"),
        (lambda: client.unload_model("double"), "admin port"),
        (client.get_system_shared_memory_status, "--shared-memory"),
        (client.get_cuda_shared_memory_status, "is not served"),
        (client.get_trace_settings, "is not served"),
        (client.get_log_settings, "is not served"),
    ):
        with pytest.raises(InferenceServerException, match=why) as caught:
            call()
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def test_bytes_that_are_no_message(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for data in (b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x7f", b"\x0a\x01\xff", b"\x0a\x06double\x2a\x03\x0a\x05x"):
            with pytest.raises(grpc.RpcError) as caught:
                infer(data, timeout=10)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, data
        with pytest.raises(grpc.RpcError) as caught:
            infer(b"", timeout=10)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        (answer,) = list(stream(iter([b"\xff" * 9]), timeout=10))
        assert service_pb2.ModelStreamInferResponse.FromString(answer).error_message


def test_typed_contents(stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
    request = service_pb2.ModelInferRequest(model_name="double")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4]).contents.fp32_contents.extend([1, 2, 3, 4])
    answer = stub.ModelInfer(request, timeout=10)
    assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [2, 4, 6, 8]


class _OneToken:
    def check(self, model: str | None, authorization: str | None) -> None:
        if authorization != f"Bearer for {model}":
            raise Unauthenticated("a token is wanted")


def test_tokens_are_asked_for_by_model(few: Few) -> None:
    inputs = [given("x", np.zeros((1, 4), np.float32))]
    with running(few, auth=_OneToken()) as (_, port), triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert client.is_server_ready()
        for headers in (None, {"authorization": "Bearer for pair"}):
            for call in (
                lambda headers=headers: client.infer("double", inputs, headers=headers),
                lambda headers=headers: client.get_model_config("double", headers=headers),
                lambda headers=headers: client.get_model_repository_index(headers=headers),
            ):
                with pytest.raises(InferenceServerException) as caught:
                    call()
                assert caught.value.status() == "StatusCode.UNAUTHENTICATED"
        good = {"authorization": "Bearer for double"}
        assert client.infer("double", inputs, headers=good).as_numpy("y").shape == (1, 4)
        assert client.get_model_config("double", headers=good).config.name == "double"


def test_an_open_stream_ends_when_the_server_drains(few: Few) -> None:
    async def main() -> None:
        server = grpc.aio.server()
        servicer = grpc_app.make_servicer(few, options=ServerOptions())
        servicer.add_to(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        request = service_pb2.ModelInferRequest(model_name="double")
        request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        request.raw_input_contents.append(np.ones((1, 4), np.float32).tobytes())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stream = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()
            await stream.write(request)
            answered = await stream.read()
            assert answered.infer_response.outputs[0].name == "y"
            servicer.drain()
            async with asyncio.timeout(10):
                await server.stop(60)
                assert await stream.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(main())


def test_the_bytes_of_all_requests_together_are_bounded_and_what_is_refused_is_counted(
    few: Few, client: triton.InferenceServerClient
) -> None:
    counts = few.all_statistics()["double", "1"]
    before = counts.failures["OTHER"]
    with pytest.raises(InferenceServerException, match="takes"):
        client.infer("double", [given("x", np.zeros((1, 5), np.float32))])
    assert counts.failures["OTHER"] == before + 1
    with running(few, ServerOptions(max_in_flight_bytes=100)) as (_, port):
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as small:
            for _ in range(5):
                small.infer("double", [given("x", np.zeros((1, 4), np.float32))])
            with pytest.raises(InferenceServerException, match="being handled") as caught:
                small.infer("double", [given("x", np.zeros((8, 4), np.float32))])
            assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
