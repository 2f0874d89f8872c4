"""Arrays in the memory of a GPU: those that a session leaves there, and those of others that it is given.

They are exchanged through DLPack (https://dmlc.github.io/dlpack/latest/python_spec.html) and through version 3 of
``__cuda_array_interface__`` (https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html). DLPack comes
first where an object offers both: it knows bfloat16, and says on which GPU the array is.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from runtimes._inputs import numpy_dtype
from runtimes.base import InvalidInput

_CPU, _CUDA, _CUDA_MANAGED = 1, 2, 13  # DLDeviceType
#: DLDataType (code, bits) of each dtype
_CODES = {
    **{f"int{bits}": (0, bits) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": (1, bits) for bits in (8, 16, 32, 64)},
    **{f"float{bits}": (2, bits) for bits in (16, 32, 64)},
    "bfloat16": (4, 16),
    "bool": (6, 8),
    "float8_e4m3fn": (10, 8),
    "float8_e5m2": (12, 8),
}
_NAMES = {code: name for name, code in _CODES.items()}


class DeviceArray:
    """A C-ordered array in the memory of a GPU, complete: nothing queued still writes it.

    torch, CuPy, JAX and others take it with their ``from_dlpack``; the memory lives as long as anyone holds it.

    Attributes:
        shape, dtype: as numpy has them.
        address: of the first element.
        ordinal: the GPU's number.
    """

    __slots__ = ("__weakref__", "_owner", "address", "dtype", "ordinal", "shape")

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], ordinal: int, owner: object) -> None:
        self.address = address
        self.shape = shape
        self.dtype = dtype
        self.ordinal = ordinal
        self._owner = owner  # what the memory lives with

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype.name}{list(self.shape)} on GPU {self.ordinal})"

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address if self.nbytes else 0, False),
            "strides": None,
            "stream": None,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, self.ordinal

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        # The contents are complete, so there is nothing that the consumer's stream would have to wait for.
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("it is handed over as it is: no copy, and on its own device")
        return to_capsule(self.address, self.shape, self.dtype, self.__dlpack_device__(), self._owner)

    def numpy(self) -> np.ndarray:
        """A copy of it in host memory."""
        from runtimes import _cuda

        gpu = _cuda.device(self.ordinal)
        result = np.empty(self.shape, self.dtype)
        if result.nbytes:
            staging = gpu.page_locked(result.nbytes)
            with gpu:
                stream = gpu.stream()
                stream.download(staging, self.address)
                stream.synchronize()
            result.reshape(-1).view(np.uint8)[...] = staging
        return result


def on_device(value: object, *, name: str, ordinal: int, stream: Any) -> DeviceArray | None:
    """The array that an object offers in the memory of a GPU; None where it is not there.

    Args:
        value: anything.
        name: the input that it is for.
        ordinal: the GPU that it has to be on.
        stream: a ``_cuda.Stream``; work that is queued on it afterwards finds the array complete.

    Raises:
        InvalidInput: it is on another GPU, not in C order, or of a type that has no name here.
    """
    if isinstance(value, np.ndarray):
        return None
    if isinstance(value, DeviceArray):
        found = value
    elif hasattr(value, "__dlpack_device__") and hasattr(value, "__dlpack__"):
        kind, number = value.__dlpack_device__()
        if int(kind) not in (_CUDA, _CUDA_MANAGED):
            return None
        _same_gpu(name, int(number), ordinal)
        try:
            capsule = value.__dlpack__(stream=stream.handle)
        except (BufferError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise _refused(name, f"{type(value).__name__} cannot be handed over: {error}") from error
        found = from_capsule(capsule, name)
    elif hasattr(value, "__cuda_array_interface__"):
        found = _from_interface(value, name, ordinal)
        waits = value.__cuda_array_interface__.get("stream")
        if waits is not None:
            stream.wait_for(int(waits))
    else:
        return None
    _same_gpu(name, found.ordinal, ordinal)
    return found


def _same_gpu(name: str, given: int, wanted: int) -> None:
    if given != wanted:
        raise _refused(name, f"the array is on GPU {given}, the session on GPU {wanted}", "copy it there first")


def _refused(name: str, what: str, hint: str | None = None) -> InvalidInput:
    return InvalidInput(f"input {name!r}: {what}", where=f"input {name!r}", hint=hint)


def _check_order(name: str, shape: tuple[int, ...], strides: tuple[int, ...] | None, item: int) -> None:
    """Raises InvalidInput where strides, in units of which an element has ``item``, are not those of C order."""
    if strides is None or math.prod(shape) == 0:
        return
    wanted = item
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != wanted:
            raise _refused(name, f"an array on a GPU has to be in C order; this one has strides {strides}",
                           "make it contiguous: value.contiguous(), cupy.ascontiguousarray(value)")  # fmt: skip
        wanted *= size


def _from_interface(value: Any, name: str, ordinal: int) -> DeviceArray:
    told = value.__cuda_array_interface__
    if told.get("mask") is not None:
        raise _refused(name, "the mask would be lost")
    dtype, shape = np.dtype(told["typestr"]), tuple(int(size) for size in told["shape"])
    if dtype.kind == "V":
        raise _refused(name, f"__cuda_array_interface__ does not say what {told['typestr']!r} is", "offer DLPack")
    strides = told.get("strides")
    _check_order(name, shape, None if strides is None else tuple(strides), dtype.itemsize)
    return DeviceArray(int(told["data"][0]), shape, dtype, ordinal, value)


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("ordinal", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor, the form without a version, which every consumer takes."""

    _fields_ = (("tensor", _Tensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_DESTRUCTOR = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_NAME = b"dltensor"
#: what was handed out, by the address of its struct, with all that has to outlive it
_handed_out: dict[int, tuple[object, ...]] = {}


def _capsule_call(name: str, result: Any, *arguments: Any) -> Any:
    # Prototypes of our own: those of ctypes.pythonapi are shared by the whole process.
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_new = _capsule_call("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _DESTRUCTOR)
_pointer = _capsule_call("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
# The same two on a capsule that is being destroyed, which must not become a reference again.
_is_valid_raw = _capsule_call("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_pointer_raw = _capsule_call("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)


@_DELETER
def _delete(address: int) -> None:
    _handed_out.pop(address, None)


@_DESTRUCTOR
def _destroy(capsule: int) -> None:
    # A consumer renames the capsule that it takes over; under its first name nobody did.
    if _is_valid_raw(capsule, _NAME):
        _handed_out.pop(_pointer_raw(capsule, _NAME), None)


def to_capsule(
    address: int, shape: tuple[int, ...], dtype: np.dtype[Any], device: tuple[int, int], owner: object
) -> Any:
    """A DLPack capsule of memory that lives with ``owner``, which is held until the consumer is done.

    Args:
        device: DLPack's kind of device, and its number.

    Raises:
        BufferError: DLPack has no such dtype.
    """
    if dtype.name not in _CODES:
        raise BufferError(f"DLPack has no {dtype.name}")
    code, bits = _CODES[dtype.name]
    sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    steps = (ctypes.c_int64 * max(len(shape), 1))(*(math.prod(shape[axis + 1 :]) for axis in range(len(shape))))
    tensor = _Tensor(address or None, _Device(*device), len(shape), _Type(code, bits, 1), sizes, steps, 0)
    managed = _Managed(tensor, None, ctypes.cast(_delete, ctypes.c_void_p))
    key = ctypes.addressof(managed)
    _handed_out[key] = (managed, sizes, steps, owner)
    return _new(key, _NAME, _destroy)


def from_capsule(capsule: Any, name: str) -> DeviceArray:
    """The array of a DLPack capsule, which is held for as long as the array.

    Raises:
        InvalidInput: its type or order is none that can be taken.
    """
    tensor = _Managed.from_address(_pointer(capsule, _NAME)).tensor
    dtype = _NAMES.get((tensor.dtype.code, tensor.dtype.bits))
    if dtype is None or tensor.dtype.lanes != 1:
        raise _refused(name, f"unknown DLPack type: code {tensor.dtype.code}, {tensor.dtype.bits} bits")
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if tensor.strides:
        _check_order(name, shape, tuple(tensor.strides[axis] for axis in range(tensor.ndim)), 1)
    return DeviceArray(
        (tensor.data or 0) + tensor.byte_offset, shape, numpy_dtype(dtype), tensor.device.ordinal, capsule
    )
