"""Bodies of inference requests over REST, read and written."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from runtimes import TensorSpec
from toolchain.serving import oip_json
from toolchain.serving.base import InvalidRequest, ModelInfo, Request, Response, ServingError, TooLarge, Unsupported

X = TensorSpec("x", "float32", ("N", 2))
INFO = ModelInfo("m", "1", (X,), (TensorSpec("y", "float32", ("N", 2)),), max_batch_size=8)
TWO = ModelInfo(
    "two", "1", (X, TensorSpec("k", "int8", (3,))), (TensorSpec("y", "float32", None), TensorSpec("z", "int64", None))
)
HALF = ModelInfo("half", "1", (TensorSpec("h", "float16", (2,)),), (TensorSpec("y", "float16", (2,)),))
WORDS = ModelInfo("w", "1", (TensorSpec("s", "string", (1,)),), (TensorSpec("t", "string", (1,)),))
ROW = np.array([[1.0, 2.0]], np.float32)


def read(
    tree: object, data: bytes = b"", *, info: ModelInfo = INFO, size: int | None = -1, version: str = ""
) -> tuple[Request, frozenset[str]]:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    if size == -1:
        size = len(text) if data else None
    decoder = oip_json.Decoder(max_bytes=1 << 20)
    return decoder.read(text + data, size, info, version=version, received_ns=1000)


def one(**changes: Any) -> dict[str, Any]:
    """An input "x" with JSON data, changed."""
    entry = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]} | changes
    return {name: value for name, value in entry.items() if value is not ...}


def binary(size: Any = 8, **changes: Any) -> dict[str, Any]:
    return one(data=..., parameters={"binary_data_size": size}, **changes)


def test_json_and_binary_are_the_same_request() -> None:
    for request, _ in (read({"inputs": [one()]}), read({"inputs": [binary()]}, ROW.tobytes())):
        assert (request.model, request.version, request.received_ns, request.deadline_ns) == ("m", "", 1000, None)
        assert list(request.inputs) == ["x"]
        np.testing.assert_array_equal(request.inputs["x"], ROW)
        assert request.inputs["x"].dtype == np.float32


def test_mixed_binary_and_json_inputs_in_any_order() -> None:
    k = {"name": "k", "shape": [3], "datatype": "INT8", "parameters": {"binary_data_size": 3}}
    for inputs in ([k, one()], [one(), k]):
        request, _ = read({"inputs": inputs}, b"\1\2\xff", info=TWO)
        assert request.inputs["k"].tolist() == [1, 2, -1]
        assert request.inputs["x"].tolist() == [[1, 2]]
    request, _ = read({"inputs": [k, binary()]}, b"\1\2\3" + ROW.tobytes(), info=TWO)
    assert request.inputs["k"].tolist() == [1, 2, 3]
    assert request.inputs["x"].tolist() == [[1, 2]]


def test_id_priority_timeout_and_outputs() -> None:
    tree = {
        "id": "7",
        "inputs": [one(), {"name": "k", "shape": [3], "datatype": "INT8", "data": [1, 2, 3]}],
        "outputs": [{"name": "z", "parameters": {"binary_data": True}}, {"name": "y"}],
        "parameters": {"priority": 2, "timeout": 5, "mine": [1]},
    }
    request, wanted = read(tree, info=TWO, version="1")
    assert (request.id, request.priority, request.deadline_ns, request.version) == ("7", 2, 6000, "1")
    assert request.outputs == ("z", "y")
    assert wanted == {"z"}


@pytest.mark.parametrize(
    ("parameters", "outputs", "wanted"),
    [
        ({}, None, set()),
        ({}, [], set()),
        ({"binary_data_output": True}, None, {"y", "z"}),
        ({"binary_data_output": True}, [{"name": "z"}], {"z"}),
        ({"binary_data_output": True}, [{"name": "z", "parameters": {"binary_data": False}}, {"name": "y"}], {"y"}),
        ({"binary_data_output": False}, [{"name": "y", "parameters": {"binary_data": True}}], {"y"}),
    ],
)
def test_which_outputs_are_binary(parameters: dict[str, Any], outputs: list[Any] | None, wanted: set[str]) -> None:
    k = {"name": "k", "shape": [3], "datatype": "INT8", "data": [1, 2, 3]}
    tree: dict[str, Any] = {"inputs": [one(), k], "parameters": parameters}
    if outputs is not None:
        tree["outputs"] = outputs
    assert read(tree, info=TWO)[1] == wanted


def test_a_remembered_header_gets_new_data_and_the_model_that_is_there_now() -> None:
    decoder = oip_json.Decoder(max_bytes=1 << 20)
    text = json.dumps({"inputs": [binary()], "parameters": {"timeout": 1}}).encode()
    first, _ = decoder.read(text + ROW.tobytes(), len(text), INFO, version="", received_ns=0)
    second, _ = decoder.read(text + (ROW * 3).tobytes(), len(text), INFO, version="1", received_ns=500)
    assert first.inputs["x"].tolist() == [[1, 2]]
    assert second.inputs["x"].tolist() == [[3, 6]]
    assert (first.deadline_ns, second.deadline_ns, second.version) == (1000, 1500, "1")
    # The same name and version, loaded anew with another shape.
    other = ModelInfo("m", "1", (TensorSpec("x", "float32", ("N", 3)),), INFO.outputs, max_batch_size=8)
    with pytest.raises(InvalidRequest, match="shape"):
        decoder.read(text + ROW.tobytes(), len(text), other, version="", received_ns=0)


def test_many_headers_are_not_kept_for_ever() -> None:
    decoder = oip_json.Decoder(max_bytes=1 << 20)
    for number in range(1000):
        text = json.dumps({"id": str(number), "inputs": [binary()]}).encode()
        assert decoder.read(text + ROW.tobytes(), len(text), INFO, version="", received_ns=0)[0].id == str(number)
    assert len(decoder._known) <= 256


def test_a_body_without_json() -> None:
    request, wanted = read(b"", ROW.tobytes(), size=0)
    assert request.inputs["x"].tolist() == [[1, 2]]
    assert wanted == {"y"}
    long = ModelInfo("m", "1", (TensorSpec("x", "float32", ("N", "T", 2)),), INFO.outputs, max_batch_size=4)
    assert read(b"", ROW.tobytes() * 5, size=0, info=long)[0].inputs["x"].shape == (1, 5, 2)
    assert read(b"", b"\2\0\0\0hi", size=0, info=WORDS)[0].inputs["s"].tolist() == ["hi"]


@pytest.mark.parametrize(
    ("data", "info"),
    [
        (b"1234567", INFO),
        (b"", INFO),
        (ROW.tobytes() * 2, INFO),
        (ROW.tobytes(), TWO),
        (ROW.tobytes(), ModelInfo("m", "1", (TensorSpec("x", "float32", (None, None)),), ())),
        (ROW.tobytes(), ModelInfo("m", "1", (TensorSpec("x", "float32", None),), ())),
        (b"", ModelInfo("m", "1", (TensorSpec("x", "float32", (0, None)),), ())),
    ],
)
def test_a_body_without_json_that_does_not_fit(data: bytes, info: ModelInfo) -> None:
    with pytest.raises(InvalidRequest):
        read(b"", data, size=0, info=info)


@pytest.mark.parametrize(
    ("tree", "data"),
    [
        (b"", b""),
        (b"{", b""),
        (b"[" * 100_000, b""),
        (b'{"inputs": ' + b"[" * 100 + b"]" * 100 + b"}", b""),
        (b'{"inputs": [{"name": "x\xff"}]}', b""),
        (b'{"id": "\\ud800", "inputs": []}', b""),
        (b'{"inputs": [{"name":"x","shape":[1,2],"datatype":"FP32","data":[NaN,1]}]}', b""),
        (b'{"inputs": [{"name":"x","shape":[1,2],"datatype":"FP32","data":[1e999,1]}]}', b""),
        (b'{"inputs": [{"name":"x","shape":[1,2],"datatype":"FP32","data":[1' + b"0" * 5000 + b",1]}]}", b""),
        ([], b""),
        (None, b""),
        ({}, b""),
        ({"inputs": {}}, b""),
        ({"inputs": []}, b""),
        ({"inputs": [1]}, b""),
        ({"inputs": [{}]}, b""),
        ({"inputs": [one(name=1)]}, b""),
        ({"inputs": [one(name="other")]}, b""),
        ({"inputs": [one(), one()]}, b""),
        ({"inputs": [one(shape=...)]}, b""),
        ({"inputs": [one(shape="1")]}, b""),
        ({"inputs": [one(shape=[1.0, 2])]}, b""),
        ({"inputs": [one(shape=[True, 2])]}, b""),
        ({"inputs": [one(shape=[-1, 2])]}, b""),
        ({"inputs": [one(shape=[1 << 62, 2])]}, b""),
        ({"inputs": [one(shape=[10**40, 2])]}, b""),
        ({"inputs": [one(shape=[1] * 1000)]}, b""),
        ({"inputs": [one(shape=[0, 2], data=[])]}, b""),
        ({"inputs": [one(shape=[9, 2], data=[0.0] * 18)]}, b""),
        ({"inputs": [one(datatype=...)]}, b""),
        ({"inputs": [one(datatype="FP64")]}, b""),
        ({"inputs": [one(datatype="nonsense")]}, b""),
        ({"inputs": [one(data=...)]}, b""),
        ({"inputs": [one(parameters=[])]}, b""),
        ({"inputs": [one(parameters={"binary_data_size": 8})]}, ROW.tobytes()),
        ({"inputs": [binary()]}, b""),
        ({"inputs": [binary()]}, b"1234"),
        ({"inputs": [binary()]}, b"123456789"),
        ({"inputs": [binary(4)]}, b"1234"),
        ({"inputs": [binary(-8)]}, ROW.tobytes()),
        ({"inputs": [binary(True)]}, b"1"),
        ({"inputs": [binary("8")]}, ROW.tobytes()),
        ({"inputs": [binary(1 << 70)]}, ROW.tobytes()),
        ({"inputs": [one()]}, b"more"),
        ({"inputs": [one()], "outputs": {}}, b""),
        ({"inputs": [one()], "outputs": "y"}, b""),
        ({"inputs": [one()], "outputs": [{"name": "nope"}]}, b""),
        ({"inputs": [one()], "outputs": [{"name": "y"}, {"name": "y"}]}, b""),
        ({"inputs": [one()], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, b""),
        ({"inputs": [one()], "parameters": 5}, b""),
        ({"inputs": [one()], "parameters": {"binary_data_output": "yes"}}, b""),
        ({"inputs": [one()], "parameters": {"priority": -1}}, b""),
        ({"inputs": [one()], "id": 5}, b""),
    ],
)
def test_malformed(tree: object, data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read(tree, data)


@pytest.mark.parametrize("size", [-5, 10_000, 5])
def test_a_header_size_that_lies(size: int) -> None:
    with pytest.raises(InvalidRequest):
        read({"inputs": [binary()]}, ROW.tobytes(), size=size)


def test_a_shape_beyond_the_limit_is_refused_before_anything_is_made() -> None:
    free = ModelInfo("m", "1", (TensorSpec("x", "float32", (None,)),), ())
    with pytest.raises(TooLarge):
        read({"inputs": [one(shape=[1 << 40])]}, info=free)


def test_json_beyond_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oip_json, "MAX_JSON_BYTES", 1000)
    with pytest.raises(TooLarge, match="binary"):
        read({"inputs": [one()], "id": "x" * 2000})


@pytest.mark.parametrize(
    "tree",
    [
        {"inputs": [one()], "parameters": {"sequence_id": 5}},
        {"inputs": [one(data=..., parameters={"shared_memory_region": "a"})]},
        {"inputs": [one()], "outputs": [{"name": "y", "parameters": {"classification": 3}}]},
        {"inputs": [one()], "outputs": [{"name": "y", "parameters": {"shared_memory_region": "a"}}]},
    ],
)
def test_extensions_that_are_not_served(tree: dict[str, Any]) -> None:
    with pytest.raises(Unsupported):
        read(tree)


def test_half_precision_has_no_json_form() -> None:
    h: dict[str, Any] = {"name": "h", "shape": [2], "datatype": "FP16"}
    raw = h | {"parameters": {"binary_data_size": 4}}
    both = {"parameters": {"binary_data_output": True}}
    with pytest.raises(InvalidRequest, match=r"'h' is FP16.*JSON"):
        read({"inputs": [h | {"data": [1.0, 2.0]}], **both}, info=HALF)
    # Said before the model runs.
    with pytest.raises(InvalidRequest, match=r"'y' is FP16.*JSON"):
        read({"inputs": [raw]}, b"1234", info=HALF)
    assert read({"inputs": [raw], **both}, b"1234", info=HALF)[1] == {"y"}


def test_every_error_has_a_status_below_500_or_501() -> None:
    for kind in (InvalidRequest, TooLarge, Unsupported):
        assert issubclass(kind, ServingError)
        assert kind.http < 500 or kind.http == 501


def test_no_body_whatever_ends_in_anything_but_an_error_of_serving() -> None:
    chance = random.Random(0)
    k = {"name": "k", "shape": [3], "datatype": "INT8", "parameters": {"binary_data_size": 3}}
    tree = {"id": "7", "inputs": [one(), k], "outputs": [{"name": "z", "parameters": {"binary_data": True}}]}
    text = json.dumps(tree | {"parameters": {"priority": 1, "timeout": 5}}).encode()
    values = [b"null", b"-1", b"1e400", b"[]", b"{}", b'""', b"true", b"99999999999999999999", b"0.5", b"[[[]]]"]
    outcomes = set()
    decoder = oip_json.Decoder(max_bytes=1 << 20)
    for _ in range(5000):
        body = bytearray(text)
        size = len(text)
        for _ in range(chance.randint(1, 2)):
            at = chance.randrange(len(body))
            kind = chance.random()
            if kind < 0.3:
                body[at] = chance.randrange(256)
            elif kind < 0.8:
                # A whole value by another: what is still JSON goes deeper than what is not.
                starts = [i + 1 for i, byte in enumerate(body) if byte in b":[,"]
                start = chance.choice(starts)
                end = next((i for i in range(start, len(body)) if body[i] in b",]}"), len(body))
                body[start:end] = chance.choice(values)
                size = len(body)
            else:
                size = chance.randrange(len(body) + 2)
        try:
            decoder.read(bytes(body) + b"\1\2\3", size, TWO, version="", received_ns=0)
            outcomes.add(None)
        except ServingError as error:
            outcomes.add(type(error))
    assert {None, InvalidRequest} <= outcomes


def test_an_answer_in_json() -> None:
    outputs = {"y": np.array([[1.5, np.nan], [np.inf, -np.inf]], np.float32), "t": np.array(["a", "ü"], object)}
    body, size = oip_json.Encoder().write(Response("m", "2", outputs, 'an "id"'), frozenset())
    assert size is None
    # Numbers that JSON lacks are written as Triton writes them: its clients read them, as Python does.
    tree = json.loads(body)
    assert (tree["model_name"], tree["model_version"], tree["id"]) == ("m", "2", 'an "id"')
    y, t = tree["outputs"]
    assert (y["name"], y["datatype"], y["shape"]) == ("y", "FP32", [2, 2])
    np.testing.assert_array_equal(np.array(y["data"], np.float32), outputs["y"].reshape(-1))
    assert (t["datatype"], t["data"]) == ("BYTES", ["a", "ü"])


def test_an_answer_with_binary_data() -> None:
    y, z = np.arange(3, dtype=np.int16), np.array([2.5], np.float16)
    body, size = oip_json.Encoder().write(Response("m", "1", {"y": y, "j": y, "z": z}), frozenset({"y", "z"}))
    assert size is not None
    tree = json.loads(body[:size])
    assert "id" not in tree
    assert [output.get("parameters", {}).get("binary_data_size") for output in tree["outputs"]] == [6, None, 2]
    assert tree["outputs"][1]["data"] == [0, 1, 2]
    assert body[size:] == y.tobytes() + z.tobytes()


def test_what_is_remembered_of_answers_is_never_wrong() -> None:
    encoder = oip_json.Encoder()
    answers = [
        Response("m", "1", {"y": np.ones((1, 2), np.float32)}, "1"),
        Response("m", "1", {"y": np.ones((1, 2), np.float32)}),
        Response("m", "1", {"y": np.zeros((1, 2), np.float32)}, "2"),
        Response("m", "2", {"y": np.ones((1, 2), np.float32)}),
        Response("m", "1", {"y": np.ones((2, 1), np.float32)}),
        Response("m", "1", {"y": np.ones((1, 2), np.int32)}),
        Response("m", "1", {"y": np.array([["a", "b"]], object)}),
        Response("m", "1", {"y": np.array([["a", "longer"]], object)}),
    ]
    for answer in answers * 2:
        body, size = encoder.write(answer, frozenset({"y"}))
        assert (body, size) == oip_json.Encoder().write(answer, frozenset({"y"}))
        assert size is not None
        tree = json.loads(body[:size])
        assert (tree["model_version"], tree.get("id", "")) == (answer.version, answer.id)
        (output,) = tree["outputs"]
        assert output["shape"] == list(answer.outputs["y"].shape)
        assert output["parameters"]["binary_data_size"] == len(body) - size


def test_long_answers_are_written_in_pieces_and_read_as_one() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 1 << 16, (1 << 16) + 1, 200_000):
        array = rng.standard_normal((1, size)).astype(np.float32)
        response = Response("m", "1", {"y": array, "z": np.zeros(3, np.int8)}, "7")
        text, header = oip_json.Encoder().write(response, frozenset())
        assert header is None
        tree = json.loads(text)
        assert (tree["model_name"], tree["id"]) == ("m", "7")
        assert tree["outputs"][0]["shape"] == [1, size]
        assert np.array_equal(np.array(tree["outputs"][0]["data"], np.float32), array[0])
        assert oip_json.is_long(response, frozenset()) == (size >= 1 << 16)
        assert not oip_json.is_long(response, frozenset({"y"}))
