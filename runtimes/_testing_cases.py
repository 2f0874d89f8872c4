"""The models of the contract: graphs in ONNX text, what goes in, and what must come out.

What must come out is computed here in numpy, so that no backend is its own oracle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One model, what goes in, what must come out, and how far off it may be (relative to the largest)."""

    name: str
    graph: str
    feeds: Mapping[str, np.ndarray]
    wanted: Mapping[str, np.ndarray]
    bound: float = 0.0


def _array(dtype: Any, *shape: int) -> np.ndarray:
    return (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 7).astype(dtype)


_X23 = _array("float32", 2, 3) - 3


def _echo(kind: str, array: np.ndarray, name: str | None = None) -> Case:
    graph = f"g ({kind}[N] x) => ({kind}[N] y) {{ y = Identity(x) }}"
    return Case(name or f"echo-{kind}", graph, {"x": array}, {"y": array})


_RELU = "g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }"
_BIG = np.arange(48, dtype="float32").reshape(4, 12) - 20
_FROZEN = _X23.copy()
_FROZEN.flags.writeable = False
_ODD = np.frombuffer(b"\0" + _X23.tobytes(), dtype=np.uint8)[1:].view("float32").reshape(2, 3)

CASES = [
    *(
        _echo(kind, _array(dtype, 5))
        for kind, dtype in [
            *((name, name) for name in ("float16", "int8", "int16", "int32", "int64", "uint8")),
            *((name, name) for name in ("uint16", "uint32", "uint64", "bool")),
            ("float", "float32"),
            ("double", "float64"),
        ]
    ),
    _echo("string", np.array(["a", "", "bé\u4e2d"], dtype=object)),
    _echo("int64", np.array([-(2**62), 2**40 + 1]), "int64-large"),
    Case(
        "double-exact",
        "g (double[N] x) => (double[N] y) { y = Mul(x, x) }",
        {"x": np.array([1 + 2.0**-30])},
        {"y": np.array([(1 + 2.0**-30) ** 2])},
    ),
    Case("batch-2", _RELU, {"x": _X23}, {"y": np.maximum(_X23, 0)}),
    Case("batch-0", _RELU, {"x": _X23[:0]}, {"y": _X23[:0]}),
    Case("fortran-order", _RELU, {"x": np.asfortranarray(_X23)}, {"y": np.maximum(_X23, 0)}),
    Case("strided", _RELU, {"x": _BIG[:, 1::4]}, {"y": np.maximum(_BIG[:, 1::4], 0)}),
    Case("reversed", _RELU, {"x": _X23[::-1, ::-1]}, {"y": np.maximum(_X23[::-1, ::-1], 0)}),
    Case(
        "broadcast",
        _RELU,
        {"x": np.broadcast_to(np.float32(2), (4, 3))},
        {"y": np.full((4, 3), 2, "float32")},
    ),
    Case("read-only", _RELU, {"x": _FROZEN}, {"y": np.maximum(_X23, 0)}),
    # Where an input has to be copied, the copy of the next must not take its place before the model has run.
    Case(
        "two-read-only",
        "g (float[N, 3] a, float[N, 3] b) => (float[N, 3] y) { y = Sub(a, b) }",
        {"a": _FROZEN, "b": np.broadcast_to(np.float32(2), (2, 3))},
        {"y": _X23 - 2},
    ),
    Case("unaligned", _RELU, {"x": _ODD}, {"y": np.maximum(_X23, 0)}),
    Case(
        "scalar",
        "g (float x) => (float y) { y = Neg(x) }",
        {"x": np.array(2.5, dtype="float32")},
        {"y": np.array(-2.5, dtype="float32")},
    ),
    Case(
        "two-in-three-out",
        """g (float[N, K] a, float[K, M] b) => (float[N, M] p, float[N, K] q, int64[2] s)
        { p = MatMul(a, b)  q = Abs(a)  s = Shape(p) }""",
        {"b": _array("float32", 3, 4), "a": _X23},
        {"p": _X23 @ _array("float32", 3, 4), "q": np.abs(_X23), "s": np.array([2, 4])},
        bound=1e-6,
    ),
    Case(
        "one-value-out-twice",
        "g (float[N] x) => (float[N] y, float[N] z, float[N] u) { y = Relu(x)  z = Identity(y)  u = Identity(x) }",
        {"x": _X23[0]},
        {"y": np.maximum(_X23[0], 0), "z": np.maximum(_X23[0], 0), "u": _X23[0]},
    ),
    Case(
        "scalar-and-empty",
        "g (float[N, 3] x, float s) => (float[N, 3] y, float t) { y = Mul(x, s)  t = Abs(s) }",
        {"x": _X23[:0], "s": np.array(-2, dtype="float32")},
        {"y": _X23[:0], "t": np.array(2, dtype="float32")},
    ),
    Case(
        "unknown-rank",
        "g (float x0) => (float[M] y) { m = Constant<value_ints = [-1]>()  y = Reshape(x0, m) }",
        {"x0": np.array(1.5, dtype="float32")},
        {"y": np.array([1.5], dtype="float32")},
    ),
    Case(
        "no-inputs",
        "g () => (float[2] y) { y = Constant<value_floats = [1.0, 2.0]>() }",
        {},
        {"y": np.array([1, 2], dtype="float32")},
    ),
]
