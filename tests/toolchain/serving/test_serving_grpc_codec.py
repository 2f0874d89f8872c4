"""ModelInferRequest and ModelInferResponse, from and to their bytes: held against protobuf's own."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from runtimes import TensorSpec
from toolchain.serving import grpc_codec
from toolchain.serving.base import InvalidRequest, ModelInfo, Request, Response, ServingError, TooLarge, Unsupported

INFO = ModelInfo(
    "m", "1", (TensorSpec("x", "float32", ("N", 2)), TensorSpec("k", "int8", ("N",))),
    (TensorSpec("y", "float32", None), TensorSpec("z", "int64", None)), max_batch_size=8,
)  # fmt: skip
X = np.array([[1.0, 2.0]], np.float32)


def message(**changes: Any) -> Any:
    request = service_pb2.ModelInferRequest(model_name="m", **changes)
    if not request.inputs:
        request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
        request.inputs.add(name="k", datatype="INT8", shape=[1])
    return request


def raw(**changes: Any) -> Any:
    request = message(**changes)
    request.raw_input_contents.extend([X.tobytes(), b"\xfe"])
    return request


def read(request: Any, *, info: ModelInfo = INFO, deadline_ns: int | None = None) -> Request:
    data = request if isinstance(request, bytes) else request.SerializeToString()
    decoder = grpc_codec.Decoder(max_bytes=1 << 20)
    return decoder.read(grpc_codec.split(data), info, received_ns=1000, deadline_ns=deadline_ns)


def test_a_message_apart_is_the_message() -> None:
    request = raw(model_version="1", id="7")
    request.parameters["mine"].string_param = "x"
    request.raw_input_contents[0] = bytes(100_000)
    parts = grpc_codec.split(request.SerializeToString())
    assert (parts.model, parts.version, parts.id) == ("m", "1", "7")
    assert [bytes(data) for data in parts.raw] == list(request.raw_input_contents)
    request.ClearField("raw_input_contents")
    request.ClearField("id")
    assert service_pb2.ModelInferRequest.FromString(parts.header) == request


def test_fields_in_any_order_and_fields_that_nobody_knows() -> None:
    request = raw(id="7")
    head, tail = message(id="7").SerializeToString(), raw().SerializeToString()[len(message().SerializeToString()) :]
    for data in (tail + head, tail + head + b"\xf8\x01\x05", b"\xf8\x01\x05" + tail + head):
        got = read(data)
        assert got.id == "7"
        assert got.inputs["x"].tolist() == [[1, 2]]
        assert got.inputs["k"].tolist() == [-2]
    assert read(request).inputs["k"].tolist() == [-2]


def test_raw_tensors_are_views_of_the_message() -> None:
    # Wherever the data lies in the message, it is read right.
    for pad in range(8):
        request = raw(id="i" * pad)
        assert read(request).inputs["x"].tolist() == [[1, 2]]
        assert read(request).inputs["x"].base is not None


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-128, 127]),
        ("INT16", "int_contents", [-32768, 5]),
        ("INT32", "int_contents", [-(2**31), 5]),
        ("INT64", "int64_contents", [-(2**63), 5]),
        ("UINT8", "uint_contents", [255, 0]),
        ("UINT16", "uint_contents", [65535, 0]),
        ("UINT32", "uint_contents", [2**32 - 1, 0]),
        ("UINT64", "uint64_contents", [2**64 - 1, 0]),
        ("FP32", "fp32_contents", [1.5, float("inf")]),
        ("FP64", "fp64_contents", [0.1, -1e300]),
        ("BYTES", "bytes_contents", [b"a", "ü".encode()]),
    ],
)
def test_typed_contents(datatype: str, field: str, values: list[Any]) -> None:
    dtype = {"BYTES": "string", "FP32": "float32", "FP64": "float64"}.get(datatype, datatype.lower())
    info = ModelInfo("m", "1", (TensorSpec("x", dtype, (1, 2)),), ())
    request = service_pb2.ModelInferRequest(model_name="m")
    item = request.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    getattr(item.contents, field).extend(values)
    got = read(request, info=info).inputs["x"]
    assert got.shape == (1, 2)
    assert got.dtype == (object if dtype == "string" else np.dtype(dtype))
    wanted = [value.decode() if isinstance(value, bytes) else value for value in values]
    assert got.reshape(-1).tolist() == wanted


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("INT8", "int_contents", [128]),
        ("UINT8", "uint_contents", [256]),
        ("FP32", "fp64_contents", [1.0]),
        ("FP32", "fp32_contents", [1.0, 2.0]),
        ("FP16", "fp32_contents", [1.0]),
        ("BYTES", "bytes_contents", [b"\xff"]),
    ],
)
def test_typed_contents_that_do_not_fit(datatype: str, field: str, values: list[Any]) -> None:
    dtype = {"BYTES": "string", "FP32": "float32", "FP16": "float16"}.get(datatype, datatype.lower())
    info = ModelInfo("m", "1", (TensorSpec("x", dtype, (1,)),), ())
    request = service_pb2.ModelInferRequest(model_name="m")
    item = request.inputs.add(name="x", datatype=datatype, shape=[1])
    getattr(item.contents, field).extend(values)
    with pytest.raises(InvalidRequest):
        read(request, info=info)


def test_no_rows_without_a_batch_axis() -> None:
    info = ModelInfo("m", "1", (TensorSpec("x", "float32", (None,)),), ())
    request = service_pb2.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="FP32", shape=[0])
    assert read(request, info=info).inputs["x"].shape == (0,)


def test_parameters_outputs_and_the_sooner_deadline() -> None:
    request = raw()
    request.parameters["priority"].uint64_param = 3
    request.parameters["timeout"].int64_param = 5
    request.outputs.add(name="z")
    got = read(request)
    assert (got.priority, got.deadline_ns, got.outputs) == (3, 6000, ("z",))
    assert read(request, deadline_ns=2000).deadline_ns == 2000
    assert read(request, deadline_ns=10_000).deadline_ns == 6000
    assert read(raw(), deadline_ns=2000).deadline_ns == 2000


def test_a_remembered_header_gets_new_data_and_the_model_that_is_there_now() -> None:
    decoder = grpc_codec.Decoder(max_bytes=1 << 20)

    def again(request: Any, info: ModelInfo = INFO) -> Request:
        parts = grpc_codec.split(request.SerializeToString())
        return decoder.read(parts, info, received_ns=0, deadline_ns=None)

    first, other = raw(id="1"), raw(id="2")
    other.raw_input_contents[0] = (X * 3).tobytes()
    assert [(got.id, got.inputs["x"].tolist()) for got in (again(first), again(other))] == [
        ("1", [[1, 2]]),
        ("2", [[3, 6]]),
    ]
    assert len(decoder._known) == 1
    narrow = ModelInfo("m", "1", (TensorSpec("x", "float32", ("N", 3)), INFO.inputs[1]), ())
    with pytest.raises(InvalidRequest):
        again(first, narrow)


def _twice(request: Any) -> None:
    request.inputs.append(request.inputs[0])


def _contents_beside_raw(request: Any) -> None:
    request.inputs[0].contents.fp32_contents.extend([1, 2])


@pytest.mark.parametrize(
    "change",
    [
        lambda request: request.raw_input_contents.pop(),
        lambda request: request.raw_input_contents.append(b""),
        lambda request: request.raw_input_contents.__setitem__(0, b"123"),
        lambda request: request.ClearField("raw_input_contents"),
        lambda request: request.ClearField("inputs"),
        _twice,
        _contents_beside_raw,
        lambda request: request.inputs[0].shape.__setitem__(0, -1),
        lambda request: request.inputs[0].shape.__setitem__(0, 2**62),
        lambda request: request.inputs[0].shape.append(1),
        lambda request: setattr(request.inputs[0], "datatype", "FP64"),
        lambda request: setattr(request.inputs[0], "name", "nope"),
        lambda request: request.outputs.add(name="nope"),
        lambda request: request.parameters["priority"].MergeFrom(service_pb2.InferParameter(string_param="x")),
    ],
)
def test_malformed(change: Any) -> None:
    request = raw()
    change(request)
    with pytest.raises(InvalidRequest):
        read(request)


def test_sequences_and_shared_memory_are_not_served() -> None:
    request = raw()
    request.parameters["sequence_id"].int64_param = 1
    with pytest.raises(Unsupported):
        read(request)
    request = message()
    request.inputs[0].parameters["shared_memory_region"].string_param = "r"
    with pytest.raises(Unsupported):
        read(request)


def test_too_large() -> None:
    info = ModelInfo("m", "1", (TensorSpec("x", "float32", (None,)),), ())
    request = service_pb2.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="FP32", shape=[1 << 40])
    with pytest.raises(TooLarge):
        read(request, info=info)


def test_no_bytes_whatever_end_in_anything_but_an_error_of_serving() -> None:
    chance = random.Random(0)
    good = raw(id="7", model_version="1").SerializeToString()
    for _ in range(5000):
        data = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            kind = chance.random()
            at = chance.randrange(len(data) or 1)
            if kind < 0.5 and data:
                data[at] = chance.randrange(256)
            elif kind < 0.75:
                del data[at:]
            else:
                data[at:at] = chance.randbytes(chance.randint(1, 12))
        try:
            read(bytes(data))
        except ServingError:
            continue


@pytest.mark.parametrize("identifier", ["", "7", "i" * 300])
def test_an_answer_is_the_message(identifier: str) -> None:
    outputs = {
        "y": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "t": np.array(["a", "ü"], object),
        "none": np.zeros((0, 2), np.int64),
        "large": np.zeros(100_000, np.uint8),
    }
    encoder = grpc_codec.Encoder()
    for _ in range(2):
        got = service_pb2.ModelInferResponse.FromString(encoder.write(Response("m", "2", outputs, identifier)))
        assert (got.model_name, got.model_version, got.id) == ("m", "2", identifier)
        assert [(out.name, out.datatype, list(out.shape)) for out in got.outputs] == [
            ("y", "FP32", [3, 2]), ("t", "BYTES", [2]), ("none", "INT64", [0, 2]), ("large", "UINT8", [100_000]),
        ]  # fmt: skip
        assert list(got.raw_output_contents) == [
            outputs["y"].tobytes(), b"\1\0\0\0a\2\0\0\0\xc3\xbc", b"", bytes(100_000),
        ]  # fmt: skip


def test_answers_of_a_stream() -> None:
    answer = grpc_codec.Encoder().write(Response("m", "1", {"y": X}, "7"))
    got = service_pb2.ModelStreamInferResponse.FromString(grpc_codec.stream_answer(answer))
    assert got.error_message == ""
    assert got.infer_response.id == "7"
    assert got.infer_response.raw_output_contents[0] == X.tobytes()
    wrong = service_pb2.ModelStreamInferResponse.FromString(grpc_codec.stream_error("bad ü", "8"))
    assert (wrong.error_message, wrong.infer_response.id) == ("bad ü", "8")
