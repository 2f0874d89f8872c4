"""ONNX's own ReferenceEvaluator: target ``reference``. Slow, and the oracle of the tests.

It follows the operator specification in numpy, one node after the other, and shares no code with any
runtime. Needs the package onnx.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from runtimes._inputs import InputCheck, check_place, numpy_dtype
from runtimes._options import own_options
from runtimes.base import (
    Availability,
    Backend,
    Binding,
    Compiled,
    CompileFailed,
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
from runtimes.model_file import check_model_file, copy_model


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceOptions:
    """The reference has no options."""


class Reference(Backend):
    """The backend of ``reference``."""

    name: ClassVar[str] = "reference"
    execution_provider: ClassVar[str | None] = None
    device_class: ClassVar[str] = "cpu"
    options_type: ClassVar[type] = ReferenceOptions
    packages: ClassVar[tuple[str, ...]] = ("onnx",)

    def probe(self) -> Availability:
        if importlib.util.find_spec("onnx") is None:
            return Availability(False, reason="onnx is not installed", remedy="pip install onnx")
        return Availability(True, version=importlib.metadata.version("onnx"))

    def compile(self, model: Path, target: Target, directory: Path, *, options: Any = None) -> Compiled:
        self._require(target)
        own_options(self, options)
        copy_model(check_model_file(model), directory)
        compiled = Compiled(target, directory, model_file="model.onnx")
        self.load(compiled).close()
        return compiled

    def load(self, compiled: Compiled, *, options: Any = None) -> Session:
        self._require(compiled.target)
        own_options(self, options)
        if compiled.model_file is None:
            raise InvalidModel("there is no portable model", where=str(compiled.directory))
        file = check_model_file(compiled.directory / compiled.model_file).path
        import onnx
        from google.protobuf.message import DecodeError
        from onnx.reference import ReferenceEvaluator

        try:
            model = onnx.load(file)
            onnx.checker.check_model(model)
        except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
            raise InvalidModel(f"onnx says that this is no valid model: {error}", where=str(file)) from error
        try:
            evaluator = ReferenceEvaluator(model)
        except (NotImplementedError, RuntimeError, TypeError, ValueError, KeyError) as error:
            raise CompileFailed(f"the reference refused the model: {error}", where=str(file)) from error
        weights = {tensor.name for tensor in model.graph.initializer}
        inputs = tuple(_spec(v, file) for v in model.graph.input if v.name not in weights)
        outputs = tuple(_spec(v, file) for v in model.graph.output)
        info = {
            "target": str(compiled.target),
            "runtime": f"onnx {onnx.__version__} ReferenceEvaluator",
            "file": compiled.model_file,
        }
        return ReferenceSession(evaluator, compiled.target, inputs, outputs, info)

    def _require(self, target: Target) -> None:
        if target.device is not None:
            raise TargetUnavailable(f"reference has no device {target.device!r}", hint="write reference")
        state = self.probe()
        if not state.available:
            raise TargetUnavailable(f"reference cannot run here: {state.reason}", hint=f"run: {state.remedy}")


class ReferenceSession(Session):
    """A session on ONNX's ReferenceEvaluator. Runs of several threads take turns."""

    def __init__(
        self,
        evaluator: Any,
        target: Target,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        info: Mapping[str, str],
    ) -> None:
        self.target = target
        self.inputs = inputs
        self.outputs = outputs
        self.info = dict(info)
        self._check = InputCheck(inputs)
        # Its operators keep state between calls in places, so two runs at once are not safe.
        self._lock = threading.Lock()
        self._evaluator: Any = evaluator

    def run(self, feeds: Mapping[str, Any], /, *, outputs: Place = "host") -> dict[str, Any]:
        if outputs != "host":
            check_place(outputs)
        checked = dict(self._check(feeds))
        with self._lock:
            if self._evaluator is None:
                raise SessionClosed("the session was closed", hint="load the model again")
            try:
                with np.errstate(all="ignore"):
                    results = self._evaluator.run(None, checked)
            except Exception as error:  # an operator in numpy raises whatever numpy does
                raise RunFailed(f"the reference failed while it ran: {error}") from error
        return {spec.name: _array(spec, value) for spec, value in zip(self.outputs, results, strict=True)}

    def bind(self, shapes: Mapping[str, Sequence[int]], /) -> ReferenceBinding:
        self._check.shapes(shapes)
        if any(spec.dtype == "string" for spec in self.inputs + self.outputs):
            raise InvalidInput("strings have no fixed size and cannot be bound", hint="use run() for this model")
        inputs = {spec.name: np.zeros(tuple(shapes[spec.name]), numpy_dtype(spec.dtype)) for spec in self.inputs}
        first = self.run(inputs)
        second = self.run({name: np.ones_like(array) for name, array in inputs.items()})
        for name, array in first.items():
            if array.shape != second[name].shape:
                raise InvalidInput(
                    f"the shape of output {name!r} depends on the data: "
                    f"{list(array.shape)} for zeros, {list(second[name].shape)} for ones",
                    where=f"output {name!r}",
                    hint="use run() for this model",
                )
        return ReferenceBinding(self, inputs, first)

    def close(self) -> None:
        with self._lock:
            self._evaluator = None


class ReferenceBinding(Binding):
    """Arrays that keep their identity; each run copies into them."""

    def __init__(self, owner: ReferenceSession, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._owner = owner

    def run(self) -> None:
        for name, array in self._owner.run(self.inputs).items():
            if array.shape != self.outputs[name].shape:
                raise RunFailed(
                    f"the shape of output {name!r} depends on the data: {list(array.shape)} in place of "
                    f"{list(self.outputs[name].shape)}",
                    hint="use run() for this model",
                )
            self.outputs[name][...] = array


def _spec(value: Any, file: Path) -> TensorSpec:
    import onnx

    if not value.type.HasField("tensor_type"):
        raise InvalidModel(
            f"{value.name!r} is a {value.type.WhichOneof('value')}; only dense tensors can go in and out",
            where=str(file),
            hint="cut the graph so that its inputs and outputs are tensors",
        )
    tensor = value.type.tensor_type
    if tensor.elem_type == onnx.TensorProto.STRING:
        dtype = "string"
    else:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    if not tensor.HasField("shape"):
        return TensorSpec(value.name, dtype, None)
    dims = tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else dim.dim_param or None
        for dim in tensor.shape.dim
    )
    return TensorSpec(value.name, dtype, dims)


def _array(spec: TensorSpec, value: Any) -> np.ndarray:
    array = np.asarray(value)  # some operators hand out numpy scalars
    if spec.dtype == "string":
        return array.astype(object)
    if array.dtype != numpy_dtype(spec.dtype):
        raise RunFailed(
            f"output {spec.name!r} came out as {array.dtype}, the model says {spec.dtype}",
            where=f"output {spec.name!r}",
            hint="this is a fault of the reference's operator or of the model's declared type",
        )
    return array


BACKEND = Reference()
