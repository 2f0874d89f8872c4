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


def test_rounds_go_on_where_they_were_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="fine-tuning needs torch")
    Path("train.py").write_text(
        "import pathlib, torch\n"
        "def loop(module, round):\n"
        "    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)\n"
        "    x = torch.ones(4, 3, 12, 12)\n"
        "    (module(x) - round.teacher(x)).square().mean().backward()\n"
        "    optimizer.step()\n"
        "    with open('seen', 'a') as file:\n"
        "        file.write(f'{round.number}/{round.of} ')\n"
        "    if pathlib.Path('stop').exists() and round.number == 2:\n"
        "        raise RuntimeError('no more time')\n"
    )
    command = ["prune", "net.onnx", "-o", "out.onnx", "--ratio", "0.5", "--round-to", "1"]
    command += ["--finetune", "train.py:loop", "--rounds", "3"]
    Path("stop").touch()
    assert run_app(app, command) == 2
    assert "no more time" in capsys.readouterr().err
    assert not Path("out.onnx").exists()
    assert Path("out.onnx.rounds/round1.onnx").exists()
    assert run_app(app, [*command, "--seed", "1"]) == 2
    assert "rounds of another model, schedule or loop" in " ".join(capsys.readouterr().err.split())
    Path("stop").unlink()
    assert run_app(app, command) == 0
    assert "round 3, ratio 0.5: the cut loses" in " ".join(capsys.readouterr().out.split())
    assert Path("seen").read_text().split() == ["1/3", "2/3", "2/3", "3/3"]
    assert list(read_onnx(Path("out.onnx")).graph.initializers["head"].shape or ()) == [5, 8]
    assert not Path("out.onnx.rounds").exists()


def test_rounds_that_fail_at_once_leave_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="fine-tuning needs torch")
    Path("train.py").write_text("def loop(module):\n    raise KeyError('data')\n")
    before = sorted(Path().iterdir())
    command = ["prune", "net.onnx", "-o", "out.onnx", "--finetune", "train.py:loop", "--rounds", "2"]
    assert run_app(app, [*command, "--ratio", "0.5"]) == 2
    assert "train.py:2" in capsys.readouterr().err
    assert run_app(app, [*command, "--ratio", "0.5", "--exclude", "one_x"]) == 2
    assert run_app(app, [*command, "--ratio", "0.5", "--round-to", "32"]) == 2
    assert [path for path in sorted(Path().iterdir()) if path.name != "__pycache__"] == before
    Path("out.onnx.rounds").mkdir()
    Path("out.onnx.rounds/notes.txt").touch()
    assert run_app(app, [*command, "--ratio", "0.5"]) == 2
    assert "holds something else: notes.txt" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in Path("out.onnx.rounds").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--ratio 0.3 --rounds 3", "there is no training loop"),
        ("--ratio 0.3 --rounds 0", "--rounds"),
        ("--max-drop 0.1 --rounds 2 --finetune train.py:loop --data data.npz", "which max_drop does not"),
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
        ("--ratio 0.01", "so little is asked that no layer loses a channel"),
        ("--ratio nan", "--ratio"),
        ("--ratio 0.3 --seed -1", "--seed"),
        ("--ratio 0.3 --save-masks m.npz", "method channels leaves smaller tensors"),
        ("--method low-rank --ratio 0.3 --save-masks m.npz", "method low-rank leaves smaller tensors"),
        ("--ratio 0.3 --importance batch-norm", "knows nothing of any layer"),
        ("--ratio 0.3 --round-to 32", "a multiple of 32 (round_to): s (16 of 16 stay, not 11), one_c (32 of 32"),
        ("--ratio 0.3 --min-channels 64", "64 are to stay (min_channels)"),
        ("--target-macs 0.5 --no-blocks --round-to 32", "no layer may lose a channel: s: what is left is a multiple"),
        ("--method weights --masks ones.npz", "one_c: its weight needs no new zeros: none of it is to go"),
        ("--method weights --masks values.npz", "other values than 0 and 1"),
        ("--method low-rank --ratio 0.3 --exclude one_cc", "did you mean one_c"),
    ],
)
def test_refused_and_nothing_written(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("shape.npz", one_a=np.ones((3, 3), np.bool_))
    np.savez("ones.npz", one_a=np.ones((32, 16, 3, 3), np.bool_))
    np.savez("values.npz", one_a=np.full((32, 16, 3, 3), 0.5))
    before = sorted(Path().iterdir())
    assert run_app(app, ["prune", "net.onnx", "-o", "out.onnx", *arguments.split()]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--ratio 0.25", "it is pruned like this already"),
        ("--ratio 0.25 --method weights", "zero already"),
        ("--ratio 0.25 --method low-rank", "share a ratio of 0.75 already"),
    ],
)
def test_a_second_run_writes_nothing(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, ["prune", "net.onnx", "-o", "once.onnx", *arguments.split()]) == 0
    capsys.readouterr()
    assert run_app(app, ["prune", "once.onnx", "-o", "twice.onnx", *arguments.split()]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not Path("twice.onnx").exists()


def test_a_further_cut_that_rounding_forbids_is_not_called_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, ["prune", "net.onnx", "-o", "once.onnx", "--ratio", "0.25"]) == 0
    assert run_app(app, ["prune", "once.onnx", "-o", "twice.onnx", "--ratio", "0.3"]) == 2
    assert "s (12 of 12 stay, not 11)" in " ".join(capsys.readouterr().err.split())


def test_the_model_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("net.onnx").read_bytes()
    assert run_app(app, ["prune", "net.onnx", "-o", "net.onnx", "--ratio", "0.3"]) == 2
    assert "would replace the model" in capsys.readouterr().err
    assert Path("net.onnx").read_bytes() == before
