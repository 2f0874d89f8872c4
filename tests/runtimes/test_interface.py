"""What ``import runtimes`` offers and costs, the table of backends, entry points, and the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from runtime_support import save_model, variant_body, write_package

import runtimes
from runtimes.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PAIR = "g (float[N, 3] a, float[N, 3] b) => (float[N, 3] y, float[N, 3] z) { y = Add(a, b)  z = Sub(a, b) }"
RELU = "g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }"


def in_child(code: str) -> str:
    """Runs code in a fresh interpreter and returns what it prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_all_is_sorted_and_whole() -> None:
    assert runtimes.__all__ == sorted(runtimes.__all__)
    assert all(hasattr(runtimes, name) for name in runtimes.__all__)
    public = {
        name
        for name, value in vars(runtimes).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("runtimes")
    }
    assert public == set(runtimes.__all__)


def test_errors_are_one_tree() -> None:
    for name in runtimes.__all__:
        value = getattr(runtimes, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, runtimes.Error)


def test_import_is_cheap() -> None:
    heavy = "{'onnx', 'onnx_ir', 'onnxruntime', 'torch', 'google', 'importlib.metadata', 'difflib', 'hashlib'}"
    code = "import numpy, sys; before = set(sys.modules); import runtimes; "
    code += f"print(sorted({heavy} & (set(sys.modules) - before)))"
    assert in_child(code).strip() == "[]"


def test_a_session_needs_numpy_and_one_runtime_only(tmp_path: Path) -> None:
    """The whole way from a package to a result, where onnx, onnx_ir, torch and ml_dtypes do not exist."""
    root = tmp_path / "artifact"
    save_model(root / "v" / "model.onnx", RELU)
    write_package(root, {"v": variant_body("v")})
    code = f"""
import sys
for name in ("onnx", "onnx_ir", "onnxscript", "torch", "ml_dtypes", "yaml", "pydantic"):
    sys.modules[name] = None
import numpy, runtimes
session = runtimes.load({str(root)!r})
print(session.run({{"x": numpy.full((1, 3), 2, "float32")}})["y"].tolist())
print(session.bind({{"x": (1, 3)}}).outputs["y"].shape)
print(sorted(name for name in sys.modules if name.split(".")[0] in ("toolchain", "passes")))
"""
    assert in_child(code) == "[[2.0, 2.0, 2.0]]\n(1, 3)\n[]\n"


def test_every_backend_is_listed_and_probed() -> None:
    states = runtimes.available()
    assert {"ort-cpu", "openvino-cpu", "reference"} <= set(states)
    for name, state in states.items():
        assert state.available or (state.reason and "\n" not in state.reason), name
        assert not state.available or state.version


def test_a_backend_says_what_is_missing(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["onnxruntime"] = None
import runtimes, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in ("onnxruntime", "onnx") else find(name)
states = runtimes.available()
for name in ("ort-cpu", "reference"):
    print(name, states[name].available, states[name].reason, "|", states[name].remedy)
try:
    runtimes.load(sys.argv[0] or "x.onnx")
except runtimes.TargetUnavailable as error:
    print(error)
"""
    assert in_child(code).splitlines() == [
        "ort-cpu False onnxruntime is not installed | pip install onnxruntime",
        "reference False onnx is not installed | pip install onnx",
        "ort-cpu cannot run here: onnxruntime is not installed",
        "  next: run: pip install onnxruntime",
    ]


def test_a_broken_onnxruntime_is_told(tmp_path: Path) -> None:
    """What pip leaves behind when onnxruntime and onnxruntime-gpu were installed over each other."""
    (tmp_path / "onnxruntime").mkdir()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    code += "import runtimes; s = runtimes.backend('ort-cpu').probe(); print(s.available, s.reason, s.remedy)"
    # A folder without code is a namespace package: it loses to a real one, so the real one is hidden.
    hide = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; "
    hide += f"sys.path += [{str(Path(np.__file__).parent.parent)!r}]; "
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('libcudart.so.13: no such file')")
    said = in_child(hide + code)
    assert said.startswith("False onnxruntime does not import: libcudart.so.13")
    assert "--force-reinstall" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ort_cpu", "did you mean ort-cpu"),
        ("referense", "did you mean reference"),
        ("zzz", "known: .*ort-cpu.*, reference"),
        ("openvino", "did you mean openvino-cpu"),
        ("ort-cpu-2", "did you mean ort-cpu"),
    ],
)
def test_unknown_backends(name: str, said: str) -> None:
    with pytest.raises(runtimes.InvalidInput, match=said):
        runtimes.backend(name)


def test_entry_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A distribution adds a backend; it cannot take over a name of ours, and a broken one breaks only itself."""
    ours = runtimes.backend("reference")

    def fails() -> Any:
        raise SyntaxError("their code")

    theirs = {
        "theirs": SimpleNamespace(name="theirs", value="their.module", load=lambda: ours),
        "reference": SimpleNamespace(name="reference", value="evil", load=fails),
        "broken": SimpleNamespace(name="broken", value="broken.module", load=fails),
        "other": SimpleNamespace(name="other", value="other.module", load=lambda: object()),
    }
    monkeypatch.setattr(runtimes, "_entry_points", lambda: theirs)
    assert runtimes.backend("theirs") is ours
    assert runtimes.backend("reference") is ours
    with pytest.raises(runtimes.TargetUnavailable, match="'broken' does not import: their code"):
        runtimes.backend("broken")
    with pytest.raises(runtimes.TargetUnavailable, match=r"no runtimes\.Backend"):
        runtimes.backend("other")
    session = runtimes.load(save_model(tmp_path / "m.onnx", RELU), target="theirs")
    assert session.target == runtimes.Target("theirs")


def test_a_model_file_has_no_variants(tmp_path: Path) -> None:
    with pytest.raises(runtimes.InvalidInput, match="no variants"):
        runtimes.load(save_model(tmp_path / "m.onnx", RELU), variant="x")


# --- python -m runtimes


def test_run_with_one_input(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m.onnx", RELU)
    np.save(tmp_path / "x.npy", np.array([[1, -2, 3]], "float32"))
    assert main(["run", str(model), "--input", f"{tmp_path}/x.npy", "--output", f"{tmp_path}/y.npy"]) == 0
    assert np.load(tmp_path / "y.npy").tolist() == [[1, 0, 3]]


def test_run_with_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "m.onnx", PAIR)
    one = np.ones((1, 3), "float32")
    np.save(tmp_path / "a.npy", one)
    np.savez(tmp_path / "b.npz", b=one * 2)
    inputs = ["--input", f"a={tmp_path}/a.npy", "--input", f"{tmp_path}/b.npz"]
    assert main(["run", str(model), *inputs, "--output", f"{tmp_path}/out.npz", "--target", "reference"]) == 0
    outputs = np.load(tmp_path / "out.npz")
    assert (outputs["y"].tolist(), outputs["z"].tolist()) == ([[3] * 3], [[-1] * 3])
    assert main(["run", str(model), *inputs]) == 0
    assert "y: float32[1, 3]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("inputs", "output", "said"),
    [
        (["{}/a.npy"], None, "several inputs"),
        (["a={}/none.npy"], None, "No such file"),
        (["a={}/m.onnx"], None, "not a .npy or .npz file"),
        (["a={}/a.npy"], None, "no 'b'"),
        (["a={}/a.npy", "b={}/a.npy"], "{}/y.npy", "2 outputs, an .npy holds one"),
        (["a={}/a.npy", "b={}/a.npy"], "{}/y.txt", "written as .npy or .npz"),
        (["a={}/pickle.npy", "b={}/a.npy"], None, "not a .npy or .npz file"),
        (["a={}/cut.npz", "b={}/a.npy"], None, "not a .npy or .npz file"),
        (["a={}/a.npy", "a={}/a.npy"], None, "'a' is given twice"),
        (["a={}/none.npy"], "{}/none/y.npz", "there is no such folder"),
        (["a={}/a.npy", "b={}/a.npy"], "{}/folder.npz", "cannot be written: Is a directory"),
    ],
)
def test_run_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inputs: list[str], output: str | None, said: str
) -> None:
    model = save_model(tmp_path / "m.onnx", PAIR)
    np.save(tmp_path / "a.npy", np.ones((1, 3), "float32"))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04" + bytes(40))
    (tmp_path / "folder.npz").mkdir()
    before = sorted(tmp_path.iterdir())
    arguments = ["run", str(model)]
    for text in inputs:
        arguments += ["--input", text.format(tmp_path)]
    if output:
        arguments += ["--output", output.format(tmp_path)]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "\n  next: " in told
    assert "pickle" not in told.replace("pickle.npy", ""), "no advice to load it unsafely"
    assert sorted(tmp_path.iterdir()) == before


def test_ctrl_c_and_a_reader_that_goes_away_end_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "artifact"
    save_model(root / "v" / "model.onnx", RELU)
    write_package(root, {"v": variant_body("v")})
    line = [sys.executable, "-c", "from runtimes.__main__ import main; raise SystemExit(main())", "info", str(root)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 0

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runtimes, "load", interrupted)
    assert main(["info", str(root)]) == 130
    assert capsys.readouterr().err == "interrupted; nothing half-written was left\n"


def test_info(tmp_path: Path) -> None:
    root = tmp_path / "artifact"
    save_model(root / "v" / "model.onnx", RELU)
    write_package(root, {"v": variant_body("v")})
    said = subprocess.run(
        [sys.executable, "-m", "runtimes", "info", str(root)], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout
    for part in ("variant          v", "x: float32[N, 3]", "tiny 1, sha256", "v: ort-cpu fp32"):
        assert part in said
