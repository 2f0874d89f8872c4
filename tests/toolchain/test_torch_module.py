"""A graph as a torch module: equal to ONNX Runtime, masked where it is pruned, and back into the graph by name."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import passes
from passes.prune_channels import PruneChannels
from passes.prune_weights import Masks, PruneWeights
from toolchain.errors import GraphError
from toolchain.evaluate import run_reference
from toolchain.metrics import tensor_error

torch = pytest.importorskip("torch")

from toolchain.torch_module import GraphModule, to_torch, write_back  # noqa: E402 - only where torch is


def graph(text: str, *, seed: int = 0, opset: int = 20, **sizes: tuple[int, ...]) -> ir.Model:
    """A graph from ONNX text; inputs after the first are initializers drawn from a seed."""
    model = ir.from_onnx_text(f'<ir_version: 9, opset_import: ["" : {opset}]> {text}')
    rng = np.random.default_rng(seed)
    for value in list(model.graph.inputs)[1:]:
        data = rng.uniform(0.2, 1.0, [int(n) for n in value.shape]) * rng.choice([-1, 1], tuple(value.shape))
        value.const_value = ir.Tensor(data.astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def worst(model: ir.Model, feeds: dict[str, np.ndarray], module: GraphModule | None = None) -> float:
    module = to_torch(model) if module is None else module
    expected = run_reference(model, [feeds])[0]
    with torch.no_grad():
        found = module.values({name: torch.from_numpy(a) for name, a in feeds.items()}, list(expected))
    for name in expected:
        assert found[name].shape == expected[name].shape
        assert found[name].numpy().dtype == expected[name].dtype
    return max(tensor_error(expected[name], found[name].numpy()).nmse for name in expected)


IMAGE = "float[2, 8, 9, 7]"
OPERATORS = {
    "conv strided, grouped, dilated, unequal pads": (
        f"g ({IMAGE} x, float[6, 4, 3, 2] w, float[6] b) => (float[a, b, c, d] y) "
        "{ y = Conv <group = 2, strides = [2, 1], dilations = [1, 2], pads = [1, 0, 2, 1]> (x, w, b) }"
    ),
    "conv same upper": (
        f"g ({IMAGE} x, float[6, 8, 4, 3] w) => (float[a, b, c, d] y) "
        '{ y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w) }'
    ),
    "conv same lower": (
        f"g ({IMAGE} x, float[6, 8, 4, 2] w) => (float[a, b, c, d] y) "
        '{ y = Conv <auto_pad = "SAME_LOWER", strides = [2, 2]> (x, w) }'
    ),
    "conv in one dimension": (
        "g (float[2, 3, 11] x, float[4, 3, 3] w) => (float[a, b, c] y) { y = Conv <pads = [1, 1]> (x, w) }"
    ),
    "transposed conv, unequal pads": (
        f"g ({IMAGE} x, float[8, 3, 3, 3] w, float[6] b) => (float[a, b, c, d] y) "
        "{ y = ConvTranspose <group = 2, strides = [2, 2], pads = [1, 0, 0, 1], output_padding = [1, 0]> (x, w, b) }"
    ),
    "gemm": (
        "g (float[5, 8] x, float[6, 8] w, float[6] b) => (float[a, b] y) "
        "{ y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b) }"
    ),
    "batch normalisation": (
        f"g ({IMAGE} x, float[8] s, float[8] b, float[8] m) => (float[a, b, c, d] y) "
        "{ v = Abs (m) y = BatchNormalization <epsilon = 0.01> (x, s, b, m, v) }"
    ),
    "layer normalisation over two axes": (
        f"g ({IMAGE} x, float[9, 7] s, float[9, 7] b) => (float[a, b, c, d] y) "
        "{ y = LayerNormalization <axis = 2> (x, s, b) }"
    ),
    "instance and group normalisation": (
        f"g ({IMAGE} x, float[8] s, float[8] b, float[2] t, float[2] c) => (float[a, b, c, d] y) "
        "{ i = InstanceNormalization (x, s, b) y = GroupNormalization <num_groups = 2> (i, t, c) }"
    ),
    "max pooling beyond half": (
        f"g ({IMAGE} x) => (float[a, b, c, d] y) "
        "{ y = MaxPool <kernel_shape = [3, 2], pads = [0, 1, 1, 1], strides = [2, 2], ceil_mode = 1> (x) }"
    ),
    "average pooling, padding not counted": (
        f"g ({IMAGE} x) => (float[a, b, c, d] y) "
        "{ y = AveragePool <kernel_shape = [3, 3], pads = [0, 1, 1, 1], strides = [2, 2]> (x) }"
    ),
    "average pooling, padding counted": (
        f"g ({IMAGE} x) => (float[a, b, c, d] y) "
        "{ y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (x) }"
    ),
    "activations": (
        f"g ({IMAGE} x, float[8, 1, 1] p) => (float[a, b, c, d] y) "
        "{ a = PRelu (x, p) b = HardSwish (a) c = Elu <alpha = 0.7> (b) d = LeakyRelu <alpha = 0.2> (c) "
        'e = Gelu <approximate = "tanh"> (d) f = HardSigmoid (e) g = Softplus (f) h = Mish (g) i = Selu (h) '
        "j = Erf (i) y = Tanh (j) }"
    ),
    "softmax of the newest kind": "g (float[2, 3, 4] x) => (float[a, b, c] y) { y = Softmax <axis = 1> (x) }",
    "slice backwards, and with a negative end": (
        f"g ({IMAGE} x) => (float[a, b, c, d] y, float[e, f, g, h] z) "
        "{ s = Constant <value_ints = [-1, 1]> () e = Constant <value_ints = [-100, -1]> () "
        "a = Constant <value_ints = [1, 2]> () t = Constant <value_ints = [-2, 3]> () y = Slice (x, s, e, a, t) "
        "n = Constant <value_ints = [-3]> () m = Constant <value_ints = [-1]> () z = Slice (x, n, m, m) }"
    ),
    "gather with negative indices": (
        "g (float[4, 3, 2] x) => (float[a, b, c, d] y) "
        "{ i = Constant <value = int64[2, 2] {0, -1, 1, -3}> () y = Gather <axis = 1> (x, i) }"
    ),
    "pad in three modes": (
        f"g ({IMAGE} x) => (float[a, b, c, d] y) "
        "{ p = Constant <value_ints = [0, 0, 1, 2, 0, 0, 2, 1]> () "
        "q = Constant <value_ints = [1, 0, 0, 0, 0, 2, 0, 0]> () "
        'v = Constant <value_float = 0.5> () a = Pad <mode = "reflect"> (x, p) b = Pad <mode = "edge"> (a, p) '
        "y = Pad (b, q, v) }"
    ),
    "resize nearest and linear": (
        f"g ({IMAGE} x) => (float[a, b, c, d] y) "
        "{ s = Constant <value_floats = [1.0, 1.0, 2.0, 3.0]> () n = Constant <value_ints = [2, 8, 11, 20]> () "
        'a = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (x, , s) '
        'y = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel"> (a, , , n) }'
    ),
    "shapes that are computed": (
        f"g ({IMAGE} x, float[4, 5] w) => (float[a, b] y) "
        "{ s = Shape <start = 0, end = 1> (x) m = Constant <value_ints = [-1]> () c = Concat <axis = 0> (s, m) "
        "f = Reshape (x, c) z = Constant <value_ints = [0]> () k = Constant <value_ints = [4]> () "
        "o = Constant <value_ints = [1]> () g = Slice (f, z, k, o) y = MatMul (g, w) }"
    ),
    "reductions": (
        f"g ({IMAGE} x) => (float[a, b] y, float z) "
        "{ a = Constant <value_ints = [-1, 1]> () m = ReduceMean <keepdims = 0> (x, a) "
        "n = ReduceL2 <keepdims = 0> (x, a) "
        "p = ReduceMax <keepdims = 0> (x, a) q = ReduceProd <keepdims = 0> (x, a) y = Sum (m, n, p, q) "
        "z = ReduceSum <keepdims = 0> (x) }"
    ),
    "split, depth to space, tile, where": (
        f"g ({IMAGE} x) => (float[a, b, c, d] y) "
        "{ l, r = Split <axis = 1, num_outputs = 2> (x) c = Greater (l, r) w = Where (c, l, r) "
        "d = DepthToSpace <blocksize = 2> (w) t = Constant <value_ints = [1, 2, 1, 3]> () y = Tile (d, t) }"
    ),
    "elements by number": (
        "g (float[2, 3, 4] x) => (float[a, b] y, float[c, d, e] z, float[f, g, h] u) "
        "{ i = Constant <value = int64[2, 2] {1, -1, 0, 2}> () y = GatherND (x, i) "
        "j = Constant <value = int64[2, 2, 1] {2, -3, 1, 1}> () z = GatherND <batch_dims = 1> (x, j) "
        "k = Constant <value = int64[1, 2, 4] {0, -1, 1, 2, 2, 2, -3, 0}> () u = GatherElements <axis = 1> (x, k) }"
    ),
    "sums along an axis": (
        "g (float[2, 3, 4] x) => (float[a, b, c] y) "
        "{ one = Constant <value_int = 1> () p = CumSum (x, one) q = CumSum <exclusive = 1> (x, one) "
        "r = CumSum <reverse = 1> (x, one) s = CumSum <reverse = 1, exclusive = 1> (x, one) "
        "t = Mul (q, s) v = Add (p, r) y = Add (t, v) }"
    ),
    "einsum, remainder, no number": (
        "g (float[2, 3, 4] x) => (float[a, b, c] y) "
        '{ e = Einsum <equation = "bij,bkj->bik"> (x, x) n = Constant <value_float = 0.7> () '
        "m = Mod <fmod = 1> (e, n) k = Log (m) i = IsNaN (k) y = Where (i, n, m) }"
    ),
}


@pytest.mark.parametrize("text", OPERATORS.values(), ids=OPERATORS)
def test_operators_are_those_of_onnx_runtime(text: str) -> None:
    model = graph(text)
    shape = [int(n) for n in model.graph.inputs[0].shape]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    assert worst(model, {"x": x}) < 1e-11


def test_a_sum_that_leaves_infinity_out_is_a_number() -> None:
    model = graph(
        "g (float[4] x) => (float[a] y, float[b] z) { zero = Constant <value_int = 0> () "
        "y = CumSum <exclusive = 1> (x, zero) z = CumSum <exclusive = 1, reverse = 1> (x, zero) }"
    )
    module = to_torch(model)
    y, z = module(torch.tensor([1.0, 2.0, math.inf, 3.0]))
    assert y.tolist() == [0, 1, 3, math.inf]
    assert z.tolist() == [math.inf, math.inf, 3, 0]
    assert [each.tolist() for each in module(torch.zeros(0))] == [[], []]


def test_old_opsets_say_axes_and_limits_otherwise() -> None:
    model = graph(
        "g (float[2, 3, 4] x) => (float[a, b, c, d] y) { a = Clip <min = -0.5, max = 0.5> (x) b = Softmax (a) "
        "c = ReduceMean <axes = [1]> (b) y = Unsqueeze <axes = [0]> (c) }",
        opset=10,
    )
    x = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
    assert worst(model, {"x": x}) < 1e-12


@pytest.mark.parametrize("cut", [None, 0.3])
def test_cifar_resnet_is_the_same_whole_and_pruned(assets: Path, cut: float | None) -> None:
    model = ir.load(assets / "models" / "cifar10-resnets" / "cifar_resnet20.onnx")
    for name in passes.DEFAULT_PIPELINE:
        passes.make(name)(model)
    if cut is not None:
        assert PruneChannels(ratio=cut)(model).modified
    x = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    assert worst(model, {"input": x}) < 1e-11


SMALL = (
    "g (float[n, 3, 6, 6] x, float[4, 3, 3, 3] conv.w, float[4] conv.b, float[4, 4, 1, 1] v, float[5, 4] head) "
    "=> (float[n, 5] y) { c = Conv <pads = [1, 1, 1, 1]> (x, conv.w, conv.b) r = Relu (c) d = Conv (r, v) "
    "p = GlobalAveragePool (d) f = Flatten (p) y = Gemm <transB = 1> (f, head) }"
)


def small() -> ir.Model:
    model = ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["" : 20]> ' + SMALL.replace("conv.w", "conv_w").replace("conv.b", "conv_b")
    )
    rng = np.random.default_rng(3)
    for value in list(model.graph.inputs)[1:]:
        value.const_value = ir.Tensor(rng.standard_normal([int(n) for n in value.shape]).astype(np.float32))
        value.name = value.const_value.name = str(value.name).replace("conv_", "conv.")
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def train(module: GraphModule, steps: int = 5, rate: float = 0.05) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.1)
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        (module(x) - 1).square().mean().backward()
        optimizer.step()


def test_trained_weights_come_back_by_name_and_the_graph_stays() -> None:
    model = small()
    before = ir.to_proto(model)
    module = to_torch(model).train()
    assert {"conv/w", "conv/b", "v", "head"} == {name for name, _ in module.named_parameters()}
    train(module)
    assert write_back(module, model) == 4
    after = ir.to_proto(model)
    assert list(after.graph.node) == list(before.graph.node)
    assert [t.name for t in after.graph.initializer] == [t.name for t in before.graph.initializer]
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)
    assert worst(model, {"x": x}, module.eval()) < 1e-12
    assert write_back(module, model) == 0
    held = model.graph.initializers["head"].const_value.numpy().copy()
    train(module)
    assert np.array_equal(held, model.graph.initializers["head"].const_value.numpy())  # it shares no memory


def test_zeros_of_weights_stay_zero_and_those_of_biases_do_not() -> None:
    model = small()
    model.graph.initializers["conv.b"].const_value = ir.Tensor(np.zeros(4, np.float32), name="conv.b")
    PruneWeights(sparsity=0.5, method="l1")(model)
    zeros = {name: v.const_value.numpy() == 0 for name, v in model.graph.initializers.items()}
    module = to_torch(model).train()
    assert module.masked == sum(int(z.sum()) for name, z in zeros.items() if name != "conv.b") > 0
    train(module)
    write_back(module, model)
    for name, was in zeros.items():
        now = model.graph.initializers[name].const_value.numpy() == 0
        assert not now.any() if name == "conv.b" else np.array_equal(now, was)


def test_given_masks_hold_in_place_of_zeros() -> None:
    model = small()
    keep = np.ones((5, 4), bool)
    keep[0] = False
    module = to_torch(model, masks=Masks({"head": keep})).train()
    train(module)
    write_back(module, model)
    head = model.graph.initializers["head"].const_value.numpy()
    assert not head[0].any()
    assert head[1:].all()
    with pytest.raises(GraphError, match="no weight of the graph"):
        to_torch(model, masks=Masks({"hed": keep}))
    with pytest.raises(GraphError, match=r"of shape \[5, 4\]"):
        to_torch(model, masks=Masks({"head": keep.T}))


def test_running_statistics_are_trained_and_come_back() -> None:
    text = (
        "g (float[16, 4, 3, 3] x, float[4] s, float[4] b, float[4] m, float[4] v) => (float[16, 4, 3, 3] y) "
        "{ y = BatchNormalization <momentum = 0.8> (x, s, b, m, v) }"
    )
    model = graph(text)
    model.graph.initializers["v"].const_value = ir.Tensor(np.ones(4, np.float32), name="v")
    mean = model.graph.initializers["m"].const_value.numpy().copy()
    x = torch.randn(16, 4, 3, 3, generator=torch.Generator().manual_seed(0)) + 5
    module = to_torch(model).train()
    module(x)
    write_back(module, model)
    expected = 0.8 * mean + 0.2 * x.mean((0, 2, 3)).numpy()
    np.testing.assert_allclose(model.graph.initializers["m"].const_value.numpy(), expected, rtol=1e-5)


def test_any_value_can_be_looked_at() -> None:
    module = to_torch(small())
    x = torch.zeros(1, 3, 6, 6)
    assert module.values({"x": x}, ["r", "y", "x"])["r"].shape == (1, 4, 6, 6)
    with pytest.raises(GraphError, match="no value 'nothing'"):
        module.values({"x": x}, ["nothing"])
    with pytest.raises(GraphError, match="missing"):
        module()
    with pytest.raises(GraphError, match=r"torch cannot compute this node.*\n.*1, 2, 6, 6"):
        module(torch.zeros(1, 2, 6, 6))


def test_what_cannot_be_trained_is_named() -> None:
    model = graph("g (float[2, 3] x) => (float[a, b] y) { c = Hardmax (x) d = Hardmax (c) y = com.acme.Thing (d) }")
    with pytest.raises(GraphError, match=r"Hardmax \(2, first .*com.acme.Thing \(1"):
        to_torch(model)
    half = graph("g (float16[2, 3] x, float16[3, 3] w) => (float16[a, b] y) { y = MatMul (x, w) }")
    value = half.graph.initializers["w"]
    value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float16), name="w")
    with pytest.raises(GraphError, match="float16"):
        to_torch(half)


def test_weights_that_are_not_finite_leave_the_graph_alone() -> None:
    model = small()
    held = {name: v.const_value.numpy().copy() for name, v in model.graph.initializers.items()}
    module = to_torch(model)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
        module.get_parameter("head")[0, 0] = float("nan")
    with pytest.raises(GraphError, match="'head' is not finite"):
        write_back(module, model)
    assert all(np.array_equal(v.const_value.numpy(), held[n]) for n, v in model.graph.initializers.items())
    other = graph("g (float[2, 3] x, float[3, 3] w) => (float[a, b] y) { y = MatMul (x, w) }")
    with pytest.raises(GraphError, match="is not in the graph"):
        write_back(to_torch(small()), other)
