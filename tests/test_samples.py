"""The samples run as their READMEs say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import runtimes
from toolchain.build import build
from toolchain.cache import Cache
from toolchain.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet-18 with random weights: what the zoo's ResNet-50 is, at a quarter of the time."""
    pytest.importorskip("torch", reason="the zoo needs the export extra")
    folder = tmp_path_factory.mktemp("samples")
    recipe = Recipe(model="resnet18", weights="random", output=str(folder / "resnet18"))
    return build(recipe.override(benchmark__count=5, benchmark__duration_s=0.0), cache=Cache(folder / "cache")).path


def test_01_classifies_a_picture(artifact: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    image.fromarray(pixels).save(tmp_path / "cat.png")
    done = subprocess.run(
        [sys.executable, SAMPLES / "01_resnet50" / "classify.py", artifact, tmp_path / "cat.png"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[0] == "cat.png"
    odds = [float(re.match(r"\s+([\d.]+) %", line)[1]) for line in lines[1:]]  # type: ignore[index]
    assert len(odds) == 5
    assert odds == sorted(odds, reverse=True)
    assert "random" in done.stderr  # the weights were, and it says so


def test_02_serves_many_threads_with_the_right_answers(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SAMPLES / "02_embed_in_a_service"))
    import service

    server = service.serve(str(artifact), 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    inputs = [np.random.default_rng(n).normal(size=(1, 3, 224, 224)).astype(np.float32) for n in range(6)]
    answers: list[list[float] | None] = [None] * len(inputs)

    def ask(number: int) -> None:
        request = urllib.request.Request(f"{address}/run", data=inputs[number].tobytes())
        with urllib.request.urlopen(request) as reply:
            answers[number] = json.load(reply)["output"]

    try:
        askers = [threading.Thread(target=ask, args=(n,)) for n in range(len(inputs))]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        with runtimes.load(artifact) as session:
            for given, got in zip(inputs, answers, strict=True):
                np.testing.assert_allclose(got, session.run({"pixel_values": given})["logits"][0], rtol=1e-5)
        with urllib.request.urlopen(f"{address}/model") as reply:
            assert "pixel_values: float32[batch, 3, 224, 224]" in json.load(reply)["inputs"]
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(f"{address}/run", data=b"short"))
        assert caught.value.code == 400
        assert "602112" in caught.value.read().decode()
    finally:
        server.shutdown()
        server.server_close()


def test_04_prunes_recovers_and_quantises(assets: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="pictures need Pillow")
    sample = SAMPLES / "04_prune_and_quantize"
    model = assets / "models" / "cifar10-resnets" / "cifar_resnet56.onnx"
    shutil.copytree(sample, tmp_path, dirs_exist_ok=True)
    (commands,) = re.findall(r"^```\n(.*?)^```", (sample / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    environment = {**os.environ, "ASSETS": str(assets), "PYTHONPATH": str(ROOT)}
    lines = [line for line in commands.splitlines() if line.startswith("toolchain ")]
    assert len(lines) == 2
    (tmp_path / model.name).write_bytes(model.read_bytes())
    for line in lines:
        command = [sys.executable, "-m", *line.split()]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    report = json.loads((tmp_path / "artifacts" / "resnet56-small" / "report.json").read_text())
    assert report["prune"]["macs"][1] <= 0.5 * report["prune"]["macs"][0]
    assert report["prune"]["recovery"] == ["least squares"]
    assert report["prune"]["drop"] < report["prune"]["drop_cut"]
    (variant,) = report["variants"]
    assert variant["precision"] == "int8"
    # half the multiply-accumulates, no training: far above the 10 % of chance, and the export's own accuracy beside it
    assert variant["accuracy"]["top1"] > 0.6
    assert variant["accuracy"]["reference_top1"] > 0.92


def test_07_serves_asks_and_switches_versions(artifact: Path) -> None:
    pytest.importorskip("fastapi", reason="serving needs the serve extra")
    pytest.importorskip("tritonclient.grpc", reason="serving needs the serve extra")
    done = subprocess.run(
        [sys.executable, SAMPLES / "07_serve_and_ask" / "ask.py", artifact], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "gRPC: version 1 of resnet18: {'logits': [1, 1000]}"
    assert lines[1].startswith("HTTP: version 1:")
    asked = int(re.search(r"not one of the (\d+) requests", lines[2])[1])  # type: ignore[index]
    counts = [re.fullmatch(r'nv_\w+{model="resnet18",version="(\d)"} (\d+)', line) for line in lines[3:]]
    assert [match.groups() for match in counts if match] == [("1", str(asked + 2)), ("2", "1")]
    assert "failed" not in done.stderr
