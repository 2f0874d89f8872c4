"""What README.md says can be typed in, and does what it says."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(command: list[str], cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the README's names exist: an artifact, a model, labelled images."""
    pytest.importorskip("torch", reason="the zoo needs the export extra")
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for index in range(2):
        (folder / "images" / str(index)).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 255, (260, 300, 3), dtype=np.uint8)
            image.fromarray(pixels).save(folder / "images" / str(index) / f"{number}.png")
    run([sys.executable, "-m", "toolchain", "build", "resnet50", "--weights", "random"], folder)
    (folder / "path" / "to").mkdir(parents=True)
    exported = folder / "artifacts" / "resnet50" / "export" / "model.onnx"
    (folder / "model.onnx").write_bytes(exported.read_bytes())
    (folder / "path" / "to" / "model.onnx").write_bytes(exported.read_bytes())
    return folder


def test_the_python_block_runs(workplace: Path) -> None:
    (code,) = blocks("python")
    said = run([sys.executable, "-c", code], workplace)
    assert "pixel_values" in said
    assert "(1, 1000)" in said


def test_the_toolchain_commands_run(workplace: Path) -> None:
    """Every line, in order; the benchmark is told to be brief, which changes how long it takes and nothing else."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("toolchain ")]
    assert len(lines) >= 9
    for line in lines:
        if "tensorrt-rtx" in line and importlib.util.find_spec("tensorrt_rtx") is None:
            continue  # an extra that make installs and a bare environment need not have
        command, _, target = line.split("#")[0].partition(">")
        words = shlex.split(command)[1:]
        if words[0] == "bench":
            words += ["--count", "3", "--duration", "0", "--warmup", "1"]
        if words[0] == "serve":
            serve_and_end(words, workplace)
            continue
        said = run([sys.executable, "-m", "toolchain", *words], workplace)
        if target:
            (workplace / target.strip()).write_text(said)
        assert said


def serve_and_end(words: list[str], workplace: Path) -> None:
    """Serves until models are ready, on ports that are free, and ends it as a service manager does."""
    pytest.importorskip("fastapi")
    ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
    server = subprocess.Popen(
        [sys.executable, "-m", "toolchain", *words, *ports], cwd=workplace, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert server.stdout is not None
        assert any(line.startswith("model") and "ready" in line for line in server.stdout)
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()


def test_the_make_commands_are_the_makefiles() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")]
    assert lines
    for line in lines:
        said = run(["make", "-n", *shlex.split(line.split("#")[0])[1:]], ROOT)
        if "engine" in line:
            assert "toolchain build" in said
        if "EVAL" in line:
            assert "--eval-data" in said


def test_the_tree_is_true() -> None:
    named = re.findall(r"^([a-z]+)/  ", README, re.MULTILINE)
    assert set(named) == {
        p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".") and (ROOT / p).name not in IGNORED
    }


IGNORED = {"artifacts", "build", "dist", "__pycache__", "onnx_toolchain.egg-info"}


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
