"""Which machines engines are built for and run on, and what is checked before one is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runtime_support import save_model, variant_body, write_package
from tensorrt_support import (
    ADA,
    AMPERE,
    FIXED,
    HOPPER,
    RELU,
    RTX,
    TURING,
    catch_sessions,
    compile_text,
    on_machine,
    require_rtx,
)

import runtimes
from runtimes import Target, tensorrt_engine
from runtimes._tensorrt_api import FLAVORS, Api, find_api
from runtimes.base import Availability


@pytest.fixture(autouse=True)
def _rtx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_rtx()
    monkeypatch.setenv("TOOLCHAIN_CACHE", str(tmp_path / "cache"))


def here() -> Api:
    api = find_api("tensorrt-rtx")
    assert not isinstance(api, Availability)
    return api


# ---------------------------------------------------------------- targets and machines


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("tensorrt-rtx:sm99", ("no 'sm99'", "did you mean", "sm89", "sm120")),
        ("tensorrt-rtx:sm86,ada", ("no 'ada'", "sm75")),
        ("tensorrt:sm89", ("builds on the GPU that is to run it, not for sm89",)),
    ],
)
def test_devices_that_cannot_be_built_for(tmp_path: Path, target: str, words: tuple[str, ...]) -> None:
    parsed = Target.parse(target)
    chosen = runtimes.backend(parsed.runtime)
    state = chosen.can_compile(parsed)
    assert not state.available
    assert all(word in (state.reason or "") for word in words)
    assert chosen.can_run(parsed).reason == state.reason
    with pytest.raises(runtimes.TargetUnavailable) as caught:
        compile_text(tmp_path, FIXED, target)
    assert caught.value.what == state.reason
    assert caught.value.hint


def test_without_a_driver_it_compiles_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch)
    for target in (Target("tensorrt-rtx"), Target("tensorrt-rtx", "sm89")):
        assert RTX.can_compile(target).available
        assert "there is no NVIDIA driver" in (RTX.can_run(target).reason or "")
    numbered = Target("tensorrt-rtx", "0")
    assert "there is no NVIDIA driver" in (RTX.can_compile(numbered).reason or "")
    assert not RTX.probe().available
    compiled = compile_text(tmp_path, FIXED)
    taken = catch_sessions(monkeypatch)
    with pytest.raises(runtimes.TargetUnavailable, match="no NVIDIA driver"):
        RTX.load(compiled)
    assert not taken


def test_a_driver_that_is_too_old_is_told_with_both_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_text(tmp_path, FIXED)
    if here().cuda is None:
        pytest.skip("tensorrt-rtx: the package does not say its CUDA")
    on_machine(monkeypatch, ADA, cuda=(12, 4))
    taken = catch_sessions(monkeypatch)
    with pytest.raises(runtimes.TargetUnavailable) as caught:
        RTX.load(compiled)
    for said in (RTX.can_run(compiled.target).reason or "", caught.value.what):
        assert "12.4" in said
        assert str(here().cuda) in said
    assert not taken


@pytest.mark.parametrize(
    ("target", "gpu", "runs"),
    [
        ("tensorrt-rtx:sm86,sm89", ADA, True),
        ("tensorrt-rtx:sm86,sm89", AMPERE, True),
        ("tensorrt-rtx:sm86,sm89", HOPPER, False),
        ("tensorrt-rtx:sm86,sm89", TURING, False),
        ("tensorrt-rtx", HOPPER, True),
        ("tensorrt-rtx", TURING, False),
        ("tensorrt-rtx:sm75", TURING, True),
    ],
)
def test_another_gpu_is_told_with_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, gpu: Any, runs: bool
) -> None:
    compiled = compile_text(tmp_path, FIXED, target)
    on_machine(monkeypatch, gpu)
    taken = catch_sessions(monkeypatch)
    assert RTX.can_run(compiled.target).available == runs
    if runs:
        assert RTX.load(compiled) == "a session"
        return
    with pytest.raises(runtimes.TargetUnavailable) as caught:
        RTX.load(compiled)
    assert compiled.fingerprint["compute_capabilities"] in caught.value.what
    assert gpu.capability_text in caught.value.what
    assert gpu.name in caught.value.what
    assert not taken


def test_a_gpu_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch, ADA, AMPERE)
    assert RTX.can_run(Target("tensorrt-rtx", "1")).available
    missing = RTX.can_run(Target("tensorrt-rtx", "2"))
    assert "no GPU 2" in (missing.reason or "")
    assert RTX.can_compile(Target("tensorrt-rtx", "2")).reason == missing.reason


def test_no_package_to_use_the_gpu_with(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch, ADA)
    monkeypatch.setattr("runtimes._cuda_packages.name", lambda: None)
    state = RTX.can_run(Target("tensorrt-rtx"))
    assert "cuda-bindings" in (state.reason or "")
    assert state.remedy == "pip install cuda-bindings"
    assert RTX.can_compile(Target("tensorrt-rtx")).available


@pytest.mark.parametrize("option", [{"version_compatible": True}, {"hardware_compatibility": "ampere-plus"}])
def test_options_that_rtx_has_no_equivalent_of(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(runtimes.InvalidInput, match=f"no {next(iter(option))}") as caught:
        compile_text(tmp_path, FIXED, **option)
    assert caught.value.hint
    assert not (tmp_path / "engine").exists()


# ---------------------------------------------------------------- loading


def test_what_was_built_here_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_text(tmp_path, RELU)
    on_machine(monkeypatch, ADA)
    taken = catch_sessions(monkeypatch)
    assert RTX.load(compiled) == "a session"
    plan, given = taken[0]
    assert hashlib.sha256(plan).hexdigest() == compiled.fingerprint["plan_sha256"]
    assert given["shapes"] == {"x": ("N", 3), "y": ("N", 3)}
    assert given["info"]["runtime"] == f"tensorrt-rtx {here().version}"
    assert "8.9" in given["info"]["device"]


def test_what_was_built_elsewhere_wants_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_text(tmp_path, FIXED)
    on_machine(monkeypatch, ADA)
    taken = catch_sessions(monkeypatch)
    monkeypatch.setenv("TOOLCHAIN_CACHE", str(tmp_path / "the cache of another machine"))
    with pytest.raises(runtimes.InvalidModel, match="not built on this machine") as caught:
        RTX.load(compiled)
    assert "trust=True" in (caught.value.hint or "")
    assert "runtimes.compile" in (caught.value.hint or "")
    assert not taken
    assert RTX.load(dataclasses.replace(compiled, trusted=True)) == "a session"


def damaged(plan: bytes) -> dict[str, bytes]:
    flipped = bytearray(plan)
    flipped[len(plan) // 2] ^= 1
    return {"cut": plan[:-1], "empty": b"", "longer": plan + b"\0", "flipped": bytes(flipped)}


@pytest.mark.parametrize("how", ["cut", "empty", "longer", "flipped"])
@pytest.mark.parametrize("trusted", [False, True])
def test_a_damaged_plan_reaches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, trusted: bool
) -> None:
    compiled = dataclasses.replace(compile_text(tmp_path, FIXED), trusted=trusted)
    file = compiled.directory / "prepared/model.plan"
    file.write_bytes(damaged(file.read_bytes())[how])
    on_machine(monkeypatch, ADA)
    taken = catch_sessions(monkeypatch)
    with pytest.raises(runtimes.InvalidModel, match="the engine is damaged") as caught:
        RTX.load(compiled)
    assert caught.value.where == str(file)
    assert not taken


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
def test_a_plan_that_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    compiled = compile_text(tmp_path, FIXED)
    file = compiled.directory / "prepared/model.plan"
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    with pytest.raises(runtimes.InvalidModel):
        RTX.load(compiled)


@pytest.mark.parametrize(
    ("field", "value"),
    [("flavor", "tensorrt"), ("version", "1.6.0.1"), ("machine", "aarch64"), ("version", "")],
)
def test_another_tensorrt_is_told_with_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: str
) -> None:
    compiled = compile_text(tmp_path, FIXED, optimization_level=1)
    other = dataclasses.replace(compiled, fingerprint={**compiled.fingerprint, field: value}, trusted=True)
    on_machine(monkeypatch, ADA)
    taken = catch_sessions(monkeypatch)
    with pytest.raises(runtimes.TargetUnavailable) as caught:
        RTX.load(other)
    assert field in caught.value.what
    assert repr(value) in caught.value.what
    assert repr(compiled.fingerprint[field]) in caught.value.what
    assert '"optimization_level": 1' in (caught.value.hint or "")
    assert str(compiled.directory / "model.onnx") in (caught.value.hint or "")
    assert not taken


def test_rtx_engines_travel_between_linux_and_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_text(tmp_path, FIXED)
    on_machine(monkeypatch, ADA)
    catch_sessions(monkeypatch)
    other = dataclasses.replace(compiled, fingerprint={**compiled.fingerprint, "os": "win32", "machine": "AMD64"})
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert RTX.load(other) == "a session"


def test_a_rebuild_command_rebuilds(tmp_path: Path) -> None:
    compiled = compile_text(tmp_path, RELU, profiles=[{"N": [1, 2, 4]}], refit=True)
    other = dataclasses.replace(compiled, fingerprint={**compiled.fingerprint, "version": "1.0"})
    with pytest.raises(runtimes.TargetUnavailable) as caught:
        RTX.load(other)
    command = shlex.split((caught.value.hint or "").partition(": ")[2])
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(runtimes.__file__).parents[1])}
    subprocess.run([sys.executable, *command[1:]], check=True, env=environment, cwd=folder, timeout=60)
    assert (folder / "engine/prepared/model.plan").exists()


@pytest.mark.parametrize(
    "field", ["flavor", "version", "compute_capabilities", "machine", "options", "shapes", "plan_sha256", "plan_size"]
)
def test_a_fingerprint_that_lacks_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    compiled = compile_text(tmp_path, FIXED)
    rest = {key: value for key, value in compiled.fingerprint.items() if key != field}
    on_machine(monkeypatch, ADA)
    taken = catch_sessions(monkeypatch)
    with pytest.raises(runtimes.InvalidModel, match=f"no {field}"):
        RTX.load(dataclasses.replace(compiled, fingerprint=rest, trusted=True))
    assert not taken


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("options", "[]"),
        ("options", "{"),
        ("shapes", "1"),
        ("plan_size", "-1"),
        ("plan_size", "1e3"),
        ("plan_size", ""),
    ],
)
def test_a_fingerprint_of_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: str) -> None:
    compiled = compile_text(tmp_path, FIXED)
    on_machine(monkeypatch, ADA)
    taken = catch_sessions(monkeypatch)
    with pytest.raises(runtimes.InvalidModel, match=field):
        RTX.load(dataclasses.replace(compiled, fingerprint={**compiled.fingerprint, field: value}, trusted=True))
    assert not taken


def test_a_bare_graph_is_not_built_behind_the_callers_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "m.onnx", FIXED)
    on_machine(monkeypatch, ADA)
    with pytest.raises(runtimes.InvalidModel, match="no engine for tensorrt-rtx:sm89") as caught:
        runtimes.load(model, target="tensorrt-rtx:sm89", trust=True)
    assert "compile it first" in (caught.value.hint or "")
    assert sorted(os.listdir(tmp_path)) == ["m.onnx"]


def test_a_builders_option_is_not_one_of_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_text(tmp_path, FIXED, optimization_level=1)
    on_machine(monkeypatch, ADA)
    catch_sessions(monkeypatch)
    for options in ({}, {"cuda_graph": True}, {"optimization_level": 1}):
        assert RTX.load(compiled, options=tensorrt_engine.TensorRTOptions(**options)) == "a session"
    with pytest.raises(runtimes.InvalidInput, match="optimization_level is 5, and the engine was built with 1"):
        RTX.load(compiled, options=tensorrt_engine.TensorRTOptions(optimization_level=5))
    with pytest.raises(runtimes.InvalidInput, match="built with the default"):
        RTX.load(compiled, options=tensorrt_engine.TensorRTOptions(refit=True))
    with pytest.raises(runtimes.InvalidInput, match="a TensorRTOptions, not a dict"):
        RTX.load(compiled, options={"cuda_graph": True})


def test_an_engine_in_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_text(tmp_path, RELU)
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    compiled.directory.rename(artifact / "trt")
    ours = {key: value for key, value in compiled.to_json().items() if key != "target"}
    body = variant_body("trt", target=str(compiled.target), **ours, session_options={})
    del body["ep"], body["device"], body["executor_info"]["ort"]
    write_package(artifact, {"trt": body})
    on_machine(monkeypatch, ADA)
    taken = catch_sessions(monkeypatch)
    with pytest.raises(AttributeError, match="info"):  # the stand-in has none; it was made
        runtimes.load(artifact)
    assert len(taken) == 1
    on_machine(monkeypatch, HOPPER)
    with pytest.raises(runtimes.TargetUnavailable, match=r"8\.6 8\.9.*9\.0"):
        runtimes.load(artifact)
    on_machine(monkeypatch, ADA)
    monkeypatch.setenv("TOOLCHAIN_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(runtimes.InvalidModel, match="not built on this machine"):
        runtimes.load(artifact)
    plan = artifact / "trt/prepared/model.plan"
    plan.write_bytes(damaged(plan.read_bytes())["flipped"])
    with pytest.raises(runtimes.InvalidArtifact):
        runtimes.load(artifact, trust=True)
    with pytest.raises(runtimes.InvalidModel, match="damaged"):
        runtimes.load(artifact, trust=True, verify=False)
    assert len(taken) == 1


# ---------------------------------------------------------------- TensorRT proper, with the names of RTX in its place


@pytest.fixture
def proper(monkeypatch: pytest.MonkeyPatch) -> Api:
    """A TensorRT 10 on a machine with two GPUs, as far as that can be had: RTX knows the same calls."""
    api = dataclasses.replace(here(), flavor=FLAVORS[0], version="10.16.1", cuda=None)
    monkeypatch.setattr(tensorrt_engine, "require_api", lambda target: api)
    on_machine(monkeypatch, ADA, AMPERE)
    return api


@pytest.mark.filterwarnings("ignore:.*[Tt]iming cache.*:DeprecationWarning")
def test_tensorrt_builds_for_the_gpu_that_is_here(tmp_path: Path, proper: Api) -> None:
    compiled = compile_text(tmp_path, FIXED, "tensorrt")
    assert compiled.fingerprint["flavor"] == "tensorrt"
    assert compiled.fingerprint["compute_capabilities"] == "8.9"


@pytest.mark.filterwarnings("ignore:.*[Tt]iming cache.*:DeprecationWarning")
def test_hardware_compatible_engines_run_on_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proper: Api) -> None:
    compiled = compile_text(tmp_path, FIXED, "tensorrt", hardware_compatibility="ampere-plus")
    assert compiled.fingerprint["compute_capabilities"] == "8.0+"
    taken = catch_sessions(monkeypatch)
    backend = runtimes.backend("tensorrt")
    on_machine(monkeypatch, HOPPER)
    assert backend.load(compiled) == "a session"
    on_machine(monkeypatch, TURING)
    with pytest.raises(runtimes.TargetUnavailable, match=r"8\.0\+.*7\.5"):
        backend.load(compiled)
    assert len(taken) == 1


@pytest.mark.filterwarnings("ignore:.*[Tt]iming cache.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("compatible", "there", "loads"),
    [
        (True, "10.17.0", True),
        (True, "11.4.0", True),
        (True, "10.2.0", False),
        (True, "12.0.0", False),
        (False, "10.17.0", False),
    ],
)
def test_version_compatible_engines_run_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proper: Api, compatible: bool, there: str, loads: bool
) -> None:
    compiled = compile_text(tmp_path, FIXED, "tensorrt")
    options = json.dumps({"version_compatible": True} if compatible else {})
    compiled = dataclasses.replace(compiled, fingerprint={**compiled.fingerprint, "options": options})
    monkeypatch.setattr(tensorrt_engine, "require_api", lambda target: dataclasses.replace(proper, version=there))
    taken = catch_sessions(monkeypatch)
    backend = runtimes.backend("tensorrt")
    if loads:
        assert backend.load(compiled) == "a session"
        return
    with pytest.raises(runtimes.TargetUnavailable, match=f"10.16.1.*{there}"):
        backend.load(compiled)
    assert not taken


@pytest.mark.filterwarnings("ignore:.*[Tt]iming cache.*:DeprecationWarning")
def test_where_timings_are_kept(tmp_path: Path, proper: Api) -> None:
    compile_text(tmp_path / "a", FIXED, "tensorrt", timing_cache=False)
    assert not (tmp_path / "cache/timings").exists()
    device = tensorrt_engine._Device((), 0, ADA)
    other = tensorrt_engine._Device((), 1, AMPERE)
    files = {tensorrt_engine._timing_cache(api, d) for api in (proper,) for d in (device, other)}
    files.add(tensorrt_engine._timing_cache(dataclasses.replace(proper, version="11.4.0"), device))
    assert len(files) == 3
    assert tensorrt_engine._timing_cache(here(), device) is None, "TensorRT-RTX times nothing"
