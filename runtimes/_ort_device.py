"""Sessions of ONNX Runtime on a GPU: inputs that are there already, outputs that stay there, and CUDA graphs."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes import _cuda
from runtimes._device_array import DeviceArray, on_device
from runtimes._inputs import InputCheck, check_place, numpy_dtype
from runtimes._ort import OrtSession, element_type, run_error, value_array
from runtimes.base import Binding, InvalidInput, Place, Target

#: How many sets of shapes a session records a graph of; the others run without.
_GRAPHS = 32


class OrtCudaSession(OrtSession):
    """A session whose nodes run on a GPU.

    Numpy arrays go straight to ONNX Runtime, which copies them. Arrays on the GPU are bound where they are; ONNX
    Runtime has streams of its own, so what still writes such an array is waited for before the run.

    With ``cuda_graph`` a run copies to and from device buffers that belong to its shapes, since a recorded graph
    reads and writes the same addresses each time. Such runs take turns.
    """

    def __init__(
        self,
        session: Any,
        target: Target,
        *,
        file: Path,
        unranked: frozenset[str],
        info: Mapping[str, str],
        ordinal: int,
        cuda_graph: bool,
    ) -> None:
        super().__init__(session, target, file=file, unranked=unranked, info=info)
        self._check = InputCheck(self.inputs, others=(DeviceArray,))
        self._ordinal = ordinal
        self._cuda_graph = cuda_graph
        self._graphs: dict[tuple[tuple[int, ...], ...], GraphRun] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._streams = threading.local()

    def run(self, feeds: Mapping[str, Any], /, *, outputs: Place = "host") -> dict[str, Any]:
        if outputs != "host":
            check_place(outputs)
        elif not self._cuda_graph and _all_numpy(feeds):
            return super().run(feeds)
        checked = self._check(self._found_on_device(feeds))
        session = self._open()
        if not self._cuda_graph:
            return self._run_once(session, checked, outputs)
        with self._lock:
            return self._graph_for(session, checked).run(checked, outputs)

    def bind(self, shapes: Mapping[str, Sequence[int]], /) -> Binding:
        if not self._cuda_graph:
            return super().bind(shapes)
        inputs, outputs = self._buffers(shapes)
        return GraphBinding(self, self._lock, GraphRun(self, self._open(), inputs, outputs, next(self._numbers)))

    def close(self) -> None:
        super().close()
        with self._lock:
            self._graphs.clear()

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        if _cuda.package() is None:
            return super()._empty(shape, dtype)
        locked = _cuda.device(self._ordinal).page_locked(math.prod(shape) * dtype.itemsize)
        return locked.view(dtype).reshape(shape)

    def _trial(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return self._run_once(self._open(), feeds, "host")

    def _found_on_device(self, feeds: Any) -> Any:
        """The feeds with those on the GPU as DeviceArray, complete: nothing still writes them."""
        if not isinstance(feeds, Mapping) or not any(map(_may_be_on_device, feeds.values())):
            return feeds
        gpu = _cuda.device(self._ordinal)
        if not hasattr(self._streams, "own"):
            self._streams.own = gpu.stream()
        stream: _cuda.Stream = self._streams.own
        with gpu:
            found = {
                name: on_device(value, name=name, ordinal=self._ordinal, stream=stream) for name, value in feeds.items()
            }
            stream.synchronize()
        return {**feeds, **{name: array for name, array in found.items() if array is not None}}

    def _run_once(self, session: Any, checked: Mapping[str, Any], place: Place) -> dict[str, Any]:
        """Runs through IO binding, without a graph."""
        if any(spec.dtype == "string" for spec in self.inputs + self.outputs):
            raise InvalidInput(
                "a model with strings runs from numpy arrays to numpy arrays only",
                hint="give every input as a numpy array and leave outputs= out; without cuda_graph",
            )
        binding = session.io_binding()
        held = []
        for spec in self.inputs:
            array, kind = checked[spec.name], element_type(spec.dtype)
            if isinstance(array, DeviceArray):
                binding.bind_input(spec.name, "cuda", self._ordinal, kind, array.shape, array.address)
            elif isinstance(kind, int):
                held.append(np.ascontiguousarray(array))
                binding.bind_input(spec.name, "cpu", 0, kind, array.shape, held[-1].ctypes.data)
            else:
                binding.bind_cpu_input(spec.name, array if array.flags.c_contiguous else array.copy("C"))
        for name in self._names:
            if place == "device":
                binding.bind_output(name, "cuda", self._ordinal)
            else:
                binding.bind_output(name, "cpu", 0)
        self._run_binding(binding, -1 if self._cuda_graph else None)
        values = binding.get_outputs()
        if place == "host":
            return {name: value_array(value) for name, value in zip(self._names, values, strict=True)}
        gpu = _cuda.device(self._ordinal)
        results = {}
        for spec, value in zip(self.outputs, values, strict=True):
            # ONNX Runtime gives the memory to the next run as soon as the value goes. A consumer may have queued
            # work that still reads it, so that is waited for first.
            owner = _cuda.Owned(gpu, lambda _: gpu.synchronize(), value)
            results[spec.name] = DeviceArray(
                int(value.data_ptr()), tuple(value.shape()), numpy_dtype(spec.dtype), self._ordinal, owner
            )
        return results

    def _run_binding(self, binding: Any, graph: int | None) -> None:
        """Runs; returns when the results are there, since ONNX Runtime waits for its streams at the end of a run.

        Args:
            graph: the number of the graph to record or replay, -1 for none in a session that records; None elsewhere.
        """
        options = None
        if graph is not None:
            import onnxruntime

            options = onnxruntime.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(graph))
        try:
            self._run_bound(getattr(binding, "_iobinding", binding), options)
        except self._failures as error:
            raise run_error(error) from error

    def _graph_for(self, session: Any, checked: Mapping[str, Any]) -> GraphRun:
        shapes = {spec.name: tuple(checked[spec.name].shape) for spec in self.inputs}
        key = tuple(shapes.values())
        found = self._graphs.get(key)
        if found is None:
            inputs, outputs = self._buffers(shapes)
            number = next(self._numbers) if len(self._graphs) < _GRAPHS else -1
            found = GraphRun(self, session, inputs, outputs, number)
            if number != -1:
                self._graphs[key] = found
        return found


def _all_numpy(feeds: Any) -> bool:
    # What is no dict at all is left to the check, which says what was given.
    return not isinstance(feeds, Mapping) or not any(map(_may_be_on_device, feeds.values()))


def _may_be_on_device(value: object) -> bool:
    return type(value) is not np.ndarray and (
        hasattr(value, "__dlpack_device__") or hasattr(value, "__cuda_array_interface__")
    )


class GraphRun:
    """Buffers on the host and on the device for one set of shapes, and the number of the graph that uses them.

    Args:
        inputs, outputs: page-locked arrays.
        number: of the graph; -1 runs without one.
    """

    def __init__(
        self,
        owner: OrtCudaSession,
        session: Any,
        inputs: dict[str, np.ndarray],
        outputs: dict[str, np.ndarray],
        number: int,
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._owner, self._number = owner, number
        self._gpu = _cuda.device(owner._ordinal)
        self._stream = self._gpu.stream()
        self._binding = session.io_binding()
        self._memory: dict[str, _cuda.Memory] = {}
        for bind, specs, arrays in (
            (self._binding.bind_input, owner.inputs, inputs),
            (self._binding.bind_output, owner.outputs, outputs),
        ):
            for spec in specs:
                array = arrays[spec.name]
                memory = self._memory[spec.name] = self._gpu.allocate(array.nbytes)
                bind(spec.name, "cuda", owner._ordinal, element_type(spec.dtype), array.shape, memory.address)

    def run(self, feeds: Mapping[str, Any], place: Place) -> dict[str, Any]:
        """From numpy arrays and arrays on the device to new arrays."""
        given = {name: array for name, array in feeds.items() if isinstance(array, DeviceArray)}
        for name, array in feeds.items():
            if name not in given:
                np.copyto(self.inputs[name], array)
        self.run_host(given, place)
        if place == "host":
            return {name: array.copy() for name, array in self.outputs.items()}
        results = {}
        with self._gpu:
            for name, array in self.outputs.items():
                memory = self._gpu.allocate(array.nbytes)
                if array.nbytes:
                    self._stream.copy(memory.address, self._memory[name].address, array.nbytes)
                results[name] = DeviceArray(memory.address, array.shape, array.dtype, self._gpu.ordinal, memory)
            self._stream.synchronize()
        return results

    def run_host(self, given: Mapping[str, DeviceArray], place: Place = "host") -> None:
        """From ``inputs``, or what is given in their place, to ``outputs``, or only to the buffers on the device."""
        with self._gpu:
            for name, array in self.inputs.items():
                if array.nbytes == 0:
                    continue
                address = self._memory[name].address
                if name in given:
                    self._stream.copy(address, given[name].address, array.nbytes)
                else:
                    self._stream.upload(address, _bytes(array))
            self._stream.synchronize()  # ONNX Runtime has a stream of its own
            self._owner._run_binding(self._binding, self._number)
            if place == "host":
                for name, array in self.outputs.items():
                    if array.nbytes:
                        self._stream.download(_bytes(array), self._memory[name].address)
                self._stream.synchronize()


class GraphBinding(Binding):
    """Page-locked arrays over a recorded graph. Made by ``OrtCudaSession.bind``."""

    def __init__(self, owner: OrtCudaSession, lock: threading.Lock, graph: GraphRun) -> None:
        self.inputs, self.outputs = graph.inputs, graph.outputs
        self._owner, self._lock, self._graph = owner, lock, graph

    def run(self) -> None:
        self._owner._open()
        with self._lock:
            self._graph.run_host({})


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
