"""From an ONNX file to a TensorRT engine, and what TensorRT says of a graph that it cannot build.

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
from runtimes._tensorrt_options import NetworkInput, Profile, TensorRTOptions, resolve_profiles
from runtimes._trust import read_own, write_own
from runtimes.base import CompileFailed, InvalidModel
from runtimes.model_file import ModelFile, check_model_file

#: Is called with what the builder is at and, where it is known, the share that is done, 0..1.
Progress = Callable[[str, float | None], None]

#: ONNX's number of an element type -> TensorRT's name of it, for what goes in and out of an engine.
_TYPES = {
    1: "FLOAT",
    2: "UINT8",
    3: "INT8",
    6: "INT32",
    7: "INT64",
    9: "BOOL",
    10: "HALF",
    16: "BF16",
    17: "FP8",
    22: "INT4",
    23: "FP4",
}
_DOUBLE = 11
#: The others, for messages.
_OTHER_TYPES = {
    0: "of no type",
    4: "uint16",
    5: "int16",
    8: "string",
    _DOUBLE: "float64",
    12: "uint32",
    13: "uint64",
    14: "complex64",
    15: "complex128",
}
_LOG_TAIL = 12
#: "While parsing node number 1 [FooBar -> "y"]:", the only place that has an output where a node has no name
_PARSING = re.compile(r'While parsing node number (\d+) \[(\S+) -> "([^"]*)"')
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
class Unsupported:
    """A node, or an input or output, that TensorRT does not take.

    Attributes:
        node: its name, or ``Op -> first output`` where it has none.
        op: the operator; "" for an input or output of the graph.
        reason: why, for a person.
        advice: what avoids it. None where nothing is known.
    """

    node: str
    op: str
    reason: str
    advice: str | None = None

    def __str__(self) -> str:
        return f"{self.node}{f' ({self.op})' if self.op and self.op not in self.node else ''}: {self.reason}"


@dataclasses.dataclass(frozen=True, slots=True)
class NetworkReport:
    """What TensorRT says of a graph before anything is built.

    Attributes:
        target: the runtime that was asked.
        version: of it.
        nodes: how many nodes the graph has at its top level.
        supported: how many of them TensorRT takes.
        parts: into how many pieces the rest would cut the graph; 1 where all of it is supported.
        unsupported: the others, and why.
    """

    target: str
    version: str
    nodes: int
    supported: int
    parts: int
    unsupported: tuple[Unsupported, ...]


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


def inspect_graph(api: Api, model: Path) -> NetworkReport:
    """Asks TensorRT which nodes of a graph it takes, without building anything or needing a GPU.

    Raises:
        InvalidModel: the file is no ONNX model, or TensorRT cannot parse it.
    """
    checked = check_model_file(model)
    foreign = _foreign_types(api, checked)
    if foreign:
        # the parser gives up at the first of these and says nothing of the nodes
        return NetworkReport(api.flavor.target, api.version, 0, 0, 0, foreign)
    logger = api.logger()
    builder = api.trt.Builder(logger)
    network = builder.create_network(api.network_flags())
    parser = api.trt.OnnxParser(network, logger)
    parser.supports_model_v2(model.read_bytes(), str(model))
    sizes = [len(parser.get_subgraph_nodes(i)) for i in range(parser.num_subgraphs)]
    taken = [size for i, size in enumerate(sizes) if parser.is_subgraph_supported(i)]
    unsupported = _parser_errors(api, parser, logger)
    if not sizes and unsupported and not unsupported[0].op:
        raise InvalidModel(f"{api.flavor.title} cannot parse it: {unsupported[0].reason}", where=str(model))
    return NetworkReport(api.flavor.target, api.version, sum(sizes), sum(taken), len(sizes), unsupported)


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
    if foreign := _foreign_types(api, checked):
        raise _not_supported(api, model, foreign)
    logger = api.logger()
    builder = api.trt.Builder(logger)
    network = builder.create_network(api.network_flags())
    parser = api.trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        raise _not_supported(api, model, _parser_errors(api, parser, logger))
    _check_types(api, network, checked, model)
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
                f"{api.flavor.title} refused the profile {shapes}: {_last_error(logger)}",
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
            f"{api.flavor.title} {api.version} could not build the engine: {_last_error(logger)}",
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


def _foreign_types(api: Api, checked: ModelFile) -> tuple[Unsupported, ...]:
    """Inputs and outputs of a type that no engine takes or gives."""
    return tuple(
        Unsupported(
            name,
            "",
            f"it is {_OTHER_TYPES.get(number, f'of element type {number}')}, which no engine takes or gives",
            "cast it in the graph, or outside of it",
        )
        for name, number in checked.element_types.items()
        if number not in _TYPES and number != _DOUBLE
    )


def _check_types(api: Api, network: Any, checked: ModelFile, model: Path) -> None:
    """TensorRT takes float64 for float32 without a word: then a caller's arrays would be refused, or misread."""
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    changed = []
    for tensor in tensors:
        number = checked.element_types.get(tensor.name)
        became = tensor.dtype.name
        readable = "float32" if became == "FLOAT" else became
        if number is not None and _TYPES.get(number) != became:
            was = _OTHER_TYPES.get(number) or _TYPES[number]
            reason = f"it is {was} in the graph, and {api.flavor.title} would make it {readable}"
            changed.append(Unsupported(tensor.name, "", reason, f"export the model with {readable} in its place"))
    if changed:
        raise _not_supported(api, model, changed)


# ---------------------------------------------------------------- what the parser says

#: Operators that only the CPU kernels of ONNX Runtime have, or that stand for integers without Q/DQ.
_INTEGER_OPS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")


def _advice(op: str, domain_of_ort: bool, reason: str) -> str | None:
    """What in the toolchain would avoid it."""
    if "shiftIsAllZeros" in reason or "zero_point" in reason or "zero point" in reason:
        return "TensorRT's INT8 is symmetric: quantise the float model with this target, so that zero-points are 0"
    if op in _INTEGER_OPS or domain_of_ort:
        return (
            f"{op} is an operator of ONNX Runtime's CPU kernels: build from the float model, which is "
            f"quantised and optimised for this target then"
        )
    if "nitializer" in reason or "constant" in reason.lower() or "weights" in reason.lower():
        return "the pass fold_constants computes what does not depend on inputs: build with the default passes"
    if "plugin" in reason.lower() or reason.endswith(f"has no {op}"):
        return "export the model without this op, or leave the part with it out; ort-cuda and ort-cpu may run it"
    return None


def _parser_errors(api: Api, parser: Any, logger: Any) -> tuple[Unsupported, ...]:
    outputs = {}
    for _, text in logger.messages:
        if match := _PARSING.search(text):
            outputs[int(match[1]), match[2]] = match[3]
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        op = error.node_operator()
        label = error.node_name()
        if not label and op:
            label = f"{op} -> {outputs.get((error.node(), op), f'node {error.node()}')}"
        reason = _reason(api, op, " ".join(error.desc().split()))
        stack = [name for name in error.local_function_stack() if name]
        if stack:
            reason += f", in function {' / '.join(stack)}"
        one = Unsupported(label or "the graph", op, reason, _advice(op, op in _CONTRIB, reason))
        if one not in found:
            found.append(one)
    if not found:
        found.append(Unsupported("the graph", "", _last_error(logger)))
    return tuple(found)


#: Operators of the domain com.microsoft that ONNX Runtime's own optimiser writes.
_CONTRIB = frozenset(
    (
        *("FusedConv", "FusedMatMul", "FusedGemm", "SkipLayerNormalization", "BiasGelu", "QLinearAdd", "QLinearMul"),
        *("NhwcFusedConv", "QGemm", "QLinearConcat", "QLinearGlobalAveragePool", "QLinearSigmoid", "QAttention"),
        *("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "EmbedLayerNormalization", "ReorderInput", "ReorderOutput"),
    )
)


def _reason(api: Api, op: str, text: str) -> str:
    """The parser's words, where they are more than the expression that was false."""
    if text in ("false", ""):
        return f"{api.flavor.title} {api.version} has no {op}"
    if "Plugin not found" in text:
        return f"{api.flavor.title} {api.version} has no {op}, and there is no plugin of that name"
    # 'Assertion failed: (condition) && "what it means"': the second half is for people
    match = re.search(r'&& "([^"]+)"\.?$', text)
    return match[1] if match else text.removeprefix("Assertion failed: ")


def _not_supported(api: Api, model: Path, found: Sequence[Unsupported]) -> CompileFailed:
    first = found[0]
    more = "".join(f"\n        {one}" for one in found[1:8])
    if len(found) > 8:
        more += f"\n        and {len(found) - 8} more"
    advice = list(dict.fromkeys(one.advice for one in found if one.advice))
    return CompileFailed(
        f"{api.flavor.title} {api.version} does not take this graph: {first}{more}",
        where=f"{model}, {'node' if first.op else 'tensor'} {first.node!r}",
        hint="\n        ".join(advice) or f"see all of it: toolchain inspect --target {api.flavor.target} {model}",
    )


# ---------------------------------------------------------------- running the builder


class _Phases:
    """How far a build is: phases lie in each other, each with a known number of steps."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str | None, int, int]] = {}
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
        """The share of the outermost phase that is done; None before the first."""
        with self._lock:
            top = next((name for name, (parent, *_) in self._open.items() if parent not in self._open), None)
            return None if top is None else self._share_of(top)

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

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failures.append(error)

    thread = threading.Thread(target=run, name="tensorrt-build")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        monitor.cancelled = True
        thread.join()
        raise
    if failures:
        raise failures[0]
    return results[0]


def _last_error(logger: Any) -> str:
    """What the builder said last that was an error, without the source line it came from."""
    errors = [text for severity, text in logger.messages if severity in ("ERROR", "INTERNAL_ERROR")]
    # where there is no driver, that is said again after every other error
    telling = [text for text in errors if "checkMacros.cpp" not in text] or errors
    if not telling:
        return "it does not say why"
    text = " ".join(telling[-1].split())
    text = re.sub(r"^\S+: Error Code \d+: ", "", text)
    return re.sub(r"\s*\(?In \S+ at \S+:\d+\)?", "", text)


def _tail(logger: Any, command: str) -> str:
    said = [f"[{severity}] {_SOURCE.sub('', ' '.join(text.split()))}" for severity, text in logger.messages]
    lines = "".join(f"\n        {line[:400]}" for line in said[-_LOG_TAIL:])
    return f"to see it again: {command}\n  log, its end:{lines or ' empty'}"


# ---------------------------------------------------------------- timings


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
