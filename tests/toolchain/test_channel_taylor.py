"""Taylor importance: against finite differences of the loss, and what is said where it cannot be had."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from prune_nets import images, residual_net

from passes._channel_groups import Group, find_groups
from passes._graph import constant, set_constant
from passes.prune_channels import prepared_copy
from toolchain.channel_taylor import taylor_importance
from toolchain.cli import app
from toolchain.console import run_app
from toolchain.errors import DataError, GraphError, SourceError
from toolchain.evaluate import run_reference
from toolchain.onnx_file import read_onnx, write_onnx
from toolchain.pruning import Given, prune
from toolchain.recipe import Prune
from toolchain.samples import Batch


def labelled(count: int, *, seed: int = 1) -> Batch:
    return Batch({"image": images(count, seed=seed)}, np.random.default_rng(seed).integers(0, 5, count))


def loss(model: ir.Model, batch: Batch) -> float:
    """Mean cross-entropy, from the outputs of ONNX Runtime."""
    (scores,) = run_reference(model, [batch.inputs])[0].values()
    exact = scores.astype(np.float64)
    shifted = exact - exact.max(axis=1, keepdims=True)
    log = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -float(np.mean(log[np.arange(len(log)), batch.labels]))


def scaled(model: ir.Model, group: Group, channel: int, factor: float) -> ir.Model:
    """The model with all weights that read a channel multiplied."""
    copy = model.clone()
    for member in group.members:
        if "in" in member.roles:
            value = copy.graph.initializers[member.value]
            tensor = constant(value)
            assert tensor is not None
            data = tensor.numpy().copy()
            data[(slice(None),) * member.axis + (member.positions[channel],)] *= factor
            set_constant(value, data)
    return copy


def with_softmax(model: ir.Model, op_type: str) -> ir.Model:
    """The model with a softmax behind its logits."""
    (output,) = model.graph.outputs
    node = ir.Node("", op_type, [output], [ir.AttrInt64("axis", 1)], name="last")
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "scores", output.shape, output.type
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]
    return model


def test_without_torch_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SourceError, match="needs gradients, and so torch") as caught:
        taylor_importance(residual_net(), (), [labelled(4)])
    assert "onnx-toolchain[export]" in (caught.value.hint or "")


@pytest.fixture
def _torch() -> None:
    pytest.importorskip("torch", reason="gradients need torch")


@pytest.mark.usefixtures("_torch")
@pytest.mark.parametrize("last", ["", "Softmax", "LogSoftmax"])
def test_it_is_the_square_of_what_the_loss_changes_by(last: str) -> None:
    """Central differences of the loss in a factor of the weights that read a channel: of its derivative at 1."""
    model = prepared_copy(residual_net())
    groups = find_groups(model)
    batch = labelled(8)
    found = taylor_importance(with_softmax(model.clone(), last) if last else model, groups, [batch])
    step = 0.02
    for group in groups:
        for channel in (0, 3, 7):
            ends = [loss(scaled(model, group, channel, 1 + sign * step), batch) for sign in (1, -1)]
            slope = (ends[0] - ends[1]) / (2 * step)
            assert np.sqrt(found[group.name][channel]) == pytest.approx(abs(slope), rel=2e-2, abs=2e-5)


@pytest.mark.usefixtures("_torch")
def test_squares_are_averaged_and_not_gradients() -> None:
    model = prepared_copy(residual_net())
    groups = find_groups(model)
    batch = labelled(16)
    assert batch.labels is not None
    together = taylor_importance(model, groups, [batch])
    halves = [
        taylor_importance(model, groups, [Batch({"image": batch.inputs["image"][part]}, batch.labels[part])])
        for part in (slice(8), slice(8, None))
    ]
    for name, each in together.items():
        np.testing.assert_allclose(each, (halves[0][name] + halves[1][name]) / 2, rtol=1e-3)


@pytest.mark.usefixtures("_torch")
def test_channels_that_nobody_reads_go_first() -> None:
    """l1 is misled: the filters that make these channels are as large as any."""
    made, report = prune(
        residual_net(dead=16),
        Prune(ratio=0.5, importance="taylor", exclude=["s", "two_c"], round_to=1, reconstruct=False),
        Given(calibration=[labelled(32)], judged=[labelled(16, seed=5)], data="noise"),
    )
    assert report.importance == "taylor"
    kept = made.graph.initializers["one_b"].const_value
    whole = residual_net(dead=16).graph.initializers["one_b"].const_value
    assert kept is not None
    assert whole is not None
    np.testing.assert_array_equal(kept.numpy(), whole.numpy()[:, 16:])


@pytest.mark.usefixtures("_torch")
def test_what_it_cannot_do_without() -> None:
    model = prepared_copy(residual_net())
    groups = find_groups(model)
    batch = labelled(4)
    with pytest.raises(DataError, match="needs labels"):
        taylor_importance(model, groups, [Batch(batch.inputs, None)])
    with pytest.raises(DataError, match="the model has 5 classes"):
        taylor_importance(model, groups, [Batch(batch.inputs, np.array([0, 1, 2, 5]))])
    with pytest.raises(DataError, match="no samples"):
        taylor_importance(model, groups, [])
    broken = {"image": np.full((4, 3, 12, 12), np.nan, np.float32)}
    with pytest.raises(DataError, match="not finite"):
        taylor_importance(model, groups, [Batch(broken, batch.labels)])
    headless = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 3, 4, 4] image) => (float[n, 3, 4, 4] y) '
        "{y = Relu (image)}"
    )
    with pytest.raises(GraphError, match="class scores"):
        taylor_importance(headless, (), [Batch({"image": np.ones((4, 3, 4, 4), np.float32)}, batch.labels)])


@pytest.mark.usefixtures("_torch")
def test_the_command_gathers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_onnx(residual_net(), Path("net.onnx"))
    batch = labelled(32)
    np.savez("labelled.npz", image=batch.inputs["image"], labels=batch.labels)
    np.savez("plain.npz", image=batch.inputs["image"])
    command = ["prune", "net.onnx", "-o", "out.onnx", "--ratio", "0.25", "--importance", "taylor"]
    assert run_app(app, [*command, "--data", "plain.npz"]) == 2
    assert "needs labels" in capsys.readouterr().err
    assert run_app(app, command) == 2
    assert "--data" in capsys.readouterr().err
    assert not Path("out.onnx").exists()
    assert run_app(app, [*command, "--data", "labelled.npz"]) == 0
    assert list(read_onnx(Path("out.onnx")).graph.initializers["head"].shape or ()) == [5, 12]
