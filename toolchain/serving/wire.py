"""Tensors as bytes and as JSON numbers, and back: what the HTTP and the gRPC side of the protocol share.

Binary tensors are little-endian, row-major, without padding; an element of BYTES is its length in four bytes and then
the bytes (Triton's binary tensor data extension, https://github.com/triton-inference-server/server, docs/protocol).
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes import Error, TensorSpec
from toolchain.serving.base import InvalidRequest, Unsupported
from toolchain.serving.tensors import DTYPES, MAX_RANK, NAMES

#: Beyond this a wait is as good as endless, and sums of it stay far from any limit: a year.
_LONGEST_US = 365 * 24 * 3600 * 1_000_000
#: Bytes of a tensor that are copied rather than looked at through a view.
_SMALL = 4096
#: numpy's kinds of dtypes that hold strings.
_TEXT = "OUST"
#: Parts of the protocol that carry state between requests, or memory between processes: what is said where they are not
#: served.
_REFUSED = {
    "sequence_id": "sequences are not served",
    "shared_memory_region": "shared memory is not served here; toolchain serve --shared-memory does",
    "classification": "classification in the protocol is not served: POST /predict/<model> gives classes",
}


def message(error: Error) -> str:
    """An error as the one line that both protocols have for it."""
    parts = [error.what]
    if error.where:
        parts.append(f"at {error.where}")
    if error.hint:
        parts.append(error.hint)
    return "; ".join(parts)


@functools.cache
def numpy_dtype(datatype: str) -> np.dtype[Any]:
    """The numpy dtype of one of the protocol's names but BYTES. Raises Unsupported where numpy lacks it."""
    if datatype == "BF16":
        try:
            import ml_dtypes
        except ImportError:
            raise Unsupported("BF16 is not served here", hint="install ml_dtypes beside the server") from None
        found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return found
    return np.dtype(DTYPES[datatype][0])


def datatype(spec: TensorSpec) -> str:
    """The protocol's name of a tensor's element type. Raises Unsupported for one that it has none for."""
    name = NAMES.get(spec.dtype)
    if name is None:
        raise Unsupported(f"the protocol has no name for {spec.dtype}, the element type of {spec.name!r}")
    return name


@functools.cache
def name_of(dtype: np.dtype[Any]) -> str:
    """The protocol's name of a numpy dtype; strings, in whatever form numpy keeps them, are BYTES."""
    return "BYTES" if dtype.kind in _TEXT else NAMES[dtype.name]


def dims(spec: TensorSpec) -> list[int]:
    """A tensor's shape as the protocol has it: -1 where a size may vary, and [-1] where even the rank is unknown."""
    return [-1] if spec.shape is None else [size if isinstance(size, int) else -1 for size in spec.shape]


def from_bytes(name: str, datatype: str, shape: Sequence[int], data: memoryview) -> np.ndarray:
    """A tensor out of the bytes of a request: a view of them, aligned or not; of strings a copy.

    Args:
        name: of the input, for errors.
        datatype: the protocol's name of its element type.
        shape: checked by ``tensors.check``.
        data: exactly its bytes.

    Raises:
        InvalidRequest: there are more or fewer bytes than the shape says; strings are not what they say, or not UTF-8;
            a BOOL is neither 0 nor 1.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return _strings_from_bytes(name, count, data).reshape(shape)
    dtype = numpy_dtype(datatype)
    if len(data) != count * dtype.itemsize:
        raise InvalidRequest(
            f"input {name!r} has {len(data)} bytes of data, and its shape {list(shape)} of {datatype} "
            f"takes {count * dtype.itemsize}"
        )
    array = np.frombuffer(data, dtype).reshape(shape)
    if datatype == "BOOL" and count and data.tobytes().strip(b"\0\1"):
        raise InvalidRequest(f"input {name!r} is BOOL, and has bytes that are neither 0 nor 1")
    return array


def to_bytes(array: np.ndarray) -> bytes | memoryview:
    """A tensor's bytes as the protocol has them; without a copy where it lies row by row."""
    if array.dtype.kind in _TEXT:
        return _bytes_from_strings(array)
    # tobytes() copies, which costs less than a view below some kilobytes.
    if array.nbytes < _SMALL:
        return array.tobytes()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def from_numbers(name: str, datatype: str, shape: Sequence[int] | None, data: object) -> np.ndarray:
    """A tensor out of JSON: a list of its elements row by row, or nested as its shape is.

    Args:
        name: of the input, for errors.
        datatype: the protocol's name of its element type; numbers are not rounded to integers, nor text read as one.
        shape: what the request says; None takes the shape that the nesting has.
        data: JSON values, from a parser without NaN and Infinity.

    Raises:
        InvalidRequest: values of another kind, beyond the type's range, ragged, or not as many as the shape says.
    """
    flat, found = _flattened(name, data)
    kinds = set(map(type, flat))
    if datatype == "BYTES":
        fits, wanted, dtype = kinds <= {str}, "text", np.dtype(object)
    elif datatype == "BOOL":
        fits, wanted, dtype = kinds <= {bool}, "true and false", np.dtype(bool)
    else:
        dtype = numpy_dtype(datatype)
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            fits = kinds <= {int} and (not flat or (min(flat) >= limits.min and max(flat) <= limits.max))
            wanted = f"whole numbers from {limits.min} to {limits.max}"
        else:
            fits, wanted = kinds <= {int, float}, "numbers"
    if not fits:
        raise InvalidRequest(f"input {name!r} is {datatype}, and has other data than {wanted}")
    array = _array(name, datatype, dtype, flat)
    return shaped(name, array.reshape(found), found if shape is None else shape)


def shaped(name: str, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """An array that has a shape already, or lies flat. Raises InvalidRequest where it has another one or size."""
    if array.shape == tuple(shape):
        return array
    if array.ndim != 1 or array.size != math.prod(shape):
        raise InvalidRequest(
            f"input {name!r} has data of the shape {list(array.shape)}, and its shape is {list(shape)}",
            hint="send as many elements as the shape says, in one list or nested as the shape is",
        )
    return array.reshape(shape)


def read_parameters(parameters: Mapping[str, Any], *, received_ns: int) -> tuple[int, int | None]:
    """What a request's parameters say of its scheduling (Triton's schedule policy extension).

    Args:
        parameters: of the request; those that are unknown are the client's own, and left alone.
        received_ns: when it came, ``time.monotonic_ns()``.

    Returns:
        Its priority, 0 where it names none, and the deadline that its ``timeout`` in microseconds makes.

    Raises:
        InvalidRequest: a value is no number, or below 0. Unsupported: it asks for what is not served.
    """
    refuse(parameters)
    priority = _number(parameters, "priority")
    timeout = _number(parameters, "timeout")
    return min(priority, 1 << 31), received_ns + min(timeout, _LONGEST_US) * 1000 if timeout else None


def refuse(parameters: Mapping[str, Any], *, shared: bool = False) -> None:
    """Raises Unsupported for parameters of extensions that are not served; shared memory is where it is ``shared``."""
    for name, why in _REFUSED.items():
        if parameters.get(name) and not (shared and name == "shared_memory_region"):
            raise Unsupported(why, where=f"parameter {name!r}")


def _number(parameters: Mapping[str, Any], name: str) -> int:
    value = parameters.get(name, 0)
    if type(value) is not int or value < 0:
        raise InvalidRequest(f"parameter {name!r} is {str(value)[:40]!r}", hint="it is a whole number, 0 or more")
    return value


def _strings_from_bytes(name: str, count: int, data: memoryview) -> np.ndarray:
    # Each takes four bytes at least, so nothing larger than the request is ever allocated.
    if count * 4 > len(data):
        raise InvalidRequest(f"input {name!r} has {len(data)} bytes of data, too few for {count} strings")
    array = np.empty(count, object)
    at = 0
    try:
        for index in range(count):
            (length,) = struct.unpack_from("<I", data, at)
            at += 4
            if length > len(data) - at:
                raise InvalidRequest(f"input {name!r}: string {index} is longer than the data that is left")
            array[index] = str(data[at : at + length], "utf-8")
            at += length
    except struct.error:
        raise InvalidRequest(f"input {name!r} ends before its string {index}") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"input {name!r}: string {index} is not UTF-8: {error.reason}") from None
    if at != len(data):
        raise InvalidRequest(f"input {name!r} has {len(data) - at} bytes after its {count} strings")
    return array


def _bytes_from_strings(array: np.ndarray) -> bytes:
    parts: list[bytes] = []
    for item in array.reshape(-1).tolist():
        text = item if isinstance(item, bytes) else str(item).encode()
        parts += (struct.pack("<I", len(text)), text)
    return b"".join(parts)


def _flattened(name: str, data: object) -> tuple[list[Any], tuple[int, ...]]:
    """The elements of nested lists row by row, and the shape of the nesting. A number alone has the shape ()."""
    if not isinstance(data, list):
        return [data], ()
    shape = [len(data)]
    while data and type(data[0]) is list:
        length = len(data[0])
        if len(shape) == MAX_RANK or any(type(row) is not list or len(row) != length for row in data):
            raise InvalidRequest(f"input {name!r} has ragged data", hint="rows of equal length, or one flat list")
        shape.append(length)
        data = list(itertools.chain.from_iterable(data))
    return data, tuple(shape)


def _array(name: str, datatype: str, dtype: np.dtype[Any], flat: list[Any]) -> np.ndarray:
    if dtype.kind == "O":
        strings = np.empty(len(flat), object)
        strings[:] = flat
        return strings
    if dtype.kind in "biu":
        return np.array(flat, dtype)
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, np.float64).astype(dtype)
    except OverflowError:
        array = np.array([np.inf])
    # JSON has no infinity: one here is a number that was too large.
    if not np.isfinite(array).all():
        raise InvalidRequest(f"input {name!r} has numbers beyond {datatype}")
    return array
