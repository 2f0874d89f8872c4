"""The whole default pipeline on graphs that others made: the same results, valid, and nothing left to do."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_support import random_feeds, run_ort, run_reference, signature

from passes import DEFAULT_PIPELINE, make
from passes.base import Pass, PassFailed
from toolchain.metrics import tensor_error

PIPELINE = [make(name) for name in DEFAULT_PIPELINE]
#: simplify starts a process of two seconds where it sees a chance; what it does has tests of its own
IN_PROCESS = [each for each in PIPELINE if each.name != "simplify"]


def optimized(proto: onnx.ModelProto, passes: list[Pass]) -> onnx.ModelProto:
    """Runs the passes; checks after each, then that a second run changes nothing."""
    model = ir.from_proto(proto)
    for each in passes:
        if each(model).modified:
            onnx.checker.check_model(ir.to_proto(model), full_check=True)
    after = ir.to_proto(model)
    again = [each.name for each in passes if each(model).modified]
    assert not again, f"a second run of {again} changes the model"
    assert [v.name for v in after.graph.output] == [v.name for v in proto.graph.output]
    return after


def assert_same(before: object, after: object, nmse: float, where: str) -> None:
    """Arrays within ``nmse``, sequences and missing optionals of the same structure."""
    if isinstance(before, list | tuple):
        assert isinstance(after, list | tuple), where
        assert len(before) == len(after), where
        for a, b in zip(before, after, strict=True):
            assert_same(a, b, nmse, where)
    elif before is None:
        assert after is None, where
    else:
        a, b = np.asarray(before), np.asarray(after)
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        error = tensor_error(a, b).nmse
        assert error <= nmse, f"{where}: {error}"


# Bounds on the normalised squared error, each a few times what was measured. 0 is equal to the bit.
REAL_GRAPHS = {
    "onnx-graphs/basic_pitch.onnx": (0.0, 1),
    "onnx-graphs/chars2vec_loop.onnx": (0.0, 1),
    "onnx-graphs/plcmos_v2_gru.onnx": (0.0, 2),
    "onnx-graphs/rapidocr_cls.onnx": (1e-11, 2),
    "onnx-graphs/silero_vad.onnx": (1e-13, 2),
    "onnx-graphs/swift_f0_stft.onnx": (0.0, 2),
    "cifar10-resnets/cifar_resnet20.onnx": (1e-11, 2),
    "cifar10-resnets/cifar_resnet56.onnx": (1e-11, 1),
    "mlperf-resnet8/mlperf_resnet8_float.onnx": (0.0, 2),
    "mlperf-resnet8/mlperf_resnet8_int8_qdq.onnx": (0.0, 2),
}
SHAPES = {
    "rapidocr_cls": {"x": (1, 3, 48, 48)},
    "silero_vad": {"input": (1, 576), "state": (2, 1, 128)},
    "basic_pitch": (1, 43844, 1),
    "plcmos_v2_gru": [(1, 1, 48, 257), (1, 64)],
    "swift_f0_stft": [(1, 16000)],
    "chars2vec_loop": [(1, 16, 59)],
}


def feeds_for(name: str, proto: onnx.ModelProto, seed: int) -> dict[str, np.ndarray]:
    feeds = random_feeds(proto, seed)
    shapes = SHAPES.get(name)
    if shapes is None:
        return feeds
    if isinstance(shapes, tuple):
        shapes = [shapes]
    if isinstance(shapes, list):
        shapes = dict(zip(feeds, shapes, strict=True))
    rng = np.random.default_rng(seed)
    for key, shape in shapes.items():
        feeds[key] = (rng.standard_normal(shape) * 0.3).astype(feeds[key].dtype)
    return feeds


@pytest.mark.parametrize("file", REAL_GRAPHS)
def test_real_graphs(assets: Path, file: str) -> None:
    bound, seeds = REAL_GRAPHS[file]
    proto = onnx.load(assets / "models" / file)
    after = optimized(proto, PIPELINE)
    assert signature(after) == signature(proto)
    assert len(after.graph.node) <= len(proto.graph.node)
    name = Path(file).stem
    for seed in range(seeds):
        feeds = feeds_for(name, proto, seed)
        # both branches of silero's If: one for each sampling rate
        rates = [16000, 8000] if name == "silero_vad" else [None]
        for rate in rates:
            if rate is not None:
                feeds["sr"] = np.array(rate, np.int64)
                feeds["input"] = feeds["input"][:, : 576 if rate == 16000 else 288]
            assert_same(run_ort(proto, feeds), run_ort(after, feeds), bound, f"{file} seed {seed} {rate or ''}")


def test_quantised_model_stays_quantised(assets: Path) -> None:
    proto = onnx.load(assets / "models/mlperf-resnet8/mlperf_resnet8_int8_qdq.onnx")
    after = optimized(proto, PIPELINE)

    def count(model: onnx.ModelProto) -> collections.Counter[str]:
        return collections.Counter(n.op_type for n in model.graph.node if n.op_type.endswith("Linear"))

    assert count(after) == count(proto)


def test_raw_export_becomes_plain_layers(assets: Path) -> None:
    proto = onnx.load(assets / "models/cifar10-resnets/cifar_resnet20.onnx")
    ops = collections.Counter(n.op_type for n in optimized(proto, PIPELINE).graph.node)
    assert ops["Conv"] == 19
    assert not set(ops) & {"BatchNormalization", "Shape", "Expand", "CastLike", "Constant", "Cast", "Concat"}


Data = list[tuple[list, list]]
#: how many models there are at least, how many a pass changes, how many of those were compared
LEAST = {
    "node": (1800, 400, 400),
    "pytorch-converted": (80, 4, 4),
    "pytorch-operator": (30, 4, 4),
    "simple": (20, 0, 0),
    "light": (8, 8, 2),
}
#: of the light models; the others make up hundreds of megabytes of weights when they run
SMALL_ENOUGH = ("light_squeezenet.onnx", "light_shufflenet.onnx")


def backend_models(kind: str) -> Iterator[tuple[str, onnx.ModelProto, Data]]:
    """The test models that the onnx package carries, with their inputs."""
    if kind == "node":
        from onnx.backend.test.case.node import collect_testcases

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for case in collect_testcases():
                yield case.name, case.model, case.data_sets
        return
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / kind
    if kind == "light":  # architectures of the model zoo, without weights to speak of
        for path in sorted(folder.glob("*.onnx")):
            yield path.name, onnx.load(path), []
        return
    for path in sorted(folder.glob("*/model.onnx")):
        data = []
        for each in sorted(path.parent.glob("test_data_set_*")):
            loaded = []
            for index in range(len(list(each.glob("input_*.pb")))):
                tensor = onnx.TensorProto()
                tensor.ParseFromString((each / f"input_{index}.pb").read_bytes())
                loaded.append(onnx.numpy_helper.to_array(tensor))
            data.append((loaded, []))
        yield path.parent.name, onnx.load(path), data


def run_either(proto: onnx.ModelProto, feeds: dict[str, object]) -> list | None:
    """The reference's outputs, or ONNX Runtime's; None where neither runs the model."""
    for run in (run_reference, run_ort):
        try:
            return run(proto, feeds)  # type: ignore[arg-type]
        except Exception:  # noqa: BLE001, S112 - both raise anything on a model that they cannot run
            continue
    return None


@pytest.mark.parametrize("kind", LEAST)
def test_onnx_backend_models(kind: str) -> None:
    """Every model that a pass changes still gives what it gave. Models that no pass changes are equal anyway."""
    seen = changed = compared = 0
    not_run: list[str] = []
    random: list[str] = []
    refused: list[str] = []
    for name, proto, data in backend_models(kind):
        seen += 1
        # onnx's own checker refuses a few before any pass; nothing is promised for those
        try:
            onnx.checker.check_model(proto, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
            refused.append(name)
            continue
        original = proto.SerializeToString(deterministic=True)
        try:
            after = optimized(proto, IN_PROCESS)
        except PassFailed as error:
            pytest.fail(f"{name}: {error}")
        before = onnx.ModelProto.FromString(original)
        if after.graph.node == before.graph.node and len(after.graph.initializer) == len(before.graph.initializer):
            continue
        changed += 1
        ops = {node.op_type for node in before.graph.node}
        if any(op.startswith("Random") or op in ("Bernoulli", "Multinomial") for op in ops):
            random.append(name)
            continue
        if kind == "light" and name in SMALL_ENOUGH:
            feeds = random_feeds(before, 0)
            assert_same(run_ort(before, feeds), run_ort(after, feeds), 1e-10, name)
            compared += 1
        for inputs, _ in data:
            names = [v.name for v in before.graph.input]
            feeds = {
                key: onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
                for key, value in zip(names, inputs, strict=False)
            }
            expected = run_either(before, feeds)
            if expected is None:
                not_run.append(name)
                continue
            left = {v.name for v in after.graph.input}
            got = run_either(after, {key: value for key, value in feeds.items() if key in left})
            assert got is not None, f"{name} does not run any more"
            half = any(np.asarray(e).dtype.itemsize <= 2 for e in expected if isinstance(e, np.ndarray))
            assert_same(expected, got, 1e-6 if half else 1e-11, name)
            compared += 1
    counted = (seen, changed, compared, len(not_run), len(random), len(refused))
    least = LEAST[kind]
    assert all(count >= bound for count, bound in zip(counted[:3], least, strict=True)), counted
    assert len(not_run) <= 3, not_run
    assert len(random) <= 8, random
    assert len(refused) <= 3, refused


def test_large_weights_are_not_touched() -> None:
    """Weights of 113 MB go through the whole pipeline as the same objects."""
    weights = {f"w{i}": np.ones((512, 512, 3, 3), np.float32) for i in range(12)}  # 113 MB
    nodes, names = [], "x"
    for key in weights:
        nodes.append(onnx.helper.make_node("Conv", [names, key], [f"{key}_out"], pads=[1] * 4))
        names = f"{key}_out"
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["N", 512, 7, 7])],
        [onnx.helper.make_tensor_value_info(names, 1, ["N", 512, 7, 7])],
    )
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]))
    for key, data in weights.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == key)
        value.const_value = ir.Tensor(data, name=key)
        model.graph.register_initializer(value)
    tensors = {key: model.graph.initializers[key].const_value for key in weights}
    for each in PIPELINE:
        each(model)
    assert {key: model.graph.initializers[key].const_value for key in weights} == tensors
