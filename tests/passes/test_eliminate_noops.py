"""eliminate_noops: what hands on its input, and what only looks like it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_support import check, ops, parse, run_ort

from passes.eliminate_noops import EliminateNoops

CONSTANTS = {
    "zero": np.array(0, np.float32),
    "one": np.array(1, np.float32),
    "zeros1": np.zeros(1, np.float32),
    "zeros4": np.zeros(4, np.float32),
    "zeros214": np.zeros((2, 1, 4), np.float32),
    "ones3d": np.ones((1, 1, 1), np.float32),
    "ones5d": np.ones((1, 1, 1, 1, 1), np.float32),
    "mixed": np.array([0, 0, 0, 1e-30], np.float32),
    "izero": np.array(0),
    "i0": np.array([0]),
    "i1": np.array([1]),
    "i2": np.array([2]),
    "i3": np.array([3]),
    "huge": np.array([2**63 - 1]),
    "minus": np.array([-1]),
    "copy": np.array([0, 0, 0]),
    "infer": np.array([0, -1, 4]),
    "fixed": np.array([2, 3, 4]),
    "other": np.array([2, 4, 3]),
    "flat": np.array([-1]),
    "p0": np.zeros(6, np.int64),
    "p1": np.array([0, 0, 0, 0, 0, 1]),
    "wide": np.array([1, 1, 1, 1]),
    "narrow": np.array([1, 1]),
    "yes": np.array(True),
    "no": np.array(False),
    "half": np.array(0.5, np.float32),
    "order": np.array([1, 0]),
}
KINDS = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64", np.dtype(np.bool_): "bool"}


def graph(body: str, *, opset: int = 20, shape: str = "2, 3, 4", out: str | None = None) -> onnx.ModelProto:
    """x -> Neg -> body (reads v, writes w) -> Neg -> y, with the constants that the body names."""
    used = {
        n: c for n, c in CONSTANTS.items() if n in body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    }
    declared = "".join(f", {KINDS[c.dtype]}[{', '.join(map(str, c.shape))}] {n}" for n, c in used.items())
    text = f"""agraph (float[{shape}] x, bool[{shape}] m, int64[{shape}] k{declared.replace("[]", "")})
        => (float[{out or shape}] y) {{
        v = Neg (x)
        {body}
        y = Neg (w)
    }}"""
    return onnx.shape_inference.infer_shapes(parse(text, opset=opset, **used), data_prop=True)


FIRES = {
    "identity": ("w = Identity (v)", {}),
    "dropout": ("w = Dropout (v)", {}),
    "dropout with a rate": ("w = Dropout (v, half)", {}),
    "dropout not training": ("w = Dropout (v, half, no)", {}),
    "dropout training at rate 0": ("w = Dropout (v, zero, yes)", {}),
    "dropout opset 11": ("w = Dropout <ratio = 0.5> (v)", {"opset": 11}),
    "dropout opset 7": ("w = Dropout <ratio = 0.5> (v)", {"opset": 7}),
    "pad by nothing": ("w = Pad (v, p0)", {}),
    "reflect pad by nothing": ('w = Pad <mode = "reflect"> (v, p0)', {}),
    "pad opset 10": ("w = Pad <pads = [0, 0, 0, 0, 0, 0]> (v)", {"opset": 10}),
    "reshape to the same": ("w = Reshape (v, fixed)", {}),
    "reshape copies": ("w = Reshape (v, copy)", {"shape": "N, S, 4"}),
    "reshape infers one": ("w = Reshape (v, infer)", {"shape": "N, S, 4"}),
    "reshape flat": ("w = Reshape (v, flat)", {"shape": "N"}),
    "expand to ones": ("w = Expand (v, narrow)", {}),
    "expand to its own shape": ("w = Expand (v, fixed)", {}),
    "slice all of it": ("w = Slice (v, i0, huge, i1)", {"shape": "N, S, 4"}),
    "slice a known length": ("w = Slice (v, i0, i3, i1, i1)", {}),
    "slice opset 9": ("w = Slice <starts = [0], ends = [9223372036854775807], axes = [1]> (v)", {"opset": 9}),
    "flatten a matrix": ("w = Flatten (v)", {"shape": "N, 4"}),
    "cast to its own type": ("w = Cast <to = 1> (v)", {}),
    "cast like itself": ("w = CastLike (v, zero)", {}),
    "transpose in order": ("w = Transpose <perm = [0, 1, 2]> (v)", {}),
    "transpose a vector": ("w = Transpose (v)", {"shape": "N"}),
    "concat of one": ("w = Concat <axis = 1> (v)", {}),
    "sum of one": ("w = Sum (v)", {}),
    "split in one": ("w = Split <axis = 1, num_outputs = 1> (v)", {}),
    "add 0": ("w = Add (v, zero)", {"shape": "N, S, 4"}),
    "0 add": ("w = Add (zero, v)", {"shape": "N, S, 4"}),
    "add zeros": ("w = Add (v, zeros4)", {}),
    "add one zero": ("w = Add (v, zeros1)", {"shape": "N, S, 4"}),
    "subtract 0": ("w = Sub (v, zero)", {}),
    "times 1": ("w = Mul (one, v)", {}),
    "times ones": ("w = Mul (v, ones3d)", {"shape": "N, S, T"}),
    "over 1": ("w = Div (v, one)", {}),
    "power 1": ("w = Pow (v, one)", {}),
    "chain": ("a = Identity (v)  b = Dropout (a)  w = Add (b, zero)", {}),
    "dynamic mask of zeros": ("s = Shape (x)  e = Expand (zero, s)  w = Add (v, e)", {"shape": "N, S, 4"}),
    "where always": ("s = Shape (x)  e = Expand (yes, s)  w = Where (e, v, zero)", {"shape": "N, S, 4"}),
    "where never": ("w = Where (no, zero, v)", {}),
    "and true": ("a = And (m, yes)  c = Cast <to = 1> (a)  w = Add (v, c)", {}),
    "or false": ("a = Or (no, m)  c = Cast <to = 1> (a)  w = Add (v, c)", {}),
    "integers": ("a = Add (k, izero)  c = Cast <to = 1> (a)  w = Add (v, c)", {}),
}


@pytest.mark.parametrize(("body", "options"), FIRES.values(), ids=FIRES.keys())
def test_fires(body: str, options: dict) -> None:
    model, outcome = check(graph(body, **options), EliminateNoops(), sizes={"N": 2, "S": 3, "T": 4})
    assert outcome.fired >= 1
    gone = body.split("=")[-1 if "chain" not in body else 0].strip().split(" ")[0]
    if "Cast <to = 1> (a)" not in body:
        assert gone not in ops(model)


MUST_NOT_FIRE = {
    "dropout in training": ("w = Dropout <seed = 1> (v, half, flag)", {}),
    "dropout whose mask is read": ("d, b = Dropout (v)  c = Cast <to = 1> (b)  w = Add (d, c)", {}),
    "pad": ("w = Pad (v, p1)", {"out": "2, 3, 5"}),
    "reshape to another shape": ("w = Reshape (v, other)", {"out": "2, 4, 3"}),
    "reshape dynamic": ("w = Reshape (v, fixed)", {"shape": "N, S, 4", "out": "2, 3, 4"}),
    "reshape flat": ("w = Reshape (v, flat)", {"out": "M"}),
    "reshape copies in allowzero": ("w = Reshape <allowzero = 1> (v, copy)", {"shape": "N, S, 4", "out": "0, 0, 0"}),
    "expand": ("w = Expand (v, fixed)", {"shape": "2, 1, 4", "out": "2, 3, 4"}),
    "expand to a higher rank": ("w = Expand (v, wide)", {"out": "1, 2, 3, 4"}),
    "slice backwards": ("w = Slice (v, minus, low, i1, minus)", {}),
    "slice from 1": ("w = Slice (v, i1, huge, i1)", {"out": "2, 2, 4"}),
    "slice a dynamic axis": ("w = Slice (v, i0, i3, i1)", {"shape": "N, S, 4", "out": "N, T, 4"}),
    "flatten": ("w = Flatten (v)", {"out": "2, 12"}),
    "cast": ("c = Cast <to = 7> (v)  w = Cast <to = 1> (c)", {}),
    "transpose": ("w = Transpose <perm = [0, 2, 1]> (v)", {"out": "2, 4, 3"}),
    "reversing transpose": ("w = Transpose (v)", {"out": "4, 3, 2"}),
    "concat with a constant": ("w = Concat <axis = 2> (v, v)", {"out": "2, 3, 8"}),
    "add nearly zeros": ("w = Add (v, mixed)", {}),
    "zeros that broadcast": ("w = Add (v, zeros214)", {"shape": "3, 4", "out": "2, 3, 4"}),
    "ones of higher rank": ("w = Mul (v, ones5d)", {"out": "1, 1, 2, 3, 4"}),
    "zeros over a dynamic axis": ("w = Add (v, zeros4)", {"shape": "N, S", "out": "N, T"}),
    "0 minus": ("w = Sub (zero, v)", {}),
    "1 over": ("w = Div (one, v)", {}),
    "1 power": ("w = Pow (one, v)", {}),
    "times 0": ("w = Mul (v, zero)", {}),
    "where that broadcasts": ("w = Where (yes, zeros4, v)", {}),
    "where mixed": ("w = Where (m, v, zero)", {}),
}


@pytest.mark.parametrize(("body", "options"), MUST_NOT_FIRE.values(), ids=MUST_NOT_FIRE.keys())
def test_must_not_fire(body: str, options: dict) -> None:
    if "flag" in body:  # a constant would be decided
        body = "f = ReduceMax <keepdims = 0> (k)  flag = Cast <to = 9> (f)  " + body
    if "low" in body:
        body = "low = Constant <value_ints = [-9223372036854775807]> ()  " + body
    sizes = {"N": 0 if "allowzero" in body else 2, "S": 4 if "zeros4" in body else 3, "T": 4}
    # Dropout in training is random: nothing to compare.
    check(graph(body, **options), EliminateNoops(), fired=0, seeds=0 if "flag" in body else 1, sizes=sizes)


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 13, 18, 24])
def test_opsets(opset: int) -> None:
    check(graph("i = Identity (v)  a = Add (i, zero)  w = Mul (a, one)", opset=opset), EliminateNoops(), fired=3)


def test_output_keeps_its_name_and_its_declared_shape() -> None:
    proto = parse("agraph (float[2, 3] x) => (float[A, B] y) { v = Neg (x) y = Identity (v) }")
    model, _ = check(proto, EliminateNoops(), fired=1)
    assert ops(model) == ["Neg"]


OUTPUTS_THAT_STAY = {
    "an input": "agraph (float[2] x) => (float[2] y) { y = Identity (x) }",
    "an initializer": "agraph (float[2] x, float[2] c) => (float[2] y, float[2] z) { y = Identity (c) z = Neg (x) }",
    "an output already": "agraph (float[2] x) => (float[2] y, float[2] z) { y = Neg (x) z = Identity (y) }",
    "from outside the branch": """agraph (float[2] x, bool b) => (float[2] y) {
        n = Neg (x)
        y = If (b) <then_branch = t () => (float[2] p) { p = Identity (n) },
                    else_branch = e () => (float[2] q) { q = Abs (n) }>
    }""",
    "a loop's own state": """agraph (float[2] x, int64 n, bool b) => (float[2] y) {
        y = Loop (n, b, x) <body = l (int64 i, bool c, float[2] s) => (bool d, float[2] t) {
            d = Identity (c) t = Identity (s) }>
    }""",
}


@pytest.mark.parametrize("text", OUTPUTS_THAT_STAY.values(), ids=OUTPUTS_THAT_STAY.keys())
def test_output_that_cannot_take_another_value(text: str) -> None:
    constants = {"c": np.array([1, 2], np.float32)} if " c)" in text and "float[2] c" in text else {}
    if "Loop" in text:
        constants = {"n": np.array(3)}
    _, outcome = check(parse(text, **constants), EliminateNoops(), fired=0)
    assert any("name" in each.reason for each in outcome.declined)


def test_one_value_under_two_output_names() -> None:
    proto = parse("agraph (float[2] x) => (float[2] y, float[2] z) { v = Neg (x) y = Identity (v) z = Identity (v) }")
    model, _ = check(proto, EliminateNoops(), fired=1)
    assert [v.name for v in model.graph.outputs] == ["y", "z"]


def test_value_captured_by_a_subgraph() -> None:
    text = """agraph (float[2] x, bool b) => (float[2] y) {
        v = Neg (x)
        i = Identity (v)
        y = If (b) <then_branch = t () => (float[2] p) { j = Identity (i) p = Abs (j) },
                    else_branch = e () => (float[2] q) { q = Exp (i) }>
    }"""
    model, _ = check(parse(text), EliminateNoops(), fired=2, seeds=4)
    assert ops(model) == ["Neg", "If"]


def test_inside_a_function() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18, "local" : 1]>
    agraph (float[2] x) => (float[2] y) { y = local.f (x) }
    <domain: "local", opset_import: ["" : 18]>
    f (x) => (y) { a = Identity (x) b = Neg (a) y = Identity (b) }"""
    model, _ = check(parse(text), EliminateNoops(), fired=2)
    (function,) = model.functions.values()
    assert [node.op_type for node in function] == ["Neg"]


def test_overridable_zero_is_no_zero() -> None:
    proto = parse("agraph (float[2] x, float[2] c) => (float[2] y) { v = Add (x, c) y = Neg (v) }")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(2, np.float32), "c"))
    check(proto, EliminateNoops(), fired=0)


def test_custom_domain_is_left_alone() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18, "custom" : 1]>
    agraph (float[2] x) => (float[2] y) { a = custom.Identity (x) y = Neg (a) }"""
    check(parse(text), EliminateNoops(), fired=0, seeds=0)


ZERO_BIAS = {
    "conv": ("y = Conv (x, w, b)", (4, 3, 1, 1), 4, 20),
    "conv opset 7": ("y = Conv (x, w, b)", (4, 3, 1, 1), 4, 7),
    "transposed conv": ("y = ConvTranspose (x, w, b)", (3, 4, 1, 1), 4, 20),
    "gemm": ("f = Flatten (x)  y = Gemm <beta = 0.5> (f, w, b)", (75, 4), 4, 20),
}


def _layer(text: str, opset: int, **constants: np.ndarray) -> onnx.ModelProto:
    inputs = ", ".join(f"float[{', '.join(map(str, data.shape))}] {name}" for name, data in constants.items())
    out = "N, 4" if "Gemm" in text else "N, 4, 5, 5"
    return parse(f"g (float[N, 3, 5, 5] x, {inputs}) => (float[{out}] y) {{ {text} }}", opset=opset, **constants)


@pytest.mark.parametrize("case", ZERO_BIAS)
def test_a_bias_of_zeros_is_left_out(case: str) -> None:
    text, shape, channels, opset = ZERO_BIAS[case]
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    proto = _layer(text, opset, w=weight, b=np.zeros(channels, np.float32))
    model, _ = check(proto, EliminateNoops(), fired=1, run=run_ort)
    layer = next(node for node in model.graph if node.op_type in ("Conv", "ConvTranspose", "Gemm"))
    assert [value.name for value in layer.inputs if value is not None] == ["x" if "gemm" not in case else "f", "w"]


@pytest.mark.parametrize("case", ["one is not zero", "overridable", "gemm before opset 11"])
def test_a_bias_that_may_count_stays(case: str) -> None:
    gemm = case.startswith("gemm")
    text, shape, channels, opset = ZERO_BIAS["gemm" if gemm else "conv"]
    bias = np.zeros(channels, np.float32)
    if case == "one is not zero":
        bias[2] = 1e-20
    proto = _layer(text, 9 if gemm else opset, w=np.ones(shape, np.float32), b=bias)
    if case == "overridable":
        proto.graph.input.append(onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, [channels]))
    outcome = EliminateNoops()(ir.from_proto(proto))
    layer = next(node for node in outcome.model.graph if node.op_type in ("Conv", "Gemm"))
    assert len(layer.inputs) == 3
