"""A session that returns what calibration looks at, without paying for the look.

ONNX Runtime computes convolutions in a blocked layout (NCHWc). A value that is an output of the graph it takes out of
that layout first, which on EfficientNet-Lite0 costs 0.5 of a forward pass for 60 values. A range does not depend on the
order of elements, so here the blocked tensor itself becomes the output: the graph is optimised and saved once, each
ReorderOutput before an output is cut off, and the session that runs is made of the rest. Measured, two runs at a time:
1.05 of a forward pass with all 60 values returned.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import runtimes
from runtimes._ort import OrtSession, make_session
from toolchain.machine import usable_cores
from toolchain.observation import Plan, plan
from toolchain.onnx_proto import onnx_proto
from toolchain.storage import reported
from toolchain.wiring import Wiring, read_wiring, wiring_of

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

#: runs at once, which share the cores: one run with all the cores leaves them idle between its operators, and while its
#: results are taken in. More of them would be more memory.
WORKERS = 2
#: blocks have as many channels or a divisor of it: a tensor whose channels are a multiple has no padding in its blocks
_LARGEST_BLOCK = 16
_NO_SPACE = "free some space, or set TMPDIR to another disk"


@dataclasses.dataclass(frozen=True, slots=True)
class Watched:
    """A graph that is looked at.

    Attributes:
        plan: what is looked at.
        session: returns it.
        fetched: for a value whose elements come in another order, the output of the session that holds them. Axis 0
            still counts the samples.
        weights: how many elements the initializers have.
    """

    plan: Plan
    session: runtimes.Session
    fetched: Mapping[str, str]
    weights: int

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every observed value by name. Raises RunFailed."""
        found = self.session.run(feeds)
        values = {name: feeds[name] for name in self.plan.inputs}
        return values | {name: found[self.fetched.get(name, name)] for name in self.plan.outputs}


def watch(model: ir.Model | Path, *, channels: bool = False) -> Watched:
    """Plans what to look at, and makes the session. The files that it was made of are gone already.

    Args:
        model: see ``calibration.observe``.
        channels: also look at what statistics of single channels take; then no value comes in blocks.

    Raises:
        CalibrationError: nothing in the graph could be quantised.
        InvalidModel, GraphError, CompileFailed: the model cannot be read or run.
        StorageError: no space for a temporary copy.
    """
    if isinstance(model, Path):
        read = read_wiring(model)
        if read is None:
            import onnx_ir as ir

            found = watch(ir.load(model), channels=channels)
            gc.collect()  # nodes and values refer to each other, so they and their weights do not go by themselves
            return found
        wiring, proto = read
        planned = plan(wiring, channels=channels)
        proto.graph.output.extend(
            onnx_proto().ValueInfoProto(name=name) for name in planned.outputs if name not in wiring.outputs
        )
        with tempfile.TemporaryDirectory(prefix="toolchain-") as folder:
            path = Path(folder) / "model.onnx"
            with reported(path, "a temporary model", hint=_NO_SPACE):
                path.write_bytes(proto.SerializeToString())
            return _watched(path, model.absolute().parent, planned, wiring)
    from toolchain import evaluate, onnx_file

    graph = evaluate.typed(model)
    wiring = wiring_of(graph)
    planned = plan(wiring, channels=channels)
    with onnx_file.temporary_onnx(evaluate.with_outputs(graph, planned.outputs)) as path:
        return _watched(path, path.parent, planned, wiring)


def _watched(path: Path, weights: Path, planned: Plan, wiring: Wiring) -> Watched:
    """Of a file whose graph returns what is planned; ``weights`` is the folder of its external data."""
    fetched: Mapping[str, str] = {}
    by_channel = planned.channel_inputs or planned.channel_outputs
    if not by_channel and any(node.is_a("Conv") for node in wiring.nodes):
        blocked = path.with_name("blocked.onnx")
        fetched = _keep_blocks(path, weights, blocked, planned)
        if fetched:
            path, weights = blocked, blocked.parent
    options = _options(weights)
    options.intra_op_num_threads = max(1, usable_cores() // WORKERS)
    # Without a memory pattern the arena holds what a run takes and no second plan of it: a quarter less memory.
    options.enable_mem_pattern = False
    if fetched:
        import onnxruntime

        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = OrtSession(
        make_session(path, options, ["CPUExecutionProvider"]),
        runtimes.Target.parse("ort-cpu"),
        file=path,
        unranked=wiring.unranked,
        info={},
    )
    _give_back_memory()
    weight_elements = sum(math.prod(weight.shape) for weight in wiring.initializers.values())
    return Watched(planned, session, fetched, weight_elements)


def _options(weights: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    return options


def _keep_blocks(path: Path, weights: Path, blocked: Path, planned: Plan) -> dict[str, str]:
    """Writes the graph as ONNX Runtime optimises it, with outputs in blocks where they are computed so.

    Returns:
        What ``Watched.fetched`` says; empty where no output is in blocks, and then there is no file to be used.
    """
    options = _options(weights)
    options.optimized_model_filepath = str(blocked)
    options.intra_op_num_threads = 1
    # It only optimises: what kernels make of the weights is not needed, and they are to be mapped.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{blocked.name}.data")
    try:
        make_session(path, options, ["CPUExecutionProvider"])
    except runtimes.Error:
        return {}  # it cannot be saved; if it cannot be run either, that is said where it is loaded
    model = onnx_proto().ModelProto.FromString(blocked.read_bytes())
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    fetched = {
        name: makers[name].input[0] for name in planned.outputs if name in makers and _only_reorders(makers[name])
    }
    if not fetched:
        return {}
    del graph.output[:]
    names = dict.fromkeys(fetched.get(name, name) for name in planned.outputs)
    graph.output.extend(onnx_proto().ValueInfoProto(name=name) for name in names)
    read = {name for node in _nodes(graph) for name in node.input} | set(names)
    kept = [node for node in graph.node if node.op_type != "ReorderOutput" or node.output[0] in read]
    del graph.node[:]
    graph.node.extend(kept)
    with reported(blocked, "a temporary model", hint=_NO_SPACE):
        blocked.write_bytes(model.SerializeToString())
    return fetched


def _only_reorders(node: onnx.NodeProto) -> bool:
    """Whether the node does nothing but take all channels of a tensor out of their blocks."""
    channels = {attribute.name: attribute.i for attribute in node.attribute}.get("channels", 0)
    return node.op_type == "ReorderOutput" and channels > 0 and channels % _LARGEST_BLOCK == 0


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _give_back_memory() -> None:
    """What reading and optimising the model took lies in malloc's free lists: the system gets it back before the run.

    Up to 30 MB of a model of 90. Only glibc has the call; elsewhere it stays.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
