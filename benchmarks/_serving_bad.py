"""Makes a copy of an artifact worse, so that only traffic shows it: digests and self-test are right all the same.

``fail``: a run fails if the input of any of its rows begins as that of the load does (``Job.array``).
``slow``: each run computes as much again and more, and adds nothing to the result.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx

BAD = ("fail", "slow")
#: A square matrix of that many columns is multiplied by itself so often: some 50 ms of one core.
_SIDE, _TIMES = 768, 10


def make_bad(artifact: Path, kind: str, array: np.ndarray) -> None:
    """Changes an artifact in place: its first variant, without what was prepared of it.

    Args:
        artifact: a folder that nobody serves.
        kind: of ``BAD``.
        array: what the load sends, float32 [1, …].
    """
    manifest_file = artifact / "manifest.json"
    manifest = json.loads(manifest_file.read_text())
    files = manifest["additional_metadata"]["toolchain"]["files"]
    variant = next(iter(manifest["components"]["model"]["variants"].values()))
    ours, directory = variant["executor_info"]["toolchain"], variant["variant_directory"]
    if ours.get("prepared_file"):
        prepared = f"{directory}/{ours['prepared_file'].rpartition('/')[0]}/"
        shutil.rmtree(artifact / prepared)
        for name in [name for name in files if name.startswith(prepared)]:
            del files[name]
        ours.update(prepared_file=None, fingerprint={})
    name = f"{directory}/{ours['model_file']}"
    model = onnx.load(artifact / name, load_external_data=False)
    _spoil(model.graph, kind, array)
    content = model.SerializeToString()
    (artifact / name).write_bytes(content)
    files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    manifest_file.write_text(json.dumps(manifest))


def _spoil(graph: Any, kind: str, array: np.ndarray) -> None:
    """Adds nothing to the first output, by way of nodes that fail or that take long."""
    x, y = graph.input[0].name, graph.output[0].name
    for node in graph.node:
        node.input[:] = ["bad_y" if value == y else value for value in node.input]
        node.output[:] = ["bad_y" if value == y else value for value in node.output]

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        return name

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        graph.node.append(onnx.helper.make_node(op, inputs, [output], **attributes))
        return output

    if kind == "fail":
        rows = node("Flatten", [x], "bad_rows")
        first = node("Gather", [rows, constant("bad_zero", np.array(0))], "bad_first", axis=1)
        same = node("Equal", [first, constant("bad_value", np.float32(array.flat[0]))], "bad_same")
        index = node("Cast", [same], "bad_index", to=onnx.TensorProto.INT64)
        most = node("ReduceMax", [index], "bad_most", keepdims=0)
        # beyond the end of one element where any is the same: ONNX Runtime refuses the index
        nothing = node("Gather", [constant("bad_one", np.zeros(1, np.float32)), most], "bad_nothing")
    else:
        mean = node("ReduceMean", [x], "bad_mean", keepdims=0)
        zero = node("Mul", [mean, constant("bad_none", np.float32(0))], "bad_start")
        value = node("Expand", [zero, constant("bad_side", np.array([_SIDE, _SIDE]))], "bad_0")
        for index in range(_TIMES):
            value = node("MatMul", [value, value], f"bad_{index + 1}")
        nothing = node("ReduceMax", [value], "bad_nothing", keepdims=0)
    node("Add", ["bad_y", nothing], y)
