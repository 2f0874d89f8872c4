"""equalize_layers: the same float results, matching ranges afterwards, and where it must keep its hands off."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from pass_support import check, parse, run_ort

from passes._linear import read_linear
from passes._quant import Calibration, TensorRange
from passes.equalize_layers import EqualizeLayers

RNG = np.random.default_rng(0)
#: rounding of float32, nothing else
EXACT = 1e-12


def uneven(*shape: int, axis: int = 0) -> np.ndarray:
    """A weight whose channels along ``axis`` differ by orders of magnitude."""
    weight = RNG.standard_normal(shape)
    spread = [1] * len(shape)
    spread[axis] = -1
    return (weight * np.exp(RNG.uniform(-3, 3, shape[axis])).reshape(spread)).astype(np.float32)


CONSTANTS = {
    "w1": uneven(6, 4, 3, 3),
    "b1": uneven(6),
    "w2": uneven(5, 6, 3, 3, axis=1),
    "b2": uneven(5),
    "dw": uneven(6, 1, 3, 3),
    "grouped": uneven(9, 2, 3, 3),
    "after_grouped": uneven(2, 9, 1, 1),
    "t1": uneven(4, 6, 3, 3, axis=1),
    "t2": uneven(6, 5, 3, 3),
    "tg": uneven(6, 2, 3, 3),
    "g1": uneven(6, 7),
    "g1t": uneven(7, 6),
    "g2": uneven(7, 3),
    "gb": uneven(1, 7),
    "rows": uneven(6 * 4 * 5, 3),
    "m1": uneven(9, 6, axis=1),
    "m2": uneven(6, 5),
    "mb": uneven(6),
    "cb": uneven(6, 1, 1),
    "one": np.array(0.5, np.float32),
    "slope": uneven(6, 1, 1),
    "zero": np.array(0, np.float32),
    "six": np.array(6, np.float32),
    "low": np.array(-1, np.float32),
    "p": np.array([0, 0, 1, 0, 0, 0, 1, 2]),
    "pc": np.array([0, 1, 0, 0, 0, 0, 0, 0]),
    "space": np.array([2, 3]),
    "flat": np.array([-1, 120]),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "place": uneven(6, 8, 9),
}
KINDS = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64"}


def graph(body: str, *, opset: int = 20, x: str = "N, 4, 8, 9", out: str = "N, C, H, W"):
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {name: data for name, data in CONSTANTS.items() if name in words}
    declared = "".join(f", {KINDS[c.dtype]}{[*c.shape] if c.ndim else ''} {name}" for name, c in used.items())
    proto = parse(f"agraph (float[{x}] x{declared}) => (float[{out}] y) {{ {body} }}", opset=opset, **used)
    return onnx.shape_inference.infer_shapes(proto)


PADS = "pads = [1, 1, 1, 1]"
PAIRS = {
    "nothing between": "a = Conv (x, w1)  y = Conv (a, w2)",
    "biases": "a = Conv (x, w1, b1)  r = Relu (a)  y = Conv (r, w2, b2)",
    "leaky": "a = Conv (x, w1, b1)  r = LeakyRelu <alpha = 0.2> (a)  y = Conv (r, w2)",
    "prelu": "a = Conv (x, w1, b1)  r = PRelu (a, slope)  y = Conv (r, w2)",
    "clip without upper bound": "a = Conv (x, w1, b1)  r = Clip (a, zero)  y = Conv (r, w2)",
    "max pool": "a = Conv (x, w1, b1)  r = MaxPool <kernel_shape = [2, 2]> (a)  y = Conv (r, w2)",
    "average pool": f"a = Conv (x, w1, b1)  r = AveragePool <kernel_shape = [2, 2], {PADS}> (a)  y = Conv (r, w2)",
    "pad": "a = Conv (x, w1, b1)  r = Pad (a, p)  y = Conv (r, w2)",
    "dropout": "a = Conv (x, w1, b1)  r = Dropout (a)  y = Conv (r, w2)",
    "resize": "a = Conv (x, w1, b1)  r = Resize (a, , scales)  y = Conv (r, w2)",
    "added constant": "a = Conv (x, w1)  r = Add (cb, a)  y = Conv (r, w2)",
    "added number": "a = Conv (x, w1)  r = Sub (a, one)  y = Conv (r, w2)",
    "multiplied": "a = Conv (x, w1)  r = Mul (a, cb)  y = Conv (r, w2)",
    "grouped after": "a = Conv (x, w1, b1)  r = Relu (a)  y = Conv <group = 3> (r, grouped)",
    "transposed first": "a = ConvTranspose (x, t1, b1)  r = Relu (a)  y = Conv (r, w2)",
    "transposed second": "a = Conv (x, w1, b1)  r = Relu (a)  y = ConvTranspose (r, t2)",
    "transposed grouped": "a = Conv (x, w1, b1)  r = Relu (a)  y = ConvTranspose <group = 3> (r, tg)",
}


@pytest.mark.parametrize("body", PAIRS.values(), ids=PAIRS.keys())
def test_pairs(body: str) -> None:
    model, _ = check(graph(body), EqualizeLayers(), fired=1, nmse=EXACT, run=run_ort)
    layers = [node for node in model.graph if "Conv" in node.op_type]
    made, read = read_linear(layers[0]).output_absmax(), read_linear(layers[1]).input_absmax()
    np.testing.assert_allclose(made, read, rtol=1e-5)


CHAINS = {
    "depthwise": (
        f"a = Conv (x, w1, b1)  b = Relu (a)  c = Conv <group = 6, {PADS}> (b, dw)  d = Relu (c)  y = Conv (d, w2)",
        2,
        "N, C, H, W",
    ),
    "grouped first": (
        "a = Conv (x, w1)  b = Conv <group = 3> (a, grouped)  y = Conv (b, after_grouped)",
        2,
        "N, C, H, W",
    ),
    "head": (
        "a = Conv (x, w1, b1)  b = Relu (a)  c = GlobalAveragePool (b)  d = Flatten (c)  e = Gemm (d, g1, gb)"
        "  f = Relu (e)  y = Gemm (f, g2)",
        2,
        "N, C",
    ),
    "mean head": (
        "a = Conv (x, w1, b1)  b = Relu (a)  c = ReduceMean <keepdims = 0> (b, space)"
        "  d = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (c, g1t, gb)  y = Gemm (d, g2)",
        2,
        "N, C",
    ),
    "rows": (
        "a = Conv (x, w1, b1)  b = MaxPool <kernel_shape = [3, 3]> (a)  c = Flatten (b)  y = Gemm (c, rows)",
        1,
        "N, C",
    ),
    "reshaped rows": (
        "a = Conv (x, w1, b1)  b = MaxPool <kernel_shape = [3, 3]> (a)  c = Reshape (b, flat)  y = Gemm (c, rows)",
        1,
        "N, C",
    ),
    "matrices": ("a = MatMul (x, m1)  b = Add (a, mb)  c = Relu (b)  y = MatMul (c, m2)", 1, "N, C, H, W"),
}


@pytest.mark.parametrize(("body", "fired", "out"), CHAINS.values(), ids=CHAINS.keys())
def test_chains(body: str, fired: int, out: str) -> None:
    model, _ = check(graph(body, out=out), EqualizeLayers(), fired=fired, nmse=EXACT, run=run_ort)
    layers = [read_linear(node) for node in model.graph if node.op_type in ("Conv", "Gemm", "MatMul")]
    for first, second in itertools.pairwise(layers):
        read = second.input_absmax().reshape(first.outputs, -1).max(axis=1)
        np.testing.assert_allclose(first.output_absmax(), read, rtol=1e-4)


MUST_NOT_FIRE = {
    "residual": "a = Conv (x, w1)  b = Relu (a)  c = Conv <pads = [1, 1, 1, 1]> (b, w1b)  y = Add (b, c)",
    "two readers": "a = Conv (x, w1)  b = Conv (a, w2)  c = Conv (a, w2)  y = Add (b, c)",
    "sigmoid": "a = Conv (x, w1)  b = Sigmoid (a)  y = Conv (b, w2)",
    "relu6": "a = Conv (x, w1)  b = Clip (a, zero, six)  y = Conv (b, w2)",
    "clip below zero": "a = Conv (x, w1)  b = Clip (a, low)  y = Conv (b, w2)",
    "pads with ones": "a = Conv (x, w1)  b = Pad (a, p, one)  y = Conv (b, w2)",
    "adds at each place": f"a = Conv <{PADS}> (x, w1)  b = Add (a, place)  y = Conv (b, w2)",
    "softmax": "a = Conv (x, w1)  b = Softmax <axis = 1> (a)  y = Conv (b, w2)",
    "weight computed": "a = Conv (x, w1)  n = Neg (w2)  y = Conv (a, n)",
    "another axis": "a = Conv (x, w1)  y = MatMul (a, wide)",
}
CONSTANTS |= {"w1b": uneven(6, 6, 3, 3), "wide": uneven(7, 3)}


@pytest.mark.parametrize("body", MUST_NOT_FIRE.values(), ids=MUST_NOT_FIRE.keys())
def test_must_not_fire(body: str) -> None:
    _, outcome = check(graph(body), EqualizeLayers(), fired=0, seeds=1, run=run_ort)
    assert outcome.declined


def test_shared_weight_stays() -> None:
    body = f"a = Conv <{PADS}> (x, w1)  b = Conv <{PADS}> (a, w1b)  c = Conv <{PADS}> (b, w1b)  y = Conv (c, w2)"
    _, outcome = check(graph(body), EqualizeLayers(), fired=0, seeds=1)
    assert "shared" in outcome.declined[0].reason


def test_output_of_the_graph_stays() -> None:
    text = """agraph (float[N, 4, 8, 9] x, float[6, 4, 3, 3] w1, float[5, 6, 3, 3] w2)
        => (float[N, C, H, W] y, float[N, A, B, D] a) { a = Conv (x, w1)  y = Conv (a, w2) }"""
    check(parse(text, w1=CONSTANTS["w1"], w2=CONSTANTS["w2"]), EqualizeLayers(), fired=0)


def test_dead_channels_get_no_scale() -> None:
    first, second = CONSTANTS["w1"].copy(), CONSTANTS["w2"].copy()
    first[1] = 0
    second[:, 3] = 0
    text = """agraph (float[N, 4, 8, 9] x, float[6, 4, 3, 3] w1, float[6] b1, float[5, 6, 3, 3] w2)
        => (float[N, C, H, W] y) { a = Conv (x, w1, b1)  r = Relu (a)  y = Conv (r, w2) }"""
    model, _ = check(parse(text, w1=first, b1=CONSTANTS["b1"], w2=second), EqualizeLayers(), fired=1, nmse=EXACT)
    conv = read_linear(model.graph.node(0))
    assert conv.bias is not None
    np.testing.assert_array_equal(conv.bias[[1, 3]].astype(np.float32), CONSTANTS["b1"][[1, 3]])


@pytest.mark.parametrize(("seen", "fired"), [(5.9, 1), (6.0, 0), (6.1, 0), (None, 0)])
def test_a_clip_that_is_never_reached(seen: float | None, fired: int) -> None:
    body = "a = Conv (x, w1)  b = Clip (a, zero, six)  y = Conv (b, w2)"
    ranges = {} if seen is None else {"a": TensorRange(-1.0, 2.0, 2.0, -1.0, seen, "entropy")}
    proto = graph(body)
    # Weights so small that the bound is not reached in the test either.
    for tensor in proto.graph.initializer:
        if tensor.name == "w1":
            small = CONSTANTS["w1"] / 1000
            tensor.raw_data = small.tobytes()
    model, _ = check(proto, EqualizeLayers(calibration=Calibration("", 1, ranges)), fired=fired, nmse=EXACT)
    assert [node.op_type for node in model.graph][1] == ("Relu" if fired else "Clip")


def test_what_is_between_gets_another_name() -> None:
    model, _ = check(graph(PAIRS["biases"]), EqualizeLayers(), fired=1, nmse=EXACT)
    assert [node.outputs[0].name for node in model.graph] == ["a_equalized", "r_equalized", "y"]


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_overflow_is_declined() -> None:
    tiny = (CONSTANTS["m1"] * 0).astype(np.float16)
    tiny[0] = 1e-7
    text = """agraph (float16[N, 9] x, float16[9, 6] m1, float16[6] mb, float16[6, 5] m2)
        => (float16[N, 5] y) { a = Gemm (x, m1, mb)  r = Relu (a)  y = MatMul (r, m2) }"""
    bias = np.full(6, 60000, np.float16)
    second = np.full((6, 5), 1e3, np.float16)
    _, outcome = check(parse(text, m1=tiny, mb=bias, m2=second), EqualizeLayers(), fired=0, seeds=1)
    assert any("range of FLOAT16" in each.reason for each in outcome.declined)


def test_inside_a_branch() -> None:
    text = """agraph (float[N, 4, 8, 9] x, bool b, float[6, 4, 3, 3] w1, float[5, 6, 3, 3] w2, float[5, 4, 5, 5] w3)
        => (float[N, C, H, W] y) {
        y = If (b) <
            then_branch = t () => (float[N, C, H, W] c) { a = Conv (x, w1)  c = Conv (a, w2) },
            else_branch = e () => (float[N, C, H, W] d) { d = Conv (x, w3) }>
    }"""
    constants = {"w1": CONSTANTS["w1"], "w2": CONSTANTS["w2"]}
    check(parse(text, w3=uneven(5, 4, 5, 5), **constants), EqualizeLayers(), fired=1, nmse=EXACT, seeds=4)
