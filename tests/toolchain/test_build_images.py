"""INT8 from a bare .onnx and a folder of images: the user says how an image becomes the input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from toolchain_support import conv_net, save, toolchain, toolchain_json

from runtimes import package
from toolchain.preprocessing import ImagePreprocessing


def test_int8_from_a_bare_onnx_and_a_folder_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    save(conv_net(channels=32), tmp_path / "net.onnx")
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    command = ("build", "net.onnx", "--precision", "int8", "--data", "images")
    refused = toolchain(*command, cwd=tmp_path, check=2).stderr
    assert "--preprocessing" in refused
    assert "data.preprocessing" in refused
    spec = ImagePreprocessing(size=(16, 16), resize=16, crop="center")
    (tmp_path / "p.json").write_text(json.dumps(spec.to_json()))
    # images of 0 to 1: an artifact verified on anything but samples would be beyond its bound
    found = toolchain_json(*command, "--preprocessing", "p.json", cwd=tmp_path)
    assert found["report"]["variants"][0]["fidelity"]["inputs"] == "calibration data"
    manifest = package.read_package(tmp_path / "artifacts" / "net").metadata
    assert manifest["preprocessing"] == spec.to_json()
    assert manifest["recipe"]["data"]["preprocessing"] == "p.json"
    # the file's content counts, not its name
    (tmp_path / "p.json").write_text(json.dumps({**spec.to_json(), "rescale": 0.5 / 255}))
    toolchain(*command, "--preprocessing", "p.json", cwd=tmp_path)
    again = package.read_package(tmp_path / "artifacts" / "net").metadata
    assert again["preprocessing"]["rescale"] == 0.5 / 255
    assert again["build_key"] != manifest["build_key"]
    # the artifact knows it from there on; without labels outputs are compared, and no accuracy
    assert toolchain_json("verify", "artifacts/net", "--eval-data", "images", cwd=tmp_path)["accuracy"] is None
    bare = ("verify", "net.onnx", "--against", "net.onnx", "--eval-data", "images")
    assert "--preprocessing" in toolchain(*bare, cwd=tmp_path, check=2).stderr
    toolchain(*bare, "--preprocessing", "p.json", cwd=tmp_path)
