"""eliminate_dead_code: what nothing depends on goes, and nothing else."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from pass_support import check, ops, parse

from passes.eliminate_dead_code import EliminateDeadCode


def test_nodes_and_initializers() -> None:
    text = """agraph (float[2] x, float[2] a, float[2] b) => (float[2] y) {
        y = Add (x, a)
        d = Mul (x, b)
        e, f = Split <num_outputs = 2> (d)
    }"""
    data = np.ones(2, np.float32)
    model, _ = check(parse(text, a=data, b=data), EliminateDeadCode(), fired=3)
    assert ops(model) == ["Add"]
    assert list(model.graph.initializers) == ["a"]


def test_inputs_stay() -> None:
    proto = parse("agraph (float[2] x, float[2] unused, float[2] c) => (float[2] y) { y = Neg (x) }")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "c"))
    check(proto, EliminateDeadCode(), fired=0)


def test_output_that_is_an_initializer_stays() -> None:
    text = "agraph (float[2] x, float[2] c) => (float[2] y, float[2] c) { y = Neg (x) }"
    check(parse(text, c=np.ones(2, np.float32)), EliminateDeadCode(), fired=0)


def test_what_only_a_subgraph_reads_is_alive() -> None:
    text = """agraph (float[2] x, bool b, float[2] c, float[2] d) => (float[2] y) {
        n = Mul (x, c)
        y = If (b) <
            then_branch = t () => (float[2] p) { u = Exp (d)  p = Neg (n) },
            else_branch = e () => (float[2] q) { q = Abs (n) }>
    }"""
    data = np.ones(2, np.float32)
    model, _ = check(parse(text, c=data, d=data), EliminateDeadCode(), fired=2, seeds=4)
    assert list(model.graph.initializers) == ["c"]


def test_what_only_a_dead_subgraph_read_is_dead() -> None:
    text = """agraph (float[2] x, bool b) => (float[2] y) {
        n = Abs (x)
        z = If (b) <
            then_branch = t () => (float[2] p) { p = Neg (n) },
            else_branch = e () => (float[2] q) { q = Exp (n) }>
        y = Neg (x)
    }"""
    model, _ = check(parse(text), EliminateDeadCode(), fired=2)  # the If, then what it had captured
    assert ops(model) == ["Neg"]


def test_functions_and_imports() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18, "used" : 1, "gone" : 1, "ai.onnx.ml" : 3]>
    agraph (float[2] x) => (float[2] y) { y = used.f (x)  dead = gone.g (x) }
    <domain: "used", opset_import: ["" : 18, "ai.onnx.ml" : 3]>
    inner (x) => (y) { d = Abs (x)  y = Neg (x) }
    <domain: "used", opset_import: ["" : 18, "used" : 1]>
    f (x) => (y) { y = used.inner (x) }
    <domain: "gone", opset_import: ["" : 18]>
    g (x) => (y) { y = Neg (x) }"""
    model, _ = check(parse(text), EliminateDeadCode())
    assert [f.name for f in model.functions.values()] == ["inner", "f"]
    assert set(model.opset_imports) == {"", "used"}


def test_optional_outputs() -> None:
    text = """agraph (float[1, 1, 4, 4] x) => (float[1, 1, 3, 3] y, float[1, 1, 3, 3] z, int64[1, 1, 3, 3] k) {
        y, i = MaxPool <kernel_shape = [2, 2]> (x)
        z, k = MaxPool <kernel_shape = [2, 2]> (x)
    }"""
    model, _ = check(parse(text), EliminateDeadCode(), fired=1)
    assert [len(node.outputs) for node in model.graph] == [1, 2]


def test_training_outputs_of_batch_normalization_stay() -> None:
    """Before opset 14 their number says that it is training."""
    text = """agraph (float[1, 2, 3, 3] x, float[2] a) => (float[1, 2, 3, 3] y) {
        y, m, v, sm, sv = BatchNormalization (x, a, a, a, a)
    }"""
    model = ir.from_proto(parse(text, opset=9, a=np.ones(2, np.float32)))
    assert not EliminateDeadCode()(model).modified
    assert len(model.graph.node(0).outputs) == 5


def test_unused_node_of_an_unknown_library_is_kept_and_told() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18, "logging" : 1]>
    agraph (float[2] x) => (float[2] y) { y = Neg (x)  n = logging.Print (x) }"""
    model, outcome = check(parse(text), EliminateDeadCode(), fired=0, seeds=0)
    assert ops(model) == ["Neg", "Print"]
    assert "logging" in outcome.declined[0].reason
