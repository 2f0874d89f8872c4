"""Calibration of whole graphs: what is observed, one pass whatever the batches, interruption, bad input, files."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from toolchain_support import ROOT, conv_net, save, toolchain, toolchain_json

from runtimes import Error
from toolchain import calibration as calibrations
from toolchain.calibration import METHODS, Calibration, calibrate, observe
from toolchain.errors import CalibrationError, DataError
from toolchain.evaluate import reference_session
from toolchain.observation import graph_digest, plan
from toolchain.optimize import optimize
from toolchain.recipe import Recipe


def model(text: str, **constants: np.ndarray) -> ir.Model:
    """A graph in ONNX text; inputs that ``constants`` names become initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 20]>\n{text}')
    kept = [value for value in proto.graph.input if value.name not in constants]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(data, name) for name, data in constants.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def optimised(proto: onnx.ModelProto) -> ir.Model:
    graph = ir.from_proto(proto)
    optimize(graph, Recipe(model="x").pipeline())
    return graph


@pytest.fixture(scope="module")
def net() -> ir.Model:
    return optimised(conv_net(channels=8))


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 16, 16)).astype(np.float32)


def close(one: Calibration, other: Calibration, rel: float = 1e-5) -> None:
    """Equal but for the last bits of the runtime's sums, which depend on the batch."""
    assert one.samples == other.samples
    assert one.graph == other.graph
    assert list(one.ranges) == list(other.ranges)
    for name, range_ in one.ranges.items():
        for field in ("low", "high", "amax", "minimum", "maximum"):
            assert getattr(range_, field) == pytest.approx(getattr(other.ranges[name], field), rel=rel, abs=1e-6), name


BATCHINGS = [[20], [1] * 20, [8, 8, 4], [3, 16, 1], [13, 7]]


@pytest.mark.parametrize("method", METHODS)
def test_ranges_do_not_depend_on_the_batches(net: ir.Model, method: Any) -> None:
    data = images(20)
    expected = calibrate(net, [{"image": data}], method=method)
    for sizes in BATCHINGS:
        pieces = np.split(data, np.cumsum(sizes)[:-1])
        close(expected, calibrate(net, ({"image": piece} for piece in pieces), method=method), rel=2e-2)


def test_extremes_are_those_of_the_reference(net: ir.Model) -> None:
    data = images(12)
    found = calibrate(net, [{"image": data[:5]}, {"image": data[5:]}], method="minmax")
    names = [name for name in plan(net).outputs]
    with reference_session(net, extra_outputs=names) as session:
        values = {"image": data, **session.run({"image": data})}
    assert set(names) <= set(found.ranges)
    for name in ("image", *names):
        assert found.ranges[name].minimum == pytest.approx(float(values[name].min()), rel=1e-5, abs=1e-6)
        assert found.ranges[name].maximum == pytest.approx(float(values[name].max()), rel=1e-5, abs=1e-6)
        assert found.ranges[name].method == "minmax"


def test_one_pass_serves_every_method(net: ir.Model) -> None:
    data = images(16)
    found = observe(net, iter([{"image": data}]))
    for method in METHODS:
        derived = found.calibration(method=method)  # type: ignore[arg-type]
        assert derived == calibrate(net, [{"image": data}], method=method)  # type: ignore[arg-type]


def test_the_model_runs_once_over_a_generator(net: ir.Model) -> None:
    asked: list[int] = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for number in range(4):
            asked.append(number)
            yield {"image": images(3, number)}

    seen: list[int] = []
    assert calibrate(net, batches(), on_progress=seen.append).samples == 12
    assert asked == [0, 1, 2, 3]
    assert seen == sorted(seen)
    assert seen[-1] == 12


def test_a_value_before_an_activation_takes_the_range_after_it(net: ir.Model) -> None:
    (conv,) = [node for node in net.graph if node.op_type == "Conv"]
    (relu,) = [node for node in net.graph if node.op_type == "Relu"]
    found = calibrate(net, [{"image": images(4)}])
    before, after = found.ranges[str(conv.outputs[0].name)], found.ranges[str(relu.outputs[0].name)]
    assert before == after
    assert after.minimum == after.low == 0
    assert str(conv.outputs[0].name) not in plan(net).outputs


def test_what_moves_elements_is_not_looked_at_and_concat_adds_up() -> None:
    graph = model(
        """g (float[n, 4, 6, 6] x, float[4, 4, 1, 1] w) => (float[n, k] y) {
            a = Conv(x, w)
            p = MaxPool<kernel_shape = [2, 2]>(a)
            t = Transpose<perm = [0, 2, 3, 1]>(p)
            s = Sigmoid(p)
            back = Transpose<perm = [0, 3, 1, 2]>(t)
            c = Concat<axis = 1>(back, s)
            f = Flatten(c)
            y = Relu(f)
        }""",
        w=np.random.default_rng(0).normal(size=(4, 4, 1, 1)).astype(np.float32),
    )
    found = plan(graph)
    assert found.inputs == ("x",)
    assert found.outputs == ("a", "s", "y")
    assert dict(found.same) == {"p": "a", "t": "a", "back": "a", "f": "y"}
    assert dict(found.joined) == {"c": ("a", "s")}
    data = np.random.default_rng(1).normal(size=(8, 4, 6, 6)).astype(np.float32)
    ranges = calibrate(graph, [{"x": data}], method="minmax").ranges
    assert ranges["c"].minimum == min(ranges["a"].minimum, ranges["s"].minimum)
    assert ranges["c"].maximum == max(ranges["a"].maximum, ranges["s"].maximum)


ATTENTION = """g (float[n, s, 8] x, float[n, 1, s] mask, float[8, 8] w) => (float[n, s, 8] y) {
    q = MatMul(x, w)
    k = Transpose<perm = [0, 2, 1]>(x)
    scores = MatMul(q, k)
    masked = Add(scores, mask)
    p = Softmax(masked)
    y = MatMul(p, x)
}"""


def attention() -> ir.Model:
    return model(ATTENTION, w=np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32))


def test_a_mask_of_minus_infinity_is_no_error_and_has_no_range() -> None:
    rng = np.random.default_rng(0)
    batches = []
    for length in (5, 3, 9):  # sequences of several lengths, two inputs
        mask = np.zeros((2, 1, length), np.float32)
        mask[:, :, -1] = -math.inf
        batches.append({"x": rng.normal(size=(2, length, 8)).astype(np.float32), "mask": mask})
    found = calibrate(attention(), batches)
    assert found.samples == 6
    assert {"x", "q", "k", "scores", "p", "y"} == set(found.ranges)
    assert 0 <= found.ranges["p"].low <= found.ranges["p"].high <= 1


def test_nan_in_an_input_that_is_not_observed_is_refused() -> None:
    mask = np.zeros((2, 1, 4), np.float32)
    mask[1, 0, 0] = math.nan
    batch = {"x": np.ones((2, 4, 8), np.float32), "mask": mask}
    with pytest.raises(CalibrationError, match=r"input 'mask' holds NaN\n  at:   sample 1,"):
        calibrate(attention(), [batch])


@pytest.mark.parametrize(("bad", "word"), [(math.nan, "NaN"), (math.inf, "an infinite value")])
@pytest.mark.parametrize("sample", [0, 5, 11])
def test_an_input_that_is_not_finite_is_named_with_its_sample(
    net: ir.Model, bad: float, word: str, sample: int
) -> None:
    data = images(12)
    data[sample, 1, 2, 3] = bad
    with pytest.raises(CalibrationError) as caught:
        calibrate(net, [{"image": data[:7]}, {"image": data[7:]}])
    assert caught.value.what == f"input 'image' holds {word}"
    assert caught.value.where == f"sample {sample}, counted from 0"


@pytest.mark.parametrize("sample", [0, 4, 6])
def test_the_first_tensor_that_is_not_finite_is_named(sample: int) -> None:
    """Log of a negative number, in one sample, and layers after it."""
    graph = model(
        """g (float[n, 4] x, float[4, 4] w, float[1] one) => (float[n, 4] y) {
            shifted = Add(x, one)
            root = Sqrt(shifted)
            a = MatMul(root, w)
            r = Relu(a)
            y = MatMul(r, w)
        }""",
        w=np.ones((4, 4), np.float32),
        one=np.ones(1, np.float32),
    )
    data = np.abs(np.random.default_rng(0).normal(size=(7, 4))).astype(np.float32)
    data[sample, 2] = -5
    with pytest.raises(CalibrationError) as caught:
        calibrate(graph, [{"x": data}])
    assert caught.value.what == "tensor 'root' holds NaN"
    assert caught.value.where == f"sample {sample}, counted from 0"


def test_scalars_fixed_batches_and_other_dtypes_go_in_whole() -> None:
    graph = model(
        """g (float16[2, 4] x, float16 gain, int64[2] ids) => (float16[2, 4] y, int64[2] same) {
            a = Mul(x, gain)
            y = Sigmoid(a)
            same = Identity(ids)
        }"""
    )
    batch = {"x": np.full((2, 4), 3, np.float16), "gain": np.float16(2), "ids": np.arange(2)}
    batch["x"][0, 0] = -1
    found = calibrate(graph, [batch, batch], method="minmax")
    assert found.samples == 4
    assert (found.ranges["a"].minimum, found.ranges["a"].maximum) == (-2, 6)
    assert found.ranges["gain"].minimum == found.ranges["gain"].maximum == 2
    assert "ids" not in found.ranges


def test_channels_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    graph = model(
        """g (float[n, 5, 6] x, float[6, 4] w) => (float[n, 5, 4] y) {
            a = MatMul(x, w)
            y = Relu(a)
        }""",
        w=rng.normal(size=(6, 4)).astype(np.float32),
    )
    data = rng.normal(size=(9, 5, 6)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)
    found = calibrate(graph, [{"x": data[:4]}, {"x": data[4:]}], channels=True)
    np.testing.assert_allclose(found.channel_amax["x"], np.abs(data).max(axis=(0, 1)), rtol=1e-6)
    weight = graph.graph.initializers["w"].const_value
    assert weight is not None
    np.testing.assert_allclose(found.channel_mean["a"], (data @ weight.numpy()).mean(axis=(0, 1)), rtol=1e-4)
    assert calibrate(graph, [{"x": data}]).channel_amax == {}


class Interrupted(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("after", [1, 2, 4])
def test_what_was_gathered_before_an_interruption_is_not_lost(net: ir.Model, tmp_path: Path, after: int) -> None:
    data = images(25)
    pieces = [data[i : i + 5] for i in range(0, 25, 5)]

    def until() -> Iterator[dict[str, np.ndarray]]:
        for number, piece in enumerate(pieces):
            if number == after:
                raise Interrupted
            yield {"image": piece}

    state = tmp_path / "state"
    with pytest.raises(Interrupted):
        calibrate(net, until(), state=state, channels=True)
    assert state.exists()
    seen: list[int] = []
    # other batches than before: samples are counted, not batches
    resumed = calibrate(
        net,
        [{"image": data[:7]}, {"image": data[7:]}],
        state=state,
        resume=True,
        channels=True,
        on_progress=seen.append,
    )
    assert min(seen) > 5 * after
    assert not state.exists()
    whole = calibrate(net, [{"image": data}], channels=True)
    close(whole, resumed, rel=2e-2)
    for name, amax in whole.channel_amax.items():
        np.testing.assert_allclose(resumed.channel_amax[name], amax, rtol=1e-5)
    for name, mean in whole.channel_mean.items():
        np.testing.assert_allclose(resumed.channel_mean[name], mean, rtol=1e-4, atol=1e-5)


def test_a_killed_process_leaves_a_state_to_resume(tmp_path: Path) -> None:
    """SIGKILL in the middle: the last whole state is there."""
    path = save(conv_net(), tmp_path / "net.onnx")
    code = f"""
import os, signal, sys
from pathlib import Path
import numpy as np
from toolchain.calibration import observe
data = np.random.default_rng(0).normal(size=(20, 3, 16, 16)).astype(np.float32)
def batches():
    for i in range(0, 20, 2):
        if i == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        yield {{"image": data[i:i + 2]}}
observe(Path({str(path)!r}), batches(), state=Path({str(tmp_path / "state")!r}), state_seconds=0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    data = images(20)
    seen: list[int] = []
    resumed = calibrate(
        path, [{"image": data}], method="minmax", state=tmp_path / "state", resume=True, on_progress=seen.append
    )
    assert 2 < min(seen)
    close(calibrate(path, [{"image": data}], method="minmax"), resumed)


def test_a_state_of_something_else_is_refused(net: ir.Model, tmp_path: Path) -> None:
    state = tmp_path / "state"
    found = observe(net, [{"image": images(4)}])
    found.save(state)
    other = optimised(conv_net(seed=1))
    for what, options in (("graph", {}), ("sampled", {"sampled": None}), ("data", {"data": "other"})):
        graph = other if what == "graph" else net
        with pytest.raises(CalibrationError, match=f"written for another .*{what}"):
            observe(graph, [{"image": images(4)}], state=state, resume=True, **options)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="has seen 4 samples, the data has only 3"):
        observe(net, [{"image": images(3)}], state=state, resume=True)
    content = state.read_bytes()
    for damaged in (b"", content[:100], content[: len(content) // 2], b"nonsense"):
        state.write_bytes(damaged)
        with pytest.raises(CalibrationError, match="cannot go on from this state"):
            observe(net, [{"image": images(4)}], state=state, resume=True)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], CalibrationError, "no samples"),
        ([{"image": np.zeros((0, 3, 16, 16), np.float32)}], CalibrationError, "no samples"),
        ([{"picture": images(2)}], DataError, "image"),
        ([{"image": images(2), "other": images(2)}], DataError, "other"),
        ([{"image": images(2).astype(np.float64)}], DataError, "float64"),
        ([{"image": images(2)[:, :2]}], DataError, "3"),
        ([{"image": images(2)}, {"image": images(2)[0]}], DataError, "image"),
        ([images(2)], DataError, "a batch is a ndarray"),
    ],
)
def test_samples_that_do_not_fit_are_refused(net: ir.Model, batches: Any, error: type[Error], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        calibrate(net, batches)
    if error is DataError:
        assert caught.value.where == f"batch {len(batches) - 1}"


def test_unknown_methods_and_percentiles_are_refused_before_anything_runs(net: ir.Model) -> None:
    def never() -> Iterator[dict[str, np.ndarray]]:
        raise AssertionError("the data was read")
        yield {}

    with pytest.raises(CalibrationError, match="there is no method 'best'"):
        calibrate(net, never(), method="best")  # type: ignore[arg-type]
    for percentile in (50, 0, 101, math.nan):
        with pytest.raises(CalibrationError, match="percentile is"):
            calibrate(net, never(), percentile=percentile)


def test_a_graph_without_anything_to_quantise_is_refused() -> None:
    graph = model("g (int64[n] x) => (int64[n] y) { y = Identity(x) }")
    with pytest.raises(CalibrationError, match="nothing in this graph"):
        calibrate(graph, [{"x": np.zeros(3, np.int64)}])


# Files.


def test_a_file_is_read_back_as_it_was_and_is_readable(net: ir.Model, tmp_path: Path) -> None:
    found = calibrate(net, [{"image": images(6)}], channels=True)
    path = tmp_path / "net.calibration.json"
    calibrations.write(found, path)
    again = calibrations.read(path)
    close(found, again, rel=1e-8)
    assert {n: r.method for n, r in again.ranges.items()} == {n: r.method for n, r in found.ranges.items()}
    for name, amax in found.channel_amax.items():
        np.testing.assert_allclose(again.channel_amax[name], amax, rtol=1e-6)
    text = path.read_text()
    assert len([line for line in text.splitlines() if '"low"' in line]) == len(found.ranges)
    assert str(tmp_path) not in text
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(format="other"), "not a calibration"),
        (lambda t: t.update(version=2), "version 2"),
        (lambda t: t.pop("graph"), "damaged"),
        (lambda t: t["ranges"]["image"].pop("low"), "damaged: 'low'"),
        (lambda t: t["ranges"]["image"].update(low="0"), "something else than finite numbers"),
        (lambda t: t["ranges"]["image"].update(low=9e9), "is empty"),
        (lambda t: t["ranges"]["image"].update(amax=-1.0), "is empty"),
        (lambda t: t.update(ranges=[]), "damaged"),
    ],
)
def test_a_damaged_file_is_refused(net: ir.Model, tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "c.json"
    calibrations.write(calibrate(net, [{"image": images(2)}]), path)
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(CalibrationError, match=message):
        calibrations.read(path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no such calibration"):
        calibrations.read(tmp_path / "missing.json")
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": "toolchain-calibration", "ranges": NaN'):
        (tmp_path / "c.json").write_bytes(content)
        with pytest.raises(CalibrationError, match="not a calibration"):
            calibrations.read(tmp_path / "c.json")


def test_the_digest_is_of_the_graph_and_of_nothing_else() -> None:
    proto = conv_net()
    digest = graph_digest(ir.from_proto(proto))
    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    plain.doc_string, plain.producer_name, plain.graph.name = "other", "someone", "renamed"
    plain.metadata_props.add(key="path", value="somewhere")
    for node in plain.graph.node:
        node.doc_string, node.name = "text", f"n_{node.name}"
    assert graph_digest(ir.from_proto(onnx.shape_inference.infer_shapes(plain))) == digest
    for change in (
        lambda p: p.graph.node[0].attribute[0].ints.__setitem__(0, 0),
        lambda p: p.graph.node[2].output.__setitem__(0, "other"),
        lambda p: p.graph.initializer[0].CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(proto.graph.initializer[0]) * 2, "w")
        ),
    ):
        other = onnx.ModelProto()
        other.CopyFrom(proto)
        change(other)
        assert graph_digest(ir.from_proto(other)) != digest


def test_match_names_what_no_longer_fits(net: ir.Model) -> None:
    found = calibrate(net, [{"image": images(2)}])
    assert calibrations.match(found, net) == calibrations.Mismatch(True, (), ())
    changed = net.clone()
    (relu,) = [node for node in changed.graph if node.op_type == "Relu"]
    old = str(relu.outputs[0].name)
    relu.outputs[0].name = f"{old}_renamed"
    mismatch = calibrations.match(found, changed)
    assert not mismatch.same_graph
    assert old in mismatch.missing
    assert f"{old}_renamed" in mismatch.new
    with pytest.raises(CalibrationError, match=rf"'{old}_renamed' has no range; it has '{old}'") as caught:
        calibrations.require_match(found, changed, where="c.json")
    assert caught.value.where == "c.json"


def test_a_calibration_of_the_export_serves_the_optimised_graph() -> None:
    proto = conv_net()
    raw = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    found = calibrate(raw, [{"image": images(4)}])
    assert "conv" not in found.ranges  # BatchNormalization is computed into it
    calibrations.require_match(found, optimised(proto))


def test_a_model_without_recorded_types_is_calibrated(tmp_path: Path) -> None:
    proto = conv_net()
    assert not proto.graph.value_info
    path = save(proto, tmp_path / "net.onnx")
    found = calibrate(path, [{"image": images(3)}])
    assert {"image", "bn", "relu", "pool", "flat", "logits"} == set(found.ranges)


_MEMORY = """
import sys
import numpy as np
from pathlib import Path
from toolchain.calibration import calibrate
count = int(sys.argv[2])
rng = np.random.default_rng(0)
batches = ({"image": rng.normal(size=(16, 3, 96, 96)).astype(np.float32)} for _ in range(count // 16))
calibrate(Path(sys.argv[1]), batches)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    proto = conv_net(channels=64)
    for value in (proto.graph.input[0],):
        value.type.tensor_type.shape.dim[2].dim_value = value.type.tensor_type.shape.dim[3].dim_value = 96
    path = save(proto, tmp_path / "net.onnx")

    def peak(count: int) -> int:
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY, path, str(count)], capture_output=True, text=True, cwd=ROOT, check=True
        )
        return int(done.stdout) * 1024

    few, many = peak(64), peak(512)
    # kept activations would be 512 x 64 x 96 x 96 floats, over a gigabyte
    assert many < few + 16e6


def test_real_weights_on_real_images(assets: Path) -> None:
    """CIFAR-10 through ResNet-20: every method's range lies within what was seen, percentiles match numpy's."""
    from PIL import Image

    path = next((assets / "models" / "cifar10-resnets").glob("*20*.onnx"))
    file = next(f for f in sorted((assets / "cifar10").glob("*.png")) if "train" in f.name or "calib" in f.name)
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 32, 32, 3)[:96] / 255
    data = ((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(0, 3, 1, 2).astype(np.float32)
    graph = ir.load(path)
    optimize(graph, Recipe(model="x").pipeline())
    found = observe(graph, [{"input": data[:50]}, {"input": data[50:]}])
    relu = next(str(node.outputs[0].name) for node in graph.graph if node.op_type == "Relu")
    with reference_session(graph, extra_outputs=[relu]) as session:
        values = session.run({"input": data})[relu]
    range_ = found.calibration(method="percentile", percentile=99.0).ranges[relu]
    assert range_.maximum == pytest.approx(float(values.max()), rel=1e-5)
    assert range_.amax == pytest.approx(float(np.percentile(values, 99)), rel=0.02)
    for method in METHODS:
        for r in found.calibration(method=method).ranges.values():  # type: ignore[arg-type]
            assert r.minimum <= r.low <= r.high <= r.maximum
            assert 0 < r.amax <= max(-r.minimum, r.maximum)


# The command.


@pytest.fixture
def work(tmp_path: Path) -> Path:
    save(conv_net(), tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", image=images(10))
    return tmp_path


def test_the_command_writes_what_calibrate_gives(work: Path) -> None:
    said = toolchain_json("calibrate", "net.onnx", "--data", "data.npz", "--histograms", "--limit", "6", cwd=work)
    assert said["output"] == "net.onnx.calibration.json" or said["output"] == "net.calibration.json"
    assert said["samples"] == 6
    found = calibrations.read(work / said["output"])
    assert said["tensors"] == len(found.ranges) == sum(said["methods"].values())
    with np.load(work / said["histograms"], allow_pickle=False) as archive:
        assert int(archive["samples"]) == 6
    assert not (work / f"{said['output']}.state").exists()


def test_fewer_samples_than_asked_for_are_told(work: Path) -> None:
    said = toolchain_json("calibrate", "net.onnx", "--data", "data.npz", "--limit", "64", cwd=work)
    assert (said["samples"], said["asked"]) == (10, 64)
    assert (
        "only 10 of 64 samples"
        in toolchain("calibrate", "net.onnx", "--data", "data.npz", "--limit", "64", "-o", "a.json", cwd=work).stdout
    )
    found = calibrations.read(work / "a.json")
    assert (found.samples, found.asked) == (10, 64)
    command = ("build", "net.onnx", "--precision", "int8", "--calibration", "a.json")
    report = toolchain_json(*command, cwd=work)["report"]
    assert report["calibration"]["asked"] == 64
    assert report["warnings"] == ["calibration saw 10 of 64 samples"]
    (work / "a.json.state").write_bytes(b"PK")
    shown = toolchain(*command, "-o", "other", cwd=work).stdout
    assert "warning: calibration saw 10 of 64 samples" in shown
    assert "warning: beside a.json lies the state of a later calibration that was interrupted" in shown
    refused = toolchain("build", "net.onnx", "--precision", "int8", "--calibration", "a.json.state", cwd=work, check=2)
    assert "a .state of one that was interrupted" in refused.stderr


def test_an_artifact_in_int8_alone_is_calibrated_and_what_lacks_a_range_is_told(work: Path) -> None:
    toolchain("build", "net.onnx", "--precision", "int8", "--data", "data.npz", cwd=work)
    toolchain("calibrate", "artifacts/net", "--data", "data.npz", "-o", "again.json", cwd=work)
    ours, again = calibrations.read(work / "artifacts/net/calibration.json"), calibrations.read(work / "again.json")
    close(ours, again)
    assert ours.graph == again.graph  # the very graph that was quantised, not the exported one
    tree = json.loads((work / "again.json").read_text())
    del tree["ranges"]["relu"]
    (work / "partial.json").write_text(json.dumps(tree))
    command = ("build", "net.onnx", "--precision", "int8", "--calibration", "partial.json", "-o", "partial")
    found = toolchain_json(*command, cwd=work)["report"]
    assert "relu" in found["calibration"]["without_range"]
    assert any("has no range for" in w and "relu" in w for w in found["warnings"])


def test_a_tensorrt_cache_may_cover_a_part_of_the_optimised_graph(work: Path) -> None:
    toolchain(
        "calibrate", "net.onnx", "--data", "data.npz", "-o", "a.json", "--export-tensorrt-cache", "a.cache", cwd=work
    )
    lines = [line for line in (work / "a.cache").read_text().splitlines() if not line.startswith(("pool:", "flat:"))]
    (work / "b.cache").write_text("\n".join(lines) + "\n")
    toolchain("calibrate", "net.onnx", "--import-tensorrt-cache", "b.cache", "-o", "b.json", cwd=work)
    command = ("build", "net.onnx", "--precision", "int8", "--calibration", "b.json")
    assert "pool" in toolchain_json(*command, cwd=work)["report"]["calibration"]["without_range"]


def test_the_command_goes_by_way_of_a_tensorrt_cache(work: Path) -> None:
    toolchain(
        "calibrate", "net.onnx", "--data", "data.npz", "-o", "a.json", "--export-tensorrt-cache", "a.cache", cwd=work
    )
    said = toolchain_json("calibrate", "net.onnx", "--import-tensorrt-cache", "a.cache", "-o", "b.json", cwd=work)
    assert said["unknown"] == said["without_range"] == []
    one, other = calibrations.read(work / "a.json"), calibrations.read(work / "b.json")
    assert set(one.ranges) == set(other.ranges)
    for name, range_ in one.ranges.items():
        assert other.ranges[name].amax == pytest.approx(range_.amax, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "where do the ranges come from?"),
        (["--data", "data.npz", "--import-tensorrt-cache", "x"], "where do the ranges come from?"),
        (["--data", "missing.npz"], "no such dataset"),
        (["--data", "data.npz", "--method", "best"], "there is no method 'best'"),
        (["--import-tensorrt-cache", "missing.cache"], "cannot read the TensorRT cache"),
        (["--data", "data.npz", "--preprocessing", "nothing"], "neither a zoo name nor a readable .json file"),
        (["--data", "data.npz", "--batch-size", "0"], "0 is not a number of samples"),
        (["--data", "data.npz", "--batch-size", "1000000000"], "1 to 4,096"),
        (["--data", "data.npz", "--limit", "-1"], "-1 is not a number of samples"),
        (["--data", "data.npz", "--percentile", "200"], "percentile is 200"),
        (["--data", "data.npz", "--percentile", "nan"], "percentile is nan"),
        (["--data", "data.npz", "-o", "."], "there is a folder of that name"),
        (["--data", "data.npz", "-o", "a", "--export-tensorrt-cache", "a"], "the cache would replace the calibration"),
        (["--import-tensorrt-cache", "x", "--limit", "3"], "it has no effect on a TensorRT cache"),
    ],
)
def test_the_command_says_what_is_wrong(work: Path, arguments: list[str], message: str) -> None:
    done = toolchain("calibrate", "net.onnx", *arguments, cwd=work, check=2)
    assert message in done.stderr
    assert sorted(p.name for p in work.iterdir()) == ["data.npz", "net.onnx"]


def test_the_command_resumes_after_ctrl_c(work: Path) -> None:
    (work / "data.py").write_text(
        """
import os, signal
from pathlib import Path
import numpy as np

def batches():
    data = np.load("data.npz")["image"]
    for i in range(0, 10, 2):
        if i == 6 and not Path("inter" + "rupted").exists():
            Path("inter" + "rupted").touch()
            os.kill(os.getpid(), signal.SIGINT)
        yield {"image": data[i:i + 2]}
"""
    )
    command = ["calibrate", "net.onnx", "--data", "data.py:batches", "--method", "minmax"]
    done = toolchain(*command, cwd=work, check=130)
    assert "--resume goes on from there" in done.stderr
    (state,) = work.glob("*.state")
    with np.load(state) as archive:
        assert 4 <= archive["samples"] <= 6
    said = toolchain_json(*command, "--resume", cwd=work)
    assert said["samples"] == 10
    assert not state.exists()
    whole = toolchain_json(
        "calibrate", "net.onnx", "--data", "data.npz", "--method", "minmax", "-o", "w.json", cwd=work
    )
    close(calibrations.read(work / whole["output"]), calibrations.read(work / said["output"]))


def test_ranges_are_values(net: ir.Model) -> None:
    found = calibrate(net, [{"image": images(2)}])
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.samples = 3  # type: ignore[misc]
