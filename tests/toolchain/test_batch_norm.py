"""BatchNormalization for training: the same numbers before and after, and the way back into the graph as it was."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from toolchain.batch_norm import fold_back, with_batch_norm
from toolchain.errors import DataError
from toolchain.evaluate import run_reference

GRAPH = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
    r = Relu(a)
    d = Conv<group = 4, pads = [1, 1, 1, 1]>(r, w2, b2)
    s = Add(d, r)
    p = Conv(s, w3)
    q = Conv(p, w4, b4)
    t = Relu(q)
    y = Conv(t, w5, b5)
}"""


@pytest.fixture
def model() -> ir.Model:
    """Convolutions: with bias, depthwise with a dead filter, without bias, pointwise, and one whose output is the
    graph's."""
    proto = onnx.parser.parse_model(GRAPH)
    rng = np.random.default_rng(0)
    shapes = {"w1": (4, 3, 3, 3), "w2": (4, 1, 3, 3), "w3": (4, 4, 1, 1), "w4": (4, 4, 1, 1), "w5": (4, 4, 1, 1)}
    for name, shape in shapes.items():
        weight = rng.standard_normal(shape).astype("float32") * np.float32(0.02)
        if name == "w2":
            weight[2] = 0
        if name == "w4":
            weight[:, 1] = 0
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    for name in ("b1", "b2", "b4", "b5"):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(4).astype("float32"), name))
    return ir.from_proto(proto)


@pytest.fixture
def samples() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((n, 3, 8, 8)).astype("float32")} for n in (5, 3)]


def output(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return run_reference(model, [feeds])[0]["y"]


def norms_of(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "BatchNormalization"]


def test_it_computes_the_same_and_leaves_the_graph_alone(model: ir.Model, samples: list[dict[str, np.ndarray]]) -> None:
    before = output(model, samples[0])
    made = with_batch_norm(model, samples)
    assert len(norms_of(made)) == 3, "not behind the one without a bias, nor behind the graph's output"
    np.testing.assert_allclose(output(made, samples[0]), before, rtol=1e-4, atol=1e-5)
    assert np.array_equal(output(model, samples[0]), before)
    first = norms_of(made)[0]
    weight = first.inputs[0].producer().inputs[1].const_value.numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(np.square(weight).sum(axis=(1, 2, 3)), 2.0, rtol=1e-5)


def test_its_statistics_are_those_of_all_samples(model: ir.Model, samples: list[dict[str, np.ndarray]]) -> None:
    made = with_batch_norm(model, samples)
    first = norms_of(made)[0]
    values = {name: first.inputs[i].const_value.numpy() for i, name in ((3, "mean"), (4, "var"))}  # type: ignore[union-attr]
    whole = {"x": np.concatenate([feeds["x"] for feeds in samples])}
    made.graph.outputs.append(first.inputs[0])  # type: ignore[arg-type]
    fed = run_reference(made, [whole])[0][str(first.inputs[0].name)]  # type: ignore[union-attr]
    np.testing.assert_allclose(values["mean"], fed.mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values["var"], fed.var(axis=(0, 2, 3)), rtol=1e-4)


def test_what_was_trained_comes_back_under_its_names(model: ir.Model, samples: list[dict[str, np.ndarray]]) -> None:
    made = with_batch_norm(model, samples)
    rng = np.random.default_rng(2)
    for value in made.graph.initializers.values():
        data = value.const_value.numpy()  # type: ignore[union-attr]
        factor = np.where(data == 0, 0, rng.uniform(0.8, 1.2, data.shape)).astype("float32")
        value.const_value = ir.tensor(data * factor, name=value.name)
    nodes, names = [node.op_type for node in model.graph], sorted(model.graph.initializers)
    fold_back(made, model)
    np.testing.assert_allclose(output(model, samples[1]), output(made, samples[1]), rtol=1e-3, atol=1e-5)
    assert [node.op_type for node in model.graph] == nodes
    assert sorted(model.graph.initializers) == names
    assert not model.graph.initializers["w4"].const_value.numpy()[:, 1].any(), "what was pruned stays so"  # type: ignore[union-attr]


def test_no_samples(model: ir.Model) -> None:
    with pytest.raises(DataError, match="no samples"):
        with_batch_norm(model, [])
