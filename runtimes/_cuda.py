"""The one seam to CUDA: device memory, page-locked host memory, streams, events and graphs.

pycuda is taken where it is installed, cuda-bindings where it is not; nothing above this file knows which. Work is done
in the device's primary context, the one that the CUDA runtime uses, so that memory and streams can be shared with
ONNX Runtime, TensorRT, torch and CuPy in the same process. What the driver says without any of that is in
``_driver.py``.

Errors::

    TargetUnavailable
    ├── NoDriver                no NVIDIA driver, or one that fails
    ├── DriverTooOld            with the CUDA that it supports and the one that is wanted
    ├── NoSuchDevice            with the devices that there are
    └── NoCudaPackage           neither pycuda nor cuda-bindings can be imported
    RunFailed
    ├── CudaFailed              a call of the driver failed
    └── OutOfDeviceMemory       with what was asked for and what is free
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from runtimes import _cuda_packages
from runtimes._cuda_packages import Bindings, CudaPackage, DriverError
from runtimes._cuda_packages import name as package
from runtimes._driver import Driver, driver
from runtimes.base import RunFailed, TargetUnavailable

__all__ = [
    "CudaFailed",
    "Device",
    "DriverTooOld",
    "Event",
    "Graph",
    "Memory",
    "NoCudaPackage",
    "NoDriver",
    "NoSuchDevice",
    "OutOfDeviceMemory",
    "Owned",
    "Stream",
    "device",
    "package",
    "require_device",
    "require_driver",
    "require_graphs",
    "view_memory",
]

_INSTALL = "run: pip install cuda-bindings"


class NoDriver(TargetUnavailable):
    """There is no NVIDIA driver, or it finds no GPU."""


class DriverTooOld(TargetUnavailable):
    """The driver supports an older CUDA than the runtime was built for."""


class NoSuchDevice(TargetUnavailable):
    """There is no GPU of that number."""


class NoCudaPackage(TargetUnavailable):
    """Neither pycuda nor cuda-bindings can be imported."""


class CudaFailed(RunFailed):
    """A call of the CUDA driver failed."""


class OutOfDeviceMemory(RunFailed):
    """The GPU has too little free memory."""


def require_driver(*, cuda: int | None, who: str, state: Driver | None = None) -> None:
    """Makes sure that there is a driver, a GPU, and that the driver is new enough.

    Args:
        cuda: the major version of CUDA that ``who`` was built for; None asks for any. Within one major version
            older drivers run newer minor ones.
        who: the package that wants it, for the message.
        state: what the driver says; asked where it is not given.

    Raises:
        NoDriver, DriverTooOld.
    """
    state = state or driver()
    # The version first: an old driver often fails to start at all under a new runtime's libraries.
    if cuda is not None and state.cuda is not None and state.cuda[0] < cuda:
        raise DriverTooOld(
            "the NVIDIA driver supports CUDA {}.{}, {} wants CUDA {}".format(*state.cuda, who, cuda),
            hint=f"install a driver for CUDA {cuda}, or a build of {who} for CUDA {state.cuda[0]}",
        )
    if state.reason is not None:
        raise NoDriver(f"{who} needs an NVIDIA GPU: {state.reason}", hint="nvidia-smi says what the driver sees")


def require_device(ordinal: int, state: Driver | None = None) -> None:
    """Makes sure that there is a GPU of that number. Raises NoSuchDevice, NoDriver."""
    state = state or driver()
    if state.reason is not None:
        raise NoDriver(state.reason, hint="nvidia-smi says what the driver sees")
    if not 0 <= ordinal < len(state.gpus):
        there = ", ".join(f"{number}: {gpu.name}" for number, gpu in enumerate(state.gpus))
        raise NoSuchDevice(f"there is no GPU {ordinal}", hint=f"there are {there}; CUDA_VISIBLE_DEVICES may hide some")


def require_graphs() -> Bindings:
    """Makes sure that work can be recorded in CUDA graphs. Raises NoCudaPackage."""
    api = _cuda_packages.bindings()
    if api is None:
        raise NoCudaPackage("pycuda knows no CUDA graphs, and cuda-bindings is not installed", hint=_INSTALL)
    return api


@functools.cache
def device(ordinal: int = 0) -> Device:
    """The GPU of that number; the same object each time. Its primary context is kept for the life of the process.

    Raises:
        NoDriver, NoSuchDevice, NoCudaPackage, CudaFailed.
    """
    require_device(ordinal)
    package = _cuda_packages.chosen()
    if package is None:
        raise NoCudaPackage("neither pycuda nor cuda-bindings can be imported", hint=_INSTALL)
    return Device(ordinal, package)


def view_memory(address: int, nbytes: int, release: Callable[[], None]) -> np.ndarray:
    """uint8[nbytes] over host memory; ``release`` is called when the last array over it is gone."""
    block = (ctypes.c_uint8 * max(nbytes, 1)).from_address(address)
    weakref.finalize(block, release).atexit = False  # the process takes it along
    return np.frombuffer(memoryview(block), dtype=np.uint8)[:nbytes]


def _failed(error: BaseException) -> CudaFailed:
    return CudaFailed(f"the CUDA driver failed: {error}")


class Device:
    """A GPU and its primary context.

    ``with device:`` makes that context current in this thread and turns what the package raises into CudaFailed. It
    can be nested, and used by many threads at once.

    Args:
        ordinal: CUDA's number of it.
        package: pycuda or cuda-bindings.
    """

    def __init__(self, ordinal: int, package: CudaPackage) -> None:
        self.ordinal = ordinal
        self._package = package
        failure, self._out_of_memory = package.failures()
        self._failures = (failure, DriverError)  # the second: graphs are always those of cuda-bindings
        try:
            self._context = package.retain(ordinal)
        except self._failures as error:
            raise _failed(error) from error

    def __enter__(self) -> Device:
        self._package.push(self._context)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._package.pop()
        if isinstance(error, self._failures):
            raise _failed(error) from error

    def memory(self) -> tuple[int, int]:
        """Bytes of device memory: free, and in all."""
        with self:
            return self._package.memory()

    def synchronize(self) -> None:
        """Waits for everything that this process has queued on the GPU, whoever queued it."""
        with self:
            self._package.synchronize()

    def allocate(self, nbytes: int) -> Memory:
        """Device memory, freed with its last reference. Raises OutOfDeviceMemory."""
        with self:
            return Memory(self, nbytes, self._take(self._package.allocate, nbytes, "GPU memory"))

    def page_locked(self, nbytes: int) -> np.ndarray:
        """Host memory that the GPU copies from and to by itself: uint8[nbytes], freed with its last view.

        Raises:
            OutOfDeviceMemory: the system has no more memory to lock.
        """
        with self:
            token, address = self._take(self._package.allocate_host, nbytes, "page-locked host memory")
        return view_memory(address, nbytes, lambda: self._release(self._package.free_host, [token]))

    def stream(self) -> Stream:
        """A new stream that does not wait for the default stream."""
        with self:
            return Stream(self, *self._package.stream())

    def event(self) -> Event:
        """A new event that measures time."""
        with self:
            return Event(self, self._package.event())

    def _take(self, allocate: Callable[[int], tuple[Any, int]], nbytes: int, what: str) -> tuple[Any, int]:
        try:
            return allocate(max(nbytes, 1))
        except self._out_of_memory as error:
            free, total = self._package.memory()
            raise OutOfDeviceMemory(
                f"out of memory: {nbytes:,} bytes of {what} were asked for; "
                f"GPU {self.ordinal} has {free:,} of {total:,} bytes free",
                hint="take a smaller batch, or close sessions that are not needed; nvidia-smi shows who else is there",
            ) from error

    def _release(self, free: Callable[[Any], None], token: list[Any]) -> None:
        with self:
            free(token.pop())


class Owned:
    """Something of the driver's, given back with the last reference to it."""

    def __init__(self, owner: Device, free: Callable[[Any], None], token: Any) -> None:
        # The list is shared with the finalizer, which empties it: pycuda frees with the last reference, and that
        # has to go while the context is current.
        self._token = [token]
        self._finalizer = weakref.finalize(self, owner._release, free, self._token)
        self._finalizer.atexit = False  # the process takes it along


class Memory(Owned):
    """Device memory at ``address``, ``nbytes`` long; freed with its last reference, or by ``free``.

    Freeing waits until the GPU has nothing left to do, so nothing that still reads it is pulled from under.
    """

    def __init__(self, owner: Device, nbytes: int, taken: tuple[Any, int]) -> None:
        token, self.address = taken
        self.nbytes = nbytes
        super().__init__(owner, owner._package.free, token)

    def free(self) -> None:
        """Frees it now. Again is fine."""
        self._finalizer()


class Stream(Owned):
    """A queue of work on a GPU. Its methods want the device's context to be current: use them in ``with device:``.

    Attributes:
        handle: the ``CUstream``, for TensorRT and DLPack.
    """

    def __init__(self, owner: Device, token: Any, handle: int) -> None:
        self.device = owner
        self.handle = handle
        self._package = owner._package
        super().__init__(owner, owner._package.free_stream, token)

    def upload(self, address: int, host: np.ndarray) -> None:
        """Queues a copy of a contiguous page-locked uint8 array to the device."""
        self._package.upload(address, host, self._token[0])

    def download(self, host: np.ndarray, address: int) -> None:
        """Queues a copy from the device to a contiguous page-locked uint8 array."""
        self._package.download(host, address, self._token[0])

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Queues a copy within the device."""
        self._package.copy(target, source, nbytes, self._token[0])

    def synchronize(self) -> None:
        """Waits for what was queued, and fails where any of it did."""
        self._package.wait_stream(self._token[0])

    def record(self, event: Event) -> None:
        """Queues the moment that ``event`` stands for."""
        self._package.record(event._token[0], self._token[0])

    def wait_for(self, handle: int) -> None:
        """Makes what is queued here from now on wait for what is queued now on another stream, given by its handle.

        1 and 2 are the legacy and the per-thread default stream.
        """
        api = _cuda_packages.bindings()
        if api is None:  # pycuda cannot be given another's stream
            self._package.synchronize()
            return
        event = api.event()
        try:
            api.record(event, handle)
            api.call(api.driver.cuStreamWaitEvent, self.handle, event, 0)
        finally:
            api.free_event(event)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records what ``work`` queues on this stream, without running it.

        Raises:
            NoCudaPackage: cuda-bindings is not installed; pycuda knows no graphs.
            CudaFailed: something in it cannot be recorded.
        """
        api = require_graphs()
        # Thread-local: what other threads do meanwhile neither fails nor ends this.
        api.call(
            api.driver.cuStreamBeginCapture,
            self.handle,
            api.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        )
        try:
            work()
        finally:
            # Ends the capture whatever happened; what it is worth shows below.
            status, graph = api.driver.cuStreamEndCapture(self.handle)
        if status != api.driver.CUresult.CUDA_SUCCESS:
            raise CudaFailed(f"the work cannot be captured in a CUDA graph: {status.name}")
        try:
            return Graph(self.device, api, api.call(api.driver.cuGraphInstantiate, graph, 0))
        finally:
            api.call(api.driver.cuGraphDestroy, graph)


class Event(Owned):
    """A moment on a stream."""

    def __init__(self, owner: Device, token: Any) -> None:
        self._owner = owner
        super().__init__(owner, owner._package.free_event, token)

    def milliseconds_since(self, start: Event) -> float:
        """Waits for this moment; the time from ``start`` to it on the GPU, in ms."""
        with self._owner:
            self._owner._package.wait_event(self._token[0])
            return self._owner._package.elapsed(start._token[0], self._token[0])


class Graph(Owned):
    """Work that is queued with one call."""

    def __init__(self, owner: Device, api: Bindings, token: Any) -> None:
        self._api = api
        super().__init__(owner, api.free_graph, token)

    def launch(self, stream: Stream) -> None:
        """Queues it; in ``with device:``."""
        self._api.call(self._api.driver.cuGraphLaunch, self._token[0], stream.handle)
