"""prune_weights: the right weights go, no others; masks in and out; and it says what zeros are worth."""

from __future__ import annotations

import importlib.util

import numpy as np
import onnx_ir as ir
import pytest
from pass_support import parse, run_ort, to_bytes

from passes import make
from passes.base import InvalidOption, PassFailed
from passes.prune_weights import InputNorms, Masks, PruneWeights, fits_pattern, masks_of


def normal(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


#: body, input, output, shape of the weight, axis of its input channels
LAYERS = {
    "conv": ("y = Conv <pads = [1, 1, 1, 1]> (x, w)", "[N, 16, 6, 6]", "[N, 32, 6, 6]", (32, 16, 3, 3), 1),
    "grouped": ("y = Conv <group = 4> (x, w)", "[N, 32, 6, 6]", "[N, 32, 4, 4]", (32, 8, 3, 3), 1),
    "transpose": ("y = ConvTranspose (x, w)", "[N, 16, 6, 6]", "[N, 32, 8, 8]", (16, 32, 3, 3), 0),
    "gemm": ("y = Gemm (x, w)", "[N, 48]", "[N, 32]", (48, 32), 0),
    "turned": ("y = Gemm <transB = 1, alpha = 0.5> (x, w)", "[N, 48]", "[N, 32]", (32, 48), 1),
    "matmul": ("y = MatMul (x, w)", "[N, 48]", "[N, 32]", (48, 32), 0),
}


def one_layer(name: str, weight: np.ndarray | None = None) -> ir.Model:
    body, inputs, outputs, shape, _ = LAYERS[name]
    text = f"agraph (float{inputs} x, float[{', '.join(map(str, shape))}] w) => (float{outputs} y) {{ {body} }}"
    return ir.from_proto(parse(text, w=normal(*shape) if weight is None else weight))


def weight_of(model: ir.Model, name: str = "w") -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def pruned(model: ir.Model, each: PruneWeights) -> tuple[np.ndarray, object]:
    """The weight afterwards; holds that a second run changes nothing and that what is kept is as it was."""
    before = weight_of(model).copy()
    outcome = each(model)
    after = weight_of(model)
    assert ((after == before) | (after == 0)).all()
    assert outcome.modified == (after != before).any()
    state = to_bytes(model)
    again = each(model)
    assert not again.modified
    assert again.fired == 0
    assert to_bytes(model) == state
    return after, outcome


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", ["l1", "l2"])
def test_the_smallest_go(name: str, method: str) -> None:
    model = one_layer(name)
    before = weight_of(model).copy()
    after, outcome = pruned(model, PruneWeights(sparsity=0.7, method=method))
    assert outcome.fired == 1
    assert (after == 0).sum() == int(0.7 * after.size)
    assert np.abs(before[after == 0]).max() <= np.abs(after[after != 0]).min()
    (remark,) = outcome.remarks
    assert "do not make a dense runtime faster" in remark
    # the graph runs, and computes what the masked weight computes
    x = normal(2, *[int(d) for d in model.graph.inputs[0].shape[1:]], seed=5)
    (y,) = run_ort(ir.to_proto(model), {"x": x})
    (expected,) = run_ort(ir.to_proto(one_layer(name, after)), {"x": x})
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("name", LAYERS)
def test_pattern_runs_along_input_channels(name: str, pattern: str) -> None:
    keep, of = map(int, pattern.split(":"))
    model = one_layer(name)
    before = weight_of(model).copy()
    after, _ = pruned(model, PruneWeights(pattern=pattern))
    axis = LAYERS[name][4]
    groups = np.moveaxis(after, axis, -1).reshape(-1, of)
    whole = np.moveaxis(before, axis, -1).reshape(-1, of)
    assert ((groups != 0).sum(axis=1) == keep).all()
    # in each group the largest stayed
    best = np.sort(np.abs(whole), axis=1)[:, -keep:].sum(axis=1)
    np.testing.assert_allclose(np.abs(groups).sum(axis=1), best, rtol=1e-6)
    assert fits_pattern(model, pattern) == {next(iter(fits_pattern(model, pattern))): True}
    assert not all(fits_pattern(one_layer(name), pattern).values())


def test_a_last_group_that_is_not_full() -> None:
    text = "agraph (float[N, 6] x, float[6, 3] w) => (float[N, 3] y) { y = MatMul (x, w) }"
    model = ir.from_proto(parse(text, w=normal(6, 3)))
    after, _ = pruned(model, PruneWeights(pattern="1:4"))
    assert ((after[:4] != 0).sum(axis=0) == 1).all()
    assert ((after[4:] != 0).sum(axis=0) == 1).all()


def test_pattern_declines_what_has_too_few_channels() -> None:
    text = "agraph (float[N, 3, 6, 6] x, float[8, 3, 3, 3] w) => (float[N, 8, 4, 4] y) { y = Conv (x, w) }"
    model = ir.from_proto(parse(text, w=normal(8, 3, 3, 3)))
    outcome = PruneWeights(pattern="2:4")(model)
    assert not outcome.modified
    assert "3 input channels" in outcome.declined[0].reason
    assert (weight_of(model) != 0).all()


TWO = (
    "agraph (float[N, 16] x, float[16, 16] a, float[16, 4] b) => (float[N, 4] y) "
    "{ h = MatMul (x, a)\n r = Relu (h)\n y = MatMul (r, b) }"
)


def test_global_takes_from_where_weights_are_small() -> None:
    a, b = 0.01 * normal(16, 16), normal(16, 4, seed=4)
    model = ir.from_proto(parse(TWO, a=a, b=b))
    PruneWeights(sparsity=0.5, method="l1", scope="global")(model)
    left = weight_of(model, "a"), weight_of(model, "b")
    assert sum(int((w == 0).sum()) for w in left) == (a.size + b.size) // 2
    assert (left[1] == 0).mean() < 0.05
    assert not PruneWeights(sparsity=0.5, method="l1", scope="global")(model).modified
    model = ir.from_proto(parse(TWO, a=a, b=b))
    PruneWeights(sparsity=0.5, method="l1")(model)
    assert (weight_of(model, "b") == 0).mean() == 0.5


def test_global_l2_does_not_depend_on_the_scale_of_a_layer() -> None:
    """LAMP by its definition; a layer that is a hundredth of the other in scale keeps its share."""
    a, b = normal(16, 16), normal(16, 4, seed=4)
    masks = []
    for scale in (1, 0.01):
        model = ir.from_proto(parse(TWO, a=(a * scale).astype(np.float32), b=b))
        assert PruneWeights(sparsity=0.5, scope="global", method="l2")(model).fired == 2
        assert not PruneWeights(sparsity=0.5, scope="global", method="l2")(model).modified
        masks.append([weight_of(model, name) != 0 for name in "ab"])
    for one, other in zip(*masks, strict=True):
        np.testing.assert_array_equal(one, other)

    def scores(w: np.ndarray) -> np.ndarray:
        squares = np.square(w.astype(np.float64))
        return np.array([s / squares[squares >= s].sum() for s in squares.reshape(-1)])

    both = np.concatenate([scores(a), scores(b)])
    kept = np.concatenate([mask.reshape(-1) for mask in masks[0]])
    assert kept.sum() == 160
    assert both[kept].min() > both[~kept].max()


def test_a_node_that_only_looks_at_the_shape_does_not_mind() -> None:
    text = (
        "agraph (float[N, 16] x, float[16, 16] a) => (float[N, 16] y, int64[2] s) { y = MatMul (x, a)\n s = Shape (a) }"
    )
    assert PruneWeights()(ir.from_proto(parse(text, a=normal(16, 16)))).fired == 1


def test_wanda_is_magnitude_times_norm_within_each_output_channel() -> None:
    w, norms = normal(48, 32), np.abs(normal(48, seed=9)).astype(np.float64)
    model = one_layer("matmul", w)
    name = next(iter(fits_pattern(model, "2:4")))
    after, _ = pruned(model, PruneWeights(sparsity=0.5, method="wanda", norms=InputNorms({name: norms})))
    score = np.abs(w) * norms[:, None]
    for column in range(32):
        gone = after[:, column] == 0
        assert gone.sum() == 24
        assert score[gone, column].max() < score[~gone, column].min()
    # on inputs of those norms it does less harm than magnitude
    x = normal(400, 48, seed=11) * norms.astype(np.float32)
    plain, _ = pruned(one_layer("matmul", w), PruneWeights(sparsity=0.5))
    assert np.square(x @ (after - w)).mean() < 0.8 * np.square(x @ (plain - w)).mean()


def test_wanda_on_a_grouped_convolution_takes_each_groups_own_channels() -> None:
    norms = np.ones(32)
    norms[8:16] = [0, 1, 1, 1, 1, 1, 1, 1]  # the first channel of the second group says nothing
    model = one_layer("grouped")
    name = next(iter(fits_pattern(model, "2:4")))
    after, _ = pruned(model, PruneWeights(sparsity=0.125, method="wanda", norms=InputNorms({name: norms})))
    assert (after[8:16, 0] == 0).all()
    assert (after[8:16, 1:] != 0).all()


def test_wanda_without_norms() -> None:
    with pytest.raises(PassFailed, match="norms"):
        PruneWeights(method="wanda")(one_layer("gemm"))
    for norms in ({}, {"Gemm -> y": np.ones(47)}):
        outcome = PruneWeights(method="wanda", norms=InputNorms(norms))(one_layer("gemm"))
        assert not outcome.modified
        assert "48 input channels" in outcome.declined[0].reason


def test_random_is_seeded() -> None:
    masks = [masks_of(run(PruneWeights(method="random", seed=s))).masks["w"] for s in (1, 1, 2)]
    assert (masks[0] == masks[1]).all()
    assert (masks[0] != masks[2]).any()
    pruned(one_layer("gemm"), PruneWeights(method="random", seed=1))


def run(each: PruneWeights) -> ir.Model:
    model = one_layer("conv")
    each(model)
    return model


@pytest.mark.parametrize("name", LAYERS)
def test_masks_come_out_and_go_in_again(name: str) -> None:
    first, second = one_layer(name), one_layer(name)
    PruneWeights(sparsity=0.6)(first)
    masks = masks_of(first)
    assert PruneWeights(masks=masks)(second).modified
    assert to_bytes(first) == to_bytes(second)
    # a pruned model asked for less stays as it is, and says how it is
    outcome = PruneWeights(sparsity=0.3)(first)
    assert not outcome.modified
    assert "zero already" in outcome.declined[0].reason


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("name", ["matmul", "gemm", "turned", "conv", "transpose"])
def test_masks_of_torch(name: str) -> None:
    """The ONNX layer with torch's mask computes what torch's pruned layer computes."""
    import torch
    from torch.nn.utils import prune

    layer = {
        "conv": lambda: torch.nn.Conv2d(16, 32, 3, padding=1, bias=False),
        "transpose": lambda: torch.nn.ConvTranspose2d(16, 32, 3, bias=False),
    }.get(name, lambda: torch.nn.Linear(48, 32, bias=False))()
    prune.l1_unstructured(layer, "weight", amount=0.6)
    state = torch.nn.Sequential(layer).state_dict()
    dense = state["0.weight_orig"].numpy()
    model = one_layer(name, dense.T.copy() if name in ("matmul", "gemm") else dense)
    model.graph.initializers["w"].name = "0.weight"
    mask = {key: tensor.numpy() for key, tensor in state.items() if key.endswith("_mask")}
    assert list(mask) == ["0.weight_mask"]
    PruneWeights(masks=Masks(mask))(model)
    x = normal(2, *[int(d) for d in model.graph.inputs[0].shape[1:]])
    (y,) = run_ort(ir.to_proto(model), {"x": x})
    expected = layer(torch.from_numpy(x)).detach().numpy() * (0.5 if name == "turned" else 1)
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_bad_masks() -> None:
    good = np.ones((48, 32), bool)
    for masks, said in (
        ({"v": good}, "no weight 'v'"),
        ({"w": good.T}, r"\[32, 48\], the weight \[48, 32\]"),
        ({"w": np.full((48, 32), 0.5)}, "other values than 0 and 1"),
    ):
        model = one_layer("matmul")
        before = to_bytes(model)
        with pytest.raises(PassFailed, match=said):
            PruneWeights(masks=Masks(masks))(model)
        assert to_bytes(model) == before
    with pytest.raises(PassFailed) as caught:
        PruneWeights(masks=Masks({"ww": good}))(one_layer("matmul"))
    assert "did you mean w" in str(caught.value.hint)


def test_shared_and_declined() -> None:
    text = (
        "agraph (float[N, 16] x, float[16, 16] a, int64[M] i) => (float[N, 16] y, float[M, 16] e) "
        "{ h = MatMul (x, a)\n y = MatMul (h, a) %s }"
    )
    model = ir.from_proto(parse(text % "\n e = Gather (a, i)", a=normal(16, 16)))
    outcome = PruneWeights()(model)
    assert not outcome.modified
    assert "(Gather) reads its weight too" in outcome.declined[0].reason
    shared = text.replace(", int64[M] i", "").replace(", float[M, 16] e", "") % ""
    model = ir.from_proto(parse(shared, a=normal(16, 16)))
    assert PruneWeights()(model).fired == 1
    assert (weight_of(model, "a") == 0).sum() == 128
    outcome = PruneWeights(exclude=("MatMul -> y",))(ir.from_proto(parse(shared, a=normal(16, 16))))
    assert [d.reason for d in outcome.declined] == ["excluded"]
    with pytest.raises(PassFailed, match="no node 'MatMul -> z'") as caught:
        PruneWeights(exclude=("MatMul -> z",))(model)
    assert "MatMul -> y" in str(caught.value.hint)


def test_nothing_to_prune() -> None:
    model = ir.from_proto(parse("agraph (float[N] x) => (float[N] y) { y = Relu (x) }"))
    outcome = PruneWeights()(model)
    assert (outcome.modified, outcome.fired, outcome.declined) == (False, 0, ())
    assert outcome.remarks == ("the model has no layer with a constant weight: there is nothing to prune",)


def test_weights_in_other_types_and_places() -> None:
    half = normal(48, 32).astype(np.float16)
    text = "agraph (float16[N, 48] x, float16[48, 32] w) => (float16[N, 32] y) { y = MatMul (x, w) }"
    after, _ = pruned(ir.from_proto(parse(text, w=half)), PruneWeights())
    assert after.dtype == np.float16
    assert (after == 0).mean() == 0.5
    node = (
        "agraph (float[N, 2] x) => (float[N, 2] y) "
        "{ w = Constant <value = float[2, 2] {1., 2., 3., 4.}> ()\n y = MatMul (x, w) }"
    )
    model = ir.from_proto(parse(node))
    assert PruneWeights()(model).fired == 1
    (y,) = run_ort(ir.to_proto(model), {"x": np.eye(2, dtype=np.float32)})
    np.testing.assert_array_equal(y, [[0, 0], [3, 4]])
    assert not PruneWeights()(model).modified


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.0},
        {"sparsity": 1.0},
        {"sparsity": -0.5},
        {"sparsity": float("nan")},
        {"method": "l3"},
        {"scope": "row"},
        {"pattern": "4:2"},
        {"pattern": "0:4"},
        {"pattern": "2-4"},
        {"pattern": "2:4", "sparsity": 0.5},
        {"pattern": "2:4", "scope": "global"},
        {"masks": Masks({}), "sparsity": 0.5},
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(InvalidOption):
        make("prune_weights", **options)


def test_compressed_size_in_the_remark_is_about_right() -> None:
    import re
    import zlib

    model = one_layer("conv", normal(32, 16, 3, 3))
    before = len(zlib.compress(weight_of(model).tobytes(), 1))
    outcome = PruneWeights(sparsity=0.9)(model)
    after = len(zlib.compress(weight_of(model).tobytes(), 1))
    found = re.search(r"take ([\d.]+) MB in place of ([\d.]+)", outcome.remarks[0])
    assert found is not None
    np.testing.assert_allclose([float(found[1]), float(found[2])], [after / 1e6, before / 1e6], atol=0.006)
    assert after < 0.3 * before


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx: not installed")
def test_tensorrt_builds_2_4_with_sparse_weights() -> None:
    import tensorrt_rtx as trt

    model = ir.from_proto(
        parse(
            "agraph (float[1, 64, 16, 16] x, float[64, 64, 3, 3] w, float[64, 64, 1, 1] v) => (float[1, 64, 16, 16] y) "
            "{ h = Conv <pads = [1, 1, 1, 1]> (x, w)\n r = Relu (h)\n y = Conv (r, v) }",
            w=normal(64, 64, 3, 3),
            v=normal(64, 64, 1, 1),
        )
    )
    PruneWeights(pattern="2:4")(model)
    assert all(fits_pattern(model, "2:4").values())
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(ir.to_proto(model).SerializeToString()), [
        str(parser.get_error(i)) for i in range(parser.num_errors)
    ]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    assert builder.build_serialized_network(network, config) is not None
