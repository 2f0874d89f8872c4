"""quantize_int8 where it counts: placement for TensorRT, engines built without a GPU, OpenVINO, real weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from pass_support import random_feeds, run_ort
from quant_support import in_kernels, min_max, op_counts, optimised_ops, quantise
from test_quantize_int8 import CONV2, PAD, graph, normal

from passes import DEFAULT_PIPELINE, make
from passes.quantize_int8 import QuantizeInt8, quantizable
from toolchain.opset import at_least

RESIDUAL = graph(
    f"""
    a0 = Conv {PAD} (x, w, b)      a = Relu (a0)
    c0 = Conv {PAD} (a, w2, b2)    c = Relu (c0)
    d = Conv {PAD} (c, w2, b2)     s = Add (d, a)     r = Relu (s)
    p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
    e = Conv {PAD} (p, w2, b2)     f = Conv {PAD} (p, w5)     t = Add (e, f)     u = Relu (t)
    g = Conv {PAD} (u, w2)
    k = Concat <axis = 1> (u, g)
    h = Conv {PAD} (k, w4)
    v = GlobalAveragePool (h)
    l = Flatten (v)
    y = Gemm <transB = 1> (l, fc, fb)
    """,
    outputs="float[N, 5] y",
    **CONV2,
    w4=normal(8, 16, 3, 3, seed=31),
    w5=normal(8, 8, 3, 3, seed=32),
    fc=normal(5, 8),
    fb=normal(5),
)


def producers(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in proto.graph.node for output in node.output}


def arrays(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def test_tensorrt_reads_integers_and_writes_float() -> None:
    after, outcome = quantise(RESIDUAL, dialect="tensorrt", nmse=6e-3)
    made, constants = producers(after), arrays(after)
    for node in after.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert made[node.input[0]].op_type == made[node.input[1]].op_type == "DequantizeLinear"
            assert node.input[0].endswith("_dequantized")
            if len(node.input) == 3:
                assert constants[node.input[2]].dtype == np.float32
            weight = made[node.input[1]]
            assert constants[weight.input[0]].dtype == np.int8
            assert constants[weight.input[1]].shape == (constants[weight.input[0]].shape[0],)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not constants[node.input[2]].any()
            assert constants[node.input[2]].dtype == np.int8
            assert (constants[node.input[1]] > 0).all()
    # the branch straight from a convolution stays inside of its kernel, the other one is quantised
    first, second = (node for node in after.graph.node if node.op_type == "Add")
    assert made[first.input[0]].op_type == "Conv"
    assert made[first.input[1]].op_type == "DequantizeLinear"
    assert sorted(made[name].op_type for name in second.input) == ["Conv", "DequantizeLinear"]
    assert made[second.input[1]].op_type == "Conv", "the later convolution takes the other's result in"
    pool = next(node for node in after.graph.node if node.op_type == "GlobalAveragePool")
    assert made[pool.input[0]].op_type == "DequantizeLinear"
    # nothing is quantised at the end, and the pair through MaxPool has one scale
    assert "y_scale" not in constants
    assert not any(node.op_type == "Relu" and "dequant" in node.input[0] for node in after.graph.node)
    concat = next(node for node in after.graph.node if node.op_type == "Concat")
    scales = {made[name].input[1] for name in concat.input}
    assert len(scales) == 1
    reader = next(node for node in after.graph.node if node.op_type == "Conv" and "k_de" in node.input[0])
    assert {made[reader.input[0]].input[1]} == scales
    assert outcome.fired == len(quantizable(ir.from_proto(RESIDUAL), "tensorrt"))


@pytest.mark.parametrize(
    ("group", "outputs", "axis"),
    [(1, 8, 1), (2, 4, 1), (4, 1, 0), (2, 1, 0)],
    ids=["one group", "channels in groups", "depthwise", "groups of one channel"],
)
@pytest.mark.parametrize("dialect", ["tensorrt", "openvino"])
def test_conv_transpose(dialect: str, group: int, outputs: int, axis: int) -> None:
    """A scale for each output channel, as far as one axis of the weight tells them apart."""
    size = np.logspace(-2, 0, group * outputs, dtype=np.float32).reshape(group, 1, outputs, 1, 1)
    weight = (normal(4, outputs, 3, 3).reshape(group, -1, outputs, 3, 3) * size).reshape(4, outputs, 3, 3)
    bias = normal(group * outputs, scale=0.01)
    kind = f"float[N, {group * outputs}, H, W] y"
    proto = graph(f"y = ConvTranspose <group = {group}> (x, w, b)", outputs=kind, w=weight, b=bias)
    after, outcome = quantise(proto, dialect=dialect)
    assert outcome.fired == 1
    made, constants = producers(after), arrays(after)
    node = next(node for node in after.graph.node if node.op_type == "ConvTranspose")
    source = made[node.input[1]]
    integers, scale = constants[source.input[0]], constants[source.input[1]]
    assert (source.attribute[0].i, scale.shape) == (axis, (weight.shape[axis],))
    # the largest weight under each scale is 127 of it, and those that one output channel sums have one scale
    largest = np.abs(weight).max(axis=tuple(i for i in range(4) if i != axis))
    largest = np.repeat(largest.reshape(group, -1).max(axis=1), 4 // group) if axis == 0 else largest
    assert np.allclose(scale * 127, largest, rtol=1e-6)
    back = integers * scale.reshape([-1 if i == axis else 1 for i in range(4)])
    assert (np.abs(back - weight) <= scale.max() * 1.01).all()
    if axis == 0 and dialect == "openvino":
        stored = made[node.input[2]]
        step = constants[stored.input[1]]
        assert step.shape == (group,)
        assert (np.abs(constants[stored.input[0]] * step - bias) <= 0.501 * step).all()
    # in each channel by itself: one scale for all would drown the small ones
    feeds = random_feeds(proto, 0)
    expected, got = run_ort(proto, feeds)[0], run_ort(after, feeds)[0]
    error = np.square(got - expected).sum(axis=(0, 2, 3)) / np.square(expected).sum(axis=(0, 2, 3))
    assert error.max() < (2e-3 if group == 1 or axis == 0 else 5e-2)


def test_conv_transpose_with_a_bias_that_would_not_fit() -> None:
    """Where the scale of a channel has to grow, that of its own inputs does, and no other."""
    weight = normal(4, 1, 3, 3)
    weight[:2] *= 1e-9
    bias = np.array([5.0, 0.1], np.float32)
    proto = graph("y = ConvTranspose <group = 2> (x, w, b)", outputs="float[N, 2, H, W] y", w=weight, b=bias)
    after, _ = quantise(proto, dialect="openvino")
    constants, made = arrays(after), producers(after)
    node = next(node for node in after.graph.node if node.op_type == "ConvTranspose")
    scale = constants[made[node.input[1]].input[1]]
    assert scale[0] == scale[1] > 1e-9
    assert np.allclose(scale[2:] * 127, np.abs(weight[2:]).max())
    assert np.abs(constants[made[node.input[2]].input[0]]).max() <= 2**30


def test_tensorrt_quantises_both_sides_of_a_product() -> None:
    proto = graph(
        "q = MatMul (x, w) k = MatMul (x, v) t = Transpose <perm = [0, 2, 1]> (k) y = MatMul (q, t)",
        "float[B, 3, 4] x",
        "float[B, 3, 3] y",
        w=normal(4, 6),
        v=normal(4, 6, seed=9),
    )
    after, outcome = quantise(proto, dialect="tensorrt")
    assert outcome.fired == 3
    made = producers(after)
    for node in after.graph.node:
        if node.op_type == "MatMul":
            assert all(made[name].op_type == "DequantizeLinear" for name in node.input)


# --- engines, where TensorRT-RTX is installed: it builds without a GPU


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")


def parsed(trt: Any, proto: onnx.ModelProto) -> tuple[Any, Any]:
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse(proto.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    return builder, network


def engine_size(trt: Any, proto: onnx.ModelProto, architecture: str) -> int:
    builder, network = parsed(trt, proto)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, architecture), 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        least, most = ([size if size > 0 else unknown for size in value.shape] for unknown in (1, 4))
        profile.set_shape(value.name, least, least, most)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return int(engine.nbytes)


@pytest.mark.parametrize("architecture", ["SM86", "SM89"])
@pytest.mark.parametrize(
    "proto",
    [
        RESIDUAL,
        graph("c = ConvTranspose <group = 2> (x, w) y = Relu (c)", w=normal(4, 4, 3, 3)),
        graph("y = MatMul (x, w)", "float[B, 3, 4] x", "float[B, 3, 5] y", w=normal(4, 5)),
        graph(
            "c = Conv <group = 4, pads = [1, 1, 1, 1]> (x, w) y = Clip (c, lo, hi)",
            w=normal(8, 1, 3, 3),
            lo=np.array(0, np.float32),
            hi=np.array(6, np.float32),
        ),
    ],
    ids=["residual", "transposed", "product", "depthwise"],
)
def test_tensorrt_builds_what_is_made_for_it(trt: Any, proto: onnx.ModelProto, architecture: str) -> None:
    after, _ = quantise(proto, dialect="tensorrt", nmse=6e-3)
    _, network = parsed(trt, after)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    made = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    convolutions = [x for x in layers if x.type in (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION)]
    assert len(convolutions) == op_counts(proto)["Conv"] + op_counts(proto)["ConvTranspose"]
    for layer in convolutions:
        for index in (0, 1):
            assert made[layer.get_input(index).name].type == trt.LayerType.DEQUANTIZE
    assert engine_size(trt, after, architecture) > 0


def test_a_tensorrt_engine_of_integers_is_small(trt: Any) -> None:
    """Where weights, and not the code of kernels, are what it is made of."""
    body = "".join(f"c{i} = Conv {PAD} (r{i}, w{i}) r{i + 1} = Relu (c{i})\n" for i in range(4))
    proto = graph(
        f"r0 = Identity (x)\n{body} y = Identity (r4)",
        "float[N, 256, 8, 8] x",
        "float[N, 256, 8, 8] y",
        **{f"w{i}": normal(256, 256, 3, 3, seed=i, scale=0.03) for i in range(4)},
    )
    after, _ = quantise(proto, dialect="tensorrt", nmse=5e-3)
    assert engine_size(trt, after, "SM89") < 0.4 * engine_size(trt, proto, "SM89")


def test_openvino_runs_its_dialect_in_integers() -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    after, _ = quantise(RESIDUAL, dialect="openvino", nmse=6e-3)
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(after.SerializeToString()), "CPU")
    types = [
        op.get_rt_info()["runtimePrecision"].astype(str)
        for op in compiled.get_runtime_model().get_ops()
        if op.get_rt_info()["layerType"].astype(str) == "Convolution"
    ]
    assert types
    assert set(types) <= {"u8", "i8"}
    feeds = random_feeds(RESIDUAL, 0)
    expected, got = run_ort(after, feeds)[0], compiled(feeds)[0]
    assert np.square(got - expected).sum() < 6e-3 * np.square(expected).sum()


# --- real weights


def cifar(assets: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, normalised, float32 [N, 3, 32, 32], and labels."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    folder = assets / "cifar10"
    rows, labels = [], []
    for path in sorted(folder.glob(f"{split}*.png")):
        rows.append(np.asarray(image.open(path).convert("RGB")).reshape(-1, 32, 32, 3))
    for path in sorted(folder.glob(f"{split}*labels.json")):
        labels += json.loads(path.read_text())
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    scaled = (np.concatenate(rows) / 255 - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), dtype=np.float32), np.array(labels)


@pytest.mark.parametrize(
    ("name", "top1", "convolutions"),
    [("cifar_resnet20", 0.9148, 19), pytest.param("cifar_resnet56", 0.9296, 55, marks=pytest.mark.slow)],
)
def test_cifar_resnets_keep_their_accuracy(assets: Path, name: str, top1: float, convolutions: int) -> None:
    """At most 0.1 points of 5,000 images, with ranges of 250 training images and no clipping."""
    proto = onnx.load(assets / "models" / "cifar10-resnets" / f"{name}.onnx")
    model = ir.from_proto(proto)
    for each in DEFAULT_PIPELINE:
        if each != "simplify":
            make(each)(model)
    calibration = min_max(ir.to_proto(model), [{"input": cifar(assets, "train")[0][:250]}])
    outcome = QuantizeInt8(calibration=calibration)(model)
    assert not outcome.declined
    after = ir.to_proto(model)
    assert in_kernels(after, nmse=0.02)["QLinearConv"] == convolutions
    session = ort.InferenceSession(after.SerializeToString(), providers=["CPUExecutionProvider"])
    images, labels = cifar(assets, "test")
    logits = [session.run(None, {"input": images[i : i + 50]})[0] for i in range(0, len(images), 50)]
    assert (np.concatenate(logits).argmax(1) == labels).mean() >= top1 - 0.001


@pytest.mark.parametrize(
    ("file", "sizes", "convolutions"),
    [
        ("cifar10-resnets/cifar_resnet20.onnx", {}, 19),
        ("cifar10-resnets/cifar_resnet56.onnx", {}, 55),
        ("mlperf-resnet8/mlperf_resnet8_float.onnx", {}, 9),
        ("onnx-graphs/rapidocr_cls.onnx", {"x": (1, 3, 48, 48)}, 53),
        ("onnx-graphs/basic_pitch.onnx", {"serving_default_input_2:0": (1, 43844, 1)}, 32),
        ("onnx-graphs/plcmos_v2_gru.onnx", {"degraded_audio": (1, 1, 48, 257), "rater_embed": (1, 64)}, 4),
        ("onnx-graphs/swift_f0_stft.onnx", {"input_audio": (1, 16000)}, 6),
    ],
)
def test_every_quantised_convolution_is_an_integer_kernel(
    assets: Path, file: str, sizes: dict[str, tuple[int, ...]], convolutions: int
) -> None:
    """On graphs of many makers, after ONNX Runtime's own optimisation; and none is left out."""
    model = at_least(ir.load(assets / "models" / file), 13)
    for value in model.graph.inputs:
        if value.name in sizes:
            value.shape = ir.Shape(sizes[value.name])
    for each in DEFAULT_PIPELINE:
        if each != "simplify":
            make(each)(model)
    proto = ir.to_proto(model)
    calibration = min_max(proto, [random_feeds(proto, 0)])
    outcome = QuantizeInt8(calibration=calibration)(model)
    after = ir.to_proto(model)
    made = producers(after)
    quantised = [
        node
        for node in after.graph.node
        if node.op_type == "Conv" and all(_is_dequantised(made, name) for name in node.input)
    ]
    assert len(quantised) == op_counts(after)["Conv"] == convolutions, outcome.declined
    kernels = optimised_ops(after)
    assert kernels["QLinearConv"] == convolutions
    assert kernels["Conv"] == kernels["FusedConv"] == 0


def _is_dequantised(made: dict[str, onnx.NodeProto], name: str) -> bool:
    return name in made and made[name].op_type == "DequantizeLinear"
