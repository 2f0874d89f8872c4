"""fuse_pad: paddings that a layer can do itself, and those that it would do differently."""

from __future__ import annotations

import numpy as np
import pytest
from pass_support import check, ops, parse, run_ort

from passes.fuse_pad import FusePad

WEIGHT = np.random.default_rng(0).standard_normal((5, 4, 3, 3)).astype(np.float32)
CONSTANTS = {
    "w": WEIGHT,
    "p": np.array([0, 0, 1, 0, 0, 0, 1, 2]),
    "p4": np.array([0, 0, 4, 0, 0, 0, 0, 0]),
    "pc": np.array([0, 1, 0, 0, 0, 0, 0, 0]),
    "crop": np.array([0, 0, -1, 0, 0, 0, 0, 0]),
    "q": np.array([2, 1, 0, 1]),
    "axes": np.array([3, -2]),
    "zero": np.array(0, np.float32),
    "one": np.array(1, np.float32),
    "inf": np.array(-np.inf, np.float32),
    "lowest": np.array(np.finfo(np.float32).min, np.float32),
    "six": np.array(6, np.float32),
}
KINDS = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64"}


def graph(body: str, opset: int = 20):
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {name: data for name, data in CONSTANTS.items() if name in words}
    declared = "".join(f", {KINDS[c.dtype]}{[*c.shape] if c.ndim else ''} {name}" for name, c in used.items())
    text = f"agraph (float[N, 4, 8, 9] x, float[4] free{declared}) => (float[N, C, H, W] y) {{ {body} }}"
    return parse(text, opset=opset, **used)


FIRES = {
    "conv": ("v = Pad (x, p)  y = Conv (v, w)", 20, [1, 0, 1, 2]),
    "conv with a value": ("v = Pad (x, p, zero)  y = Conv (v, w)", 20, [1, 0, 1, 2]),
    "conv that pads too": ("v = Pad (x, p)  y = Conv <pads = [1, 2, 0, 1], strides = [2, 1]> (v, w)", 20, [2, 2, 1, 3]),
    "conv valid": ('v = Pad (x, p)  y = Conv <auto_pad = "VALID"> (v, w)', 20, [1, 0, 1, 2]),
    "conv with axes": ("v = Pad (x, q, , axes)  y = Conv (v, w)", 20, [1, 2, 1, 0]),
    "conv opset 10": ("v = Pad <pads = [0, 0, 1, 0, 0, 0, 1, 2]> (x)  y = Conv (v, w)", 10, [1, 0, 1, 2]),
    "average": ("v = Pad (x, p)  y = AveragePool <kernel_shape = [3, 3]> (v)", 20, [1, 0, 1, 2]),
    "average that counts": (
        "v = Pad (x, p)  y = AveragePool <kernel_shape = [3, 4], pads = [1, 0, 0, 1], count_include_pad = 1> (v)",
        20,
        [2, 0, 1, 3],
    ),
    "maximum after relu": ("r = Relu (x)  v = Pad (r, p)  y = MaxPool <kernel_shape = [3, 3]> (v)", 20, [1, 0, 1, 2]),
    "maximum after relu6": (
        "r = Clip (x, zero, six)  v = Pad (r, p)  y = MaxPool <kernel_shape = [3, 3]> (v)",
        20,
        [1, 0, 1, 2],
    ),
    "maximum of minus infinity": (
        "v = Pad (x, p, inf)  y = MaxPool <kernel_shape = [3, 4], pads = [1, 1, 1, 1]> (v)",
        20,
        [2, 1, 2, 3],
    ),
    "maximum of the lowest": ("v = Pad (x, p, lowest)  y = MaxPool <kernel_shape = [3, 3]> (v)", 20, [1, 0, 1, 2]),
}


@pytest.mark.parametrize(("body", "opset", "pads"), FIRES.values(), ids=FIRES.keys())
def test_fires(body: str, opset: int, pads: list[int]) -> None:
    # Both sum the same taps in another order.
    model, _ = check(graph(body, opset), FusePad(), fired=1, nmse=1e-12, run=run_ort)
    assert "Pad" not in ops(model)
    assert list(model.graph.node(-1).attributes["pads"].as_ints()) == pads


def test_several_users() -> None:
    body = "v = Pad (x, p)  a = Conv (v, w)  b = Conv <strides = [1, 1]> (v, w)  y = Add (a, b)"
    model, _ = check(graph(body), FusePad(), fired=1, nmse=1e-12)
    assert ops(model) == ["Conv", "Conv", "Add"]


MUST_NOT_FIRE = {
    "pads with ones": "v = Pad (x, p, one)  y = Conv (v, w)",
    "value is unknown": "f = ReduceMax <keepdims = 0> (free)  v = Pad (x, p, f)  y = Conv (v, w)",
    "reflects": 'v = Pad <mode = "reflect"> (x, p)  y = Conv (v, w)',
    "pads channels": "n = Conv (x, w)  v = Pad (n, pc)  y = AveragePool <kernel_shape = [2, 2]> (v)",
    "crops": "v = Pad (x, crop)  y = Conv (v, w)",
    "auto_pad": 'v = Pad (x, p)  y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (v, w)',
    "read elsewhere": "v = Pad (x, p)  c = Conv (v, w)  s = ReduceSum (v)  y = Add (c, s)",
    "average that does not count its own": (
        "v = Pad (x, p)  y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (v)"
    ),
    "average with ceil_mode": (
        "v = Pad (x, p)  y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (v)"
    ),
    "window in the padding": "v = Pad (x, p4)  y = AveragePool <kernel_shape = [3, 3]> (v)",
    "maximum of signed values": "v = Pad (x, p)  y = MaxPool <kernel_shape = [3, 3]> (v)",
    "dilated maximum": "r = Relu (x)  v = Pad (r, p)  y = MaxPool <kernel_shape = [3, 3], dilations = [2, 2]> (v)",
    "maximum with its own padding": (
        "v = Pad (x, p, one)  y = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (v)"
    ),
    "not a layer": "v = Pad (x, p)  y = Relu (v)",
}


@pytest.mark.parametrize("body", MUST_NOT_FIRE.values(), ids=MUST_NOT_FIRE.keys())
def test_must_not_fire(body: str) -> None:
    model, outcome = check(graph(body), FusePad(), fired=0, seeds=1, run=run_ort)
    assert "Pad" in ops(model)
    assert len(outcome.declined) == 1


def test_output_of_the_graph_stays() -> None:
    text = """agraph (float[N, 4, 8, 9] x, int64[8] p, float[5, 4, 3, 3] w)
        => (float[N, 5, H, W] y, float[N, 4, A, B] v) { v = Pad (x, p)  y = Conv (v, w) }"""
    check(parse(text, p=CONSTANTS["p"], w=WEIGHT), FusePad(), fired=0)


def test_inside_a_branch() -> None:
    text = """agraph (float[N, 4, 8, 9] x, bool b, int64[8] p, float[5, 4, 3, 3] w) => (float[N, 5, H, W] y) {
        y = If (b) <
            then_branch = t () => (float[N, 5, H, W] a) { v = Pad (x, p)  a = Conv (v, w) },
            else_branch = e () => (float[N, 5, H, W] c) { c = Conv (x, w) }>
    }"""
    check(parse(text, p=CONSTANTS["p"], w=WEIGHT), FusePad(), fired=1, nmse=1e-12, seeds=4)
