"""The whole line on a small model, as a user runs it: what is written, reused, replaced and left alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from toolchain_support import conv_net, save, toolchain, toolchain_json

import runtimes
from toolchain import benchmark as bench
from toolchain.build import Debugging, build
from toolchain.cache import Cache
from toolchain.errors import FidelityError, GraphError
from toolchain.recipe import Recipe


@pytest.fixture(autouse=True)
def _undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that was disturbed is measured again by the next build. Whether it was is no matter here."""
    monkeypatch.setattr(bench, "MAX_SPREAD", float("inf"))
    monkeypatch.setattr(bench, "MAX_COV", float("inf"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(conv_net(), tmp_path / "net.onnx")


def recipe(model: Path, **changes: object) -> Recipe:
    quick = {"benchmark__count": 5, "benchmark__duration_s": 0.0, "output": str(model.parent / "art")}
    return Recipe(model=str(model)).override(**{**quick, **changes})


def digests(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def test_a_build_is_loadable_right_and_complete(model: Path, tmp_path: Path) -> None:
    built = build(recipe(model), cache=Cache(tmp_path / "cache"))
    feeds = {"image": np.random.default_rng(5).normal(size=(3, 3, 16, 16)).astype(np.float32)}
    with runtimes.load(built.path) as artifact, runtimes.load(model, options={"graph_level": "disabled"}) as plain:
        np.testing.assert_allclose(artifact.run(feeds)["logits"], plain.run(feeds)["logits"], rtol=1e-4, atol=1e-5)
        assert artifact.info["variant"] == "ort-cpu-fp32"
    manifest = json.loads((built.path / "manifest.json").read_text())
    listed = set(manifest["additional_metadata"]["toolchain"]["files"])
    assert listed == set(digests(built.path)) - {"manifest.json"}
    assert {"export/model.onnx", "recipe.yaml", "report.json", "report.html", "ort-cpu-fp32/model.onnx"} <= listed
    ours = manifest["additional_metadata"]["toolchain"]
    assert ours["source"]["weights"]["kind"] == "embedded"
    assert ours["fidelity"]["ort-cpu-fp32"]["outputs"]["logits"]["nmse"] < 1e-8


def test_an_artifact_names_no_path_of_the_machine(model: Path, tmp_path: Path) -> None:
    built = build(recipe(model), cache=Cache(tmp_path / "cache"))
    for file in built.path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert str(tmp_path).encode() not in content, file
            assert str(Path.home()).encode() + b"/" not in content, file


def test_plain_onnxruntime_opens_the_model_inside(model: Path, tmp_path: Path) -> None:
    import onnxruntime

    built = build(recipe(model), cache=Cache(tmp_path / "cache"))
    session = onnxruntime.InferenceSession(built.path / "ort-cpu-fp32" / "model.onnx")
    assert session.run(None, {"image": np.zeros((2, 3, 16, 16), np.float32)})[0].shape == (2, 10)


def test_a_second_build_does_nothing_and_a_third_reuses_every_stage(model: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    first = build(recipe(model), cache=cache)
    assert not first.up_to_date
    assert not any(stage.cached for stage in first.report.stages)
    before = digests(first.path)
    second = build(recipe(model), cache=cache)
    assert second.up_to_date
    assert digests(first.path) == before
    shutil.rmtree(first.path)
    third = build(recipe(model), cache=cache)
    assert not third.up_to_date
    assert all(stage.cached for stage in third.report.stages)
    assert third.report.variants == first.report.variants


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        ({"passes": ["fold_constants"]}, {"optimize", "lower", "compile", "verify", "benchmark"}),
        ({"verify__samples": 3}, {"verify"}),
        ({"benchmark__count": 6}, {"benchmark"}),
        ({"session__intra_op_threads": 1}, {"compile", "verify", "benchmark"}),
    ],
)
def test_a_change_reruns_the_stages_that_it_touches(
    model: Path, tmp_path: Path, change: dict[str, object], rerun: set[str]
) -> None:
    cache = Cache(tmp_path / "cache")
    build(recipe(model), cache=cache)
    again = build(recipe(model, **change), cache=cache)
    assert {stage.name for stage in again.report.stages if not stage.cached} == rerun


def test_another_model_under_the_same_name_is_another_build(model: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    build(recipe(model), cache=cache)
    save(conv_net(seed=1), model)
    again = build(recipe(model), cache=cache)
    assert not any(stage.cached for stage in again.report.stages)


def test_a_damaged_artifact_is_not_up_to_date(model: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    first = build(recipe(model), cache=cache)
    before = digests(first.path)
    os.truncate(first.path / "ort-cpu-fp32" / "model.onnx", 100)
    again = build(recipe(model), cache=cache)
    assert not again.up_to_date
    assert digests(again.path)["ort-cpu-fp32/model.onnx"] == before["ort-cpu-fp32/model.onnx"]


def test_a_broken_bound_ships_nothing_and_keeps_the_old(model: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    first = build(recipe(model), cache=cache)
    before = digests(first.path)
    with pytest.raises(FidelityError, match="normalised MSE"):
        build(recipe(model, verify__max_nmse=1e-30), cache=cache)
    assert digests(first.path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["art", "cache", "net.onnx"]


def test_debugging_runs_the_passes_even_when_they_are_cached(model: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    build(recipe(model), cache=cache)
    built = build(recipe(model), cache=cache, debugging=Debugging(verify_each=True, dump_dir=tmp_path / "dump"))
    assert any(p.nmse is not None for p in built.report.passes)
    assert len(list((tmp_path / "dump").iterdir())) == len(built.report.passes) + 1


def test_a_disturbed_benchmark_is_measured_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache")
    monkeypatch.setattr(bench, "MAX_COV", -1.0)
    build(recipe(model), cache=cache)
    monkeypatch.setattr(bench, "MAX_COV", float("inf"))
    again = build(recipe(model), cache=cache)
    assert [stage.name for stage in again.report.stages if not stage.cached] == ["benchmark"]
    assert build(recipe(model), cache=cache).up_to_date


def test_without_reuse_everything_runs(model: Path, tmp_path: Path) -> None:
    build(recipe(model), cache=Cache(tmp_path / "cache"))
    again = build(recipe(model), cache=Cache(tmp_path / "other"), reuse=False)
    assert not again.up_to_date
    assert not any(stage.cached for stage in again.report.stages)


def test_float16_models_have_a_bound_of_their_own(tmp_path: Path) -> None:
    half = conv_net()
    for tensor in half.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    built = build(recipe(save(half, tmp_path / "half.onnx")), cache=Cache(tmp_path / "cache"))
    assert built.report.variants[0].fidelity.bound == 1e-4


def test_labelled_data_gives_the_accuracy_of_both(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(21, 3, 16, 16)).astype(np.float32)
    with runtimes.load(model) as session:
        labels = session.run({"image": images})["logits"].argmax(axis=1)
    labels[:7] = (labels[:7] + 1) % 10  # seven are wrong by construction
    np.savez(tmp_path / "data.npz", image=images, labels=labels)
    built = build(
        recipe(model, data__evaluation=str(tmp_path / "data.npz"), data__batch_size=8), cache=Cache(tmp_path / "cache")
    )
    accuracy = built.report.variants[0].accuracy
    assert accuracy is not None
    assert (accuracy.samples, accuracy.top1, accuracy.agreement) == (21, pytest.approx(14 / 21), 1)
    assert built.report.variants[0].fidelity.inputs == "evaluation data"
    manifest = json.loads((built.path / "manifest.json").read_text())
    recorded = manifest["additional_metadata"]["toolchain"]["data"]
    assert recorded["evaluation"]["name"] == "data.npz"
    assert recorded["evaluation"]["samples"] == 21
    assert "calibration" not in recorded


def test_nan_weights_stop_the_build(tmp_path: Path) -> None:
    bad = conv_net()
    weight = numpy_helper.to_array(bad.graph.initializer[0]).copy()
    weight[0] = np.nan
    bad.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    path = save(bad, tmp_path / "nan.onnx")
    with pytest.raises(GraphError, match=r"weight 'w' holds NaN"):
        build(recipe(path), cache=Cache(tmp_path / "cache"))
    assert not (tmp_path / "art").exists()


def test_fixed_batch_models_are_built_too(tmp_path: Path) -> None:
    built = build(recipe(save(conv_net(dynamic=False), tmp_path / "m.onnx")), cache=Cache(tmp_path / "cache"))
    with runtimes.load(built.path) as session:
        assert session.inputs[0].shape == (1, 3, 16, 16)


def test_models_over_two_gigabytes_of_weights_keep_them_beside(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is lowered, or the test would write 10 GB; everything else is as with a real one."""
    from toolchain import onnx_file

    monkeypatch.setattr(onnx_file, "EXTERNAL_DATA_FROM", 100)
    built = build(recipe(model), cache=Cache(tmp_path / "cache"))
    assert (built.path / "export" / "model.onnx.data").exists()
    assert onnx.load(built.path / "export" / "model.onnx", load_external_data=False).graph.initializer[0].external_data
    with runtimes.load(built.path) as session:
        assert session.run({"image": np.zeros((1, 3, 16, 16), np.float32)})["logits"].shape == (1, 10)


# The command.


def test_build_command(model: Path, tmp_path: Path) -> None:
    done = toolchain("build", model, "-o", tmp_path / "art", cwd=tmp_path)
    assert "wrote" in done.stdout
    assert "fuse_conv_bn" in done.stdout
    assert done.stderr == ""
    again = toolchain_json("build", model, "-o", tmp_path / "art", cwd=tmp_path)
    assert all(stage["cached"] for stage in again["report"]["stages"] if stage["name"] != "benchmark")
    assert again["report"]["variants"][0]["name"] == "ort-cpu-fp32"
    # the same without an -o goes where the README says
    toolchain("build", model, cwd=tmp_path)
    assert (tmp_path / "artifacts" / "net" / "manifest.json").exists()


def test_a_recipe_from_init_builds(model: Path, tmp_path: Path) -> None:
    text = toolchain("init", model).stdout
    (tmp_path / "recipe.yaml").write_text(text)
    toolchain("build", "recipe.yaml", "-o", "art", cwd=tmp_path)
    assert (tmp_path / "art" / "recipe.yaml").exists()


def test_two_builds_at_once_leave_one_whole_artifact(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from toolchain.__main__ import main; main()", "build", str(model), "-o", "art"]
    children = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [child.wait(timeout=120) for child in children] == [0, 0, 0]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    runtimes.load(tmp_path / "art").close()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_build_leaves_the_old_artifact_whole(model: Path, tmp_path: Path, how: signal.Signals) -> None:
    toolchain("build", model, "-o", "art", cwd=tmp_path)
    before = digests(tmp_path / "art")
    save(conv_net(seed=1), model)
    command = [sys.executable, "-c", "from toolchain.__main__ import main; main()", "build", str(model), "-o", "art"]
    command += ["--no-cache", "--batch-sizes", "1,2,3,4"]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(1.2)
    child.send_signal(how)
    _, said = child.communicate(timeout=60)
    if child.returncode != 0:  # on a fast machine it may have been done
        assert digests(tmp_path / "art") == before
    if how is signal.SIGINT and child.returncode != 0:
        assert child.returncode == 130, said
        assert "Traceback" not in said
