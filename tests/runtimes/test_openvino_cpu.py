"""openvino-cpu: options, the cache of compiled models, what it computes in, and what OpenVINO's errors become."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from runtime_support import save_model, save_with_data

import runtimes
from runtimes import _digests, _openvino_cache, openvino_cpu
from runtimes.openvino_cpu import BACKEND

if not (_state := BACKEND.probe()).available:
    pytest.skip(f"openvino-cpu: {_state.reason}", allow_module_level=True)

RELU = "g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }"
X = np.array([[-1, 0, 2]], "float32")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOOLCHAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


def load(path: Path, **options: Any) -> runtimes.Session:
    return runtimes.load(path, target="openvino-cpu", options=options or None)


def settle(*paths: Path) -> None:
    """Waits until files are old enough to be known by their times."""
    newest = max(path.stat().st_ctime_ns for path in paths)
    time.sleep(max(newest + _digests.TICK_NS + 5_000_000 - time.time_ns(), 0) / 1e9)


# --- options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hint": "fast"}, "one of latency, throughput"),
        ({"precision": "int8"}, "one of f32, bf16, f16"),
        ({"threads": -1}, "from 0 to 4096"),
        ({"threads": True}, "from 0 to 4096"),
        ({"cache": 1}, "true or false"),
        ({"threds": 1}, "it has: hint, threads, precision, cache"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(runtimes.InvalidInput, match=said):
        load(save_model(tmp_path / "m.onnx", RELU), **options)


def test_options_of_another_backend(tmp_path: Path) -> None:
    from runtimes.ort_cpu import OrtCpuOptions

    compiled = runtimes.Compiled(runtimes.Target("openvino-cpu"), tmp_path, model_file="m.onnx")
    with pytest.raises(runtimes.InvalidInput, match="OpenVinoOptions, not a OrtCpuOptions"):
        BACKEND.load(compiled, options=OrtCpuOptions())


def test_a_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(runtimes.TargetUnavailable, match="no device 'gpu'"):
        runtimes.load(save_model(tmp_path / "m.onnx", RELU), target="openvino-cpu:gpu")


def test_options_reach_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    core = openvino_cpu._core()

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(core, name)

        def compile_model(self, *arguments: Any) -> Any:
            made.append(core.compile_model(*arguments))
            return made[-1]

    monkeypatch.setattr(openvino_cpu, "_core", Spy)
    file = save_model(tmp_path / "m.onnx", RELU)
    load(file)
    assert made[-1].get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert made[-1].get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
    assert made[-1].get_property("PERFORMANCE_HINT") == "LATENCY"
    session = load(file, hint="throughput", threads=1, cache=False)
    assert made[-1].get_property("PERFORMANCE_HINT") == "THROUGHPUT"
    assert made[-1].get_property("INFERENCE_NUM_THREADS") == 1
    assert (session.info["hint"], session.info["threads"], session.info["cache"]) == ("throughput", "1", "off")


def test_precision(tmp_path: Path) -> None:
    """f32 is exact on what bf16 rounds away; a precision that the CPU lacks is refused by name."""
    file = save_model(
        tmp_path / "m.onnx", "g (float[N, 64] a, float[64, 64] b) => (float[N, 64] y) { y = MatMul(a, b) }"
    )
    feeds = {"a": np.full((4, 64), 1 + 2.0**-12, "float32"), "b": np.eye(64, dtype="float32")}
    assert np.array_equal(load(file).run(feeds)["y"], feeds["a"])
    able = openvino_cpu._core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for precision, name in (("bf16", "BF16"), ("f16", "FP16")):
        if name in able:
            result = load(file, precision=precision).run(feeds)["y"]
            assert result.dtype == np.float32
            assert 0 < np.abs(result - feeds["a"]).max() < 0.01
        else:
            with pytest.raises(runtimes.TargetUnavailable, match=f"does not compute in {precision}"):
                load(file, precision=precision)


# --- what is compiled


def test_compiled_is_the_portable_model(tmp_path: Path) -> None:
    file = save_with_data(tmp_path / "in" / "m.onnx")
    (tmp_path / "in" / "w.bin").write_bytes(np.arange(4, dtype="float32").tobytes())
    compiled = runtimes.compile(file, "openvino-cpu", tmp_path / "out")
    assert (compiled.model_file, compiled.prepared_file, compiled.remarks) == ("model.onnx", None, ())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.onnx", "w.bin"]
    shutil.rmtree(tmp_path / "in")
    session = BACKEND.load(compiled)
    assert session.run({"x": np.ones(4, "float32")})["y"].tolist() == [1, 2, 3, 4]


def test_float64_is_said(tmp_path: Path) -> None:
    file = save_model(tmp_path / "m.onnx", "g (double[N] x) => (double[N] y) { [n] y = Exp(x) }")
    compiled = runtimes.compile(file, "openvino-cpu", tmp_path / "out")
    assert compiled.remarks == ("OpenVINO computes float64 in float32: 1 nodes, the first is 'y'",)
    assert BACKEND.load(compiled).info["remarks"] == compiled.remarks[0]


@pytest.mark.parametrize("kind", ["int64", "uint32", "uint64"])
def test_integers_beyond_int32_are_refused(tmp_path: Path, kind: str) -> None:
    session = load(save_model(tmp_path / "m.onnx", f"g ({kind}[N] x) => ({kind}[N] y) {{ y = Identity(x) }}"))
    largest = np.array([2**31 - 1, 0], kind)
    assert np.array_equal(session.run({"x": largest})["y"], largest)
    with pytest.raises(runtimes.InvalidInput, match="holds values from 0 to 2147483648"):
        session.run({"x": largest + np.array([1, 0], kind)})
    binding = session.bind({"x": (2,)})
    binding.inputs["x"][...] = 2**31
    with pytest.raises(runtimes.InvalidInput, match="would cut them silently"):
        binding.run()


def test_names_of_dimensions_survive(tmp_path: Path) -> None:
    file = save_model(
        tmp_path / "m.onnx",
        "g (float[batch, 3, ?] a, float[batch, K] b) => (float[batch, 3, M] y, float[K, batch] t) "
        "{ y = Relu(a)  t = Transpose(b) }",
    )
    session = load(file)
    assert [str(spec) for spec in session.inputs] == ["a: float32[batch, 3, ?]", "b: float32[batch, K]"]
    assert [str(spec) for spec in session.outputs] == ["y: float32[batch, 3, M]", "t: float32[K, batch]"]


def test_inputs_that_have_a_default_are_none(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 19]> g (float[2] x, float[2] w) => (float[2] y) '
        "<float[2] w = {1, 2}> { y = Add(x, w) }"
    )
    onnx.save(model, tmp_path / "m.onnx")
    session = load(tmp_path / "m.onnx")
    assert [spec.name for spec in session.inputs] == ["x"]
    assert session.run({"x": np.zeros(2, "float32")})["y"].tolist() == [1, 2]


def test_inputs_are_shared_not_written(tmp_path: Path) -> None:
    """Layers that could work in place must not do so in the caller's array; nothing later may write to results."""
    session = load(
        save_model(tmp_path / "m.onnx", "g (float[4] x) => (float[4] y) { a = Relu(x)  b = Neg(a)  y = Abs(b) }")
    )
    first, second = np.array([-1, 1, 2, 3], "float32"), np.array([9, 9, 9, 9], "float32")
    result = session.run({"x": first})["y"]
    session.run({"x": second})
    assert result.tolist() == [0, 1, 2, 3]
    assert first.tolist() == [-1, 1, 2, 3]
    assert result.flags.owndata
    assert result.flags.writeable


def test_requests_are_as_many_as_callers(tmp_path: Path) -> None:
    session = load(save_model(tmp_path / "m.onnx", RELU))
    for _ in range(20):
        session.run({"x": X})
    assert len(session._free) == 1  # type: ignore[attr-defined]
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        for _ in range(50):
            session.run({"x": X})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= len(session._free) <= 4  # type: ignore[attr-defined]


def test_bound_arrays_are_read_and_written_in_place(tmp_path: Path) -> None:
    session = load(save_model(tmp_path / "m.onnx", RELU))
    binding = session.bind({"x": (1, 3)})
    binding.inputs["x"][...] = X
    binding.run()
    assert binding.outputs["y"].tolist() == [[0, 0, 2]]
    assert binding._request.get_output_tensor(0).data.ctypes.data == binding.outputs["y"].ctypes.data  # type: ignore[attr-defined]
    assert binding._request.get_input_tensor(0).data.ctypes.data == binding.inputs["x"].ctypes.data  # type: ignore[attr-defined]


# --- the cache


def test_the_second_load_comes_from_the_cache(tmp_path: Path, cache: Path) -> None:
    file = save_model(tmp_path / "m.onnx", RELU)
    settle(file)
    first, second = load(file), load(file)
    assert (first.info["cache"], second.info["cache"]) == ("written", "used")
    assert first.inputs == second.inputs
    assert first.outputs == second.outputs
    assert second.run({"x": X})["y"].tolist() == [[0, 0, 2]]
    assert len(list(cache.iterdir())) == 1
    if hasattr(os, "getuid"):
        assert cache.stat().st_mode & 0o077 == 0


def test_another_model_or_configuration_is_another_entry(tmp_path: Path, cache: Path) -> None:
    file = save_model(tmp_path / "m.onnx", RELU)
    settle(file)
    load(file)
    assert load(file, hint="throughput").info["cache"] == "written"
    replaced = save_model(tmp_path / "other.onnx", RELU.replace("Relu", "Abs"))
    os.utime(replaced, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    os.replace(replaced, file)
    settle(file)
    session = load(file)
    assert session.info["cache"] == "written"
    assert session.run({"x": X})["y"].tolist() == [[1, 0, 2]]


def test_new_weights_beside_an_old_model_are_seen(tmp_path: Path) -> None:
    file = save_with_data(tmp_path / "m.onnx")
    for value in (1.0, 2.0):
        (tmp_path / "w.bin").write_bytes(np.full(4, value, "float32").tobytes())
        settle(file, tmp_path / "w.bin")
        for cached in ("written", "used"):
            session = load(file)
            assert session.info["cache"] == cached
            assert session.run({"x": np.zeros(4, "float32")})["y"].tolist() == [value] * 4


def test_a_file_that_was_just_written_is_not_cached(tmp_path: Path, cache: Path) -> None:
    file = save_model(tmp_path / "m.onnx", RELU)
    os.utime(file, ns=(0, time.time_ns() + 10**12))  # a clock that is off: still young for a quarter of an hour
    assert load(file).info["cache"] == "not used"
    assert not cache.exists()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_damaged_entry_is_made_again(tmp_path: Path, cache: Path, keep: float) -> None:
    file = save_model(tmp_path / "m.onnx", RELU)
    settle(file)
    load(file)
    (entry,) = cache.rglob("*.blob")
    content = entry.read_bytes()
    entry.chmod(0o600)
    entry.write_bytes(content[: int(len(content) * keep)])
    session = load(file)
    assert session.info["cache"] == "it was damaged, and is written again"
    assert session.run({"x": X})["y"].tolist() == [[0, 0, 2]]
    assert load(file).info["cache"] == "used"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows keeps rights in ACLs")
def test_an_entry_that_others_can_write_is_not_taken(tmp_path: Path, cache: Path) -> None:
    file = save_model(tmp_path / "m.onnx", RELU)
    settle(file)
    load(file)
    cache.chmod(0o777)
    assert load(file).info["cache"] != "used"


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, cache: Path) -> None:
    file = save_model(tmp_path / "m.onnx", RELU)
    settle(file)
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    session = load(file)
    assert session.info["cache"] == "not used: File exists"
    assert session.run({"x": X})["y"].tolist() == [[0, 0, 2]]


def test_the_least_recently_used_go_first(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [save_model(tmp_path / f"{index}.onnx", RELU) for index in range(3)]
    settle(*files)
    load(files[0])
    size = sum(path.stat().st_size for path in cache.rglob("*.blob"))
    monkeypatch.setattr(_openvino_cache, "_CAP", int(size * 2.5))
    (first,) = cache.iterdir()
    load(files[1])
    (second,) = set(cache.iterdir()) - {first}
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    assert load(files[0]).info["cache"] == "used"
    load(files[2])
    assert first.exists()
    assert not second.exists()
    assert len(list(cache.iterdir())) == 2


def test_a_full_disk_costs_time_only(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO says nothing where it cannot write, and leaves an empty folder."""
    file = save_model(tmp_path / "m.onnx", RELU)
    settle(file)
    compile = openvino_cpu._compile

    def without_cache(model: Any, checked: Any, config: dict[str, Any]) -> Any:
        return compile(model, checked, {key: value for key, value in config.items() if key != "CACHE_DIR"})

    monkeypatch.setattr(openvino_cpu, "_compile", without_cache)
    session = load(file)
    assert session.info["cache"] == "not used: OpenVINO could not write it"
    assert session.run({"x": X})["y"].tolist() == [[0, 0, 2]]
    assert list(cache.iterdir()) == []


def test_what_others_are_writing_is_not_evicted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_openvino_cache, "_CAP", 2)
    for name, age in (("tmp-young", 0), ("tmp-old", 7200)):
        (cache / name).mkdir(parents=True)
        (cache / name / "x.blob").write_bytes(bytes(100))
        os.utime(cache / name, (time.time() - age,) * 2)
    _openvino_cache._evict(cache / "keep")
    assert [path.name for path in cache.iterdir()] == ["tmp-young"]


def test_processes_that_write_at_once(tmp_path: Path, cache: Path) -> None:
    file = save_model(tmp_path / "m.onnx", RELU)
    settle(file)
    code = f"import runtimes; print(runtimes.load({str(file)!r}, target='openvino-cpu').info['cache'])"
    root = Path(runtimes.__file__).parent.parent
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(3)
    ]
    said = {child.communicate(timeout=60)[0].strip() for child in children}
    assert said <= {"written", "used", "written by another process meanwhile"}
    assert len(list(cache.iterdir())) == 1


# --- errors


@pytest.mark.parametrize(
    ("graph", "kind", "said"),
    [
        (
            "g (float[2] x) => (float[2] y) { a = Relu(x)  [n1] b = FooBar(a)  [n2] c = FooBar(b)  y = Abs(c) }",
            runtimes.CompileFailed,
            "no conversion for the op FooBar.*node 'n1', 'n2'.*ort-cpu",
        ),
        ("g (float[2] x) => (float[2] y) { y = Add(x, nope) }", runtimes.InvalidModel, 'no valid model.*\'?"nope"'),
        ("g (float[2, 3] x) => (float[2, 3] y) { y = Conv(x, x) }", runtimes.CompileFailed, "node 'y'"),
        ("g (string[N] x) => (string[N] y) { y = Identity(x) }", runtimes.CompileFailed, "'x' is a tensor of string"),
        (
            "g (seq(float[2]) x) => (float[2] y) { i = Constant<value_int=0>() y = SequenceAt(x, i) }",
            runtimes.Error,
            "",
        ),
    ],
    ids=["unknown-op", "no-such-value", "bad-shape", "string", "sequence"],
)
def test_refused_graphs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], graph: str, kind: type[Exception], said: str
) -> None:
    file = save_model(tmp_path / "m.onnx", graph)
    for attempt in (lambda: load(file), lambda: runtimes.compile(file, "openvino-cpu", tmp_path / "out")):
        with pytest.raises(kind) as caught:
            attempt()
        assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)
        assert "src/" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_failing_node_is_named(tmp_path: Path) -> None:
    session = load(save_model(tmp_path / "m.onnx", "g (float[N] a, float[M] b) => (float[K] y) { y = Add(a, b) }"))
    with pytest.raises(runtimes.RunFailed, match=r"Eltwise shape infer[^\n]*\n  at:   node 'y'") as caught:
        session.run({"a": np.ones(2, "float32"), "b": np.ones(3, "float32")})
    assert "src/" not in caught.value.what


def test_damaged_files_are_not_tried_as_other_formats(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """OpenVINO's own reader hands a file to each front end that it has, which print what they think of it."""
    content = save_model(tmp_path / "m.onnx", RELU).read_bytes()
    rng = np.random.default_rng(0)
    refused = []
    for _ in range(100):
        changed = bytearray(content)
        for position in rng.integers(0, len(content), 3):
            changed[position] = rng.integers(0, 256)
        (tmp_path / "m.onnx").write_bytes(changed)
        try:
            load(tmp_path / "m.onnx", cache=False).close()
        except runtimes.Error as error:
            refused.append(error.what)
    assert len(refused) > 20
    assert not [what for what in refused if "\n" in what]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name", ["cifar_resnet20", "mlperf_resnet8_float", "basic_pitch", "rapidocr_cls", "swift_f0_stft"]
)
def test_real_models_agree_with_onnx_runtime(assets: Path, name: str) -> None:
    (file,) = assets.glob(f"models/*/{name}.onnx")
    sizes = {"rapidocr_cls": [1, 3, 48, 192], "swift_f0_stft": [1, 16000]}
    with runtimes.load(file) as ort, load(file) as session:
        assert [(s.name, s.dtype) for s in session.inputs] == [(s.name, s.dtype) for s in ort.inputs]
        assert [(s.name, s.dtype) for s in session.outputs] == [(s.name, s.dtype) for s in ort.outputs]
        (spec,) = session.inputs
        shape = sizes.get(name, [d if isinstance(d, int) else 2 for d in spec.shape or ()])
        feeds = {spec.name: np.random.default_rng(0).standard_normal(shape).astype(spec.dtype)}
        theirs, ours = ort.run(feeds), session.run(feeds)
        for output, wanted in theirs.items():
            assert ours[output].shape == wanted.shape
            assert np.linalg.norm(ours[output] - wanted) <= 1e-4 * np.linalg.norm(wanted), output
