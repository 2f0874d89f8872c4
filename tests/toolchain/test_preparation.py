"""Graphs made easier to quantise: the same function, ranges for every value, and INT8 that loses less."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtimes import Target
from toolchain.calibration import calibrate
from toolchain.candidates import Tools
from toolchain.data import Batch
from toolchain.errors import DataError
from toolchain.evaluate import reference_session, run_reference
from toolchain.judge import Judge
from toolchain.metrics import tensor_error
from toolchain.preparation import prepare
from toolchain.quantization import quantise_within_budget

CPU = Target("ort-cpu")
RNG = np.random.default_rng(3)


def mlp() -> onnx.ModelProto:
    """Two products behind an activation whose second channel is a hundred times the others."""
    outliers = np.where(np.arange(16) == 1, 100.0, 1.0)
    first = (RNG.standard_normal((12, 16)) * outliers).astype(np.float32)
    second = (RNG.standard_normal((16, 8)) / outliers[:, None]).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),  # without a name: it is called after its output
        helper.make_node("Gelu", ["a"], ["r"], "gelu"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], "second"),
    ]
    return model(nodes, {"w1": first, "w2": second}, ["n", 12], ["n", 8])


def convs() -> onnx.ModelProto:
    """Two convolutions with a Relu between them, and channels that are far apart."""
    spread = np.exp(np.linspace(-3, 3, 8))
    first = (RNG.standard_normal((8, 3, 3, 3)) * spread[:, None, None, None]).astype(np.float32)
    second = (RNG.standard_normal((4, 8, 3, 3)) / spread[None, :, None, None]).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "w2"], ["y"], "second"),
    ]
    return model(nodes, {"w1": first, "w2": second}, ["n", 3, 10, 10], ["n", 4, 6, 6])


def model(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], x: list[str | int], y: list[str | int]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(data, name) for name, data in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return onnx.shape_inference.infer_shapes(proto)


def batches(shape: tuple[int, ...]) -> list[Batch]:
    return [Batch({"x": RNG.standard_normal((8, *shape)).astype(np.float32)}, None) for _ in range(3)]


CASES = {
    "smooth_quant": (mlp, (12,), {"smooth_quant": 0.5}),
    "smooth_quant, auto": (mlp, (12,), {"smooth_quant": "auto"}),
    "equalization": (convs, (3, 10, 10), {"equalization": True}),
}


@pytest.mark.parametrize(("make", "shape", "options"), CASES.values(), ids=CASES.keys())
def test_the_function_stays_and_what_changed_has_new_ranges(make, shape, options) -> None:  # type: ignore[no-untyped-def]
    graph, data = ir.from_proto(make()), batches(shape)
    calibration = calibrate(graph, data, method="minmax")
    prepared = prepare(graph, calibration, data, method="minmax", **options)
    assert prepared.changes > 0
    feeds = [batch.inputs for batch in data]
    for before, after in zip(run_reference(graph, feeds), run_reference(prepared.model, feeds), strict=True):
        assert tensor_error(before["y"], after["y"]).nmse < 1e-11
    again = calibrate(prepared.model, data, method="minmax")
    assert prepared.calibration.ranges.keys() == again.ranges.keys()
    changed = again.ranges.keys() - calibration.ranges.keys()
    assert changed, "what holds other numbers has another name"
    for name in changed:
        assert prepared.calibration.ranges[name] == again.ranges[name]


def test_what_did_not_change_keeps_the_range_it_came_with() -> None:
    graph, data = ir.from_proto(mlp()), batches((12,))
    imported = calibrate(graph, data, method="entropy")
    prepared = prepare(graph, imported, data, smooth_quant=0.5, method="minmax")
    assert prepared.calibration.ranges["x"].method == "entropy"
    assert {r.method for n, r in prepared.calibration.ranges.items() if n not in imported.ranges} == {"minmax"}


def test_nodes_keep_what_they_are_called() -> None:
    graph, data = ir.from_proto(mlp()), batches((12,))
    prepared = prepare(graph, calibrate(graph, data), data, smooth_quant=0.5)
    assert "MatMul -> a" in {node.name for node in prepared.model.graph}
    assert {node.name or "" for node in graph.graph} == {"", "gelu", "second"}


def test_no_samples_and_no_place() -> None:
    graph, data = ir.from_proto(convs()), batches((3, 10, 10))
    calibration = calibrate(graph, data)
    with pytest.raises(DataError, match="measure on calibration data"):
        prepare(graph, calibration, [], equalization=True)
    unchanged = prepare(graph, calibration, data, smooth_quant="auto")  # it is for Gemm and MatMul
    assert (unchanged.model, unchanged.calibration, unchanged.changes) == (graph, calibration, 0)


def judged(graph: ir.Model, data: list[Batch]) -> Judge:
    with reference_session(graph) as session:
        return Judge(session, data, metric="nmse")


def test_smooth_quant_is_tried_where_the_budget_is_missed_and_kept_if_it_helps() -> None:
    graph, data = ir.from_proto(mlp()), batches((12,))
    calibration, judge = calibrate(graph, data, method="minmax"), judged(graph, data)
    feeds = [batch.inputs for batch in data]

    def report(max_drop: float | None, tools: Tools):  # type: ignore[no-untyped-def]
        return quantise_within_budget(
            graph, CPU, calibration, judge, feeds, data="made up", max_drop=max_drop, tools=tools,
            calibration_data=data, method="minmax",
        )[1]  # fmt: skip

    plain, smooth = report(None, Tools()), report(None, Tools(smooth_quant="on"))
    assert smooth.drop < plain.drop / 2
    assert (plain.smooth_quant, smooth.smooth_quant) == ("none", "on")
    budget = (plain.drop + smooth.drop) / 2
    tried = report(budget, Tools("auto", "auto", "none"))
    assert tried.smooth_quant == "on"
    assert tried.equalization == "none"
    assert not tried.returned
    assert [trial.tools for trial in tried.tried] == ["plain", "equalization", "smooth quant"]
    assert tried.tried[1].note == "the graph has no place for it"
    assert tried.tried[2].drop == tried.drop <= budget
    assert report(1.0, Tools("auto", "auto", "auto")).tried == tried.tried[:1]  # nothing is missed, nothing tried


def test_without_calibration_data_auto_says_why_not_and_on_is_an_error() -> None:
    graph, data = ir.from_proto(mlp()), batches((12,))
    calibration, judge = calibrate(graph, data, method="minmax"), judged(graph, data)
    feeds = [batch.inputs for batch in data]
    _, report = quantise_within_budget(
        graph, CPU, calibration, judge, feeds, data="made up", max_drop=judge_budget(graph, calibration, judge, feeds),
        tools=Tools(smooth_quant="auto"),
    )  # fmt: skip
    assert "calibration data" in str(report.tried[1].note)
    with pytest.raises(DataError, match="calibration data"):
        quantise_within_budget(
            graph, CPU, calibration, judge, feeds, data="made up", max_drop=None, tools=Tools(smooth_quant=0.5)
        )


def judge_budget(graph, calibration, judge, feeds) -> float:  # type: ignore[no-untyped-def]
    """A budget that is missed with everything quantised, and met with one of the two layers in float."""
    lost = [
        quantise_within_budget(
            graph, CPU, calibration, judge, feeds, data="made up", max_drop=None, exclude=exclude
        )[1].drop
        for exclude in ((), ("second",))
    ]  # fmt: skip
    assert lost[1] < lost[0]
    return sum(lost) / 2
