"""The pass loop: it checks, compares, dumps, stops, and names the pass that broke something."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from toolchain_support import conv_net

import passes
from passes.base import Outcome, Pass, PassFailed
from toolchain import optimize as loop
from toolchain.errors import GraphError
from toolchain.evaluate import input_specs, run_reference
from toolchain.metrics import tensor_error
from toolchain.optimize import check_graph, optimize
from toolchain.recipe import PassStep, Recipe
from toolchain.seeded import seeded_inputs

PIPELINE = Recipe(model="x").pipeline()


def fresh() -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    model = ir.from_proto(conv_net())
    return model, [seeded_inputs(input_specs(model), batch=2, seed=seed) for seed in range(2)]


def test_the_default_pipeline_keeps_the_outputs_and_reports(tmp_path: Path) -> None:
    model, samples = fresh()
    before = run_reference(model, samples)
    reports = optimize(model, PIPELINE, verify_on=samples, dump_dir=tmp_path / "dump")
    fused = next(r for r in reports if r.name == "fuse_conv_bn")
    assert (fused.changed, fused.fired, fused.nodes_before - fused.nodes_after) == (True, 1, 1)
    assert fused.nmse is not None
    assert fused.nmse < 1e-10
    assert "BatchNormalization" not in {node.op_type for node in model.graph}
    for was, now in zip(before, run_reference(model, samples), strict=True):
        assert tensor_error(was["logits"], now["logits"]).nmse < 1e-11
    names = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert names == ["00_input.onnx"] + [f"{n:02d}_{s.name}.onnx" for n, s in enumerate(PIPELINE, start=1)]


def test_a_second_run_changes_nothing() -> None:
    model, _ = fresh()
    optimize(model, PIPELINE)
    assert [r.name for r in optimize(model, PIPELINE) if r.changed] == []


def test_stop_after() -> None:
    model, _ = fresh()
    reports = optimize(model, PIPELINE, stop_after="fold_constants")
    last = max(i for i, step in enumerate(PIPELINE) if step.name == "fold_constants")
    assert len(reports) == last + 1
    with pytest.raises(GraphError, match="the pipeline has no such pass"):
        optimize(model, PIPELINE, stop_after="fold_constant")


@dataclasses.dataclass(frozen=True)
class BreakNumbers(Pass):
    """Adds one to the weights: valid, and wrong."""

    def call(self, model: ir.Model) -> Outcome:
        weight = model.graph.initializers["fc_w"]
        assert weight.const_value is not None
        weight.const_value = ir.Tensor(weight.const_value.numpy() + 1)
        return Outcome(model, True)


@dataclasses.dataclass(frozen=True)
class BreakGraph(Pass):
    """Leaves a node reading what comes after it."""

    def call(self, model: ir.Model) -> Outcome:
        first, *_, last = list(model.graph)
        first.replace_input_with(0, last.outputs[0])
        return Outcome(model, True)


@dataclasses.dataclass(frozen=True)
class GiveUp(Pass):
    """Fails as a pass should."""

    def call(self, model: ir.Model) -> Outcome:
        raise PassFailed("cannot go on", node="conv", hint="do this")


@dataclasses.dataclass(frozen=True)
class Crash(Pass):
    """Fails as a pass should not."""

    def call(self, model: ir.Model) -> Outcome:
        raise KeyError("oops")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (BreakNumbers, r"pass broken changed the model: output 'logits' is off by a normalised MSE"),
        (BreakGraph, r"pass broken left an invalid graph"),
        (GiveUp, r"pass broken: cannot go on\n  at:   conv\n  next: do this"),
        (Crash, r"pass broken failed with KeyError"),
    ],
)
def test_the_pass_that_breaks_something_is_named(
    broken: type[Pass], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = passes.make
    monkeypatch.setattr(loop.passes, "make", lambda name, **options: broken() if name == "broken" else real(name))
    model, samples = fresh()
    step = PassStep.model_construct(name="broken", options={})
    with pytest.raises(GraphError, match=said):
        optimize(model, (PassStep(name="strip_metadata"), step), verify_on=samples)


def test_the_check_sees_what_a_runtime_would_refuse() -> None:
    model, _ = fresh()
    check_graph(model)
    model.graph[-1].attributes.add(ir.AttrInt64("transB", 0))  # the weight is [10, 8], the input [batch, 8]
    with pytest.raises(onnx.shape_inference.InferenceError, match="fc"):
        check_graph(model)


def test_a_lossy_pass_is_compared_and_not_refused_and_its_remark_is_reported() -> None:
    model = ir.from_proto(conv_net())
    feeds = {"image": np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)}
    (report,) = optimize(model, [PassStep(name="prune_weights", options={"sparsity": 0.7})], verify_on=[feeds])
    assert report.nmse is not None
    assert report.nmse > 1e-4
    assert "do not make a dense runtime faster" in report.remarks[0]


def test_remarks_are_shown_in_the_report() -> None:
    from toolchain.optimize import PassReport
    from toolchain.render import html, notes
    from toolchain.report import BuildReport

    done = PassReport("prune_weights", {}, True, 1, 1, 1, 0.1, (), remarks=("zeros save no time",))
    report = BuildReport("net", "net.onnx", {"kind": "file"}, (), 17, {}, 0, (done,), (), ())
    assert notes(report) == ["prune_weights: zeros save no time"]
    assert "zeros save no time" in html(report)
