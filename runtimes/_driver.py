"""What the NVIDIA driver says of this machine, asked of libcuda itself: no package and no CUDA context is needed."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import sys
from typing import Any

_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclasses.dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: its name, and its compute capability such as (8, 9)."""

    name: str
    capability: tuple[int, int]

    @property
    def capability_text(self) -> str:
        """As people write it: ``8.9``."""
        return "{}.{}".format(*self.capability)


@dataclasses.dataclass(frozen=True, slots=True)
class Driver:
    """The driver of this machine.

    Attributes:
        cuda: the newest CUDA that it supports, such as (13, 0). None where there is no driver.
        gpus: by their CUDA ordinal.
        reason: why there is no GPU to use, in one line. None where there is one.
    """

    cuda: tuple[int, int] | None
    gpus: tuple[Gpu, ...]
    reason: str | None = None


@functools.cache
def driver() -> Driver:
    """Asks the driver, once in a process. Never raises: what is wrong is in ``Driver.reason``."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ask(ctypes.CDLL(name))
    except OSError:
        return Driver(None, (), f"there is no NVIDIA driver: {name} was not found")


def ask(cuda: Any) -> Driver:
    """Reads version and GPUs through the driver's C interface ``cuda``, a ``ctypes.CDLL`` or what behaves like it."""
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    version = (number.value // 1000, number.value % 1000 // 10)
    status = cuda.cuInit(0)
    if status:
        reason = (
            "the NVIDIA driver finds no GPU" if status == _NO_DEVICE else f"the NVIDIA driver fails: error {status}"
        )
        return Driver(version, (), reason)
    cuda.cuDeviceGetCount(ctypes.byref(number))
    gpus = []
    for ordinal in range(number.value):
        device = ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        name = ctypes.create_string_buffer(256)
        cuda.cuDeviceGetName(name, len(name), device)
        capability = []
        for attribute in (_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR):
            value = ctypes.c_int()
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            capability.append(value.value)
        gpus.append(Gpu(name.value.decode("utf-8", "replace"), (capability[0], capability[1])))
    return Driver(version, tuple(gpus), None if gpus else "the NVIDIA driver finds no GPU")
