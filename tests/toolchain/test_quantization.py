"""INT8 that keeps its budget, or says that it cannot: on a network with one bad layer, and on real ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from toolchain_support import conv_net, save, toolchain, toolchain_json

import runtimes
from passes.quantize_int8 import quantizable
from runtimes import Target
from toolchain.calibration import calibrate
from toolchain.candidates import Tools
from toolchain.data import Batch
from toolchain.errors import DataError, FidelityError, GraphError
from toolchain.evaluate import reference_session
from toolchain.judge import Judge
from toolchain.lower import lower_int8
from toolchain.quantization import quantise_within_budget
from toolchain.sensitivity import layer_sensitivities

CPU = Target("ort-cpu")


def outlier_net() -> onnx.ModelProto:
    """Six convolutions. The third gives one channel a thousand times the others, and the fourth takes it back:
    the same function in float, and one 8-bit scale for both has nothing left for the seven others."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "image"
    for number in range(1, 7):
        w = rng.normal(size=(8, 3 if number == 1 else 8, 3, 3)).astype(np.float32) / 6
        if number == 3:
            w[0] *= 1000
        if number == 4:
            w[:, 0] /= 1000
        weights.append(numpy_helper.from_array(w, f"w{number}"))
        nodes.append(helper.make_node("Conv", [value, f"w{number}"], [f"c{number}"], f"conv{number}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"], f"relu{number}"))
        value = f"r{number}"
    weights.append(numpy_helper.from_array(rng.normal(size=(10, 8)).astype(np.float32), "fc_w"))
    nodes += [
        helper.make_node("GlobalAveragePool", [value], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "fc_w"], ["logits"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "outliers",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(24, 3, 16, 16)).astype(np.float32)


def prepared(proto: onnx.ModelProto, images: np.ndarray) -> tuple[ir.Model, object, Judge]:
    model = ir.from_proto(proto)
    calibration = calibrate(model, [{"image": images}], method="minmax")
    with reference_session(model) as reference:
        judge = Judge(reference, [Batch({"image": images}, None)], metric="nmse")
    return model, calibration, judge


def test_without_a_budget_everything_is_quantised(images: np.ndarray) -> None:
    model, calibration, judge = prepared(conv_net(), images)
    quantised, report = quantise_within_budget(
        model, CPU, calibration, judge, [{"image": images[:1]}], data="made up", max_drop=None
    )
    assert (report.evaluations, report.returned) == (1, ())
    assert report.quantised == len(quantizable(model, "ort-cpu"))
    assert 0 < report.drop == report.full_drop < 0.01
    assert "QuantizeLinear" in {node.op_type for node in quantised.graph}
    assert "QuantizeLinear" not in {node.op_type for node in model.graph}


def test_the_bad_layers_are_found_and_returned(images: np.ndarray) -> None:
    model, calibration, judge = prepared(outlier_net(), images)
    free, full = quantise_within_budget(
        model, CPU, calibration, judge, [{"image": images[:1]}], data="made up", max_drop=None
    )
    assert full.drop > 0.05, "the network is meant to be bad in INT8"
    quantised, report = quantise_within_budget(
        model, CPU, calibration, judge, [{"image": images[:2]}], data="made up", max_drop=0.003
    )
    assert report.drop <= 0.003
    assert {layer.node for layer in report.returned} <= {"conv3", "conv4", "relu3"}
    assert len(report.returned) <= 2
    assert report.evaluations < len(quantizable(model, "ort-cpu")) + 6
    assert all(layer.cost_ms is not None for layer in report.returned)
    count = [sum(node.op_type == "DequantizeLinear" for node in graph.graph) for graph in (free, quantised)]
    assert count[0] > count[1] > 0


def test_the_ranking_puts_the_bad_layers_first(images: np.ndarray) -> None:
    model, calibration, _ = prepared(outlier_net(), images)
    quantised, _ = lower_int8(model, CPU, calibration)  # type: ignore[arg-type]
    ranked = layer_sensitivities(model, quantised, quantizable(model, "ort-cpu"), [{"image": images[:2]}])
    assert {layer.node for layer in ranked[:2]} == {"conv3", "conv4"}
    assert ranked[0].nmse > 10 * ranked[2].nmse
    assert [layer.rank for layer in ranked] == sorted((layer.rank for layer in ranked), reverse=True)


def test_an_impossible_budget_ships_nothing(images: np.ndarray) -> None:
    model, calibration, judge = prepared(outlier_net(), images)
    with pytest.raises(FidelityError, match=r"INT8 loses .* the budget is 0"):
        quantise_within_budget(model, CPU, calibration, judge, [{"image": images[:1]}], data="made up", max_drop=0.0)


def test_the_judge_counts_as_by_hand(images: np.ndarray) -> None:
    model = ir.from_proto(conv_net())
    with reference_session(model) as reference:
        classes = reference.run({"image": images})["logits"].argmax(axis=1)
        labels = classes.copy()
        labels[:6] = (labels[:6] + 1) % 10
        batches = [Batch({"image": images[:10]}, labels[:10]), Batch({"image": images[10:]}, labels[10:])]
        assert Judge(reference, batches).metric == "top1"
        assert Judge(reference, batches).drop(reference) == 0
        assert Judge(reference, [Batch({"image": images}, None)]).metric == "agreement"

        class Shifted:
            """Answers the next class: every right answer is lost, and six wrong ones are right."""

            def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                return {"logits": np.roll(reference.run(feeds)["logits"], 1, axis=1)}

        assert Judge(reference, batches).drop(Shifted()) == pytest.approx((18 - 6) / 24)  # type: ignore[arg-type]
        unlabelled = Judge(reference, [Batch({"image": images}, None)])
        assert unlabelled.drop(Shifted()) == 1  # type: ignore[arg-type]
        with pytest.raises(DataError, match="needs labels"):
            Judge(reference, [Batch({"image": images}, None)], metric="top1")
        with pytest.raises(DataError, match="nothing to measure"):
            Judge(reference, [])


def test_nothing_to_quantise_is_said(images: np.ndarray) -> None:
    graph = helper.make_graph(
        [helper.make_node("Exp", ["image"], ["y"], "exp")],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 16, 16])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    calibration = calibrate(ir.from_proto(conv_net()), [{"image": images}])
    with pytest.raises(GraphError, match="nothing of this model can be quantised"):
        lower_int8(model, CPU, calibration)


# The command.


@pytest.fixture
def workplace(tmp_path: Path, images: np.ndarray) -> Path:
    save(conv_net(channels=32), tmp_path / "net.onnx")
    save(outlier_net(), tmp_path / "bad.onnx")
    np.savez(tmp_path / "data.npz", image=images)
    return tmp_path


def test_build_int8(workplace: Path) -> None:
    found = toolchain_json("build", "net.onnx", "--precision", "int8", "--data", "data.npz", cwd=workplace)
    (variant,) = found["report"]["variants"]
    assert variant["name"] == "ort-cpu-int8"
    assert variant["int8"]["metric"] == "agreement"
    assert "x the time of float32" in variant["remark"]
    with runtimes.load(workplace / "artifacts" / "net") as session, runtimes.load(workplace / "net.onnx") as plain:
        assert session.info["precision"] == "int8"
        feeds = {"image": np.load(workplace / "data.npz")["image"]}
        mine, theirs = session.run(feeds)["logits"], plain.run(feeds)["logits"]
        assert 0 < np.abs(mine - theirs).max() < 0.1 * np.abs(theirs).max()
    shown = toolchain("build", "net.onnx", "--precision", "int8", "--data", "data.npz", cwd=workplace).stdout
    assert "INT8 against float32" in shown


def test_calibrate_once_build_with_the_file(workplace: Path) -> None:
    toolchain("optimize", "net.onnx", "-o", "optimised.onnx", cwd=workplace)
    toolchain("calibrate", "optimised.onnx", "--data", "data.npz", "-o", "net.calibration.json", cwd=workplace)
    flags = ["--precision", "int8", "--calibration", "net.calibration.json"]
    toolchain("build", "optimised.onnx", *flags, "-o", "art", cwd=workplace)
    refused = toolchain("build", "bad.onnx", *flags, "-o", "art2", cwd=workplace, check=2).stderr
    assert "net.calibration.json" in refused
    assert not (workplace / "art2").exists()


def test_int8_beyond_its_budget_is_not_shipped_and_auto_ships_float(workplace: Path) -> None:
    flags = ["--data", "data.npz", "--max-drop", "0", "--metric", "nmse"]
    refused = toolchain("build", "bad.onnx", "--precision", "int8", *flags, cwd=workplace, check=2).stderr
    assert "the budget is 0" in refused
    assert not (workplace / "artifacts").exists()
    found = toolchain_json("build", "bad.onnx", "--precision", "auto", *flags, cwd=workplace)
    (variant,) = found["report"]["variants"]
    assert variant["precision"] == "fp32"
    assert variant["remark"].startswith("no INT8: INT8 loses")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--precision", "int8"], "INT8 needs samples to calibrate on"),
        (["--precision", "int8", "--data", "absent.npz"], "absent.npz"),
        (["--precision", "int8", "--calibration", "absent.json"], "absent.json"),
        (["--precision", "int8", "--data", "data.npz", "--exclude", "convv"], "did you mean conv"),
        (["--precision", "int7"], "'int8'"),
        (["--precision", "int8", "--data", "data.npz", "--metric", "top1"], "needs labels"),
    ],
)
def test_mistakes(workplace: Path, flags: list[str], said: str) -> None:
    assert said in toolchain("build", "net.onnx", *flags, cwd=workplace, check=2).stderr
    assert not (workplace / "artifacts").exists()


@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-weights", "fp16"])
def test_precisions_without_calibration(workplace: Path, precision: str) -> None:
    save(conv_net(channels=4096), workplace / "wide.onnx")  # a Gemm of 4,096 x 10 is worth a quantised kernel
    found = toolchain_json("build", "wide.onnx", "--precision", precision, "--data", "data.npz", cwd=workplace)
    (variant,) = found["report"]["variants"]
    assert variant["name"] == f"ort-cpu-{precision}"
    assert 0 < variant["fidelity"]["outputs"]["logits"]["nmse"] < 1e-2
    whole = (workplace / "artifacts" / "wide" / "export" / "model.onnx").stat().st_size
    assert variant["size"] < 0.9 * whole
    assert not (workplace / "artifacts" / "wide" / "calibration.json").exists()


@pytest.mark.parametrize("mode", ["none", "fast", "sequential"])
def test_the_report_says_which_bias_correction_was_made(images: np.ndarray, mode: str) -> None:
    model, calibration, judge = prepared(outlier_net(), images)
    made, report = quantise_within_budget(
        model,
        CPU,
        calibration,
        judge,
        [{"image": images}],
        data="made up",
        max_drop=None,
        tools=Tools(bias_correction=mode),
    )
    assert report.bias_correction == mode
    plain, _ = lower_int8(model, CPU, calibration)  # type: ignore[arg-type]

    def biases(graph: ir.Model) -> list[bytes]:
        return [
            v.const_value.numpy().tobytes()
            for v in graph.graph.initializers.values()
            if v.const_value is not None and v.const_value.dtype == ir.DataType.INT32
        ]

    assert (biases(made) == biases(plain)) == (mode == "none")


def test_auto_tries_bias_correction_before_it_gives_up_layers(images: np.ndarray) -> None:
    model, calibration, judge = prepared(outlier_net(), images)
    _, report = quantise_within_budget(
        model,
        CPU,
        calibration,
        judge,
        [{"image": images}],
        data="made up",
        max_drop=0.003,
        tools=Tools(bias_correction="auto"),
    )
    assert report.drop <= 0.003
    assert report.evaluations >= 3  # plain, fast, sequential, and then the search


def test_an_excluded_node_stays_in_float(workplace: Path) -> None:
    flags = ["--precision", "int8", "--data", "data.npz", "--exclude", "fc"]
    toolchain("build", "net.onnx", *flags, cwd=workplace)
    graph = onnx.load(workplace / "artifacts" / "net" / "ort-cpu-int8" / "model.onnx").graph
    fc = next(node for node in graph.node if node.name == "fc")
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    assert made_by.get(fc.input[1]) != "DequantizeLinear"
    manifest = json.loads((workplace / "artifacts" / "net" / "manifest.json").read_text())
    assert manifest["additional_metadata"]["toolchain"]["recipe"]["quantize"]["exclude"] == ["fc"]
