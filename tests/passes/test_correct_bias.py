"""correct_bias: the mean of each channel comes back, in every form that a bias has, and it does not add up."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_support import parse, run_ort, to_bytes

from passes._quant import Calibration, TensorRange
from passes.base import InvalidOption, Outcome, PassFailed
from passes.correct_bias import ChannelMeans, CorrectBias, layer_inputs, quantised_layers
from passes.quantize_int8 import QuantizeInt8

RNG = np.random.default_rng(3)


def coarse(*shape: int) -> np.ndarray:
    """A weight with one large number, which leaves few integers for the others: rounding shifts a lot."""
    weight = RNG.uniform(0.0, 0.02, shape)
    weight.reshape(-1)[0] = 2.0
    return weight.astype(np.float32)


CONSTANTS = {
    "w": coarse(6, 4, 3, 3),
    "b": RNG.standard_normal(6).astype(np.float32),
    "grouped": coarse(6, 2, 3, 3),
    "t": coarse(4, 6, 3, 3),
    "m": coarse(8, 5),
    "mt": coarse(5, 8),
    "mb": RNG.standard_normal(5).astype(np.float32),
}
SPACE, FLAT = "N, 4, 9, 9", "N, 8"
LAYERS = {
    "conv": ("y = Conv (x, w, b)", SPACE, "ort-cpu"),
    "conv without bias": ("y = Conv (x, w)", SPACE, "ort-cpu"),
    "conv and relu": ("a = Conv (x, w, b)  y = Relu (a)", SPACE, "ort-cpu"),
    "grouped": ("y = Conv <group = 2> (x, grouped, b)", SPACE, "ort-cpu"),
    "conv, float bias": ("y = Conv (x, w, b)", SPACE, "tensorrt"),
    "conv without bias, float": ("y = Conv (x, w)", SPACE, "tensorrt"),
    "transposed": ("y = ConvTranspose (x, t, b)", SPACE, "tensorrt"),
    "gemm": ("y = Gemm (x, m, mb)", FLAT, "ort-cpu"),
    "gemm with factors": ("y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, mt, mb)", FLAT, "ort-cpu"),
    "gemm without bias": ("y = Gemm (x, m)", FLAT, "openvino"),
    "matrix": ("a = MatMul (x, m)  y = Add (a, mb)", FLAT, "ort-cpu"),
    "matrix, bias first": ("a = MatMul (x, m)  y = Add (mb, a)", FLAT, "tensorrt"),
}


def graph(body: str, x: str) -> onnx.ModelProto:
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {name: data for name, data in CONSTANTS.items() if name in words}
    declared = "".join(f", float{[*data.shape]} {name}" for name, data in used.items())
    out = ", ".join("N" if i == 0 else f"D{i}" for i in range(x.count(",") + 1))
    proto = parse(f"agraph (float[{x}] x{declared}) => (float[{out}] y) {{ {body} }}", **used)
    return onnx.shape_inference.infer_shapes(proto)


def samples(x: str) -> np.ndarray:
    """Activations with a mean of their own in each channel."""
    shape = (64, *(int(size) for size in x.split(",")[1:]))
    return (RNG.uniform(0, 1, shape) * RNG.uniform(0.5, 2, (1, shape[1], *[1] * (len(shape) - 2)))).astype(np.float32)


def quantised(proto: onnx.ModelProto, x: np.ndarray, dialect: str) -> tuple[ir.Model, ir.Model]:
    """The float graph and the quantised one, with extremes as ranges and one scale a weight."""
    reference = ir.from_proto(proto)
    watched = onnx.ModelProto.FromString(proto.SerializeToString())
    names = [node.output[0] for node in proto.graph.node]
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    found = dict(zip(["x", *names], [x, *run_ort(watched, {"x": x})], strict=True))
    ranges = {}
    for name, array in found.items():
        low, high = float(array.min()), float(array.max())
        ranges[name] = TensorRange(low, high, max(-low, high), low, high, "minmax")
    model = reference.clone()
    QuantizeInt8(dialect=dialect, calibration=Calibration("", len(x), ranges), granularity="tensor")(model)
    return reference, model


def means_of(x: np.ndarray) -> ChannelMeans:
    axes = tuple(i for i in range(x.ndim) if i != 1)
    return ChannelMeans({"x": x.mean(axis=axes, dtype=np.float64)})


def shift(proto: onnx.ModelProto, model: ir.Model, x: np.ndarray) -> np.ndarray:
    """How far the mean of each channel is off, away from borders, in units of the largest mean."""
    before, after = run_ort(proto, {"x": x})[0], run_ort(ir.to_proto(model), {"x": x})[0]
    if before.ndim == 4:
        before, after = before[:, :, 2:-2, 2:-2], after[:, :, 2:-2, 2:-2]
    axes = tuple(i for i in range(before.ndim) if i != 1)
    return np.abs((after - before).mean(axis=axes)) / np.abs(before).mean()


def correct(model: ir.Model, fired: int, **options: object) -> Outcome:
    """Runs the pass, and holds that the graph is valid and stays as it is the second time."""
    correction = CorrectBias(**options)  # type: ignore[arg-type]
    outcome = correction(model)
    assert outcome.fired == fired, outcome.declined
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    before = to_bytes(model)
    assert not correction(model).modified
    assert to_bytes(model) == before
    return outcome


@pytest.mark.parametrize(("body", "space", "dialect"), LAYERS.values(), ids=LAYERS.keys())
def test_the_mean_comes_back(body: str, space: str, dialect: str) -> None:
    proto, x = graph(body, space), samples(space)
    reference, model = quantised(proto, x, dialect)
    assert len(list(quantised_layers(reference, model))) == 1
    before = shift(proto, model, x)
    correct(model, 1, reference=reference, inputs=means_of(x), dialect=dialect)
    after = shift(proto, model, x)
    assert before.max() > 0.004, "the rounding shifts nothing, so the test shows nothing"
    assert after.max() < before.max() / 5, (before, after)


def test_integer_bias_keeps_its_form() -> None:
    """QLinearConv wants an int32 bias in the scale of the product."""
    proto, x = graph("y = Conv (x, w)", SPACE), samples(SPACE)
    reference, model = quantised(proto, x, "ort-cpu")
    correct(model, 1, reference=reference, inputs=means_of(x))
    conv = next(node for node in model.graph if node.op_type == "Conv")
    scales = []
    for value in conv.inputs:
        assert value is not None
        producer = value.producer()
        assert producer is not None
        assert producer.op_type == "DequantizeLinear"
        assert producer.inputs[1] is not None
        assert producer.inputs[1].const_value is not None
        scales.append(producer.inputs[1].const_value.numpy())
        bias = producer.inputs[0]
    assert bias is not None
    assert bias.dtype == ir.DataType.INT32
    np.testing.assert_array_equal(scales[2], scales[0] * scales[1])


def test_what_stays_in_float_is_left_alone() -> None:
    body = "a = Conv (x, w, b)  r = Relu (a)  [second] y = Conv (r, w66)"
    CONSTANTS["w66"] = coarse(6, 6, 1, 1)
    proto, x = graph(body, SPACE), samples(SPACE)
    reference, model = quantised(proto, x, "ort-cpu")
    means = ChannelMeans({**means_of(x).means, "r": np.ones(6)})
    correct(model, 2, reference=reference, inputs=means)
    again = reference.clone()
    ranges = {name: TensorRange(0.0, 2.0, 2.0, 0.0, 2.0, "minmax") for name in ("x", "a", "r", "y")}
    QuantizeInt8(calibration=Calibration("", 1, ranges), exclude=("second",))(again)
    correct(again, 1, reference=reference, inputs=means)


def test_declined() -> None:
    proto, x = graph("a = MatMul (x, m)  y = Relu (a)", FLAT), samples(FLAT)
    reference, model = quantised(proto, x, "tensorrt")
    outcome = correct(model, 0, reference=reference, inputs=means_of(x), dialect="tensorrt")
    assert "MatMul has no bias" in outcome.declined[0].reason
    outcome = correct(model, 0, reference=reference, inputs=ChannelMeans({}), dialect="tensorrt")
    assert "no mean" in outcome.declined[0].reason
    outcome = correct(model, 0, reference=reference, inputs=ChannelMeans({"x": np.ones(3)}), dialect="tensorrt")
    assert "8 channels" in outcome.declined[0].reason


def test_a_float_graph_has_nothing_to_correct() -> None:
    proto, x = graph("y = Conv (x, w, b)", SPACE), samples(SPACE)
    correct(ir.from_proto(proto), 0, reference=ir.from_proto(proto), inputs=means_of(x))


def test_layer_inputs() -> None:
    model = ir.from_proto(graph("a = Conv (x, w)  r = Relu (a)  y = MatMul (r, wide)", SPACE.replace("9", "7")))
    assert layer_inputs(model) == {"x": 1, "r": -1}


CONSTANTS["wide"] = coarse(5, 3)


def test_options() -> None:
    with pytest.raises(InvalidOption, match="dialect"):
        CorrectBias(dialect="onnx")
    with pytest.raises(PassFailed, match="float graph"):
        CorrectBias()(ir.from_proto(graph("y = Conv (x, w)", SPACE)))
