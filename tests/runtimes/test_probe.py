"""Which backends work here: asked in processes of their own, so that one that dies is told and not suffered."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import runtimes
from runtimes import _probe
from runtimes._ort import clashing_wheels
from runtimes._probe import probe_apart

_BACKEND = """
import ctypes, os, sys, time
from runtimes.reference import Reference
class Theirs(Reference):
    name = {name!r}
    def probe(self):
        {probe}
BACKEND = Theirs()
"""


@pytest.fixture
def add_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Puts a distribution on sys.path whose one backend has this body in its probe, or this text for a module."""
    monkeypatch.setattr(runtimes, "_states", {})

    def add(name: str, probe: str = "", *, module: str | None = None) -> str:
        folder = tmp_path / name
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[runtimes.backends]\n{name} = {name}_module:BACKEND\n")
        text = _BACKEND.format(name=name, probe=probe) if module is None else module
        (folder / f"{name}_module.py").write_text(text)
        monkeypatch.syspath_prepend(str(folder))
        return name

    return add


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ("ctypes.string_at(0)", r"its probe crashed with signal 11 \(SIGSEGV\)"),
        ("print('loading', file=sys.stderr); os.abort()", r"its probe crashed with signal 6 \(SIGABRT\): loading"),
        ("os._exit(3)", "its probe ended with exit code 3 and no answer"),
        ("os._exit(0)", "its probe ended with exit code 0 and no answer"),
        ("raise ValueError('no\\n\\nway')", "its probe raised ValueError: no way"),
        ("return None", "its probe raised TypeError: .*"),
        ("os.kill(os.getpid(), 64)", "its probe crashed with signal 64.*"),
    ],
)
def test_a_probe_that_ends_badly(add_backend, probe: str, reason: str) -> None:  # type: ignore[no-untyped-def]
    name = add_backend("theirs", probe)
    state = runtimes.available()[name]
    assert not state.available
    import re

    assert re.fullmatch(reason, state.reason or ""), state.reason
    assert runtimes.available()["reference"].available


def test_an_import_that_dies(add_backend) -> None:  # type: ignore[no-untyped-def]
    """The module itself is the others' code too: it may not even be imported here."""
    name = add_backend("dies", module="import os; os.abort()")
    assert runtimes.available()[name].reason == "its probe crashed with signal 6 (SIGABRT)"


def test_an_import_that_fails(add_backend) -> None:  # type: ignore[no-untyped-def]
    name = add_backend("broken", module="raise ImportError('libfoo.so: not there')")
    assert runtimes.available()[name].reason == "the backend 'broken' does not import: libfoo.so: not there"


def test_what_a_library_prints_is_no_answer(add_backend, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    name = add_backend("noisy", "os.write(1, b'{}' * 10_000); print('hello'); return super().probe()")
    state = runtimes.available()[name]
    assert state == runtimes.Availability(True, version=importlib.metadata.version("onnx"))
    assert capfd.readouterr() == ("", "")


def test_one_that_hangs_does_not_keep_the_others(add_backend) -> None:  # type: ignore[no-untyped-def]
    name = add_backend("hangs", "time.sleep(600)")
    states = probe_apart([name, "reference"], timeout_s=3)
    assert states[name].reason == "its probe did not answer within 3 s"
    assert states["reference"].available


def test_answers_are_remembered_until_asked_again(add_backend, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    flag = tmp_path / "flag"
    name = add_backend("moody", f"return super().probe() if os.path.exists({str(flag)!r}) else os.abort()")
    assert not runtimes.available()[name].available
    flag.touch()
    assert not runtimes.available()[name].available
    assert runtimes.available(refresh=True)[name].available


def test_what_is_not_installed_costs_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "_states", {})
    monkeypatch.setattr(_probe.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(_probe, "probe_apart", lambda names: {name: runtimes.Availability(True) for name in names})
    states = runtimes.available()
    assert states["openvino-cpu"] == runtimes.Availability(
        False, reason="openvino is not installed", remedy="pip install openvino"
    )


def test_the_users_folder_is_not_imported_from(tmp_path: Path) -> None:
    """A json.py beside the user's script is no business of a probe."""
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    (tmp_path / "onnx.py").write_text("raise SystemExit('the wrong onnx')")
    code = "import runtimes; print(runtimes.available()['reference'].available)"
    home = str(Path(runtimes.__file__).parent.parent)
    code = f"import sys; sys.path.append({home!r}); import json as _; {code}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, check=True
    )
    assert done.stdout == "True\n"


# --- two wheels of ONNX Runtime


def _site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").touch()
    for name in names:
        (tmp_path / f"{name}.dist-info").mkdir()
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_two_wheels_over_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _site(tmp_path, monkeypatch, "onnxruntime-1.31.1", "onnxruntime_gpu-1.30.0", "onnxruntime_extensions-0.14")
    state = runtimes.backend("ort-cpu").probe()
    assert not state.available
    assert state.reason == (
        "onnxruntime 1.31.1 and onnxruntime-gpu 1.30.0 are both installed and overwrite each other's files"
    )
    assert state.remedy == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime"
    clash = clashing_wheels("onnxruntime-gpu")
    assert clash is not None
    assert (clash.remedy or "").endswith("pip install onnxruntime-gpu")
    with pytest.raises(runtimes.TargetUnavailable, match="both installed"):
        runtimes.load(tmp_path / "x.onnx")


@pytest.mark.parametrize(
    "names",
    [
        ["onnxruntime-1.31.1"],
        ["onnxruntime_gpu-1.31.1"],
        ["onnxruntime-1.31.1", "onnxruntime_extensions-0.14.0", "onnxruntime_genai-0.9.0"],
        [],
    ],
)
def test_one_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    _site(tmp_path, monkeypatch, *names)
    assert clashing_wheels("onnxruntime") is None
