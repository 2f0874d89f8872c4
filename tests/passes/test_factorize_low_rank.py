"""factorize_low_rank: exact where the rank is low, best where it is not, and only where it saves."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from generated_support import BATCH, generated
from pass_support import assert_close, check, ops, parse, random_feeds, run_ort, to_bytes

from passes import make
from passes._cost import model_cost
from passes.base import InvalidOption, PassFailed
from passes.factorize_low_rank import FactorizeLowRank, InputMoments

HAS_TENSORLY = importlib.util.find_spec("tensorly") is not None
needs_tensorly = pytest.mark.skipif(not HAS_TENSORLY, reason="tensorly: not installed")


def normal(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def low_rank(outputs: int, inputs: int, *taps: int, rank: int, seed: int = 5) -> np.ndarray:
    """A kernel [O, I, k...] whose channel axes both have that rank."""
    core = normal(rank, rank, *taps, seed=seed)
    made = np.einsum("rs...,or,is->oi...", core, normal(outputs, rank, seed=1), normal(inputs, rank, seed=2))
    return (made / np.sqrt(np.square(made).mean())).astype(np.float32)


#: body, input, output; the weight is [O, I, taps] in torch's form
LAYERS = {
    "matmul": ("y = MatMul (x, w)", "[2, N, 32]", "[2, N, 48]", ()),
    "gemm": ("y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b)", "[N, 32]", "[N, 48]", ()),
    "turned": ("y = Gemm <transB = 1> (x, w, b)", "[N, 32]", "[N, 48]", ()),
    "1x1": ("y = Conv (x, w, b)", "[N, 32, 5, 5]", "[N, 48, 5, 5]", (1, 1)),
    "1x1 strided": (
        "y = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w, b)",
        "[N, 32, 5, 5]", "[N, 48, 4, 4]", (1, 1),
    ),
    "3x3": ("y = Conv <pads = [1, 1, 1, 1]> (x, w, b)", "[N, 32, 5, 6]", "[N, 48, 5, 6]", (3, 3)),
    "uneven": (
        "y = Conv <pads = [0, 1, 2, 3], strides = [2, 1], dilations = [1, 2]> (x, w, b)",
        "[N, 32, 7, 8]", "[N, 48, 4, 8]", (3, 3),
    ),
    "same": (
        'y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w, b)',
        "[N, 32, 6, 7]", "[N, 48, 3, 4]", (3, 3),
    ),
    "1-D": ("y = Conv <pads = [2, 2]> (x, w, b)", "[N, 32, 9]", "[N, 48, 9]", (5,)),
}  # fmt: skip


def one_layer(name: str, weight: np.ndarray):
    body, inputs, outputs, _ = LAYERS[name]
    if name in ("matmul", "gemm"):
        weight = weight.T.copy()
    constants = {"w": weight, "b": normal(48, seed=9)} if "b)" in body else {"w": weight}
    listed = "".join(f", float[{', '.join(map(str, c.shape))}] {key}" for key, c in constants.items())
    return parse(f"agraph (float{inputs} x{listed}) => (float{outputs} y) {{ {body} }}", **constants)


@pytest.mark.parametrize("name", LAYERS)
def test_exact_where_the_rank_is_low(name: str) -> None:
    proto = one_layer(name, low_rank(48, 32, *LAYERS[name][3], rank=6))
    model, _ = check(proto, FactorizeLowRank(energy=0.99999), fired=1, nmse=1e-5, run=run_ort, sizes={"N": 3})
    wide = LAYERS[name][3] not in ((), (1, 1))
    assert len(ops(model)) == (3 if wide else 2)
    before, after = (model_cost(m, {"x": _sized(name)}).macs for m in (ir.from_proto(proto), model))
    assert after < 0.5 * before
    assert "w" not in model.graph.initializers
    shapes = [tuple(n.inputs[1].const_value.shape.numpy()) for n in model.graph]
    assert all(6 in shape for shape in shapes), shapes


def _sized(name: str) -> tuple[int, ...]:
    return tuple(3 if d == "N" else int(d) for d in LAYERS[name][1].strip("[]").split(", "))


def rebuilt(model: ir.Model) -> np.ndarray:
    """What two factors of a MatMul multiply to, [I, O]."""
    first, second = (node.inputs[1].const_value.numpy() for node in model.graph)
    return first @ second


def test_exact_in_generated_graphs() -> None:
    """Five random graphs whose matrices have rank 1, which is found and left."""
    proved = seed = 0
    while proved < 5:
        proto = generated(seed)
        for tensor in proto.graph.initializer:
            data = onnx.numpy_helper.to_array(tensor)
            if data.dtype == np.float32 and data.ndim == 2:
                u, s, v = np.linalg.svd(data, full_matrices=False)
                rank_one = (u[:, :1] * s[:1] @ v[:1]).astype(np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(rank_one, tensor.name))
        model = ir.from_proto(proto)
        if FactorizeLowRank(energy=1 - 1e-9)(model).fired:
            after = ir.to_proto(model)
            onnx.checker.check_model(after, full_check=True)
            feeds = random_feeds(proto, seed, {"N": BATCH})
            assert_close(run_ort(proto, feeds), run_ort(after, feeds), 1e-10)
            proved += 1
        seed += 1


def test_the_best_of_its_rank() -> None:
    """Eckart and Young: the error is that of the singular values left out; the rank is the least for the energy."""
    w = normal(48, 32) * np.logspace(0, -2, 32, dtype=np.float32)
    s = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    for options, lost in (({"energy": 0.9}, 0.1), ({"error": 0.2}, 0.04)):
        model = ir.from_proto(one_layer("matmul", w))
        outcome = FactorizeLowRank(**options)(model)
        assert outcome.fired == 1
        rank = model.graph[0].inputs[1].const_value.shape[1]
        share = np.cumsum(s**2) / (s**2).sum()
        assert share[rank - 1] >= 1 - lost > share[rank - 2]
        error = np.square(rebuilt(model) - w.T).sum() / np.square(w).sum()
        np.testing.assert_allclose(error, 1 - share[rank - 1], rtol=1e-3)
    model = ir.from_proto(one_layer("matmul", w))
    FactorizeLowRank(ratio=0.5)(model)
    rank = model.graph[0].inputs[1].const_value.shape[1]
    assert rank * 80 <= 0.5 * 48 * 32 < (rank + 1) * 80


@pytest.mark.parametrize("name", ["3x3", "1-D"])
@pytest.mark.parametrize("energy", [0.6, 0.8])
def test_tucker_stays_within_the_bound(name: str, energy: float) -> None:
    taps = LAYERS[name][3]
    kernel = low_rank(48, 32, *taps, rank=10) + 0.2 * normal(48, 32, *taps)
    model = ir.from_proto(one_layer(name, kernel))
    assert FactorizeLowRank(energy=energy)(model).fired == 1
    first, core, last = (n.inputs[1].const_value.numpy() for n in model.graph)
    found = np.einsum("si,rs...,or->oi...", first.reshape(first.shape[:2]), core, last.reshape(last.shape[:2]))
    assert np.square(kernel - found).sum() / np.square(kernel).sum() <= 1 - energy


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", ["matmul", "1x1", "3x3", "uneven"])
def test_ratio_is_kept(name: str, ratio: float) -> None:
    proto = one_layer(name, normal(48, 32, *LAYERS[name][3]))
    model = ir.from_proto(proto)
    assert FactorizeLowRank(ratio=ratio)(model).fired == 1
    sizes = {"x": (2, 32, 64, 64) if LAYERS[name][3] else (2, 3, 32)}
    body = {k: v for k, v in sizes.items()}
    before, after = (model_cost(_loose(m), body).macs for m in (ir.from_proto(proto), model))
    # places at the border of the first factor are counted a little otherwise
    assert 0.6 * ratio < after / before <= ratio * 1.08


def two_layers(inner: int = 48):
    """A matrix of low rank but for some noise, then one that is not; the MACs of both are the same."""
    first = low_rank(inner, 32, rank=4) + 0.05 * normal(inner, 32, seed=6)
    text = f"""agraph (float[N, 32] x, float[32, {inner}] w, float[{inner}, 32] v) => (float[N, 32] y) {{
        h = MatMul (x, w)
        r = Relu (h)
        y = MatMul (r, v) }}"""
    return parse(text, w=first.T.copy(), v=normal(inner, 32, seed=7))


def test_ratio_of_all_layers_goes_where_it_costs_least() -> None:
    proto = two_layers()
    model = ir.from_proto(proto)
    outcome = FactorizeLowRank(ratio=0.7)(model)
    assert outcome.fired == 1
    assert [d.node for d in outcome.declined] == ["MatMul -> y"]
    assert "other layers loses less" in outcome.declined[0].reason
    before, after = (model_cost(m, {"x": (3, 32)}).macs for m in (ir.from_proto(proto), model))
    rank = model.graph[0].inputs[1].const_value.shape[1]
    assert after <= 0.7 * before < after + 80 * 3, "one rank more would be too much"
    assert rank == int(0.4 * 48 * 32 / 80)
    # each layer alone keeps less of the output
    each = ir.from_proto(proto)
    assert FactorizeLowRank(ratio=0.7, scope="layer")(each).fired == 2
    x = {"x": normal(200, 32)}
    (whole,) = run_ort(proto, x)
    errors = [np.square(run_ort(ir.to_proto(m), x)[0] - whole).sum() for m in (model, each)]
    assert errors[0] < 0.2 * errors[1]
    # and again: what was left whole stays whole
    state = to_bytes(model)
    again = FactorizeLowRank(ratio=0.7)(model)
    assert not again.modified
    assert "already" in again.declined[0].reason
    assert to_bytes(model) == state


def test_a_ratio_that_cannot_be_reached_is_said() -> None:
    model = ir.from_proto(two_layers())
    outcome = FactorizeLowRank(ratio=0.01)(model)
    assert outcome.fired == 2
    assert any("cannot be reached" in remark for remark in outcome.remarks)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_places_count(ratio: float) -> None:
    """A kernel at 16 times the places weighs 16 times as much."""
    text = """agraph (float[N, 16, 8, 8] x, float[16, 16, 3, 3] w, float[16, 16, 3, 3] v) => (float[N, 16, 2, 2] y) {
        h = Conv <pads = [1, 1, 1, 1]> (x, w)
        p = MaxPool <kernel_shape = [4, 4], strides = [4, 4]> (h)
        y = Conv <pads = [1, 1, 1, 1]> (p, v) }"""
    proto = parse(text, w=normal(16, 16, 3, 3), v=normal(16, 16, 3, 3, seed=8))
    model = ir.from_proto(proto)
    from passes._shapes import infer_shapes

    infer_shapes(model)
    FactorizeLowRank(ratio=ratio)(model)
    before, after = (model_cost(m, {"x": (1, 16, 8, 8)}).macs for m in (ir.from_proto(proto), model))
    assert 0.75 * ratio < after / before <= ratio * 1.02


def _loose(model: ir.Model) -> ir.Model:
    """The same with an input of any size."""
    rank = len(model.graph.inputs[0].shape)
    model.graph.inputs[0].shape = ir.Shape([None] * rank)
    model.graph.outputs[0].shape = ir.Shape([None] * rank)
    return model


def test_moments_keep_the_output_not_the_weight() -> None:
    rng = np.random.default_rng(0)
    w = normal(48, 32)
    x = (rng.standard_normal((500, 6)) @ rng.standard_normal((6, 32)) + 0.05 * rng.standard_normal((500, 32))).astype(
        np.float32
    )
    moments = InputMoments({"MatMul -> y": (x.T @ x / len(x)).astype(np.float64)})
    errors = []
    for given in (None, moments):
        model = ir.from_proto(one_layer("matmul", w))
        FactorizeLowRank(ratio=0.5, moments=given)(model)
        errors.append(float(np.square(x @ rebuilt(model) - x @ w.T).sum() / np.square(x @ w.T).sum()))
    assert errors[1] < 0.02 * errors[0]
    # energy is then that of the output
    model = ir.from_proto(one_layer("matmul", w))
    FactorizeLowRank(energy=0.95, moments=moments)(model)
    assert np.square(x @ rebuilt(model) - x @ w.T).sum() / np.square(x @ w.T).sum() <= 0.0501
    assert model.graph[0].inputs[1].const_value.shape[1] <= 6


def test_moments_of_a_kernel_and_of_dead_channels() -> None:
    kernel = normal(48, 32, 3, 3)
    diagonal = np.zeros(32)
    diagonal[:8] = 1.0  # the other channels are always zero
    model = ir.from_proto(one_layer("3x3", kernel))
    FactorizeLowRank(error=0.05, moments=InputMoments({"Conv -> y": np.diag(diagonal)}))(model)
    x = normal(2, 32, 5, 6)
    x[:, 8:] = 0
    (before,), (after,) = run_ort(one_layer("3x3", kernel), {"x": x}), run_ort(ir.to_proto(model), {"x": x})
    assert np.square(before - after).mean() / np.square(before).mean() < 0.01
    assert len(model.graph) == 3
    outcome = FactorizeLowRank(moments=InputMoments({}))(ir.from_proto(one_layer("3x3", kernel)))
    assert "no moments of its 32" in outcome.declined[0].reason


@needs_tensorly
@pytest.mark.parametrize("name", ["3x3", "uneven", "same", "1-D"])
def test_cp(name: str) -> None:
    taps = LAYERS[name][3]
    letters = "ab"[: len(taps)]
    parts = [normal(size, 4, seed=size) for size in (48, 32)] + [normal(t, 4, seed=40 + i) for i, t in enumerate(taps)]
    kernel = np.einsum(f"or,ir,{','.join(f'{c}r' for c in letters)}->oi{letters}", *parts).astype(np.float32)
    proto = one_layer(name, kernel)
    each = FactorizeLowRank(energy=0.9999, kernels="cp")
    model = ir.from_proto(proto)
    assert each(model).fired == 1
    assert len(ops(model)) == 2 + len(taps)
    feeds = {"x": normal(*_sized(name))}
    (before,), (after,) = run_ort(proto, feeds), run_ort(ir.to_proto(model), feeds)
    assert np.square(before - after).mean() / np.square(before).mean() < 1e-3
    state = to_bytes(model)
    assert not each(model).modified
    assert to_bytes(model) == state


@needs_tensorly
def test_tucker_is_as_good_as_tensorlys() -> None:
    from tensorly.decomposition import partial_tucker

    kernel = normal(48, 32, 3, 3)
    model = ir.from_proto(one_layer("3x3", kernel))
    FactorizeLowRank(ratio=0.5)(model)
    first, core, last = (n.inputs[1].const_value.numpy() for n in model.graph)
    ours = np.einsum("si,rs...,or->oi...", first.reshape(first.shape[:2]), core, last.reshape(last.shape[:2]))
    (theirs_core, (u, v)), _ = partial_tucker(kernel, rank=core.shape[:2], modes=[0, 1])
    theirs = np.einsum("rs...,or,is->oi...", theirs_core, u, v)
    assert np.square(kernel - ours).sum() <= 1.01 * np.square(kernel - theirs).sum()


@pytest.mark.skipif(HAS_TENSORLY, reason="tensorly is installed")
def test_cp_without_tensorly() -> None:
    with pytest.raises(PassFailed, match="needs tensorly") as caught:
        FactorizeLowRank(kernels="cp")(ir.from_proto(one_layer("3x3", normal(48, 32, 3, 3))))
    assert "low-rank" in str(caught.value.hint)


def test_declined() -> None:
    w = normal(48, 32)
    for options, name, weight, reason in (
        ({"energy": 0.99}, "matmul", w, r"of 32 would take 1\d\d% of its MACs"),
        ({"energy": 0.99}, "3x3", normal(48, 32, 3, 3), "would take"),
        ({"kernels": "none"}, "3x3", normal(48, 32, 3, 3), "left alone"),
        ({"exclude": ("MatMul -> y",)}, "matmul", w, "excluded"),
        ({"ratio": 0.02, "scope": "layer"}, "matmul", w, "rank 1 would take 5%"),
    ):
        proto = one_layer(name, weight)
        _, outcome = check(proto, FactorizeLowRank(**options), fired=0, run=run_ort)
        assert re.search(reason, outcome.declined[0].reason), outcome.declined
    grouped = parse(
        "agraph (float[N, 32, 5, 5] x, float[32, 8, 3, 3] w) => (float[N, 32, 3, 3] y) { y = Conv <group = 4> (x, w) }",
        w=normal(32, 8, 3, 3),
    )
    _, outcome = check(grouped, FactorizeLowRank(ratio=0.5), fired=0, run=run_ort)
    assert "4 groups" in outcome.declined[0].reason
    shared = parse(
        "agraph (float[N, 32] x, float[32, 32] w) => (float[N, 32] y) { h = MatMul (x, w)\n y = MatMul (h, w) }",
        w=normal(32, 32),
    )
    _, outcome = check(shared, FactorizeLowRank(ratio=0.5), fired=0, run=run_ort)
    assert "is read by MatMul -> y too" in outcome.declined[0].reason
    with pytest.raises(PassFailed, match="no node 'MatMul -> x'"):
        FactorizeLowRank(exclude=("MatMul -> x",))(ir.from_proto(shared))


def test_a_second_run_with_a_ratio_goes_on_only_if_it_saves() -> None:
    """The factors of a first run are layers themselves; what would be left of them saves nothing."""
    model = ir.from_proto(one_layer("matmul", low_rank(48, 32, rank=6)))
    assert FactorizeLowRank(energy=0.999)(model).fired == 1
    assert not FactorizeLowRank(energy=0.999)(model).modified


@pytest.mark.parametrize(
    "options",
    [
        {"energy": 0.0},
        {"energy": 1.0},
        {"error": -0.1},
        {"ratio": 1.5},
        {"ratio": float("nan")},
        {"ratio": 0.5, "energy": 0.5},
        {"kernels": "svd"},
        {"scope": "channel"},
        {"least_saving": 1.0},
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(InvalidOption):
        make("factorize_low_rank", **options)
