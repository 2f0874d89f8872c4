"""A graph in a newer opset: what an older one cannot say, such as a scale for each channel of a weight (opset 13)."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import onnx_ir as ir

from passes._graph import default_opset
from toolchain import child
from toolchain.errors import GraphError
from toolchain.onnx_file import temporary_onnx

_SECONDS = 300


def at_least(model: ir.Model, opset: int) -> ir.Model:
    """The model itself, or a copy in the opset where its own is older. Values keep their names.

    onnx's converter does it, in a process of its own: native code that has crashed on hostile graphs. Of
    weights it sees the shapes only, unless they are small.

    Raises:
        GraphError: onnx cannot convert the graph, and says why.
    """
    before = default_opset(model.opset_imports)
    if before >= opset:
        return model
    where = f"opset {before} to {opset}"
    hint = "export the model with a newer opset"
    with tempfile.TemporaryDirectory(prefix="toolchain-") as folder, temporary_onnx(model) as path:
        converted = Path(folder) / "model.onnx"
        command = child.command("toolchain._upgrade_onnx", str(path), str(converted), str(opset))
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise GraphError(f"onnx's converter did not end within {_SECONDS} s", where=where, hint=hint) from error
        if done.returncode < 0:
            raise GraphError(f"onnx's converter crashed (signal {-done.returncode})", where=where, hint=hint)
        if done.returncode != 0:
            said = " ".join((done.stdout.strip() or done.stderr.strip()[-300:]).split())
            raise GraphError(f"onnx cannot convert the graph: {said}", where=where, hint=hint)
        made = ir.load(converted)
        _take_weights(made, model)
    return made


def _take_weights(made: ir.Model, model: ir.Model) -> None:
    """Gives the converted graph the weights of the old one: the file that they came from is about to go."""
    for name, value in made.graph.initializers.items():
        old = model.graph.initializers.get(name)
        if isinstance(value.const_value, ir.ExternalTensor):
            assert old is not None, name
            value.const_value = old.const_value
