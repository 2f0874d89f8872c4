"""From an ONNX file to a TensorRT engine.

The network is strongly typed: types are those of the graph, and nothing here chooses a precision.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from runtimes import _cuda
from runtimes._tensorrt_api import Api
from runtimes._tensorrt_graph import check_types, foreign_types, last_error, not_supported, parser_errors
from runtimes._tensorrt_options import NetworkInput, Profile, TensorRTOptions, resolve_profiles
from runtimes._trust import read_own, write_own
from runtimes.base import CompileFailed
from runtimes.model_file import check_model_file

#: Is called with what the builder is at and, where it is known, the share that is done, 0..1.
Progress = Callable[[str, float | None], None]

_LOG_TAIL = 12
_SOURCE = re.compile(r"^\S+\.(?:cpp|h):\d+: ")

_watching: contextvars.ContextVar[Progress | None] = contextvars.ContextVar("runtimes.tensorrt.progress", default=None)


@contextlib.contextmanager
def watch_builds(progress: Progress) -> Iterator[None]:
    """Within the block, ``progress`` is told how far engine builds of this thread are.

    It is called from the builder's threads, so it has to be quick. Raising from it cancels the build.
    """
    token = _watching.set(progress)
    try:
        yield
    finally:
        _watching.reset(token)


@dataclasses.dataclass(frozen=True, slots=True)
class Engine:
    """A built engine.

    Attributes:
        plan: TensorRT's memory with the serialised engine, a buffer.
        profiles: the optimisation profiles that it has.
        remarks: what was assumed, and warnings of the builder that concern numbers or speed.
    """

    plan: Any
    profiles: tuple[Profile, ...]
    remarks: tuple[str, ...]


def build_engine(
    api: Api,
    model: Path,
    *,
    capabilities: Sequence[str] = (),
    ordinal: int | None = None,
    options: TensorRTOptions,
    timing_cache: Path | None = None,
    command: str,
) -> Engine:
    """Builds an engine of an ONNX file that was checked.

    Args:
        api: which TensorRT.
        model: the file, with its external data beside it.
        capabilities: ``sm89`` and the like, ``current`` for the GPU that is here; with none TensorRT-RTX builds for
            all GPUs since Ampere, and TensorRT for the GPU that is here.
        ordinal: which GPU, where there are several.
        options: the builder's.
        timing_cache: the file that timings are kept in; None where none are.
        command: what a person runs to see a failure again.

    Raises:
        CompileFailed: a node or type is not supported, or the builder failed; with the end of its log.
        InvalidInput: profiles that do not fit the model.
        KeyboardInterrupt: the user interrupted it; the builder has stopped.
    """
    monitor = _monitor(api.trt)(_watching.get())

    def build() -> Engine:
        # the current GPU is a matter of the thread
        with _cuda.device(ordinal) if ordinal else contextlib.nullcontext():
            return _build(api, model, capabilities, options, timing_cache, command, monitor)

    return _in_thread(build, monitor)


def _build(
    api: Api,
    model: Path,
    capabilities: Sequence[str],
    options: TensorRTOptions,
    timing_cache: Path | None,
    command: str,
    monitor: Any,
) -> Engine:
    checked = check_model_file(model)
    if foreign := foreign_types(checked):
        raise not_supported(api, model, foreign)
    logger = api.logger()
    builder = api.trt.Builder(logger)
    network = builder.create_network(api.network_flags())
    parser = api.trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        raise not_supported(api, model, parser_errors(api, parser, logger))
    check_types(api, network, checked, model)
    config = builder.create_builder_config()
    _configure(api, config, options, capabilities)
    profiles, remarks = resolve_profiles(_inputs(network), options.profiles)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for one in _inputs(network):
            if one.name in shapes:
                (profile.set_shape_input if one.is_shape else profile.set_shape)(one.name, *shapes[one.name])
        if config.add_optimization_profile(profile) < 0:
            raise CompileFailed(
                f"{api.flavor.title} refused the profile {shapes}: {last_error(logger)}",
                where="option profiles",
                hint=_tail(logger, command),
            )
    cache = _attach_timings(config, timing_cache) if timing_cache else None
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor.failure is not None:
        raise monitor.failure
    if plan is None:
        raise CompileFailed(
            f"{api.flavor.title} {api.version} could not build the engine: {last_error(logger)}",
            where=str(model),
            hint=_tail(logger, command),
        )
    if cache is not None and timing_cache is not None:
        _keep_timings(config, cache, timing_cache)
    return Engine(plan, profiles, remarks)


def _inputs(network: Any) -> list[NetworkInput]:
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    return [
        NetworkInput(
            tensor.name,
            tuple(tensor.shape),
            tuple(tensor.get_dimension_name(axis) or "" for axis in range(len(tensor.shape))),
            bool(tensor.is_shape_tensor),
        )
        for tensor in tensors
    ]


def _configure(api: Api, config: Any, options: TensorRTOptions, capabilities: Sequence[str]) -> None:
    trt = api.trt
    config.builder_optimization_level = options.optimization_level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    flags = {
        trt.BuilderFlag.SPARSE_WEIGHTS: options.sparsity,
        trt.BuilderFlag.REFIT: options.refit,
        trt.BuilderFlag.VERSION_COMPATIBLE: options.version_compatible,
        trt.BuilderFlag.WEIGHT_STREAMING: options.weight_streaming,
        trt.BuilderFlag.TF32: options.tf32,
    }
    for flag, wanted in flags.items():
        if wanted:
            config.set_flag(flag)
        else:
            config.clear_flag(flag)
    if options.layer_information:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.hardware_compatibility == "ampere-plus":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif options.hardware_compatibility == "same-compute-capability":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(trt.ComputeCapability.__members__[name.upper()], index)


class _Phases:
    """How far a build is: phases lie in each other, each with a known number of steps."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str | None, int, int]] = {}
        self._most = 0.0
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._open[name] = (parent, max(steps, 1), 0)

    def step(self, name: str, step: int) -> None:
        with self._lock:
            if name in self._open:
                parent, steps, done = self._open[name]
                self._open[name] = (parent, steps, max(done, step + 1))

    def finish(self, name: str) -> None:
        with self._lock:
            self._open.pop(name, None)

    def share(self) -> float | None:
        """The share of the outermost phase that is done; None before the first. It never falls: a phase may end
        without a step of the one that it lies in.
        """
        with self._lock:
            top = next((name for name, (parent, *_) in self._open.items() if parent not in self._open), None)
            if top is None:
                return None
            self._most = max(self._most, self._share_of(top))
            return self._most

    def _share_of(self, name: str) -> float:
        _, steps, done = self._open[name]
        inner = sum(self._share_of(child) for child, (parent, *_) in self._open.items() if parent == name)
        return min(1.0, (done + min(inner, 1.0)) / steps)


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Hands progress on, and stops the build where that was asked for or where telling it failed."""

        def __init__(self, progress: Progress | None) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self.failure: BaseException | None = None
            self._progress = progress
            self._phases = _Phases()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases.start(phase_name, parent_phase, num_steps)
            self._tell(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            self._phases.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._phases.step(phase_name, step)
            self._tell(phase_name)
            return not self.cancelled

        def _tell(self, text: str) -> None:
            if self._progress is None or self.cancelled:
                return
            try:
                self._progress(text, self._phases.share())
            except BaseException as error:  # noqa: BLE001 - must not fly through native code; raised again by build_engine
                self.failure = error
                self.cancelled = True

    return Monitor


def _in_thread(work: Callable[[], Engine], monitor: Any) -> Engine:
    """Runs the builder beside this thread, so that Ctrl-C arrives here and not inside native code."""
    results: list[Engine] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=run, name="tensorrt-build")
    try:
        thread.start()  # waits until the thread runs: it may be interrupted here too
        # an event, since Python 3.11 takes a thread for ended when its join() is interrupted
        while not done.wait(0.1):
            pass
    except BaseException:
        monitor.cancelled = True
        if thread.ident is not None:
            done.wait()
        raise
    finally:
        if thread.ident is not None:
            thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _tail(logger: Any, command: str) -> str:
    said = [f"[{severity}] {_SOURCE.sub('', ' '.join(text.split()))}" for severity, text in logger.messages]
    lines = "".join(f"\n        {line[:400]}" for line in said[-_LOG_TAIL:])
    return f"to see it again: {command}\n  log, its end:{lines or ' empty'}"


def _attach_timings(config: Any, file: Path) -> Any:
    cache = config.create_timing_cache(read_own(file) or b"")
    # a mismatch is not ignored: timings of another GPU would choose the wrong kernels
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _keep_timings(config: Any, cache: Any, file: Path) -> None:
    """Adds to the file what this build timed; what others kept there meanwhile stays."""
    if others := read_own(file):
        cache.combine(config.create_timing_cache(others), True)
    memory = cache.serialize()
    if memory is not None:
        write_own(file, bytes(memoryview(memory)))
