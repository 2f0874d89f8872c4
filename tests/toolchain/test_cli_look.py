"""``toolchain inspect``: what a model costs, in all and by node."""

from __future__ import annotations

from pathlib import Path

import pytest
from toolchain_support import conv_net, save, toolchain, toolchain_json

import runtimes

#: conv_net: a 3 x 3 convolution of 3 to 8 channels over 16 x 16, and a layer of 8 to 10
MACS = 16 * 16 * 8 * 27 + 80


def test_costs(tmp_path: Path) -> None:
    path = save(conv_net(), tmp_path / "net.onnx")
    found = toolchain_json("inspect", path)
    assert found["macs"] == MACS
    assert "layers" not in found
    assert toolchain_json("inspect", path, "--batch", "4")["macs"] == 4 * MACS
    assert toolchain_json("inspect", path, "--dim", "batch=3")["macs"] == 3 * MACS
    assert f"macs           {MACS}" in toolchain("inspect", path).stdout


def test_layers(tmp_path: Path) -> None:
    path = save(conv_net(), tmp_path / "net.onnx")
    layers = toolchain_json("inspect", path, "--layers")["layers"]
    assert [layer["node"] for layer in layers] == ["conv", "bn", "relu", "pool", "flat", "fc"]
    assert layers[0]["macs"] == MACS - 80
    assert layers[0]["parameters"] == 8 * 27
    text = toolchain("inspect", path, "--layers").stdout
    assert "operations/byte" in text
    assert "1x8x16x16" in text


def test_time(tmp_path: Path) -> None:
    state = runtimes.backend("ort-cpu").probe()
    if not state.available:
        pytest.skip(f"ort-cpu: {state.reason}")
    path = save(conv_net(), tmp_path / "net.onnx")
    found = toolchain_json("inspect", path, "--layers", "--time")
    by_node = {layer["node"]: layer["milliseconds"] for layer in found["layers"]}
    assert by_node["conv"] > 0
    assert by_node["relu"] == 0
    assert "share" in toolchain("inspect", path, "--layers", "--time").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["net.onnx", "--dim", "height=3"], "there are: batch"),
        (["net.onnx", "--dim", "batch"], "NAME=SIZE"),
        (["net.onnx", "--dim", "batch=0"], "at least 1"),
        ([".", "--layers"], "layers are looked at in an .onnx file"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], said: str) -> None:
    save(conv_net(), tmp_path / "net.onnx")
    done = toolchain("inspect", *arguments, cwd=tmp_path, check=2)
    assert said in done.stderr
    assert done.stdout == ""
