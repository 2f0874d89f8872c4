"""The wheel on a device: numpy, onnxruntime, what that itself asks for, and nothing that builds models."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import numpy as np
import onnx
import pytest

import runtimes
from toolchain.build import build
from toolchain.bundle import bundle
from toolchain.cache import Cache
from toolchain.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
#: What builds models, and may not be on a device.
BUILDERS = ("onnx", "onnx_ir", "onnxscript", "onnxsim", "torch", "ml_dtypes", "pydantic", "typer", "rich", "yaml")


def requirements(distribution: str) -> set[str]:
    """The distributions that one and all that it asks for ask for, itself among them, extras left out."""
    found: set[str] = set()
    pending = [distribution]
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            if "extra ==" not in line:
                pending.append(re.match(r"[A-Za-z0-9._-]+", line)[0])  # type: ignore[index]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves its traces where it builds, and takes up those of older builds."""
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("setuptools: older than 77, and another would have to come from the network")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("toolchain", "passes", "runtimes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds numpy and onnxruntime and into which pip installed ``[runtime]``.

    The two are those of this environment, linked in; pip may take nothing from anywhere, so it fails where the extra
    asks for more than is there.
    """
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    for name in requirements("onnxruntime") | requirements("numpy"):
        for file in importlib.metadata.files(name) or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (packages / top).exists():
                (packages / top).symlink_to(Path(str(file.locate())).parents[len(file.parts) - 1] / top)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", f"{wheel}[runtime]"],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return python


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 19]> g (float[N, 4] x) => (float[N, 4] y) { h = Sigmoid(x) y = Neg(h) }'
    )
    onnx.save(model, folder / "net.onnx")
    recipe = Recipe(model=str(folder / "net.onnx")).override(
        benchmark__count=3, benchmark__duration_s=0.0, output=str(folder / "art"), targets=["ort-cpu", "reference"]
    )
    return build(recipe, cache=Cache(folder / "cache")).path


def run(python: Path, *arguments: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the bare Python far from the checkout; -I keeps PYTHONPATH and the folder out of it."""
    command = [str(python), "-I", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_the_extra_is_numpy_and_onnxruntime(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    always = [re.match(r"[a-z-]+", line)[0] for line in project["dependencies"]]  # type: ignore[index]
    runtime = [re.match(r"[a-z-]+", line)[0] for line in project["optional-dependencies"]["runtime"]]  # type: ignore[index]
    assert (always, runtime) == (["numpy"], ["onnxruntime"])
    assert requirements("onnxruntime") == {"onnxruntime", "numpy", "flatbuffers", "packaging", "protobuf"}
    assert wheel.stat().st_size < 2e6


def test_the_environment_is_bare(bare: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.metadata as m, importlib.util as u, json\n"
        "print(json.dumps([sorted(d.metadata['Name'].lower() for d in m.distributions()),"
        f" [n for n in {BUILDERS!r} if u.find_spec(n)], u.find_spec('runtimes').origin]))"
    )
    installed, builders, origin = json.loads(run(bare, "-c", code, cwd=tmp_path).stdout)
    assert installed == ["flatbuffers", "numpy", "onnx-toolchain", "onnxruntime", "packaging", "protobuf"]
    assert builders == []
    assert str(bare.parent.parent) in origin  # not the checkout


def test_an_artifact_runs_there_and_gives_the_same(bare: Path, artifact: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    done = run(bare, "-m", "runtimes", "run", artifact, "--input", "x.npy", "--output", "y.npy", cwd=tmp_path)
    assert done.stderr == ""
    with runtimes.load(artifact) as session:
        np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), session.run({"x": x})["y"])
    code = (
        f"import sys, runtimes\nruntimes.load({str(artifact)!r}).bind({{'x': (1, 4)}}).run()\n"
        f"print([n for n in {BUILDERS!r} if n in sys.modules])"
    )
    assert run(bare, "-c", code, cwd=tmp_path).stdout == "[]\n"


def test_every_module_of_runtimes_imports_there(bare: Path, tmp_path: Path) -> None:
    """But what checks backends, which needs pytest."""
    names = [p.stem for p in (ROOT / "runtimes").glob("*.py") if "testing" not in p.stem and p.stem != "__main__"]
    run(bare, "-c", f"import importlib\nfor n in {names!r}: importlib.import_module('runtimes.' + n)", cwd=tmp_path)


def test_doctor_says_what_runs_there_and_why_not(bare: Path, artifact: Path, tmp_path: Path) -> None:
    said = run(bare, "-m", "runtimes", "doctor", artifact, cwd=tmp_path).stdout
    lines = {line.split()[0]: line for line in said.splitlines() if line and not line.startswith(" ")}
    assert lines["ort-cpu-fp32"].split()[1:4] == ["yes", "ort-cpu", "fp32"]
    assert "prepared/model.onnx" in lines["ort-cpu-fp32"]
    assert lines["reference-fp32"].split()[1:4] == ["no", "reference", "fp32"]
    assert "onnx is not installed" in lines["reference-fp32"]
    assert "pip install onnx" in said
    assert "the first that runs here: ort-cpu-fp32" in said
    machine = run(bare, "-m", "runtimes", "doctor", cwd=tmp_path).stdout
    assert re.search(r"^ort-cpu +yes +version", machine, re.MULTILINE)
    assert re.search(r"^openvino-cpu +no +openvino is not installed", machine, re.MULTILINE)


def test_doctor_loads_what_it_calls_good(bare: Path, artifact: Path, tmp_path: Path) -> None:
    """One flipped bit in the file that would be loaded: the runtime is here, and the variant does not run."""
    root = tmp_path / "art"
    shutil.copytree(artifact, root)
    model = root / "ort-cpu-fp32" / "prepared" / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    said = run(bare, "-m", "runtimes", "doctor", root, cwd=tmp_path, code=1).stdout
    assert re.search(r"^ort-cpu-fp32 +no .*ort-cpu-fp32/prepared/model.onnx", said, re.MULTILINE), said
    assert "nothing of it runs here" in said
    model.unlink()
    assert "not there" in run(bare, "-m", "runtimes", "doctor", root, cwd=tmp_path, code=2).stderr


def test_doctor_looks_into_a_bundle(bare: Path, artifact: Path, tmp_path: Path) -> None:
    """The manifest comes first in a bundle, and is all that is read."""
    root = tmp_path / "art"
    shutil.copytree(artifact, root)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["additional_metadata"]["toolchain"].setdefault("selftest", {"cases": 0, "variants": {}})
    (root / "manifest.json").write_text(json.dumps(manifest))
    bundle(root, tmp_path / "net.tar", platform="linux-x86_64", with_ort_format=False)
    said = run(bare, "-m", "runtimes", "doctor", "net.tar", cwd=tmp_path).stdout
    assert re.search(r"^ort-cpu-fp32 +yes +ort-cpu +fp32 +version", said, re.MULTILINE), said
    (tmp_path / "some.zip").write_bytes(b"PK\x03\x04" + bytes(2000))
    assert run(bare, "-m", "runtimes", "doctor", "some.zip", cwd=tmp_path, code=2).stderr.startswith("error: ")


def test_the_toolchain_says_what_it_lacks(bare: Path, tmp_path: Path) -> None:
    done = run(bare, "-m", "toolchain", "doctor", cwd=tmp_path, code=2)
    said = done.stderr.splitlines()
    assert len(said) == 2
    # Which of the packages is missed first is no matter of anybody's.
    assert re.fullmatch(r"error: \w+ is not installed: what runs artifacts is here, what builds them is not", said[0])
    assert said[1] == "  next: pip install 'onnx-toolchain[build]'"
