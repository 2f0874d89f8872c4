"""What calibration reads of a graph without building it, and the session that returns what it looks at."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from toolchain_support import ROOT, conv_net, save

from toolchain.calibration import calibrate
from toolchain.errors import CalibrationError
from toolchain.evaluate import reference_session, typed
from toolchain.observation import Plan, graph_digest, plan
from toolchain.watching import watch
from toolchain.wiring import read_wiring, wiring_of

NESTED = """g (float[n, 4] x, bool flag, float[4, 4] w) => (float[n, 4] y) {
    a = MatMul(x, w)
    low = Constant<value = float {-1.0}>()
    high = Constant<value_float = 1.0>()
    b = Clip(a, low, high)
    c = If(flag) <
        then_branch = t () => (float[n, 4] one) { one = Add(b, a) },
        else_branch = e () => (float[n, 4] two) { two = Relu(b) }
    >
    y = LeakyRelu<alpha = 0.2>(c)
}"""


def convolutions(*channels: int) -> onnx.ModelProto:
    """A Conv and a Relu for each number of channels, and an Add of the last two where those are equal."""
    rng = np.random.default_rng(0)
    lines, weights, before, width = [], [], "x", 3
    for i, count in enumerate(channels):
        lines += [f"c{i} = Conv<pads = [1, 1, 1, 1]>({before}, w{i}, b{i})", f"r{i} = Relu(c{i})"]
        weights.append(rng.normal(size=(count, width, 3, 3)).astype(np.float32) / 5)
        weights.append(rng.normal(size=count).astype(np.float32) + 1)
        before, width = f"r{i}", count
    body = "\n".join([*lines, f"y = Add({before}, c{len(channels) - 1})"])
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 20]>\ng (float[n, 3, 9, 9] x) => (float[n, {width}, 9, 9] y) {{{body}}}'
    )
    names = [f"{kind}{i}" for i in range(len(channels)) for kind in "wb"]
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in zip(names, weights, strict=True)
    )
    return model


def nested() -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 20]>\n{NESTED}')
    model.graph.input.pop()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    return model


def planned(graph: Any) -> Plan | str:
    """The plan, or why there is none."""
    try:
        return plan(graph)
    except CalibrationError as error:
        return error.what


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("made", [conv_net, nested, lambda: convolutions(32, 24, 32)], ids=["net", "nested", "large"])
def test_a_file_has_the_plan_and_digest_of_the_graph_in_memory(made: Any, channels: bool, tmp_path: Path) -> None:
    path = Path(save(made(), tmp_path / "m.onnx"))
    read = read_wiring(path)
    assert read is not None
    graph = typed(ir.load(path))
    assert dataclasses.asdict(plan(read[0], channels=channels)) == dataclasses.asdict(plan(graph, channels=channels))
    assert graph_digest(read[0]) == graph_digest(graph)
    assert read[0].initializers == wiring_of(graph).initializers


def test_real_graphs_have_the_plan_and_digest_of_the_graph_in_memory(assets: Path) -> None:
    for path in sorted(assets.glob("models/*/*.onnx")):
        read = read_wiring(path)
        assert read is not None, path.name
        graph = typed(ir.load(path))
        assert planned(read[0]) == planned(graph), path.name
        assert graph_digest(read[0]) == graph_digest(graph), path.name


def test_large_weights_stay_in_the_file_and_their_elements_tell(tmp_path: Path) -> None:
    model = convolutions(32, 32)
    path = Path(save(model, tmp_path / "m.onnx"))
    read = read_wiring(path)
    assert read is not None
    outside = [tensor for tensor in read[1].graph.initializer if tensor.external_data]
    assert {tensor.name for tensor in outside} == {"w1"}  # 32 x 32 x 3 x 3; w0 has 864 elements
    entries = {entry.key: entry.value for entry in outside[0].external_data}
    raw = path.read_bytes()[int(entries["offset"]) :][: int(entries["length"])]
    np.testing.assert_array_equal(
        np.frombuffer(raw, np.float32).reshape(outside[0].dims), onnx.numpy_helper.to_array(model.graph.initializer[2])
    )
    other = onnx.numpy_helper.to_array(model.graph.initializer[2]) * 2
    model.graph.initializer[2].CopyFrom(onnx.numpy_helper.from_array(other, "w1"))
    changed = read_wiring(Path(save(model, tmp_path / "other.onnx")))
    assert changed is not None
    assert graph_digest(changed[0]) != graph_digest(read[0])


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("dtype", [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 16])
def test_small_constants_are_read_as_onnx_reads_them(dtype: int, raw: bool, tmp_path: Path) -> None:
    model = nested()
    numbers = np.array([1, 0, 2, 1]) if dtype in (2, 4, 9, 12, 13) else np.array([1, 0, -2, 1])
    for name, values in (("many", numbers), ("one", numbers[:1]), ("none", numbers[:0])):
        array = values.astype(onnx.helper.tensor_dtype_to_np_dtype(dtype))
        if raw:
            tensor = onnx.numpy_helper.from_array(array, name)
        else:
            tensor = onnx.helper.make_tensor(name, dtype, array.shape, array)
        assert tensor.HasField("raw_data") == raw
        model.graph.initializer.append(tensor)
    path = Path(save(model, tmp_path / "m.onnx"))
    read = read_wiring(path)
    assert read is not None
    assert read[0].initializers == wiring_of(ir.load(path)).initializers
    assert read[0].initializers["one"].scalar == 1.0


@pytest.mark.parametrize("how", ["external", "typed field", "function", "sparse"])
def test_what_only_the_whole_reader_understands_is_left_to_it(how: str, tmp_path: Path) -> None:
    model = convolutions(32, 32)
    path = tmp_path / "m.onnx"
    if how == "typed field":
        array = onnx.numpy_helper.to_array(model.graph.initializer[2])
        model.graph.initializer[2].CopyFrom(onnx.helper.make_tensor("w1", 1, array.shape, array.reshape(-1).tolist()))
    elif how == "function":
        model.functions.add(name="f", domain="d")
    elif how == "sparse":
        model.graph.sparse_initializer.add()
    onnx.save(model, path, save_as_external_data=how == "external", size_threshold=0)
    assert read_wiring(path) is None
    if how in ("external", "typed field"):
        data = np.random.default_rng(0).normal(size=(4, 3, 9, 9)).astype(np.float32)
        expected = calibrate(ir.from_proto(convolutions(32, 32)), [{"x": data}], method="minmax")
        assert calibrate(path, [{"x": data}], method="minmax") == expected


def test_values_in_blocks_hold_the_elements_of_the_value(tmp_path: Path) -> None:
    """24 and 20 channels do not fill whole blocks: theirs are not read with the padding."""
    path = Path(save(convolutions(32, 24, 48, 20, 16), tmp_path / "m.onnx"))
    data = np.random.default_rng(1).normal(size=(3, 3, 9, 9)).astype(np.float32)
    watched = watch(path)
    if not watched.fetched:
        pytest.skip("ONNX Runtime computes convolutions without blocks here")
    assert set(watched.fetched) == {"r0", "r2", "r4", "c4", "y"}
    graph = typed(ir.load(path))
    with watched.session, reference_session(graph, extra_outputs=watched.plan.outputs) as session:
        values = watched.run({"x": data})
        expected = {"x": data, **session.run({"x": data})}
    assert set(values) == set(watched.plan.observed)
    for name, value in values.items():
        assert value.size == expected[name].size
        rows = (np.sort(array.reshape(3, -1), axis=1) for array in (value, expected[name]))
        np.testing.assert_allclose(*rows, rtol=1e-4, atol=1e-4, err_msg=name)


def test_statistics_of_channels_are_not_read_from_blocks(tmp_path: Path) -> None:
    path = Path(save(convolutions(32, 32), tmp_path / "m.onnx"))
    data = np.random.default_rng(1).normal(size=(3, 3, 9, 9)).astype(np.float32)
    assert not watch(path, channels=True).fetched
    found = calibrate(path, [{"x": data}], channels=True)
    with reference_session(typed(ir.load(path)), extra_outputs=["c0"]) as session:
        expected = session.run({"x": data})["c0"].mean(axis=(0, 2, 3))
    np.testing.assert_allclose(found.channel_mean["c0"], expected, rtol=1e-4, atol=1e-5)


def test_inputs_without_a_rank_take_any(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 20]>\ng (float[n, 4] x) => (float[n, 4] y) {y = Relu(x)}'
    )
    model.graph.input[0].type.tensor_type.ClearField("shape")
    path = Path(save(model, tmp_path / "m.onnx"))
    found = calibrate(path, [{"x": np.full((2, 3, 5), 2, np.float32)}], method="minmax")
    assert found.ranges["y"].maximum == 2


_LEAN = """
import sys
from pathlib import Path
import numpy as np
from toolchain.calibration import calibrate
calibrate(Path(sys.argv[1]), [{"image": np.ones((2, 3, 16, 16), np.float32)}])
print(*(name for name in ("onnx", "onnx_ir", "sympy", "onnxscript", "rich", "email", "typer") if name in sys.modules))
"""


def test_calibrating_a_file_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    """onnx_ir with its sympy alone is 45 MB, onnx 12: more than a small model's session."""
    path = save(onnx.shape_inference.infer_shapes(conv_net()), tmp_path / "net.onnx")
    done = subprocess.run([sys.executable, "-c", _LEAN, path], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []
