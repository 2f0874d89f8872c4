"""Reconstruction: exact where it can be, no worse than before elsewhere, and it leaves what it should alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import passes
from passes._channel_cut import Cut
from passes._channel_groups import find_groups
from passes.base import label
from passes.prune_channels import PruneChannels, cut_of
from passes.prune_weights import PruneWeights
from toolchain.errors import DataError, GraphError
from toolchain.evaluate import run_reference
from toolchain.least_squares import Moments, solve
from toolchain.metrics import tensor_error
from toolchain.reconstruct import reconstruct

PLAIN = (
    "g (float[n, 6, 9, 8] x, float[8, 6, 3, 3] w, float[8] b, float[8, 4, 3, 2] v, float[8] a, float[5, 8] h, "
    "float[5] k) => (float[n, 5] y) { c = Conv <pads = [1, 1, 1, 1]> (x, w, b) r = Relu (c) "
    "d = Conv <group = 2, strides = [2, 1], dilations = [1, 2], pads = [0, 1, 2, 0]> (r, v, a) s = Relu (d) "
    "p = GlobalAveragePool (s) f = Flatten (p) y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (f, h, k) }"
)


def graph(text: str, seed: int = 0) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 9, opset_import: ["" : 20]> {text}')
    rng = np.random.default_rng(seed)
    for value in list(model.graph.inputs)[1:]:
        shape = [int(n) for n in value.shape]
        value.const_value = ir.Tensor(rng.standard_normal(shape).astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def batches(*shape: int, count: int = 4, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def weight(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def distance(dense: ir.Model, pruned: ir.Model, feeds: list[dict[str, np.ndarray]]) -> float:
    pairs = zip(run_reference(dense, feeds), run_reference(pruned, feeds), strict=True)
    return max(tensor_error(a[name], b[name]).nmse for a, b in pairs for name in a)


def named(model: ir.Model, output: str) -> str:
    """The label of the node that makes a value."""
    return next(label(node) for node in model.graph if node.outputs[0].name == output)


def spoil(model: ir.Model, *names: str) -> None:
    rng = np.random.default_rng(5)
    for name in names:
        value = model.graph.initializers[name]
        data = value.const_value.numpy()
        data = data + 0.3 * rng.standard_normal(data.shape).astype(np.float32)
        value.const_value = ir.Tensor(data, name=name)


def test_spoilt_weights_are_found_again() -> None:
    """Nothing was cut, so the dense weights are the one best solution: strides, groups, pads, alpha and beta count."""
    dense, other = graph(PLAIN), graph(PLAIN)
    spoil(other, "w", "b", "v", "a", "h", "k")
    feeds = batches(16, 6, 9, 8)
    before = distance(dense, other, feeds)
    done = reconstruct(dense, other, feeds, ridge=0.0)
    assert [layer.after < 1e-6 < layer.before for layer in done.layers] == [True] * 3
    for name in ("w", "b", "v", "a"):
        np.testing.assert_allclose(weight(other, name), weight(dense, name), atol=2e-3)
    assert distance(dense, other, feeds) < 1e-7 < before


@pytest.mark.parametrize("auto", ["VALID", "SAME_UPPER", "SAME_LOWER"])
def test_automatic_pads(auto: str) -> None:
    text = (
        "g (float[n, 3, 10, 7] x, float[4, 3, 3, 2] w, float[4, 1, 3, 3] v) => (float[n, 4, a, b] y) "
        f'{{ c = Conv <auto_pad = "{auto}", strides = [2, 2]> (x, w) '
        f'y = Conv <auto_pad = "{auto}", group = 4> (c, v) }}'
    )
    dense, other = graph(text), graph(text)
    spoil(other, "w", "v")
    feeds = batches(20, 3, 10, 7)
    reconstruct(dense, other, feeds, ridge=0.0)
    assert distance(dense, other, feeds) < 1e-7
    assert [node.inputs[2] is not None for node in other.graph] == [True, True]  # a bias came to those without one


def test_channels_that_others_can_replace_cost_nothing() -> None:
    """The last channels repeat the first, so a cut of either can be made good exactly, through two layers."""
    dense = graph(PLAIN)
    for name in ("w", "b"):
        value = dense.graph.initializers[name]
        data = value.const_value.numpy().copy()
        data[4:] = data[:4] * 2
        value.const_value = ir.Tensor(data, name=name)
    text = PLAIN.replace("group = 2, ", "").replace("float[8, 4, 3, 2] v", "float[8, 8, 3, 2] v")
    whole = graph(text)
    for name in ("w", "b"):
        whole.graph.initializers[name].const_value = dense.graph.initializers[name].const_value
    pruned = whole.clone()
    PruneChannels(ratio=0.5, exclude=(named(pruned, "d"),))(pruned)
    assert weight(pruned, "w").shape == (4, 6, 3, 3)
    feeds, fresh = batches(16, 6, 9, 8), batches(4, 6, 9, 8, seed=9)
    before = distance(whole, pruned, fresh)
    reconstruct(whole, pruned, feeds, ridge=0.0)
    assert distance(whole, pruned, fresh) < 1e-7 < 0.01 < before
    assert weight(pruned, "w").shape == (4, 6, 3, 3)


def test_a_layer_that_is_added_makes_good_what_the_other_side_lost() -> None:
    text = (
        "g (float[n, 6, 5, 5] x, float[6, 6, 1, 1] s, float[6, 6, 3, 3] w) => (float[n, 6, a, b] y) "
        "{ q = Conv (x, s) c = Conv <pads = [1, 1, 1, 1]> (x, w) y = Add (q, c) }"
    )
    dense, pruned = graph(text), graph(text)
    PruneWeights(sparsity=0.5, method="l1", exclude=(named(pruned, "c"),))(pruned)
    done = reconstruct(dense, pruned, batches(32, 6, 5, 5), ridge=0.0)
    assert done.layers[-1].compensates
    # the 3x3 filter holds a 1x1 one: it takes over all that was pruned
    assert distance(dense, pruned, batches(8, 6, 5, 5, seed=4)) < 1e-7


def test_zeros_stay_and_each_row_is_the_best_on_its_support() -> None:
    text = "g (float[n, 12] x, float[12, 7] w, float[7] b) => (float[n, 7] y) { m = MatMul (x, w) y = Add (b, m) }"
    dense, pruned = graph(text), graph(text)
    PruneWeights(sparsity=0.5, method="l1")(pruned)
    zeros = weight(pruned, "w") == 0
    mixing = np.random.default_rng(2).standard_normal((12, 12)).astype(np.float32)
    feeds = [{"x": each["x"] @ mixing + 1} for each in batches(64, 12)]
    done = reconstruct(dense, pruned, feeds, ridge=0.0)
    assert len(done.layers) == 1
    assert np.array_equal(weight(pruned, "w") == 0, zeros)
    x = np.concatenate([each["x"] for each in feeds]).astype(np.float64)
    target = x @ weight(dense, "w") + weight(dense, "b")
    for column in range(7):
        support = ~zeros[:, column]
        design = np.column_stack([x[:, support], np.ones(len(x))])
        best = np.linalg.lstsq(design, target[:, column], rcond=None)[0]
        np.testing.assert_allclose(weight(pruned, "w")[support, column], best[:-1], rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(weight(pruned, "b")[column], best[-1], rtol=2e-3, atol=5e-3)


def test_the_bias_alone_meets_the_means() -> None:
    dense, pruned = graph(PLAIN), graph(PLAIN)
    PruneWeights(sparsity=0.6, method="l1")(pruned)
    held = weight(pruned, "w").copy()
    feeds = batches(8, 6, 9, 8)
    done = reconstruct(dense, pruned, feeds, method="bias")
    assert np.array_equal(weight(pruned, "w"), held)
    assert {layer.ridge for layer in done.layers} == {np.inf}
    means = [np.mean([run["y"] for run in run_reference(m, feeds)], axis=(0, 1)) for m in (dense, pruned)]
    np.testing.assert_allclose(means[0], means[1], rtol=1e-3, atol=1e-4)


def test_disk_in_place_of_memory_changes_nothing() -> None:
    results = []
    for memory in (1 << 29, 0):
        dense, pruned = graph(PLAIN), graph(PLAIN)
        PruneWeights(sparsity=0.5, method="l1")(pruned)
        reconstruct(dense, pruned, batches(8, 6, 9, 8), memory=memory, max_rows=500)
        results.append(np.concatenate([weight(pruned, name).reshape(-1) for name in ("w", "v", "h")]))
    assert np.array_equal(*results)


def test_several_cuts_and_blocks_are_remembered_as_of_the_dense_model() -> None:
    text = (
        "g (float[n, 8, 5, 5] x, float[8, 8, 1, 1] u, float[8, 8, 3, 3] w, float[8, 8, 3, 3] v, float[3, 8, 1, 1] h) "
        "=> (float[n, 3, a, b] y) { e = Conv (x, u) c = Conv <pads = [1, 1, 1, 1]> (e, w) r = Relu (c) "
        "d = Conv <pads = [1, 1, 1, 1]> (r, v) s = Add (e, d) y = Conv (s, h) }"
    )
    dense, pruned = graph(text), graph(text)
    PruneChannels(ratio=0.25)(pruned)
    PruneChannels(ratio=0.5, importance="l2")(pruned)
    cut = cut_of(pruned)
    assert {len(each) for each in cut.channels.values()} == {4}
    kept = [i for i in range(8) if i not in cut.channels[named(dense, "e")]]
    assert np.array_equal(weight(pruned, "u"), weight(dense, "u")[kept])
    feeds = batches(24, 8, 5, 5)
    before = distance(dense, pruned, feeds)
    done = reconstruct(dense, pruned, feeds)
    assert [each.node for each in done.declined] == [named(pruned, "e")]  # what it reads is whole: it is right already
    assert len(done.layers) == 3
    assert distance(dense, pruned, feeds) < 0.8 * before
    PruneChannels(ratio=0.5, blocks=(named(pruned, "s"),))(pruned)
    assert len(cut_of(pruned).blocks) == 1
    assert reconstruct(dense, pruned, feeds).layers


def test_the_hidden_width_of_a_transformer() -> None:
    """MatMul on three axes, its bias in an Add behind it, and a residual sum behind that."""
    text = (
        "g (float[n, 5, 8] x, float[8, 16] w, float[16] b, float[16, 8] v, float[8] c) => (float[n, 5, 8] y) "
        "{ m = MatMul (x, w) a = Add (m, b) g = Gelu (a) o = MatMul (g, v) p = Add (o, c) y = Add (p, x) }"
    )
    dense, pruned = graph(text), graph(text)
    PruneChannels(ratio=0.5)(pruned)
    assert weight(pruned, "v").shape == (8, 8)
    feeds, fresh = batches(64, 5, 8), batches(8, 5, 8, seed=7)
    before = distance(dense, pruned, fresh)
    done = reconstruct(dense, pruned, feeds)
    assert [(each.node, each.compensates) for each in done.layers] == [(named(pruned, "o"), True)]
    assert distance(dense, pruned, fresh) < 0.8 * before
    assert len(pruned.graph) == 6


def test_rubbish_is_refused() -> None:
    dense, pruned = graph(PLAIN), graph(PLAIN)
    PruneChannels(ratio=0.5)(pruned)
    feeds = batches(2, 6, 9, 8)
    with pytest.raises(DataError, match="no samples"):
        reconstruct(dense, pruned, [])
    with pytest.raises(DataError, match="have the inputs z, the graph takes x"):
        reconstruct(dense, pruned, [{"z": feeds[0]["x"]}])
    few = reconstruct(dense, pruned.clone(), [{"x": feeds[0]["x"][:1]}])
    assert [each.reason for each in few.declined][-1] == "the samples have too few places to fit it on"
    with pytest.raises(GraphError, match="ridge is -1"):
        reconstruct(dense, pruned, feeds, ridge=-1)
    with pytest.raises(GraphError, match="no method 'magic'"):
        reconstruct(dense, pruned, feeds, method="magic")  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="channels of 'nobody'"):
        reconstruct(dense, pruned, feeds, cut=Cut({"nobody": (0,)}))
    with pytest.raises(GraphError, match="outputs, what is left of the dense graph's"):
        reconstruct(dense, pruned, feeds, cut=Cut())
    held = {name: v.const_value.numpy().copy() for name, v in pruned.graph.initializers.items()}
    with pytest.raises(DataError, match="not finite"):
        reconstruct(dense, pruned, [{"x": np.full((2, 6, 9, 8), np.inf, np.float32)}])
    assert all(np.array_equal(v.const_value.numpy(), held[n]) for n, v in pruned.graph.initializers.items())


def test_the_ridge_is_chosen_on_the_other_half() -> None:
    """Fewer rows than inputs: without a ridge the fit is perfect on its half, and far off on the other."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((1, 40, 3))
    halves = []
    for _ in range(2):
        half = Moments.empty(1, 40, 3)
        x = rng.standard_normal((45, 1, 40))
        half.add(x, x @ truth[0] + 3 * rng.standard_normal((45, 1, 3)))
        halves.append(half)
    start, bias = truth + 0.1 * rng.standard_normal(truth.shape), np.zeros((1, 3))
    chosen = solve(halves, start, bias)
    plain = solve(halves, start, bias, ridges=(0.0,))
    assert chosen.ridge >= 0.1
    assert chosen.after < plain.after


def test_cifar_resnet_comes_back(assets: Path) -> None:
    """Half of the channels inside all blocks: from chance to within a few points, without training."""
    pillow = pytest.importorskip("PIL.Image")
    model = ir.load(assets / "models" / "cifar10-resnets" / "cifar_resnet20.onnx")
    for name in passes.DEFAULT_PIPELINE:
        passes.make(name)(model)

    def images(file: str, count: int) -> np.ndarray:
        data = np.asarray(pillow.open(assets / "cifar10" / file).convert("RGB")).reshape(-1, 32, 32, 3)[:count]
        scaled = (data / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), dtype=np.float32)

    test = images("test_0_4999.png", 500)
    labels = np.array(json.loads((assets / "cifar10" / "test_0_4999_labels.json").read_text())[:500])

    def top1(each: ir.Model) -> float:
        (scores,) = run_reference(each, [{"input": test}])[0].values()
        return float((scores.argmax(axis=1) == labels).mean())

    pruned = model.clone()
    groups = [g for g in find_groups(model) if len(g.layers) > 1]
    PruneChannels(ratio=0.5, importance="l2", exclude=tuple(g.name for g in groups))(pruned)
    data = images("train_0_999_calibration.png", 300)
    before = top1(pruned)
    reconstruct(model, pruned, [{"input": data[i : i + 100]} for i in range(0, 300, 100)], max_rows=50_000)
    assert top1(pruned) > before + 0.2
