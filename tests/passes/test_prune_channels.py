"""prune_channels: how much goes, what is said where nothing does, real models, and generated graphs."""

from __future__ import annotations

import itertools
import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_support import assert_close, random_feeds, run_ort, to_bytes
from prune_support import graph, parameters, prove, shapes, weight

from passes import InvalidOption, PassFailed, make
from passes._channel_blocks import find_blocks
from passes._channel_cut import Cut, apply, masked
from passes._channel_groups import find_groups
from passes._channel_scores import ChannelScores, importance, plan
from passes.prune_channels import PruneChannels, prepare

W = {
    "w1": weight(20, 4, 3, 3),
    "b1": weight(20),
    "w2": weight(32, 20, 3, 3),
    "w3": weight(5, 32, 3, 3),
    "g": np.linspace(1, 2, 20, dtype=np.float32),
    "zeros": np.zeros(20, np.float32),
    "ones": np.ones(20, np.float32),
}
CHAIN = (
    "a = Conv (x, w1, b1) n = BatchNormalization (a, g, zeros, zeros, ones) r = Relu (n) "
    "b = Conv (r, w2) s = Relu (b) y = Conv (s, w3)"
)
P = "pads = [1, 1, 1, 1]"
#: three residual blocks behind each other
BLOCKS = "a0 = Conv <pads = [1, 1, 1, 1]> (x, stem) r0 = Relu (a0) " + " ".join(
    f"c{i} = Conv <{P}> (r{i - 1}, u{i}) d{i} = Relu (c{i}) e{i} = Conv <{P}> (d{i}, v{i}, vb) "
    f"s{i} = Add (e{i}, r{i - 1}) r{i} = Relu (s{i})"
    for i in (1, 2, 3)
)
BLOCKS += " y = Conv (r3, head)"
BLOCK_WEIGHTS = {"stem": weight(8, 4, 3, 3), "head": weight(5, 8, 3, 3), "vb": weight(8)} | {
    f"{which}{i}": weight(8, 8, 3, 3, seed=i) for which in "uv" for i in (1, 2, 3)
}


def chain() -> ir.Model:
    """Two layers of 20 and 32 channels that can be cut, and one that cannot."""
    return ir.from_proto(graph(CHAIN, W, x="N, 4, 9, 9"))


def widths(model: ir.Model) -> tuple[int, int]:
    """Of the two layers of ``chain``."""
    found = shapes(model)
    assert found["w1"][0] == found["w2"][1] == found["g"][0]
    assert found["w2"][0] == found["w3"][1]
    return found["w1"][0], found["w2"][0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ratio": 0.3}, (14, 22)),
        ({"ratio": 0.5}, (10, 16)),
        ({"ratio": 0.3, "round_to": 8}, (16, 24)),
        ({"ratio": 0.3, "round_to": 32}, (20, 32)),
        ({"ratio": 0.99}, (1, 1)),
        ({"ratio": 0.99, "min_channels": 6}, (6, 6)),
        ({"ratio": 0.5, "exclude": ("Conv -> a",)}, (20, 16)),
        ({"ratio": 0.5, "exclude": ("w2", "Conv -> y")}, (10, 32)),
        ({"ratio": 0.5, "per_layer": {"Conv -> a": 0.1}}, (18, 16)),
        ({"ratio": 0, "per_layer": {"Conv -> a": 0.1}}, (18, 32)),
        ({"ratio": 0.5, "importance": "l2"}, (10, 16)),
        ({"ratio": 0.5, "importance": "random"}, (10, 16)),
        ({"ratio": 0.5, "importance": "batch-norm"}, (10, 32)),
    ],
)
def test_how_much_goes(options: dict, expected: tuple[int, int]) -> None:
    model = chain()
    outcome = PruneChannels(**options)(model)
    assert widths(model) == expected
    assert outcome.modified == (expected != (20, 32))
    assert outcome.fired == 52 - sum(expected)


def test_a_second_run_changes_nothing_and_a_larger_ratio_goes_on() -> None:
    model = chain()
    PruneChannels(ratio=0.3)(model)
    once = to_bytes(model)
    for again in (PruneChannels(ratio=0.3), PruneChannels(ratio=0.3, importance="random"), PruneChannels(ratio=0.2)):
        outcome = again(model)
        assert not outcome.modified
        assert to_bytes(model) == once
    make("strip_metadata")(model)
    assert not PruneChannels(ratio=0.3)(model).modified
    assert PruneChannels(ratio=0.5)(model).modified
    assert widths(model) == (10, 16)
    written = ir.from_proto(onnx.ModelProto.FromString(to_bytes(model)))
    assert not PruneChannels(ratio=0.5)(written).modified


@pytest.mark.parametrize("round_to", [1, 8])
def test_a_second_run_of_global_ratios_changes_nothing(round_to: int) -> None:
    model = chain()
    step = PruneChannels(ratio=0.37, scope="global", round_to=round_to)
    assert step(model).modified
    once = to_bytes(model)
    assert not step(model).modified
    assert to_bytes(model) == once


def test_global_takes_where_it_matters_least() -> None:
    model = chain()
    scores = {"a": np.full(20, 10.0), "b": np.full(32, 1.0)}
    scores["b"][:2] = 20
    step = PruneChannels(ratio=0.5, scope="global", importance="taylor", scores=ChannelScores(scores))
    step(model)
    assert widths(model) == (20, 6)


def test_the_least_important_go() -> None:
    model = chain()
    kept = W["w1"][W["g"] > np.median(W["g"])]
    PruneChannels(ratio=0.5, importance="batch-norm")(model)
    assert np.array_equal(model.graph.initializers["w1"].const_value.numpy(), kept)
    model = chain()
    scores = np.arange(32.0)[::-1]
    PruneChannels(ratio=0.5, importance="activation", scores=ChannelScores({"s": scores}))(model)
    assert np.array_equal(model.graph.initializers["w2"].const_value.numpy(), W["w2"][:16])
    assert widths(model) == (20, 16)


def test_norms() -> None:
    model = chain()
    groups = find_groups(model)
    for kind, power in (("l1", 1), ("l2", 2)):
        found = importance(model, groups, kind=kind)["Conv -> b"]
        made = (np.abs(W["w2"].astype(float)) ** power).sum(axis=(1, 2, 3)) ** (1 / power)
        read = (np.abs(W["w3"].astype(float)) ** power).sum(axis=(0, 2, 3)) ** (1 / power)
        assert np.allclose(found, (made / made.mean() + read / read.mean()) / 2)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"ratio": 1.0}, "1.0"),
        ({"ratio": -0.1}, "-0.1"),
        ({"ratio": float("nan")}, "nan"),
        ({"per_layer": {"Conv -> a": 2.0}}, "Conv -> a"),
        ({"scope": "globl"}, "scope"),
        ({"importance": "l3"}, "importance"),
        ({"round_to": 0}, "round_to"),
        ({"min_channels": 0}, "min_channels"),
    ],
)
def test_options_out_of_range(options: dict, word: str) -> None:
    with pytest.raises(InvalidOption, match=word):
        PruneChannels(**options)


def test_options_come_from_a_recipe() -> None:
    made = make("prune_channels", ratio=0.5, per_layer={"Conv -> a": 1e-1}, exclude=("w2",))
    assert made == PruneChannels(ratio=0.5, per_layer={"Conv -> a": 0.1}, exclude=("w2",))
    with pytest.raises(InvalidOption, match="per_layer"):
        make("prune_channels", per_layer={"Conv -> a": "much"})


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        ({"exclude": ("Conv -> aa",)}, "Conv -> aa", "Conv -> a"),
        ({"per_layer": {"Conv -> c": 0.5}}, "Conv -> c", "Conv -> "),
        ({"blocks": ("Add -> y",)}, "Add -> y", "none"),
        ({"importance": "taylor"}, "no scores", "l1"),
        ({"importance": "taylor", "scores": ChannelScores({"aa": np.ones(20)})}, "aa", "a"),
        ({"importance": "activation", "scores": ChannelScores({"a": np.ones(19)})}, "19", ""),
        ({"importance": "activation", "scores": ChannelScores({"a": np.full(20, np.nan)})}, "finite", ""),
    ],
)
def test_what_does_not_fit_the_model_changes_nothing(options: dict, what: str, hint: str) -> None:
    model = chain()
    before = to_bytes(model)
    with pytest.raises(PassFailed, match=what) as caught:
        PruneChannels(**options)(model)
    assert hint in str(caught.value.hint or "")
    assert to_bytes(model) == before


def test_layers_of_one_group_want_one_ratio() -> None:
    proto = graph(BLOCKS, BLOCK_WEIGHTS)
    with pytest.raises(PassFailed, match="together"):
        PruneChannels(per_layer={"Conv -> e1": 0.2, "Conv -> e2": 0.3})(ir.from_proto(proto))


def test_a_model_without_a_layer_that_can_be_cut() -> None:
    for body, word in (("y = Relu (x)", "no layer"), ("y = Conv (x, w1, b1)", "output")):
        model = ir.from_proto(graph(body, W))
        before = to_bytes(model)
        with pytest.raises(PassFailed, match=word):
            PruneChannels()(model)
        assert to_bytes(model) == before


def test_a_layer_that_is_kept_anyway_may_be_excluded() -> None:
    model = chain()
    assert PruneChannels(exclude=("Conv -> y",))(model).modified


def test_a_record_that_somebody_else_wrote_is_no_record() -> None:
    for text in ("not json", "[1]", json.dumps({"asked": 3})):
        model = chain()
        model.metadata_props["toolchain.prune_channels"] = text
        assert PruneChannels()(model).modified


def test_blocks_are_found_and_taken_out() -> None:
    proto = graph(BLOCKS, BLOCK_WEIGHTS)
    model = ir.from_proto(proto)
    assert [(b.name, b.layers) for b in find_blocks(model)] == [
        (f"Add -> s{i}", (f"Conv -> c{i}", f"Conv -> e{i}")) for i in (1, 2, 3)
    ]
    model, _ = prove(proto, cut=Cut(blocks=("Add -> s2", "Add -> s1")))
    assert [n.op_type for n in model.graph].count("Conv") == 4
    model, _ = prove(proto, cut=Cut({"Conv -> a0": (0, 3)}, blocks=("Add -> s3",)))
    step = PruneChannels(ratio=0.5, blocks=("Add -> s1",))
    model = ir.from_proto(proto)
    assert step(model).modified
    assert shapes(model)["head"] == (5, 4, 3, 3)
    assert "u1" not in shapes(model)
    assert not step(model).modified
    assert PruneChannels(ratio=0.75, blocks=("Add -> s1", "Add -> s2"))(model).modified


@pytest.mark.parametrize("order", list(itertools.permutations((1, 2, 3))))
def test_blocks_that_add_to_each_others_sums_go_together(order: tuple[int, ...]) -> None:
    """As in MobileNet: nothing lies between two sums, so the shortcut of one is the sum of the other."""
    body = "s0 = Conv <pads = [1, 1, 1, 1]> (x, stem) " + " ".join(
        f"c{i} = Conv <{P}> (s{i - 1}, u{i}) d{i} = Relu (c{i}) e{i} = Conv <{P}> (d{i}, v{i}) "
        f"s{i} = Add ({f'e{i}, s{i - 1}' if i == 2 else f's{i - 1}, e{i}'})"
        for i in (1, 2, 3)
    )
    proto = graph(f"{body} y = Conv (s3, head)", BLOCK_WEIGHTS)
    model, _ = prove(proto, cut=Cut(blocks=tuple(f"Add -> s{i}" for i in order)))
    assert [node.op_type for node in model.graph] == ["Conv", "Conv"]
    model, _ = prove(proto, cut=Cut(blocks=tuple(f"Add -> s{i}" for i in order[:2])))
    assert [node.op_type for node in model.graph].count("Add") == 1


@pytest.mark.parametrize(
    "body",
    [
        f"a = Conv <{P}> (x, stem) c = Conv <{P}> (a, u1) y = Add (a, c)",
        f"a = Conv <{P}> (x, stem) c = Conv <{P}> (x, stem2) s = Add (a, c) y = Relu (s)",
        f"a = Conv <{P}> (x, stem) c = Conv <{P}> (a, u1) s = Add (a, c) y = Mul (s, c)",
        f"a = Conv <{P}> (x, stem) c = GlobalAveragePool (a) d = Conv (a, one) s = Add (c, d) y = Relu (s)",
    ],
)
def test_what_is_no_block(body: str) -> None:
    """It is the output, has no identity shortcut, is read from outside, or has another shape."""
    weights = BLOCK_WEIGHTS | {"stem2": weight(8, 4, 3, 3, seed=9), "one": weight(8, 8, 1, 1)}
    assert not find_blocks(ir.from_proto(graph(body, weights)))


def test_heads_can_be_kept() -> None:
    body = (
        "q = MatMul (x, wq) k = MatMul (x, wk) q4 = Reshape (q, heads) k4 = Reshape (k, heads) "
        "qt = Transpose <perm = [0, 2, 1, 3]> (q4) kt = Transpose <perm = [0, 2, 3, 1]> (k4) s = MatMul (qt, kt) "
        "t = Transpose <perm = [0, 2, 3, 1]> (s) y = MatMul (t, wo)"
    )
    weights = {"wq": weight(6, 12), "wk": weight(6, 12, seed=1), "wo": weight(4, 6), "heads": np.array([0, 0, 4, 3])}
    proto = graph(body, weights, x="N, S, 6")
    with pytest.raises(PassFailed, match="heads are to be kept"):
        PruneChannels(heads=False)(ir.from_proto(proto))
    model = ir.from_proto(proto)
    assert PruneChannels(ratio=0.5)(model).fired == 2
    assert shapes(model)["wq"] == (6, 6)


RESNETS = (
    "cifar10-resnets/cifar_resnet20.onnx",
    "cifar10-resnets/cifar_resnet56.onnx",
    "mlperf-resnet8/mlperf_resnet8_float.onnx",
)
GRAPHS = {
    "basic_pitch": {"input_1": (1, 43844, 1)},
    "plcmos_v2_gru": {"degraded_audio": (1, 1, 48, 257), "rater_embed": (1, 64)},
    "rapidocr_cls": {"x": (1, 3, 48, 48)},
    "swift_f0_stft": {"input_audio": (1, 16000)},
}


@pytest.mark.parametrize("name", RESNETS)
def test_real_resnets(assets, name: str) -> None:
    proto = onnx.load(assets / "models" / name)
    model, _ = prove(proto, ratio=0.3, sizes={"batch": 2})
    assert parameters(model) < 0.5 * parameters(ir.from_proto(proto))


@pytest.mark.parametrize("name", list(GRAPHS))
def test_graphs_that_others_made(assets, name: str) -> None:
    proto = onnx.load(assets / "models/onnx-graphs" / f"{name}.onnx")
    rng = np.random.default_rng(0)
    by_size = iter(GRAPHS[name].values())
    feeds = {v.name: rng.standard_normal(next(by_size)).astype(np.float32) for v in proto.graph.input}
    _, cut = prove(proto, ratio=0.3, feeds=feeds)
    assert cut.count


@pytest.mark.parametrize(("name", "word"), [("silero_vad", "inside a If"), ("chars2vec_loop", "inside a Loop")])
def test_graphs_that_are_left_whole(assets, name: str, word: str) -> None:
    model = ir.load(assets / "models/onnx-graphs" / f"{name}.onnx")
    before = to_bytes(model)
    with pytest.raises(PassFailed, match=word):
        PruneChannels()(model)
    assert to_bytes(model) == before


def test_a_quantised_graph_is_left_whole(assets) -> None:
    model = ir.load(assets / "models/mlperf-resnet8/mlperf_resnet8_int8_qdq.onnx")
    with pytest.raises(PassFailed, match="no layer") as caught:
        PruneChannels()(model)
    assert "quantising" in str(caught.value.hint)


class _Maker:
    """Random graphs: convolutions, branches, and whatever moves channels about, over maps of 5 by 5."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.lines: list[str] = []
        self.weights: dict[str, np.ndarray] = {}
        self.values: list[tuple[str, int]] = [("x", 4)]

    def constant(self, data: np.ndarray) -> str:
        name = f"k{len(self.weights)}"
        self.weights[name] = data
        return name

    def add(self, text: str, channels: int) -> None:
        name = f"v{len(self.values)}"
        self.lines.append(f"{name} = {text}")
        self.values.append((name, channels))

    def pick(self) -> tuple[str, int]:
        recent = self.values[-5:]
        return recent[int(self.rng.integers(len(recent)))]

    def conv(self, x: str, channels: int, out: int, *, group: int = 1) -> None:
        w = self.constant(self.rng.standard_normal((out, channels // group, 3, 3)).astype(np.float32) / 3)
        b = self.constant(self.rng.standard_normal(out).astype(np.float32))
        self.add(f"Conv <pads = [1, 1, 1, 1], group = {group}> ({x}, {w}, {b})", out)

    def step(self) -> None:
        x, c = self.pick()
        match int(self.rng.integers(11)):
            case 0 | 1 | 2:
                self.conv(x, c, int(self.rng.choice([4, 6, 8, 12])))
            case 3:
                self.conv(x, c, c * int(self.rng.integers(1, 3)), group=c)
            case 4 if c % 2 == 0:
                self.conv(x, c, c, group=2)
            case 5:
                self.add(f"{self.rng.choice(['Relu', 'Sigmoid', 'Softplus', 'Gelu'])} ({x})", c)
            case 6:
                same = [v for v, n in self.values if n == c]
                self.add(
                    f"{self.rng.choice(['Add', 'Mul', 'Max'])} ({x}, {same[int(self.rng.integers(len(same)))]})", c
                )
            case 7:
                other, n = self.pick()
                self.add(f"Concat <axis = 1> ({x}, {other})", c + n)
            case 8 if c > 2:
                lo = int(self.rng.integers(0, c - 2))
                ends = [self.constant(np.array([i])) for i in (lo, int(self.rng.integers(lo + 2, c + 1)), 1)]
                size = int(self.weights[ends[1]][0]) - lo
                self.add(f"Slice ({x}, {', '.join(ends)})", size)
            case 9 if c % 2 == 0:
                wide = self.constant(np.array([0, 2, c // 2, 25]))
                back = self.constant(np.array([0, c, 5, 5]))
                self.lines.append(f"p{len(self.values)} = Reshape ({x}, {wide})")
                self.lines.append(f"q{len(self.values)} = Transpose <perm = [0, 2, 1, 3]> (p{len(self.values)})")
                self.add(f"Reshape (q{len(self.values)}, {back})", c)
            case 10:
                pads = [0, *self.rng.integers(0, 3, 1), 0, 0, 0, *self.rng.integers(0, 3, 1), 0, 0]
                self.add(f"Pad ({x}, {self.constant(np.array(pads))})", c + int(pads[1] + pads[5]))


@pytest.mark.parametrize("seed", range(30))
def test_generated_graphs(seed: int) -> None:
    maker = _Maker(seed)
    for _ in range(14):
        maker.step()
    x, c = maker.values[-1]
    w = maker.constant(maker.rng.standard_normal((3, c, 1, 1)).astype(np.float32))
    proto = graph(f"{' '.join(maker.lines)} y = Conv ({x}, {w})", maker.weights, x="N, 4, 5, 5")
    model = ir.from_proto(proto)
    prepare(model)
    groups = find_groups(model)
    prove(proto, ratio=float(maker.rng.uniform(0.2, 0.9)), nmse=1e-9)
    # Any one channel of any group may go alone.
    feeds = random_feeds(proto, seed)
    for group in groups:
        if group.count > 1:
            cut = Cut({group.name: (int(maker.rng.integers(group.count)),)})
            twin = masked(model, cut)
            other = model.clone()
            apply(other, cut)
            assert_close(run_ort(ir.to_proto(twin), feeds), run_ort(ir.to_proto(other), feeds), 1e-9)


def test_a_plan_of_nothing_is_nothing() -> None:
    model = chain()
    groups = find_groups(model)
    cut = plan(groups, importance(model, groups), ratio=0)
    assert cut == Cut({})
    before = to_bytes(model)
    apply(model, cut)
    assert to_bytes(model) == before
