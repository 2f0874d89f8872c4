"""fuse_conv_bn: where it fires and is right, and where it must not fire."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_support import check, ops, parse, run_ort

from passes.fuse_conv_bn import FuseConvBn

F32 = 1e-12  # float32 rounds to 2^-24; its square is 3.6e-15, times what a few dozen sums add


def bn(channels: int, dtype: type = np.float32, seed: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "gamma": rng.uniform(-1.5, 1.5, channels).astype(dtype),
        "beta": rng.standard_normal(channels).astype(dtype),
        "mean": rng.standard_normal(channels).astype(dtype),
        "var": rng.uniform(0.2, 2.0, channels).astype(dtype),
    }


def normal(*shape: int, dtype: type = np.float32, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


PARAMETERS = "{t}[{c}] gamma, {t}[{c}] beta, {t}[{c}] mean, {t}[{c}] var"


def conv_bn(
    *,
    op: str = "Conv",
    group: int = 1,
    bias: bool = True,
    attributes: str = "",
    bn_attributes: str = "epsilon = 0.01",
    opset: int = 20,
    kind: str = "float",
    dtype: type = np.float32,
) -> onnx.ModelProto:
    weight = (6, 4 // group, 3, 3) if op == "Conv" else (4, 6 // group, 3, 3)
    constants = {"w": normal(*weight, dtype=dtype), **bn(6, dtype)}
    text = f"""
    agraph ({kind}[N, 4, 7, 7] x, {kind}[{", ".join(map(str, weight))}] w{f", {kind}[6] b" if bias else ""},
            {PARAMETERS.format(t=kind, c=6)}) => ({kind}[N, 6, H, W] y) {{
        c = {op} <group = {group}{attributes}> (x, w{", b" if bias else ""})
        n = BatchNormalization <{bn_attributes}> (c, gamma, beta, mean, var)
        y = Relu (n)
    }}"""
    if bias:
        constants["b"] = normal(6, dtype=dtype, seed=5)
    return parse(text, opset=opset, **constants)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_bn_after_convolution(op: str, group: int, bias: bool) -> None:
    attributes = ", pads = [1, 0, 2, 1], strides = [2, 1], dilations = [1, 2]"
    proto = conv_bn(op=op, group=group, bias=bias, attributes=attributes)
    # onnx's evaluator gets ConvTranspose with groups wrong: ONNX Runtime judges
    model, _ = check(proto, FuseConvBn(), fired=1, nmse=F32, run=run_ort)
    assert ops(model) == [op, "Relu"]


def test_depthwise() -> None:
    text = f"""agraph (float[N, 6, 5, 5] x, float[6, 1, 3, 3] w, {PARAMETERS.format(t="float", c=6)})
        => (float[N, 6, 3, 3] y) {{
        c = Conv <group = 6> (x, w)
        y = BatchNormalization (c, gamma, beta, mean, var)
    }}"""
    model, _ = check(parse(text, w=normal(6, 1, 3, 3), **bn(6)), FuseConvBn(), fired=1, nmse=F32)
    assert ops(model) == ["Conv"]
    assert [v.name for v in model.graph.outputs] == ["y"]


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 14, 15, 18, 22, 24])
def test_every_opset(opset: int) -> None:
    # onnx's evaluator takes opsets 9 to 13 for training mode: ONNX Runtime judges
    check(conv_bn(opset=opset), FuseConvBn(), fired=1, nmse=F32, run=run_ort)


@pytest.mark.parametrize(
    ("kind", "dtype", "bound"),
    [("double", np.float64, 1e-28), ("float16", np.float16, 3e-6), ("bfloat16", ml_dtypes.bfloat16, 2e-4)],
)
def test_element_types(kind: str, dtype: type, bound: float) -> None:
    model, _ = check(conv_bn(opset=22, kind=kind, dtype=dtype), FuseConvBn(), fired=1, nmse=bound)
    weight = model.graph.node(0).inputs[1]
    assert weight is not None
    assert weight.dtype == ir.DataType.from_numpy(np.dtype(dtype))


def test_statistics_of_another_type() -> None:
    """From opset 15 on mean and variance may be float32 under a float16 tensor."""
    constants = bn(6)
    constants |= {name: constants[name].astype(np.float16) for name in ("gamma", "beta")}
    text = """agraph (float16[N, 4, 5, 5] x, float16[6, 4, 1, 1] w, float16[6] gamma, float16[6] beta,
                      float[6] mean, float[6] var) => (float16[N, 6, 5, 5] y) {
        c = Conv (x, w)
        y = BatchNormalization (c, gamma, beta, mean, var)
    }"""
    # onnx's evaluator returns float32 here, ONNX Runtime has no such kernel: compare with the algebra.
    weight = normal(6, 4, 1, 1, dtype=np.float16)
    model = ir.from_proto(parse(text, w=weight, **constants))
    assert FuseConvBn()(model).fired == 1
    scale = constants["gamma"].astype(float) / np.sqrt(constants["var"].astype(float) + 1e-5)
    fused = model.graph.node(0).inputs[1].const_value.numpy()
    assert fused.dtype == np.float16
    np.testing.assert_allclose(fused, weight * scale[:, None, None, None], rtol=2**-10)


@pytest.mark.parametrize(
    ("attributes", "weight", "c"),
    [
        ("", (5, 6), (6,)),
        ("alpha = 0.5, beta = 2.0", (5, 6), (1, 6)),
        ("transB = 1, beta = 0.25", (6, 5), (1,)),
        ("transA = 1, alpha = 3.0", (5, 6), ()),
        ("alpha = 2.0, transB = 1", (6, 5), None),
    ],
)
def test_bn_after_gemm(attributes: str, weight: tuple[int, ...], c: tuple[int, ...] | None) -> None:
    x = "5, 3" if "transA" in attributes else "3, 5"
    constants = {"w": normal(*weight), **bn(6)}
    declared = ""
    if c is not None:
        constants["c"] = normal(*c, seed=11)
        declared = f", float[{', '.join(map(str, c))}] c"
    text = f"""agraph (float[{x}] x, float[{weight[0]}, {weight[1]}] w{declared},
                       {PARAMETERS.format(t="float", c=6)}) => (float[3, 6] y) {{
        g = Gemm <{attributes}> (x, w{"" if c is None else ", c"})
        y = BatchNormalization (g, gamma, beta, mean, var)
    }}"""
    model, _ = check(parse(text.replace("Gemm <>", "Gemm"), **constants), FuseConvBn(), fired=1, nmse=F32)
    assert ops(model) == ["Gemm"]


def test_bn_after_matmul_becomes_gemm() -> None:
    text = f"""agraph (float[N, 5] x, float[5, 6] w, {PARAMETERS.format(t="float", c=6)}) => (float[N, 6] y) {{
        m = MatMul (x, w)
        y = BatchNormalization (m, gamma, beta, mean, var)
    }}"""
    proto = onnx.shape_inference.infer_shapes(parse(text, w=normal(5, 6), **bn(6)))
    model, _ = check(proto, FuseConvBn(), fired=1, nmse=F32)
    assert ops(model) == ["Gemm"]


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_bn_before_conv(group: int, bias: bool) -> None:
    text = f"""agraph (float[N, 4, 6, 6] x, float[6, {4 // group}, 3, 3] w, float[6] b,
                       {PARAMETERS.format(t="float", c=4)}) => (float[N, 6, H, W] y) {{
        n = BatchNormalization (x, gamma, beta, mean, var)
        y = Conv <group = {group}, strides = [2, 1], auto_pad = "VALID"> (n, w{", b" if bias else ""})
    }}"""
    proto = parse(text, w=normal(6, 4 // group, 3, 3), b=normal(6), **bn(4))
    model, _ = check(proto, FuseConvBn(), fired=1, nmse=F32)
    assert ops(model) == ["Conv"]


@pytest.mark.parametrize(
    "node", ["Gemm <alpha = 0.5, beta = 2.0> (n, w, b)", "Gemm <transB = 1> (n, wt)", "MatMul (n, w)"]
)
def test_bn_before_matrix_product(node: str) -> None:
    text = f"""agraph (float[N, 4] x, float[4, 6] w, float[6, 4] wt, float[6] b,
                       {PARAMETERS.format(t="float", c=4)}) => (float[N, 6] y) {{
        n = BatchNormalization (x, gamma, beta, mean, var)
        y = {node}
    }}"""
    proto = parse(text, w=normal(4, 6), wt=normal(6, 4), b=normal(6), **bn(4))
    model, _ = check(proto, FuseConvBn(), fired=1, nmse=F32)
    assert ops(model) == ["Gemm"]


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_bn_without_shift_before_padded_layer(op: str) -> None:
    text = f"""agraph (float[N, 4, 6, 6] x, float[4, 4, 3, 3] w, {PARAMETERS.format(t="float", c=4)})
        => (float[N, 4, H, W] y) {{
        n = BatchNormalization (x, gamma, beta, mean, var)
        y = {op} <pads = [1, 1, 1, 1]> (n, w)
    }}"""
    constants = bn(4) | {"beta": np.zeros(4, np.float32), "mean": np.zeros(4, np.float32)}
    model, _ = check(parse(text, w=normal(4, 4, 3, 3), **constants), FuseConvBn(), fired=1, nmse=F32)
    assert ops(model) == [op]


def test_shared_weights_are_not_overwritten() -> None:
    text = f"""agraph (float[N, 4, 5, 5] x, float[4, 4, 3, 3] w, {PARAMETERS.format(t="float", c=4)})
        => (float[N, 4, 5, 5] y, float[N, 4, 5, 5] z, float[N, 4, 5, 5] plain) {{
        a = Conv <pads = [1, 1, 1, 1]> (x, w)
        y = BatchNormalization (a, gamma, beta, mean, var)
        b = Conv <pads = [1, 1, 1, 1]> (x, w)
        z = BatchNormalization (b, beta, gamma, mean, var)
        plain = Conv <pads = [1, 1, 1, 1]> (x, w)
    }}"""
    model, _ = check(parse(text, w=normal(4, 4, 3, 3), **bn(4)), FuseConvBn(), fired=2, nmse=F32)
    assert {"y_weight", "y_bias", "z_weight", "z_bias", "w"} <= set(model.graph.initializers)


def test_new_names_are_free() -> None:
    """``y_weight`` is taken, by a value of a subgraph."""
    text = f"""agraph (float[N, 4, 5, 5] x, bool cond, float[4, 4, 1, 1] w, {PARAMETERS.format(t="float", c=4)})
        => (float[N, 4, 5, 5] y, float[M, 4, 5, 5] z) {{
        a = Conv (x, w)
        y = BatchNormalization (a, gamma, beta, mean, var)
        z = If (cond) <
            then_branch = t () => (float[M, 4, 5, 5] y_weight) {{ y_weight = Neg (x) }},
            else_branch = e () => (float[M, 4, 5, 5] y_bias) {{ y_bias = Abs (x) }}>
    }}"""
    model, _ = check(parse(text, w=normal(4, 4, 1, 1), **bn(4)), FuseConvBn(), fired=1, nmse=F32)
    assert "y_weight_1" in model.graph.initializers


def test_in_subgraph_with_captured_weights() -> None:
    text = f"""agraph (float[2, 4, 5, 5] x, bool cond, float[4, 4, 3, 3] w, {PARAMETERS.format(t="float", c=4)})
        => (float[2, 4, 3, 3] y) {{
        y = If (cond) <
            then_branch = t () => (float[2, 4, 3, 3] a) {{
                c = Conv (x, w)
                a = BatchNormalization (c, gamma, beta, mean, var) }},
            else_branch = e () => (float[2, 4, 3, 3] b) {{ b = Conv (x, w) }}>
    }}"""
    check(parse(text, w=normal(4, 4, 3, 3), **bn(4)), FuseConvBn(), fired=1, nmse=F32, seeds=4)


def test_in_function() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18, "local" : 1]>
    agraph (float[2, 2, 3, 3] x) => (float[2, 2, 3, 3] y) { y = local.block (x) }
    <domain: "local", opset_import: ["" : 18]>
    block (x) => (y) {
        w = Constant <value = float[2, 2, 1, 1] {1.0, -2.0, 0.5, 3.0}> ()
        one = Constant <value = float[2] {1.5, 0.5}> ()
        two = Constant <value = float[2] {2.0, 0.25}> ()
        c = Conv (x, w)
        y = BatchNormalization (c, one, two, one, two)
    }"""
    model, _ = check(parse(text), FuseConvBn(), fired=1, nmse=F32)
    (function,) = model.functions.values()
    assert [node.op_type for node in function][-1] == "Conv"


MUST_NOT_FIRE = {
    "training mode": "c = Conv (x, w)  y, m, v = BatchNormalization <training_mode = 1> (c, gamma, beta, mean, var)",
    "conv output is read twice": "c = Conv (x, w)  n = BatchNormalization (c, gamma, beta, mean, var)  y = Add (n, c)",
    "conv output is a graph output": "c = Conv (x, w)  y = BatchNormalization (c, gamma, beta, mean, var)",
    "something in between": "c = Conv (x, w)  r = Relu (c)  y = BatchNormalization (r, gamma, beta, mean, var)",
    "shift before padding": "n = BatchNormalization (x, gamma, beta, mean, var)  y = Conv <pads = [1, 1, 1, 1]> (n, w)",
    "shift before auto_pad": (
        'n = BatchNormalization (x, gamma, beta, mean, var)  y = Conv <auto_pad = "SAME_UPPER"> (n, w)'
    ),
    "shift before ConvTranspose": "n = BatchNormalization (x, gamma, beta, mean, var)  y = ConvTranspose (n, w)",
    "weight is computed": "v = Neg (dyn)  c = Conv (x, v)  y = BatchNormalization (c, gamma, beta, mean, var)",
    "bias is an input": "c = Conv (x, w, free)  y = BatchNormalization (c, gamma, beta, mean, var)",
    "mean is an input": "c = Conv (x, w)  y = BatchNormalization (c, gamma, beta, free, var)",
    "normalised weight": "q = BatchNormalization (w, gamma, beta, mean, var)  y = Conv (x, q)",
}


@pytest.mark.parametrize("body", MUST_NOT_FIRE.values(), ids=MUST_NOT_FIRE.keys())
def test_declines(body: str) -> None:
    extra = ", float[N, 4, H, W] c" if body is MUST_NOT_FIRE["conv output is a graph output"] else ""
    text = f"""agraph (float[N, 4, 5, 5] x, float[4, 4, 3, 3] w, float[4, 4, 3, 3] dyn, float[4] free,
                       {PARAMETERS.format(t="float", c=4)}) => (float[N, 4, H, W] y{extra}) {{
        {body}
    }}"""
    proto = parse(text, w=normal(4, 4, 3, 3), **bn(4))
    model, outcome = check(proto, FuseConvBn(), fired=0)
    assert "BatchNormalization" in ops(model)
    assert len(outcome.declined) == 1
    assert outcome.declined[0].reason


def test_declines_overridable_weight() -> None:
    proto = conv_bn()
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [6, 4, 3, 3]))
    _, outcome = check(proto, FuseConvBn(), fired=0)
    assert "not constant" in outcome.declined[0].reason


def test_declines_matmul_of_higher_rank() -> None:
    """BatchNormalization's channel is axis 1, MatMul's is the last: equal sizes must not confuse them."""
    text = f"""agraph (float[N, 4, 5] x, float[5, 4] w, {PARAMETERS.format(t="float", c=4)}) => (float[N, 4, 4] y) {{
        m = MatMul (x, w)
        y = BatchNormalization (m, gamma, beta, mean, var)
    }}"""
    proto = onnx.shape_inference.infer_shapes(parse(text, w=normal(5, 4), **bn(4)))
    check(proto, FuseConvBn(), fired=0)


def test_declines_gemm_whose_c_differs_by_row() -> None:
    text = f"""agraph (float[4, 5] x, float[5, 4] w, float[4, 1] c, {PARAMETERS.format(t="float", c=4)})
        => (float[4, 4] y) {{
        g = Gemm (x, w, c)
        y = BatchNormalization (g, gamma, beta, mean, var)
    }}"""
    check(parse(text, w=normal(5, 4), c=normal(4, 1), **bn(4)), FuseConvBn(), fired=0)


def test_declines_spatial_zero() -> None:
    """Opset 7: parameters for every element, here of such a shape that they could pass for channels."""
    proto = conv_bn(opset=7, bn_attributes="spatial = 0")
    model = ir.from_proto(proto)
    outcome = FuseConvBn()(model)
    assert not outcome.modified
    assert "spatial" in outcome.declined[0].reason


def test_declines_training_outputs_of_old_opsets() -> None:
    text = f"""agraph (float[N, 4, 5, 5] x, float[4, 4, 3, 3] w, {PARAMETERS.format(t="float", c=4)})
        => (float[N, 4, 3, 3] y) {{
        c = Conv (x, w)
        y, m, v, sm, sv = BatchNormalization (c, gamma, beta, mean, var)
    }}"""
    model = ir.from_proto(parse(text, opset=9, w=normal(4, 4, 3, 3), **bn(4)))
    assert FuseConvBn()(model).fired == 0


def test_declines_float16_overflow() -> None:
    constants = bn(6, np.float16) | {"var": np.full(6, 1e-7, np.float16), "gamma": np.full(6, 200, np.float16)}
    text = f"""agraph (float16[N, 4, 5, 5] x, float16[6, 4, 1, 1] w, {PARAMETERS.format(t="float16", c=6)})
        => (float16[N, 6, 5, 5] y) {{
        c = Conv (x, w)
        y = BatchNormalization (c, gamma, beta, mean, var)
    }}"""
    _, outcome = check(parse(text, w=normal(6, 4, 1, 1, dtype=np.float16), **constants), FuseConvBn(), fired=0, seeds=0)
    assert "range" in outcome.declined[0].reason


def test_before_can_be_switched_off() -> None:
    text = f"""agraph (float[N, 4] x, float[4, 6] w, {PARAMETERS.format(t="float", c=4)}) => (float[N, 6] y) {{
        n = BatchNormalization (x, gamma, beta, mean, var)
        y = Gemm (n, w)
    }}"""
    check(parse(text, w=normal(4, 6), **bn(4)), FuseConvBn(before=False), fired=0)
