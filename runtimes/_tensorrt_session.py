"""Runs TensorRT engines.

A session holds one engine and a pool of executions, one for each thread that is inside ``run`` at the same time
(``_tensorrt_execution.py``). Each has a stream, device buffers and page-locked staging of its own::

    numpy → staging → device → kernels → device → staging → numpy
            (copies and kernels are queued on the stream; with ``cuda_graph`` as one recorded graph)

Arrays that are on the GPU already are read where they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from runtimes import _cuda
from runtimes._device_array import DeviceArray, on_device
from runtimes._digests import cache_root
from runtimes._driver import driver
from runtimes._inputs import InputCheck, check_place
from runtimes._tensorrt_api import Api
from runtimes._tensorrt_execution import Engine, Execution
from runtimes._tensorrt_kernels import KernelStore, kernel_file
from runtimes._tensorrt_profiles import describe
from runtimes.base import Binding, InvalidInput, Place, RunFailed, Session, SessionClosed, Target, TensorSpec

T = TypeVar("T")


def make_session(
    api: Api,
    plan: bytes,
    target: Target,
    *,
    options: Any,
    info: Mapping[str, str],
    plan_sha256: str,
    shapes: Mapping[str, tuple[int | str | None, ...] | None] | None = None,
) -> Session:
    """Makes a session of a plan, which is native code: whether it may be loaded was checked before.

    Args:
        plan: a serialised engine that this TensorRT and this GPU can run.
        target: its device is a GPU's number, or compute capabilities; those and none mean the first GPU.
        options: ``cuda_graph``, ``weight_streaming_budget`` and ``kernel_cache`` of ``TensorRTOptions``.
        info: what was chosen and why.
        plan_sha256: of the plan, in lower-case hex: kernels that were compiled for it are kept under this name.
        shapes: of inputs and outputs as the graph declares them, for the names of sizes, which engines forget.

    Raises:
        TargetUnavailable: no driver, one that is too old, no such GPU, or no package to use it with.
        InvalidModel: TensorRT does not deserialise the plan.
        CompileFailed: the engine cannot be set up.
        OutOfDeviceMemory: the GPU has too little free memory.
    """
    _cuda.require_driver(cuda=api.cuda, who=api.flavor.title)
    ordinal = int(target.device) if target.device is not None and target.device.isdigit() else 0
    gpu = _cuda.device(ordinal)
    if options.cuda_graph and not api.flavor.records_graphs:
        _cuda.require_graphs()
    engine = Engine(api, gpu, plan, cuda_graph=options.cuda_graph, budget=options.weight_streaming_budget)
    store = None
    if engine.keeps_kernels and options.kernel_cache and (root := cache_root()) is not None:
        state = driver()
        file = kernel_file(root, api, state.gpus[ordinal], state, plan_sha256)
        store = KernelStore(file, take=engine.take_kernels, give=engine.give_kernels)
    return TensorRTSession(engine, target, info=info, shapes=shapes or {}, store=store)


class Pool(Generic[T]):
    """Things of which each thread has one while it needs it. Made on demand, the last given back is the next taken."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make: Callable[[], T] | None = make
        self._idle: list[T] = []
        self._lock = threading.Lock()

    def take(self) -> T:
        """One that nobody else has. Raises SessionClosed after ``close``."""
        with self._lock:
            self.require_open()
            if self._idle:
                return self._idle.pop()
        return self.make()

    def make(self) -> T:
        """A new one, which is not given back. Raises SessionClosed after ``close``."""
        make = self._make  # another thread may close between the look and the call
        return self.require_open() if make is None else make()

    def give(self, one: T) -> None:
        """Gives one back; after ``close`` it is dropped."""
        with self._lock:
            if self._make is not None:
                self._idle.append(one)

    def close(self) -> None:
        """Drops those that nobody has, and from now on those that are given back. Twice is fine."""
        with self._lock:
            self._make = None
            self._idle = []

    def require_open(self) -> Any:
        """Raises SessionClosed after ``close``."""
        if self._make is None:
            raise SessionClosed("the session was closed", hint="load the model again")


class TensorRTSession(Session):
    """A session on TensorRT. Made by ``make_session``."""

    def __init__(
        self,
        engine: Engine,
        target: Target,
        *,
        info: Mapping[str, str],
        shapes: Mapping[str, tuple[int | str | None, ...] | None],
        store: KernelStore | None = None,
    ) -> None:
        self.target = target
        self.inputs = tuple(_named(spec, shapes.get(spec.name)) for spec in engine.inputs)
        self.outputs = tuple(_named(spec, shapes.get(spec.name)) for spec in engine.outputs)
        self.info = {
            **info,
            "profiles": describe(engine.profiles),
            "cuda": str(_cuda.package()),
        }
        if engine.keeps_kernels:
            self.info["kernels"] = "not kept" if store is None else store.remark
        self._store = store
        self._first = True
        self._gpu = engine.gpu
        self._values = [spec.name for spec in engine.inputs if spec.name in engine.on_host]
        self._check = InputCheck(self.inputs, others=(DeviceArray,))
        self._pool: Pool[Execution] = Pool(lambda: Execution(engine))
        # The first context is made now: what is wrong with the engine or short of memory is said by load.
        self._pool.give(self._pool.take())

    def run(self, feeds: Mapping[str, Any], /, *, outputs: Place = "host") -> dict[str, Any]:
        if outputs != "host":
            check_place(outputs)
        execution = self._pool.take()
        try:
            with self._gpu:
                results = self._run(execution, feeds, outputs)
        except InvalidInput:
            self._pool.give(execution)
            raise
        # After any other failure nobody knows what state the context is in: it is dropped.
        self._pool.give(execution)
        if self._first:
            self._first = False
            self._keep_kernels()
        return results

    def _keep_kernels(self) -> None:
        """Saves what was compiled. TensorRT compiles in threads of its own into the same cache: others may run."""
        store = self._store
        if store is None:
            return
        try:
            store.save()
        except RunFailed as error:  # a run that was fine does not fail for the next process's sake
            self.info = {**self.info, "kernels": f"not kept: {error.what}"}

    def inspect(self, look: Callable[[Any, Any], T]) -> T:
        """Calls ``look`` with TensorRT's own engine and an execution context, the GPU being current.

        What it is given may not be kept: it goes with the session.
        """
        execution = self._pool.take()
        try:
            with self._gpu:
                return look(execution.engine.handle, execution.handle)
        finally:
            self._pool.give(execution)

    def _run(self, execution: Execution, feeds: Mapping[str, Any], place: Place) -> dict[str, Any]:
        given: dict[str, DeviceArray] = {}
        if isinstance(feeds, Mapping):
            for name, value in feeds.items():
                if type(value) is not np.ndarray:
                    found = on_device(value, name=name, ordinal=self._gpu.ordinal, stream=execution.stream)
                    if found is not None:
                        given[name] = found
            if given:
                feeds = {**feeds, **given}
        checked = self._check(feeds)
        for name in self._values:
            if name in given:
                raise InvalidInput(
                    f"input {name!r} is a shape, which TensorRT reads in host memory",
                    where=f"input {name!r}",
                    hint="give it as a numpy array",
                )
        execution.set_shapes(
            {name: array.shape for name, array in checked.items()}, {name: checked[name] for name in self._values}
        )
        for name, array in checked.items():
            if name not in given:
                np.copyto(execution.host(name), array)
        return execution.run(given, place)

    def bind(self, shapes: Mapping[str, Sequence[int]], /) -> TensorRTBinding:
        self._check.shapes(shapes)
        if self._values:
            raise InvalidInput(f"{self._values[0]!r} is a shape and cannot be bound", hint="use run() for this model")
        execution = self._pool.make()
        with self._gpu:
            execution.set_shapes({name: tuple(int(size) for size in shape) for name, shape in shapes.items()}, {})
        if not execution.static:
            name = next(spec.name for spec in self.outputs if spec.name not in execution.shapes)
            raise InvalidInput(
                f"the shape of output {name!r} depends on the data",
                where=f"output {name!r}",
                hint="use run() for this model",
            )
        return TensorRTBinding(self._pool, execution)

    def close(self) -> None:
        self._keep_kernels()
        self._store = None  # it holds the engine
        self._pool.close()


def _named(spec: TensorSpec, declared: tuple[int | str | None, ...] | None) -> TensorSpec:
    """With the graph's names for the sizes that the engine leaves open."""
    if declared is None or spec.shape is None or len(declared) != len(spec.shape):
        return spec
    dims = tuple(
        name if size is None and isinstance(name, str) else size
        for size, name in zip(spec.shape, declared, strict=True)
    )
    return TensorSpec(spec.name, spec.dtype, dims)


class TensorRTBinding(Binding):
    """Page-locked arrays over an execution context of its own. Made by ``TensorRTSession.bind``."""

    def __init__(self, pool: Pool[Execution], execution: Execution) -> None:
        self._pool = pool
        self._execution = execution
        engine = execution.engine
        self.inputs = {spec.name: execution.host(spec.name) for spec in engine.inputs}
        self.outputs = {spec.name: execution.host(spec.name) for spec in engine.outputs}

    def run(self) -> None:
        self._pool.require_open()
        if self._execution.empty is None:
            with self._execution.engine.gpu:
                self._execution.run_host()
