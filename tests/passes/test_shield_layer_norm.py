"""shield_layer_norm: which additions become Sum, that nothing else changes, and that ONNX Runtime keeps them apart."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from pass_support import check, ops, parse, random_feeds, run_ort
from quant_support import optimised_ops

from passes.shield_layer_norm import ShieldLayerNorm

WIDTH = {"gamma": np.linspace(0.5, 1.5, 8, dtype=np.float32), "beta": np.full(8, 0.1, np.float32)}
NORM = "LayerNormalization <axis = -1> (s, gamma, beta)"
PIECES = (
    "m = ReduceMean <keepdims = 1> (s, last) d = Sub (s, m) q = Pow (d, two) v = ReduceMean <keepdims = 1> (q, last) "
    "e = Add (v, eps) r = Sqrt (e) n = Div (d, r) g = Mul (n, gamma) y = Add (g, beta)"
)


def model(body: str, *, kind: str = "float", **constants: np.ndarray) -> onnx.ModelProto:
    return parse(f"g ({kind}[B, 3, 8] a, {kind}[B, 3, 8] b) => ({kind}[B, 3, 8] y) {{ {body} }}", **constants)


@pytest.mark.parametrize(
    "body",
    [
        f"s = Add (a, b) y = {NORM}",
        f"s = Add (a, b) {PIECES}",
    ],
    ids=["norm", "in pieces"],
)
def test_sums_before_a_normalisation(body: str) -> None:
    constants = dict(WIDTH)
    if "last" in body:
        constants |= {"last": np.array([-1]), "eps": np.array(1e-5, np.float32), "two": np.array(2, np.float32)}
    proto = model(body, **constants)
    made, _ = check(proto, ShieldLayerNorm(), fired=1, run=run_ort)
    assert ops(made).count("Sum") == 1
    assert next(node for node in made.graph if node.op_type == "Sum").outputs[0].name == "s"
    before, after = optimised_ops(proto), optimised_ops(ir.to_proto(made))
    assert before["SkipLayerNormalization"] == 1, "the fusion that is to be prevented"
    assert after["SkipLayerNormalization"] == 0
    assert after["LayerNormalization"] == after["Sum"] == 1
    feeds = random_feeds(proto, 3)
    session = ort.InferenceSession(ir.to_proto(made).SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(None, feeds)[0], run_ort(proto, feeds)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (f"s = Add (a, beta) y = {NORM}", "float"),
        (f"s = Mul (a, b) y = {NORM}", "float"),
        ("s = Add (a, b) y = Relu (s)", "float"),
        (f"t = Add (a, b) s = Relu (t) y = {NORM}", "float"),
        ("s = Add (a, b) m = ReduceMean <keepdims = 1> (s, last) y = Mul (s, m)", "float"),
        ("s = Add (a, b) m = ReduceMean <keepdims = 1> (a, last) y = Sub (s, m)", "float"),
        (f"s = Add (a, b) y = {NORM}", "float16"),
        (f"s = Add (a, b) n = {NORM} y = Mul (n, s)", "float"),
    ],
    ids=["bias", "product", "no norm", "relu between", "mean alone", "another mean", "float16", "read twice"],
)
def test_leaves_alone(body: str, kind: str) -> None:
    constants = dict(WIDTH)
    if "last" in body:
        constants = {"last": np.array([-1])}
    elif kind == "float16":
        constants = {name: data.astype(np.float16) for name, data in WIDTH.items()}
    elif "gamma" not in body:
        constants = {}
    check(model(body, kind=kind, **constants), ShieldLayerNorm(), fired=0, run=run_ort)
