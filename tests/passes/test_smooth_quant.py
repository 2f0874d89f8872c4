"""smooth_quant: the same float results, smaller outliers, one scale for all who read a value, and where it declines."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_support import check, ops, parse, run_ort, run_reference

from passes._linear import read_linear
from passes._quant import Calibration, affine_u8
from passes._quant_weights import quantize_array
from passes.base import InvalidOption, PassFailed
from passes.smooth_quant import Samples, SmoothQuant, readers_by_input

RNG = np.random.default_rng(1)
#: rounding of float32, nothing else
EXACT = 1e-11
C = 8
OUTLIERS = np.where(np.arange(C) % 4 == 1, 60.0, 1.0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CONSTANTS = {
    "gamma": (normal(C) * OUTLIERS).astype(np.float32),
    "beta": normal(C),
    "wq": normal(C, 5),
    "wk": normal(C, 6),
    "wv": normal(C, C),
    "wo": normal(C, C),
    "w3": normal(3, 5),
    "wt": normal(5, C),
    "bv": normal(C),
    "up": normal(C, C),
    "rows": normal(1, C),
    "heads": np.array([0, 0, 2, 4]),
    "whole": np.array([0, 0, C]),
    "axes": np.array([-1]),
    "half": np.array(0.5, np.float32),
}
KINDS = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64"}


def graph(body: str, *, x: str = f"2, 3, {C}", out: str = "A, B, D", opset: int = 20) -> onnx.ModelProto:
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {name: data for name, data in CONSTANTS.items() if name in words}
    declared = "".join(f", {KINDS[c.dtype]}{[*c.shape] if c.ndim else ''} {name}" for name, c in used.items())
    proto = parse(f"agraph (float[{x}] x{declared}) => (float[{out}] y) {{ {body} }}", opset=opset, **used)
    return onnx.shape_inference.infer_shapes(proto)


def channels(proto: onnx.ModelProto) -> Calibration:
    """Maxima of the channels of everything that Gemm and MatMul read; some of them made large."""
    amax = {}
    for value, readers in readers_by_input(ir.from_proto(proto)).items():
        weight = readers[0].inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        count = weight.const_value.shape[1 if readers[0].op_type == "Gemm" else 0]
        amax[value.name] = np.exp(RNG.uniform(-2, 2, int(count))) * np.resize(OUTLIERS, int(count))
    return Calibration("", 1, {}, amax)


NORM = "n = LayerNormalization (x, gamma, beta)"
PIECES = "m = ReduceMean (x, axes)  d = Sub (x, m)"
FIRES = {
    "normalization": (f"{NORM}  y = MatMul (n, wq)", 1),
    "normalization without bias": ("n = LayerNormalization <axis = 2> (x, gamma)  y = MatMul (n, wq)", 1),
    "normalization in pieces": (f"{PIECES}  g = Mul (d, gamma)  n = Add (g, beta)  y = MatMul (n, wq)", 1),
    "several readers": (f"{NORM}  a = MatMul (n, wq)  b = MatMul (n, wk)  y = Concat <axis = -1> (a, b)", 1),
    "layer before": ("a = MatMul (x, up)  b = Add (bv, a)  r = Relu (b)  y = MatMul (r, wq)", 1),
    "gated": ("a = MatMul (x, up)  s = Sigmoid (a)  b = MatMul (x, wv)  p = Mul (s, b)  y = MatMul (p, wq)", 1),
    "number": ("a = Mul (x, half)  y = MatMul (a, wq)", 1),
    "row": ("a = Mul (rows, x)  y = MatMul (a, wq)", 1),
    "attention": (
        "a = MatMul (x, wv)  b = Add (a, bv)  c = Reshape (b, heads)  v = Transpose <perm = [0, 2, 1, 3]> (c)"
        "  q = Reshape (x, heads)  p = Transpose <perm = [0, 2, 1, 3]> (q)  t = Transpose <perm = [0, 2, 3, 1]> (q)"
        "  l = MatMul (p, t)  s = Softmax (l)  o = MatMul (s, v)  m = Transpose <perm = [0, 2, 1, 3]> (o)"
        "  w = Reshape (m, whole)  y = MatMul (w, wo)",
        1,
    ),
}


@pytest.mark.parametrize(("body", "fired"), FIRES.values(), ids=FIRES.keys())
def test_fires(body: str, fired: int) -> None:
    proto = graph(body)
    calibration = channels(proto)
    last = list(readers_by_input(ir.from_proto(proto)))[-1]
    calibration = dataclasses.replace(calibration, channel_amax={last.name: calibration.channel_amax[last.name]})
    model, _ = check(proto, SmoothQuant(calibration=calibration), fired=fired, nmse=EXACT, run=run_ort)
    assert ops(model) == [node.op_type for node in proto.graph.node]


def test_gemm_before_and_after() -> None:
    body = "a = Gemm <beta = 2.0> (x, up, bv)  r = LeakyRelu (a)  y = Gemm <transB = 1, alpha = 0.5> (r, wt)"
    proto = graph(body, x=f"3, {C}", out="3, 5")
    calibration = Calibration("", 1, {}, {"r": OUTLIERS})
    check(proto, SmoothQuant(calibration=calibration), fired=1, nmse=EXACT, run=run_ort)


def test_the_scale_is_that_of_the_paper() -> None:
    proto = graph(FIRES["several readers"][0])
    calibration = channels(proto)
    before = np.maximum(np.abs(CONSTANTS["wq"]).max(axis=1), np.abs(CONSTANTS["wk"]).max(axis=1))
    model, _ = check(proto, SmoothQuant(calibration=calibration, alpha=0.7), fired=1, nmse=EXACT)
    layers = [node for node in model.graph if node.op_type == "MatMul"]
    given = read_linear(layers[0]).weight[0, :, :, 0].T / CONSTANTS["wq"]
    scale = given[:, 0]
    np.testing.assert_allclose(given, np.broadcast_to(scale[:, None], given.shape), rtol=1e-5)
    wanted = calibration.channel_amax["n"] ** 0.7 / before**0.3
    np.testing.assert_allclose(scale / scale[0], wanted / wanted[0], rtol=1e-5)
    np.testing.assert_allclose(
        read_linear(layers[1]).weight[0, :, :, 0].T / CONSTANTS["wk"], np.repeat(scale[:, None], 6, 1), rtol=1e-5
    )


BRANCH = f"{NORM}  a = MatMul (n, wv)  y = Add (a, n)"
NO_FOLD = {
    "residual": BRANCH,
    "gelu": "a = MatMul (x, up)  g = Gelu (a)  y = MatMul (g, wq)",
    "input of the graph": "y = MatMul (x, wq)",
    "sum of two": "a = MatMul (x, up)  b = Add (a, x)  y = MatMul (b, wq)",
    "channels move": "a = MatMul (x, up)  t = Transpose <perm = [0, 2, 1]> (a)  y = MatMul (t, w3)",
    "read upstream too": "a = MatMul (x, up)  r = Relu (a)  b = MatMul (r, wv)  y = Add (b, a)",
}


@pytest.mark.parametrize("body", NO_FOLD.values(), ids=NO_FOLD.keys())
def test_declines_or_multiplies(body: str) -> None:
    proto = graph(body)
    calibration = channels(proto)
    last = list(readers_by_input(ir.from_proto(proto)))[-1]
    calibration = dataclasses.replace(calibration, channel_amax={last.name: calibration.channel_amax[last.name]})
    _, outcome = check(proto, SmoothQuant(calibration=calibration), fired=0, seeds=1, run=run_ort)
    assert outcome.declined
    model, _ = check(proto, SmoothQuant(calibration=calibration, insert_mul=True), fired=1, nmse=EXACT, run=run_ort)
    assert ops(model).count("Mul") == body.count(" Mul (") + 1


DECLINES = {
    "no maxima": (f"{NORM}  y = MatMul (n, wq)", {}),
    "other channels": (f"{NORM}  y = MatMul (n, wq)", {"n": np.arange(1.0, 8.0)}),
    "shared weight": (f"{NORM}  a = MatMul (n, wv)  y = MatMul (a, wv)", {"n": OUTLIERS}),
}


@pytest.mark.parametrize(("body", "amax"), DECLINES.values(), ids=DECLINES.keys())
def test_declines(body: str, amax: dict[str, np.ndarray]) -> None:
    calibration = Calibration("", 1, {}, amax)
    _, outcome = check(graph(body), SmoothQuant(calibration=calibration, insert_mul=True), fired=0, seeds=1)
    assert outcome.declined


def test_dead_channels_are_left_alone() -> None:
    proto = graph(FIRES["normalization"][0])
    amax = OUTLIERS.copy()
    amax[3] = 0
    model, _ = check(proto, SmoothQuant(calibration=Calibration("", 1, {}, {"n": amax})), fired=1, nmse=EXACT)
    weight = read_linear(model.graph.node(-1)).weight[0, :, :, 0].T
    np.testing.assert_array_equal(weight[3].astype(np.float32), CONSTANTS["wq"][3])


def error_in_8_bits(rows: np.ndarray, weight: np.ndarray, exact: np.ndarray) -> float:
    found = affine_u8(float(rows.min()), float(rows.max()))
    rounded = (np.clip(np.rint(rows / found.scale) + found.zero_point, 0, 255) - found.zero_point) * found.scale
    quantised = quantize_array(weight.astype(np.float32), 1, method="amax")
    result = rounded @ (quantised.values * quantised.scale)
    return float(np.square(result - exact).sum() / np.square(exact).sum())


@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_quantised_products_get_better(alpha: float | str) -> None:
    """An activation with two channels a hundred times the others', the case that the method was made for."""
    rng = np.random.default_rng(0)
    channel = np.where(np.arange(64) % 32 == 3, 100.0, 1.0)
    weight = rng.standard_normal((64, 64)).astype(np.float32)
    text = """agraph (float[N, 64] x, float[64] g, float[64, 64] w) => (float[N, 64] y) {
        n = LayerNormalization (x, g)  y = MatMul (n, w) }"""
    proto = onnx.shape_inference.infer_shapes(parse(text, g=channel.astype(np.float32), w=weight))
    x = rng.standard_normal((512, 64)).astype(np.float32)
    watched = onnx.ModelProto.FromString(proto.SerializeToString())
    watched.graph.output.append(onnx.helper.make_tensor_value_info("n", onnx.TensorProto.FLOAT, ["N", 64]))
    exact, rows = run_reference(watched, {"x": x})
    calibration = Calibration("", 512, {}, {"n": np.abs(rows).max(axis=0).astype(np.float64)})
    smooth = SmoothQuant(calibration=calibration, alpha=alpha, samples=Samples({"n": rows[:256]}))
    model, _ = check(proto, smooth, fired=1, nmse=EXACT)
    model.graph.outputs.append(model.graph.node(0).outputs[0])
    _, smoothed = run_reference(ir.to_proto(model), {"x": x})
    new_weight = read_linear(model.graph.node(1)).weight[0, :, :, 0].T
    before, after = error_in_8_bits(rows, weight, exact), error_in_8_bits(smoothed, new_weight, exact)
    assert after < before / 3, (before, after)


def test_auto_leaves_alone_what_it_cannot_better() -> None:
    """Integers, which 8 bits hold as they are: whatever moves makes the result worse."""
    proto = graph(FIRES["normalization"][0])
    rows = RNG.integers(0, 256, (256, C)).astype(np.float32)
    rows[::2], rows[::3] = 0, 255
    weight = RNG.integers(-100, 100, (C, 5)).astype(np.float32)
    weight[0] = 127
    for tensor in proto.graph.initializer:
        if tensor.name == "wq":
            tensor.raw_data = weight.tobytes()
    calibration = Calibration("", 1, {}, {"n": np.full(C, 255.0)})
    smooth = SmoothQuant(calibration=calibration, alpha="auto", samples=Samples({"n": rows}))
    _, outcome = check(proto, smooth, fired=0, seeds=1)
    assert "better" in outcome.declined[0].reason


@pytest.mark.parametrize("alpha", [-0.1, 1.1, "best"])
def test_bad_alpha(alpha: float | str) -> None:
    with pytest.raises(InvalidOption, match="alpha"):
        SmoothQuant(alpha=alpha)


def test_missing_statistics() -> None:
    model = ir.from_proto(graph(FIRES["normalization"][0]))
    with pytest.raises(PassFailed, match="calibration"):
        SmoothQuant()(model)
    with pytest.raises(PassFailed, match="samples"):
        SmoothQuant(calibration=Calibration("", 1, {}), alpha="auto")(model)
