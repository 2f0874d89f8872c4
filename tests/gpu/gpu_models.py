"""Small models in several precisions, made of onnx and numpy alone: GPU machines have little else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

#: precision -> the most that a result may differ from float32 on the CPU, relative to its largest element
BOUNDS = {"fp32": 1e-5, "fp16": 2e-3, "int8": 2e-2}


def conv_net(path: Path, precision: str) -> Path:
    """Conv, Relu, MaxPool, Conv, residual Add, Relu, GlobalAveragePool, Gemm on x: float32[N, 3, 32, 32].

    ``fp16`` casts at both ends, ``int8`` has Q/DQ on the inputs of convolutions, symmetric, weights per channel.
    """
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.normal(0, 0.2, (16, 3, 3, 3)),
        "w2": rng.normal(0, 0.08, (16, 16, 3, 3)),
        "w3": rng.normal(0, 0.3, (10, 16)),
        "b1": rng.normal(0, 0.1, 16),
        "b3": rng.normal(0, 0.1, 10),
    }
    half = precision == "fp16"
    dtype = np.float16 if half else np.float32
    tensors = [numpy_helper.from_array(value.astype(dtype), name) for name, value in weights.items()]
    nodes = [helper.make_node("Cast", ["x"], ["x0"], to=TensorProto.FLOAT16)] if half else []
    source = "x0" if half else "x"

    def conv(data: str, weight: str, bias: list[str], output: str, amax: float) -> None:
        if precision == "int8":
            data, weight = quantised(data, amax), quantised_weight(weight)
        nodes.append(helper.make_node("Conv", [data, weight, *bias], [output], pads=[1, 1, 1, 1]))

    def quantised(data: str, amax: float) -> str:
        tensors.append(numpy_helper.from_array(np.float32(amax / 127), f"{data}_s"))
        tensors.append(numpy_helper.from_array(np.int8(0), f"{data}_z"))
        nodes.append(helper.make_node("QuantizeLinear", [data, f"{data}_s", f"{data}_z"], [f"{data}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{data}_q", f"{data}_s", f"{data}_z"], [f"{data}_d"]))
        return f"{data}_d"

    def quantised_weight(name: str) -> str:
        value = weights[name].astype(np.float32)
        scale = np.abs(value).max(axis=(1, 2, 3)) / 127
        integers = np.rint(value / scale.reshape(-1, 1, 1, 1)).astype(np.int8)
        zeros = np.zeros(len(scale), np.int8)
        for suffix, array in (("8", integers), ("_s", scale.astype(np.float32)), ("_z", zeros)):
            tensors.append(numpy_helper.from_array(array, name + suffix))
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}8", f"{name}_s", f"{name}_z"], [f"{name}_d"], axis=0)
        )
        return f"{name}_d"

    conv(source, "w1", ["b1"], "c1", 4.0)
    nodes.append(helper.make_node("Relu", ["c1"], ["r1"]))
    nodes.append(helper.make_node("MaxPool", ["r1"], ["p1"], kernel_shape=[2, 2], strides=[2, 2]))
    conv("p1", "w2", [], "c2", 8.0)
    nodes.append(helper.make_node("Add", ["c2", "p1"], ["a2"]))
    nodes.append(helper.make_node("Relu", ["a2"], ["r2"]))
    nodes.append(helper.make_node("GlobalAveragePool", ["r2"], ["g"]))
    nodes.append(helper.make_node("Flatten", ["g"], ["f"]))
    nodes.append(helper.make_node("Gemm", ["f", "w3", "b3"], ["y0" if half else "y"], transB=1))
    if half:
        nodes.append(helper.make_node("Cast", ["y0"], ["y"], to=TensorProto.FLOAT))
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "conv_net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        [tensor for tensor in tensors if tensor.name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def images(count: int) -> np.ndarray:
    """Inputs of ``conv_net``: float32[count, 3, 32, 32]."""
    return np.random.default_rng(count).normal(0, 1, (count, 3, 32, 32)).astype("float32")


def error(given: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, relative to the largest element of ``wanted``."""
    return float(np.abs(given - wanted).max() / np.abs(wanted).max())
