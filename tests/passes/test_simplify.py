"""simplify: what it takes from onnxsim, when it does not even ask, and what a dying child becomes."""

from __future__ import annotations

import subprocess

import numpy as np
import onnx_ir as ir
import pytest
from pass_support import check, ops, parse

import passes.simplify
from passes.base import PassFailed
from passes.simplify import Simplify

#: Range over a static size: our own folding knows no rule for it when it is not told to infer shapes
OPEN = """agraph (float[N, 6] x, int64 zero, int64 one, float[6, 6] w) => (float[N, 6] y) {
    h = MatMul (x, w)
    s = Shape (h)
    n = Gather (s, one)
    r = Range (zero, n, one)
    f = Cast <to = 1> (r)
    y = Add (h, f)
}"""


def open_model():
    weight = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    return parse(OPEN, zero=np.array(0), one=np.array(1), w=weight)


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a child process was started")

    monkeypatch.setattr(subprocess, "run", refuse)


def test_takes_over_constants_under_their_names() -> None:
    pytest.importorskip("onnxsim")
    model, outcome = check(open_model(), Simplify())
    assert outcome.fired >= 1
    constants = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    np.testing.assert_array_equal(constants["f"], np.arange(6, dtype=np.float32))
    assert ops(model)[0] == "MatMul"
    assert ops(model)[-1] == "Add"


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize(
    "text",
    [
        "agraph (float[N, 6] x) => (float[N, 6] y) { y = Neg (x) }",
        "agraph (float[N, 6] x, int64 i) => (int64 y) { s = Shape (x)  y = Gather (s, i) }",
        "agraph (float[N, 6] x) => (float[N, 6] y) { s = Shape (x)  y = ConstantOfShape (s) }",
    ],
    ids=["no shapes", "the batch of an input", "as large as an input"],
)
def test_asks_nothing_where_there_is_nothing_to_find(text: str) -> None:
    constants = {"i": np.array(0)} if " i)" in text else {}
    _, outcome = check(parse(text, **constants), Simplify(), fired=0)
    assert len(outcome.declined) == 1


def test_the_child_sees_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    real = Simplify._run

    def spy(self: Simplify, proto: object) -> object:
        seen["bytes"] = proto.ByteSize()  # type: ignore[attr-defined]
        return real(self, proto)  # type: ignore[arg-type]

    monkeypatch.setattr(Simplify, "_run", spy)
    proto = parse(
        OPEN.replace("6]", "600]").replace("[6,", "[600,"),
        zero=np.array(0),
        one=np.array(1),
        w=np.ones((600, 600), np.float32),
    )
    model = ir.from_proto(proto)
    weight = model.graph.initializers["w"].const_value
    Simplify()(model)
    assert seen["bytes"] < 2000
    assert model.graph.initializers["w"].const_value is weight


@pytest.mark.parametrize(
    ("child", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("raise ValueError('a bad graph')", "a bad graph"),
        ("pass", "exit code 0"),
        ("import sys; open(sys.argv[2], 'wb').write(b'no model')", "no model"),
        ("x = bytearray(1 << 40)", "MemoryError"),
    ],
    ids=["crash", "refusal", "no result", "no model", "memory"],
)
def test_a_dying_child_is_a_typed_error(monkeypatch: pytest.MonkeyPatch, child: str, says: str) -> None:
    monkeypatch.setattr(passes.simplify, "_CHILD", child)
    model = ir.from_proto(open_model())
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(PassFailed, match=says) as caught:
        Simplify()(model)
    assert caught.value.hint
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes.simplify, "_CHILD", "import time; time.sleep(60)")
    with pytest.raises(PassFailed, match="did not finish"):
        Simplify(timeout=0.2)(ir.from_proto(open_model()))


def test_memory_limit_reaches_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = passes.simplify._CHILD.split("import onnx,")[0] + "x = bytearray(512 << 20)"
    monkeypatch.setattr(passes.simplify, "_CHILD", limited)
    with pytest.raises(PassFailed, match="MemoryError"):
        Simplify(memory=256)(ir.from_proto(open_model()))


def test_large_constants_are_left() -> None:
    pytest.importorskip("onnxsim")
    model = ir.from_proto(open_model())
    assert not Simplify(max_bytes=23)(model).modified  # six float32 are 24
