"""Which channels go together: what becomes of every tensor of small graphs, and that what is left computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_support import random_feeds, run_ort
from prune_support import graph, parameters, prove, shapes, weight

from passes._channel_atoms import Atoms
from passes._channel_cut import Cut, apply, masked
from passes._channel_groups import analyze, find_groups
from passes._channel_reshape import refined, runs
from passes.base import PassFailed
from toolchain.metrics import tensor_error

INTS = {
    "perm_shape": [0, 2, 4, 36],
    "back": [0, 8, 6, 6],
    "flat": [0, -1],
    "flat288": [-1, 288],
    "halves": [4, 4],
    "uneven": [2, 6],
    "i0": [0],
    "i1": [1],
    "i2": [2],
    "i4": [4],
    "i6": [6],
    "end": [2**62],
    "space": [2, 3],
    "pads": [0, 2, 0, 0, 0, 2, 0, 0],
    "pick": [7, 1, 1, 4],
    "one": [1, 1, 2, 1],
    "double": [1, 2, 1, 1],
    "heads": [0, 0, 4, 3],
    "joined": [0, 0, 12],
    "qkv_shape": [0, 0, 3, 4, 3],
    "resized": [1, 8, 12, 12],
    "gn_shape": [0, 4, -1],
    "expanded": [1, 8, 6, 6],
}
CONSTANTS = {name: np.array(data, np.int64) for name, data in INTS.items()} | {
    "w1": weight(8, 4, 3, 3),
    "w1b": weight(8, 4, 3, 3, seed=1),
    "b1": weight(8),
    "w2": weight(5, 8, 3, 3),
    "b2": weight(5),
    "w88": weight(8, 8, 3, 3),
    "w2x": weight(5, 16, 3, 3),
    "w12": weight(5, 12, 3, 3),
    "w4": weight(5, 4, 3, 3),
    "w6": weight(5, 6, 3, 3),
    "dw": weight(8, 1, 3, 3),
    "dwm": weight(16, 1, 3, 3),
    "grouped": weight(8, 2, 3, 3),
    "pairs": weight(6, 4, 3, 3),
    "t1": weight(4, 8, 3, 3),
    "t2": weight(8, 5, 3, 3),
    "tdw": weight(8, 1, 3, 3),
    "tpairs": weight(8, 3, 3, 3),
    "scale": weight(8) ** 2 + 0.5,
    "shift": weight(8, seed=2),
    "mean": weight(8, seed=3),
    "var": weight(8, seed=4) ** 2 + 0.5,
    "slope": weight(8, 1, 1),
    "slope1": weight(1),
    "plane": weight(8, 6, 6),
    "rows": weight(288, 3),
    "squeeze": weight(8, 4),
    "excite": weight(4, 8),
    "se1": weight(4, 8, 1, 1),
    "se2": weight(8, 4, 1, 1),
    "gscale": weight(4),
    "gshift": weight(4, seed=1),
    "g1": weight(6, 12),
    "g1t": weight(12, 6),
    "gb": weight(12),
    "g2": weight(12, 7),
    "g2t": weight(7, 12),
    "wq": weight(6, 12, seed=5),
    "wk": weight(6, 12, seed=6),
    "wv": weight(6, 12, seed=7),
    "wqkv": weight(6, 36),
    "bqkv": weight(36),
    "wo": weight(12, 6),
    "ln": weight(6),
    "lnb": weight(6, seed=1),
    "ln12": weight(12),
    "ln12b": weight(12, seed=1),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "zero": np.array(0, np.float32),
    "third": np.array(0.3, np.float32),
}
P = "pads = [1, 1, 1, 1]"
FIRST = f"a = Conv <{P}> (x, w1, b1)"
LAST = f"y = Conv <{P}> (r, w2, b2)"

#: a graph, and the shapes of its weights after half of everything is cut
CUT: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "two convolutions": (
        f"{FIRST} r = Relu (a) {LAST}",
        {"w1": (4, 4, 3, 3), "b1": (4,), "w2": (5, 4, 3, 3), "b2": (5,)},
    ),
    "without bias": (f"r = Conv <{P}> (x, w1) y = Conv (r, w2)", {"w1": (4, 4, 3, 3), "w2": (5, 4, 3, 3)}),
    "sigmoid does not keep zero": (f"{FIRST} r = Sigmoid (a) {LAST}", {"w1": (4, 4, 3, 3), "w2": (5, 4, 3, 3)}),
    "batch normalisation": (
        f"{FIRST} r = BatchNormalization (a, scale, shift, mean, var) {LAST}",
        {"w1": (4, 4, 3, 3), "scale": (4,), "shift": (4,), "mean": (4,), "var": (4,), "w2": (5, 4, 3, 3)},
    ),
    "instance normalisation": (
        f"{FIRST} r = InstanceNormalization (a, scale, shift) {LAST}",
        {"scale": (4,), "shift": (4,), "w2": (5, 4, 3, 3)},
    ),
    "group normalisation in its pieces": (
        f"{FIRST} g = Reshape (a, gn_shape) i = InstanceNormalization (g, gscale, gshift) r = Reshape (i, back) {LAST}",
        {"w1": (4, 4, 3, 3), "gscale": (2,), "gshift": (2,), "w2": (5, 4, 3, 3)},
    ),
    "a slope for each channel": (f"{FIRST} r = PRelu (a, slope) {LAST}", {"slope": (4, 1, 1), "w2": (5, 4, 3, 3)}),
    "one slope": (f"{FIRST} r = PRelu (a, slope1) {LAST}", {"slope1": (1,), "w2": (5, 4, 3, 3)}),
    "a number for each place": (f"{FIRST} r = Add (plane, a) {LAST}", {"plane": (4, 6, 6), "w2": (5, 4, 3, 3)}),
    "two branches added": (
        f"{FIRST} c = Conv <{P}> (x, w1b) s = Add (c, a) r = Relu (s) {LAST}",
        {"w1": (4, 4, 3, 3), "w1b": (4, 4, 3, 3), "w2": (5, 4, 3, 3)},
    ),
    "a residual block": (
        f"{FIRST} c = Conv <{P}> (a, w88) r = Add (c, a) {LAST}",
        {"w1": (4, 4, 3, 3), "w88": (4, 4, 3, 3), "w2": (5, 4, 3, 3)},
    ),
    "a shared weight": (
        f"{FIRST} c = Conv <{P}> (a, w88) r = Conv <{P}> (c, w88) {LAST}",
        {"w1": (4, 4, 3, 3), "w88": (4, 4, 3, 3), "w2": (5, 4, 3, 3)},
    ),
    "depthwise": (
        f"{FIRST} r = Conv <{P}, group = 8> (a, dw) {LAST}",
        {"w1": (4, 4, 3, 3), "dw": (4, 1, 3, 3), "w2": (5, 4, 3, 3)},
    ),
    "depthwise with two outputs a channel": (
        f"{FIRST} r = Conv <{P}, group = 8> (a, dwm) y = Conv (r, w2x)",
        {"w1": (4, 4, 3, 3), "dwm": (8, 1, 3, 3), "w2x": (5, 8, 3, 3)},
    ),
    "many groups lose groups": (
        f"{FIRST} r = Conv <{P}, group = 4> (a, grouped) {LAST}",
        {"w1": (4, 4, 3, 3), "grouped": (4, 2, 3, 3), "w2": (5, 4, 3, 3)},
    ),
    "two groups lose channels": (
        f"{FIRST} r = Conv <{P}, group = 2> (a, pairs) y = Conv (r, w6)",
        {"w1": (4, 4, 3, 3), "pairs": (4, 2, 3, 3), "w6": (5, 4, 3, 3)},
    ),
    "transposed": (
        "a = ConvTranspose (x, t1, b1) r = Relu (a) y = ConvTranspose (r, t2)",
        {"t1": (4, 4, 3, 3), "b1": (4,), "t2": (4, 5, 3, 3)},
    ),
    "transposed depthwise": (
        f"{FIRST} r = ConvTranspose <{P}, group = 8> (a, tdw) {LAST}",
        {"w1": (4, 4, 3, 3), "tdw": (4, 1, 3, 3), "w2": (5, 4, 3, 3)},
    ),
    "transposed in two groups": (
        f"{FIRST} r = ConvTranspose <{P}, group = 2> (a, tpairs) y = Conv (r, w6)",
        {"w1": (4, 4, 3, 3), "w6": (5, 4, 3, 3)},
    ),
    "concatenated": (
        f"{FIRST} c = Conv <{P}> (x, w1b) r = Concat <axis = 1> (a, c) y = Conv (r, w2x)",
        {"w1": (4, 4, 3, 3), "w1b": (4, 4, 3, 3), "w2x": (5, 8, 3, 3)},
    ),
    "concatenated with the input": (
        f"{FIRST} r = Concat <axis = 1> (x, a) y = Conv (r, w12)",
        {"w1": (4, 4, 3, 3), "w12": (5, 8, 3, 3)},
    ),
    "split and added": (
        f"{FIRST} p, q = Split <axis = 1> (a, halves) r = Add (p, q) y = Conv (r, w4)",
        {"w1": (4, 4, 3, 3), "w4": (5, 2, 3, 3)},
    ),
    "split in parts of unlike size": (
        f"{FIRST} p, q = Split <axis = 1> (a, uneven) s = Relu (q) r = Concat <axis = 1> (s, p) {LAST}",
        {"w1": (4, 4, 3, 3), "w2": (5, 4, 3, 3)},
    ),
    "split by number of parts": (
        f"{FIRST} p, q = Split <axis = 1, num_outputs = 2> (a) r = Mul (p, q) y = Conv (r, w4)",
        {"w1": (4, 4, 3, 3), "w4": (5, 2, 3, 3)},
    ),
    "sliced": (
        f"{FIRST} p = Slice (a, i0, i4, i1) q = Slice (a, i4, end, i1) r = Mul (p, q) y = Conv (r, w4)",
        {"w1": (4, 4, 3, 3), "w4": (5, 2, 3, 3)},
    ),
    "channels padded for a shortcut": (
        f"{FIRST} c = Conv <{P}> (x, w4p) p = Pad (c, pads) r = Add (a, p) {LAST}".replace("w4p", "w44"),
        {"w1": (4, 4, 3, 3), "w2": (5, 4, 3, 3)},
    ),
    "taken by number": (
        f"{FIRST} r = Gather <axis = 1> (a, pick) y = Conv (r, w4)",
        # Channels that are read twice, once, and not at all are three groups: half of 1, 2 and 5 stays.
        {"w1": (5, 4, 3, 3), "w4": (5, 3, 3, 3)},
    ),
    "tiled": (f"{FIRST} r = Tile (a, double) y = Conv (r, w2x)", {"w1": (4, 4, 3, 3), "w2x": (5, 8, 3, 3)}),
    "resized by scales": (f"{FIRST} r = Resize (a, , scales) {LAST}", {"w1": (4, 4, 3, 3), "w2": (5, 4, 3, 3)}),
    "pooled": (
        f"{FIRST} p = MaxPool <kernel_shape = [2, 2]> (a) r = AveragePool <kernel_shape = [2, 2]> (p) {LAST}",
        {"w1": (4, 4, 3, 3), "w2": (5, 4, 3, 3)},
    ),
    "flattened into rows": (f"{FIRST} r = Flatten (a) y = Gemm (r, rows)", {"w1": (4, 4, 3, 3), "rows": (144, 3)}),
    "reshaped into rows": (f"{FIRST} r = Reshape (a, flat288) y = MatMul (r, rows)", {"rows": (144, 3)}),
    "reshaped into rows, told so": (f"{FIRST} r = Reshape (a, flat) y = MatMul (r, rows)", {"rows": (144, 3)}),
    "channels last": (
        f"{FIRST} t = Transpose <perm = [0, 2, 3, 1]> (a) y = MatMul (t, squeeze)",
        {"w1": (4, 4, 3, 3), "squeeze": (4, 4)},
    ),
    "squeezed and excited by Gemm": (
        f"{FIRST} m = ReduceMean <keepdims = 0> (a, space) s = MatMul (m, squeeze) t = Relu (s) e = MatMul (t, excite) "
        f"g = Sigmoid (e) u = Unsqueeze (g, space) r = Mul (a, u) {LAST}",
        {"w1": (4, 4, 3, 3), "squeeze": (4, 2), "excite": (2, 4), "w2": (5, 4, 3, 3)},
    ),
    "squeezed and excited by Conv": (
        f"{FIRST} m = GlobalAveragePool (a) s = Conv (m, se1) t = Relu (s) e = Conv (t, se2) "
        f"g = HardSigmoid (e) r = Mul (a, g) {LAST}",
        {"w1": (4, 4, 3, 3), "se1": (2, 4, 1, 1), "se2": (4, 2, 1, 1), "w2": (5, 4, 3, 3)},
    ),
    "channels shuffled": (
        f"{FIRST} p = Reshape (a, perm_shape) q = Transpose <perm = [0, 2, 1, 3]> (p) r = Reshape (q, back) {LAST}",
        {"w1": (4, 4, 3, 3), "w2": (5, 4, 3, 3)},
    ),
}
CONSTANTS["w44"] = weight(4, 4, 3, 3)


@pytest.mark.parametrize("name", list(CUT))
def test_what_is_cut(name: str) -> None:
    body, expected = CUT[name]
    proto = graph(body, CONSTANTS)
    model, cut = prove(proto)
    assert cut.count
    found = shapes(model)
    assert {key: found[key] for key in expected} == expected
    assert parameters(model) < parameters(ir.from_proto(proto))


ROWS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "two matrices": (
        "a = MatMul (x, g1) b = Add (a, gb) r = Gelu (b) y = MatMul (r, g2)",
        {"g1": (6, 6), "gb": (6,), "g2": (6, 7)},
    ),
    "attention": (
        "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv) "
        "q4 = Reshape (q, heads) k4 = Reshape (k, heads) v4 = Reshape (v, heads) "
        "qt = Transpose <perm = [0, 2, 1, 3]> (q4) kt = Transpose <perm = [0, 2, 3, 1]> (k4) "
        "vt = Transpose <perm = [0, 2, 1, 3]> (v4) s = MatMul (qt, kt) c = Mul (s, third) p = Softmax (c) "
        "o = MatMul (p, vt) ot = Transpose <perm = [0, 2, 1, 3]> (o) j = Reshape (ot, joined) y = MatMul (j, wo)",
        {"wq": (6, 6), "wk": (6, 6), "wv": (6, 6), "wo": (6, 6)},
    ),
    "attention from one matrix": (
        "m = MatMul (x, wqkv) b = Add (m, bqkv) r = Reshape (b, qkv_shape) t = Transpose <perm = [2, 0, 3, 1, 4]> (r) "
        "q = Gather <axis = 0> (t, n0) k = Gather <axis = 0> (t, n1) v = Gather <axis = 0> (t, n2) "
        "kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul (q, kt) p = Softmax (s) o = MatMul (p, v) "
        "ot = Transpose <perm = [0, 2, 1, 3]> (o) j = Reshape (ot, joined) y = MatMul (j, wo)",
        {"wqkv": (6, 18), "bqkv": (18,), "wo": (6, 6)},
    ),
    "keys as torch transposes them": (
        "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv) "
        "q4 = Reshape (q, heads) k4 = Reshape (k, heads) v4 = Reshape (v, heads) "
        "qt = Transpose <perm = [0, 2, 1, 3]> (q4) kt = Transpose <perm = [0, 2, 1, 3]> (k4) "
        "vt = Transpose <perm = [0, 2, 1, 3]> (v4) k3 = Reshape (kt, merged) k3t = Transpose <perm = [0, 2, 1]> (k3) "
        "k4t = Reshape (k3t, parted) s = MatMul (qt, k4t) p = Softmax (s) "
        "o = MatMul (p, vt) ot = Transpose <perm = [0, 2, 1, 3]> (o) j = Reshape (ot, joined) y = MatMul (j, wo)",
        {"wq": (6, 6), "wk": (6, 6), "wv": (6, 6), "wo": (6, 6)},
    ),
    "two queries a key": (
        "q = MatMul (x, wq) k = MatMul (x, wk2) q4 = Reshape (q, heads) k4 = Reshape (k, heads2) "
        "qt = Transpose <perm = [0, 2, 1, 3]> (q4) kt = Transpose <perm = [0, 2, 3, 1]> (k4) ku = Unsqueeze (kt, i2) "
        "ke = Expand (ku, twice) kr = Reshape (ke, four) s = MatMul (qt, kr) p = Softmax (s) o = MatMul (p, qt) "
        "ot = Transpose <perm = [0, 2, 1, 3]> (o) j = Reshape (ot, joined) y = MatMul (j, wo)",
        {"wq": (6, 6), "wk2": (6, 3), "wo": (6, 6)},
    ),
    "keys and values from one matrix": (
        "q = MatMul (x, wq) q4 = Reshape (q, heads) qt = Transpose <perm = [0, 2, 1, 3]> (q4) "
        "m = MatMul (x, wkv) r = Reshape (m, kv_shape) t = Transpose <perm = [2, 0, 1, 3]> (r) "
        "k = Gather <axis = 0> (t, n0) v = Gather <axis = 0> (t, n1) k4 = Reshape (k, heads) v4 = Reshape (v, heads) "
        "kt = Transpose <perm = [0, 2, 3, 1]> (k4) vt = Transpose <perm = [0, 2, 1, 3]> (v4) "
        "s = MatMul (qt, kt) p = Softmax (s) o = MatMul (p, vt) ot = Transpose <perm = [0, 2, 1, 3]> (o) "
        "j = Reshape (ot, joined) y = MatMul (j, wo)",
        {"wq": (6, 6), "wkv": (6, 12), "wo": (6, 6)},
    ),
    "the hidden width of a transformer stays": (
        "n = LayerNormalization (x, ln, lnb) a = MatMul (n, g1) b = Relu (a) c = MatMul (b, wo) r = Add (x, c) "
        "y = LayerNormalization (r, ln, lnb)",
        {"g1": (6, 6), "wo": (6, 6), "ln": (6,)},
    ),
}
CONSTANTS |= {
    name: np.array(data)
    for name, data in {
        "merged": [-1, 5, 3],
        "parted": [-1, 4, 3, 5],
        "heads2": [0, 0, 2, 3],
        "kv_shape": [0, 0, 2, 12],
        "first": [5, -1, 12],
        "five": [5],
        "three": [3],
        "four1": [4],
        "twice": [1, 1, 2, 1, 1],
        "four": [0, 4, 3, -1],
    }.items()
} | {"wk2": weight(6, 6, seed=8), "wkv": weight(6, 24)}
CONSTANTS |= {f"n{i}": np.array(i, np.int64) for i in range(3)}


@pytest.mark.parametrize("name", list(ROWS))
def test_what_is_cut_of_sequences(name: str) -> None:
    body, expected = ROWS[name]
    model, cut = prove(graph(body, CONSTANTS, x="N, 5, 6"))
    assert cut.count
    found = shapes(model)
    assert {key: found[key] for key in expected} == expected


HEADS_MERGED = (
    "tx = Transpose <perm = [1, 0, 2]> (x) s0 = Shape <start = 0, end = 1> (x) h = Mul (s0, four1) "
    "to = Concat <axis = 0> (five, h, three) q = MatMul (tx, wq) k = MatMul (tx, wk) v = MatMul (tx, wv) "
    "q3 = Reshape (q, to) k3 = Reshape (k, to) v3 = Reshape (v, to) qt = Transpose <perm = [1, 0, 2]> (q3) "
    "kt = Transpose <perm = [1, 2, 0]> (k3) vt = Transpose <perm = [1, 0, 2]> (v3) s = MatMul (qt, kt) "
    "c = Mul (s, third) p = Softmax (c) o = MatMul (p, vt) ot = Transpose <perm = [1, 0, 2]> (o) "
    "j = Reshape (ot, first) y = MatMul (j, wo)"
)


def merged_heads(body: str) -> onnx.ModelProto:
    """With the sizes that torch's exporter writes, which inference does not find."""
    proto = graph(body, CONSTANTS, x="N, 5, 6")
    sizes = {name: [5, "4*N", 3] for name in ("q3", "k3", "v3", "ot")}
    sizes |= {"qt": ["4*N", 5, 3], "kt": ["4*N", 3, 5], "vt": ["4*N", 5, 3], "o": ["4*N", 5, 3]}
    sizes |= {name: ["4*N", 5, 5] for name in ("s", "c", "p")}
    kept = [value for value in proto.graph.value_info if value.name not in sizes]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    proto.graph.value_info.extend(onnx.helper.make_tensor_value_info(name, 1, dims) for name, dims in sizes.items())
    return proto


def test_heads_that_are_merged_with_a_batch_of_unknown_size() -> None:
    """As in torch's multi-head attention, where products are of three axes."""
    proto = merged_heads(HEADS_MERGED)
    (group,) = (g for g in find_groups(ir.from_proto(proto)) if g.kind == "heads")
    assert (group.count, group.width) == (4, 3)
    model, cut = prove(proto)
    assert cut.count
    found = shapes(model)
    assert [found[name] for name in ("wq", "wk", "wv", "wo")] == [(6, 6)] * 4
    # The old name would say that it is as large as in the whole graph, and runtimes share buffers by names.
    q3 = next(n for n in model.graph if n.outputs[0].name == "q3").outputs[0]
    assert q3.shape is not None
    assert q3.shape[1] != "4*N"


@pytest.mark.parametrize("op", ["ReduceSum <keepdims = 1> (qt, i0)", "CumSum (qt, n0)", "Concat <axis = 0> (qt, vt)"])
def test_heads_that_are_merged_stay_where_something_else_reads_them(op: str) -> None:
    proto = merged_heads(HEADS_MERGED.replace("j = Reshape", f"z = {op} zs = ReduceSum <keepdims = 0> (z) j = Reshape"))
    assert not [g for g in find_groups(ir.from_proto(proto)) if "wq" in {m.value for m in g.members}]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (("b", 32), ("4*b", 8), ((("b",), (4, 8)), (("b", 4), (8,)))),
        (("b", 4, 8), ("4*b", 8), ((("b",), (4,), (8,)), (("b", 4), (8,)))),
        ((6, 1, "b"), (2, "3*b"), (((2, 3), (), ("b",)), ((2,), (3, "b")))),
        ((32, "b"), ("4*b", 8), None),
        (("b", None), ("b",), None),
        ((4, 6), (6, 4), None),
    ],
)
def test_factors_of_axes(old, new, expected) -> None:
    assert refined(old, new) == expected


@pytest.mark.parametrize("flipped", [0, 1])
def test_gemm(flipped: int) -> None:
    first, second = ("g1t", "g2t") if flipped else ("g1", "g2")
    body = f"a = Gemm <transB = {flipped}, alpha = 0.5, beta = 2.0> (x, {first}, gb) r = Relu (a) "
    body += f"y = Gemm <transB = {flipped}> (r, {second})"
    model, _ = prove(graph(body, CONSTANTS, x="N, 6"))
    assert shapes(model)["gb"] == (6,)
    assert shapes(model)[first] == ((6, 6))


#: a graph in which nothing may be cut, and a word of the reason
WHOLE = {
    "the graph's output": (f"y = Conv <{P}> (x, w1)", "output"),
    "added to the input": ("a = Conv (x, w44a) y0 = Add (x, a) y = Conv (y0, w4)", "joins it"),
    "softmax over channels": (f"{FIRST} r = Softmax <axis = 1> (a) {LAST}", "statistics"),
    "a mean over channels": (f"{FIRST} r = ReduceMean (a, i1) y = Relu (r)", "reduces"),
    "an op that is not followed": (f"{FIRST} r = LRN <size = 3> (a) {LAST}", "LRN"),
    "space from depth": (f"{FIRST} r = DepthToSpace <blocksize = 2> (a) y = Relu (r)", "DepthToSpace"),
    "a reversed range": (f"{FIRST} r = Slice (a, i6, i0, i1, neg) y = Conv (r, w6)", "range"),
    "one weight for what is cut and what is not": (f"a = Conv <{P}> (x, w44) y = Conv <{P}> (a, w44)", "output"),
    "a sum of products of what is computed": (
        f"{FIRST} t = Transpose <perm = [0, 2, 3, 1]> (a) u = Transpose <perm = [0, 2, 1, 3]> (a) y = MatMul (t, u)",
        "no constant",
    ),
    "a kernel slides along it": (f"{FIRST} r = Transpose <perm = [0, 2, 1, 3]> (a) y = Conv <{P}> (r, w6)", "slides"),
    "statistics of an instance": (
        f"{FIRST} r = Transpose <perm = [0, 2, 1, 3]> (a) y = InstanceNormalization (r, ln, lnb)",
        "statistics",
    ),
    "one channel alone is taken": ("a = Conv (x, w22) y = Slice (a, i0, i1, i1)", "alone"),
}
CONSTANTS |= {"w44a": weight(4, 4, 1, 1), "neg": np.array([-1], np.int64), "w22": weight(1, 4, 1, 1)}


@pytest.mark.parametrize("name", list(WHOLE))
def test_what_is_kept_whole(name: str) -> None:
    body, word = WHOLE[name]
    analysis = analyze(ir.from_proto(graph(body, CONSTANTS)))
    first = analysis.declined[0]
    assert word in first.reason
    assert not {"w1", "w44", "w22", "w44a"} & {m.value for g in analysis.groups for m in g.members if "out" in m.roles}


def test_group_normalisation_loses_groups() -> None:
    body = f"{FIRST} r = GroupNormalization <num_groups = 4> (a, scale, shift) {LAST}"
    model, _ = prove(graph(body, CONSTANTS, opset=21, y="N, 5, 6, 6"))
    assert shapes(model)["scale"] == (4,)
    assert next(n for n in model.graph if n.op_type == "GroupNormalization").attributes["num_groups"].as_int() == 2


@pytest.mark.parametrize("opset", [9, 10, 11, 13, 18])
def test_numbers_are_rewritten_where_the_opset_has_them(opset: int) -> None:
    """Split, Slice and Pad moved their numbers from attributes to inputs, at 13, 10 and 11."""
    split = "Split <axis = 1, split = [4, 4]> (a)" if opset < 13 else "Split <axis = 1> (a, halves)"
    sliced = "Slice <axes = [1], starts = [0], ends = [4]> (a)" if opset < 10 else "Slice (a, i0, i4, i1)"
    pad = "Pad <pads = [0, 2, 0, 0, 0, 2, 0, 0]> (m)" if opset < 11 else "Pad (m, pads)"
    body = f"{FIRST} p, q = {split} s = {sliced} m0 = Mul (p, q) m = Mul (m0, s) r = {pad} {LAST}"
    model, _ = prove(graph(body, CONSTANTS, opset=opset))
    assert shapes(model)["w1"] == (4, 4, 3, 3)


def test_sizes_that_are_computed_stay_those_of_the_whole_graph() -> None:
    """What is reshaped to the size of something that is cut is not cut itself."""
    body = (
        f"{FIRST} s = Shape (a) c = Conv <{P}> (x, w1b) f = Flatten <axis = 3> (c) r0 = Reshape (x, any) "
        f"e = Expand (third, s) y0 = ReduceSum (e) r = Relu (a) z = Conv <{P}> (r, w2, b2) y = Add (z, y0)"
    )
    body = body.replace(f"c = Conv <{P}> (x, w1b) f = Flatten <axis = 3> (c) r0 = Reshape (x, any) ", "")
    model, _ = prove(graph(body, CONSTANTS))
    assert shapes(model)["w1"] == (4, 4, 3, 3)
    assert "Add" in [node.op_type for node in model.graph if node.outputs[0].name == "s_adjusted"]


@pytest.mark.parametrize("x", ["3, 8, 4", "N, 8, 4"])
def test_a_copied_size_that_is_by_chance_that_of_the_channels(x: str) -> None:
    """The second 0 copies the 8 channels for an axis that is the 8 steps."""
    constants = {"w": weight(4, 8), "wo": weight(8, 5), "shape": np.array([0, 1, 0, 8])}
    model, _ = prove(graph("a = MatMul (x, w) r = Reshape (a, shape) y = MatMul (r, wo)", constants, x=x))
    assert shapes(model)["w"] == (4, 4)


@pytest.mark.parametrize("end", ["y = Reshape (a, one)", "r = Reshape (a, one) y = Relu (r)"])
def test_channels_that_are_merged_with_the_batch_in_an_output_stay(end: str) -> None:
    proto = graph(f"a = MatMul (x, w) {end}", {"w": weight(4, 8), "one": np.array([-1])}, x="N, 6, 4")
    assert not find_groups(ir.from_proto(proto))


def test_two_sizes_unknown_in_a_computed_shape() -> None:
    """Copied sizes need no number; heads are cut behind a Reshape whose target is computed from the input's sizes."""
    body = (
        "s = Shape <start = 0, end = 2> (x) t = Concat <axis = 0> (s, hd) a = MatMul (x, wq) q = Reshape (a, t) "
        "r = Relu (q) j = Reshape (r, joined) y = MatMul (j, wo)"
    )
    constants = CONSTANTS | {"hd": np.array([4, 3], np.int64)}
    model, _ = prove(graph(body, constants, x="N, S, 6"), sizes={"S": 5})
    assert shapes(model)["wo"] == (6, 6)


def test_what_a_subgraph_reads_is_kept() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        agraph (float[1, 4, 6, 6] x, bool c) => (float[1, 8, 4, 4] y) <float[8, 4, 3, 3] w1>
        {
            a = Conv (x, w1)
            y = If (c) <
                then_branch = g1 () => (float[1, 8, 4, 4] p) { p = Relu (a) },
                else_branch = g2 () => (float[1, 8, 4, 4] q) { q = Identity (a) }
            >
        }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(CONSTANTS["w1"], "w1"))
    analysis = analyze(ir.from_proto(proto))
    assert not analysis.groups
    assert [("If" in d.reason) for d in analysis.declined] == [True, True]


def test_a_default_that_callers_may_override_is_no_weight() -> None:
    proto = graph(f"{FIRST} r = Relu (a) {LAST}", CONSTANTS)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w2", 1, [5, 8, 3, 3]))
    assert not find_groups(ir.from_proto(proto))


def test_a_computed_shape_to_expand_to() -> None:
    body = (
        "k = MatMul (x, wq) k4 = Reshape (k, heads) ku = Unsqueeze (k4, n3) s = Shape (ku) d = Mul (s, fives) "
        "e = Expand (ku, d) m = ReduceMax <keepdims = 0> (e, n3) j = Reshape (m, joined) y = MatMul (j, wo)"
    )
    constants = CONSTANTS | {"fives": np.array([1, 1, 1, 5, 1]), "n3": np.array([3])}
    model, _ = prove(graph(body, constants, x="N, 5, 6"))
    assert shapes(model)["wq"] == (6, 6)


def test_a_bias_that_is_stored_once_does_not_join_layers() -> None:
    body = "a = Conv (x, w1, b1) c = Conv (x, w1b, b1) r = Relu (a) s = Relu (c) "
    body += "t = Conv (r, w2) u = Conv (s, w2c) y = Add (t, u)"
    constants = CONSTANTS | {"w2c": weight(5, 8, 3, 3, seed=3)}
    model, cut = prove(graph(body, constants))
    assert set(cut.channels) == {"Conv -> a", "Conv -> c"}
    assert sum(shape == (4,) for shape in shapes(model).values()) == 2


def test_groups_say_what_they_are() -> None:
    body, _ = ROWS["attention"]
    (group,) = find_groups(ir.from_proto(graph(body, CONSTANTS, x="N, S, 6")))
    assert (group.kind, group.count, group.width) == ("heads", 4, 3)
    assert group.layers == ("MatMul -> q", "MatMul -> k", "MatMul -> v")
    assert group.readers == ("MatMul -> y",)
    rows = {(m.value, m.axis): m for m in group.members}
    assert rows["wq", 1].roles == ("out",)
    assert rows["wo", 0].roles == ("in",)
    assert rows["wo", 0].positions.tolist() == np.arange(12).reshape(4, 3).tolist()
    assert rows["qt", 1].positions.tolist() == [[0], [1], [2], [3]]


def test_atoms() -> None:
    atoms = Atoms()
    a, b = atoms.fresh(2000), atoms.fresh(2000)
    atoms.join(a, b)
    atoms.join(a[:-1], a[1:])
    assert set(atoms.roots(b)) == {0}
    lone = atoms.fresh(1)
    atoms.freeze(b[5:6], "why")
    reasons = atoms.reasons()
    assert atoms.reason(int(reasons[0])) == "why"
    assert reasons[lone[0]] == -1


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (("N", 8, 6, 6), ("N", 288), [(1, 1), (3, 1)]),
        (("N", "S", 12), ("N", "S", 4, 3), [(1, 1), (1, 1), (1, 2)]),
        (("N", "S", 12), (None, 12), [(2, 1), (1, 1)]),
        ((None, 12), ("N", "S", 4, 3), [(1, 2), (1, 2)]),
        ((2, 3, 4), (6, 2, 2), [(2, 1), (1, 2)]),
        ((4, 6), (6, 4), [(2, 2)]),
        (("N", 8, 1, 1), ("N", 8), [(1, 1), (1, 1), (2, 0)]),
        ((1, 8), (8,), [(2, 1)]),
    ],
)
def test_runs_of_axes(old: tuple, new: tuple, expected: list[tuple[int, int]]) -> None:
    found = runs(old, new)
    assert [(len(a), len(b)) for a, b in found] == expected
    assert [i for a, _ in found for i in a] == list(range(len(old)))
    assert [j for _, b in found for j in b] == list(range(len(new)))


def test_a_cut_that_cannot_be_is_refused_before_anything_is_changed() -> None:
    model = ir.from_proto(graph(f"{FIRST} r = Relu (a) {LAST}", CONSTANTS))
    (group,) = find_groups(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    for cut, word in (
        (Cut({group.name: tuple(range(8))}), "without a channel"),
        (Cut({group.name: (8,)}), "0 to 7"),
        (Cut({group.name: (-1,)}), "0 to 7"),
        (Cut({"Conv -> b": (1,)}), "no group"),
        (Cut({group.name: (1,)}, blocks=("Add -> z",)), "no residual block"),
    ):
        for act in (apply, masked):
            with pytest.raises(PassFailed, match=word):
                act(model, cut)
    with pytest.raises(PassFailed) as caught:
        apply(model, Cut({"Conv -> b": (1,)}))
    assert "Conv -> a" in str(caught.value.hint)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_masking_is_not_the_whole_model() -> None:
    """The proof would be worth nothing if zeros changed nothing."""
    proto = graph(f"{FIRST} r = Sigmoid (a) {LAST}", CONSTANTS)
    model, _ = prove(proto)
    feeds = random_feeds(proto, 0)
    assert tensor_error(run_ort(proto, feeds)[0], run_ort(ir.to_proto(model), feeds)[0]).nmse > 1e-3


@pytest.mark.parametrize(
    ("made", "kind"),
    [("s = Shape (a)", "int64[4] s"), ("m = ReduceMean <keepdims = 0> (a, over)", "float[8] m")],
)
def test_what_is_told_of_channels_in_a_second_output_keeps_them(made: str, kind: str) -> None:
    proto = graph(f"{FIRST} {made} r = Relu (a) {LAST}", CONSTANTS | {"over": np.array([0, 2, 3])})
    name = kind.split()[1]
    shape = {"s": [4], "m": [8]}[name]
    proto.graph.output.append(onnx.helper.make_tensor_value_info(name, 7 if name == "s" else 1, shape))
    assert not find_groups(ir.from_proto(proto))
