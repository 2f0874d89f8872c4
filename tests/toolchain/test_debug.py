"""Layer by layer: the shares are those of quantising one layer alone, and the bad layer stands first."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from test_quantization import outlier_net
from toolchain_support import conv_net, save, toolchain, toolchain_json

from passes.quantize_int8 import quantizable
from runtimes import Target
from toolchain.calibration import calibrate
from toolchain.debug import debug_quantization, write_page
from toolchain.evaluate import reference_session
from toolchain.lower import lower_int8
from toolchain.metrics import tensor_error

CPU = Target("ort-cpu")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(8, 3, 16, 16)).astype(np.float32)


def test_each_layer_alone_against_doing_it_by_hand(images: np.ndarray) -> None:
    model = ir.from_proto(outlier_net())
    calibration = calibrate(model, [{"image": images}], method="minmax")
    found = debug_quantization(model, CPU, calibration, [{"image": images}])
    assert found.layers[0].node in ("conv3", "conv4")
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    assert [layer.share for layer in found.layers] == sorted((x.share for x in found.layers), reverse=True)
    for layer in found.layers[:3]:
        others = tuple(name for name in quantizable(model, "ort-cpu") if name != layer.node)
        alone, _ = lower_int8(model, CPU, calibration, exclude=others)
        with reference_session(model) as was, reference_session(alone) as now:
            error = tensor_error(was.run({"image": images})["logits"], now.run({"image": images})["logits"])
        assert layer.alone_nmse == pytest.approx(error.nmse)
        assert layer.flag == f"--exclude {layer.node!r}"
    by_name = {layer.node: layer for layer in found.layers}
    # eight bits are about 50 dB for a bell, and what a channel a thousand times the others leaves is far less
    assert 35 < by_name["conv1"].weight_sqnr_db < 60  # type: ignore[operator]
    assert 30 < by_name["conv1"].input_sqnr_db < 60  # type: ignore[operator]


def test_histograms_hold_what_was_seen(images: np.ndarray, tmp_path: Path) -> None:
    model = ir.from_proto(outlier_net())
    calibration = calibrate(model, [{"image": images}], method="percentile", percentile=90.0)
    found = debug_quantization(model, CPU, calibration, [{"image": images}])
    histogram = next(layer for layer in found.layers if layer.node == "conv1").histogram
    assert histogram is not None
    assert histogram.edges[0] == pytest.approx(images.min())
    assert histogram.edges[-1] == pytest.approx(images.max())
    assert histogram.edges[0] < histogram.low < histogram.high < histogram.edges[-1]  # 90 % clips both tails
    middle = np.asarray(histogram.counts)[40:56].sum() / np.sum(histogram.counts)
    assert middle > 0.3  # a bell
    write_page(found, tmp_path / "page.html", title="a <b> & c")
    page = (tmp_path / "page.html").read_text()
    assert "a &lt;b&gt; &amp; c" in page
    assert len(re.findall("<svg", page)) == sum(layer.histogram is not None for layer in found.layers)


def test_the_command(tmp_path: Path, images: np.ndarray) -> None:
    save(conv_net(channels=32), tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", image=images)
    toolchain("build", "net.onnx", "--precision", "int8", "--data", "data.npz", cwd=tmp_path)
    found = toolchain_json("debug", "quantization", "artifacts/net", "--eval-data", "data.npz", cwd=tmp_path)
    assert {layer["node"] for layer in found["layers"]} >= {"conv", "fc"}
    shown = toolchain("debug", "quantization", "artifacts/net", "-o", "page.html", cwd=tmp_path).stdout
    assert "--exclude 'conv'" in shown
    assert (tmp_path / "page.html").exists()
    toolchain("build", "net.onnx", "-o", "plain", cwd=tmp_path)
    refused = toolchain("debug", "quantization", "plain", cwd=tmp_path, check=2).stderr
    assert "no calibrated INT8 variant" in refused
    for arguments, said in (
        (["--limit", "0"], "0 is not a number of samples"),
        (["--limit", "1000000000"], "1 to 4,096"),
        (["-o", "."], "there is a folder of that name"),
        (["--data", "data.npz"], "no accuracy tool is to be repeated"),
    ):
        assert said in toolchain("debug", "quantization", "artifacts/net", *arguments, cwd=tmp_path, check=2).stderr


def test_what_is_debugged_is_the_graph_that_ships(tmp_path: Path, images: np.ndarray) -> None:
    save(outlier_net(), tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", image=images)
    tools = ("--equalization", "on", "--smooth-quant", "on", "--bias-correction", "fast", "--exclude", "conv1")
    toolchain("build", "net.onnx", "--precision", "int8", "--data", "data.npz", *tools, cwd=tmp_path)
    command = ("debug", "quantization", "artifacts/net", "--eval-data", "data.npz")
    found = toolchain_json(*command, "--data", "data.npz", cwd=tmp_path)
    assert found["tools"] == "equalization + smooth quant + bias correction (fast)"
    assert found["tools_repeated_on"] == "data.npz"
    assert found["in_float"] == ["conv1"]
    assert "conv1" not in {layer["node"] for layer in found["layers"]}
    # repeated on the build's own data it is that very graph; the plain one has other noise
    assert found["total_nmse"] == pytest.approx(found["shipped_nmse"], rel=1e-4)
    model = ir.from_proto(outlier_net())
    calibration = calibrate(model, [{"image": images}])
    plain = debug_quantization(model, CPU, calibration, [{"image": i[None]} for i in images], exclude=("conv1",))
    assert plain.total_nmse != pytest.approx(found["shipped_nmse"], rel=0.05)
    shown = toolchain(*command, "--limit", "1", cwd=tmp_path).stdout
    assert "repeated on what is measured on, in place of the build's calibration data" in shown
    assert "in float already: conv1" in shown


def test_a_pruned_model_is_debugged_as_it_was_pruned(tmp_path: Path, images: np.ndarray) -> None:
    save(conv_net(channels=32), tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", image=images)
    (tmp_path / "recipe.yaml").write_text(
        "model: net.onnx\nprecision: int8\ndata: {calibration: data.npz}\nprune: {ratio: 0.5}\n"
        "verify: {max_nmse: 10.0}\n"
    )
    toolchain("build", "recipe.yaml", cwd=tmp_path)
    found = toolchain_json("debug", "quantization", "artifacts/net", "--eval-data", "data.npz", cwd=tmp_path)
    assert found["total_nmse"] == pytest.approx(found["shipped_nmse"], rel=1e-4)
