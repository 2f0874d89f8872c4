"""OpenVINO on the CPU: target ``openvino-cpu``.

``compile`` keeps the portable ``model.onnx`` and nothing else. What OpenVINO makes of it loads several times
faster, but its parser trusts the offsets in the file, so it does not travel: ``load`` keeps it in the user's own
cache (``runtimes/_openvino_cache.py``), under a key of everything that it is bound to.

OpenVINO computes float64 in float32 and every integer of 32 bits and more in int32. The first is said in
``session.info``; of the second, inputs that int32 cannot hold are refused, since they would be cut silently.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import numpy as np

from runtimes import _openvino_cache
from runtimes._inputs import InputCheck, aligned_empty, check_place, numpy_dtype, output_shapes
from runtimes._options import check_choice, check_switches, check_whole, own_options
from runtimes.base import (
    Availability,
    Backend,
    Binding,
    Compiled,
    CompileFailed,
    Error,
    InvalidInput,
    InvalidModel,
    Place,
    RunFailed,
    Session,
    SessionClosed,
    Target,
    TargetUnavailable,
    TensorSpec,
)
from runtimes.model_file import ModelFile, check_model_file, copy_model

Hint = Literal["latency", "throughput"]
Precision = Literal["f32", "bf16", "f16"]

#: OpenVINO's name of an element type -> ours
_DTYPES = {
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "bf16": "bfloat16",
    "f8e4m3": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
    "boolean": "bool",
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("i", "int"), ("u", "uint")) for bits in (8, 16, 32, 64)},
}
#: Integers that do not fit the int32 that OpenVINO computes in.
_WIDE = ("int64", "uint32", "uint64")
_INT32 = np.iinfo(np.int32)
#: dtypes that numpy lacks: OpenVINO's name, and the numpy type that carries the bits
_FOREIGN: dict[str, tuple[str, np.dtype[Any]]] = {
    "bfloat16": ("bf16", np.dtype("uint16")),
    "float8_e4m3fn": ("f8e4m3", np.dtype("uint8")),
    "float8_e5m2": ("f8e5m2", np.dtype("uint8")),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OpenVinoOptions:
    """Session options of ``openvino-cpu``.

    Attributes:
        hint: "latency" gives one run all cores; "throughput" runs several at once, for as many callers.
        threads: threads for inference; 0 leaves it to OpenVINO.
        precision: what float layers compute in. "f32" is what the model says, with nothing rounded behind the
            caller's back; "bf16" and "f16" are faster where the CPU has them, and another accuracy.
        cache: keep what OpenVINO made of the model in the user's cache, and load that the next time.
    """

    hint: Hint = "latency"
    threads: int = 0
    precision: Precision = "f32"
    cache: bool = True

    def __post_init__(self) -> None:
        check_choice("openvino-cpu", self, "hint", Hint)
        check_choice("openvino-cpu", self, "precision", Precision)
        check_whole("openvino-cpu", self, "threads", 0, 4096)
        check_switches("openvino-cpu", self)


class OpenVinoCpu(Backend):
    """The backend of ``openvino-cpu``."""

    name: ClassVar[str] = "openvino-cpu"
    execution_provider: ClassVar[str | None] = None
    device_class: ClassVar[str] = "cpu"
    options_type: ClassVar[type] = OpenVinoOptions
    packages: ClassVar[tuple[str, ...]] = ("openvino",)
    threads_option: ClassVar[str | None] = "threads"

    def probe(self) -> Availability:
        if importlib.util.find_spec("openvino") is None:
            return Availability(False, reason="openvino is not installed", remedy="pip install openvino")
        try:
            import openvino

            version = str(openvino.__version__).split("-", 1)[0]
            devices = _core().available_devices
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            # AttributeError: a folder that an uninstall left behind imports as an empty package.
            return Availability(
                False,
                reason=f"openvino does not import: {_told(error)}",
                remedy="pip install --force-reinstall openvino",
            )
        if "CPU" not in devices:
            return Availability(False, version=version, reason="this build of openvino has no CPU plug-in")
        return Availability(True, version=version)

    def compile(self, model: Path, target: Target, directory: Path, *, options: Any = None) -> Compiled:
        self._require(target)
        options = own_options(self, options)
        copy_model(check_model_file(model), directory)
        checked = check_model_file(directory / "model.onnx")
        read = _read(checked)
        _specs(read.inputs, checked), _specs(read.outputs, checked)
        _compile(read, checked, _config(options))
        return Compiled(target, directory, model_file="model.onnx", remarks=_remarks(read))

    def load(self, compiled: Compiled, *, options: Any = None) -> Session:
        self._require(compiled.target)
        options = own_options(self, options)
        if compiled.model_file is None:
            raise InvalidModel("there is no portable model", where=str(compiled.directory))
        checked = check_model_file(compiled.directory / compiled.model_file)
        made, cached = _load(checked, options)
        info = {
            "target": str(compiled.target),
            "runtime": f"openvino {self.probe().version}",
            "file": compiled.model_file,
            "cache": cached,
            "hint": options.hint,
            "precision_hint": options.precision,
            "threads": str(made.get_property("INFERENCE_NUM_THREADS")),
        }
        if compiled.remarks:
            info["remarks"] = "; ".join(compiled.remarks)
        return OpenVinoSession(made, compiled.target, checked, info)

    def _require(self, target: Target) -> None:
        if target.device is not None:
            raise TargetUnavailable(f"openvino-cpu has no device {target.device!r}", hint="write openvino-cpu")
        state = self.probe()
        if not state.available:
            raise TargetUnavailable(f"openvino-cpu cannot run here: {state.reason}", hint=f"run: {state.remedy}")


class OpenVinoSession(Session):
    """A session on OpenVINO's CPU plug-in.

    A run takes an infer request from a free list, or makes one: there are as many as there were callers at once.
    Inputs are read where they lie, so a run keeps their arrays alive until it ends.

    Args:
        made: an ``openvino.CompiledModel``.
        target: what it was made for.
        checked: the file, for the names of dimensions and for messages.
        info: what was chosen and why.
    """

    def __init__(self, made: Any, target: Target, checked: ModelFile, info: Mapping[str, str]) -> None:
        self.target = target
        self.inputs = _specs(made.inputs, checked)
        self.outputs = _specs(made.outputs, checked)
        self.info = dict(info)
        self._check = InputCheck(self.inputs)
        self._takes = tuple((index, spec.name, _importer(spec)) for index, spec in enumerate(self.inputs))
        self._gives = tuple((spec.name, _exporter(spec)) for spec in self.outputs)
        self._dynamic = tuple(index for index, port in enumerate(made.outputs) if port.get_partial_shape().is_dynamic)
        self._free: list[Any] = []
        self._new_request: Callable[[], Any] = made.create_infer_request
        self._release: Callable[[], None] = made.release_memory

    def run(self, feeds: Mapping[str, Any], /, *, outputs: Place = "host") -> dict[str, Any]:
        if outputs != "host":
            check_place(outputs)
        checked = self._check(feeds)
        free = self._free  # close() puts an empty list in its place, so that nothing comes back to a closed session
        try:
            request = free.pop()
        except IndexError:
            request = self._new_request()
        try:
            kept = []  # a tensor holds the array that it was made of, which may be a copy; the request holds neither
            for index, name, tensor in self._takes:
                kept.append(given := tensor(checked[name]))
                request.set_input_tensor(index, given)
            # The results are seen where OpenVINO has them, and copied before the request is anybody else's.
            views = request.infer(None, True, True).to_tuple()
            results = {name: array(view) for (name, array), view in zip(self._gives, views)}  # noqa: B905 - 80 ns
        except RuntimeError as error:
            raise _run_error(error) from error
        free.append(request)
        return results

    def bind(self, shapes: Mapping[str, Sequence[int]], /) -> OpenVinoBinding:
        sizes = self._check.shapes(shapes)
        request = self._new_request()
        inputs = {
            spec.name: aligned_empty(tuple(int(size) for size in shapes[spec.name]), numpy_dtype(spec.dtype))
            for spec in self.inputs
        }
        outputs = {
            name: aligned_empty(shape, numpy_dtype(spec.dtype))
            for spec, (name, shape) in zip(
                self.outputs, output_shapes(self.outputs, inputs, sizes, self.run).items(), strict=True
            )
        }
        return OpenVinoBinding(self, request, inputs, outputs)

    def trim(self) -> None:
        self._free = []
        try:
            self._release()
        except RuntimeError as error:
            if "busy state" not in str(error):  # a run goes on: what it uses is kept, and all else with it
                raise _run_error(error) from error

    def close(self) -> None:
        # Threads inside run() hold their request, and with it the model, until they are done.
        self._new_request = self._release = _closed
        self._free = []


class OpenVinoBinding(Binding):
    """Arrays that OpenVINO reads and writes in place. Made by ``OpenVinoSession.bind``."""

    def __init__(
        self, owner: OpenVinoSession, request: Any, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._owner = owner
        self._request: Any = request
        self._wide = [inputs[spec.name] for spec in owner.inputs if spec.dtype in _WIDE]
        for index, spec in enumerate(owner.inputs):
            request.set_input_tensor(index, _shared(inputs[spec.name], spec.dtype))
        for index, spec in enumerate(owner.outputs):
            request.set_output_tensor(index, _shared(outputs[spec.name], spec.dtype))
        names = [spec.name for spec in owner.outputs]
        self._dynamic = [(index, names[index], outputs[names[index]].shape) for index in owner._dynamic]

    def run(self) -> None:
        if self._owner._new_request is _closed:
            _closed()
        for array in self._wide:
            _check_range(array)
        try:
            self._request.infer(None, True, True)
        except RuntimeError as error:
            raise _run_error(error) from error
        # A smaller result fits and would leave the end of the array as it was. A larger one fails above.
        for index, name, shape in self._dynamic:
            given = tuple(self._request.get_output_tensor(index).shape)
            if given != shape:
                raise RunFailed(
                    f"the shape of output {name!r} depends on the data: {list(given)} in place of {list(shape)}",
                    where=f"output {name!r}",
                    hint="use run() for this model",
                )


def _closed() -> NoReturn:
    raise SessionClosed("the session was closed", hint="load the model again")


# --- arrays and tensors


def _shared(array: np.ndarray, dtype: str) -> Any:
    """A tensor over an array's memory, which must be C-ordered, aligned and writable."""
    import openvino

    if dtype in _FOREIGN:
        kind, bits = _FOREIGN[dtype]
        return openvino.Tensor(array.view(bits), openvino.Shape(array.shape), getattr(openvino.Type, kind))
    return openvino.Tensor(array, True)


def _check_range(array: np.ndarray) -> None:
    if array.size and (array.max() > _INT32.max or array.min() < _INT32.min):
        raise InvalidInput(
            f"{array.dtype}{list(array.shape)} holds values from {array.min()} to {array.max()}; OpenVINO computes "
            "integers in int32 and would cut them silently",
            hint="use another target for this input, such as ort-cpu",
        )


def _importer(spec: TensorSpec) -> Callable[[np.ndarray], Any]:
    """What makes a tensor of an input array, without a copy where its layout allows it."""
    import openvino

    tensor = openvino.Tensor

    def plain(array: np.ndarray) -> Any:
        # carray: C-ordered, aligned and writable. OpenVINO only reads it, but takes nothing that is read-only.
        return tensor(array if array.flags.carray else np.array(array, order="C"), True)

    def wide(array: np.ndarray) -> Any:
        _check_range(array)
        return plain(array)

    def foreign(array: np.ndarray) -> Any:
        return _shared(array if array.flags.carray else np.array(array, order="C"), spec.dtype)

    return foreign if spec.dtype in _FOREIGN else wide if spec.dtype in _WIDE else plain


def _exporter(spec: TensorSpec) -> Callable[[np.ndarray], np.ndarray]:
    """What makes a new array of a view of OpenVINO's memory."""
    dtype = numpy_dtype(spec.dtype)  # says now, not in the first run, that ml_dtypes is missing
    if spec.dtype not in _FOREIGN:
        return np.array
    return lambda view: np.array(view).view(dtype)


def _specs(ports: Sequence[Any], checked: ModelFile) -> tuple[TensorSpec, ...]:
    """Inputs or outputs as the file declares them; sizes that only OpenVINO knows are filled in."""
    made: dict[str, TensorSpec] = {}
    for port in ports:
        names = port.get_names()
        # A tensor that goes out twice has two names on both ports.
        name = next((name for name in checked.shapes if name in names and name not in made), None)
        kind = port.element_type.get_type_name()
        if name is None:
            raise InvalidModel(
                f"{min(names, default='?')!r} is no tensor; only dense tensors can go in and out",
                where=str(checked.path),
                hint="cut the graph so that its inputs and outputs are tensors",
            )
        if kind not in _DTYPES:
            raise CompileFailed(
                f"{name!r} is a tensor of {kind}, which openvino-cpu does not take or give",
                where=str(checked.path),
                hint="use another target for this model, such as ort-cpu",
            )
        declared = checked.shapes[name]
        found = port.get_partial_shape()
        if declared is None or found.rank.is_dynamic:
            shape = declared
        else:
            known = [None if size.is_dynamic else size.get_length() for size in found]
            shape = tuple(d if k is None else k for d, k in zip(declared, known, strict=True))
        made[name] = TensorSpec(name, _DTYPES[kind], shape)
    return tuple(made.values())


# --- from a file to a compiled model


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _config(options: OpenVinoOptions) -> dict[str, Any]:
    wanted = {"bf16": "BF16", "f16": "FP16"}.get(options.precision)
    if wanted and wanted not in (able := _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")):
        raise TargetUnavailable(
            f"this CPU does not compute in {options.precision}; OpenVINO says it is able to: {', '.join(able)}",
            where="option precision of openvino-cpu",
            hint="take precision f32",
        )
    config: dict[str, Any] = {
        "PERFORMANCE_HINT": options.hint.upper(),
        "INFERENCE_PRECISION_HINT": options.precision,
        # Otherwise OpenVINO also rounds activations to int8 before layers whose weights are stored as integers.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    if options.threads:
        config["INFERENCE_NUM_THREADS"] = options.threads
    return config


def _read(checked: ModelFile) -> Any:
    """Parses a model by the ONNX front end alone: ``read_model`` tries every format that OpenVINO knows."""
    import openvino.frontend as front_ends

    failures = tuple(value for name, value in vars(front_ends).items() if name.endswith("Failure"))
    front_end = front_ends.FrontEndManager().load_by_framework("onnx")
    try:
        return front_end.convert(front_end.load(str(checked.path)))
    except (*failures, RuntimeError, ValueError, MemoryError) as error:
        raise _load_error(error, checked, front_end) from error


def _compile(model: Any, checked: ModelFile, config: Mapping[str, Any]) -> Any:
    """Args: model: an ``openvino.Model``, or the path of a file that was read before."""
    try:
        return _core().compile_model(model, "CPU", dict(config))
    except (RuntimeError, ValueError, MemoryError) as error:
        raise _load_error(error, checked, None) from error


def _load(checked: ModelFile, options: OpenVinoOptions) -> tuple[Any, str]:
    """A compiled model, and what the cache had to do with it."""
    config = _config(options)

    def compile_cached(folder: Path) -> Any:
        return _compile(str(checked.path), checked, {**config, "CACHE_DIR": str(folder)})

    place = _openvino_cache.find_place(_core(), checked, config) if options.cache else None
    if place is not None and (found := _openvino_cache.take(place, compile_cached)):
        return found
    model = _read(checked)
    _specs(model.inputs, checked), _specs(model.outputs, checked)
    if place is None:
        return _compile(model, checked, config), "not used" if options.cache else "off"
    try:
        folder = _openvino_cache.open_folder(place)
    except OSError as error:
        # A cache that cannot be written costs time, not correctness.
        return _compile(model, checked, config), f"not used: {error.strerror}"
    return _openvino_cache.fill(place, folder, compile_cached)


def _remarks(model: Any) -> tuple[str, ...]:
    """What a person should know about how OpenVINO computes this model."""
    double = [
        node.get_friendly_name()
        for node in model.get_ops()
        if node.get_type_name() not in ("Parameter", "Constant", "Result", "Convert")
        and any(output.get_element_type().get_type_name() == "f64" for output in node.outputs())
    ]
    if not double:
        return ()
    return (f"OpenVINO computes float64 in float32: {len(double)} nodes, the first is {double[0]!r}",)


# --- what OpenVINO says when it fails

_SOURCE = re.compile(r"Exception from \S+:\d+:?|Check '.*?' failed at \S+:\d+:?|FrontEnd API failed with \w+:")
_NODE = re.compile(r"node with name '([^']*)'|ONNX node '<Node\(\w*\): ([^>']*)>'|Operation name: (\S+)")
_UNKNOWN = re.compile(r"No conversion rule found for operations: (.*)")


def _told(error: BaseException) -> str:
    """The message without OpenVINO's source lines."""
    return " ".join(_SOURCE.sub(" ", str(error)).split()) or type(error).__name__


def _node(text: str) -> str | None:
    match = _NODE.search(text)
    return next(group for group in match.groups() if group) if match else None


def _load_error(error: BaseException, checked: ModelFile, front_end: Any) -> Error:
    text = str(error)
    node = _node(text)
    where = f"{checked.path}, node {node!r}" if node else str(checked.path)
    if unknown := _UNKNOWN.search(text):
        nodes = _unconverted(checked, front_end) if front_end is not None else []
        return CompileFailed(
            f"OpenVINO has no conversion for the op {unknown[1].strip()}",
            where=f"{checked.path}, node {', '.join(map(repr, nodes[:5]))}" if nodes else str(checked.path),
            hint="export without it, or with another opset, or use another target such as ort-cpu",
        )
    unconverted = "wasn't fully converted" in text
    if not unconverted and (
        "GeneralFailure" in text or "Loading input model" in text or "Unable to read the model" in text
    ):
        return InvalidModel(f"OpenVINO says that this is no valid model: {_told(error)}", where=where)
    hint = "free memory, or take a smaller model" if _out_of_memory(error) else None
    return CompileFailed(f"OpenVINO refused the model: {_told(error)}", where=where, hint=hint)


def _unconverted(checked: ModelFile, front_end: Any) -> list[str]:
    """Names of the nodes that OpenVINO has no conversion for, in the order of the graph."""
    try:
        model = front_end.convert_partially(front_end.load(str(checked.path)))
        nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == "ONNXFrameworkNode"]
        return [node.get_friendly_name() for node in nodes]
    except (RuntimeError, MemoryError):
        return []  # the error that is being told says enough without them


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "bad_alloc" in str(error) or "allocate" in str(error)


def _run_error(error: RuntimeError) -> RunFailed:
    text, node = _told(error), _node(str(error))
    hint = None
    if _out_of_memory(error):
        text, hint = f"out of memory: {text}", "take a smaller batch, or free memory"
    return RunFailed(f"OpenVINO failed while it ran: {text}", where=f"node {node!r}" if node else None, hint=hint)


BACKEND = OpenVinoCpu()
