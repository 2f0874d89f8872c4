"""quantize_int8 for ONNX Runtime: what becomes integer kernels, what stays float and why, and that it is right."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_support import parse, random_feeds, run_ort
from quant_support import in_kernels, min_max, op_counts, quantise, span

from passes._quant import Calibration
from passes.base import InvalidOption, PassFailed
from passes.quantize_int8 import QuantizeInt8, quantizable


def normal(*shape: int, seed: int = 3, scale: float = 0.3) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def graph(
    body: str, inputs: str = "float[N, 4, 8, 8] x", outputs: str = "float[N, 8, H, W] y", **constants: np.ndarray
):
    """A graph whose constants' types follow from their arrays."""
    kinds = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64"}
    declared = ", ".join(
        [inputs, *(f"{kinds[data.dtype]}{list(data.shape) or ''} {name}" for name, data in constants.items())]
    )
    opset = 20
    return parse(f"agraph ({declared}) => ({outputs}) {{ {body} }}", opset=opset, **constants)


def integers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


CONV = {"w": normal(8, 4, 3, 3), "b": normal(8, seed=5)}
CONV2 = {**CONV, "w2": normal(8, 8, 3, 3, seed=7), "b2": normal(8, seed=8)}
PAD = "<pads = [1, 1, 1, 1]>"


@pytest.mark.parametrize("level", ["EXTENDED", "ALL"])
@pytest.mark.parametrize("activation", ["", "Relu", "Clip"])
@pytest.mark.parametrize(
    ("spatial", "group", "bias", "attributes"),
    [
        (2, 1, True, ""),
        (2, 1, False, "pads = [1, 1, 1, 1], strides = [2, 2]"),
        (2, 2, True, 'auto_pad = "SAME_UPPER"'),
        (2, 4, True, "dilations = [2, 2]"),
        (1, 1, True, "pads = [1, 1]"),
        (1, 4, False, ""),
        (3, 1, True, ""),
    ],
)
def test_conv_becomes_one_kernel(
    spatial: int, group: int, bias: bool, attributes: str, activation: str, level: str
) -> None:
    shape = ", ".join(["N", "4"] + ["8"] * spatial)
    constants = {"w": normal(8, 4 // group, *[3] * spatial)}
    if bias:
        constants["b"] = normal(8, seed=5)
    if activation == "Clip":
        constants |= {"low": np.float32(0), "high": np.float32(0.5)}
        constants = {k: np.asarray(v) for k, v in constants.items()}
    body = f"c = Conv <group = {group}{', ' if attributes else ''}{attributes}> (x, w{', b' if bias else ''})\n"
    body += {"": "y = Identity (c)", "Relu": "y = Relu (c)", "Clip": "y = Clip (c, low, high)"}[activation]
    outputs = "float[" + ", ".join(["M", "8"] + ["ABC"[i] for i in range(spatial)]) + "] y"
    proto = graph(body, f"float[{shape}] x", outputs, **constants)
    after, outcome = quantise(proto)
    assert outcome.fired == 1
    assert op_counts(after)["Relu"] == op_counts(after)["Clip"] == 0
    kernels = in_kernels(after, level=level)
    assert kernels["QLinearConv"] == 1
    assert kernels["Conv"] == kernels["FusedConv"] == 0
    assert kernels["QuantizeLinear"] == kernels["DequantizeLinear"] == 1


BETWEEN = {
    "Add": ("m = Add (c, c2)", {}, "QLinearAdd"),
    "Add and Relu": ("s = Add (c, c2) m = Relu (s)", {}, "QLinearAdd"),
    "Add of one value twice": ("m = Add (c, c)", {}, "QLinearAdd"),
    "Add of a constant": ("m = Add (c, k)", {"k": np.full((1, 1, 1, 1), 0.7, np.float32)}, "QLinearAdd"),
    "Mul": ("m = Mul (c, c2)", {}, "QLinearMul"),
    "SiLU": ("g = Sigmoid (c) m = Mul (c, g)", {}, "QLinearMul"),
    "Sigmoid": ("m = Sigmoid (c)", {}, "QLinearSigmoid"),
    "LeakyRelu": ("m = LeakyRelu <alpha = 0.2> (c)", {}, "QLinearLeakyRelu"),
    "AveragePool": ("m = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (c)", {}, "QLinearAveragePool"),
    "GlobalAveragePool": ("m = GlobalAveragePool (c)", {}, "QLinearGlobalAveragePool"),
    "ReduceMean": ("m = ReduceMean (c, axes)", {"axes": integers(-1, 2)}, "QLinearGlobalAveragePool"),
    "MaxPool": ("m = MaxPool <kernel_shape = [2, 2]> (c)", {}, None),
    "Relu with another reader before it": ("r = Relu (c) m = Add (r, c)", {}, "Clip"),
    "Clip with another reader before it": (
        "r = Clip (c, lo, hi) m = Add (r, c)",
        {"lo": np.array(-3, np.float32), "hi": np.array(4, np.float32)},
        "Clip",
    ),
    "Concat of equals": ("m2 = Concat <axis = 1> (c, c2) m = Slice (m2, s0, s8, s1)", {}, "Concat"),
    "Concat that shares nothing": (
        "a = Add (c, c2) m2 = Concat <axis = 1> (c, a) m = Slice (m2, s0, s8, s1)",
        {},
        "QLinearConcat",
    ),
    "Reshape and Transpose": (
        "r1 = Reshape (c, five) t = Transpose <perm = [0, 2, 1, 3, 4]> (r1) m = Reshape (t, four)",
        {"five": integers(0, 2, 4, 8, 8), "four": integers(0, 8, 8, 8)},
        "Transpose",
    ),
    "Pad": ("m = Pad (c, pads)", {"pads": integers(0, 0, 1, 2, 0, 0, 3, 1)}, "Pad"),
    "Pad by reflection": ('m = Pad <mode = "reflect"> (c, pads)', {"pads": integers(0, 0, 1, 2, 0, 0, 3, 1)}, "Pad"),
    "Split": ("h1, h2 = Split <axis = 1, num_outputs = 2> (c) m = Concat <axis = 1> (h2, h1)", {}, "Split"),
    "Resize": (
        'm = Resize <mode = "nearest"> (c, , scales)',
        {"scales": np.array([1, 1, 2, 2], np.float32)},
        "Resize",
    ),
    "Squeeze and excite": (
        "p = GlobalAveragePool (c) e1 = Conv (p, w1, b) e2 = Relu (e1) e3 = Conv (e2, w1, b) "
        "g = Sigmoid (e3) m = Mul (c, g)",
        {"w1": normal(8, 8, 1, 1, seed=11)},
        "QLinearMul",
    ),
}


@pytest.mark.parametrize("case", list(BETWEEN))
def test_between_convolutions_everything_is_integers(case: str) -> None:
    """One Q at the input and one DQ at the output are all that is left, and no convolution is a float one."""
    body, constants, kernel = BETWEEN[case]
    if "Slice" in body:
        constants = {**constants, "s0": integers(0), "s8": integers(8), "s1": integers(1)}
    uses_second = "c2" in body
    proto = graph(
        f"c = Conv {PAD} (x, w, b)\n"
        + (f"c2 = Conv {PAD} (x, w3, b)\n" if uses_second else "")
        + f"{body}\ny = Conv {PAD} (m, w2, b2)",
        **CONV2,
        **({"w3": normal(8, 4, 3, 3, seed=21)} if uses_second else {}),
        **constants,
    )
    after, _ = quantise(proto, nmse=3e-3)
    kernels = in_kernels(after)
    assert kernels["QuantizeLinear"] == kernels["DequantizeLinear"] == 1, kernels
    assert kernels["QLinearConv"] == op_counts(proto)["Conv"]
    assert kernel is None or kernels[kernel], kernels


def test_an_activation_that_lets_little_through_keeps_its_own_scale() -> None:
    proto = graph(
        f"c = Conv {PAD} (x, w, b) r = Clip (c, lo, hi) m = Add (r, c) y = Conv {PAD} (m, w2, b2)",
        **CONV2,
        lo=np.array(-0.2, np.float32),
        hi=np.array(0.4, np.float32),
    )
    after, _ = quantise(proto)
    kernels = in_kernels(after)
    assert kernels["QLinearAdd"] == 1
    assert kernels["QuantizeLinear"] == 2


def test_mean_without_kept_axes_is_pooled_and_flattened() -> None:
    proto = graph(
        f"c = Conv {PAD} (x, w, b) m = ReduceMean <keepdims = 0> (c, axes) y = Gemm <transB = 1> (m, fc, fb)",
        outputs="float[N, 5] y",
        **CONV,
        axes=integers(2, 3),
        fc=normal(5, 8),
        fb=normal(5),
    )
    after, _ = quantise(proto)
    kernels = in_kernels(after)
    assert kernels["QLinearGlobalAveragePool"] == 1
    assert kernels["ReduceMean"] == 0
    assert kernels["QGemm"] == 1


@pytest.mark.parametrize(
    ("attributes", "weight", "bias"),
    [
        ("", (6, 5), (5,)),
        ("transB = 1", (5, 6), (5,)),
        ("transB = 1, alpha = 0.5, beta = 2.0", (5, 6), (1, 5)),
        ("alpha = -2.0", (6, 5), None),
        ("beta = 0.25", (6, 5), (1,)),
        ("beta = 0.25", (6, 5), ()),
    ],
)
def test_gemm_gives_exact_floats_at_the_end(
    attributes: str, weight: tuple[int, ...], bias: tuple[int, ...] | None
) -> None:
    """QGemm writes float where nobody reads integers: the logits are not rounded to 256 steps."""
    proto = graph(
        f"h = Gemm <transB = 1> (x, w, b) r = Relu (h) "
        f"y = Gemm {f'<{attributes}>' if attributes else ''} (r, v{', k' if bias is not None else ''})",
        "float[N, 4] x",
        "float[N, 5] y",
        w=normal(6, 4),
        b=normal(6),
        v=normal(*weight),
        **({} if bias is None else {"k": normal(*bias, seed=9) if bias else np.array(0.3, np.float32)}),
    )
    after, outcome = quantise(proto)
    assert outcome.fired == 2
    kernels = in_kernels(after)
    assert kernels["QGemm"] == 2
    assert kernels["DequantizeLinear"] == kernels["Relu"] == 0
    feeds = random_feeds(proto, 5, {"N": 64})
    assert len(np.unique(run_ort(after, feeds)[0])) > 256


def test_matmul_adds_its_bias_in_float() -> None:
    proto = graph(
        "m = MatMul (x, w) a = Add (m, b) r = Relu (a) n = MatMul (r, v) y = Add (n, k)",
        "float[B, 3, 4] x",
        "float[B, 3, 5] y",
        w=normal(4, 6),
        b=normal(6),
        v=normal(6, 5),
        k=normal(5),
    )
    after, outcome = quantise(proto)
    assert outcome.fired == 2
    kernels = in_kernels(after)
    assert kernels["MatMulIntegerToFloat"] == 2
    assert kernels["QLinearAdd"] == kernels["MatMul"] == 0


def test_outputs_of_the_graph_keep_names_wherever_they_come_from() -> None:
    """An absorbed activation, the value of a convolution, one that moves integers: each may be an output."""
    proto = graph(
        f"c = Conv {PAD} (x, w, b) d = Relu (c) p = MaxPool <kernel_shape = [2, 2]> (d) e = Conv {PAD} (p, w2, b2)",
        outputs="float[N, 8, H, W] d, float[N, 8, I, J] p, float[N, 8, K, L] e",
        **CONV2,
    )
    after, _ = quantise(proto)
    assert in_kernels(after)["QLinearConv"] == 2


def test_a_float_reader_of_an_integer_value_gets_what_it_stands_for() -> None:
    proto = graph(
        f"c = Conv {PAD} (x, w, b) d = Conv {PAD} (c, w2, b2) t = Tanh (c) y = Add (d, t)",
        **CONV2,
    )
    after, _ = quantise(proto)
    kernels = in_kernels(after)
    assert kernels["QLinearConv"] == 2
    assert kernels["Tanh"] == kernels["Add"] == 1


def test_readers_in_subgraphs_see_the_dequantised_value() -> None:
    proto = parse(
        """
        <ir_version: 8, opset_import: ["" : 20]>
        agraph (float[N, 4, 8, 8] x, bool[1] flag, float[8, 4, 3, 3] w, float[8, 8, 1, 1] w1) => (float[N, 8, 6, 6] y) {
            c = Conv (x, w)
            y = If (flag) <
                then_branch = yes () => (float[N, 8, 6, 6] t) { t = Relu (c) },
                else_branch = no () => (float[N, 8, 6, 6] e) { e = Conv (c, w1) }
            >
        }""",
        w=normal(8, 4, 3, 3),
        w1=normal(8, 8, 1, 1),
    )
    after, outcome = quantise(proto)
    assert outcome.fired == 1
    assert [d.reason for d in outcome.declined] == ["it is in a subgraph or a function, which calibration does not see"]
    assert in_kernels(after)["QLinearConv"] == 1


def test_a_shared_weight_is_stored_once() -> None:
    square = normal(4, 4, 3, 3)
    proto = graph(f"c = Conv {PAD} (x, w) y = Conv {PAD} (c, w)", outputs="float[N, 4, 8, 8] y", w=square)
    after, _ = quantise(proto)
    assert (
        sum(tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4 for tensor in after.graph.initializer)
        == 1
    )
    assert "w" not in {tensor.name for tensor in after.graph.initializer}
    assert in_kernels(after)["QLinearConv"] == 2


def test_a_weight_that_something_else_reads_stays_for_it() -> None:
    square = normal(8, 4, 3, 3)
    proto = graph("c = Conv (x, w) s = ReduceSum <keepdims = 0> (w) y = Mul (c, s)", w=square)
    after, _ = quantise(proto)
    kept = next(onnx.numpy_helper.to_array(t) for t in after.graph.initializer if t.name == "w")
    np.testing.assert_array_equal(kept, square)


def test_the_file_is_a_quarter() -> None:
    wide = {"w": normal(256, 256, 3, 3)}
    proto = graph("y = Conv (x, w)", "float[1, 256, 4, 4] x", "float[1, 256, 2, 2] y", **wide)
    after, _ = quantise(proto)
    assert after.ByteSize() < 0.26 * proto.ByteSize()


def test_zero_points_are_explicit_and_weights_symmetric() -> None:
    after, _ = quantise(graph(f"c = Conv {PAD} (x, w, b) y = Relu (c)", **CONV))
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    for node in after.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(node.input) == 3
            zero_point = arrays[node.input[2]]
            if node.input[0] in arrays:
                assert not zero_point.any()
            else:
                assert zero_point.dtype == np.uint8
    weight = next(a for a in arrays.values() if a.dtype == np.int8 and a.ndim == 4)
    # each output channel reaches the end of its range
    assert (np.abs(weight).max(axis=(1, 2, 3)) == 127).all()


@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("weights", ["balanced", "amax", "mse"])
def test_options(activations: str, granularity: str, weights: str) -> None:
    proto = graph(f"c = Conv {PAD} (x, w, b) d = Relu (c) y = Conv {PAD} (d, w2, b2)", **CONV2)
    after, _ = quantise(proto, activations=activations, granularity=granularity, weights=weights)
    arrays = [onnx.numpy_helper.to_array(t) for t in after.graph.initializer]
    scales = [a for a in arrays if a.dtype == np.float32 and a.ndim == 1]
    assert bool(scales) == (granularity == "channel")
    if activations == "uint8":
        assert in_kernels(after)["QLinearConv"] == 2


def test_a_channel_whose_bias_would_not_fit_gets_a_larger_scale() -> None:
    weight = normal(8, 4, 3, 3)
    weight[2] *= 1e-9
    weight[3] = 0
    bias = np.full(8, 5, np.float32)
    proto = graph("y = Conv (x, w, b)", w=weight, b=bias)
    after, _ = quantise(proto)
    got, want = (run_ort(p, random_feeds(p, 0))[0] for p in (after, proto))
    np.testing.assert_allclose(got[:, 2:4], want[:, 2:4], atol=0.05)
    assert in_kernels(after)["QLinearConv"] == 1


def test_values_that_are_always_zero() -> None:
    proto = graph("z = Mul (x, k) c = Conv (z, w, b) y = Relu (c)", **CONV, k=np.array(0, np.float32))
    after, _ = quantise(proto)
    assert in_kernels(after)["QLinearConv"] == 1


def test_a_relu_is_kept_where_integers_do_not_end_at_its_bound() -> None:
    """Clip to 1..6 is not what integers that must hold zero do."""
    proto = graph(
        f"c = Conv {PAD} (x, w, b) d = Clip (c, one, six) y = Conv {PAD} (d, w2, b2)",
        **CONV2,
        one=np.array(0.2, np.float32),
        six=np.array(6, np.float32),
    )
    after, _ = quantise(proto)
    assert op_counts(after)["Clip"] == 1
    assert in_kernels(after)["QLinearConv"] == 2


def test_ranges_beyond_an_absorbed_activation_are_cut() -> None:
    """A range from elsewhere, such as an imported cache, may be wider than a Relu lets through."""
    proto = graph(f"c = Conv {PAD} (x, w, b) y = Relu (c)", **CONV)
    calibration = min_max(proto, [random_feeds(proto, 0)])
    wide = Calibration("", 1, {**calibration.ranges, "y": span(-4.0, calibration.ranges["y"].high)})
    model = ir.from_proto(proto)
    QuantizeInt8(calibration=wide)(model)
    feeds = random_feeds(proto, 0)
    assert run_ort(ir.to_proto(model), feeds)[0].min() == 0


def test_branches_of_a_concat_that_relu_bounds_keep_their_scale() -> None:
    """At the scale of a branch that goes below zero, the integers of the other would not stop at zero."""
    proto = graph(
        f"a = Conv {PAD} (x, w, b) r = Relu (a) c = Conv {PAD} (x, w3, b) m = Concat <axis = 1> (r, c) "
        f"y = Conv {PAD} (m, w4)",
        **CONV,
        w3=normal(8, 4, 3, 3, seed=21),
        w4=normal(8, 16, 3, 3, seed=22),
    )
    after, _ = quantise(proto)
    kernels = in_kernels(after)
    assert kernels["QLinearConcat"] == 1
    assert kernels["QLinearConv"] == 3
    assert kernels["QuantizeLinear"] == 1


# --- where it must not fire


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (graph("y = Conv (x, k)", "float[N, 4, 8, 8] x, float[8, 4, 3, 3] k"), "weight is not constant"),
        (graph("y = Conv (x, w, k)", "float[N, 4, 8, 8] x, float[8] k", w=CONV["w"]), "bias is not constant"),
        (graph("y = ConvTranspose (x, w)", w=normal(4, 8, 3, 3)), "no integer kernel"),
        (graph("y = MatMul (x, x)", "float[2, 4, 4] x", "float[2, 4, 4] y"), "two computed values"),
        (graph("y = MatMul (w, x)", "float[4, 2] x", "float[3, 2] y", w=normal(3, 4)), "first input is constant"),
        (graph("y = MatMul (x, w)", "float[2, 4] x", "float[2] y", w=normal(4)), "weight is a vector"),
        (
            graph("y = Gemm <transA = 1> (x, w)", "float[4, 2] x", "float[2, 3] y", w=normal(4, 3)),
            "transA",
        ),
        (
            graph("y = Gemm (x, w, k)", "float[2, 4] x", "float[2, 3] y", w=normal(4, 3), k=normal(2, 3)),
            "row to row",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_declines_with_a_reason(proto: onnx.ModelProto, reason: str) -> None:
    after, outcome = quantise(proto, nmse=0)
    assert outcome.fired == 0
    assert any(reason in declined.reason for declined in outcome.declined), outcome.declined
    assert "QuantizeLinear" not in op_counts(after)


def test_float16_is_declined() -> None:
    proto = parse(
        "agraph (float16[N, 4, 8, 8] x, float16[8, 4, 3, 3] w) => (float16[N, 8, 6, 6] y) { y = Conv (x, w) }",
        w=normal(8, 4, 3, 3).astype(np.float16),
    )
    model = ir.from_proto(proto)
    outcome = QuantizeInt8(calibration=Calibration("", 1, {"x": span(-1, 1), "y": span(-1, 1)}))(model)
    assert not outcome.modified
    assert "float16" in outcome.declined[0].reason


def test_what_has_no_range_is_declined_by_name() -> None:
    proto = graph(f"c = Conv {PAD} (x, w, b) y = Conv {PAD} (c, w2, b2)", **CONV2)
    calibration = min_max(proto, [random_feeds(proto, 0)])
    partial = Calibration("", 1, {name: r for name, r in calibration.ranges.items() if name != "y"})
    outcome = QuantizeInt8(calibration=partial)(ir.from_proto(proto))
    assert outcome.fired == 1
    assert "no range for 'y'" in outcome.declined[0].reason


def test_what_is_quantised_already_is_not_quantised_again() -> None:
    proto = graph(f"c = Conv {PAD} (x, w, b) y = Conv {PAD} (c, w2, b2)", **CONV2)
    calibration = min_max(proto, [random_feeds(proto, 0)])
    model = ir.from_proto(proto)
    QuantizeInt8(calibration=calibration, exclude=tuple(quantizable(model, "ort-cpu")[:1]))(model)
    outcome = QuantizeInt8(calibration=calibration)(model)
    assert not outcome.modified
    assert "quantised already" in outcome.declined[0].reason
    assert quantizable(model, "ort-cpu") == ()


def test_excluded_nodes_stay_in_float() -> None:
    proto = graph(
        f"c = Conv {PAD} (x, w, b) d = Relu (c) e = Conv {PAD} (d, w2, b2) y = Conv {PAD} (e, w2, b2)", **CONV2
    )
    for node, name in zip(proto.graph.node, ("first", "act", "second", "third"), strict=True):
        node.name = name
    assert quantizable(ir.from_proto(proto), "ort-cpu") == ("first", "second", "third")
    after, outcome = quantise(proto, exclude=("second",))
    assert outcome.fired == 2
    assert [(d.node, d.reason) for d in outcome.declined] == [("second", "excluded")]
    kernels = in_kernels(after)
    assert kernels["QLinearConv"] == 2
    assert kernels["Conv"] + kernels["FusedConv"] == 1


@pytest.mark.parametrize("activation", ["", "Relu"])
def test_the_runtime_does_not_quantise_what_was_left_out(activation: str) -> None:
    """ONNX Runtime would quantise the weight of a float layer between DequantizeLinear and QuantizeLinear itself."""
    proto = graph(
        f"c = Conv {PAD} (x, w, b) t = ConvTranspose {PAD} (c, w2, b2) "
        f"r = {activation or 'Identity'} (t) y = Conv {PAD} (r, w2, b2)",
        **CONV2,
    )
    after, outcome = quantise(proto)
    assert outcome.fired == 2
    kernels = in_kernels(after, nmse=1e-6)
    assert kernels["QLinearConv"] == 2
    assert kernels["QuantizeLinear"] == 2


def test_quantizable_names_what_will_be() -> None:
    proto = graph(f"c = Conv {PAD} (x, w, b) s = Add (c, c) y = Conv {PAD} (s, w2, b2)", **CONV2)
    model = ir.from_proto(proto)
    names = quantizable(model, "ort-cpu")
    assert ir.to_proto(model).SerializeToString() == ir.to_proto(ir.from_proto(proto)).SerializeToString()
    _, outcome = quantise(proto)
    assert outcome.fired == len(names) == 3
    after, outcome = quantise(proto, exclude=names, nmse=0)
    assert outcome.fired == 0
    assert "QuantizeLinear" not in op_counts(after)


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"calibration": None}, "needs a calibration", "toolchain calibrate"),
        ({"exclude": ("frist",)}, "no node 'frist'", "did you mean first"),
    ],
)
def test_what_it_refuses(options: dict[str, object], message: str, hint: str) -> None:
    proto = graph("y = Conv (x, w)", w=CONV["w"])
    proto.graph.node[0].name = "first"
    made = {"calibration": Calibration("", 1, {}), **options}
    with pytest.raises(PassFailed, match=message) as caught:
        QuantizeInt8(**made)(ir.from_proto(proto))  # type: ignore[arg-type]
    assert hint in str(caught.value.__cause__.hint if caught.value.__cause__ else caught.value.hint)


def test_an_old_opset_is_refused_with_a_way_out() -> None:
    proto = parse(
        "agraph (float[N, 4, 8, 8] x, float[8, 4, 3, 3] w) => (float[N, 8, 6, 6] y) { y = Conv (x, w) }",
        opset=11,
        w=CONV["w"],
    )
    with pytest.raises(PassFailed, match="opset 11"):
        QuantizeInt8(calibration=Calibration("", 1, {}))(ir.from_proto(proto))


@pytest.mark.parametrize("option", ["dialect", "granularity", "weights", "activations"])
def test_options_that_are_not_there(option: str) -> None:
    with pytest.raises(InvalidOption, match=option):
        QuantizeInt8(**{option: "none of them"})  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="activations"):
        QuantizeInt8(dialect="tensorrt", activations="uint8")


def test_quantising_clones_again_and_again_shares_the_integers() -> None:
    """A search for the layers to leave out quantises the same weights many times."""
    proto = graph(f"c = Conv {PAD} (x, w, b) y = Conv {PAD} (c, w2, b2)", **CONV2)
    calibration = min_max(proto, [random_feeds(proto, 0)])
    model = ir.from_proto(proto)
    arrays = []
    for _ in range(2):
        copy = model.clone()
        QuantizeInt8(calibration=calibration, weights="mse")(copy)
        value = copy.graph.initializers["w_quantized"].const_value
        assert value is not None
        arrays.append(value.numpy())
    assert np.shares_memory(*arrays)
    assert "w" in model.graph.initializers


def test_more_outliers_than_a_range_can_hold() -> None:
    """A value beyond the calibrated range saturates; it does not wrap."""
    proto = graph("y = Conv (x, w, b)", **CONV)
    calibration = min_max(proto, [random_feeds(proto, 0)])
    model = ir.from_proto(proto)
    QuantizeInt8(calibration=calibration)(model)
    feeds = {"x": 100 * random_feeds(proto, 0)["x"]}
    got = run_ort(ir.to_proto(model), feeds)[0]
    limits = calibration.ranges["y"]
    assert got.min() >= limits.low - 0.1
    assert got.max() <= limits.high + 0.1


@pytest.mark.parametrize("shape", [(6, 1), (6, 6)])
def test_a_c_that_differs_from_row_to_row_is_no_bias(shape: tuple[int, int]) -> None:
    """As many rows as columns: the number of elements does not tell them apart."""
    proto = graph("y = Gemm (x, w, c)", "float[6, 4] x", "float[6, 6] y", w=normal(4, 6), c=normal(*shape, scale=2))
    _, outcome = quantise(proto)
    assert [d.reason for d in outcome.declined] == ["its C differs from row to row"]
