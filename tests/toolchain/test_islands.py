"""What is slower in INT8: the cut on made-up times, the profile of a real run, and the search that uses them."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from toolchain_support import conv_net

from runtimes import Target
from toolchain import islands
from toolchain.calibration import calibrate
from toolchain.data import Batch
from toolchain.evaluate import Feeds, reference_session
from toolchain.islands import can_profile, slower_in_int8
from toolchain.judge import Judge
from toolchain.lower import lower_int8
from toolchain.minimum_cut import minimum_cut
from toolchain.node_times import NodeTime, node_times
from toolchain.quantization import SLOWER, quantise_within_budget

CPU = Target("ort-cpu")


def test_the_minimum_cut_of_a_known_graph() -> None:
    # Cormen et al., Introduction to Algorithms, figure 26.1: the flow is 23
    edges = {
        ("s", "1"): 16.0, ("s", "2"): 13.0, ("1", "3"): 12.0, ("2", "1"): 4.0, ("3", "2"): 9.0, ("2", "4"): 14.0,
        ("4", "3"): 7.0, ("3", "t"): 20.0, ("4", "t"): 4.0,
    }  # fmt: skip
    side = minimum_cut(edges, "s", "t")
    assert side == {"s", "1", "2", "4"}
    assert sum(c for (a, b), c in edges.items() if a in side and b not in side) == 23


def test_no_finite_cut_is_an_error_and_two_parts_need_none() -> None:
    with pytest.raises(ValueError, match="no finite cut"):
        minimum_cut({("s", "a"): math.inf, ("a", "t"): math.inf}, "s", "t")
    assert minimum_cut({("s", "a"): 1.0, ("b", "t"): 1.0}, "s", "t") == {"s", "a"}


def test_a_profile_names_every_node_and_its_size() -> None:
    model = ir.from_proto(conv_net())
    feeds = {"image": np.zeros((1, 3, 16, 16), np.float32)}
    (found,) = node_times([model], feeds)
    assert {"Gemm", "Conv"} & {entry.op_type for entry in found}
    assert all(entry.ms >= 0 for entry in found)
    gemm = next(entry for entry in found if entry.op_type == "Gemm")
    assert gemm.output_bytes == 4 * 10


# Three convolutions in a row; times are made up, so that the best answer is known.


def chain() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    text = """<ir_version: 9, opset_import: ["" : 17]> g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
        [c1] a = Conv <pads = [1, 1, 1, 1]> (x, w1)
        [c2] b = Conv <pads = [1, 1, 1, 1]> (a, w2)
        [c3] y = Conv <pads = [1, 1, 1, 1]> (b, w3) }"""
    proto = onnx.parser.parse_model(text)
    for name in ("w1", "w2", "w3"):
        data = rng.normal(size=(4, 4, 3, 3)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(data, name))
    return onnx.shape_inference.infer_shapes(proto)


def decided(
    monkeypatch: pytest.MonkeyPatch, as_float: list[float], as_int8: list[float], border: float
) -> dict[str, float]:
    """What is to be returned if the three take these times, and a border this one."""
    feeds = {"x": np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)}
    model = ir.from_proto(chain())
    quantised, _ = lower_int8(model, CPU, calibrate(model, [feeds]))

    def made_up(models: list[ir.Model], feeds: Feeds) -> list[list[NodeTime]]:
        size = 4 * 4 * 8 * 8
        floats = [NodeTime(f"v0<{i}>_nchwc", "Conv", ms, size) for i, ms in enumerate(as_float)]
        integers = [NodeTime(f"n0<{i}>", "QLinearConv", ms, size // 4) for i, ms in enumerate(as_int8)]
        return [floats, [*integers, NodeTime("q", "QuantizeLinear", border, size // 4)]]

    monkeypatch.setattr(islands, "node_times", made_up)
    return slower_in_int8(model, quantised, ("c1", "c2", "c3"), feeds)


@pytest.mark.parametrize(
    ("as_float", "as_int8", "border", "returned"),
    [
        ([4, 4, 4], [1, 1, 1], 0.1, {}),
        ([4, 1, 4], [1, 3, 1], 0.1, {"c2": -2}),  # worth its two borders
        ([4, 1, 4], [1, 3, 1], 1.5, {}),  # not worth them
        ([1, 1, 4], [1.5, 1.5, 1], 0.1, {"c1": -0.5, "c2": -0.5}),
        ([1, 1, 1], [2, 2, 2], 0.1, {"c1": -1, "c2": -1, "c3": -1}),
        ([1, 1, 1], [1.001, 0.9, 0.9], 0.0, {}),  # a gain below what can be measured
    ],
)
def test_borders_are_counted(
    monkeypatch: pytest.MonkeyPatch,
    as_float: list[float],
    as_int8: list[float],
    border: float,
    returned: dict[str, float],
) -> None:
    assert decided(monkeypatch, as_float, as_int8, border) == pytest.approx(returned)


def test_only_the_cpu_can_be_looked_into() -> None:
    assert can_profile(CPU)
    assert not can_profile(Target("tensorrt-rtx", "sm86"))


def test_what_is_slower_is_returned_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = {"x": np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)}
    model = ir.from_proto(chain())
    with reference_session(model) as session:
        judge = Judge(session, [Batch(feeds, None)], metric="nmse")
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("toolchain.candidates.slower_in_int8", lambda *_: {"c2": -0.5})
    monkeypatch.setattr(
        "toolchain.candidates.Candidates.is_faster",
        lambda self, tools, returned, than: asked.append(returned) or True,
    )

    def made(**options: object):  # type: ignore[no-untyped-def]
        return quantise_within_budget(
            model, CPU, calibrate(model, [feeds]), judge, [feeds], data="x", max_drop=None, **options
        )  # type: ignore[arg-type]

    _, report = made(return_slower=True)
    assert asked == [("c2",)]  # the second time there is nothing new
    (only,) = report.returned
    assert (only.node, only.op_type, only.cost_ms, only.reason) == ("c2", "Conv", -0.5, SLOWER)
    assert only.nmse > 0
    assert report.quantised == 2
    assert "c2" in {d.node for d in report.declined}
    assert made()[1].returned == ()  # asked for INT8, one gets INT8


def test_what_was_excluded_is_not_fused_by_the_runtime_all_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    text = """<ir_version: 9, opset_import: ["" : 17]> g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
        [c1] a = Conv <pads = [1, 1, 1, 1]> (x, w1)
        [c2] b = Conv <pads = [1, 1, 1, 1]> (a, w2)
        [sum] s = Add (a, b)
        [c3] y = Conv <pads = [1, 1, 1, 1]> (s, w3) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(chain().graph.initializer)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    feeds = {"x": np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)}
    calibration = calibrate(model, [feeds])
    for exclude, wanted in ((), {"QLinearAdd": 1}), (("sum",), {"Add": 1}):
        made, _ = lower_int8(model, CPU, calibration, exclude=exclude)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        onnxruntime.InferenceSession(ir.to_proto(made).SerializeToString(), options)
        kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
        assert {kind: kinds.count(kind) for kind in ("Add", "QLinearAdd") if kind in kinds} == wanted
        assert kinds.count("QLinearConv") == 3
