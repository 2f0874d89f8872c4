"""quantize_dynamic: which layers, how exact, and the kernels that ONNX Runtime makes of it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_support import check, ops, parse, run_ort
from quant_support import in_kernels

from passes.base import InvalidOption, PassFailed
from passes.quantize_dynamic import QuantizeDynamic


def normal(*shape: int, seed: int = 3, scale: float = 0.1) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


W = {"w": normal(128, 160)}
DECLARED = "float[N, S, 128] x, float[128, 160] w"


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("weights", ["balanced", "amax", "mse"])
def test_matmul_is_one_kernel(granularity: str, weights: str) -> None:
    proto = parse(f"agraph ({DECLARED}) => (float[N, S, 160] y) {{ y = MatMul (x, w) }}", **W)
    made = QuantizeDynamic(granularity=granularity, weights=weights)
    model, _ = check(proto, made, fired=1, nmse=2e-4, run=run_ort)
    assert ops(model) == ["DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul"]
    assert "w" not in model.graph.initializers
    assert in_kernels(ir.to_proto(model)) == {"DynamicQuantizeMatMul": 1}


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize(
    ("attributes", "bias"),
    [("", None), ("", (160,)), ("", (1, 160)), ("", (1,)), ("alpha = 0.5, beta = 2.0,", (160,))],
)
def test_gemm(transposed: int, attributes: str, bias: tuple[int, ...] | None) -> None:
    constants = {"w": normal(*((160, 128) if transposed else (128, 160)))}
    declared = f"float[N, 128] x, float[{constants['w'].shape[0]}, {constants['w'].shape[1]}] w"
    if bias is not None:
        constants["b"] = normal(*bias, seed=4)
        declared += f", float[{', '.join(map(str, bias))}] b"
    proto = parse(
        f"agraph ({declared}) => (float[N, 160] y) "
        f"{{ y = Gemm <{attributes} transB = {transposed}> (x, w{', b' if bias else ''}) }}",
        **constants,
    )
    model, _ = check(proto, QuantizeDynamic(), fired=1, nmse=2e-4, run=run_ort)
    assert in_kernels(ir.to_proto(model)) == {"DynamicQuantizeMatMul": 1}


def test_shared_input_is_quantised_once_and_biases_are_fused() -> None:
    names = ("q", "k", "v")
    constants = {f"w{n}": normal(128, 160, seed=i) for i, n in enumerate(names)}
    constants |= {f"b{n}": normal(160, seed=9 + i) for i, n in enumerate(names)}
    declared = ", ".join(["float[N, 128] x", *(f"float[128, 160] w{n}, float[160] b{n}" for n in names)])
    body = "\n".join(f"m{n} = MatMul (x, w{n})\n{n} = Add (m{n}, b{n})" for n in names)
    outputs = ", ".join(f"float[N, 160] {n}" for n in names)
    model, _ = check(
        parse(f"agraph ({declared}) => ({outputs}) {{ {body} }}", **constants),
        QuantizeDynamic(),
        fired=3,
        nmse=2e-4,
        run=run_ort,
    )
    assert ops(model).count("DynamicQuantizeLinear") == 1
    assert in_kernels(ir.to_proto(model)) == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 3}


def test_shared_weight_is_stored_once() -> None:
    proto = parse(
        "agraph (float[N, 128] x, float[128, 128] w) => (float[N, 128] y) { m = MatMul (x, w)\n y = MatMul (m, w) }",
        w=normal(128, 128),
    )
    model, _ = check(proto, QuantizeDynamic(), fired=2, nmse=4e-4, run=run_ort)
    assert [v.name for v in model.graph.initializers.values() if v.const_value.size > 200] == ["w_quantized"]


def test_each_element_is_within_the_steps_of_its_input_and_weights() -> None:
    proto = parse("agraph (float[N, 128] x, float[128, 160] w) => (float[N, 160] y) { y = MatMul (x, w) }", **W)
    model = ir.from_proto(proto)
    QuantizeDynamic(weights="amax")(model)
    x = np.random.default_rng(1).uniform(-3, 5, (16, 128)).astype(np.float32)
    (got,) = run_ort(ir.to_proto(model), {"x": x})
    x_step, w_step = (x.max() - x.min()) / 255, np.abs(W["w"]).max(axis=0) / 127
    bound = np.abs(x).sum(axis=1)[:, None] * w_step / 2 + x_step * (np.abs(W["w"]) + w_step / 2).sum(axis=0)
    error = np.abs(got - x.astype(np.float64) @ W["w"])
    assert (error <= bound).all()
    assert error.max() > 0


def test_embedding_rows_have_their_own_scales() -> None:
    table = normal(200, 96) * np.logspace(-3, 3, 200, dtype=np.float32)[:, None]
    proto = parse("agraph (int64[N, S] i, float[200, 96] w) => (float[N, S, 96] y) { y = Gather (w, i) }", w=table)
    model = ir.from_proto(proto)
    outcome = QuantizeDynamic(weights="amax")(model)
    assert outcome.fired == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    indices = np.array([[0, 199, -1], [-200, 7, 7]])
    (got,) = run_ort(ir.to_proto(model), {"i": indices})
    assert (np.abs(got - table[indices]) <= np.abs(table[indices]).max(axis=-1, keepdims=True) / 127 * 0.5001).all()
    check(proto, QuantizeDynamic(embeddings=False), fired=0)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_lstm(direction: str) -> None:
    count = 2 if direction == "bidirectional" else 1
    constants = {"w": normal(count, 256, 96), "r": normal(count, 256, 64, seed=4), "b": normal(count, 512, seed=5)}
    declared = ", ".join(f"float[{', '.join(map(str, c.shape))}] {n}" for n, c in constants.items())
    proto = parse(
        f"agraph (float[S, N, 96] x, {declared}) => (float[S, {count}, N, 64] y) "
        f'{{ y, h, c = LSTM <hidden_size = 64, direction = "{direction}"> (x, w, r, b) }}',
        **constants,
    )
    model, _ = check(proto, QuantizeDynamic(), fired=1, nmse=1e-3, sizes={"S": 5, "N": 3}, run=run_ort)
    assert ops(model) == ["DynamicQuantizeLSTM"]
    _, outcome = check(proto, QuantizeDynamic(lstm=False), fired=0, run=run_ort)
    assert outcome.declined[0].reason == "option lstm is off"


def test_in_a_subgraph_with_a_weight_from_outside() -> None:
    proto = parse(
        "agraph (bool[1] c, float[N, 128] x, float[128, 160] w) => (float[N, 160] y) { y = If (c) <"
        "then_branch = a () => (float[N, 160] p) { p = MatMul (x, w) }, "
        "else_branch = b () => (float[N, 160] q) { m = MatMul (x, w)\n q = Relu (m) }> }",
        **W,
    )
    check(proto, QuantizeDynamic(), fired=2, nmse=2e-4, run=run_ort, seeds=4)


@pytest.mark.parametrize(
    ("inputs", "body", "constants", "reason"),
    [
        ("float[N, 128] x, float[128, 160] v", "y = MatMul (x, v)", {}, "its weight is not constant"),
        ("float[N, 16] x, float[16, 160] w", "y = MatMul (x, w)", {"w": normal(16, 160)}, "2560 elements"),
        ("float[160, N] x, float[128, 160] w", "y = MatMul (w, x)", W, "first input is constant"),
        ("double[N, 128] x, double[128, 160] w", "y = MatMul (x, w)", {"w": W["w"].astype(np.float64)}, "double"),
        ("float[128, N] x, float[128, 160] w", "y = Gemm <transA = 1> (x, w)", W, "transA"),
        ("float[2, 128] x, float[128, 160] w, float[2, 160] v", "y = Gemm (x, w, v)", W, "bias is not constant"),
    ],
)
def test_declined(inputs: str, body: str, constants: dict[str, np.ndarray], reason: str) -> None:
    kind = "double" if "double" in inputs else "float"
    proto = parse(f"agraph ({inputs}) => ({kind}[A, B] y) {{ {body} }}", **constants)
    _, outcome = check(proto, QuantizeDynamic(), fired=0, sizes={"N": 3}, run=run_ort)
    assert [reason in declined.reason for declined in outcome.declined] == [True]


def test_exclude_old_opsets_and_bad_options() -> None:
    text = "agraph (float[N, 128] x, float[128, 160] w) => (float[N, 160] y) { y = MatMul (x, w) }"
    name = "MatMul -> y"
    _, outcome = check(parse(text, **W), QuantizeDynamic(exclude=(name,)), fired=0)
    assert outcome.declined[0].reason == "excluded"
    _, outcome = check(parse(text, opset=10, ir_version=5, **W), QuantizeDynamic(), fired=0, run=run_ort)
    assert "DynamicQuantizeLinear came with 11" in outcome.declined[0].reason
    with pytest.raises(PassFailed, match="nonsense"):
        QuantizeDynamic(exclude=("nonsense",))(ir.from_proto(parse(text, **W)))
    with pytest.raises(InvalidOption, match="granularity"):
        QuantizeDynamic(granularity="row")


def test_residuals_are_not_fused_with_the_normalisation_after_them() -> None:
    body = "h = MatMul (x, w) s = Add (h, x) y = LayerNormalization <axis = -1> (s, g, b)"
    constants = {"w": normal(128, 128), "g": np.ones(128, np.float32), "b": np.zeros(128, np.float32)}
    proto = parse(
        "agraph (float[N, S, 128] x, float[128, 128] w, float[128] g, float[128] b) => (float[N, S, 128] y) "
        f"{{ {body} }}",
        **constants,
    )
    model, _ = check(proto, QuantizeDynamic(), fired=1, nmse=2e-4, run=run_ort)
    assert in_kernels(ir.to_proto(model)) == {"DynamicQuantizeMatMul": 1, "Sum": 1, "LayerNormalization": 1}
    unchanged, _ = check(proto, QuantizeDynamic(smallest=1 << 20), fired=0, run=run_ort)
    assert "Sum" not in ops(unchanged)
