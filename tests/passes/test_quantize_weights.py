"""quantize_weights: int8 in the file, float in the arithmetic, and our own folding leaves it so."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from pass_support import check, ops, parse, run_ort, to_bytes
from quant_support import in_kernels

from passes import make
from passes.base import InvalidOption
from passes.quantize_weights import QuantizeWeights


def normal(*shape: int, seed: int = 3, scale: float = 0.1) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


LAYERS = {
    "conv": ("y = Conv <pads = [1, 1, 1, 1]> (x, w)", "float[N, 16, 6, 6] x", "float[N, 32, 6, 6] y", (32, 16, 3, 3)),
    "grouped": ("y = Conv <group = 4> (x, w)", "float[N, 16, 6, 6] x", "float[N, 32, 4, 4] y", (32, 4, 3, 3)),
    "transpose": ("y = ConvTranspose (x, w)", "float[N, 16, 6, 6] x", "float[N, 32, 8, 8] y", (16, 32, 3, 3)),
    "gemm": ("y = Gemm (x, w)", "float[N, 48] x", "float[N, 32] y", (48, 32)),
    "turned": ("y = Gemm <transB = 1, alpha = 0.5> (x, w)", "float[N, 48] x", "float[N, 32] y", (32, 48)),
    "matmul": ("y = MatMul (x, w)", "float[N, 48] x", "float[N, 32] y", (48, 32)),
    "stack": ("y = MatMul (x, w)", "float[2, N, 48] x", "float[2, N, 32] y", (2, 48, 32)),
}


@pytest.mark.parametrize("weights", ["balanced", "amax", "mse"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, weights: str) -> None:
    body, inputs, outputs, shape = LAYERS[name]
    w = normal(*shape)
    dims = ", ".join(map(str, shape))
    proto = parse(f"agraph ({inputs}, float[{dims}] w) => ({outputs}) {{ {body} }}", w=w)
    model, _ = check(proto, QuantizeWeights(weights=weights), fired=1, nmse=1e-4, run=run_ort)
    assert ops(model)[0] == "DequantizeLinear"
    assert len(ops(model)) == 2
    assert model.graph.initializers["w_quantized"].dtype == ir.DataType.INT8
    assert "w" not in model.graph.initializers
    assert len(to_bytes(model)) < 0.5 * proto.ByteSize()
    before = to_bytes(model)
    make("fold_constants")(model)
    assert "DequantizeLinear" in ops(model), "folded back to float"
    assert "w_quantized" in model.graph.initializers
    assert len(to_bytes(model)) < 1.2 * len(before)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("inputs", [128, 100])
def test_blocks_hold_outliers(transposed: int, inputs: int) -> None:
    w = normal(inputs, 48)
    w[5] *= 200
    proto = parse(
        f"agraph (float[N, {inputs}] x, float[{'48, ' if transposed else ''}{inputs}{'' if transposed else ', 48'}] w)"
        f" => (float[N, 48] y) {{ y = Gemm <transB = {transposed}> (x, w) }}",
        opset=21,
        ir_version=10,
        w=np.ascontiguousarray(w.T) if transposed else w,
    )
    model = ir.from_proto(proto)
    QuantizeWeights(block_size=32, weights="amax")(model)
    scale = model.graph.initializers["w_scale"].const_value.numpy()
    assert scale.shape == (4, 48)
    # what comes out are the weights themselves, each within half a step of its own block
    (rows,) = run_ort(ir.to_proto(model), {"x": np.eye(inputs, dtype=np.float32)})
    step = np.repeat(scale, 32, axis=0)[:inputs]
    assert (np.abs(rows - w) <= step * 0.5001).all()
    check(proto, QuantizeWeights(block_size=32), fired=1, nmse=2e-3, run=run_ort)  # the outlier's own block


def test_matmul_and_gemm_stay_int8_in_onnx_runtime() -> None:
    for name in ("gemm", "turned", "matmul"):
        body, inputs, outputs, shape = LAYERS[name]
        body = body.replace(", alpha = 0.5", "")
        text = f"agraph ({inputs}, float[{shape[0]}, {shape[1]}] w) => ({outputs}) {{ {body} }}"
        model = ir.from_proto(parse(text, w=normal(*shape)))
        QuantizeWeights()(model)
        assert in_kernels(ir.to_proto(model))["MatMulNBits"] == 1, name


def test_tied_embedding_and_shared_weight() -> None:
    proto = parse(
        "agraph (int64[N] i, float[64, 48] w) => (float[N, 64] y, float[N, 64] z) "
        "{ e = Gather (w, i)\n y = Gemm <transB = 1> (e, w)\n r = Relu (e)\n z = Gemm <transB = 1> (r, w) }",
        w=normal(64, 48),
    )
    model, _ = check(proto, QuantizeWeights(), fired=3, nmse=1e-3, run=run_ort)
    assert ops(model).count("DequantizeLinear") == 1
    assert "w" not in model.graph.initializers


def test_declined() -> None:
    text = "agraph (float[N, 48] x, float[48, 32] w) => (float[N, 32] y) { y = MatMul (x, w) }"
    w = normal(48, 32)
    for options, opset, reason in (
        ({"smallest": 4096}, 20, "1536 elements"),
        ({"exclude": ("MatMul -> y",)}, 20, "excluded"),
        ({}, 12, "came with 13"),
        ({"block_size": 16}, 20, "came with 21"),
    ):
        _, outcome = check(parse(text, opset=opset, w=w), QuantizeWeights(**options), fired=0, run=run_ort)
        assert reason in outcome.declined[0].reason
    with pytest.raises(InvalidOption, match="block_size"):
        QuantizeWeights(block_size=24)
