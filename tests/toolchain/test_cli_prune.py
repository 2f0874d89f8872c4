"""``toolchain prune`` as a user runs it: what is said, what is written, and that nothing is where it is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prune_nets import images, residual_net
from toolchain_support import toolchain, toolchain_json

from toolchain.cli import app
from toolchain.console import run_app
from toolchain.onnx_file import read_onnx, write_onnx


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_onnx(residual_net(), Path("net.onnx"))
    np.savez("data.npz", image=images(32))


def test_a_smaller_file_and_its_account() -> None:
    said = toolchain_json("prune", "net.onnx", "-o", "small.onnx", "--target-macs", "0.5", "--data", "data.npz")
    report = said["prune"]
    assert report["macs"][1] <= 0.5 * report["macs"][0]
    assert report["recovery"] == ["least squares"]
    assert report["importance"] == "activation"
    assert Path("small.onnx").stat().st_size < Path("net.onnx").stat().st_size
    again = toolchain("prune", "small.onnx", "-o", "again.onnx", "--target-macs", "0.5", check=2)
    assert "it is pruned like this already" in again.stderr
    assert not Path("again.onnx").exists()


def test_masks_go_out_and_come_back() -> None:
    arguments = ["prune", "net.onnx", "--method", "weights"]
    assert run_app(app, [*arguments, "-o", "a.onnx", "--ratio", "0.5", "--save-masks", "masks.npz"]) == 0
    assert run_app(app, [*arguments, "-o", "b.onnx", "--masks", "masks.npz"]) == 0
    a, b = (read_onnx(Path(f"{name}.onnx")).graph.initializers for name in "ab")
    for name, value in a.items():
        other = b[name].const_value
        assert value.const_value is not None
        assert other is not None
        np.testing.assert_array_equal(value.const_value.numpy(), other.numpy())


def test_a_training_loop_gets_the_pruned_graph() -> None:
    pytest.importorskip("torch", reason="fine-tuning needs torch")
    Path("train.py").write_text(
        "def loop(module, round):\n"
        "    import torch\n"
        "    assert round.teacher is not None\n"
        "    with torch.no_grad():\n"
        "        for parameter in module.parameters():\n"
        "            parameter.mul_(0)\n"
    )
    assert run_app(app, ["prune", "net.onnx", "-o", "out.onnx", "--ratio", "0.25", "--finetune", "train.py:loop"]) == 0
    head = read_onnx(Path("out.onnx")).graph.initializers["head"].const_value
    assert head is not None
    assert head.numpy().shape == (5, 12)
    assert not head.numpy().any()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--ratio 1.5", "--ratio"),
        ("--ratio 0.3 --target-macs 0.5", "exclude each other"),
        ("", "how much is to be cut?"),
        ("--ratio 0.3 --exclude one_x", "did you mean one_"),
        ("--target-macs 0.001", "cannot be reached"),
        ("--max-drop 0.01", "--eval-data"),
        ("--ratio 0.3 --reconstruct", "--data"),
        ("--ratio 0.3 --finetune train.py", "FILE.py:FUNCTION"),
        ("--ratio 0.3 --dim sequence=4", "sequence"),
        ("--method weights --masks shape.npz", "one_a"),
        ("--method weights --masks none.npz", "no such file of masks"),
        ("--method weights --pattern 4:2", "4:2"),
        ("--method nothing --ratio 0.3", "nothing"),
        ("--ratio 0.01", "no layer loses a channel"),
    ],
)
def test_refused_and_nothing_written(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("shape.npz", one_a=np.ones((3, 3), np.bool_))
    before = sorted(Path().iterdir())
    assert run_app(app, ["prune", "net.onnx", "-o", "out.onnx", *arguments.split()]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert sorted(Path().iterdir()) == before


def test_the_model_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("net.onnx").read_bytes()
    assert run_app(app, ["prune", "net.onnx", "-o", "net.onnx", "--ratio", "0.3"]) == 2
    assert "would replace the model" in capsys.readouterr().err
    assert Path("net.onnx").read_bytes() == before
