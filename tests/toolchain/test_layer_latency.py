"""Latency by layer: what ONNX Runtime fused and renamed comes back to the nodes of the given graph."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from toolchain_support import conv_net

import passes
import runtimes
from toolchain.layer_latency import layer_latency
from toolchain.model_cost import cost_of


@pytest.fixture(scope="module", autouse=True)
def _runtime() -> None:
    state = runtimes.backend("ort-cpu").probe()
    if not state.available:
        pytest.skip(f"ort-cpu: {state.reason}")


def test_what_is_fused_counts_for_the_layer_that_leads() -> None:
    found = layer_latency(ir.from_proto(conv_net(channels=16)), runs=5)
    by_node = {layer.node: layer for layer in found.layers}
    # BatchNormalization and Relu are in the Conv; a blocked layout renames it besides
    assert "conv" in by_node
    assert "fc" in by_node
    assert "bn" not in by_node
    assert "relu" not in by_node
    assert "Conv" in "".join(by_node["conv"].ran_as)
    assert found.runs == 5
    assert all(layer.milliseconds > 0 for layer in found.layers if layer.op_type in ("Conv", "Gemm"))
    assert sum(layer.milliseconds for layer in found.layers) + found.overhead_ms <= 1.5 * found.total_ms


def test_names_that_are_missing_or_double_and_a_loop() -> None:
    text = """<ir_version: 8, opset_import: ["" : 20]>
    agraph (float[N, 8] x, int64 n, bool go) => (float[N, 8] y) {
        a = Relu (x)
        b = Loop (n, go, a) <body = turn (int64 i, bool c, float[N, 8] s) => (bool k, float[N, 8] t)
            { k = Identity (c)
              t = Sin (s) }>
        y = Sigmoid (b)
    }"""
    proto = onnx.parser.parse_model(text)
    for node in proto.graph.node:
        node.name = "same"
    found = layer_latency(ir.from_proto(proto), runs=4)
    assert [layer.op_type for layer in found.layers] == ["Relu", "Loop", "Sigmoid"]
    assert [layer.node for layer in found.layers] == ["same -> a", "same -> b", "same -> y"]
    cost = cost_of(ir.from_proto(proto), dims={"N": 2})
    assert [node.node for node in cost.nodes] == [layer.node for layer in found.layers], "the two are joined by name"
    assert found.overhead_ms <= found.total_ms, "what runs in the loop is in the loop's own time"


def test_residual_blocks_of_a_real_model(assets: Path) -> None:
    model = ir.load(assets / "models" / "cifar10-resnets" / "cifar_resnet20.onnx")
    for name in ("fold_constants", "eliminate_noops", "fuse_conv_bn", "fold_constants", "eliminate_dead_code"):
        passes.make(name)(model)
    found = layer_latency(model, runs=5)
    convolutions = [layer for layer in found.layers if layer.op_type == "Conv"]
    assert len(convolutions) == 19
    assert all("Conv" in "".join(layer.ran_as) for layer in convolutions)
    # the Relu within each block runs in its convolution, and so do some of those after a shortcut's Add
    assert len([layer for layer in found.layers if layer.op_type == "Relu"]) <= 9
    assert all(layer.op_type in layer.ran_as[0] for layer in found.layers if layer.op_type in ("Add", "Slice"))
    assert found.overhead_ms < 0.5 * sum(layer.milliseconds for layer in convolutions)


def test_a_model_that_does_not_run() -> None:
    text = '<ir_version: 8, opset_import: ["" : 20]> agraph (float[N] x, float[M] z) => (float[N] y) { y = Add (x, z) }'
    with pytest.raises(runtimes.RunFailed, match="profiling failed"):
        layer_latency(ir.from_proto(onnx.parser.parse_model(text)), dims={"N": 3, "M": 4}, runs=1)
