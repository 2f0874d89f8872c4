"""fold_constants: what it computes, what it leaves, and onnx's own test cases as the judge of its arithmetic."""

from __future__ import annotations

import functools
import warnings

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_support import assert_close, check, ops, parse, run_ort, run_reference

from passes._evaluate import FOLDABLE
from passes.eliminate_dead_code import EliminateDeadCode
from passes.fold_constants import FoldConstants

FOLD = (FoldConstants(), EliminateDeadCode())


def folded(text: str, name: str, **keywords) -> np.ndarray:
    """Folds and gives the tensor that ``name`` has become."""
    model, _ = check(parse(text, **keywords), *FOLD)
    value = model.graph.initializers.get(name)
    assert value is not None, f"{name} is not folded: {ops(model)}"
    assert value.const_value is not None
    return value.const_value.numpy()


@functools.cache
def backend_cases() -> dict[str, list]:
    """onnx's node test cases of foldable ops, by op type."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: dict[str, list] = {op: [] for op in sorted(FOLDABLE)}
        for case in collect_testcases():
            nodes = case.model.graph.node
            if len(nodes) == 1 and nodes[0].op_type in found and nodes[0].domain == "":
                found[nodes[0].op_type].append(case)
    return found


def as_array(data: object) -> np.ndarray | None:
    if isinstance(data, onnx.TensorProto):
        return onnx.numpy_helper.to_array(data)
    return np.asarray(data) if isinstance(data, np.ndarray | np.generic) else None


@pytest.mark.parametrize("op", sorted(FOLDABLE))
def test_onnx_own_cases_folded(op: str) -> None:
    """Each case with its inputs as initializers folds to exactly the outputs that onnx ships, or says why not."""
    cases = backend_cases()[op]
    assert cases, f"onnx has no test case of {op}: nothing proves that folding it is right"
    count = 0
    for case in cases:
        inputs, outputs = ([as_array(each) for each in side] for side in case.data_sets[0])
        if any(each is None for each in (*inputs, *outputs)):
            continue  # sequences
        proto = onnx.ModelProto()
        proto.CopyFrom(case.model)
        names = [value.name for value in proto.graph.input]
        del proto.graph.input[:]
        proto.graph.initializer.extend(
            onnx.numpy_helper.from_array(data, name) for name, data in zip(names, inputs, strict=True)
        )
        model = ir.from_proto(proto)
        outcome = FoldConstants()(model)
        if any(op_type != "Constant" for op_type in ops(model)):
            assert outcome.declined or not outcome.fired, case.name
            continue
        count += 1
        for value, expected in zip(model.graph.outputs, outputs, strict=True):
            node = value.producer()
            assert node is not None
            got = node.attributes["value"].as_tensor().numpy()
            assert got.dtype == expected.dtype, case.name
            assert got.shape == expected.shape, case.name
            exact = expected.dtype.kind not in "fV"
            tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": case.rtol, "atol": 1e-7}
            np.testing.assert_allclose(
                got.astype(np.float64), expected.astype(np.float64), err_msg=case.name, **tolerance
            )
    assert count, f"none of {len(cases)} cases of {op} was folded"


SHAPES = [
    ("start of a slice", "v = Shape <start = 1, end = 3> (x)", [3, 8]),
    ("negative end", "v = Shape <start = -2> (x)", [8, 9]),
    ("gather", "s = Shape (x)  v = Gather <axis = 0> (s, two)", 8),
    ("slice backwards", "s = Shape (x)  v = Slice (s, last, zero1, zero1, minus)", [9, 8, 3]),
    ("slice to the end", "s = Shape (x)  v = Slice (s, one, huge, zero1)", [3, 8, 9]),
    ("arithmetic", "s = Shape <start = 1, end = 2> (x)  p = Mul (s, last)  v = Sub (p, one)", [8]),
    ("squeeze", "s = Shape <start = 3> (x)  v = Squeeze (s, zero1)", 9),
    ("concat skips the batch", "s = Shape <start = 2> (x)  c = Concat <axis = 0> (s, one)  v = Abs (c)", [8, 9, 1]),
    ("by way of int32", "s = Shape (x)  c = Cast <to = 6> (s)  g = Gather (c, two)  v = Cast <to = 7> (g)", 8),
    ("size of a part", "w = Constant <value = float[2, 3] {1, 2, 3, 4, 5, 6}> ()  v = Size (w)", 6),
]


@pytest.mark.parametrize(("body", "expected"), [row[1:] for row in SHAPES], ids=[row[0] for row in SHAPES])
def test_known_dimensions_of_a_dynamic_tensor(body: str, expected: object) -> None:
    text = f"""agraph (float[N, 3, 8, 9] x, int64 two, int64[1] one, int64[1] last, int64[1] huge,
                       int64[1] minus, int64[1] zero1, int64[1] free) => (int64[M] y) {{
        {body}
        flat = Reshape (v, minus)
        y = Mul (flat, free)
    }}"""
    constants = {
        "two": np.array(2),
        "one": np.array([1]),
        "last": np.array([3]),
        "huge": np.array([2**63 - 1]),
        "minus": np.array([-1]),
        "zero1": np.array([0]),
    }
    constants["zero1"] = np.array([0])
    model, _ = check(parse(text, **constants), *FOLD)
    assert ops(model) == ["Mul"]
    left = model.graph.node(0).inputs[0]
    assert left is not None
    np.testing.assert_array_equal(left.const_value.numpy(), np.array(expected).reshape(-1))


@pytest.mark.parametrize(
    ("shape", "parts", "allow_zero", "target"),
    [
        ("N, 12, 4", "n, six, eight", 0, [0, 6, 8]),
        ("N, 12, 4", "n, six, eight", 1, [0, 6, 8]),
        ("12, N, 4", "n, six, eight", 0, [-1, 6, 8]),
        ("N, S, 48", "n, s, minus, eight", 0, [0, 0, -1, 8]),
        ("N, S, 48", "s, n, minus", 0, None),
        ("N, S, 16", "s, six, eight", 0, [-1, 6, 8]),
    ],
)
def test_reshape_target(shape: str, parts: str, allow_zero: int, target: list[int] | None) -> None:
    text = f"""agraph (float[{shape}] x, float[N, S] other, int64[1] six, int64[1] eight, int64[1] minus)
        => (float[{", ".join("abcd"[: parts.count(",") + 1])}] y) {{
        n = Shape <start = 0, end = 1> (other)
        s = Shape <start = 1, end = 2> (other)
        t = Concat <axis = 0> ({parts})
        y = Reshape <allowzero = {allow_zero}> (x, t)
    }}"""
    constants = {"six": np.array([6]), "eight": np.array([8]), "minus": np.array([-1])}
    # The last row only reshapes when S is N times what is left; equal sizes make every row valid.
    model, _ = check(parse(text, **constants), *FOLD, sizes={"N": 3, "S": 3})
    value = model.graph.node(-1).inputs[1]
    assert value is not None
    if target is None:
        assert value.producer() is not None
    else:
        assert value.const_value.numpy().tolist() == target


def test_names_of_dimensions_survive_a_reshape() -> None:
    """-1 forgets which dimension it is; later passes need to know that it is the batch."""
    text = """agraph (float[N, 4, 6] x, int64[1] minus, int64[1] four, int64[1] six) => (float[A, B, C] y) {
        n = Shape <start = 0, end = 1> (x)
        t = Concat <axis = 0> (minus, six)
        flat = Reshape (x, t)
        back = Concat <axis = 0> (n, four, six)
        r = Reshape (flat, back)
        y = Relu (r)
    }"""
    proto = parse(text, minus=np.array([-1]), four=np.array([4]), six=np.array([6]))
    model, _ = check(proto, *FOLD)
    assert str(model.graph.node(-1).inputs[0].shape) == "[N,4,6]"


def test_cast_like_becomes_cast() -> None:
    text = """agraph (float16[N] x, float c, float[N] f) => (float16[N] y, float16[N] z) {
        a = CastLike (c, x)
        y = Mul (x, a)
        z = CastLike (f, x)
    }"""
    model, _ = check(parse(text, c=np.array(0.1, np.float32)), *FOLD)
    assert ops(model) == ["Mul", "Cast"]
    assert model.graph.initializers["a"].const_value.numpy() == np.float16(0.1)


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 18, 24])
def test_old_and_new_opsets(opset: int) -> None:
    if opset < 13:
        body = "a = Unsqueeze <axes = [0]> (c)  s = ReduceSum <axes = [1], keepdims = 0> (a)"
        extra = ""
    else:
        body = "a = Unsqueeze (c, zero)  s = ReduceSum <keepdims = 0> (a, one)"
        extra = ", int64[1] zero, int64[1] one"
    text = f"agraph (float[2] x, float[2, 2] c{extra}) => (float[1, 2] y) {{ {body} y = Add (x, s) }}"
    constants = {"c": np.array([[1, 2], [3, 4]], np.float32)}
    if extra:
        constants |= {"zero": np.array([0]), "one": np.array([1])}
    model, _ = check(parse(text, opset=opset, **constants), *FOLD)
    assert model.graph.initializers["s"].const_value.numpy().tolist() == [[4, 6]]


def test_integer_division_truncates() -> None:
    text = "agraph (int64[2] x, int64[2] a, int64[2] b) => (int64[2] y) { q = Div (a, b) y = Add (x, q) }"
    quotient = folded(text, "q", a=np.array([-7, 7]), b=np.array([2, -2]))
    assert quotient.tolist() == [-3, -3]


def test_bfloat16() -> None:
    text = "agraph (bfloat16[2] x, bfloat16[2] a) => (bfloat16[2] y) { s = Add (a, a) y = Add (x, s) }"
    data = np.array([1.5, 0.1], ml_dtypes.bfloat16)
    total = folded(text, "s", a=data)
    assert total.dtype == ml_dtypes.bfloat16
    assert (total == data + data).all()


def test_output_stays_the_output_of_a_node() -> None:
    text = "agraph (float[2] x, float[2] a) => (float[2] y, float[2] s) { s = Neg (a) y = Add (x, s) }"
    model, _ = check(parse(text, a=np.array([1, 2], np.float32)), *FOLD)
    assert ops(model) == ["Constant", "Add"]
    assert model.graph.outputs[1].name == "s"


def test_several_outputs() -> None:
    text = """agraph (float[2] x, float[4] a) => (float[2] y) {
        l, r = Split <num_outputs = 2> (a)
        d = Sub (l, r)
        y = Add (x, d)
    }"""
    assert folded(text, "d", a=np.array([1, 2, 10, 20], np.float32)).tolist() == [-9, -18]


def test_inside_subgraphs_with_captured_constants() -> None:
    text = """agraph (float[2] x, bool cond, float[2] a) => (float[2] y) {
        n = Neg (a)
        y = If (cond) <
            then_branch = t () => (float[2] p) { m = Abs (n)  p = Add (x, m) },
            else_branch = e () => (float[2] q) { q = Neg (n) }>
    }"""
    model, _ = check(parse(text, a=np.array([1, -2], np.float32)), *FOLD, seeds=4)
    branches = {g.name: [n.op_type for n in g] for g in model.graph.subgraphs()}
    assert branches == {"t": ["Add"], "e": ["Constant"]}


def test_inside_functions() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18, "local" : 1]>
    agraph (float[2] x) => (float[2] y) { y = local.f (x) }
    <domain: "local", opset_import: ["" : 18]>
    f (x) => (y) {
        a = Constant <value = float[2] {1.0, -2.0}> ()
        b = Neg (a)
        y = Add (x, b)
    }"""
    model, _ = check(parse(text), *FOLD)
    (function,) = model.functions.values()
    assert [node.op_type for node in function] == ["Constant", "Add"]


MUST_NOT_FOLD = {
    "random": "r = RandomNormal <shape = [2], seed = 1.0> ()",
    "dequantize": "i = Cast <to = 3> (a)  z = Cast <to = 3> (zero)  r = DequantizeLinear (i, one, z)",
    "depends on an input": "r = Add (x, a)",
    "nonzero of an input": "z = NonZero (x)  c = Cast <to = 1> (z)  r = ReduceMax <keepdims = 0> (c)",
}


@pytest.mark.parametrize(("op", "body"), MUST_NOT_FOLD.items(), ids=MUST_NOT_FOLD.keys())
def test_leaves(op: str, body: str) -> None:
    text = f"""agraph (float[2] x, float[2] a, float one, float zero) => (float[2] y) {{
        {body}
        y = Add (x, r)
    }}"""
    constants = {"a": np.array([1, 2], np.float32), "one": np.array(1, np.float32), "zero": np.array(0, np.float32)}
    model = ir.from_proto(parse(text, **constants))
    FoldConstants()(model)
    assert "r" not in model.graph.initializers


def test_overridable_initializer_is_no_constant() -> None:
    proto = parse("agraph (float[2] x, float[2] a) => (float[2] y) { n = Neg (a) y = Add (x, n) }")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 2], np.float32), "a"))
    model, _ = check(proto, FoldConstants(), fired=0)
    assert ops(model) == ["Neg", "Add"]


def test_custom_domain_is_left_alone() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18, "custom" : 1]>
    agraph (float[2] x) => (float[2] y) {
        a = Constant <value = float[2] {1.0, 2.0}> ()
        n = custom.Neg (a)
        y = Add (x, n)
    }"""
    model = ir.from_proto(parse(text))
    FoldConstants()(model)
    assert ops(model) == ["Neg", "Add"]


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("r = Expand (one, shape)", {"shape": np.array([4096, 64])}),
        ("r = ConstantOfShape (shape)", {"shape": np.array([4096, 64])}),
        ("r = Tile (one, shape)", {"shape": np.array([4096, 64])}),
        ("h = Cast <to = 10> (big)  k = Neg (big)  l = Add (k, big)  r = Cast <to = 1> (h)", {}),
    ],
)
def test_weights_do_not_grow(body: str, constants: dict[str, np.ndarray]) -> None:
    """A megabyte may not come out of a few bytes, nor a second copy out of a weight that others read too."""
    text = f"""agraph (float[4096, 64] x, float[4096, 64] big, float[1, 1] one, int64[2] shape)
        => (float[4096, 64] y, float[4096, 64] z) {{
        {body}
        y = Add (x, r)
        z = Sub (x, big)
    }}"""
    given = {"big": np.ones((4096, 64), np.float32), "one": np.ones((1, 1), np.float32)} | constants
    given.setdefault("shape", np.array([1, 1]))
    model, _ = check(parse(text, **given), *FOLD, seeds=1)
    total = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    assert total <= sum(data.nbytes for data in given.values()) + (1 << 18)


def test_large_weight_of_one_user_is_transposed() -> None:
    text = """agraph (float[N, 512] x, float[256, 512] w) => (float[N, 256] y) {
        t = Transpose (w)
        y = MatMul (x, t)
    }"""
    weight = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
    np.testing.assert_array_equal(folded(text, "t", w=weight), weight.T)


def test_out_of_range_cast_is_left_to_the_runtime() -> None:
    text = "agraph (int32[1] x, float[1] a) => (int32[1] y) { i = Cast <to = 6> (a) y = Add (x, i) }"
    model = ir.from_proto(parse(text, a=np.array([3e10], np.float32)))
    outcome = FoldConstants()(model)
    assert ops(model) == ["Cast", "Add"]
    assert "out of range" in outcome.declined[0].reason


def test_agrees_with_onnx_runtime() -> None:
    text = """agraph (float[N, 3, 4] x, float[3, 4] a, float[4] b) => (float[N, 3, 4] y) {
        s = Softmax (a)
        e = Erf (s)
        p = Pow (e, b)
        l = ReduceMean <keepdims = 1> (p)
        m = Max (p, l)
        y = Mul (x, m)
    }"""
    rng = np.random.default_rng(0)
    constants = {"a": rng.standard_normal((3, 4)).astype(np.float32), "b": np.array([0, 1, 2, 0.5], np.float32)}
    proto = parse(text, opset=17, **constants)
    model, _ = check(proto, *FOLD, run=run_ort, nmse=1e-12)
    assert ops(model) == ["Mul"]
    assert_close([constants["b"]], [constants["b"]], 0)


def test_minus_one_is_no_dimension() -> None:
    """Paddle writes -1 for a dimension that it does not know: neither a size nor one that equals another -1."""
    text = """agraph (float[2, 3] x, float[2, 3] z, int64[1] one) => (float[A, B] y, int64[2] s) {
        t = Shape (x)
        u = Concat <axis = 0> (one, t)
        r = Reshape (x, u)
        f = Flatten <axis = 2> (r)
        y = Add (f, z)
        s = Identity (t)
    }"""
    proto = parse(text, one=np.array([1]))
    for value in proto.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = -1
    model = ir.from_proto(proto)
    for each in FOLD:
        each(model)
    after = ir.to_proto(model)
    x, z = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((2, 3), np.float32)
    assert_close(run_reference(proto, {"x": x, "z": z}), run_reference(after, {"x": x, "z": z}), 0)
    assert "Shape" in ops(model)
