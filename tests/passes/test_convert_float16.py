"""convert_float16: what becomes 16 bits wide, where the casts are, what is kept and said, and what it computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_support import assert_close, ops, parse, random_feeds, run_ort, signature, to_bytes

from passes.base import InvalidOption, Outcome, PassFailed
from passes.convert_float16 import ConvertFloat16

RNG = np.random.default_rng(2)
W = RNG.standard_normal((8, 6)).astype(np.float32)
V = RNG.standard_normal((6, 5)).astype(np.float32)
#: normalised squared error of results that are rounded a few times to 11 bits, and to 8
ROUNDED = {"float16": 1e-5, "bfloat16": 1e-3}


def convert(proto: onnx.ModelProto, fired: int, **options: object) -> tuple[ir.Model, Outcome]:
    """Converts, and holds that the graph is valid, has its signature, and stays as it is the second time."""
    onnx.checker.check_model(proto, full_check=True)
    model = ir.from_proto(proto)
    convert16 = ConvertFloat16(**options)  # type: ignore[arg-type]
    outcome = convert16(model)
    assert outcome.fired == fired, outcome.declined
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    if options.get("keep_io", True):
        assert signature(after) == signature(proto)
    before = to_bytes(model)
    assert not convert16(model).modified
    assert to_bytes(model) == before
    return model, outcome


def kinds(model: ir.Model) -> dict[str | None, str]:
    return {v.name: v.dtype.name for node in model.graph for v in node.outputs if v.dtype is not None}


MLP = """agraph (float[N, 8] x, float[8, 6] w, float[6, 5] v) => (float[N, 5] y) {
    a = MatMul (x, w)  r = Relu (a)  y = MatMul (r, v) }"""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_casts_only_at_the_ends(dtype: str) -> None:
    proto = parse(MLP, w=W, v=V)
    model, _ = convert(proto, 3, dtype=dtype)
    assert ops(model) == ["Cast", "MatMul", "Relu", "MatMul", "Cast"]
    assert {kinds(model)[name] for name in ("x_" + dtype, "a", "r", "y_" + dtype)} == {dtype.upper()}
    assert sorted(model.graph.initializers) == [f"v_{dtype}", f"w_{dtype}"]
    feeds = random_feeds(proto, 0)
    if dtype == "float16":
        assert_close(run_ort(proto, feeds), run_ort(ir.to_proto(model), feeds), ROUNDED[dtype])


def test_inputs_and_outputs_too() -> None:
    model, _ = convert(parse(MLP, w=W, v=V), 4, keep_io=False)
    assert ops(model) == ["MatMul", "Relu", "MatMul"]
    assert [v.dtype for v in (*model.graph.inputs, *model.graph.outputs)] == [ir.DataType.FLOAT16] * 2


def test_kept_ops_and_nodes_get_casts_around_them() -> None:
    text = """agraph (float[N, 8] x, float[8, 6] w, float[6, 5] v) => (float[N, 5] y) {
        a = MatMul (x, w)  e = Exp (a)  s = Sqrt (e)  [last] y = MatMul (s, v) }"""
    proto = parse(text, w=W * 0.1, v=V)
    model, _ = convert(proto, 3)
    assert ops(model) == ["Cast", "MatMul", "Cast", "Exp", "Cast", "Sqrt", "MatMul", "Cast"]
    model, _ = convert(proto, 3, keep_ops=(), keep=("last",))
    assert ops(model) == ["Cast", "MatMul", "Exp", "Sqrt", "Cast", "MatMul"]
    assert kinds(model)["y"] == "FLOAT"


def test_one_cast_for_all_readers() -> None:
    text = """agraph (float[N, 8] x, float[8, 6] w) => (float[N, 6] y, float[N, 8] z, float[N, 6] a) {
        a = MatMul (x, w)  b = Relu (a)  e = Exp (b)  f = Pow (b, e)  y = Add (f, b)  z = Relu (x) }"""
    proto = parse(text, w=W * 0.1)
    model, _ = convert(proto, 4)
    assert ops(model).count("Cast") == 7 - 1  # x, b, f down; a, y, z up; e is read in float32 alone
    feeds = random_feeds(proto, 0)
    assert_close(run_ort(proto, feeds), run_ort(ir.to_proto(model), feeds), 1e-5)


TOO_LARGE = np.full((8, 6), 7e4, np.float32)
TOO_SMALL = np.full((8, 6), 1e-9, np.float32)


@pytest.mark.parametrize(("weight", "said"), [(TOO_LARGE, "7e+04, beyond the 65504"), (TOO_SMALL, "down to 1e-09")])
def test_constants_that_do_not_fit_are_named(weight: np.ndarray, said: str) -> None:
    model, outcome = convert(parse(MLP, w=weight, v=V), 2)
    assert len(outcome.declined) == 1
    assert "'w'" in outcome.declined[0].reason
    assert said in outcome.declined[0].reason
    assert kinds(model)["a"] == "FLOAT"
    convert(parse(MLP, w=weight, v=V), 3, dtype="bfloat16")


def test_infinity_of_masks() -> None:
    text = """agraph (float[N, 6] x, bool[N, 6] m, float lowest, float inf) => (float[N, 6] y) {
        a = Where (m, x, lowest)  b = Where (m, a, inf)  y = Softmax (b) }"""
    lowest, inf = np.array(np.finfo(np.float32).min), np.array(-np.inf, np.float32)
    model, _ = convert(parse(text, lowest=lowest, inf=inf), 3)
    held = {v.const_value.numpy().item() for v in model.graph.initializers.values() if v.const_value is not None}
    assert held == {-65504.0, -np.inf}


def test_what_only_looks_takes_what_is_there() -> None:
    text = """agraph (float[N, 8] x, float[8, 6] w) => (int64[2] s, int64[2] t, bool[N, 6] g) {
        a = MatMul (x, w)  s = Shape (a)  t = Shape (x)  z = Relu (a)  g = Greater (z, a) }"""
    model, _ = convert(parse(text, w=W), 4)
    assert ops(model) == ["Cast", "MatMul", "Shape", "Shape", "Relu", "Greater"]
    assert [str(node.inputs[0].name) for node in model.graph if node.op_type == "Shape"] == ["a", "x"]


def test_casts_of_integers() -> None:
    text = """agraph (int64[N] i, float[N] x) => (float[N] y, float[N] z) {
        a = Cast <to = 1> (i)  b = Add (a, x)  y = Relu (b)  c = Cast <to = 1> (i)  d = Mul (c, x)  z = Exp (c) }"""
    model, _ = convert(parse(text), 4)
    assert kinds(model)["a"] == "FLOAT16"
    assert kinds(model)["c"] == "FLOAT"  # Exp wants it whole


def test_types_of_their_own() -> None:
    """The mean of LayerNormalization and the scales of Resize stay float32."""
    text = """agraph (float[1, 3, 4, 4] x, float[4] scales, float s, uint8 z, float[3, 8, 8] scale)
        => (float[1, 3, 8, 8] y, float[1, 1, 1, 1] m) {
        r = Resize (x, , scales)  q = QuantizeLinear (r, s, z)  d = DequantizeLinear (q, s, z)
        n, m = LayerNormalization <axis = 1> (d, scale)  y = Relu (n) }"""
    proto = parse(
        text,
        scales=np.array([1, 1, 2, 2], np.float32),
        s=np.array(0.1, np.float32),
        z=np.array(128, np.uint8),
        scale=np.ones((3, 8, 8), np.float32),
    )
    model, _ = convert(proto, 5)
    types = kinds(model)
    assert types["r"] == types["n"] == types["d"] == "FLOAT16"
    assert types["m"] == "FLOAT"
    resize = next(node for node in model.graph if node.op_type == "Resize")
    assert resize.inputs[2] is not None
    assert resize.inputs[2].dtype == ir.DataType.FLOAT


QDQ = """agraph (float[N, 8] x, int8[8, 6] w, float[6] scale, int8[6] zero, float s, int8 z) => (float[N, 6] y) {
    r = Relu (x)  q = QuantizeLinear (r, s, z)  d = DequantizeLinear (q, s, z)
    v = DequantizeLinear <axis = 1> (w, scale, zero)  y = MatMul (d, v) }"""


def quantised(scale: np.ndarray, *, opset: int = 21) -> onnx.ModelProto:
    integers = np.resize(np.arange(-127, 128, 5, dtype=np.int8), (8, 6))
    zeros = {"zero": np.zeros(6, np.int8), "z": np.array(0, np.int8)}
    step = np.array(0.02, np.float32)
    return parse(QDQ, opset=opset, w=integers, scale=scale.astype(np.float32), s=step, **zeros)


@pytest.mark.parametrize("opset", [19, 21, 23])
def test_quantised_layers_compute_in_16_bits_with_no_cast_before_them(opset: int) -> None:
    proto = quantised(np.linspace(0.01, 0.03, 6), opset=opset)
    model, _ = convert(proto, 5)
    assert ops(model) == ["Cast", "Relu", "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Cast"]
    assert {kinds(model)[name] for name in ("d", "v")} == {"FLOAT16"}
    feeds = random_feeds(proto, 0)
    assert_close(run_ort(proto, feeds), run_ort(ir.to_proto(model), feeds), 1e-4)  # an input rounds to another step


def test_scales_that_vanish_in_16_bits_are_made_larger_and_their_integers_smaller() -> None:
    proto = quantised(np.array([0.01, 1e-9, 1.3e-7, 2e-6, 0.02, 0.03]))
    model, _ = convert(proto, 6)
    (weight,) = (node for node in model.graph if node.outputs[0].name == "v")
    integers, scale = (value.const_value.numpy() for value in weight.inputs[:2])  # type: ignore[union-attr]
    assert scale.dtype == np.float16
    assert (scale > 0).all()
    old = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    exact = old["w"].astype(np.float64) * old["scale"]
    half_a_step = 1.01e-6
    np.testing.assert_allclose(integers * scale.astype(np.float64), exact, rtol=2**-10, atol=half_a_step)
    np.testing.assert_array_equal(integers[:, [0, 4, 5]], old["w"][:, [0, 4, 5]])


def test_q_dq_of_old_opsets_keep_float32_scales() -> None:
    model, _ = convert(quantised(np.array([1e-9, *[0.01] * 5]), opset=13), 2)
    assert ops(model).count("Cast") == 5
    assert all(node.inputs[1].dtype == ir.DataType.FLOAT for node in model.graph if "Quantize" in node.op_type)


def test_subgraphs_read_float32() -> None:
    text = """agraph (float[N, 8] x, bool b, float[8, 6] w) => (float[N, 6] y) {
        a = MatMul (x, w)
        c = If (b) <
            then_branch = t () => (float[N, 6] d) { d = Exp (a) },
            else_branch = e () => (float[N, 6] f) { f = Neg (a) }>
        y = Relu (c) }"""
    proto = parse(text, w=W * 0.1)
    model, _ = convert(proto, 2)
    for seed in range(3):
        feeds = {name: np.asarray(array) for name, array in random_feeds(proto, seed).items()}
        assert_close(run_ort(proto, feeds), run_ort(ir.to_proto(model), feeds), 1e-5)


def test_shared_constants_are_converted_once_and_kept_for_the_rest() -> None:
    text = """agraph (float[N, 6] x, float[6] c) => (float[N, 6] y) {
        a = Add (x, c)  b = Mul (a, c)  d = Pow (b, c)  y = Sub (d, c) }"""
    model, _ = convert(parse(text, c=np.full(6, 2, np.float32)), 3)
    assert sorted(model.graph.initializers) == ["c", "c_float16"]


def test_unknown_node_and_type() -> None:
    with pytest.raises(PassFailed, match="lasst") as caught:
        ConvertFloat16(keep=("lasst",))(ir.from_proto(parse(MLP.replace("y =", "[last] y ="), w=W, v=V)))
    assert "last" in str(caught.value.hint)
    with pytest.raises(InvalidOption, match="float8"):
        ConvertFloat16(dtype="float8")
