"""The cost model against numbers computed by hand, and against the counts of known architectures by their formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from pass_support import parse, to_bytes

from passes._cost import model_cost, unknown_values, with_shapes
from passes.base import PassFailed


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def cost(text: str, shapes: dict[str, tuple[int, ...]] | None = None, **weights: np.ndarray):
    return model_cost(ir.from_proto(parse(text, **weights)), shapes)


#: body, inputs, outputs, weights, MACs, operations
BY_HAND = {
    # 8 * 6 * 6 outputs, each 4 * 3 * 3 products; a bias adds one for each output
    "conv": ("y = Conv <pads = [1, 1, 1, 1]> (x, w, b)", "[2, 4, 6, 6]", "[2, 8, 6, 6]", {"w": (8, 4, 3, 3), "b": (8,)},
             2 * 8 * 36 * 36, 2 * 2 * 8 * 36 * 36 + 2 * 8 * 36),
    "strided": ("y = Conv <strides = [2, 2]> (x, w)", "[1, 4, 7, 7]", "[1, 8, 3, 3]", {"w": (8, 4, 3, 3)},
                8 * 9 * 36, 2 * 8 * 9 * 36),
    "grouped": ("y = Conv <group = 4> (x, w)", "[1, 8, 5, 5]", "[1, 8, 3, 3]", {"w": (8, 2, 3, 3)},
                8 * 9 * 18, 2 * 8 * 9 * 18),
    # every element that is read is multiplied with all taps of its group's outputs
    "transposed": ("y = ConvTranspose <group = 2, strides = [2, 2]> (x, w)", "[1, 4, 5, 5]", "[1, 6, 11, 11]",
                   {"w": (4, 3, 3, 3)}, 4 * 25 * 27, 2 * 4 * 25 * 27),
    "gemm": ("y = Gemm (x, w, b)", "[5, 16]", "[5, 32]", {"w": (16, 32), "b": (32,)},
             5 * 16 * 32, 2 * 5 * 16 * 32 + 5 * 32),
    "turned": ("y = Gemm <transA = 1, transB = 1> (x, w)", "[16, 5]", "[5, 32]", {"w": (32, 16)},
               5 * 16 * 32, 2 * 5 * 16 * 32),
    "matmul": ("y = MatMul (x, w)", "[2, 3, 5, 16]", "[2, 3, 5, 7]", {"w": (16, 7)}, 30 * 7 * 16, 2 * 30 * 7 * 16),
    "einsum": ('y = Einsum <equation = "bij,jk->bik"> (x, w)', "[2, 3, 5]", "[2, 3, 7]", {"w": (5, 7)},
               2 * 3 * 5 * 7, 2 * 2 * 3 * 5 * 7),
    "relu": ("y = Relu (x)", "[2, 3]", "[2, 3]", {}, 0, 6),
    "transpose": ("y = Transpose <perm = [1, 0]> (x)", "[2, 3]", "[3, 2]", {}, 0, 0),
    "pool": ("y = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (x)", "[1, 4, 7, 7]", "[1, 4, 3, 3]", {}, 0,
             4 * 9 * 9),
    "global": ("y = GlobalAveragePool (x)", "[1, 4, 7, 7]", "[1, 4, 1, 1]", {}, 0, 4 * 49),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    body, inputs, outputs, weights, macs, operations = BY_HAND[name]
    listed = "".join(f", float[{', '.join(map(str, shape))}] {key}" for key, shape in weights.items())
    text = f"agraph (float{inputs} x{listed}) => (float{outputs} y) {{ {body} }}"
    found = cost(text, **{key: zeros(*shape) for key, shape in weights.items()})
    (node,) = found.nodes
    elements = sum(int(np.prod(shape)) for shape in weights.values())
    assert (found.macs, found.operations, found.parameters) == (macs, operations, elements)
    assert node.weight_bytes == 4 * elements
    sizes = [int(np.prod(eval(shape))) for shape in (inputs, outputs)]
    assert found.peak_bytes == node.moved_bytes == 4 * sum(sizes)
    assert node.intensity == operations / (4 * (sum(sizes) + elements))
    assert found.unknown == ()


def test_recurrent_and_attention() -> None:
    """LSTM: for each step and sample four gates of (input + hidden) * hidden; see the ONNX operator's text."""
    text = (
        "agraph (float[7, 2, 5] x, float[1, 12, 5] w, float[1, 12, 3] r) => (float[7, 1, 2, 3] y) "
        "{ y = LSTM <hidden_size = 3> (x, w, r) }"
    )
    assert cost(text, w=zeros(1, 12, 5), r=zeros(1, 12, 3)).macs == 7 * 2 * 4 * 3 * (5 + 3)
    heads = "agraph (float[2, 4, 9, 8] q, float[2, 4, 6, 8] k, float[2, 4, 6, 5] v) => (float[2, 4, 9, 5] y) "
    found = model_cost(ir.from_proto(parse(heads + "{ y = Attention (q, k, v) }", opset=23, ir_version=11)))
    assert found.macs == 2 * 4 * 9 * 6 * (8 + 5)


def test_peak_memory_is_that_of_the_worst_node() -> None:
    # a [100] is kept for the last Add while b [400] is made and dropped: at c there are x, a, b and c
    text = (
        "agraph (float[1, 100] x) => (float[1, 100] y) "
        "{ a = Relu (x)\n b = Concat <axis = 1> (a, a, a, a)\n c = Relu (b)\n s = Slice (c, z, h, o)\n y = Add (s, a) }"
    )
    constants = {"z": np.array([0]), "h": np.array([100]), "o": np.array([1])}
    text = text.replace("x)", "x, int64[1] z, int64[1] h, int64[1] o)", 1)
    found = cost(text, **constants)
    by_op = [node.live_bytes for node in found.nodes]
    # x is free after its last reader, the first Relu
    assert by_op == [4 * 200, 4 * 500, 4 * 900, 4 * 600, 4 * 300]
    assert (found.peak_bytes, found.peak_node) == (3600, found.nodes[2].node)
    assert found.parameters == 0, "indices are no parameters"


def test_shared_weights_count_once() -> None:
    text = "agraph (float[1, 4] x, float[4, 4] w) => (float[1, 4] y) { h = MatMul (x, w)\n y = MatMul (h, w) }"
    found = cost(text, w=zeros(4, 4))
    assert (found.parameters, found.weight_bytes, found.macs) == (16, 64, 32)
    assert [node.parameters for node in found.nodes] == [16, 0]


def test_symbols_get_sizes_and_the_model_stays_as_it_is() -> None:
    text = "agraph (float[N, S, 16] x, float[16, 8] w) => (float[N, S, 8] y) { h = MatMul (x, w)\n y = Relu (h) }"
    model = ir.from_proto(parse(text, w=zeros(16, 8)))
    before = to_bytes(model)
    assert unknown_values(model)
    assert model_cost(model).unknown == ("MatMul -> h", "Relu -> y")
    assert model_cost(model).peak_bytes is None
    assert model_cost(model, {"x": (2, 5, 16)}).macs == 2 * 5 * 16 * 8
    assert unknown_values(with_shapes(model, {"x": (2, 5, 16)})) == ()
    assert to_bytes(model) == before
    for shapes, said in (({"z": (1,)}, "no value 'z'"), ({"x": (2, 5)}, "cannot be"), ({"x": (2, 5, 4)}, "cannot be")):
        with pytest.raises(PassFailed, match=said):
            model_cost(model, shapes)


def test_a_symbol_of_an_output_alone() -> None:
    text = "agraph (float[N, 3, H, W] x, float[8, 3, 3, 3] w) => (float[N, 8, P, Q] y) { y = Conv (x, w) }"
    found = cost(text, {"x": (1, 3, 10, 12)}, w=zeros(8, 3, 3, 3))
    assert (found.unknown, found.macs) == ((), 8 * 10 * 8 * 27)


def test_subgraphs_and_functions() -> None:
    branches = (
        "agraph (bool c, float[2, 4] x, float[4, 4] w) => (float[2, 4] y) { y = If (c) < "
        "then_branch = small () => (float[2, 4] a) { a = MatMul (x, w) }, "
        "else_branch = large () => (float[2, 4] b) { m = MatMul (x, w)\n b = MatMul (m, w) }> }"
    )
    found = cost(branches, w=zeros(4, 4))
    assert (found.macs, found.parameters) == (2 * 2 * 16, 16), "the dearer branch"
    loop = (
        "agraph (float[2, 4] x, int64 n, bool go, float[4, 4] w) => (float[2, 4] y) { y = Loop (n, go, x) < "
        "body = turn (int64 i, bool c, float[2, 4] s) => (bool k, float[2, 4] t) "
        "{ k = Identity (c)\n t = MatMul (s, w) }> }"
    )
    assert cost(loop, w=zeros(4, 4), n=np.array(6), go=np.array(True)).macs == 6 * 32
    function = (
        '<ir_version: 8, opset_import: ["" : 20, "own" : 1]>\n'
        "agraph (float[2, 4] x, float[4, 4] w) => (float[2, 4] y) { h = own.twice (x, w)\n y = own.twice (h, w) }\n"
        '<domain: "own", opset_import: ["" : 20]> twice (a, b) => (c) { d = MatMul (a, b)\n c = MatMul (d, b) }'
    )
    assert cost(function, w=zeros(4, 4)).macs == 4 * 32


def resnet20_macs() -> int:
    """He et al. 2015, section 4.2, with shortcut A: no products but those of the convolutions and the last layer."""
    total = 32 * 32 * 16 * 3 * 9
    for stage, channels in enumerate((16, 32, 64)):
        size = 32 >> stage
        first = channels if stage == 0 else channels // 2
        total += size * size * channels * 9 * (first + 5 * channels)
    return total + 64 * 10


def test_resnet20_as_its_maker_exported_it(assets: Path) -> None:
    model = ir.load(assets / "models" / "cifar10-resnets" / "cifar_resnet20.onnx")
    found = model_cost(model, {"input": (1, 3, 32, 32)})
    assert found.macs == resnet20_macs() == 40_551_040
    assert found.unknown == ()


def bottleneck(channels: list[int], blocks: list[int]) -> tuple[str, dict[str, np.ndarray], int, int]:
    """ResNet with bottlenecks as ONNX text; MACs and parameters by formula (He et al. 2015, table 1)."""
    lines, weights, macs, params = [], {}, 0, 0

    def conv(source: str, name: str, i: int, o: int, k: int, stride: int, out: int) -> None:
        nonlocal macs, params
        weights[f"{name}_w"], weights[f"{name}_b"] = zeros(o, i, k, k), zeros(o)
        pads = f", pads = [{k // 2}, {k // 2}, {k // 2}, {k // 2}]" if k > 1 else ""
        lines.append(f"{name} = Conv <strides = [{stride}, {stride}]{pads}> ({source}, {name}_w, {name}_b)")
        macs += out * out * o * i * k * k
        params += o * i * k * k + o

    conv("x", "stem", 3, 64, 7, 2, 112)
    lines.append("p = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (stem)")
    source, width, size = "p", 64, 56
    for stage, (c, count) in enumerate(zip(channels, blocks, strict=True)):
        for block in range(count):
            stride = 2 if stage and not block else 1
            name = f"s{stage}b{block}"
            conv(source, f"{name}a", width, c, 1, 1, size)
            size //= stride
            conv(f"{name}a", f"{name}b", c, c, 3, stride, size)
            conv(f"{name}b", f"{name}c", c, 4 * c, 1, 1, size)
            if not block:
                conv(source, f"{name}d", width, 4 * c, 1, stride, size)
            lines.append(f"{name} = Add ({name}c, {source if block else f'{name}d'})")
            source, width = name, 4 * c
    lines.append(f"g = GlobalAveragePool ({source})\n f = Flatten (g)\n y = Gemm (f, fw, fb)")
    weights["fw"], weights["fb"] = zeros(width, 1000), zeros(1000)
    return "\n".join(lines), weights, macs + width * 1000, params + width * 1000 + 1000


def test_resnet50() -> None:
    """4.09 GMACs at 224 x 224, stride in the 3 x 3 convolution as torchvision and transformers have it."""
    body, weights, macs, params = bottleneck([64, 128, 256, 512], [3, 4, 6, 3])
    listed = "".join(f", float[{', '.join(map(str, w.shape))}] {name}" for name, w in weights.items())
    text = f"agraph (float[N, 3, 224, 224] x{listed}) => (float[N, 1000] y) {{ {body} }}"
    found = cost(text, {"x": (1, 3, 224, 224)}, **weights)
    assert found.macs == macs == 4_089_184_256
    assert found.parameters == params
    # the fattest place: a block's input, the output of its last convolution, and their sum, 56 x 56 x 256 each
    assert found.peak_bytes == 3 * 56 * 56 * 256 * 4
    assert model_cost(ir.from_proto(parse(text, **weights)), {"x": (2, 3, 224, 224)}).macs == 2 * macs
