"""One export, several targets: options of each, ranking by latency, and devices that are not here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from toolchain_support import conv_net, save

import runtimes
from toolchain import benchmark as bench
from toolchain.build import build
from toolchain.cache import Cache
from toolchain.recipe import Recipe


@pytest.fixture(autouse=True)
def _undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that was disturbed is measured again by the next build. Whether it was is no matter here."""
    monkeypatch.setattr(bench, "MAX_SPREAD", float("inf"))
    monkeypatch.setattr(bench, "MAX_COV", float("inf"))


def recipe(folder: Path, **changes: object) -> Recipe:
    model = save(conv_net(), folder / "net.onnx")
    quick = {"benchmark__count": 5, "benchmark__duration_s": 0.0, "output": str(folder / "art")}
    return Recipe(model=str(model)).override(**{**quick, **changes})


def test_variants_are_ranked_by_measured_latency_and_load_follows(tmp_path: Path) -> None:
    """The reference, a node at a time in numpy, is listed first and is by far the slower."""
    built = build(recipe(tmp_path, targets=["reference", "ort-cpu"]), cache=Cache(tmp_path / "cache"))
    assert [variant.name for variant in built.report.variants] == ["ort-cpu-fp32", "reference-fp32"]
    manifest = json.loads((built.path / "manifest.json").read_text())
    assert list(manifest["components"]["model"]["variants"]) == ["ort-cpu-fp32", "reference-fp32"]
    with runtimes.load(built.path) as session:
        assert session.info["variant"] == "ort-cpu-fp32"
    with runtimes.load(built.path, target="reference") as session:
        assert session.info["variant"] == "reference-fp32"


def test_options_of_one_runtime_reach_that_runtime_alone(tmp_path: Path) -> None:
    options = {"ort-cpu": {"intra_op_threads": 1, "memory_pattern": False}}
    built = build(recipe(tmp_path, targets=["reference", "ort-cpu"], options=options), cache=Cache(tmp_path / "cache"))
    variants = json.loads((built.path / "manifest.json").read_text())["components"]["model"]["variants"]
    ours = {name: body["executor_info"]["toolchain"]["session_options"] for name, body in variants.items()}
    assert ours["ort-cpu-fp32"]["intra_op_threads"] == 1
    assert ours["ort-cpu-fp32"]["memory_pattern"] is False
    assert ours["reference-fp32"] == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ort-cpu": {"graph_levle": "all"}}, "no session option 'graph_levle'"),
        ({"ort-cpu": {"graph_level": "most"}}, "graph_level"),
        ({"ort-cpuu": {}}, "did you mean"),
        ({"ort-cpu:0": {}}, "go by runtime"),
        ({"reference": {"threads": 1}}, "no session option 'threads'"),
    ],
)
def test_wrong_options_are_refused_before_any_work(tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(runtimes.InvalidInput, match=said):
        build(recipe(tmp_path, options=options), cache=Cache(tmp_path / "cache"))
    assert not (tmp_path / "art").exists()


def test_auto_takes_what_works_here(tmp_path: Path) -> None:
    built = build(recipe(tmp_path, targets=["auto"]), cache=Cache(tmp_path / "cache"))
    here = {name for name, state in runtimes.available().items() if state.available} - {"reference"}
    assert {variant.target for variant in built.report.variants} == here
    with runtimes.load(built.path) as session:
        assert session.info["variant"] == built.report.variants[0].name


@pytest.mark.parametrize(("precision", "bound"), [("default", 1e-4), ("fp32", 1e-8), ("int8", 0.1), ("auto", 0.1)])
def test_an_engine_for_a_device_that_is_not_here(tmp_path: Path, precision: str, bound: float) -> None:
    """Compiled, its graph verified on the reference runtime, not timed, and offered before what runs here."""
    target = runtimes.Target.parse("tensorrt-rtx:sm86,sm89")
    backend = runtimes.backend(target.runtime)
    if not (state := backend.can_compile(target)).available:
        pytest.skip(f"{target}: {state.reason}")
    if backend.can_run(target).available:
        pytest.skip(f"{target} runs here")
    rng = np.random.default_rng(3)
    np.savez(tmp_path / "images.npz", image=rng.normal(size=(32, 3, 16, 16)).astype(np.float32))
    changes = {"targets": ["ort-cpu", str(target)], "precision": precision}
    if precision in ("int8", "auto"):
        changes["data__calibration"] = str(tmp_path / "images.npz")
    told: list[str] = []
    built = build(
        recipe(tmp_path, **changes),
        cache=Cache(tmp_path / "cache"),
        on_status=lambda text, share=None: told.append(text),
    )
    assert any(text.startswith(f"compile {target}: ") for text in told)  # what its builder says while it builds
    engine = built.report.variants[0]
    wanted = {"default": "fp16", "auto": "int8"}.get(precision, precision)
    assert (engine.target, engine.precision, engine.benchmark) == (str(target), wanted, None)
    assert engine.not_run
    assert all(0 <= error.nmse < bound for error in engine.fidelity.outputs.values())
    if precision == "auto":
        assert built.report.variants[1].precision == "fp16"
    page = (built.path / "report.html").read_text()
    assert "not run here" in page
    with runtimes.load(built.path) as session:
        assert session.target.runtime == "ort-cpu"
        assert engine.name in session.info["why"]
    with pytest.raises(runtimes.TargetUnavailable, match="tensorrt-rtx"):
        runtimes.load(built.path, target=str(target))


def test_a_float_graph_is_tuned_for_one_runtime_alone(tmp_path: Path) -> None:
    """The addition before a LayerNormalization is kept from a slow fusion of ONNX Runtime's, and of no other's."""
    text = """<ir_version: 9, opset_import: ["": 17]> net (float[N, 8] x) => (float[N, 8] y)
    <float[8] scale = {1, 1, 1, 1, 1, 1, 1, 1}, float[8] bias = {0, 0, 0, 0, 0, 0, 0, 0}> {
        r = Relu(x)  s = Add(x, r)  y = LayerNormalization<axis = -1>(s, scale, bias)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "norm.onnx")
    changes = {"targets": ["ort-cpu", "reference"], "output": str(tmp_path / "art")}
    quick = {"benchmark__count": 5, "benchmark__duration_s": 0.0}
    built = build(
        Recipe(model=str(tmp_path / "norm.onnx")).override(**changes, **quick), cache=Cache(tmp_path / "cache")
    )
    ops = {
        target: [node.op_type for node in onnx.load(built.path / f"{target}-fp32" / "model.onnx").graph.node]
        for target in ("ort-cpu", "reference")
    }
    assert ops == {
        "ort-cpu": ["Relu", "Sum", "LayerNormalization"],
        "reference": ["Relu", "Add", "LayerNormalization"],
    }
