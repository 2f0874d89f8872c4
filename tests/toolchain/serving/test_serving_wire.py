"""Tensors as bytes and as JSON numbers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tritonclient import utils as triton

from runtimes import TensorSpec
from toolchain.serving import wire
from toolchain.serving.base import InvalidRequest, Overloaded, Unsupported


@pytest.mark.parametrize(
    "array",
    [
        np.array([[True, False, True]]),
        np.array([[-1, 2], [3, -4]], np.int8),
        np.array([1, 65535], np.uint16),
        np.array([2**64 - 1], np.uint64),
        np.array([[1.5], [np.nan], [-np.inf]], np.float32),
        np.array([0.1], np.float16),
        np.array([0.1, 3e38], ml_dtypes.bfloat16),
        np.zeros((0, 4), np.float64),
        np.array(7, np.int64),
    ],
    ids=lambda array: array.dtype.name,
)
def test_bytes_there_and_back(array: np.ndarray) -> None:
    name = wire.name_of(array.dtype)
    assert name == triton.np_to_triton_dtype(array.dtype)
    raw = bytes(wire.to_bytes(array))
    assert raw == array.tobytes()
    back = wire.from_bytes("x", name, array.shape, memoryview(raw))
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_bytes_are_not_copied_wherever_they_lie() -> None:
    body = memoryview(bytearray(4 * 4 + 1))
    for start in (0, 1):
        view = wire.from_bytes("x", "FP32", (4,), body[start : start + 16])
        assert view.ctypes.data == np.frombuffer(body, np.uint8).ctypes.data + start


def test_a_transposed_tensor_is_written_row_by_row() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3).T
    assert bytes(wire.to_bytes(array)) == np.ascontiguousarray(array).tobytes()


def test_strings_are_those_of_tritonclient() -> None:
    array = np.array([["a", ""], ["grün", "0\0"]], object)
    raw = bytes(wire.to_bytes(array))
    assert raw == triton.serialize_byte_tensor(array).item()
    np.testing.assert_array_equal(wire.from_bytes("s", "BYTES", (2, 2), memoryview(raw)), array)


@pytest.mark.parametrize(
    ("count", "raw", "why"),
    [
        (2, b"\1\0\0\0a", "too few"),
        (1, b"\2\0\0\0a", "longer than"),
        (1, b"\xff\xff\xff\xff", "longer than"),
        (1, b"\1\0\0\0ab", "1 bytes after"),
        (1, b"\1\0\0\0\xff", "UTF-8"),
        (2, b"\5\0\0\0abcde", "ends before"),
        (1 << 40, b"\0\0\0\0", "too few"),
    ],
)
def test_strings_that_lie(count: int, raw: bytes, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        wire.from_bytes("s", "BYTES", (count,), memoryview(raw))


def test_a_bool_is_zero_or_one() -> None:
    with pytest.raises(InvalidRequest, match="neither 0 nor 1"):
        wire.from_bytes("x", "BOOL", (3,), memoryview(b"\0\1\2"))


def test_too_few_bytes() -> None:
    with pytest.raises(InvalidRequest, match="takes 16"):
        wire.from_bytes("x", "FP32", (4,), memoryview(b"123"))


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "expected"),
    [
        ("FP32", (2, 2), [[1, 2.5], [3, 4]], [[1, 2.5], [3, 4]]),
        ("FP32", (2, 2), [1, 2.5, 3, 4], [[1, 2.5], [3, 4]]),
        ("INT8", (2,), [-128, 127], [-128, 127]),
        ("UINT64", (1,), [2**64 - 1], [2**64 - 1]),
        ("BOOL", (2,), [True, False], [True, False]),
        ("BYTES", (2,), ["a\0", "ü"], ["a\0", "ü"]),
        ("FP32", (2, 0), [[], []], [[], []]),
        ("FP32", (0,), [], []),
        ("FP32", (), [3], 3),
        ("FP32", None, 3, 3),
        ("FP16", None, [[1.5]], [[1.5]]),
    ],
)
def test_numbers(datatype: str, shape: tuple[int, ...] | None, data: object, expected: object) -> None:
    array = wire.from_numbers("x", datatype, shape, data)
    assert wire.name_of(array.dtype) == datatype
    if shape is not None:
        assert array.shape == shape
    assert array.tolist() == expected


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [
        ("FP32", (2,), [1, True]),
        ("FP32", (1,), ["1"]),
        ("FP32", (1,), [None]),
        ("FP32", (1,), [{}]),
        ("FP32", (1,), [1e39]),
        ("FP64", (1,), [float("inf")]),
        ("FP64", (1,), [10**400]),
        ("INT32", (1,), [1.0]),
        ("INT8", (1,), [128]),
        ("UINT8", (1,), [-1]),
        ("UINT64", (1,), [2**64]),
        ("INT64", (1,), [10**30]),
        ("BOOL", (1,), [1]),
        ("BYTES", (1,), [1]),
        ("FP32", (3,), [1, 2]),
        ("FP32", (2, 2), [[1, 2, 3], [4, 5, 6]]),
        ("FP32", (4,), [[1, 2], [3, 4]]),
        ("FP32", (3,), [[1, 2], [3]]),
        ("FP32", (3,), [1, [2, 3]]),
        ("FP32", (1,), 1),
        ("FP32", (1,), "1"),
        ("FP32", (1,), {"a": 1}),
        # numpy alone would make every string as long as the longest: 4 TB here.
        ("FP32", (1 << 20,), ["x" * (1 << 20)] + [""] * ((1 << 20) - 1)),
    ],
)
def test_what_is_no_number(datatype: str, shape: tuple[int, ...], data: object) -> None:
    with pytest.raises(InvalidRequest):
        wire.from_numbers("x", datatype, shape, data)


def test_depth_beyond_any_tensor() -> None:
    data: object = [1]
    for _ in range(100):
        data = [data]
    with pytest.raises(InvalidRequest):
        wire.from_numbers("x", "FP32", (1,), data)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, (0, None)),
        ({"priority": 2, "timeout": 500}, (2, 1_500_000)),
        ({"priority": 10**30, "mine": "x"}, (1 << 31, None)),
        ({"timeout": 0, "sequence_id": 0}, (0, None)),
    ],
)
def test_parameters(parameters: dict[str, object], expected: tuple[int, int | None]) -> None:
    assert wire.read_parameters(parameters, received_ns=1_000_000) == expected


def test_a_timeout_of_any_size_stays_a_time() -> None:
    assert wire.read_parameters({"timeout": 10**40}, received_ns=0)[1] < 2**63


@pytest.mark.parametrize("parameters", [{"priority": -1}, {"priority": True}, {"timeout": "1"}, {"timeout": 1.5}])
def test_parameters_that_are_no_numbers(parameters: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        wire.read_parameters(parameters, received_ns=0)


@pytest.mark.parametrize("name", ["sequence_id", "shared_memory_region", "classification"])
def test_what_is_not_served_is_said(name: str) -> None:
    with pytest.raises(Unsupported, match="not served"):
        wire.refuse({name: 3})


def test_shapes_and_names_of_specs() -> None:
    assert wire.dims(TensorSpec("x", "float32", ("N", 3, None))) == [-1, 3, -1]
    assert wire.dims(TensorSpec("x", "float32", None)) == [-1]
    assert wire.datatype(TensorSpec("x", "string", ())) == "BYTES"
    with pytest.raises(Unsupported, match="float8_e4m3fn"):
        wire.datatype(TensorSpec("x", "float8_e4m3fn", ()))


def test_an_error_is_one_line() -> None:
    assert wire.message(Overloaded("full", where="m", hint="wait")) == "full; at m; wait"
