"""Asks onnxsim for the constants that our own folding cannot reach. It runs in a child process.

onnxsim is a large C++ program on foreign files: it may crash, loop or ask for all memory. So it gets a
process of its own with limits, and sees a copy of the graph in which every big weight is an input.
What comes back is used as an oracle only: a value that it found constant becomes a constant here, under
its own name. Nodes, names and everything else of its result are not taken over.

The child is started only where there is something to find: a value that is computed from shapes alone
and is neither known nor a dynamic dimension of the inputs. Elsewhere this pass costs nothing.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from passes._contents import ContentsOf
from passes._evaluate import FOLDABLE
from passes._graph import constant, default_opset, dims, is_op, new_constant, remove, scopes
from passes._shapes import skeleton
from passes.base import Declined, Outcome, Pass, PassFailed, in_standard_domain

#: what the child runs; its only contact with the outside are the two files
_CHILD = """
import resource, sys
limit = int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import onnx, onnxsim
model = onnx.load(sys.argv[1])
result, _ = onnxsim.simplify(model, perform_optimization=False, include_subgraph=False)
onnx.save(result, sys.argv[2])
"""
_STDERR_LINES = 8


@dataclasses.dataclass(frozen=True)
class Simplify(Pass):
    """Takes over the constants that onnxsim finds, each no larger than ``max_bytes``.

    Attributes:
        timeout: seconds until the child is killed.
        memory: address space of the child in MiB; 0 is unlimited.
        max_bytes: the largest tensor that is taken over, in bytes.
    """

    timeout: float = 60.0
    memory: int = 4096
    max_bytes: int = 1 << 18

    def call(self, model: ir.Model) -> Outcome:
        wanted = _open_values(model)
        if not wanted:
            reason = "nothing is computed from shapes but the inputs' own dynamic dimensions"
            return Outcome(model, False, declined=(Declined(model.graph.name or "graph", reason),))
        proto, _ = skeleton(model)
        # A default that the caller may override is no constant: let the child see the input alone.
        listed = {value.name for value in proto.graph.input}
        kept = [tensor for tensor in proto.graph.initializer if tensor.name not in listed]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
        fired = _take_over(model, _constants(self._run(proto)), wanted, self.max_bytes)
        return Outcome(model, fired > 0, fired=fired)

    def _run(self, proto: onnx.ModelProto) -> onnx.ModelProto:
        with tempfile.TemporaryDirectory(prefix="onnxsim-") as folder:
            source, result = Path(folder, "in.onnx"), Path(folder, "out.onnx")
            source.write_bytes(proto.SerializeToString())
            command = [sys.executable, "-c", _CHILD, str(source), str(result), str(self.memory << 20)]
            try:
                done = subprocess.run(
                    command, cwd=folder, capture_output=True, timeout=self.timeout, check=False, text=True
                )
            except subprocess.TimeoutExpired as error:
                raise PassFailed(
                    f"onnxsim did not finish in {self.timeout:g} s",
                    hint="raise timeout or leave out simplify",
                ) from error
            if done.returncode != 0 or not result.is_file():
                raise PassFailed(f"onnxsim {_death(done)}", hint="leave out simplify")
            try:
                return onnx.load(result)
            except Exception as error:
                raise PassFailed(
                    f"onnxsim wrote a file that is no model: {error}", hint="leave out simplify"
                ) from error


def _death(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()][-_STDERR_LINES:]
    said = ("\n" + "\n".join(lines)) if lines else ""
    if done.returncode < 0:
        return f"was killed by {signal.Signals(-done.returncode).name}{said}"
    return f"failed with exit code {done.returncode}{said}"


def _open_values(model: ir.Model) -> set[str]:
    """Names of the values of the main graph that are computed from shapes alone and that we know nothing of.

    A value that holds a dynamic dimension of an input by name is no mystery: no simplifier makes it constant.
    """
    opset = default_opset(model.opset_imports)
    contents = ContentsOf()
    derived: set[ir.Value] = set()
    dynamic: set[ir.Value] = set()
    found: set[str] = set()
    live = _live_nodes(model.graph)
    of_inputs = {d for value in model.graph.inputs for d in dims(value) or () if isinstance(d, str)}
    for node in model.graph:
        if not in_standard_domain(node) or node not in live:
            continue
        contents.visit(node, opset)
        inputs = [v for v in node.inputs if v is not None and constant(v) is None]
        from_shapes = is_op(node, "Shape", "Size")
        if not from_shapes and not (inputs and node.op_type in FOLDABLE and all(v in derived for v in inputs)):
            continue
        derived.update(node.outputs)
        known = contents(node.outputs[0])
        named = known is not None and any(element in of_inputs or _is_named(element) for element in known.elements)
        if named or any(v in dynamic for v in inputs):
            dynamic.update(node.outputs)
        elif known is None or known.known() is None:
            found.update(v.name for v in node.outputs if v.name and v.uses())
    return found


def _live_nodes(graph: ir.Graph) -> set[ir.Node]:
    live: set[ir.Node] = set()
    for node in reversed(graph):
        users = {use.node for value in node.outputs for use in value.uses()}
        if any(v.is_graph_output() for v in node.outputs) or any(
            user in live or user.graph is not graph for user in users
        ):
            live.add(node)
    return live


def _is_named(element: int | str | None) -> bool:
    # onnx's shape inference makes up these names for dimensions that it could not work out.
    return isinstance(element, str) and not element.startswith("unk__")


def _constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.domain == "" and len(node.attribute) == 1:
            if node.attribute[0].name == "value":
                found[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return found


def _take_over(model: ir.Model, found: dict[str, np.ndarray], wanted: set[str], max_bytes: int) -> int:
    scope = next(iter(scopes(model)))
    fired = 0
    for node in list(scope.graph):
        value = node.outputs[0] if len(node.outputs) == 1 else None
        data = found.get(value.name or "") if value is not None else None
        if value is None or data is None or value.name not in wanted or value.is_graph_output():
            continue
        if data.nbytes > max_bytes or (value.dtype is not None and value.dtype.numpy() != data.dtype):
            continue
        name = value.name
        value.name = None
        value.replace_all_uses_with(new_constant(scope, data, name, before=node))
        remove(node)
        fired += 1
    return fired
