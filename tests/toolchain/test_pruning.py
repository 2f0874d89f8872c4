"""Pruning of a graph: what comes out, what is proved and accounted for, what is refused; and a build that prunes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from prune_nets import images, residual_net

from passes.fuse_conv_bn import FuseConvBn
from toolchain import benchmark as bench
from toolchain import pruning
from toolchain.build import build
from toolchain.cache import Cache
from toolchain.errors import DataError, FidelityError, GraphError, RecipeError, SourceError
from toolchain.evaluate import run_reference
from toolchain.finetune import Round
from toolchain.metrics import tensor_error
from toolchain.onnx_file import read_onnx, write_onnx
from toolchain.prune_account import PruneReport
from toolchain.pruning import ALREADY, Given, prune
from toolchain.recipe import Prune, Recipe, from_dict
from toolchain.samples import Batch
from toolchain.verify_command import verify_path


@pytest.fixture
def given() -> Given:
    batches = [Batch({"image": images(32, seed=seed)}, None) for seed in range(3)]
    return Given(calibration=batches[:2], judged=batches[2:], data="noise")


def asked(**options: Any) -> Prune:
    return Prune(**{"reconstruct": False, **options})


def test_what_is_cut_is_accounted_for(given: Given) -> None:
    model = residual_net()
    made, report = prune(model, asked(target_macs=0.5, blocks=False), given)
    assert report.macs[1] <= 0.5 * report.macs[0]
    assert report.proof is not None
    assert report.proof < 1e-10
    assert report.importance == "activation"
    assert {g.name: g.before for g in report.groups} == {"s": 16, "one_c": 32, "two_c": 32}
    assert all(g.after % 4 == 0 for g in report.groups)
    weights = made.graph.initializers
    after = {g.name: g.after for g in report.groups}
    assert list(weights["one_a"].shape or ()) == [after["one_c"], after["s"], 3, 3]
    assert [each.node for each in report.whole] == ["logits"]
    assert report.parameters[1] == sum(v.const_value.size for v in weights.values() if v.const_value is not None)
    assert list(model.graph.initializers["one_a"].shape or ()) == [32, 16, 3, 3]  # the model itself is whole


def test_the_same_is_asked_again_and_more(given: Given) -> None:
    once, first = prune(residual_net(), asked(ratio=0.25), given)
    again, second = prune(once, asked(ratio=0.25), given)
    assert first.changed
    assert not second.changed
    assert again is once
    assert second.remarks == (ALREADY,)
    more, third = prune(once, asked(ratio=0.5), given)
    assert [g.after for g in third.groups] == [8, 16, 16]
    # of the multiply-accumulates before any cut: what a ratio of a half left is below a target of a half
    assert not prune(more, asked(target_macs=0.5), given)[1].changed


def test_it_is_the_same_every_time(given: Given, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_onnx(prune(residual_net(), asked(target_macs=0.6), given)[0], tmp_path / f"{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_least_squares_win_back_what_was_lost(given: Given) -> None:
    model = residual_net()
    feeds = [{"image": images(16, seed=9)}]
    whole = run_reference(model, feeds)[0]["logits"]
    errors = []
    for reconstruct in (False, True):
        made, report = prune(model, asked(ratio=0.25, reconstruct=reconstruct), given)
        errors.append(tensor_error(whole, run_reference(made, feeds)[0]["logits"]).nmse)
        assert report.recovery == (("least squares",) if reconstruct else ())
    assert errors[1] < 0.5 * errors[0]


def test_a_reconstruction_that_makes_it_worse_is_not_kept(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then biases alone are moved, and where that is worse too, the cut stays as it is."""
    spoils = {"least-squares"}

    def spoilt(whole: ir.Model, made: ir.Model, samples: Any, *, method: str, **options: Any) -> None:
        assert sum(len(feeds["image"]) for feeds in samples) == 64
        if method in spoils:
            head = made.graph.initializers["head"]
            assert head.const_value is not None
            head.const_value = ir.Tensor(-head.const_value.numpy(), name="head")

    monkeypatch.setattr(pruning, "reconstruct", spoilt)
    only_cut, _ = prune(residual_net(), asked(ratio=0.25), given)
    made, report = prune(residual_net(), asked(ratio=0.25, reconstruct=True), given)
    assert report.recovery == ("bias correction",)
    assert report.drop == report.drop_cut
    assert report.remarks[0].startswith("least squares is not kept: with it")
    spoils.add("bias")
    made, report = prune(residual_net(), asked(ratio=0.25, reconstruct=True), given)
    assert report.recovery == ()
    assert len(report.remarks) == 2
    heads = [each.graph.initializers["head"].const_value for each in (made, only_cut)]
    assert heads[0] is not None
    assert heads[1] is not None
    np.testing.assert_array_equal(heads[0].numpy(), heads[1].numpy())


def test_training_gets_both_graphs_and_what_it_made_is_judged(given: Given) -> None:
    seen = []

    def train(whole: ir.Model, pruned: ir.Model, current: Round) -> None:
        seen.append((whole.graph.initializers["head"].shape, pruned.graph.initializers["head"].shape))
        value = pruned.graph.initializers["head"]
        assert value.const_value is not None
        value.const_value = ir.Tensor(-value.const_value.numpy(), name="head")

    _, report = prune(residual_net(), asked(ratio=0.25), dataclasses.replace(given, fine_tune=train))
    assert [[list(a or ()), list(b or ())] for a, b in seen] == [[[5, 16], [5, 12]]]
    assert report.recovery == ("fine-tuning",)
    assert report.drop > report.drop_cut  # it was trained to say the opposite


def trained_in_rounds(
    given: Given, folder: Path, *, stop_at: int = 0, aim: dict[str, Any] | None = None, rounds: int = 3
) -> tuple[ir.Model, PruneReport, list[tuple[int, float, list[int]]]]:
    """The training counts what it is given, and moves the head."""
    seen: list[tuple[int, float, list[int]]] = []

    def train(whole: ir.Model, pruned: ir.Model, current: Round) -> None:
        head = pruned.graph.initializers["head"]
        assert head.const_value is not None
        assert list(whole.graph.initializers["head"].shape or ()) == [5, 16]  # the teacher is whole in every round
        seen.append((current.number, current.amount, [int(n) for n in head.const_value.shape.numpy()]))
        if current.number == stop_at:
            raise KeyboardInterrupt
        head.const_value = ir.Tensor(head.const_value.numpy() * np.float32(1.01), name="head")

    step = asked(**(aim or {"ratio": 0.75}), finetune="train.py:loop", rounds=rounds, round_to=1)
    with contextlib.suppress(KeyboardInterrupt):
        made, report = prune(residual_net(), step, dataclasses.replace(given, fine_tune=train, folder=folder))
        return made, report, seen
    return residual_net(), PruneReport("", "", "", "", "", 0), seen


@pytest.mark.parametrize("aim", [{"ratio": 0.75}, {"target_macs": 0.25, "blocks": False}])
def test_rounds_cut_and_train_in_turn_and_go_on(aim: dict[str, Any], given: Given, tmp_path: Path) -> None:
    made, report, seen = trained_in_rounds(given, tmp_path / "whole", aim=aim)
    assert [amount for _, amount, _ in seen] == pytest.approx([0.75 * (1 - (1 - t / 3) ** 3) for t in (1, 2, 3)])
    assert report.asked == f"{next(iter(aim))} {next(iter(aim.values()))} in 3 rounds"
    assert report.recovery == ("fine-tuning",)
    assert [each.split(",")[0] for each in report.remarks[:3]] == ["round 1", "round 2", "round 3"]
    assert {g.name: g.before for g in report.groups} == {"s": 16, "one_c": 32, "two_c": 32}
    assert report.macs[1] < 0.26 * report.macs[0]
    if "ratio" in aim:
        assert [shape for _, _, shape in seen] == [[5, 8], [5, 4], [5, 4]]
        assert [g.after for g in report.groups] == [4, 8, 8]
    # interrupted in the second round, and again: the same in the end, the first is not done again
    broken = tmp_path / "broken"
    assert [number for number, *_ in trained_in_rounds(given, broken, stop_at=2, aim=aim)[2]] == [1, 2]
    resumed, told, again = trained_in_rounds(given, broken, aim=aim)
    assert [number for number, *_ in again] == [2, 3]
    assert dataclasses.replace(told, evaluations=0) == dataclasses.replace(report, evaluations=0)
    for name, value in made.graph.initializers.items():
        other = resumed.graph.initializers[name].const_value
        assert value.const_value is not None
        assert other is not None
        np.testing.assert_array_equal(value.const_value.numpy(), other.numpy())
    # what came out knows what it is
    second, nothing = prune(made, asked(**aim, round_to=1), given)
    assert second is made
    assert nothing.remarks == (ALREADY,)


def test_after_rounds_sizes_are_compared_with_the_dense_model(given: Given, tmp_path: Path) -> None:
    model = residual_net()
    once = prune(model, asked(method="weights", ratio=0.8), given)[1].remarks[0]
    step = asked(method="weights", ratio=0.8, finetune="train.py:loop", rounds=3)
    within = dataclasses.replace(given, fine_tune=lambda whole, pruned, current: None, folder=tmp_path / "rounds")
    remarks = prune(model, step, within)[1].remarks
    dense = re.search(r"in place of ([\d.]+)", once)
    assert dense is not None
    assert [re.findall(r"in place of ([\d.]+)", each) for each in remarks[3:]] == [[dense[1]]]
    assert remarks[3].split(";")[0] == once.split(";")[0]  # 80 % of the weights of as many layers


def test_a_round_in_which_nothing_more_goes_is_not_trained(given: Given, tmp_path: Path) -> None:
    # of 16 and 32 channels 0.09, 0.15, 0.19 and 0.2 go, what is left a multiple of 4 and 8
    step = asked(ratio=0.2, finetune="train.py:loop", rounds=4)
    seen: list[int] = []

    def train(whole: ir.Model, pruned: ir.Model, current: Round) -> None:
        seen.append(current.number)

    _, report = prune(residual_net(), step, dataclasses.replace(given, fine_tune=train, folder=tmp_path / "rounds"))
    assert seen == [2]
    assert "round 1 and 3 and 4: nothing more went, and nothing was trained" in report.remarks
    assert [g.after for g in report.groups] == [12, 24, 24]


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"ratio": 0.3, "exclude": ["one_cc"]}, "no layer that can be cut is called 'one_cc'", "did you mean one_c"),
        ({"ratio": 0.3, "exclude": ["s", "one_c", "two_c"]}, "no layer can be cut: .*excluded", "exclude fewer"),
        ({"target_macs": 0.001}, "0% of the multiply-accumulates cannot be reached", "a larger target"),
        ({"method": "weights", "masks": "masks.npz"}, "shape|mask", ""),
    ],
)
def test_refused(
    options: dict[str, Any], message: str, hint: str, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("masks.npz", one_a=np.ones((3, 3), np.bool_))
    with pytest.raises(GraphError, match=message) as caught:
        prune(residual_net(), asked(**options), given)
    assert hint in (caught.value.hint or "")


def raw_net() -> ir.Model:
    """As exporters leave it: BatchNormalization behind convolutions, with scales that differ a thousandfold, and
    MatMul with its bias in an Add."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"w": (32, 16, 3, 3), "u": (32, 32, 1, 1), "m": (32, 5), "mb": (5,)}
    shapes |= {f"{name}{i}": (32,) for i in (1, 2) for name in ("scale", "shift", "mean", "variance")}
    body = (
        "c = Conv <pads = [1, 1, 1, 1]> (x, w) n = BatchNormalization (c, scale1, shift1, mean1, variance1) "
        "d = Conv (n, u) e = BatchNormalization (d, scale2, shift2, mean2, variance2) r = Relu (e) "
        "p = GlobalAveragePool (r) f = Flatten (p) k = MatMul (f, m) y = Add (k, mb)"
    )
    declared = ", ".join(f"float[{', '.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[N, 16, 8, 8] x, {declared}) => (float[N, 5] y) {{ {body} }}'
    )
    for value in list(model.graph.inputs)[1:]:
        name = str(value.name)
        data = rng.normal(size=shapes[name])
        if name.startswith(("scale", "variance")):
            data = 10 ** rng.uniform(-1.5, 1.5, shapes[name])
        value.const_value = ir.Tensor(data.astype(np.float32), name=name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


@pytest.mark.parametrize("importance", ["auto", "activation"])
def test_ranks_are_chosen_of_what_layers_are_once_normalisations_are_folded(importance: str) -> None:
    feeds = [{"x": np.random.default_rng(seed).normal(size=(16, 16, 8, 8)).astype(np.float32)} for seed in range(2)]
    batches = [Batch(each, None) for each in feeds]
    given = Given(calibration=batches if importance != "auto" else (), judged=batches, data="noise")
    step = asked(method="low-rank", ratio=0.3, importance=importance, exclude=["MatMul -> k"])
    raw, folded = raw_net(), raw_net()
    assert FuseConvBn()(folded).fired == 2
    made, report = prune(raw, step, given)
    expected, _ = prune(folded, step, given)
    assert "2 BatchNormalization were folded into the layers beside them first" in report.remarks
    assert [node.op_type for node in made.graph].count("BatchNormalization") == 0
    assert [node.op_type for node in raw.graph].count("BatchNormalization") == 2  # the model itself is as it was
    np.testing.assert_allclose(run_reference(made, feeds)[0]["y"], run_reference(expected, feeds)[0]["y"], rtol=1e-4)
    again, second = prune(made, step, given)
    assert again is made
    assert not second.changed
    with pytest.raises(GraphError, match="BatchNormalization -> n is folded into another layer"):
        prune(raw_net(), asked(method="low-rank", ratio=0.3, exclude=["BatchNormalization -> n"]), given)


def test_without_a_layer_or_samples_it_says_so(given: Given) -> None:
    relu = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2, 4] x) => (float[2, 4] y) {y = Relu (x)}'
    )
    fed = dataclasses.replace(given, calibration=(), judged=[Batch({"x": np.ones((2, 4), np.float32)}, None)])
    for method in ("channels", "weights"):
        with pytest.raises(GraphError, match="no layer with a constant float weight"):
            prune(relu, asked(ratio=0.5, method=method), fed)
    with pytest.raises(DataError, match="importance activation needs samples"):
        prune(residual_net(), asked(ratio=0.5, importance="activation"), dataclasses.replace(given, calibration=()))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "how much is to be cut"),
        ({"ratio": 0.3, "target_macs": 0.5}, "ratio and target_macs exclude each other"),
        ({"ratio": 1.0}, "less than 1"),
        ({"ratio": 0}, "greater than 0"),
        ({"method": "weights", "target_macs": 0.5}, "method weights knows no target_macs"),
        ({"method": "weights", "ratio": 0.5, "importance": "activation"}, "knows no importance activation"),
        ({"method": "weights", "ratio": 0.5, "round_to": 8}, "knows no round_to"),
        ({"method": "low-rank", "ratio": 0.5, "scope": "layer"}, "knows no scope layer"),
        ({"target_macs": 0.5, "scope": "global"}, "scope says nothing"),
        ({"ratio": 0.5, "pattern": "2:4"}, "exclude each other"),
        ({"ratio": 0.5, "importance": "activation"}, "needs samples"),
        ({"ratio": 0.5, "reconstruct": True}, "needs samples"),
        ({"max_drop": 0.01}, "needs samples to judge on"),
        ({"ratio": 0.5, "importance": "taylor"}, "importance taylor needs samples"),
        ({"ratio": 0.5, "importance": "taylor", "method": "weights"}, "knows no importance taylor"),
        ({"ratio": 0.5, "rounds": 3}, "there is no training loop"),
        ({"ratio": 0.5, "rounds": 0}, "greater than or equal to 1"),
        ({"max_drop": 0.5, "rounds": 3, "finetune": "train.py:loop"}, "which max_drop does not"),
        (
            {"ratio": 0.5, "method": "low-rank", "rounds": 3, "finetune": "train.py:loop"},
            "which method low-rank does not",
        ),
        ({"ratioo": 0.5}, "unknown key 'ratioo'"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        from_dict({"model": "m.onnx", "prune": section}, origin="recipe.yaml")


def test_ranges_of_another_graph_are_refused() -> None:
    tree = {"model": "m.onnx", "prune": {"ratio": 0.3}, "quantize": {"calibration": "c.json"}}
    with pytest.raises(RecipeError, match="was not pruned"):
        from_dict(tree, origin="recipe.yaml")


def test_a_build_prunes_recovers_calibrates_and_quantises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MAX_SPREAD", float("inf"))
    monkeypatch.setattr(bench, "MAX_COV", float("inf"))
    write_onnx(residual_net(), tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", image=images(64))
    recipe = Recipe(model=str(tmp_path / "net.onnx"), prune=Prune(target_macs=0.5)).override(
        output=str(tmp_path / "art"), precision="int8", data__calibration=str(tmp_path / "data.npz"),
        benchmark__count=5, benchmark__duration_s=0.0,
    )  # fmt: skip
    cache = Cache(tmp_path / "cache")
    built = build(recipe, cache=cache)
    report = built.report
    assert report.prune is not None
    assert report.prune.macs[1] <= 0.5 * report.prune.macs[0]
    assert report.prune.recovery == ("least squares",)
    assert [s.name for s in report.stages][:4] == ["export", "optimize", "prune", "calibrate"]
    # compared with the pruned graph, which is in the artifact: against the export it would be far beyond the bound
    (variant,) = report.variants
    assert variant.fidelity.passed
    pruned, exported = (read_onnx(built.path / folder / "model.onnx") for folder in ("pruned", "export"))
    feeds = [{"image": images(4, seed=5)}]
    apart = tensor_error(run_reference(exported, feeds)[0]["logits"], run_reference(pruned, feeds)[0]["logits"]).nmse
    assert apart > 2 * variant.fidelity.worst[1].nmse
    options: dict[str, Any] = {
        "variant": None, "eval_data": None, "limit": None, "preprocessing": None, "samples": 2, "dims": {},
        "max_nmse": None, "layers": False, "seed": 0, "on_status": lambda text, share=None: None,
    }  # fmt: skip
    found = verify_path(built.path, against=None, **options)
    assert found.reference.endswith("pruned/model.onnx")
    found.require()
    strict = verify_path(
        built.path, against=built.path / "export" / "model.onnx", **options | {"max_nmse": 0.5 * apart}
    )
    with pytest.raises(FidelityError):
        strict.require()
    manifest = json.loads((built.path / "manifest.json").read_text())["additional_metadata"]["toolchain"]
    assert manifest["prune"]["macs"] == list(report.prune.macs)
    assert "pruned/model.onnx" in manifest["files"]
    html = (built.path / "report.html").read_text()
    assert "Pruned: channels, target_macs 0.5" in html
    assert "against the pruned graph" in html
    assert build(recipe, cache=cache).up_to_date
    # another share is another stage, and nothing before it is done again
    stages = {s.name: s.cached for s in build(recipe.override(prune__target_macs=0.7), cache=cache).report.stages}
    assert stages["optimize"]
    assert not stages["prune"]


def test_a_build_trains_in_rounds_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="fine-tuning needs torch")
    monkeypatch.setattr(bench, "MAX_SPREAD", float("inf"))
    monkeypatch.setattr(bench, "MAX_COV", float("inf"))
    write_onnx(residual_net(), tmp_path / "net.onnx")
    (tmp_path / "train.py").write_text(
        "from pathlib import Path\n"
        "LOG = Path(__file__).parent / 'log.txt'\n"
        "def loop(module, round):\n"
        "    import torch\n"
        "    LOG.write_text((LOG.read_text() if LOG.exists() else '') + f'{round.number} ')\n"
        "    if LOG.read_text() == '1 2 ':\n"
        "        raise RuntimeError('no more time')\n"
        "    with torch.no_grad():\n"
        "        for parameter in module.parameters():\n"
        "            parameter.mul_(1.001)\n"
    )
    loop = f"{tmp_path / 'train.py'}:loop"
    recipe = Recipe(model=str(tmp_path / "net.onnx"), prune=Prune(ratio=0.5, finetune=loop, rounds=2, round_to=1))
    recipe = recipe.override(output=str(tmp_path / "art"), benchmark__count=5, benchmark__duration_s=0.0)
    cache = Cache(tmp_path / "cache")
    with pytest.raises(SourceError, match="no more time"):
        build(recipe, cache=cache)
    built = build(recipe, cache=cache)
    assert (tmp_path / "log.txt").read_text() == "1 2 2 "
    report = built.report.prune
    assert report is not None
    assert report.recovery == ("fine-tuning",)
    assert {g.name: g.after for g in report.groups} == {"s": 8, "one_c": 16, "two_c": 16}
    assert not list((tmp_path / "cache" / "rounds").iterdir())
    assert str(tmp_path) not in (built.path / "manifest.json").read_text()
