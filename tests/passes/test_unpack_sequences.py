"""unpack_sequences: what is read by number, and what only resembles it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_support import check, ops, parse, run_ort

from passes.fold_constants import FoldConstants
from passes.unpack_sequences import UnpackSequences

NUMBERS = {
    "two": np.array(2),
    "one": np.array(1),
    "zero": np.array(0),
    "last": np.array(-1),
    "four": np.array(4),
    "sizes": np.array([1, 5]),
}


def graph(body: str, *, opset: int = 20, y: str = "float[A, B] y") -> onnx.ModelProto:
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {name: number for name, number in NUMBERS.items() if name in words}
    declared = "".join(f", int64{list(c.shape) if c.ndim else ''} {name}" for name, c in used.items())
    text = f"agraph (float[N, 6] x, float[N, 6] z, int64 i{declared}) => ({y}) {{ {body} }}"
    return parse(text, opset=opset, **used)


FIRES = {
    "chunk": (
        "s = SplitToSequence <axis = 1> (x, four) a = SequenceAt (s, zero) b = SequenceAt (s, one) "
        "c = Concat <axis = 1> (b, a) y = Relu (c)",
        ["Split", "Concat", "Relu"],
    ),
    "sizes, from the end": (
        "s = SplitToSequence <axis = -1> (x, sizes) a = SequenceAt (s, last) y = Relu (a)",
        ["Split", "Relu"],
    ),
    "a part twice": (
        "s = SplitToSequence <axis = 1> (x, two) a = SequenceAt (s, two) b = SequenceAt (s, last) y = Add (a, b)",
        ["Split", "Add"],
    ),
    "unbind": (
        "s = SplitToSequence <axis = 1, keepdims = 0> (x) a = SequenceAt (s, two) b = SequenceAt (s, last) "
        "y = Add (a, b)",
        ["Gather", "Gather", "Add"],
    ),
    "one each": (
        "s = SplitToSequence <axis = 1> (x) a = SequenceAt (s, two) y = Relu (a)",
        ["Split", "Relu"],
    ),
    "the graph's output": (
        "s = SplitToSequence <axis = 1> (x, two) y = SequenceAt (s, one)",
        ["Split"],
    ),
    "constructed": (
        "r = Relu (x) s = SequenceConstruct (r, z) a = SequenceAt (s, zero) b = SequenceAt (s, last) y = Add (a, b)",
        ["Relu", "Add"],
    ),
}


@pytest.mark.parametrize(("body", "left"), FIRES.values(), ids=FIRES.keys())
@pytest.mark.parametrize("opset", [12, 13, 20])
def test_fires(body: str, left: list[str], opset: int) -> None:
    y = "float[A] y" if "keepdims = 0" in body else "float[A, B] y"
    model, _ = check(graph(body, opset=opset, y=y), UnpackSequences(), fired=1, nmse=0, run=run_ort)
    assert ops(model) == left


def test_two_outputs_of_the_graph() -> None:
    body = "s = SplitToSequence <axis = 1> (x, two) y = SequenceAt (s, one) v = SequenceAt (s, zero)"
    model, _ = check(graph(body, y="float[A, B] y, float[C, D] v"), UnpackSequences(), fired=1, nmse=0, run=run_ort)
    assert [value.name for value in model.graph.outputs] == ["y", "v"]


MUST_NOT_FIRE = {
    "number computed": ("s = SplitToSequence <axis = 1> (x, one) y = SequenceAt (s, i)", "float[A, B] y", "computed"),
    "size computed": ("s = SplitToSequence <axis = 1> (x, i) y = SequenceAt (s, zero)", "float[A, B] y", "computed"),
    "axis of unknown size": (
        "s = SplitToSequence (x, two) y = SequenceAt (s, zero)",
        "float[A, B] y",
        "how many parts",
    ),
    "read whole": (
        "s = SplitToSequence <axis = 1> (x, two) a = SequenceAt (s, zero) n = SequenceLength (s) "
        "f = Cast <to = 1> (n) y = Add (a, f)",
        "float[A, B] y",
        "SequenceLength",
    ),
    "an input as output": (
        "s = SequenceConstruct (x, z) y = SequenceAt (s, zero)",
        "float[A, B] y",
        "is an output of the graph",
    ),
    "one part as two outputs": (
        "s = SplitToSequence <axis = 1> (x, two) y = SequenceAt (s, one) v = SequenceAt (s, one)",
        "float[A, B] y, float[C, D] v",
        "two outputs",
    ),
}


@pytest.mark.parametrize(("body", "y", "reason"), MUST_NOT_FIRE.values(), ids=MUST_NOT_FIRE.keys())
def test_declines(body: str, y: str, reason: str) -> None:
    proto = graph(body, y=y)
    _, outcome = check(proto, UnpackSequences(), fired=0, run=run_ort)
    assert len(outcome.declined) == 1
    assert reason in outcome.declined[0].reason


@pytest.mark.parametrize("told", [False, True])
def test_parts_of_unequal_sizes_do_not_share_a_name_for_them(told: bool) -> None:
    """As they do in onnx's shape inference; ONNX Runtime reuses buffers by names, and ends in an error then."""
    body = (
        "s = SplitToSequence <axis = 1> (x, sizes) a = SequenceAt (s, zero) b = SequenceAt (s, last) "
        "c = Relu (a) d = Relu (b) y = Concat <axis = 1> (d, c)"
    )
    proto = graph(body)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto) if told else proto)
    FoldConstants()(model)  # which fills in shapes
    assert UnpackSequences()(model).modified
    sizes = {value.name: value.shape[1] for n in model.graph for value in n.outputs if value.shape is not None}
    assert [sizes[f"s_part{end}"] for end in ("", "_1")] == [1, 5]
    assert told or sizes["c"] != sizes["d"] or sizes["c"] == ir.SymbolicDim(None)


def test_a_part_that_nothing_reads_has_a_type() -> None:
    """A shape without one cannot be written, and is warned about."""
    model = ir.from_proto(graph("s = SplitToSequence <axis = 1> (x, two) a = SequenceAt (s, one) y = Relu (a)"))
    assert UnpackSequences()(model).modified
    split = next(node for node in model.graph if node.op_type == "Split")
    assert all(value.type is not None and value.shape is not None for value in split.outputs)


def test_a_part_that_does_not_exist() -> None:
    proto = graph("s = SplitToSequence <axis = 1> (x, two) y = SequenceAt (s, four)")
    outcome = UnpackSequences()(ir.from_proto(proto))  # such a graph does not run
    assert not outcome.modified
    assert "part 4 of 3" in outcome.declined[0].reason
