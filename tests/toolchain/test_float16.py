"""The keep-list: what overflows, what vanishes, and what is only seen in the result."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from passes.convert_float16 import ConvertFloat16
from toolchain.errors import DataError
from toolchain.evaluate import Feeds, run_reference
from toolchain.float16 import find_keep_list
from toolchain.metrics import tensor_error

GRAPH = """<ir_version: 8, opset_import: ["" : 20]>
agraph (float[N, 8] x, float[8, 8] w, float large, float small, float lowest, bool[N, 8] m) => (float[N, 8] y) {
    [first] a = MatMul (x, w)
    [overflows] b = Mul (a, large)
    [comes_back] c = Mul (b, small)
    [masks] d = Where (m, c, lowest)
    [last] y = Relu (d)
}"""


def model(*, large: float = 1.0, weight: float = 1.0) -> ir.Model:
    proto = onnx.parser.parse_model(GRAPH)
    rng = np.random.default_rng(0)
    constants = {
        "w": (rng.standard_normal((8, 8)) * weight).astype(np.float32),
        "large": np.array(large, np.float32),
        "small": np.array(1 / large, np.float32),
        "lowest": np.array(np.finfo(np.float32).min),
    }
    kept = [value for value in proto.graph.input if value.name not in constants]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in constants.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def samples(scale: float = 1.0, count: int = 2) -> list[Feeds]:
    rng = np.random.default_rng(1)
    return [
        {"x": (rng.standard_normal((4, 8)) * scale).astype(np.float32), "m": rng.random((4, 8)) < 0.8}
        for _ in range(count)
    ]


def error(graph: ir.Model, keep: tuple[str, ...], feeds: list[Feeds]) -> float:
    copy = graph.clone()
    ConvertFloat16(keep=keep)(copy)
    pairs = zip(run_reference(graph, feeds), run_reference(copy, feeds), strict=True)
    return max(tensor_error(a["y"], b["y"]).nmse for a, b in pairs)


def test_a_graph_that_fits_keeps_nothing() -> None:
    found = find_keep_list(model(), samples())
    assert found.names == ()
    assert found.met
    assert found.nmse == pytest.approx(error(model(), (), samples(count=1)))


def test_overflow_is_found_where_it_happens() -> None:
    graph, feeds = model(large=60000.0), samples()
    found = find_keep_list(graph, feeds)
    assert found.names == ("overflows", "comes_back")
    assert "'b' reaches" in found.kept[0].reason
    assert found.met
    assert error(graph, found.names, feeds) < 1e-5
    assert find_keep_list(graph, feeds, dtype="bfloat16").names == ()


def test_overflow_in_a_later_sample() -> None:
    quiet, loud = samples(), samples(scale=1e5)
    assert find_keep_list(model(), quiet).names == ()
    assert "first" in find_keep_list(model(), [*quiet, *loud]).names


def test_what_vanishes() -> None:
    found = find_keep_list(model(), samples(scale=1e-7))
    assert "first" in found.names
    assert "loses" in found.kept[0].reason


def test_masks_are_no_overflow() -> None:
    assert "masks" not in find_keep_list(model(large=60000.0), samples()).names


CHAIN = """<ir_version: 8, opset_import: ["" : 20]>
agraph (float[N, 8] x) => (float[N, 8] y) {
    c = Constant <value_float = 1.1> ()
    [one] a = Mul (x, c)  [two] b = Mul (a, c)  [three] d = Mul (b, c)  [four] e = Mul (d, c)
    [five] f = Mul (e, c)  [six] g = Mul (f, c)  [seven] y = Mul (g, c)
}"""


def test_a_bound_that_cannot_be_met_is_said() -> None:
    """Each look finds the first node that rounds; there are more of them than looks."""
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(CHAIN))
    feeds = [{"x": samples()[0]["x"]}]
    found = find_keep_list(ir.from_proto(proto), feeds, max_nmse=1e-20)
    assert found.names[:2] == ("one", "two")
    assert "off by" in found.kept[0].reason
    assert not found.met
    assert found.nmse > 1e-20


def test_no_samples() -> None:
    with pytest.raises(DataError, match="samples"):
        find_keep_list(model(), [])
