"""What all ONNX Runtime backends share: making a session, running it, saying what it said when it failed."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from runtimes._inputs import InputCheck, aligned_empty, check_place, numpy_dtype, output_shapes
from runtimes.base import (
    Availability,
    Binding,
    CompileFailed,
    Error,
    InvalidInput,
    InvalidModel,
    Place,
    RunFailed,
    Session,
    SessionClosed,
    Target,
    TensorSpec,
)

_DTYPES = {
    "float": "float32",
    "double": "float64",
    "float8e4m3fn": "float8_e4m3fn",
    "float8e4m3fnuz": "float8_e4m3fnuz",
    "float8e5m2": "float8_e5m2",
    "float8e5m2fnuz": "float8_e5m2fnuz",
    **{
        name: name
        for name in (
            *("float16", "bfloat16", "bool", "string", "int8", "int16", "int32", "int64"),
            *("uint8", "uint16", "uint32", "uint64"),
        )
    },
}
#: dtypes that numpy lacks: ONNX's number of the type, and the numpy type of its bits
_FOREIGN: dict[str, tuple[int, np.dtype[Any]]] = {
    "bfloat16": (16, np.dtype("uint16")),
    "float8_e4m3fn": (17, np.dtype("uint8")),
    "float8_e4m3fnuz": (18, np.dtype("uint8")),
    "float8_e5m2": (19, np.dtype("uint8")),
    "float8_e5m2fnuz": (20, np.dtype("uint8")),
}


#: Distributions that install the module ``onnxruntime``, each over the others.
_WHEELS = re.compile(
    r"(onnxruntime(?:[_-](?:gpu|directml|openvino|training|training_cpu|rocm|migraphx|qnn|cann|azure|webgpu))?)"
    r"-([0-9][^-]*)\.dist-info"
)


def clashing_wheels(wanted: str) -> Availability | None:
    """Says that several wheels of ONNX Runtime are installed over each other; None where one or none is.

    What is then imported is a mixture: Python files of the one, libraries of the other, and the first upgrade or
    uninstall of either breaks both. Only wheels in the same folder overwrite each other.

    Args:
        wanted: the distribution that the remedy installs, such as ``onnxruntime-gpu``.
    """
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return None
    # The folder is listed, not asked through importlib.metadata: that takes three times as long as a load.
    names = os.listdir(os.path.dirname(os.path.dirname(spec.origin)))
    found = sorted((m[1].replace("_", "-"), m[2]) for name in names if (m := _WHEELS.fullmatch(name)))
    if len({name for name, _ in found}) < 2:
        return None
    listed = " and ".join(f"{name} {version}" for name, version in found)
    uninstalled = " ".join(dict.fromkeys(name for name, _ in found))
    return Availability(
        False,
        reason=f"{listed} are both installed and overwrite each other's files",
        remedy=f"pip uninstall -y {uninstalled} && pip install {wanted}",
    )


def make_session(file: Path, session_options: Any, providers: Sequence[Any]) -> Any:
    """Makes an ``onnxruntime.InferenceSession``; the file was checked before.

    Raises:
        InvalidModel: ONNX Runtime cannot parse it, or the graph is no valid ONNX.
        CompileFailed: it has no kernel for a node, or cannot build the session for another reason.
    """
    import onnxruntime

    # What goes wrong is raised. Below "fatal" ONNX Runtime also prints it, over the program's own output.
    session_options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(file), session_options, providers=list(providers), enable_fallback=0)
    except _errors() as error:
        raise _load_error(error, file) from error


@functools.cache
def _errors() -> tuple[type[BaseException], ...]:
    """What ONNX Runtime raises: its own classes, which share no base, and what pybind11 makes of C++'s."""
    from onnxruntime.capi import onnxruntime_pybind11_state as binding

    own = [value for value in vars(binding).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*own, RuntimeError, ValueError, MemoryError)


_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_LOADING = re.compile(r"^Load model from .*? failed:|^Load model from \S+ ")
#: file.cc:12 and the C++ signature behind it
_SOURCE = re.compile(r"\S+\.(?:cc|h|cpp):\d+ (?:[^()]*\((?:[^()]|\([^()]*\))*\)(?: const)?(?: \[with [^\]]*\])? )?")
_INVALID = ("nvalid model", "Type Error", "ShapeInferenceError", "TypeInferenceError", "Unsupported model IR")
_NODE = re.compile(r"Name:'([^']*)'|[Nn]ode ?\(([^)\s]*)\)|node with name '([^']*)'")


def _told(error: BaseException) -> tuple[str, str | None]:
    """The message without ONNX Runtime's prefix and source lines, and the node that it names."""
    text = _LOADING.sub("", _PREFIX.sub("", str(error).strip()))
    text = " ".join(_SOURCE.sub("", text).split()) or type(error).__name__
    match = _NODE.search(text)
    node = next((group for group in match.groups() if group), None) if match else None
    return text, node


def _load_error(error: BaseException, file: Path) -> Error:
    text, node = _told(error)
    where = f"{file}, node {node!r}" if node else str(file)
    invalid = type(error).__name__ in ("InvalidProtobuf", "InvalidGraph", "NoModel")
    if invalid or any(sign in text for sign in _INVALID):
        return InvalidModel(f"ONNX Runtime says that this is no valid model: {text}", where=where)
    hint = None
    if "not a registered function/op" in text or "NOT_IMPLEMENTED" in str(error):
        hint = "ONNX Runtime has no kernel for this op here: export without it, or with another opset"
    elif "under development" in text:
        hint = "its opset is newer than this ONNX Runtime: upgrade onnxruntime, or export with an older opset"
    elif _out_of_memory(error):
        hint = "free memory, or take a smaller model"
    return CompileFailed(f"ONNX Runtime refused the model: {text}", where=where, hint=hint)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in text or "bad_alloc" in text


def run_error(error: BaseException) -> RunFailed:
    """What ONNX Runtime raised in a run, with the node that it names."""
    text, node = _told(error)
    hint = None
    if _out_of_memory(error):
        text, hint = f"out of memory: {text}", "take a smaller batch, or free memory"
    return RunFailed(f"ONNX Runtime failed while it ran: {text}", where=f"node {node!r}" if node else None, hint=hint)


def _spec(argument: Any, file: Path, unranked: frozenset[str]) -> TensorSpec:
    match = re.fullmatch(r"tensor\((\w+)\)", argument.type)
    dtype = _DTYPES.get(match[1]) if match else None
    if dtype is None:
        raise InvalidModel(
            f"{argument.name!r} is a {argument.type}; only dense tensors can go in and out",
            where=str(file),
            hint="cut the graph so that its inputs and outputs are tensors",
        )
    # ONNX Runtime reports an unknown rank as [] too.
    if argument.name in unranked and not argument.shape:
        return TensorSpec(argument.name, dtype, None)
    # It also hands out negative or empty sizes as the model states them; they say nothing.
    dims = tuple(d if (isinstance(d, int) and d >= 0) or (isinstance(d, str) and d) else None for d in argument.shape)
    return TensorSpec(argument.name, dtype, dims)


def _closed(*_: object) -> NoReturn:
    raise SessionClosed("the session was closed", hint="load the model again")


class OrtSession(Session):
    """A session on ONNX Runtime.

    Args:
        session: an ``onnxruntime.InferenceSession``.
        target: what it was made for.
        file: the file that it was made of, for messages.
        unranked: names of inputs and outputs whose rank is unknown.
        info: what was chosen and why.
        arena: of the memory that it keeps for later runs, as ONNX Runtime names it: ``cpu:0``; None: it keeps none.
    """

    def __init__(
        self,
        session: Any,
        target: Target,
        *,
        file: Path,
        unranked: frozenset[str],
        info: Mapping[str, str],
        arena: str | None = None,
    ) -> None:
        self.target = target
        self._arena = arena
        self.inputs = tuple(_spec(argument, file, unranked) for argument in session.get_inputs())
        self.outputs = tuple(_spec(argument, file, unranked) for argument in session.get_outputs())
        self.info = dict(info)
        self._check = InputCheck(self.inputs)
        self._names = [spec.name for spec in self.outputs]
        self._failures = _errors()
        for spec in self.outputs:
            numpy_dtype(spec.dtype)  # says now, not in the first run, that ml_dtypes is missing
        # The binding beneath onnxruntime's Python class: the class checks the inputs once more on the way,
        # for as long as the rest of a small model takes. Both are called alike, should it go away.
        raw = getattr(session, "_sess", session)
        foreign = any(spec.dtype in _FOREIGN for spec in self.inputs + self.outputs)
        self._run = functools.partial(_run_foreign, raw, self.inputs) if foreign else raw.run
        self._run_bound = raw.run_with_iobinding
        self._session: Any = session

    def run(self, feeds: Mapping[str, Any], /, *, outputs: Place = "host") -> dict[str, Any]:
        if outputs != "host":
            check_place(outputs)
        checked = self._check(feeds)
        try:
            return dict(zip(self._names, self._run(self._names, checked, None)))  # noqa: B905 - 80 ns
        except self._failures as error:
            raise run_error(error) from error

    def bind(self, shapes: Mapping[str, Sequence[int]], /) -> Binding:
        inputs, outputs = self._buffers(shapes)
        return OrtBinding(self, self._open(), inputs, outputs)

    def trim(self) -> None:
        """ONNX Runtime shrinks an arena at the end of a run, and has no other way to say so. A run that is told to
        terminate ends before its first node, and shrinks it all the same: it takes milliseconds, and no inputs."""
        self._open()
        if self._arena is None:
            return
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.terminate = True
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", self._arena)
        try:
            self._run(self._names, {spec.name: _nothing(spec) for spec in self.inputs}, options)
        except self._failures as error:
            if "terminate flag" not in str(error):
                raise run_error(error) from error

    def _open(self) -> Any:
        """The session of ONNX Runtime. Raises SessionClosed."""
        session = self._session  # another thread may close between the look and the use
        return _closed() if session is None else session

    def _buffers(self, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Arrays for the inputs and the outputs of one set of input shapes."""
        sizes = self._check.shapes(shapes)
        self._open()
        if any(spec.dtype == "string" for spec in self.inputs + self.outputs):
            raise InvalidInput("strings have no fixed size and cannot be bound", hint="use run() for this model")
        inputs = {
            spec.name: self._empty(tuple(int(size) for size in shapes[spec.name]), numpy_dtype(spec.dtype))
            for spec in self.inputs
        }
        outputs = {
            name: self._empty(shape, numpy_dtype(spec.dtype))
            for spec, (name, shape) in zip(
                self.outputs, output_shapes(self.outputs, inputs, sizes, self._trial).items(), strict=True
            )
        }
        return inputs, outputs

    def _trial(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """A run that shows the shapes of outputs."""
        return self.run(feeds)

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An uninitialised array for a binding."""
        return aligned_empty(shape, dtype)

    def close(self) -> None:
        # Threads inside run() hold the session until they are done; whoever comes later gets _closed.
        self._run = self._run_bound = _closed
        self._session = None


class OrtBinding(Binding):
    """Buffers over ONNX Runtime's IO binding. Made by ``OrtSession.bind``."""

    def __init__(
        self, owner: OrtSession, session: Any, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._owner = owner
        self._failures = owner._failures
        binding = session.io_binding()
        for bind, specs, arrays in (
            (binding.bind_input, owner.inputs, inputs),
            (binding.bind_output, owner.outputs, outputs),
        ):
            for spec in specs:
                array = arrays[spec.name]
                bind(spec.name, "cpu", 0, element_type(spec.dtype), array.shape, array.ctypes.data)
        self._binding = binding._iobinding if hasattr(session, "_sess") else binding

    def run(self) -> None:
        try:
            self._owner._run_bound(self._binding, None)
        except self._failures as error:
            raise run_error(error) from error


def _nothing(spec: TensorSpec) -> np.ndarray:
    """An array that passes for an input where nothing is computed: of no elements, if its shape lets it."""
    dtype = numpy_dtype(spec.dtype)
    shape = tuple(size if isinstance(size, int) else 0 for size in spec.shape or ())
    return np.full(shape, "", dtype) if dtype.hasobject else np.empty(shape, dtype)


def _run_foreign(
    raw: Any, specs: Sequence[TensorSpec], names: Sequence[str], feeds: Mapping[str, np.ndarray], options: Any
) -> list[np.ndarray]:
    """Runs a model with a dtype that numpy lacks: such arrays go in and come out as their bits."""
    from onnxruntime.capi import onnxruntime_pybind11_state as binding

    values = {}
    for spec in specs:
        array = np.ascontiguousarray(feeds[spec.name]).reshape(feeds[spec.name].shape)
        if spec.dtype in _FOREIGN:
            number, bits = _FOREIGN[spec.dtype]
            values[spec.name] = binding.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(dtype=bits), number)
        else:
            device = binding.OrtDevice(binding.OrtDevice.cpu(), binding.OrtDevice.default_memory(), 0)
            values[spec.name] = binding.OrtValue.ortvalue_from_numpy(array, device)
    return [value_array(value) for value in raw.run_with_ort_values(values, list(names), options)]


def element_type(dtype: str) -> Any:
    """What ``bind_input`` and ``bind_output`` take for a dtype of ``TensorSpec``."""
    return _FOREIGN[dtype][0] if dtype in _FOREIGN else numpy_dtype(dtype)


def value_array(value: Any) -> np.ndarray:
    """A copy of what an OrtValue in host memory holds, whether numpy knows its dtype or not."""
    import ctypes

    foreign = next((name for name, (number, _) in _FOREIGN.items() if number == value.element_type()), None)
    if foreign is None:
        array: np.ndarray = value.numpy()
        return array
    dtype, shape = numpy_dtype(foreign), tuple(value.shape())
    size = math.prod(shape) * dtype.itemsize
    content = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(bytearray(content), dtype=dtype).reshape(shape)
