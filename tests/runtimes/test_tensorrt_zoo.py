"""Every model of the zoo, in float32, float16 and INT8, becomes an engine for GPUs that are not here.

Weights and ranges are drawn: what is asked is whether TensorRT parses and builds the graphs that the toolchain makes
for it, and whether INT8 is there in its network. Nearly all of the time is torch's export, which grows with the number
of nodes and is done once for the three precisions; of transformers, whose layers are all alike, two layers are taken.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tensorrt_support import require_rtx

import runtimes
from runtimes._tensorrt_api import require_api

pytestmark = pytest.mark.slow

TARGET = runtimes.Target("tensorrt-rtx", "sm86,sm89")
#: model -> what its engine in float16 and in INT8 may take of the float32 one's size
MODELS = {
    "resnet18": (0.55, 0.33),
    "resnet50": (0.55, 0.33),
    # kernels and what is not weights take most of it
    "mobilenet_v2": (0.6, 0.75),
    "efficientnet_lite0": (0.6, 0.75),
    "efficientnet_lite1": (0.6, 0.75),
    "efficientnet_lite2": (0.6, 0.75),
    "vit_b_16": (0.55, 0.33),
    "bert_base": (0.55, 0.5),
}
LAYERS = {"vit_b_16": 2, "bert_base": 2}


def graphs_of(name: str) -> dict[str, Any]:
    """The optimised graph of a zoo model in each precision, as the toolchain lowers it for TensorRT."""
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason="the zoo needs the export extra")
    import passes
    from passes._quant import Calibration, TensorRange
    from toolchain import models
    from toolchain.errors import SourceError
    from toolchain.export import export_source
    from toolchain.lower import lower_by_pass, lower_int8

    try:
        graph = export_source(models.resolve(name), weights="random").model
    except SourceError as error:
        pytest.skip(f"{name}: {error.what}")
    for step in passes.DEFAULT_PIPELINE:
        passes.make(step)(graph)
    values = [*graph.graph.inputs, *(output for node in graph.graph for output in node.outputs)]
    ranges = {value.name: TensorRange(-1.0, 1.0, 1.0, -1.0, 1.0, "minmax") for value in values if value.name}
    return {
        "fp32": graph,
        "fp16": lower_by_pass(graph, "fp16")[0],
        "int8": lower_int8(graph, TARGET, Calibration(graph="", samples=1, ranges=ranges))[0],
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_zoo_cross_compiles(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_rtx()
    import onnx_ir as ir

    from toolchain.zoo import ZOO

    if name in LAYERS:
        shallow = {**ZOO[name].config, "num_hidden_layers": LAYERS[name]}
        monkeypatch.setitem(ZOO, name, dataclasses.replace(ZOO[name], config=shallow))  # type: ignore[arg-type]
    sizes = {}
    for precision, graph in graphs_of(name).items():
        model = tmp_path / f"{precision}.onnx"
        ir.save(graph, model)
        compiled = runtimes.compile(model, TARGET, tmp_path / precision)
        sizes[precision] = int(compiled.fingerprint["plan_size"])
        assert compiled.fingerprint["compute_capabilities"] == "8.6 8.9"
        if precision == "int8":
            assert_integers(model)
        (tmp_path / precision / "prepared/model.plan").unlink()
    half, integer = MODELS[name]
    assert sizes["fp16"] <= half * sizes["fp32"], sizes
    assert sizes["int8"] <= integer * sizes["fp32"], sizes


def assert_integers(model: Path) -> None:
    """In the network as TensorRT parsed it, each Conv that reads quantised data reads quantised weights too; there
    are as many of them as in the ONNX graph."""
    import onnx

    api = require_api("tensorrt-rtx")
    logger = api.logger()
    builder = api.trt.Builder(logger)
    network = builder.create_network(api.network_flags())
    parser = api.trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(model))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    made_by = {layer.get_output(index).name: layer.type for layer in layers for index in range(layer.num_outputs)}
    dequantize = api.trt.LayerType.DEQUANTIZE
    read = []
    for layer in layers:
        if layer.type == api.trt.LayerType.CONVOLUTION:
            inputs = [layer.get_input(index) for index in range(min(2, layer.num_inputs))]
            read.append([tensor is not None and made_by.get(tensor.name) == dequantize for tensor in inputs])
    assert all(one in ([True, True], [False, False], [False]) for one in read), "quantised on one side only"
    graph = onnx.load(model, load_external_data=False).graph
    by_output = {output: node.op_type for node in graph.node for output in node.output}
    quantised = [n for n in graph.node if n.op_type == "Conv" and by_output.get(n.input[0]) == "DequantizeLinear"]
    assert read.count([True, True]) == len(quantised)
    assert any(one == [True, True] for one in read) or "MatMul" in by_output.values()


def test_that_is_the_zoo() -> None:
    from toolchain.zoo import ZOO

    assert set(MODELS) == set(ZOO)
