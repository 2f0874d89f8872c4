"""Engines of TensorRT-RTX, built for GPUs that are not here, and graphs that it does not take."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from runtime_support import save_model
from tensorrt_support import (
    FIXED,
    RELU,
    RTX,
    compile_text,
    require_rtx,
)

import runtimes
from runtimes import Target, tensorrt_engine
from runtimes._tensorrt_api import Api, find_api
from runtimes.base import Availability


@pytest.fixture(autouse=True)
def _rtx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_rtx()
    monkeypatch.setenv("TOOLCHAIN_CACHE", str(tmp_path / "cache"))


def here() -> Api:
    api = find_api("tensorrt-rtx")
    assert not isinstance(api, Availability)
    return api


# ---------------------------------------------------------------- building


def test_what_is_written(tmp_path: Path) -> None:
    compiled = compile_text(tmp_path, RELU)
    assert sorted(
        p.relative_to(compiled.directory).as_posix() for p in compiled.directory.rglob("*") if p.is_file()
    ) == [
        "model.onnx",
        "prepared/model.plan",
    ]
    assert (compiled.model_file, compiled.prepared_file) == ("model.onnx", "prepared/model.plan")
    plan = (compiled.directory / "prepared/model.plan").read_bytes()
    graph = (compiled.directory / "model.onnx").read_bytes()
    assert graph == (tmp_path / "given.onnx").read_bytes()
    found = compiled.fingerprint
    assert found["flavor"] == "tensorrt-rtx"
    assert found["version"] == here().version
    assert found["compute_capabilities"] == "8.6 8.9"
    assert (found["plan_sha256"], found["plan_size"]) == (hashlib.sha256(plan).hexdigest(), str(len(plan)))
    assert found["graph_sha256"] == hashlib.sha256(graph).hexdigest()
    assert json.loads(found["shapes"]) == {"x": ["N", 3], "y": ["N", 3]}
    assert all(isinstance(value, str) for value in found.values())
    again = runtimes.Compiled.from_json(compiled.directory, json.loads(json.dumps(compiled.to_json())))
    assert again == compiled
    assert RTX.selects(compiled) == "prepared/model.plan"


@pytest.mark.parametrize(
    ("target", "capabilities"),
    [
        ("tensorrt-rtx", "8.0+"),
        ("tensorrt-rtx:sm89", "8.9"),
        ("tensorrt-rtx:sm120,sm75,sm86", "7.5 8.6 12.0"),
        ("tensorrt-rtx:SM86,sm86", "8.6"),
    ],
)
def test_devices(tmp_path: Path, target: str, capabilities: str) -> None:
    assert compile_text(tmp_path, FIXED, target).fingerprint["compute_capabilities"] == capabilities


def test_sizes_that_vary_get_a_profile_and_a_word(tmp_path: Path) -> None:
    compiled = compile_text(tmp_path, RELU)
    assert len(compiled.remarks) == 1
    assert "size 'N'" in compiled.remarks[0]
    assert "1 to 32" in compiled.remarks[0]


def test_options_reach_the_builder(tmp_path: Path) -> None:
    one = compile_text(tmp_path / "a", RELU, profiles=[{"N": [1, 4, 8]}])
    assert one.remarks == ()
    two = compile_text(
        tmp_path / "b",
        RELU,
        profiles=[{"N": [1, 4, 8]}, {"x": [[9, 3], [16, 3], [32, 3]]}],
        workspace_mib=64,
        optimization_level=1,
        sparsity=True,
        refit=True,
        weight_streaming=True,
        layer_information=True,
        tf32=True,
    )
    # kernels are there once for each profile
    assert int(two.fingerprint["plan_size"]) > 1.5 * int(one.fingerprint["plan_size"])
    built = json.loads(two.fingerprint["options"])
    assert built["profiles"] == [{"N": [1, 4, 8]}, {"x": [[9, 3], [16, 3], [32, 3]]}]
    assert built["refit"]


def test_external_data_and_every_type_that_goes_in(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.standard_normal((64, 64)).astype(np.float32), "w")
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 19]> g (float[N, 64] x) => (float[N, 64] y) { y = MatMul(x, w) }'
    )
    model.graph.initializer.append(weight)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    compiled = runtimes.compile(tmp_path / "m.onnx", "tensorrt-rtx:sm89", tmp_path / "out")
    assert (compiled.directory / "w.bin").exists()
    for dtype in ("float16", "bfloat16", "int32", "int64"):
        text = f"g ({dtype}[2, 3] x) => ({dtype}[2, 3] y) {{ y = Add(x, x) }}"
        assert compile_text(tmp_path / dtype, text).fingerprint["plan_size"]
    for dtype in ("bool", "uint8", "int8"):
        text = f"g ({dtype}[2, 3] x) => (float[2, 3] y) {{ y = Cast<to = 1>(x) }}"
        assert compile_text(tmp_path / dtype, text).fingerprint["plan_size"]


def test_the_network_is_strongly_typed(tmp_path: Path) -> None:
    api = here()
    builder = api.trt.Builder(api.logger())
    assert builder.create_network(api.network_flags()).get_flag(api.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def test_progress(tmp_path: Path) -> None:
    told: list[tuple[str, float | None]] = []
    with tensorrt_engine.watch_builds(lambda text, share: told.append((text, share))):
        compile_text(tmp_path, RELU)
    shares = [share for _, share in told if share is not None]
    assert len(told) > 5
    assert all(0 <= share <= 1 for share in shares)
    assert shares == sorted(shares), "it goes backwards"
    assert shares[-1] > 0.5
    count = len(told)
    compile_text(tmp_path / "again", RELU)
    assert len(told) == count, "told outside of the block"


def test_an_error_while_telling_ends_the_build(tmp_path: Path) -> None:
    def fail(text: str, share: float | None) -> None:
        raise ZeroDivisionError(text)

    with tensorrt_engine.watch_builds(fail), pytest.raises(ZeroDivisionError):
        compile_text(tmp_path, RELU)
    assert not (tmp_path / "engine").exists()


def test_an_interrupt_ends_the_build(tmp_path: Path) -> None:
    save_model(tmp_path / "given.onnx", RELU)
    program = f"""
import os, signal, threading, runtimes
from runtimes import tensorrt_engine
sent = []
def interrupt(text, share):
    if not sent:
        sent.append(text)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.5)   # the builder is still at it when the signal arrives
try:
    with tensorrt_engine.watch_builds(interrupt):
        runtimes.compile({str(tmp_path / "given.onnx")!r}, "tensorrt-rtx:sm89", {str(tmp_path / "engine")!r})
except KeyboardInterrupt:
    assert threading.active_count() == 1, "the builder goes on"
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
    assert not (tmp_path / "engine").exists()


# ---------------------------------------------------------------- graphs that TensorRT does not take


@pytest.mark.parametrize(
    ("text", "what", "next"),
    [
        ("g (float[4, 3] x) => (float[4, 3] y) { y = FooBar(x) }", "FooBar -> y: .* has no FooBar", "without this op"),
        ("g (float[3, 3] x) => (float y) { y = Det(x) }", "Det -> y: .* has no Det", "without this op"),
        ("g (string[4] x) => (string[4] y) { y = Identity(x) }", "x: it is string", "cast it"),
        ("g (uint16[4] x) => (uint16[4] y) { y = Add(x, x) }", "x: it is uint16", "cast it"),
        (
            "g (double[4, 3] x) => (double[4, 3] y) { y = Relu(x) }",
            "x: it is float64 in the graph, and TensorRT-RTX would make it float32",
            "export the model with float32",
        ),
        (
            "g (float[4] x) => (float[4] y) <float s = {0.1}, int8 z = {3}> "
            "{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
            "QuantizeLinear -> q: Non-zero zero point",
            "quantise the float model for this target",
        ),
        (
            "g (float[4] x) => (uint8[4] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }",
            "DynamicQuantizeLinear -> y",
            "build from the float model",
        ),
    ],
)
def test_what_is_not_supported_is_told_by_node(tmp_path: Path, text: str, what: str, next: str) -> None:
    with pytest.raises(runtimes.CompileFailed, match=what) as caught:
        compile_text(tmp_path, text)
    assert next in (caught.value.hint or "")
    assert str(tmp_path / "given.onnx") in (caught.value.where or "")
    assert not (tmp_path / "engine").exists(), "a refused graph leaves nothing"


def test_all_that_is_not_supported_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(runtimes.CompileFailed, match=r"Det -> a(.|\n)*Foo -> y"):
        compile_text(tmp_path, "g (float[3, 3] x) => (float y) { a = Det(x) y = Foo(x) }")


def test_the_parser_prints_nothing_for_types_that_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(runtimes.CompileFailed):
        compile_text(tmp_path, "g (string[4] x) => (string[4] y) { y = Identity(x) }")
    assert capfd.readouterr() == ("", "")


def test_a_failed_build_shows_its_log_and_how_to_see_it_again(tmp_path: Path) -> None:
    # the profile fits each input, and only the builder sees that the sum then has two sizes
    text = "g (float[N, 3] x, float[M, 3] z) => (float[P, 3] y) { y = Add(x, z) }"
    with pytest.raises(runtimes.CompileFailed, match="could not build the engine") as caught:
        compile_text(tmp_path, text, profiles=[{"N": [4, 4, 4], "M": [5, 5, 5]}])
    hint = caught.value.hint or ""
    assert "[ERROR]" in hint
    command = hint.partition("to see it again: ")[2].partition("\n")[0]
    assert shlex.split(command)[0] == "python"
    again = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True, cwd=tmp_path, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(runtimes.__file__).parents[1])},
    )  # fmt: skip
    assert caught.value.what in again.stderr


def test_inspecting_says_what_building_would(tmp_path: Path) -> None:
    target = Target("tensorrt-rtx")
    good = tensorrt_engine.inspect_network(save_model(tmp_path / "good.onnx", RELU), target)
    assert (good.accepted, good.supported, good.parts, good.unsupported) == (True, 1, 1, ())
    text = "g (float[3, 3] x) => (float[3, 3] y) { a = Relu(x) b = Foo(a) c = Relu(b) y = Sigmoid(c) }"
    bad = tensorrt_engine.inspect_network(save_model(tmp_path / "bad.onnx", text), target)
    assert (bad.accepted, bad.supported, bad.parts) == (False, 3, 2)
    assert [(one.node, one.op) for one in bad.unsupported] == [("Foo -> b", "Foo")]
    branch = (
        "g (float[3] x, bool c) => (float[3] y) { y = If (c) <then_branch = t () => (float[3] a) { a = Relu(x) }, "
        "else_branch = e () => (float[3] b) { b = Foo(x) }> }"
    )
    inside = tensorrt_engine.inspect_network(save_model(tmp_path / "branch.onnx", branch), target)
    assert "Foo in " in inside.unsupported[0].node
    assert "else_branch" in inside.unsupported[0].node


def test_inspecting_bad_input(tmp_path: Path) -> None:
    with pytest.raises(runtimes.InvalidInput, match="ort-cpu"):
        tensorrt_engine.inspect_network(save_model(tmp_path / "m.onnx", RELU), Target("ort-cpu"))
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(runtimes.InvalidModel):
        tensorrt_engine.inspect_network(tmp_path / "x.onnx", Target("tensorrt-rtx"))


def test_inspect_on_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from toolchain.cli_look import looking

    text = "g (float[3, 3] x) => (float y) { a = Relu(x) y = Det(a) }"
    model = str(save_model(tmp_path / "m.onnx", text))
    ran = CliRunner().invoke(looking, ["inspect", "--target", "tensorrt-rtx:sm89", "--json", model])
    said = json.loads(ran.stdout)
    assert said["accepted"] == "no"
    assert said["nodes"] == "1 of 2 are supported"
    assert said["not supported"] == [f"Det -> y: TensorRT-RTX {here().version} has no Det"]
    assert said["what helps"]


def test_timings_of_builds_at_once_are_all_kept(tmp_path: Path) -> None:
    class Config:
        """What a builder's configuration does with timings: content is a set of entries."""

        def create_timing_cache(self, content: bytes) -> Cache:
            return Cache(content)

        def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            return b"other gpu" not in cache.entries

    class Cache:
        def __init__(self, content: bytes) -> None:
            self.entries = {entry for entry in content.split(b",") if entry}

        def combine(self, other: Cache, ignore_mismatch: bool) -> bool:
            self.entries |= other.entries
            return True

        def serialize(self) -> bytes:
            return b",".join(sorted(self.entries))

    from runtimes import _tensorrt_build

    file = tmp_path / "cache" / "timings" / "some"
    cache = _tensorrt_build._attach_timings(Config(), file)
    cache.entries.add(b"conv")
    _tensorrt_build._keep_timings(Config(), cache, file)
    second = _tensorrt_build._attach_timings(Config(), file)
    assert second.entries == {b"conv"}
    # another build writes while this one runs
    third = _tensorrt_build._attach_timings(Config(), file)
    third.entries.add(b"gemm")
    _tensorrt_build._keep_timings(Config(), third, file)
    second.entries.add(b"pool")
    _tensorrt_build._keep_timings(Config(), second, file)
    assert file.read_bytes() == b"conv,gemm,pool"
    file.write_bytes(b"other gpu")
    assert _tensorrt_build._attach_timings(Config(), file).entries == set()
