"""Looking into engines: where noise comes in is found, and what Polygraphy reads of layers arrives.

Where no GPU is at hand, another compiled form of the graph stands in for the engine: ONNX Runtime's optimised one, or
one with a weight that was changed. What is built for TensorRT is built for real.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from toolchain_support import conv_net, save

import runtimes
from passes._quant import Calibration, TensorRange
from runtimes import Compiled, Target
from toolchain import engine_debug
from toolchain.cli import app
from toolchain.console import run_app
from toolchain.engine_debug import comparable, compare, debug_engine, mark, read_layers
from toolchain.errors import DataError
from toolchain.evaluate import typed
from toolchain.lower import lower_by_pass, lower_int8
from toolchain.metrics import tensor_error
from toolchain.onnx_file import read_onnx

pytest.importorskip("polygraphy", reason="polygraphy: not installed")
RTX = Target("tensorrt-rtx", "sm89")


def samples(count: int = 2, *, batch: int = 1) -> list[dict[str, np.ndarray]]:
    return [
        {"image": np.random.default_rng(n).normal(size=(batch, 3, 16, 16)).astype(np.float32)} for n in range(count)
    ]


def changed(model: onnx.ModelProto, name: str, share: float) -> onnx.ModelProto:
    """The model with noise in one weight, as large as that share of it."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in copy.graph.initializer:
        if tensor.name == name:
            value = numpy_helper.to_array(tensor)
            noise = np.random.default_rng(5).normal(size=value.shape).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value * (1 + np.float32(share) * noise), name))
    return copy


def compiled(model: onnx.ModelProto, folder: Path) -> Compiled:
    return runtimes.compile(save(model, folder / "given.onnx"), "ort-cpu", folder / "compiled")


def require_rtx() -> None:
    state = runtimes.backend("tensorrt-rtx").can_compile(RTX)
    if not state.available:
        pytest.skip(f"tensorrt-rtx: {state.reason}")


@pytest.mark.parametrize(("weight", "first"), [("w", "conv"), ("scale", "bn"), ("fc_w", "logits")])
def test_the_tensor_where_noise_comes_in_is_found(tmp_path: Path, weight: str, first: str) -> None:
    model = conv_net()
    graph = typed(read_onnx(save(model, tmp_path / "m.onnx")))
    other = typed(read_onnx(save(changed(model, weight, 0.01), tmp_path / "n.onnx")))
    names = comparable(graph)
    assert names == ("conv", "bn", "relu", "pool", "flat", "logits")
    with runtimes.load(mark(other, names, tmp_path / "other"), options={"graph_level": "disabled"}) as session:
        found = compare(mark(graph, names, tmp_path / "marked"), session, graph, samples())
    assert [one.tensor for one in found] == list(names)
    begins = [one for one in found if one.nmse > 1e-6 and one.reads_nmse is not None and one.reads_nmse < 1e-9]
    assert [one.tensor for one in begins] == [first]
    for one in found[: names.index(first)]:
        assert (one.nmse, one.max_abs) == (0.0, 0.0), one
    for before, one in itertools.pairwise(found):
        assert one.reads_nmse == before.nmse


def test_distances_are_the_worst_of_all_samples(tmp_path: Path) -> None:
    model = conv_net()
    path = save(model, tmp_path / "m.onnx")
    other = save(changed(model, "w", 0.05), tmp_path / "n.onnx")
    given = samples(4)
    with runtimes.load(path) as was, runtimes.load(other) as now:
        errors = [tensor_error(was.run(feeds)["logits"], now.run(feeds)["logits"]) for feeds in given]
        (found,) = compare(path, now, typed(read_onnx(path)), given)
    assert found.nmse == pytest.approx(max(error.nmse for error in errors), rel=1e-3)
    assert found.max_abs == pytest.approx(max(error.max_abs for error in errors), rel=1e-3)
    assert found.cosine == pytest.approx(min(error.cosine for error in errors))
    assert (found.node, found.op_type, found.reads_nmse) == ("fc", "Gemm", None)
    assert len({error.nmse for error in errors}) == 4


def test_a_compiled_graph_against_its_own_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime's fused graph is that of the model, and every tensor can be had by compiling again."""
    made = compiled(conv_net(), tmp_path)
    plain = debug_engine(made, samples(batch=3))
    assert [one.tensor for one in plain.outputs] == ["logits"]
    assert plain.tensors == ()
    whole = debug_engine(made, samples(batch=3), layers=True)
    assert [one.tensor for one in whole.tensors] == ["conv", "bn", "relu", "pool", "flat", "logits"]
    assert max(one.nmse for one in (*plain.outputs, *whole.tensors)) < 1e-10
    assert "of ort-cpu" in whole.remarks[0]
    assert (whole.samples, whole.target) == (2, "ort-cpu")
    assert capsys.readouterr().out == "", "Polygraphy's log is where results go"


def lowered(precision: str) -> ir.Model:
    model = ir.from_proto(conv_net(channels=16))
    if precision == "fp32":
        return model
    if precision == "fp16":
        return lower_by_pass(model, "fp16")[0]
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    ranges = {value.name: TensorRange(-4.0, 4.0, 4.0, -4.0, 4.0, "minmax") for value in values if value.name}
    return lower_int8(model, RTX, Calibration(graph="", samples=1, ranges=ranges))[0]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_tensorrt_takes_graphs_with_every_tensor_marked(tmp_path: Path, precision: str) -> None:
    require_rtx()
    graph = typed(lowered(precision))
    names = comparable(graph)
    by_output = {value.name: node.op_type for node in graph.graph for value in node.outputs}
    assert {"conv", "relu"} & set(names)
    assert not {by_output[name] for name in names} & {"QuantizeLinear", "DequantizeLinear"}
    if precision == "int8":
        assert "DequantizeLinear" in by_output.values()
    built = runtimes.compile(mark(graph, names, tmp_path / "marked"), RTX, tmp_path / "engine")
    assert set(names) <= json.loads(built.fingerprint["shapes"]).keys()


def test_outputs_are_compared_whatever_they_are_and_integers_inside_are_not() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x) => (int64[R] size, float[N, 4] y)
        { size = Shape(x)  i = Cast<to = 7>(x)  f = Cast<to = 1>(i)  y = Relu(f) }
    """
    graph = typed(ir.from_proto(onnx.parser.parse_model(text)))
    assert comparable(graph) == ("size", "f", "y")


class Says:
    """In place of an engine and its inspector: says what TensorRT would, as JSON."""

    num_io_tensors, num_optimization_profiles, num_layers = 0, 1, 2
    refittable, name, device_memory_size_v2 = False, "engine", 0

    def __init__(self, layers: list[Any], verbosity: Any) -> None:
        self.layers, self.profiling_verbosity, self.execution_context = layers, verbosity, None

    def create_engine_inspector(self) -> Says:
        return self

    def get_layer_information(self, index: int, form: Any) -> str:
        return json.dumps(self.layers[index])


def layer(name: str, tensor: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"Name": name, "LayerType": "CaskConvolution", "Inputs": [], "Outputs": [{**tensor, "Name": "c1"}], **more}


TEN = {"Dimensions": [1, 16, 32, 32], "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}
ELEVEN = {"Dimensions": [1, 16, 32, 32], "Datatype": "Half", "Format": "Channel major format where channel % 8 == 0"}


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """TensorRT-RTX's names in place of TensorRT's, which are the same as far as Polygraphy uses them here."""
    for module in ("tensorrt", "tensorrt_rtx"):
        if importlib.util.find_spec(module) is not None:
            stand = importlib.import_module(module)
            break
    else:
        pytest.skip("tensorrt: not installed")
    for place in ("tools.inspect.subtool.model.extractors._trt", "backend.trt.util"):
        importlib.import_module(f"polygraphy.{place}")
        monkeypatch.setattr(f"polygraphy.{place}.trt", stand)
    return stand


@pytest.mark.parametrize("tensor", [TEN, ELEVEN], ids=["TensorRT 10", "TensorRT 11"])
def test_layers_arrive_as_tensorrt_says_them(trt: Any, tensor: dict[str, Any]) -> None:
    from polygraphy.tools.inspect.subtool.model.extractors import graph_data_from_trt_engine

    said = [layer("Conv -> c1 + Relu", tensor, TacticValue="0x1f"), layer("Reformat", tensor, TacticName="copy")]
    found = read_layers(graph_data_from_trt_engine(Says(said, trt.ProfilingVerbosity.DETAILED), None))
    assert [(one.name, one.kind, one.tactic) for one in found] == [
        ("Conv -> c1 + Relu", "CaskConvolution", "0x1f"),
        ("Reformat", "CaskConvolution", "copy"),
    ]
    (gives,) = found[0].gives
    assert gives.startswith("c1: float16[1, 16, 32, 32], ")
    assert "channel % 8" in gives


@pytest.mark.parametrize("detailed", [True, False])
def test_an_engine_that_keeps_only_names_says_how_to_get_more(trt: Any, detailed: bool) -> None:
    class Session:
        target = Target("tensorrt")

        def inspect(self, look: Any) -> Any:
            said: list[Any] = [layer("a", TEN), layer("b", ELEVEN)] if detailed else ["a", "b"]
            level = trt.ProfilingVerbosity.DETAILED if detailed else trt.ProfilingVerbosity.LAYER_NAMES_ONLY
            return look(Says(said, level), None)

    found, remarks = engine_debug._engine_layers(Session())  # type: ignore[arg-type]
    assert [one.name for one in found] == ["a", "b"]
    assert bool(remarks) is not detailed
    assert detailed or "layer_information" in remarks[0]


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled(conv_net(), tmp_path)
    with pytest.raises(DataError, match="no sample"):
        debug_engine(made, [])
    with pytest.raises(runtimes.InvalidArtifact, match="no graph beside"):
        debug_engine(dataclasses.replace(made, model_file=None), samples())
    with pytest.raises(runtimes.RunFailed, match="image"):
        debug_engine(made, [{"image": np.zeros((1, 3, 8), np.float32)}])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(runtimes.TargetUnavailable, match="polygraphy is not installed"):
        debug_engine(made, samples())


def test_an_engine_of_another_graph_is_told(tmp_path: Path) -> None:
    graph = typed(read_onnx(save(conv_net(), tmp_path / "m.onnx")))
    wider = conv_net()
    wider.graph.output[0].name = "others"
    wider.graph.node[-1].output[0] = "others"
    with (
        runtimes.load(save(wider, tmp_path / "n.onnx")) as session,
        pytest.raises(runtimes.RunFailed, match="'logits' is missing"),
    ):
        compare(tmp_path / "m.onnx", session, graph, samples())


def test_a_graph_that_onnx_runtime_refuses_is_told(tmp_path: Path) -> None:
    model = conv_net()
    with runtimes.load(save(model, tmp_path / "m.onnx")) as session:
        model.graph.node[0].domain = "nobody.knows"
        graph = ir.from_proto(model)
        with pytest.raises(runtimes.RunFailed, match="cannot be compared"):
            compare(save(model, tmp_path / "n.onnx"), session, graph, samples())


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_rtx()
    folder = tmp_path_factory.mktemp("engine")
    model = save(conv_net(), folder / "net.onnx")
    done = run_app(app, ["build", str(model), "--target", str(RTX), "--precision", "fp32", "-o", str(folder / "art")])
    assert done == 0
    return folder / "art"


def test_the_command_without_a_gpu_says_so(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    state = runtimes.backend("tensorrt-rtx").can_run(RTX)
    if state.available:
        pytest.skip("there is a GPU here")
    assert run_app(app, ["debug", "engine", str(artifact)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert (state.reason or "?") in err


def test_the_command_shows_what_was_found(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ONNX Runtime in place of the engine that cannot run here."""
    loaded: list[Compiled] = []

    def load(self: object, made: Compiled, *, options: Any = None) -> runtimes.Session:
        loaded.append(made)
        return runtimes.load(made.directory / (made.model_file or ""))

    monkeypatch.setattr(type(runtimes.backend("tensorrt-rtx")), "load", load)
    capsys.readouterr()
    assert run_app(app, ["debug", "engine", str(artifact), "--layers", "--limit", "2", "--trust", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["samples"] == 2
    assert found["target"] == str(RTX)
    assert [one["tensor"] for one in found["outputs"]] == ["logits"]
    assert len(found["tensors"]) > 3
    assert all(one["nmse"] < 1e-10 for one in found["tensors"])
    shipped, again = loaded
    assert shipped.trusted
    assert shipped.directory.parent == artifact.resolve()
    assert again.fingerprint["plan_sha256"] != shipped.fingerprint["plan_sha256"]
    assert run_app(app, ["debug", "engine", str(artifact), "--layers"]) == 0
    text = capsys.readouterr().out
    assert "outputs against ONNX Runtime" in text
    assert "tensors where the most noise comes in" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--variant", "nobody"], "no engine 'nobody'"), (["--dim", "what=3"], "no input has a dimension 'what'")],
)
def test_what_the_command_refuses(
    artifact: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_app(app, ["debug", "engine", str(artifact), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_artifact_without_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(conv_net(), tmp_path / "net.onnx")
    assert run_app(app, ["build", str(model), "-o", str(tmp_path / "art")]) == 0
    capsys.readouterr()
    assert run_app(app, ["debug", "engine", str(tmp_path / "art")]) == 2
    error = capsys.readouterr().err
    assert "no TensorRT engine" in error
    assert "ort-cpu-fp32 (ort-cpu)" in error
