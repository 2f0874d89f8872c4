"""pycuda and cuda-bindings behind one interface: the calls of the CUDA driver that ``_cuda.py`` is made of.

pycuda's objects free what they stand for with their last reference, in a thread where their context is current;
cuda-bindings is the driver's C interface, function for function, and frees nothing by itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Any, Protocol

import numpy as np


class CudaPackage(Protocol):
    """What this file needs of a CUDA package. Tokens are whatever the package hands out; addresses are ints."""

    def failures(self) -> tuple[type[BaseException], type[BaseException]]:
        """What the calls raise: on any failure, and where memory is short (a subclass of the first)."""

    def retain(self, ordinal: int) -> Any: ...
    def push(self, context: Any) -> None: ...
    def pop(self) -> None: ...
    def synchronize(self) -> None: ...
    def memory(self) -> tuple[int, int]: ...
    def allocate(self, size: int) -> tuple[Any, int]: ...
    def free(self, token: Any) -> None: ...
    def allocate_host(self, size: int) -> tuple[Any, int]: ...
    def free_host(self, token: Any) -> None: ...
    def stream(self) -> tuple[Any, int]: ...
    def free_stream(self, token: Any) -> None: ...
    def event(self) -> Any: ...
    def free_event(self, token: Any) -> None: ...
    def upload(self, address: int, host: np.ndarray, stream: Any) -> None: ...
    def download(self, host: np.ndarray, address: int, stream: Any) -> None: ...
    def copy(self, target: int, source: int, size: int, stream: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def record(self, event: Any, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def elapsed(self, start: Any, end: Any) -> float: ...


class DriverError(Exception):
    """A call through cuda-bindings that did not return CUDA_SUCCESS."""


class DriverOutOfMemory(DriverError):
    """CUDA_ERROR_OUT_OF_MEMORY."""


class Pycuda:
    """pycuda. Its objects are freed with their last reference, in a thread where their context is current."""

    def __init__(self) -> None:
        self.driver = importlib.import_module("pycuda.driver")
        self.driver.init()

    def failures(self) -> tuple[type[BaseException], type[BaseException]]:
        return self.driver.Error, self.driver.MemoryError

    def retain(self, ordinal: int) -> Any:
        return self.driver.Device(ordinal).retain_primary_context()

    def push(self, context: Any) -> None:
        context.push()

    def pop(self) -> None:
        self.driver.Context.pop()

    def synchronize(self) -> None:
        self.driver.Context.synchronize()

    def memory(self) -> tuple[int, int]:
        free, total = self.driver.mem_get_info()
        return int(free), int(total)

    def allocate(self, size: int) -> tuple[Any, int]:
        token = self.driver.mem_alloc(size)
        return token, int(token)

    def free(self, token: Any) -> None:
        token.free()

    def allocate_host(self, size: int) -> tuple[Any, int]:
        token = self.driver.pagelocked_empty((size,), np.uint8, mem_flags=self.driver.host_alloc_flags.PORTABLE)
        return token, token.ctypes.data

    def free_host(self, token: Any) -> None:
        token.base.free()

    def stream(self) -> tuple[Any, int]:
        token = self.driver.Stream(1)  # CU_STREAM_NON_BLOCKING
        return token, int(token.handle)

    def free_stream(self, token: Any) -> None:
        """Goes with its last reference."""

    def event(self) -> Any:
        return self.driver.Event()

    free_event = free_stream

    def upload(self, address: int, host: np.ndarray, stream: Any) -> None:
        self.driver.memcpy_htod_async(address, host, stream)

    def download(self, host: np.ndarray, address: int, stream: Any) -> None:
        self.driver.memcpy_dtoh_async(host, address, stream)

    def copy(self, target: int, source: int, size: int, stream: Any) -> None:
        self.driver.memcpy_dtod_async(target, source, size, stream)

    def wait_stream(self, stream: Any) -> None:
        stream.synchronize()

    def record(self, event: Any, stream: Any) -> None:
        event.record(stream)

    def wait_event(self, event: Any) -> None:
        event.synchronize()

    def elapsed(self, start: Any, end: Any) -> float:
        return float(end.time_since(start))


class Bindings:
    """cuda-bindings: the driver's C interface, function for function."""

    def __init__(self) -> None:
        self.driver = importlib.import_module("cuda.bindings.driver")
        self.call(self.driver.cuInit, 0)

    def failures(self) -> tuple[type[BaseException], type[BaseException]]:
        return DriverError, DriverOutOfMemory

    def call(self, function: Any, *args: Any) -> Any:
        """Calls, checks the status, and returns what comes after it: nothing, one value or a tuple."""
        status, *results = function(*args)
        if status != self.driver.CUresult.CUDA_SUCCESS:
            out = status == self.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
            name = getattr(function, "__name__", str(function))
            raise (DriverOutOfMemory if out else DriverError)(f"{name}: {status.name}")
        return results[0] if len(results) == 1 else tuple(results)

    def retain(self, ordinal: int) -> Any:
        return self.call(self.driver.cuDevicePrimaryCtxRetain, self.call(self.driver.cuDeviceGet, ordinal))

    def push(self, context: Any) -> None:
        self.call(self.driver.cuCtxPushCurrent, context)

    def pop(self) -> None:
        self.call(self.driver.cuCtxPopCurrent)

    def synchronize(self) -> None:
        self.call(self.driver.cuCtxSynchronize)

    def memory(self) -> tuple[int, int]:
        free, total = self.call(self.driver.cuMemGetInfo)
        return int(free), int(total)

    def allocate(self, size: int) -> tuple[Any, int]:
        token = self.call(self.driver.cuMemAlloc, size)
        return token, int(token)

    def free(self, token: Any) -> None:
        self.call(self.driver.cuMemFree, token)

    def allocate_host(self, size: int) -> tuple[Any, int]:
        address = int(self.call(self.driver.cuMemHostAlloc, size, self.driver.CU_MEMHOSTALLOC_PORTABLE))
        return address, address

    def free_host(self, token: Any) -> None:
        self.call(self.driver.cuMemFreeHost, token)

    def stream(self) -> tuple[Any, int]:
        token = self.call(self.driver.cuStreamCreate, int(self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        return token, int(token)

    def free_stream(self, token: Any) -> None:
        self.call(self.driver.cuStreamDestroy, token)

    def event(self) -> Any:
        return self.call(self.driver.cuEventCreate, int(self.driver.CUevent_flags.CU_EVENT_DEFAULT))

    def free_event(self, token: Any) -> None:
        self.call(self.driver.cuEventDestroy, token)

    def free_graph(self, token: Any) -> None:
        self.call(self.driver.cuGraphExecDestroy, token)

    def upload(self, address: int, host: np.ndarray, stream: Any) -> None:
        self.call(self.driver.cuMemcpyHtoDAsync, address, host.ctypes.data, host.nbytes, stream)

    def download(self, host: np.ndarray, address: int, stream: Any) -> None:
        self.call(self.driver.cuMemcpyDtoHAsync, host.ctypes.data, address, host.nbytes, stream)

    def copy(self, target: int, source: int, size: int, stream: Any) -> None:
        self.call(self.driver.cuMemcpyDtoDAsync, target, source, size, stream)

    def wait_stream(self, stream: Any) -> None:
        self.call(self.driver.cuStreamSynchronize, stream)

    def record(self, event: Any, stream: Any) -> None:
        self.call(self.driver.cuEventRecord, event, stream)

    def wait_event(self, event: Any) -> None:
        self.call(self.driver.cuEventSynchronize, event)

    def elapsed(self, start: Any, end: Any) -> float:
        return float(self.call(self.driver.cuEventElapsedTime, start, end))


@functools.cache
def name() -> str | None:
    """The package that is taken, with its version; None where there is none. Needs no GPU."""
    for distribution, module in (("pycuda", "pycuda.driver"), ("cuda-bindings", "cuda.bindings.driver")):
        try:
            importlib.import_module(module)
        # pycuda links against libcuda and does not import without a driver; cuda-bindings looks for it later.
        except (ImportError, OSError, RuntimeError):
            continue
        return f"{distribution} {importlib.metadata.version(distribution)}"
    return None


@functools.cache
def chosen() -> CudaPackage | None:
    """pycuda where it is installed, else cuda-bindings, ready for use; None where neither is."""
    found = name()
    if found is None:
        return None
    return Pycuda() if found.startswith("pycuda") else bindings()


@functools.cache
def bindings() -> Bindings | None:
    """cuda-bindings, for what pycuda cannot do; None where it is not installed."""
    try:
        return Bindings()
    except ImportError:
        return None
