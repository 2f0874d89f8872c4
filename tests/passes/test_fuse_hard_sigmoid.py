"""fuse_hard_sigmoid: the ways to write it, and what only resembles it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from pass_support import check, ops, parse, run_ort

from passes.fuse_hard_sigmoid import FuseHardSigmoid

NUMBERS = {
    "three": 3.0,
    "six": 6.0,
    "sixth": 1 / 6,
    "zero": 0.0,
    "one": 1.0,
    "five": 5.0,
    "minus": -1.0,
}


def graph(body: str, *, opset: int = 20, kind: str = "float", dtype: type = np.float32) -> onnx.ModelProto:
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {name: np.array(number, dtype) for name, number in NUMBERS.items() if name in words}
    declared = "".join(f", {kind} {name}" for name in used)
    text = f"agraph ({kind}[N, 40] x, {kind}[N, 40] z, {kind}[1] v{declared}) => ({kind}[N, 40] y) {{ {body} }}"
    return parse(text, opset=opset, **used)


FIRES = {
    "sigmoid by division": ("a = Add (x, three)  c = Clip (a, zero, six)  y = Div (c, six)", ["HardSigmoid"]),
    "sigmoid by a sixth": ("a = Add (three, x)  c = Clip (a, zero, six)  y = Mul (sixth, c)", ["HardSigmoid"]),
    "another slope": ("a = Add (x, one)  c = Clip (a, zero, five)  y = Div (c, five)", ["HardSigmoid"]),
    "negative shift": ("a = Add (x, minus)  c = Clip (a, zero, six)  y = Div (c, six)", ["HardSigmoid"]),
    "swish": (
        "a = Add (x, three)  c = Clip (a, zero, six)  m = Mul (x, c)  y = Div (m, six)",
        ["HardSigmoid", "Mul"],
    ),
    "swish by a sixth": (
        "a = Add (x, three)  c = Clip (a, zero, six)  m = Mul (c, x)  y = Mul (m, sixth)",
        ["HardSigmoid", "Mul"],
    ),
    "swish, divided first": (
        "a = Add (x, three)  c = Clip (a, zero, six)  d = Div (c, six)  y = Mul (x, d)",
        ["HardSigmoid", "Mul"],
    ),
}


@pytest.mark.parametrize(("body", "left"), FIRES.values(), ids=FIRES.keys())
def test_fires(body: str, left: list[str]) -> None:
    model, _ = check(graph(body), FuseHardSigmoid(), fired=1, nmse=1e-13, run=run_ort)
    assert ops(model) == left
    check(graph(body), FuseHardSigmoid(), fired=1, nmse=1e-13)


@pytest.mark.parametrize("opset", [7, 10, 11, 13, 22])
def test_opsets(opset: int) -> None:
    clip = "Clip <min = 0.0, max = 6.0> (a)" if opset < 11 else "Clip (a, zero, six)"
    body = f"a = Add (x, three)  c = {clip}  m = Mul (x, c)  y = Div (m, six)"
    check(graph(body, opset=opset), FuseHardSigmoid(), fired=1, nmse=1e-13, run=run_ort)


def test_float64() -> None:
    proto = graph(FIRES["swish"][0], kind="double", dtype=np.float64)
    check(proto, FuseHardSigmoid(), fired=1, nmse=1e-13)  # alpha is a float32 attribute


MUST_NOT_FIRE = {
    "another divisor": "a = Add (x, three)  c = Clip (a, zero, six)  y = Div (c, five)",
    "lower bound": "a = Add (x, three)  c = Clip (a, minus, six)  y = Div (c, six)",
    "no upper bound": "a = Add (x, three)  c = Clip (a, zero)  y = Div (c, six)",
    "gated by another": "a = Add (x, three)  c = Clip (a, zero, six)  m = Mul (z, c)  y = Div (m, six)",
    "clip read twice": "a = Add (x, three)  c = Clip (a, zero, six)  d = Div (c, six)  y = Add (d, c)",
    "sum read twice": "a = Add (x, three)  c = Clip (a, zero, six)  d = Div (c, six)  y = Add (d, a)",
    "product read twice": "a = Add (x, three) c = Clip (a, zero, six) m = Mul (x, c) d = Div (m, six) y = Add (d, m)",
    "shift is no constant": "a = Add (x, v)  c = Clip (a, zero, six)  y = Div (c, six)",
    "divided the other way": "a = Add (x, three)  c = Clip (a, zero, six)  y = Div (six, c)",
}


@pytest.mark.parametrize("body", MUST_NOT_FIRE.values(), ids=MUST_NOT_FIRE.keys())
def test_must_not_fire(body: str) -> None:
    check(graph(body), FuseHardSigmoid(), fired=0, seeds=1)


def test_integers_stay() -> None:
    body = "a = Add (x, three)  c = Clip (a, zero, six)  y = Div (c, six)"
    check(graph(body, kind="int32", dtype=np.int32), FuseHardSigmoid(), fired=0)


def test_in_a_branch() -> None:
    text = """agraph (float[N] x, bool b, float three, float zero, float six) => (float[N] y) {
        y = If (b) <
            then_branch = t () => (float[N] d) { a = Add (x, three) c = Clip (a, zero, six) d = Div (c, six) },
            else_branch = e () => (float[N] q) { q = Abs (x) }>
    }"""
    constants = {name: np.array(NUMBERS[name], np.float32) for name in ("three", "zero", "six")}
    check(parse(text, **constants), FuseHardSigmoid(), fired=1, nmse=1e-13, seeds=4)
