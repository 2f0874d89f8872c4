"""The command line: help, JSON, and a sentence instead of a traceback for everything a user gets wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from toolchain_support import ROOT, conv_net, save, toolchain, toolchain_json

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


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    """The system ends every file at 1,000 bytes, as a full disk would."""
    save(conv_net(), tmp_path / "net.onnx")
    (tmp_path / "out.onnx").write_text("old")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
    command = [sys.executable, "-c", limit + "from toolchain.__main__ import main; main()"]
    done = subprocess.run(
        [*command, "optimize", "net.onnx", "-o", "out.onnx"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write out.onnx: the file is larger than the file system takes" in done.stderr
    assert (tmp_path / "out.onnx").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "out.onnx"]


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    save(conv_net(), tmp_path / "net.onnx")
    assert "no plain file" in toolchain("optimize", "net.onnx", "-o", "/dev/null", cwd=tmp_path, check=2).stderr
    assert Path("/dev/null").is_char_device()


def test_a_folder_of_somebody_elses_is_not_replaced(tmp_path: Path) -> None:
    save(conv_net(), tmp_path / "net.onnx")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("precious")
    for place in ("thesis", ".", ".."):
        done = toolchain("build", "net.onnx", "-o", place, cwd=tmp_path, check=2)
        assert "take the place" in done.stderr or "holds something else" in done.stderr
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "precious"


def test_python_files_of_the_users_folder_are_not_run(tmp_path: Path) -> None:
    save(conv_net(), tmp_path / "net.onnx")
    for name in ("statistics", "onnx", "numpy", "resource", "runtimes"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()")
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; from toolchain.__main__ import main; main()"
    for arguments in (["build", "net.onnx"], ["inspect", "net.onnx"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "was_run").exists()


def test_an_interrupt_while_modules_are_imported_ends_at_once(tmp_path: Path) -> None:
    """Native modules abort the process where an exception comes up inside them: none may come up."""
    code = (
        "import os, signal, sys\n"
        "class Native:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'numpy':\n"
        "            try: os.kill(os.getpid(), signal.SIGINT)\n"
        "            except BaseException: os.abort()\n"
        "sys.meta_path.insert(0, Native())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from toolchain.__main__ import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "optimize", "net.onnx", "-o", "out.onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "interrupted before anything was begun\n"


def test_every_target_that_works_here_builds(tmp_path: Path) -> None:
    save(conv_net(), tmp_path / "net.onnx")
    working = [name for name, state in toolchain_json("targets").items() if state["available"]]
    assert "reference" in working
    flags = [flag for name in working for flag in ("--target", name)]
    found = toolchain_json("build", "net.onnx", *flags, cwd=tmp_path)
    assert [v["target"] for v in found["report"]["variants"]] == working


@pytest.mark.parametrize("option", [["--weights", "random"], ["--opset", "18"], ["--limit", "5"], ["--dim", "zzz=4"]])
def test_an_option_without_effect_is_refused(tmp_path: Path, option: list[str]) -> None:
    save(conv_net(), tmp_path / "net.onnx")
    done = toolchain("build", "net.onnx", *option, cwd=tmp_path, check=2)
    assert "no effect" in done.stderr or "no input has a dimension" in done.stderr


def test_sizes_without_a_name_can_be_given(tmp_path: Path) -> None:
    """A model that runs on 12 columns only, and whose input says nothing of its size."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 3])],
        [numpy_helper.from_array(np.ones((12, 3), np.float32), "w")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "net.onnx")
    refused = toolchain("build", "net.onnx", cwd=tmp_path, check=2).stderr
    assert "--dim x.0=SIZE --dim x.1=SIZE" in refused
    toolchain("build", "net.onnx", "--dim", "x.1=12", cwd=tmp_path)
    toolchain("verify", "artifacts/net", "--dim", "x.1=12", cwd=tmp_path)
    toolchain("optimize", "net.onnx", "--verify-each", "--dim", "x.1=12", cwd=tmp_path)


def test_a_fixed_batch_is_told_from_an_asked_one(tmp_path: Path) -> None:
    save(conv_net(dynamic=False), tmp_path / "net.onnx")
    assert "fixed batch of 1" in toolchain("bench", "net.onnx", "--batch-sizes", "8", cwd=tmp_path, check=2).stderr


def test_two_models_that_take_different_inputs_are_not_compared(tmp_path: Path) -> None:
    save(conv_net(), tmp_path / "a.onnx")
    save(conv_net(dynamic=False), tmp_path / "b.onnx")
    assert "same inputs" in toolchain("bench", "a.onnx", "--vs", "b.onnx", cwd=tmp_path, check=2).stderr


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc to be refused by")
def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    save(conv_net(), tmp_path / "net.onnx")
    for arguments in (
        ["build", "net.onnx", "-o", "/proc/x/y"],
        ["build", "net.onnx", "-o", "net.onnx/foo"],
        ["optimize", "net.onnx", "-o", "absent/out.onnx"],
        ["optimize", "net.onnx", "-o", "."],
    ):
        assert "cannot write" in toolchain(*arguments, cwd=tmp_path, check=2).stderr, arguments


@pytest.mark.parametrize("width", ["60", "80", "200"])
def test_no_number_is_broken_by_a_narrow_terminal(tmp_path: Path, width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    save(conv_net(), tmp_path / "net.onnx")
    shown = toolchain("bench", "net.onnx", "--count", "20", "--duration", "0", cwd=tmp_path).stdout
    assert re.search(r"samples/s\b", shown)
    assert re.search(r"p99 ms\b", shown)


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
    wanted = {"export", "optimize", "lower", "compile", "verify"}
    assert stages - {"benchmark"} == wanted  # a disturbed benchmark is not kept
    assert toolchain_json("cache", "prune") == []
    assert len(toolchain_json("cache", "prune", "--size", "1")) == len(stages)
    assert toolchain_json("cache", "clear") == []
    assert "0.0 kB" in toolchain("cache", "list").stdout
