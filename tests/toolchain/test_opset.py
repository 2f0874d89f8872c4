"""Graphs of an old opset in a newer one: the same names, numbers and weights, and INT8 of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from toolchain_support import conv_net

from runtimes import Target
from toolchain.calibration import calibrate
from toolchain.data import Batch
from toolchain.errors import GraphError
from toolchain.evaluate import input_specs, reference_session, run_reference
from toolchain.judge import Judge
from toolchain.onnx_file import read_onnx
from toolchain.opset import at_least
from toolchain.quantization import quantise_within_budget
from toolchain.seeded import seeded_inputs


def names(model: ir.Model) -> set[str | None]:
    return {value.name for node in model.graph for value in node.outputs}


def test_a_new_enough_graph_is_left_alone() -> None:
    model = ir.from_proto(conv_net(opset=13))
    assert at_least(model, 13) is model


def test_names_numbers_and_weights_stay() -> None:
    model = ir.from_proto(conv_net(opset=11))
    newer = at_least(model, 13)
    assert newer.opset_imports[""] == 13
    assert model.opset_imports[""] == 11
    assert names(model) <= names(newer)
    large = {n: v for n, v in model.graph.initializers.items() if v.const_value is not None and v.const_value.size > 64}
    assert large
    for name, value in large.items():
        assert newer.graph.initializers[name].const_value is value.const_value, "weights are shared, not copied"
    feeds = [{"image": np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)}]
    np.testing.assert_array_equal(run_reference(model, feeds)[0]["logits"], run_reference(newer, feeds)[0]["logits"])


def test_int8_of_an_old_graph() -> None:
    images = np.random.default_rng(1).normal(size=(8, 3, 16, 16)).astype(np.float32)
    model = ir.from_proto(conv_net(opset=11))
    with reference_session(model) as session:
        judge = Judge(session, [Batch({"image": images}, None)], metric="nmse")
    made, report = quantise_within_budget(
        model, Target("ort-cpu"), calibrate(model, [{"image": images}]), judge, [{"image": images}], data="x",
        max_drop=None,
    )  # fmt: skip
    assert report.opset == made.opset_imports[""] == 13
    assert report.quantised >= 2
    assert report.drop < 0.01


def test_what_cannot_be_converted_is_said() -> None:
    graph = onnx.parser.parse_graph("g (float[2] x) => (float[2] y) { y = Thresholds (x) }")
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 9)]))
    with pytest.raises(GraphError, match="onnx cannot convert the graph") as caught:
        at_least(model, 13)
    assert caught.value.where == "opset 9 to 13"
    assert "newer opset" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["rapidocr_cls", "plcmos_v2_gru"])
def test_graphs_that_others_made(assets: Path, name: str) -> None:
    model = read_onnx(assets / "models" / "onnx-graphs" / f"{name}.onnx")
    feeds = [seeded_inputs(input_specs(model), batch=1, seed=1)]
    before = run_reference(model, feeds)[0]
    newer = at_least(model, 19)
    assert (model.opset_imports[""], newer.opset_imports[""]) == (11, 19)
    assert names(model) <= names(newer)
    after = run_reference(newer, feeds)[0]
    for output, value in before.items():
        np.testing.assert_array_equal(value, after[output])
