"""quantize_int8 on tables of embeddings: what is stored in each dialect, what is computed, and what is left."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_support import parse, run_ort
from quant_support import optimised_ops, quantise
from test_quantize_int8 import normal
from test_quantize_int8_targets import arrays, engine_size, producers

from passes.quantize_int8 import DIALECTS, quantizable
from passes.shield_layer_norm import shield_layer_norms

ROWS, WIDTH = 400, 96
TABLE = normal(ROWS, WIDTH) * np.logspace(-2, 1, ROWS, dtype=np.float32)[:, None]
EMBEDDED = "e = Gather (t, i) h = MatMul (e, w) y = Add (h, b)"


def sentence(body: str = EMBEDDED, width: int = 64, **constants: np.ndarray) -> onnx.ModelProto:
    given = {"t": TABLE, "w": normal(WIDTH, width, seed=4), "b": normal(width, seed=5), **constants}
    used = {name: data for name, data in given.items() if re.search(rf"\b{name}\b", body)}
    declared = ", ".join(f"float{list(data.shape)} {name}" for name, data in used.items())
    return parse(f"g (int64[N, S] i, {declared}) => (float[N, S, {width}] y) {{ {body} }}", **used)


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_a_table_becomes_integers_with_a_scale_for_each_row(dialect: str) -> None:
    proto = sentence()
    after, outcome = quantise(proto, dialect=dialect, nmse=1e-3)
    assert outcome.fired == 2
    assert len(quantizable(ir.from_proto(proto), dialect)) == 2
    constants, made = arrays(after), producers(after)
    assert not any(data.dtype == np.float32 and data.size > ROWS for data in constants.values())
    table = next(node for node in after.graph.node if node.op_type == "Gather")
    if dialect == "tensorrt":
        source = made[table.input[0]]
        assert (source.op_type, source.attribute[0].i) == ("DequantizeLinear", 0)
        integers, scale = constants[source.input[0]], constants[source.input[1]]
    else:
        integers = constants[table.input[0]]
        scale = next(data for data in constants.values() if data.shape == (ROWS, 1))[:, 0]
        assert optimised_ops(after)["DequantizeLinear"] == 0, "the table is not dequantised when the model runs"
    assert (integers.dtype, integers.shape) == (np.int8, TABLE.shape)
    assert np.allclose(scale * 127, np.abs(TABLE).max(axis=1))
    # the rows themselves, small ones too
    rows = np.arange(ROWS).reshape(2, -1)
    got = run_ort(_with_output(after, "e"), {"i": rows})[-1].reshape(ROWS, WIDTH)
    assert (np.abs(got - TABLE) <= 1.01 * scale[:, None]).all()


def _with_output(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return copy


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_a_table_that_is_read_twice_is_stored_once(dialect: str) -> None:
    body = "e = Gather (t, i) f = Gather (t, i) s = Add (e, f) h = MatMul (s, w) y = Add (h, b)"
    after, outcome = quantise(sentence(body), dialect=dialect, nmse=1e-3)
    assert outcome.fired == 3
    assert sum(data.size for data in arrays(after).values() if data.dtype == np.int8 and data.shape == TABLE.shape) == (
        TABLE.size
    )


def test_a_table_that_is_the_last_layer_too_is_stored_once_for_tensorrt() -> None:
    """As language models tie them: the layer's scales are those of the rows."""
    body = "e = Gather (t, i) r = Reshape (e, two) h = Gemm <transB = 1> (r, t) y = Reshape (h, three)"
    proto = parse(
        f"g (int64[N, S] i, float[{ROWS}, {WIDTH}] t, int64[2] two, int64[3] three) => (float[N, S, {ROWS}] y) "
        f"{{ {body} }}",
        t=TABLE,
        two=np.array([-1, WIDTH]),
        three=np.array([2, 2, ROWS]),
    )
    after, outcome = quantise(proto, dialect="tensorrt", nmse=1e-3)
    assert outcome.fired == 2
    assert sum(data.shape == TABLE.shape for data in arrays(after).values()) == 1


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_what_is_left_in_float(dialect: str) -> None:
    small = sentence(t=normal(ROWS, WIDTH)[:100])
    _, outcome = quantise(small, dialect=dialect)
    assert outcome.fired == 1
    assert [d.reason for d in outcome.declined] == [
        "its weight has 9600 elements, less than 16384: integers would not pay"
    ]
    model = ir.from_proto(sentence())
    name = next(name for name in quantizable(model, dialect) if "Gather" in name)
    after, outcome = quantise(sentence(), dialect=dialect, exclude=(name,))
    assert [(d.node, d.reason) for d in outcome.declined] == [(name, "excluded")]
    assert outcome.fired == 1
    assert any(data.dtype == np.float32 and data.shape == TABLE.shape for data in arrays(after).values())


def test_a_gather_of_something_else_is_no_table() -> None:
    proto = parse(
        f"g (float[N, {ROWS}] x, float[{ROWS}, {WIDTH}] w, int64[2] i) => (float[N, 2] y) "
        "{ h = MatMul (x, w) y = Gather <axis = 1> (h, i) }",
        w=TABLE,
        i=np.array([3, 1]),
    )
    _, outcome = quantise(proto)
    assert not outcome.declined


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_a_table_that_stays_as_floats_anyway_is_not_stored_twice(dialect: str) -> None:
    body = (
        "e = Gather (t, i) f = Neg (t) m = ReduceMax <keepdims = 0> (f) h = MatMul (e, w) k = Add (h, b) y = Add (k, m)"
    )
    _, outcome = quantise(sentence(body), dialect=dialect, nmse=1e-3)
    assert [d.reason for d in outcome.declined if "Gather" in d.node] == [
        "something else reads its table as floats: integers would come on top of it"
    ]


def test_a_table_alone_is_quantised() -> None:
    proto = parse(f"g (int64[N] i, float[{ROWS}, {WIDTH}] t) => (float[N, {WIDTH}] y) {{ y = Gather (t, i) }}", t=TABLE)
    after, outcome = quantise(proto)
    assert outcome.fired == 1
    assert len(after.SerializeToString()) < 0.3 * len(proto.SerializeToString())


def test_residuals_before_a_normalisation_stay_apart_from_it_on_onnx_runtime_alone() -> None:
    body = (
        "e = Gather (t, i) h = MatMul (e, w) s = Add (h, e) "
        "n = LayerNormalization <axis = -1> (s, gamma, beta) y = MatMul (n, w)"
    )
    constants = {"gamma": np.ones(WIDTH, np.float32), "beta": np.zeros(WIDTH, np.float32), "w": normal(WIDTH, WIDTH)}
    proto = sentence(body, WIDTH, **constants)
    counts = {}
    for dialect in DIALECTS:
        after, _ = quantise(proto, dialect=dialect, nmse=3e-3)
        counts[dialect] = sum(node.op_type == "Sum" for node in after.graph.node)
        if dialect == "ort-cpu":
            assert optimised_ops(after)["SkipLayerNormalization"] == 0
            assert optimised_ops(after)["LayerNormalization"] == 1
    assert counts == {"ort-cpu": 1, "tensorrt": 0, "openvino": 0}
    assert shield_layer_norms(ir.from_proto(after).graph) == 1


@pytest.mark.parametrize("architecture", ["SM86", "SM89"])
def test_tensorrt_keeps_the_table_as_integers(architecture: str) -> None:
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    proto = sentence(t=normal(20_000, WIDTH))
    after, _ = quantise(proto, dialect="tensorrt")
    # 7.7 MB as floats, 1.9 as integers; the code of the kernels is some 0.1 MB each
    assert engine_size(trt, after, architecture) < 0.4 * engine_size(trt, proto, architecture)


def test_openvino_computes_the_same() -> None:
    openvino: Any = pytest.importorskip("openvino", reason="openvino is not installed")
    after, _ = quantise(sentence(), dialect="openvino")
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(after.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    rows = np.arange(ROWS).reshape(2, -1)
    expected = run_ort(after, {"i": rows})[0]
    assert np.square(compiled({"i": rows})[0] - expected).sum() < 1e-4 * np.square(expected).sum()
