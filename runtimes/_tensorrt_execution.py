"""A TensorRT engine, and what a thread needs to run it: an execution context, a stream and buffers."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes import _cuda
from runtimes._device_array import DeviceArray
from runtimes._inputs import numpy_dtype
from runtimes._tensorrt_api import Api
from runtimes._tensorrt_profiles import Profile, Shape, choose_profile, describe, substitutes
from runtimes.base import CompileFailed, InvalidInput, InvalidModel, Place, RunFailed, TensorSpec

#: What TensorRT calls the types that go in and out.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
#: TensorRT wants addresses of tensors to be multiples of this.
_ALIGNMENT = 256
#: How many sets of shapes one context keeps a recorded graph of.
_GRAPHS = 32


class Engine(_cuda.Owned):
    """A deserialised engine.

    Attributes:
        gpu: where it is.
        inputs, outputs: as the engine has them; a size that is not fixed is None.
        on_host: names of inputs and outputs that are read and written in host memory: those that are shapes.
        profiles: its optimisation profiles.
        graphs: whether runs are recorded here; TensorRT-RTX records by itself.
        keeps_kernels: whether kernels are compiled when they are first used, and can be kept.
    """

    def __init__(self, api: Api, gpu: _cuda.Device, plan: bytes, *, cuda_graph: bool, budget: int | None) -> None:
        self.trt, self.gpu, self._logger = api.trt, gpu, api.logger()
        trt = self.trt
        with gpu:
            runtime = trt.Runtime(self._logger)
            engine = runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise self._refused("TensorRT does not deserialise the plan", InvalidModel)
            if budget is not None:
                engine.weight_streaming_budget_v2 = budget
            super().__init__(gpu, _forget, (engine, _runtime_config(api, engine, cuda_graph=cuda_graph), runtime))
        self.graphs = cuda_graph and not api.flavor.records_graphs
        self.keeps_kernels = api.flavor.records_graphs
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.inputs = tuple(_spec(engine, name) for name in inputs)
        self.outputs = tuple(_spec(engine, name) for name in names if name not in inputs)
        self.on_host = frozenset(n for n in names if engine.get_tensor_location(n) == trt.TensorLocation.HOST)
        self.profiles = tuple(_profile(engine, inputs, index) for index in range(engine.num_optimization_profiles))

    @property
    def handle(self) -> Any:
        """TensorRT's ``ICudaEngine``."""
        return self._token[0][0]

    def take_kernels(self, content: bytes) -> bool:
        """Gives TensorRT-RTX kernels that it compiled in another process. Returns whether they fit this one."""
        _, (_, kernels), _ = self._token[0]
        with self.gpu:
            return bool(kernels.deserialize(content))

    def give_kernels(self) -> bytes:
        """The kernels that TensorRT-RTX has compiled or taken; b"" where it gives none."""
        _, (_, kernels), _ = self._token[0]
        with self.gpu:
            memory = kernels.serialize()
        return b"" if memory is None else bytes(memory)

    def context(self) -> Any:
        """A new ``IExecutionContext``; with the device's context current. Raises OutOfDeviceMemory, CompileFailed."""
        engine, settings, _ = self._token[0]
        context = engine.create_execution_context(*settings[:1])
        if context is None:
            raise self._refused("TensorRT cannot make an execution context", CompileFailed)
        return context

    def failed(self, what: str) -> RunFailed:
        """An error with what TensorRT said last."""
        error = self._refused(what, RunFailed)
        assert isinstance(error, RunFailed)
        return error

    def _refused(self, what: str, kind: type[InvalidModel | CompileFailed | RunFailed]) -> Exception:
        said = [text for severity, text in self._logger.messages.copy() if severity in ("ERROR", "INTERNAL_ERROR")]
        self._logger.messages.clear()
        text = f"{what}: {'; '.join(said[-3:])}" if said else what
        if "out of memory" in text.lower() or "OutOfMemory" in text:
            free, total = self.gpu.memory()
            return _cuda.OutOfDeviceMemory(
                f"{text}; GPU {self.gpu.ordinal} has {free:,} of {total:,} bytes free",
                hint="take a smaller batch, or close sessions that are not needed; nvidia-smi shows who else is there",
            )
        return kind(text)


def _forget(_: object) -> None:
    """TensorRT's objects go with their last reference, which is this one."""


def _runtime_config(api: Api, engine: Any, *, cuda_graph: bool) -> tuple[Any, ...]:
    """How TensorRT-RTX makes contexts, and what has to live with that; () for the others.

    It compiles kernels when they are first used; with one cache, contexts share them.
    """
    if not api.flavor.records_graphs:
        return ()
    config = engine.create_runtime_config()
    kernels = config.create_runtime_cache()
    config.set_runtime_cache(kernels)
    if cuda_graph:
        config.cuda_graph_strategy = api.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return config, kernels


def _spec(engine: Any, name: str) -> TensorSpec:
    told = engine.get_tensor_dtype(name).name
    if told not in _DTYPES:
        raise InvalidModel(f"{name!r} is a {told}, which cannot go in or out", hint="cast it inside the graph")
    numpy_dtype(_DTYPES[told])  # says now, not in the first run, that ml_dtypes is missing
    shape = engine.get_tensor_shape(name)
    return TensorSpec(name, _DTYPES[told], tuple(None if size < 0 else int(size) for size in shape))


def _profile(engine: Any, inputs: Sequence[str], index: int) -> Profile:
    values = {}
    for name in inputs:
        # The number comes first here and second above: that is how TensorRT has them.
        if engine.is_shape_inference_io(name) and (found := engine.get_tensor_profile_values(index, name)):
            values[name] = _bounds(found)
    return Profile({name: _bounds(engine.get_tensor_profile_shape(name, index)) for name in inputs}, values)


def _bounds(triple: Sequence[Any]) -> tuple[Shape, Shape, Shape]:
    low, best, high = (tuple(int(size) for size in one) for one in triple)
    return low, best, high


@functools.cache
def _allocator_type(trt: Any) -> type:
    """The class that TensorRT asks for the memory of an output whose shape depends on data."""

    class Allocator(trt.IOutputAllocator):
        """Keeps the memory of one output."""

        def __init__(self, gpu: _cuda.Device) -> None:
            trt.IOutputAllocator.__init__(self)
            self.gpu = gpu
            self.memory: _cuda.Memory | None = None
            self.shape: Shape | None = None
            self.error: Exception | None = None

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int | None:
            try:
                if self.memory is None or self.memory.nbytes < size:
                    self.memory = self.gpu.allocate(size)
                return self.memory.address
            except RunFailed as error:  # raised through C++ it would end the process
                self.error = error
                return None

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int | None:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(int(size) for size in shape)

    return Allocator


class Execution(_cuda.Owned):
    """An execution context with its stream and buffers. One thread at a time.

    Attributes:
        empty: the shapes of the outputs where the shapes that were set are known to give nothing but empty
            outputs, and the engine does not take them; else None.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._outputs = [spec.name for spec in engine.outputs]
        with engine.gpu:
            super().__init__(engine.gpu, _forget, engine.context())
        self.stream = engine.gpu.stream()
        self.empty: dict[str, Shape] | None = None
        #: of the inputs and of those outputs whose shape does not depend on data
        self.shapes: dict[str, Shape] = {}
        self._dtypes = {spec.name: numpy_dtype(spec.dtype) for spec in (*engine.inputs, *engine.outputs)}
        self._profile: int | None = None
        self._set: object = None
        self._host: dict[str, np.ndarray] = {}
        self._device: dict[str, _cuda.Memory] = {}
        self._staging: dict[str, np.ndarray] = {}
        self._addresses: dict[str, int] = {}
        self._graphs: dict[object, _cuda.Graph] = {}
        self._allocators: dict[str, Any] = {}

    @property
    def handle(self) -> Any:
        """TensorRT's ``IExecutionContext``."""
        return self._token[0]

    def set_shapes(self, shapes: Mapping[str, Shape], values: Mapping[str, np.ndarray]) -> None:
        """Chooses the profile, sets the shapes of the inputs, and makes room for all inputs and outputs.

        Args:
            values: the contents of inputs that are shapes; TensorRT derives the other shapes from them.

        Raises:
            InvalidInput: no profile takes them; the message lists the profiles.
        """
        engine = self.engine
        key = (tuple(shapes[spec.name] for spec in engine.inputs), tuple(values[n].tobytes() for n in values))
        if key == self._set:
            return
        self._set, self.empty = None, None
        numbers = {name: tuple(int(one) for one in np.ravel(array)) for name, array in values.items()}
        index = choose_profile(engine.profiles, shapes, numbers)
        if index is None:
            self.empty = self._empty_outputs(shapes)
            if self.empty is None:
                given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
                given += "".join(f", {name} = {list(one)}" for name, one in numbers.items())
                raise InvalidInput(
                    f"no profile of the engine takes {given}",
                    hint=f"it has {describe(engine.profiles)}; other shapes take an engine with another profile",
                )
            self._fit({**shapes, **self.empty})
        else:
            self._fit(shapes)
            for name, array in values.items():
                np.copyto(self.host(name), array)
                self._point(name, self._own(name))
            self._fit({**shapes, **self._infer(index, shapes)})
        self._set = key

    def _infer(self, index: int, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """The shapes of the outputs; those that depend on data are left out."""
        engine, context = self.engine, self._token[0]
        if self._profile != index:
            if not context.set_optimization_profile_async(index, self.stream.handle):
                raise engine.failed(f"TensorRT does not switch to profile {index}")
            self._profile = index
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise engine.failed(f"TensorRT does not take {name} {list(shape)}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise engine.failed(f"TensorRT cannot derive the shapes of the outputs: {error}") from error
        if missing:
            raise engine.failed(f"TensorRT lacks the shapes of {', '.join(missing)}")
        found = {spec.name: tuple(int(n) for n in context.get_tensor_shape(spec.name)) for spec in engine.outputs}
        return {name: shape for name, shape in found.items() if min(shape, default=0) >= 0}

    def _empty_outputs(self, shapes: Mapping[str, Shape]) -> dict[str, Shape] | None:
        """The shapes of the outputs for inputs with a size of 0, where those are then empty too."""
        if all(0 not in shape for shape in shapes.values()):
            return None
        for index, profile in enumerate(self.engine.profiles):
            stand = substitutes(profile, shapes)
            if stand is None or self.engine.on_host:
                continue
            small, large = (self._infer(index, one) for one in (stand.small, stand.large))
            if len(small) == len(self.engine.outputs):
                empty = stand.at_zero(list(small.values()), list(large.values()))
                return None if empty is None else dict(zip(small, empty, strict=True))
        return None

    def _fit(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = dict(shapes)
        self._host.clear()

    def host(self, name: str) -> np.ndarray:
        """The page-locked array of an input, or of an output whose shape is known, for the shapes that are set."""
        array = self._host.get(name)
        if array is None:
            dtype, size = self._dtypes[name], self._size(name)
            if name not in self._staging or self._staging[name].nbytes < size:
                self._graphs.clear()  # they read and write the buffer that goes
                self._addresses.pop(name, None)
                self._staging[name] = self.engine.gpu.page_locked(size)
            array = self._host[name] = self._staging[name][:size].view(dtype).reshape(self.shapes[name])
        return array

    def _size(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self._dtypes[name].itemsize

    def _own(self, name: str) -> int:
        """The address of this context's own buffer of a tensor, large enough for the shapes that are set."""
        if name in self.engine.on_host:
            self.host(name)
            return int(self._staging[name].ctypes.data)
        memory, size = self._device.get(name), self._size(name)
        if memory is None or memory.nbytes < size:
            self._graphs.clear()
            memory = self._device[name] = self.engine.gpu.allocate(size)
        return memory.address

    def _point(self, name: str, address: int) -> None:
        if self._addresses.get(name) != address:
            context = self._token[0]
            if not context.set_tensor_address(name, address):
                raise self.engine.failed(f"TensorRT does not take the address of {name!r}")
            self._addresses[name] = address

    def run(self, given: Mapping[str, DeviceArray], place: Place) -> dict[str, Any]:
        """Runs once; with the device's context current.

        Args:
            given: inputs that are on the device; the others were written into their ``host`` array.
            place: where the outputs are left.

        Returns:
            New arrays, in the order of the outputs.
        """
        gpu, targets = self.engine.gpu, {}
        if place == "device":
            targets = {name: gpu.allocate(self._size(name)) for name in self._outputs if name in self.shapes}
        if self.empty is None:
            if place == "host" and not given:
                self.run_host()
            else:
                self._queue(given, targets)
                self.stream.synchronize()
        results: dict[str, Any] = {}
        for name in self._outputs:
            if name not in self.shapes:
                results[name] = self._claimed(name, place)
            elif place == "host":
                results[name] = self.host(name).copy()
            else:
                memory = targets[name]
                results[name] = DeviceArray(memory.address, self.shapes[name], self._dtypes[name], gpu.ordinal, memory)
        return results

    def run_host(self) -> None:
        """From ``host`` arrays to ``host`` arrays. With graphs, the second run with the same shapes is a replay."""
        if not self.engine.graphs or not self.static:
            self._queue({}, {})
        elif self._set in self._graphs:
            self._graphs[self._set].launch(self.stream)
        else:
            # Once without: kernels are loaded and memory is taken then, which cannot be recorded.
            self._queue({}, {})
            self.stream.synchronize()
            if len(self._graphs) >= _GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[self._set] = self.stream.capture(lambda: self._queue({}, {}))
        self.stream.synchronize()

    @property
    def static(self) -> bool:
        """Whether the shapes of all outputs are known before a run."""
        return all(name in self.shapes for name in self._outputs)

    def _queue(self, given: Mapping[str, DeviceArray], targets: Mapping[str, _cuda.Memory]) -> None:
        """Queues copies and kernels; outputs go to ``targets``, and those that have none there to ``host``."""
        context, stream, on_host = self._token[0], self.stream, self.engine.on_host
        for spec in self.engine.inputs:
            name, array = spec.name, given.get(spec.name)
            if array is not None and array.address % _ALIGNMENT == 0 and array.nbytes:
                self._point(name, array.address)
                continue
            own = self._own(name)
            self._point(name, own)
            if name in on_host or self._size(name) == 0:
                continue
            if array is not None:
                stream.copy(own, array.address, array.nbytes)
            else:
                stream.upload(own, self._staged(name))
        for name in self._outputs:
            if name in self.shapes:
                straight = name in targets and name not in on_host
                self._point(name, targets[name].address if straight else self._own(name))
            elif name not in self._allocators:
                allocator = self._allocators[name] = _allocator_type(self.engine.trt)(self.engine.gpu)
                if not context.set_output_allocator(name, allocator):
                    raise self.engine.failed(f"TensorRT takes no allocator for {name!r}")
        if not context.execute_async_v3(stream.handle):
            for allocator in self._allocators.values():
                if allocator.error is not None:
                    raise allocator.error
            raise self.engine.failed("TensorRT failed while it ran")
        for name in self._outputs:
            if name not in self.shapes or self._size(name) == 0:
                continue
            if name in on_host and name in targets:
                # Written by the engine in host memory, in the order of the stream.
                stream.upload(targets[name].address, self._staged(name))
            elif name not in on_host and name not in targets:
                stream.download(self._staged(name), self._own(name))

    def _staged(self, name: str) -> np.ndarray:
        self.host(name)
        return self._staging[name][: self._size(name)]

    def _claimed(self, name: str, place: Place) -> Any:
        """An output whose shape depended on data."""
        allocator = self._allocators[name]
        if allocator.shape is None or allocator.memory is None:
            raise self.engine.failed(f"TensorRT did not say how large {name!r} is")
        array = DeviceArray(
            allocator.memory.address, allocator.shape, self._dtypes[name], self.engine.gpu.ordinal, allocator.memory
        )
        if place == "host":
            return array.numpy()
        allocator.memory = None  # the next run takes memory of its own
        return array
