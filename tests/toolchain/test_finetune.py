"""Fine-tuning: the user's loop gets the module, the graph gets its weights, and an interrupted run goes on."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from passes.prune_channels import PruneChannels
from passes.prune_weights import PruneWeights
from toolchain.errors import DataError, GraphError, SourceError, StorageError
from toolchain.evaluate import run_reference
from toolchain.finetune import Round, fine_tune, load_loop, prune_in_rounds, schedule


def model() -> ir.Model:
    text = (
        "g (float[n, 3, 6, 6] x, float[8, 3, 3, 3] w, float[8] b, float[5, 8] h) => (float[n, 5] y) "
        "{ c = Conv (x, w, b) r = Relu (c) p = GlobalAveragePool (r) f = Flatten (p) y = Gemm <transB = 1> (f, h) }"
    )
    made = ir.from_onnx_text(f'<ir_version: 9, opset_import: ["" : 20]> {text}')
    rng = np.random.default_rng(0)
    for value in list(made.graph.inputs)[1:]:
        data = rng.standard_normal([int(n) for n in value.shape]).astype(np.float32)
        value.const_value = ir.Tensor(data, name=value.name)
        made.graph.inputs.remove(value)
        made.graph.register_initializer(value)
    return made


def weights(each: ir.Model) -> dict[str, np.ndarray]:
    return {name: v.const_value.numpy() for name, v in each.graph.initializers.items()}


def written(folder: Path, text: str, name: str = "train.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def test_the_schedule_is_cubic() -> None:
    """Zhu & Gupta: 1 - (1 - t/n)^3 of the way; the last is exact."""
    assert schedule(1, 0.7) == (0.7,)
    np.testing.assert_allclose(schedule(4, 0.8), [0.8 * (1 - (1 - t / 4) ** 3) for t in (1, 2, 3, 4)])
    assert schedule(4, 0.8)[-1] == 0.8
    np.testing.assert_allclose(schedule(2, 0.9, start=0.1), [0.9 - 0.8 / 8, 0.9])
    for rounds, final in ((0, 0.5), (3, 1.0), (3, 0.0), (2, -0.1)):
        with pytest.raises(GraphError, match="make no schedule"):
            schedule(rounds, final)


class TestLoop:
    @pytest.mark.parametrize("arguments", ["module", "module, round", "module, round=None", "*all"])
    def test_takes_one_or_two_arguments(self, tmp_path: Path, arguments: str) -> None:
        path = written(tmp_path, f"def loop({arguments}):\n    seen.append(locals())\nseen = []\n")
        load_loop(f"{path}:loop")("the module", Round(number=2))  # type: ignore[arg-type]
        (seen,) = sys.modules["user_train"].seen
        given = seen.get("all") or tuple(seen.values())
        assert given[0] == "the module"
        assert len(given) == (1 if arguments == "module" else 2)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("def loop(): pass", "takes 0 arguments"),
            ("def loop(a, b, c): pass", "takes 3 arguments"),
            ("def loop(a, *, rate): pass", "arguments"),
            ("def other(a): pass", "no function 'loop'"),
            ("loop = 3", "not callable"),
            ("def loop(a:", "SyntaxError"),
        ],
    )
    def test_what_is_no_loop_is_said(self, tmp_path: Path, text: str, says: str) -> None:
        with pytest.raises(SourceError, match=says):
            load_loop(f"{written(tmp_path, text)}:loop")

    def test_spelling_and_failures(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="no training loop"):
            load_loop("train.py")
        with pytest.raises(SourceError, match="no such file"):
            load_loop("nowhere.py:loop")
        path = written(tmp_path, "def loop(module):\n    raise KeyError('data')\n")
        with pytest.raises(SourceError, match="data") as caught:
            load_loop(f"{path}:loop")(None, Round())  # type: ignore[arg-type]
        assert "train.py:2" in str(caught.value)


def test_without_torch_it_is_said(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from toolchain.finetune import fine_tune; import onnx_ir as ir\n"
        "try: fine_tune(None, None)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("SourceError fine-tuning needs torch"), done.stderr


torch = pytest.importorskip("torch")


def nudge(module: Any, current: Round) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01 * current.number)


def test_the_users_loop_distils_and_masks_hold(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        import torch

        def loop(module, round):
            module.train()
            assert not round.teacher.training and not any(p.requires_grad for p in round.teacher.parameters())
            optimizer = torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.1)
            x = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                wanted = round.teacher(x)
            for step in range(60):
                optimizer.zero_grad()
                (module(x) - wanted).square().mean().backward()
                optimizer.step()
        """,
    )
    dense, pruned = model(), model()
    PruneWeights(sparsity=0.5, method="l1")(pruned)
    zeros = {name: each == 0 for name, each in weights(pruned).items()}
    held = {name: each.copy() for name, each in weights(dense).items()}
    done = fine_tune(pruned, load_loop(f"{path}:loop"), dense=dense)
    assert done.changed == 3
    assert done.masked == sum(int(zeros[name].sum()) for name in ("w", "h"))
    for name in ("w", "h"):
        assert np.array_equal(weights(pruned)[name] == 0, zeros[name])
    assert all(np.array_equal(weights(dense)[name], held[name]) for name in held)
    x = {"x": np.random.default_rng(3).standard_normal((64, 3, 6, 6)).astype(np.float32)}
    wanted, found = (run_reference(each, [x])[0]["y"] for each in (dense, pruned))
    again = model()
    PruneWeights(sparsity=0.5, method="l1")(again)
    worse = run_reference(again, [x])[0]["y"]
    assert np.square(found - wanted).mean() < 0.5 * np.square(worse - wanted).mean()


def rounds(folder: Path, loop: Any, dense: ir.Model | None = None, **more: Any) -> ir.Model:
    whole = model() if dense is None else dense

    def step(before: ir.Model, current: Round) -> ir.Model:
        PruneChannels(ratio=current.amount)(before)
        cut.append(len(weights(before)["b"]))
        fine_tune(before, loop, dense=whole, current=current)
        return before

    cut: list[int] = more.pop("cut", [])
    return prune_in_rounds(
        whole,
        step,
        final=0.5,
        rounds=3,
        folder=folder,
        **more,
    )


def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    whole = rounds(tmp_path / "whole", nudge)
    calls: list[int] = []

    def interrupted(module: Any, current: Round) -> None:
        calls.append(current.number)
        if calls == [1, 2]:
            raise KeyboardInterrupt
        nudge(module, current)

    with pytest.raises(KeyboardInterrupt):
        rounds(tmp_path / "broken", interrupted)
    seen: list[tuple[int, bool]] = []
    left: list[int] = []
    resumed = rounds(
        tmp_path / "broken",
        interrupted,
        on_round=lambda current, done: seen.append((current.number, done)),
        cut=left,
    )
    assert calls == [1, 2, 2, 3]
    assert seen == [(1, True), (2, False), (3, False)]
    assert left == [4, 4]  # 8 channels: 0.35, 0.48 and 0.5 of them go
    assert weights(whole).keys() == weights(resumed).keys()
    for name, each in weights(whole).items():
        np.testing.assert_array_equal(each, weights(resumed)[name])
    assert weights(whole)["w"].shape == (4, 3, 3, 3)
    # finished: nothing is trained again
    again = rounds(tmp_path / "broken", lambda module, current: pytest.fail("trained again"))
    np.testing.assert_array_equal(weights(again)["w"], weights(whole)["w"])


def test_a_loop_goes_on_within_its_round(tmp_path: Path) -> None:
    def loop(module: Any, current: Round) -> None:
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        state = current.restore(module)
        start = 0
        if state is not None:
            start = state["step"]
            optimizer.load_state_dict(state["optimizer"])
        for step in range(start, 4):
            optimizer.zero_grad()
            module(torch.ones(2, 3, 6, 6)).square().mean().backward()
            optimizer.step()
            steps.append((current.number, step))
            current.save(module, step=step + 1, optimizer=optimizer.state_dict())
            if interrupt and (current.number, step) == (2, 1):
                raise KeyboardInterrupt

    steps: list[tuple[int, int]] = []
    interrupt = False
    whole = rounds(tmp_path / "whole", loop)
    straight, steps, interrupt = steps, [], True
    with pytest.raises(KeyboardInterrupt):
        rounds(tmp_path / "broken", loop)
    interrupt = False
    resumed = rounds(tmp_path / "broken", loop)
    assert steps == straight
    for name, each in weights(whole).items():
        np.testing.assert_array_equal(each, weights(resumed)[name])


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    rounds(tmp_path, nudge)
    with pytest.raises(StorageError, match="another model, schedule or loop"):
        rounds(tmp_path, nudge, key="another loop")
    other = model()
    other.graph.initializers["b"].const_value = ir.Tensor(np.ones(8, np.float32), name="b")
    with pytest.raises(StorageError, match="another model"):
        rounds(tmp_path, nudge, other)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        rounds(tmp_path, nudge)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StorageError):
        rounds(file, nudge)


def test_damaged_checkpoints_are_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"garbage")
    with pytest.raises(DataError, match="checkpoint cannot be used"):
        fine_tune(model(), lambda module, current: current.restore(module), current=Round(folder=tmp_path))


def test_a_loop_that_diverges_leaves_the_graph(tmp_path: Path) -> None:
    pruned = model()
    held = {name: each.copy() for name, each in weights(pruned).items()}

    def diverges(module: Any, current: Round) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(float("inf"))

    with pytest.raises(GraphError, match="not finite"):
        fine_tune(pruned, diverges)
    assert all(np.array_equal(each, held[name]) for name, each in weights(pruned).items())


def test_with_samples_it_trains_behind_batch_normalization(tmp_path: Path) -> None:
    """The loop sees statistics, and the graph keeps its nodes and computes what the trained module did."""
    pytest.importorskip("torch")
    pruned, rng = model(), np.random.default_rng(1)
    PruneChannels(ratio=0.5)(pruned)
    samples = [{"x": rng.standard_normal((6, 3, 6, 6)).astype(np.float32)} for _ in range(2)]
    seen: list[Any] = []

    def loop(module: Any, current: Round) -> None:
        import torch

        torch.manual_seed(0)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module.train()
        for _ in range(3):
            optimizer.zero_grad()
            module(torch.from_numpy(samples[0]["x"])).square().mean().backward()
            optimizer.step()
        module.eval()
        with torch.no_grad():
            seen.append(module(torch.from_numpy(samples[1]["x"])).numpy())
        seen.append([name for name in module.state_dict() if name.endswith("_var")])

    before, nodes, names = weights(pruned), [node.op_type for node in pruned.graph], sorted(pruned.graph.initializers)
    done = fine_tune(pruned, loop, samples=samples)
    assert seen[1] == ["c_var"]
    assert done.changed >= 5
    assert [node.op_type for node in pruned.graph] == nodes
    assert sorted(pruned.graph.initializers) == names
    assert not np.allclose(weights(pruned)["h"], before["h"]), "what is no convolution is trained too"
    np.testing.assert_allclose(run_reference(pruned, [samples[1]])[0]["y"], seen[0], rtol=1e-3, atol=1e-5)
    with pytest.raises(DataError, match="no samples"):
        fine_tune(pruned, loop, samples=[])
