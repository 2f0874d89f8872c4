"""Norms and moments of layer inputs against numbers computed by hand, in whatever batches the samples come."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from passes.factorize_low_rank import FactorizeLowRank, InputMoments
from passes.prune_weights import InputNorms, PruneWeights
from toolchain.errors import DataError, GraphError
from toolchain.layer_statistics import input_moments, input_norms

TEXT = """<ir_version: 8, opset_import: ["" : 20]>
agraph (float[N, 4, 5, 5] x) => (float[N, 6] y) <
    float[8, 4, 3, 3] w, float[8, 6] v
> {
    c = Conv (x, w)
    r = Relu (c)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    y = MatMul (f, v)
}"""


def model() -> ir.Model:
    proto = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    del proto.graph.initializer[:]
    for name, shape in (("w", (8, 4, 3, 3)), ("v", (8, 6))):
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        )
    return ir.from_proto(proto)


def test_by_hand() -> None:
    x = np.random.default_rng(1).standard_normal((7, 4, 5, 5)).astype(np.float32)
    channels = x.transpose(0, 2, 3, 1).reshape(-1, 4).astype(np.float64)
    for batches in ([{"x": x}], [{"x": x[:3]}, {"x": x[3:4]}, {"x": x[4:]}]):
        norms = input_norms(model(), iter(batches)).norms
        assert list(norms) == ["Conv -> c", "MatMul -> y"]
        np.testing.assert_allclose(norms["Conv -> c"], np.linalg.norm(channels, axis=0), rtol=1e-5)
        moments = input_moments(model(), iter(batches)).moments
        np.testing.assert_allclose(moments["Conv -> c"], channels.T @ channels / len(channels), rtol=1e-4, atol=1e-6)
        assert moments["MatMul -> y"].shape == (8, 8)
        # the diagonal of the moments is the squared norm of a row
        np.testing.assert_allclose(np.diag(moments["MatMul -> y"]) * 7, norms["MatMul -> y"] ** 2, rtol=1e-4)


def test_layers_of_one_name_are_not_taken_for_each_other() -> None:
    """ONNX Runtime refuses such a graph; the passes, which take any, decline what they cannot tell apart."""
    x = [{"x": np.random.default_rng(1).standard_normal((7, 4, 5, 5)).astype(np.float32)}]
    norms, moments = input_norms(model(), x).norms, input_moments(model(), x).moments
    net = model()
    for node in net.graph:
        node.name = "same"
    outcome = PruneWeights(method="wanda", norms=InputNorms({f"same -> {n[-1]}": v for n, v in norms.items()}))(net)
    assert (outcome.fired, len(outcome.declined)) == (0, 2)
    given = InputMoments({f"same -> {n[-1]}": v for n, v in moments.items()})
    outcome = FactorizeLowRank(ratio=0.6, moments=given)(net)
    assert (outcome.fired, len(outcome.declined)) == (0, 2)


def test_the_passes_take_them() -> None:
    x = [{"x": np.random.default_rng(1).standard_normal((7, 4, 5, 5)).astype(np.float32)}]
    net = model()
    assert PruneWeights(method="wanda", norms=input_norms(net, x))(net).fired == 2
    net = model()
    assert FactorizeLowRank(ratio=0.6, moments=input_moments(net, x))(net).fired >= 1


def test_bad_data() -> None:
    with pytest.raises(DataError, match="no samples"):
        input_norms(model(), [])
    x = np.zeros((1, 4, 5, 5), np.float32)
    x[0, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="'x' is not finite"):
        input_norms(model(), [{"x": x}])
    empty = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 20]> agraph (float[N] x) => (float[N] y) { y = Relu (x) }'
        )
    )
    with pytest.raises(GraphError, match="no layer"):
        input_moments(empty, [{"x": np.zeros(2, np.float32)}])
