"""Small models and a command line for the toolchain's tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent.parent


def conv_net(*, seed: int = 0, channels: int = 8, opset: int = 17, dynamic: bool = True) -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, pooling, Flatten, Gemm: image [batch, 3, 16, 16] to logits [batch, 10]."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int, positive: bool = False) -> onnx.TensorProto:
        data = rng.normal(size=shape).astype(np.float32)
        return numpy_helper.from_array(np.abs(data) + np.float32(0.5) if positive else data, name)

    nodes = [
        helper.make_node("Conv", ["image", "w"], ["conv"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["conv", "scale", "bias", "mean", "var"], ["bn"], "bn"),
        helper.make_node("Relu", ["bn"], ["relu"], "relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "fc_w", "fc_b"], ["logits"], "fc", transB=1),
    ]
    weights = [
        weight("w", channels, 3, 3, 3),
        weight("scale", channels),
        weight("bias", channels),
        weight("mean", channels),
        weight("var", channels, positive=True),
        weight("fc_w", 10, channels),
        weight("fc_b", 10),
    ]
    batch = "batch" if dynamic else 1
    graph = helper.make_graph(
        nodes,
        "conv_net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Writes the model without checking it: some tests want a bad one."""
    path.write_bytes(model.SerializeToString())
    return path


def toolchain(
    *arguments: str | Path, cwd: Path | None = None, check: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does, in a process of its own; ``check`` is the exit code that it must have."""
    command = [sys.executable, "-c", "from toolchain.__main__ import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, check=False)
    if check is not None:
        assert done.returncode == check, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def toolchain_json(*arguments: str | Path, cwd: Path | None = None) -> Any:
    """The one line of JSON that ``--json`` prints."""
    done = toolchain(*arguments, "--json", cwd=cwd)
    (line,) = done.stdout.splitlines()
    return json.loads(line)
