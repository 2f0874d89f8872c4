"""The command line: help, JSON, and a sentence instead of a traceback for everything a user gets wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from toolchain_support import conv_net, save, toolchain, toolchain_json

COMMANDS = ["build", "export", "optimize", "verify", "bench", "inspect", "doctor", "passes", "targets", "init", "cache"]


def test_help_of_every_command() -> None:
    top = toolchain("--help").stdout
    for command in COMMANDS:
        assert command in top
        text = toolchain(command, "--help").stdout
        assert len(text.splitlines()) > 5, command
        if command not in ("init", "cache"):
            assert "--json" in text, command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "resnet5"], "did you mean resnet50"),
        (["build", "absent.onnx"], "no such file"),
        (["build", "absent.yaml"], "cannot read the recipe"),
        (["build", "net.onnx", "--target", "ort-cpuu"], "ort-cpu"),
        (["build", "net.onnx", "--target", "ORT CPU"], "not a target"),
        (["build", "net.onnx", "--name", "a/b"], "key name"),
        (["build", "net.onnx", "--batch-sizes", "0"], "benchmark.batch_sizes"),
        (["build", "net.onnx", "--eval-data", "nowhere"], "nowhere"),
        (["build", "net.onnx", "-o", "net.onnx"], "a file is in the way"),
        (["build", "rubbish.onnx"], "rubbish.onnx"),
        (["optimize", "rubbish.onnx"], "rubbish.onnx"),
        (["optimize", "net.onnx", "--pass", "fuse"], "no pass is called"),
        (["optimize", "net.onnx", "--stop-after", "fuse"], "the pipeline has no such pass"),
        (["inspect", "rubbish.onnx"], "rubbish.onnx"),
        (["inspect", "."], "manifest"),
        (["verify", "net.onnx"], "--against"),
        (["bench", "rubbish.onnx"], "rubbish.onnx"),
        (["bench", "absent"], "absent"),
        (["export", "resnet5", "-o", "x.onnx"], "did you mean resnet50"),
        (["init", "resnet5"], "did you mean resnet50"),
        (["cache", "prune", "--size", "lots"], "not a size"),
    ],
)
def test_a_users_mistake_gets_a_sentence_and_exit_code_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    save(conv_net(), tmp_path / "net.onnx")
    (tmp_path / "rubbish.onnx").write_bytes(b"rubbish")
    done = toolchain(*arguments, cwd=tmp_path, check=2)
    assert said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "rubbish.onnx"]
    assert "Traceback" in toolchain(*arguments, "--debug", cwd=tmp_path, check=2).stderr


def test_wrong_usage_is_exit_code_2() -> None:
    assert "No such command" in toolchain("bulid", check=2).stderr
    assert "No such option" in toolchain("build", "x", "--wieghts", "y", check=2).stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk(tmp_path: Path) -> None:
    save(conv_net(), tmp_path / "net.onnx")
    done = toolchain("optimize", "net.onnx", "-o", "/dev/full", cwd=tmp_path, check=2)
    assert "the disk is full" in done.stderr


def test_optimize_writes_a_smaller_model_and_verifies(tmp_path: Path) -> None:
    save(conv_net(), tmp_path / "net.onnx")
    found = toolchain_json("optimize", "net.onnx", "-o", "out.onnx", "--verify-each", cwd=tmp_path)
    fused = next(p for p in found["passes"] if p["name"] == "fuse_conv_bn")
    assert (fused["fired"], fused["changed"]) == (1, True)
    assert fused["nmse"] < 1e-8
    shown = toolchain("inspect", "out.onnx", cwd=tmp_path).stdout
    assert "BatchNormalization" not in shown
    assert "image: float32[batch, 3, 16, 16]" in shown
    verified = toolchain_json("verify", "out.onnx", "--against", "net.onnx", "--layers", cwd=tmp_path)
    assert [layer["name"] for layer in verified["layers"]] == ["bn", "relu", "pool", "flat", "logits"]
    toolchain("verify", "out.onnx", "--against", "net.onnx", "--max-nmse", "1e-30", cwd=tmp_path, check=2)


def test_one_pass_alone(tmp_path: Path) -> None:
    save(conv_net(), tmp_path / "net.onnx")
    found = toolchain_json("optimize", "net.onnx", "--pass", "eliminate_noops", cwd=tmp_path)
    assert [p["name"] for p in found["passes"]] == ["eliminate_noops"]


def test_verify_and_inspect_an_artifact(tmp_path: Path) -> None:
    save(conv_net(), tmp_path / "net.onnx")
    toolchain("build", "net.onnx", "-o", "art", cwd=tmp_path)
    found = toolchain_json("verify", "art", cwd=tmp_path)
    assert found["fidelity"]["outputs"]["logits"]["nmse"] < 1e-8
    inspected = toolchain_json("inspect", "art", cwd=tmp_path)
    assert inspected["variants"] == ["ort-cpu-fp32: fp32 for ort-cpu, runs here"]
    (tmp_path / "art" / "report.json").write_text("{}")
    assert "report.json" in toolchain("verify", "art", cwd=tmp_path, check=2).stderr
    assert "report.json" in toolchain("inspect", "art", cwd=tmp_path, check=2).stderr


def test_lists() -> None:
    assert toolchain_json("targets")["ort-cpu"]["available"] is True
    assert "fuse_conv_bn" in [p["name"] for p in toolchain_json("passes")["passes"]]
    assert "BatchNormalization" in toolchain("passes").stdout
    found = toolchain_json("doctor")
    assert found["runtimes"]["ort-cpu"]["available"] is True
    assert found["machine"]["cores"] >= 1
    assert "Sources" in toolchain("doctor").stdout


def test_cache_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLCHAIN_CACHE", str(tmp_path / "cache"))
    save(conv_net(), tmp_path / "net.onnx")
    toolchain("build", "net.onnx", cwd=tmp_path)
    stages = {entry["stage"] for entry in toolchain_json("cache", "list")["entries"]}
    assert stages == {"export", "optimize", "compile", "verify", "benchmark"}
    assert toolchain_json("cache", "prune") == []
    assert len(toolchain_json("cache", "prune", "--size", "1")) == 5
    assert toolchain_json("cache", "clear") == []
    assert "0.0 MB" in toolchain("cache", "list").stdout
