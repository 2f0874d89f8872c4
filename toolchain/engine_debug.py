"""Looks into a compiled engine: its layers, and where its numbers leave those of ONNX Runtime.

NVIDIA's Polygraphy does the looking and runs both sides. The engine runs in our own session, as it ships: with our
checks of who built it, in our buffers, on the CUDA that was found; Polygraphy's own runner wants a CUDA toolkit on the
library path. ONNX Runtime runs the variant's own ``model.onnx`` node by node, unoptimised::

    model.onnx ─────────────→ OnnxrtRunner  ┐
    engine     ─→ Session ──→ SessionRunner ┴→ outputs, compared

    model.onnx ─mark→ marked.onnx ─→ OnnxrtRunner                 ┐
                           └ compile ─→ Session ──→ SessionRunner ┴→ every tensor, compared

What is compared tensor by tensor is another engine than the one that ships: a tensor that has to be there at the end
cannot be fused away. It shows where numbers go astray in a layer, not what a fusion does to them; that shows in the
outputs. Distances are those of ``metrics.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import runtimes
from passes._graph import is_op
from passes.base import label
from runtimes import Compiled, InvalidArtifact, RunFailed, Session, TargetUnavailable
from toolchain.errors import DataError
from toolchain.evaluate import Feeds, typed, with_outputs
from toolchain.metrics import TensorError, tensor_error
from toolchain.onnx_file import read_onnx, write_onnx
from toolchain.progress import Status, silent

#: Types that numpy, ONNX Runtime's Python and TensorRT all hand out.
_COMPARED = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
#: Marked, these would keep a layer from being quantised at all: TensorRT fuses them into what reads them.
_QDQ = ("QuantizeLinear", "DequantizeLinear")


@dataclasses.dataclass(frozen=True, slots=True)
class EngineLayer:
    """A layer of an engine, which stands for one or many nodes of the graph.

    Attributes:
        name: TensorRT's, made of the names of the nodes that were fused.
        kind: what it computes; "" where the engine keeps only names.
        reads, gives: its tensors: name, dtype, shape and layout in memory.
        tactic: the kernel that was chosen; "" where it is not known.
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    tactic: str


@dataclasses.dataclass(frozen=True, slots=True)
class TensorDifference:
    """How far one tensor is from ONNX Runtime's, the worst of all samples.

    Attributes:
        tensor: its name in the graph.
        node, op_type: what computes it.
        max_abs: largest absolute difference, in the tensor's unit.
        nmse: sum of squared differences over sum of squared values of ONNX Runtime.
        sqnr_db: the same in dB; infinite where they are equal.
        cosine: cosine similarity.
        reads_nmse: the largest ``nmse`` among the tensors that its node reads: what is above came in here. 0 where it
            reads inputs of the model only; None where no tensor was marked but the outputs.
    """

    tensor: str
    node: str
    op_type: str
    max_abs: float
    nmse: float
    sqnr_db: float
    cosine: float
    reads_nmse: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class EngineDebug:
    """What was seen.

    Attributes:
        target: what the engine was built for.
        samples: how many feeds were compared.
        layers: of the engine, in its order; none where it does not tell.
        outputs: of the engine that ships.
        tensors: of an engine with every tensor marked, in the order of the graph; none where not asked for.
        remarks: what is missing, and why.
    """

    target: str
    samples: int
    layers: tuple[EngineLayer, ...]
    outputs: tuple[TensorDifference, ...]
    tensors: tuple[TensorDifference, ...]
    remarks: tuple[str, ...]


def debug_engine(
    compiled: Compiled, samples: Sequence[Feeds], *, layers: bool = False, on_status: Status = silent
) -> EngineDebug:
    """Shows the layers of an engine and compares it with ONNX Runtime.

    Args:
        compiled: with its portable graph beside it.
        samples: inputs, in sizes that the engine takes.
        layers: also compare every tensor, which builds a second engine.
        on_status: is told how far it is.

    Raises:
        TargetUnavailable: Polygraphy or what the engine needs is not here.
        InvalidArtifact: there is no portable graph.
        DataError: there are no samples.
        InvalidModel, InvalidInput, CompileFailed, RunFailed: as in loading and running.
    """
    require_polygraphy()
    if compiled.model_file is None:
        raise InvalidArtifact(
            "there is no graph beside the engine to compare it with", where=str(compiled.directory), hint="build again"
        )
    if not samples:
        raise DataError("no sample to compare on")
    graph = typed(read_onnx(compiled.directory / compiled.model_file))
    backend = runtimes.backend(compiled.target.runtime)
    on_status("loading the engine")
    with backend.load(compiled) as session:
        found, remarks = _engine_layers(session)
        on_status("running the engine and ONNX Runtime")
        outputs = compare(compiled.directory / compiled.model_file, session, graph, samples)
    tensors: tuple[TensorDifference, ...] = ()
    if layers:
        names = comparable(graph)
        with tempfile.TemporaryDirectory(prefix="toolchain-") as folder:
            marked = mark(graph, names, Path(folder) / "marked")
            on_status(f"building an engine with {len(names)} tensors marked")
            options = json.loads(compiled.fingerprint.get("options", "{}"))
            again = runtimes.compile(marked, compiled.target, Path(folder) / "engine", options=options or None)
            on_status("running both with every tensor marked")
            with backend.load(again) as session:
                tensors = compare(marked, session, graph, samples)
    return EngineDebug(str(compiled.target), len(samples), found, outputs, tensors, remarks)


def require_polygraphy() -> None:
    """Raises TargetUnavailable where Polygraphy is not installed."""
    if importlib.util.find_spec("polygraphy") is None:
        raise TargetUnavailable("polygraphy is not installed", hint="run: pip install polygraphy")


def comparable(graph: ir.Model) -> tuple[str, ...]:
    """The tensors of the main graph that can be marked and compared, in the graph's order; its outputs are among them.

    Args:
        graph: with the types of all values known.
    """
    outputs = {value.name for value in graph.graph.outputs}
    return tuple(
        value.name
        for node in graph.graph
        for value in node.outputs
        if value.name and (value.name in outputs or (value.dtype in _COMPARED and not is_op(node, *_QDQ)))
    )


def mark(graph: ir.Model, names: Sequence[str], folder: Path) -> Path:
    """Writes the graph with the named tensors as outputs besides its own, into ``folder``, which is made.

    Polygraphy's ``ModifyOutputs`` would leave the new outputs without a type, and TensorRT refuses those.

    Raises:
        StorageError: the disk is full or not writable.
    """
    folder.mkdir(parents=True)
    write_onnx(with_outputs(graph, names), folder / "model.onnx")
    return folder / "model.onnx"


def compare(model: Path, session: Session, graph: ir.Model, samples: Sequence[Feeds]) -> tuple[TensorDifference, ...]:
    """Runs a graph in ONNX Runtime and a session that was compiled of it, and compares what both give.

    Args:
        model: the graph as a file.
        session: gives the same outputs.
        graph: the same graph, or the one that it was marked in.
        samples: what both are fed.

    Raises:
        RunFailed: ONNX Runtime does not run the graph, or the two give different outputs.
    """
    comparator = importlib.import_module("polygraphy.comparator").Comparator
    ort = importlib.import_module("polygraphy.backend.onnxrt")
    level = importlib.import_module("onnxruntime").GraphOptimizationLevel.ORT_DISABLE_ALL
    reference = ort.OnnxrtRunner(ort.SessionFromOnnx(str(model), graph_optimization_level=level), name="ONNX Runtime")
    worst: dict[str, TensorError] = {}
    with _quiet(), _told("ONNX Runtime and the engine cannot be compared", model):
        # One sample at a time: every activation of a model is large enough once.
        for both in comparator.run([reference, _runner(session)], data_loader=list(samples), streaming=True):
            (_, [wanted]), (_, [given]) = both
            for name, array in wanted.items():
                worst[name] = _worse(worst.get(name), _distance(name, array, given))
    return _in_order(graph, worst)


def _distance(name: str, wanted: np.ndarray, given: Mapping[str, np.ndarray]) -> TensorError:
    if name not in given or given[name].shape != wanted.shape:
        there = f"has the shape {given[name].shape}, not {wanted.shape}" if name in given else "is missing"
        raise RunFailed(f"{name!r} {there}", where=f"output {name!r}", hint="compare the graph with verify first")
    return tensor_error(wanted, given[name])


def _worse(first: TensorError | None, second: TensorError) -> TensorError:
    if first is None:
        return second
    return TensorError(
        max_abs=max(first.max_abs, second.max_abs),
        nmse=max(first.nmse, second.nmse),
        sqnr_db=min(first.sqnr_db, second.sqnr_db),
        cosine=min(first.cosine, second.cosine),
        top1_agreement=None,
    )


def _in_order(graph: ir.Model, errors: Mapping[str, TensorError]) -> tuple[TensorDifference, ...]:
    """In the graph's order, each with what it was handed."""
    whole = {value.name for value in graph.graph.outputs} >= errors.keys()
    carried: dict[str, float] = {}
    found = []
    for node in graph.graph:
        reads = max((carried.get(value.name or "", 0.0) for value in node.inputs if value is not None), default=0.0)
        for value in node.outputs:
            name = value.name or ""
            error = errors.get(name)
            # What was not marked hands on what it read.
            carried[name] = reads if error is None else error.nmse
            if error is not None:
                found.append(
                    TensorDifference(
                        name, label(node), node.op_type, error.max_abs, error.nmse, error.sqnr_db, error.cosine,
                        None if whole else reads,
                    )
                )  # fmt: skip
    return tuple(found)


@functools.cache
def _runner_type() -> type:
    polygraphy = importlib.import_module("polygraphy.backend.base")
    metadata = importlib.import_module("polygraphy.common").TensorMetadata

    class SessionRunner(polygraphy.BaseRunner):  # type: ignore[name-defined]
        """One of our sessions, as Polygraphy runs things. It is closed by whoever opened it."""

        def __init__(self, session: Session) -> None:
            super().__init__(name=str(session.target))
            self._session = session

        def get_input_metadata_impl(self) -> Any:
            found = metadata()
            for spec in self._session.inputs:
                shape = None if spec.shape is None else [size if isinstance(size, int) else None for size in spec.shape]
                found.add(spec.name, dtype=np.dtype(spec.dtype), shape=shape)
            return found

        def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            started = time.perf_counter()
            outputs: dict[str, np.ndarray] = self._session.run(feed_dict)
            self.inference_time = time.perf_counter() - started
            return outputs

    return SessionRunner


def _runner(session: Session) -> Any:
    return _runner_type()(session)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy logs to standard output, where our results go; what it has to say of an error is in the error."""
    logger = importlib.import_module("polygraphy.logger").G_LOGGER
    with logger.verbosity(logger.CRITICAL + 1):
        yield


@contextlib.contextmanager
def _told(what: str, model: Path) -> Iterator[None]:
    """What Polygraphy and ONNX Runtime raise, as RunFailed."""
    failed = importlib.import_module("polygraphy.exception").PolygraphyException
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    raised = [one for one in vars(state).values() if isinstance(one, type) and issubclass(one, Exception)]
    try:
        yield
    except (failed, *raised) as error:
        first = str(error).strip().partition("\n")[0]
        raise RunFailed(f"{what}: {first}", where=str(model)) from error


def _engine_layers(session: Session) -> tuple[tuple[EngineLayer, ...], tuple[str, ...]]:
    """The layers as Polygraphy reads them from TensorRT's inspector, and what is missing."""
    if session.target.runtime != "tensorrt":
        return (), (f"layers are not shown: Polygraphy reads those of tensorrt, not of {session.target.runtime}",)
    extractors = importlib.import_module("polygraphy.tools.inspect.subtool.model.extractors")
    with _quiet():
        layers = read_layers(session.inspect(extractors.graph_data_from_trt_engine))  # type: ignore[attr-defined]
    if layers and not any(layer.kind for layer in layers):
        return layers, ("the engine keeps only the names of its layers: build it with the option layer_information",)
    return layers, ()


def read_layers(data: Any) -> tuple[EngineLayer, ...]:
    """The layers of Polygraphy's ``GraphData`` of an engine."""
    return tuple(
        EngineLayer(
            name=node.name,
            kind=_known(node.op_type),
            reads=tuple(_tensor(one) for one in node.inputs),
            gives=tuple(_tensor(one) for one in node.outputs),
            tactic=_known(node.tactic),
        )
        for node in data.nodes
    )


def _known(text: str | None) -> str:
    return "" if text in (None, "Unknown") else str(text)


def _tensor(info: Any) -> str:
    dtype = "?" if info.dtype is None else info.dtype.name.lower()
    layout = (info.docstring or "").removeprefix("Format: ")
    return f"{info.name}: {dtype}{info.shape or []}" + (f", {layout}" if layout else "")
