"""A small residual network for the tests of pruning, with channels that do nothing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

#: a 3x3 convolution that keeps the size
_SAME = "<pads = [1, 1, 1, 1]>"


def residual_net(*, seed: int = 0, dead: int = 0) -> ir.Model:
    """Image [batch, 3, 12, 12] to logits [batch, 5]: a stem of 16 channels, two residual blocks of 32 inside, a head.

    Args:
        dead: so many of the 32 channels of the first block ("one_a") are read with weights near zero.
    """
    rng = np.random.default_rng(seed)
    shapes = {"stem": (16, 3, 3, 3), "head": (5, 16)}
    shapes |= {
        f"{name}_{which}": shape
        for name in ("one", "two")
        for which, shape in (("a", (32, 16, 3, 3)), ("b", (16, 32, 3, 3)))
    }
    weights = {name: rng.normal(size=shape, scale=np.prod(shape[1:]) ** -0.5) for name, shape in shapes.items()}
    weights["one_b"][:, :dead] *= 1e-4
    body = f"s = Conv {_SAME} (image, stem) r0 = Relu (s) "
    for index, name in enumerate(("one", "two")):
        body += (
            f"{name}_c = Conv {_SAME} (r{index}, {name}_a) {name}_r = Relu ({name}_c) "
            f"{name}_d = Conv {_SAME} ({name}_r, {name}_b) {name}_sum = Add ({name}_d, r{index}) "
            f"r{index + 1} = Relu ({name}_sum) "
        )
    body += "p = GlobalAveragePool (r2) f = Flatten (p) logits = Gemm <transB = 1> (f, head)"
    declared = ", ".join(f"float[{', '.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> net (float[batch, 3, 12, 12] image, {declared}) '
        f"=> (float[batch, 5] logits) {{ {body} }}"
    )
    for value in list(model.graph.inputs)[1:]:
        assert value.name is not None
        value.const_value = ir.Tensor(weights[value.name].astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    return model


def images(count: int, *, seed: int = 1) -> np.ndarray:
    """float32 [count, 3, 12, 12]."""
    found: np.ndarray = np.random.default_rng(seed).normal(size=(count, 3, 12, 12)).astype(np.float32)
    return found
