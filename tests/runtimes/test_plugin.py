"""The sample of a backend in a distribution of its own: installed as a stranger would, it keeps the contract."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "03_your_own_backend"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables with which the installed sample is found, and ours beside it."""
    pytest.importorskip("setuptools", reason="the sample is built with setuptools")
    folder = tmp_path_factory.mktemp("plugin")
    source = folder / "source"
    source.mkdir()
    for file in SAMPLE.iterdir():  # a build leaves folders beside the source
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run(
        [*install, "--disable-pip-version-check", "--target", folder / "site", source],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(ROOT)])}


def test_it_is_small() -> None:
    assert len((SAMPLE / "ort_serial.py").read_text().splitlines()) < 60


def test_it_is_listed_and_runs(environment: dict[str, str], tmp_path: Path) -> None:
    code = """
import dataclasses, json, runtimes
from pathlib import Path
from runtimes.testing import save_model
state = runtimes.available()["ort-serial"]
try:
    runtimes.backend("ort-seral")
except runtimes.InvalidInput as error:
    said = str(error)
file = save_model(Path("m.onnx"), "g (float[N] x) => (float[N] y) { y = Relu(x) }")
session = runtimes.load(file, target="ort-serial", options={"arena": False})
print(json.dumps([dataclasses.asdict(state), said, dict(session.info)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    state, said, info = json.loads(done.stdout)
    assert state["available"]
    assert "did you mean ort-serial" in said
    assert (info["target"], info["intra_op_threads"]) == ("ort-serial", "1")


def test_it_keeps_the_contract(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", SAMPLE / "test_ort_serial.py"],
        env=environment, cwd=SAMPLE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def test_what_a_runtime_cannot_do_is_held_true(environment: dict[str, str], tmp_path: Path) -> None:
    """An entry that it has learned meanwhile fails, one that names no test fails, a true one is expected."""
    (tmp_path / "test_mine.py").write_text(
        "from runtimes.testing import RuntimeContract\n"
        "class TestMine(RuntimeContract):\n"
        "    target, duration_s, cycles = 'ort-serial', 0.1, 10\n"
        "    cannot = {'scalar': 'it can', 'no_such_test': 'a typing error', 'closed': 'see below'}\n"
        "    def test_closed(self, load):\n"
        "        assert load('g (float[N] x) => (float[N] y) { y = Relu(x) }') is None\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "2 failed" in done.stdout, done.stdout
    assert "1 xfailed" in done.stdout
    assert "test_case[scalar]" in done.stdout
    assert "cannot names what is no test: no_such_test" in done.stdout


def test_an_absent_runtime_is_skipped_by_name(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'onnxruntime' else find(name, *a)\n"
        "from runtimes.testing import RuntimeContract\n"
        "class TestMine(RuntimeContract):\n"
        "    target = 'ort-serial'\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "test_mine.py"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "ort-serial: onnxruntime is not installed" in done.stdout
    assert "passed" not in done.stdout
