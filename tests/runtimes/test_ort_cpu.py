"""ort-cpu: options, the prepared form and its fingerprint, and what ONNX Runtime's errors become."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from runtime_support import save_model, save_with_data, variant_body, write_package

import runtimes
from runtimes.model_file import check_model_file
from runtimes.ort_cpu import BACKEND, OrtCpuOptions, fingerprint

ROOT = Path(__file__).resolve().parents[2]
RELU = "g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }"


def save_convolutions(path: Path) -> Path:
    """Three 3x3 convolutions of 16 channels with seeded weights: enough for ONNX Runtime to change the layout."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for index in range(3):
        weight = rng.standard_normal((16, 16, 3, 3)).astype("float32") / 12
        weights.append(onnx.numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(onnx.helper.make_node("Conv", [value, f"w{index}"], [f"c{index}"], pads=[1] * 4))
        value = "y" if index == 2 else f"r{index}"
        nodes.append(onnx.helper.make_node("Relu", [f"c{index}"], [value]))
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "g", [info("x", 1, ["N", 16, 12, 12])], [info("y", 1, ["N", 16, 12, 12])], weights
    )
    opset = onnx.helper.make_opsetid("", 19)
    onnx.save(onnx.helper.make_model(graph, ir_version=9, opset_imports=[opset]), path)
    return path


def run_raw(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    result: list[np.ndarray] = onnxruntime.InferenceSession(path, options).run(None, feeds)
    return result


# --- options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"graph_level": "most"}, "one of disabled, basic, extended, layout, all"),
        ({"graph_level": 1}, "graph_level is 1"),
        ({"intra_op_threads": -1}, "a whole number from 0 to 4096"),
        ({"intra_op_threads": 1.0}, "intra_op_threads is 1.0"),
        ({"intra_op_threads": True}, "intra_op_threads is True"),
        ({"inter_op_threads": 0}, "a whole number from 1"),
        ({"spinning": "no"}, "true or false"),
        ({"arena": None}, "true or false"),
    ],
)
def test_wrong_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(runtimes.InvalidInput, match=said):
        OrtCpuOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        *(OrtCpuOptions(graph_level=level) for level in ("disabled", "basic", "extended", "layout", "all")),
        OrtCpuOptions(intra_op_threads=1, arena=False, memory_pattern=False, spinning=False),
        OrtCpuOptions(intra_op_threads=2, inter_op_threads=2),
    ],
    ids=str,
)
def test_options_reach_onnx_runtime(tmp_path: Path, options: OrtCpuOptions) -> None:
    file = save_model(tmp_path / "m.onnx", RELU)
    session = runtimes.load(file, options=options)
    made = session._session.get_session_options()  # type: ignore[attr-defined]
    level = "DISABLE_ALL" if options.graph_level == "disabled" else f"ENABLE_{options.graph_level.upper()}"
    assert made.graph_optimization_level == getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    assert made.intra_op_num_threads == options.intra_op_threads
    assert made.enable_cpu_mem_arena == options.arena
    assert made.enable_mem_pattern == options.memory_pattern
    assert made.get_session_config_entry("session.intra_op.allow_spinning") == str(int(options.spinning))
    parallel = made.execution_mode == onnxruntime.ExecutionMode.ORT_PARALLEL
    assert parallel == (options.inter_op_threads > 1)
    assert session.run({"x": np.full((1, 3), -1, "float32")})["y"].tolist() == [[0, 0, 0]]


def test_a_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(runtimes.TargetUnavailable, match="no device 'gpu0'"):
        runtimes.load(save_model(tmp_path / "m.onnx", RELU), target="ort-cpu:gpu0")


def test_options_of_another_backend(tmp_path: Path) -> None:
    compiled = runtimes.compile(save_model(tmp_path / "m.onnx", RELU), "ort-cpu", tmp_path / "c")
    with pytest.raises(runtimes.InvalidInput, match="not a dict"):
        BACKEND.load(compiled, options={"arena": True})


# --- compile, and what it prepared


@pytest.fixture
def compiled(tmp_path: Path) -> runtimes.Compiled:
    source = save_convolutions(tmp_path / "source.onnx")
    return runtimes.compile(source, "ort-cpu", tmp_path / "compiled")


def test_compiled(compiled: runtimes.Compiled, tmp_path: Path) -> None:
    assert (compiled.model_file, compiled.prepared_file) == ("model.onnx", "prepared/model.onnx")
    assert compiled.fingerprint == fingerprint("all")
    assert (compiled.directory / "model.onnx").read_bytes() == (tmp_path / "source.onnx").read_bytes()
    prepared = check_model_file(compiled.directory / "prepared/model.onnx")
    assert prepared.data_files == (compiled.directory / "prepared/model.onnx.data",)
    assert "com.microsoft.nchwc" in prepared.opset_imports or "avx512" not in fingerprint("all")["cpu"]
    for file in compiled.directory.rglob("*"):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes()


def test_prepared_is_used_and_gives_the_same(compiled: runtimes.Compiled, tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((2, 16, 12, 12)).astype("float32")
    # Away from where it was made, and without the portable file: nothing outside its folder is needed.
    moved = dataclasses.replace(compiled, directory=compiled.directory.rename(tmp_path / "moved"))
    (moved.directory / "model.onnx").unlink()
    with BACKEND.load(moved) as session:
        assert (session.info["prepared"], session.info["file"]) == ("used", "prepared/model.onnx")
        made = session._session.get_session_options()  # type: ignore[attr-defined]
        assert made.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        outputs = session.run({"x": x})
        assert session.inputs == (runtimes.TensorSpec("x", "float32", ("N", 16, 12, 12)),)
        assert session.outputs == (runtimes.TensorSpec("y", "float32", ("N", 16, 12, 12)),)
    assert np.array_equal(outputs["y"], run_raw(tmp_path / "source.onnx", {"x": x})[0])


@pytest.mark.parametrize("key", ["onnxruntime", "build", "machine", "os", "cpu", "new-key"])
def test_any_difference_falls_back_with_a_word(compiled: runtimes.Compiled, key: str) -> None:
    other = {**compiled.fingerprint, key: "avx_of_old something"}
    word = "a cpu with avx_of_old something" if key == "cpu" else f"{key} 'avx_of_old something'"
    with pytest.warns(RuntimeWarning, match=word) as caught:
        session = BACKEND.load(dataclasses.replace(compiled, fingerprint=other))
    assert len(caught) == 1
    assert session.info["file"] == "model.onnx"
    assert word in session.info["prepared"]


def test_a_missing_field_falls_back(compiled: runtimes.Compiled) -> None:
    other = {key: value for key, value in compiled.fingerprint.items() if key != "cpu"}
    with pytest.warns(RuntimeWarning, match="a cpu without"):
        BACKEND.load(dataclasses.replace(compiled, fingerprint=other))


@pytest.mark.filterwarnings("error")
def test_another_graph_level_is_the_callers_own_choice(compiled: runtimes.Compiled) -> None:
    session = BACKEND.load(compiled, options=OrtCpuOptions(graph_level="basic"))
    assert session.info["prepared"] == "not used: it has graph_level all, not basic"


def test_nothing_to_fall_back_to(compiled: runtimes.Compiled) -> None:
    other = dataclasses.replace(compiled, fingerprint={}, model_file=None)
    with pytest.raises(runtimes.InvalidModel, match="nothing here can be loaded"):
        BACKEND.load(other)


def test_level_disabled_prepares_nothing(tmp_path: Path) -> None:
    source = save_model(tmp_path / "m.onnx", RELU)
    compiled = runtimes.compile(source, "ort-cpu", tmp_path / "c", options={"graph_level": "disabled"})
    assert compiled.prepared_file is None
    assert compiled.fingerprint == {}
    assert os.listdir(compiled.directory) == ["model.onnx"]
    assert "disabled" in compiled.remarks[0]
    assert "disabled" in BACKEND.load(compiled).info["prepared"]


def test_a_graph_that_cannot_be_saved_is_compiled_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ONNX Runtime says when it saves: the model itself is fine and stays usable."""
    from runtimes import ort_cpu

    real = ort_cpu.make_session

    def refuse_to_save(file: Path, options: Any, providers: Any) -> Any:
        if options.optimized_model_filepath:
            raise runtimes.CompileFailed("cannot save")
        return real(file, options, providers)

    monkeypatch.setattr(ort_cpu, "make_session", refuse_to_save)
    compiled = runtimes.compile(save_model(tmp_path / "m.onnx", RELU), "ort-cpu", tmp_path / "c")
    assert compiled.prepared_file is None
    assert compiled.remarks == ("ONNX Runtime could not save its optimised graph: cannot save",)
    assert os.listdir(compiled.directory) == ["model.onnx"]


def test_external_data_comes_along(tmp_path: Path) -> None:
    source = save_with_data(tmp_path / "in" / "m.onnx", location="deep/w.bin")
    (tmp_path / "in" / "deep").mkdir()
    (tmp_path / "in" / "deep" / "w.bin").write_bytes(np.arange(4, dtype="<f4").tobytes())
    compiled = runtimes.compile(source, "ort-cpu", tmp_path / "c")
    shutil.rmtree(tmp_path / "in")
    for without in (compiled, dataclasses.replace(compiled, prepared_file=None)):
        with BACKEND.load(without) as session:
            assert session.run({"x": np.ones(4, "float32")})["y"].tolist() == [1, 2, 3, 4]


def test_external_data_with_our_own_names(tmp_path: Path) -> None:
    source = save_with_data(tmp_path / "m.onnx", location="model.onnx")
    (tmp_path / "model.onnx").write_bytes(bytes(16))
    with pytest.raises(runtimes.InvalidModel, match="uses itself"):
        runtimes.compile(source, "ort-cpu", tmp_path / "c")


def test_a_full_directory_is_refused(tmp_path: Path) -> None:
    source = save_model(tmp_path / "m.onnx", RELU)
    with pytest.raises(runtimes.InvalidInput, match="not empty"):
        runtimes.compile(source, "ort-cpu", tmp_path)


def test_assets_survive_being_prepared(assets: Path, tmp_path: Path) -> None:
    """Real graphs, with If, Loop, LSTM and STFT in them: the prepared form computes the same bits."""
    feeds = {
        "rapidocr_cls": {"x": (1, 3, 48, 48)},
        "basic_pitch": None,
        "silero_vad": {"input": (1, 576), "state": (2, 1, 128), "sr": None},
        "plcmos_v2_gru": None,
        "swift_f0_stft": None,
        "chars2vec_loop": None,
    }
    shapes = {
        "basic_pitch": [(1, 43844, 1)],
        "plcmos_v2_gru": [(1, 1, 48, 257), (1, 64)],
        "swift_f0_stft": [(1, 16000)],
        "chars2vec_loop": [(1, 16, 59)],
    }
    rng = np.random.default_rng(0)
    for name in feeds:
        source = assets / "models" / "onnx-graphs" / f"{name}.onnx"
        compiled = runtimes.compile(source, "ort-cpu", tmp_path / name)
        assert compiled.prepared_file, (name, compiled.remarks)
        with BACKEND.load(compiled) as session:
            known = feeds[name] or dict(zip([spec.name for spec in session.inputs], shapes[name], strict=True))
            given = {
                key: np.array(16000) if shape is None else rng.standard_normal(shape).astype("float32") / 10
                for key, shape in known.items()
            }
            outputs = session.run(given)
        wanted = run_raw(source, given)
        for output, want in zip(outputs.values(), wanted, strict=True):
            assert np.array_equal(output, want), name


def test_only_the_prepared_files_are_verified(compiled: runtimes.Compiled, tmp_path: Path) -> None:
    root = tmp_path / "artifact"
    shutil.move(compiled.directory, root / "v")
    extra = {"prepared_file": "prepared/model.onnx", "fingerprint": dict(compiled.fingerprint)}
    write_package(root, {"v": variant_body("v", **extra)})
    content = bytearray((root / "v" / "model.onnx").read_bytes())
    content[-1] ^= 1
    (root / "v" / "model.onnx").write_bytes(content)
    with runtimes.load(root) as session:  # the portable file is damaged, but not needed
        assert session.info["prepared"] == "used"
    manifest = json.loads((root / "manifest.json").read_text())
    ours = manifest["components"]["model"]["variants"]["v"]["executor_info"]["toolchain"]
    ours["fingerprint"]["cpu"] = "another"
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(runtimes.InvalidArtifact, match=r"v/model\.onnx"):
        runtimes.load(root)
    (root / "v" / "prepared" / "model.onnx.data").write_bytes(b"\0")
    ours["fingerprint"]["cpu"] = fingerprint("all")["cpu"]
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(runtimes.InvalidArtifact, match=r"prepared/model\.onnx\.data"):
        runtimes.load(root)


# --- errors


@pytest.mark.parametrize(
    ("graph", "error", "said"),
    [
        ("=> (float[N] y) { y = NoSuchOp(x) }", runtimes.InvalidModel, "No Op registered for NoSuchOp"),
        ("=> (float[N] y) { y = com.example.Thing(x) }", runtimes.CompileFailed, "Thing.*no kernel for this op"),
        (
            "=> (float[N] y) { i = Cast<to = 5>(x)  r = Relu(i)  y = Cast<to = 1>(r) }",
            runtimes.CompileFailed,
            "Could not find an implementation for Relu.*no kernel",
        ),
        ("=> (int64[N] y) { y = Relu(x) }", runtimes.InvalidModel, "no valid model: Type Error"),
        ("=> (float[N] y) { y = Relu(z) }", runtimes.InvalidModel, "'z' is not a graph input"),
        ("=> (float[N] y) { a = Relu(b)  b = Relu(a)  y = Add(x, a) }", runtimes.InvalidModel, "not acyclic"),
        ("=> (float[N] y) { y = Relu(x)  y = Neg(x) }", runtimes.InvalidModel, "Duplicate definition"),
        ("=> (float[N] y) { y = MatMul(x) }", runtimes.InvalidModel, "input size 1"),
    ],
)
def test_refused_graphs(
    tmp_path: Path, graph: str, error: type[runtimes.Error], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    header = '<ir_version: 9, opset_import: ["": 19, "com.example": 1]>\n'
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(f"{header} g (float[N] x) {graph}"), path)
    for call in (lambda: runtimes.load(path), lambda: runtimes.compile(path, "ort-cpu", tmp_path / "c")):
        with pytest.raises(error) as caught:
            call()
        text = " ".join(str(caught.value).split())
        assert "m.onnx" in text or "model.onnx" in text
        assert "onnxruntime::" not in text
        assert re.search(said, text), text
        assert "ONNXRuntimeError" not in text
        assert "onnxruntime_src" not in text
    assert capfd.readouterr().err == ""


def test_an_opset_of_the_future(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx", RELU)
    model = onnx.load(path)
    model.opset_import[0].version = 999
    path.write_bytes(model.SerializeToString())
    with pytest.raises(runtimes.CompileFailed, match="Opset 999 is under development") as caught:
        runtimes.load(path)
    assert "onnxruntime::" not in str(caught.value)
    assert "upgrade onnxruntime" in str(caught.value)


def test_damaged_inside(tmp_path: Path) -> None:
    """The shell is sound, a node is not: the scanner steps over it and ONNX Runtime's parser says no."""
    path = save_model(tmp_path / "m.onnx", RELU)
    path.write_bytes(path.read_bytes().replace(b"Relu", b"Re\xff\xff"))
    with pytest.raises(runtimes.Error):
        runtimes.load(path)


def test_sequences_are_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx", "g (float[N] x) => (seq(float[N]) y) { y = SequenceConstruct(x) }")
    with pytest.raises(runtimes.InvalidModel, match=r"'y' is a seq\(tensor\(float\)\)"):
        runtimes.load(path)


def test_a_failing_node_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 19]> '
        "g (float[N] x, int64[1] shape) => (float[M] y) { y = Reshape(x, shape) }"
    )
    model.graph.node[0].name = "the/reshape"
    onnx.save(model, path)
    with pytest.raises(runtimes.RunFailed) as caught:
        runtimes.load(path).run({"x": np.ones(4, "float32"), "shape": np.array([3])})
    assert caught.value.where == "node 'the/reshape'"
    assert "onnxruntime_src" not in caught.value.what


#: In a process of its own: what a large heap does with what is given back, is another matter.
TRIMS = """
import os, sys, numpy, runtimes

def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

session = runtimes.load(sys.argv[1], options={"arena": sys.argv[2] == "True"})
few, many = ({"x": numpy.zeros((rows, 1024), "float32")} for rows in (2, 8192))
first = session.run(few)["y"]
session.trim()
before = resident_mb()
for _ in range(2):
    session.run(many)
    session.run(few)
    held = resident_mb() - before
    assert held >= float(sys.argv[3]), f"{held} MB: the test proves nothing"
    session.trim()
    kept = resident_mb() - before
    assert kept < 10, f"{kept} MB of {held}"
assert numpy.array_equal(session.run(few)["y"], first)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(("arena", "kept"), [(True, 60), (False, 0)])
def test_memory_of_a_large_run_is_given_back(tmp_path: Path, arena: bool, kept: float) -> None:
    """What the arena kept is given back without a run of the model, and taken again by the next large one."""
    graph = "g (float[N, 1024] x) => (float[N] y) { e = Exp(x) r = Sin(e) y = ReduceSum<keepdims = 0>(r, a) }"
    path = save_model(tmp_path / "m.onnx", graph.replace(" { ", " <int64[1] a = {1}> { "))
    subprocess.run([sys.executable, "-c", TRIMS, path, str(arena), str(kept)], check=True, cwd=ROOT)


def test_a_closed_session_is_not_trimmed(tmp_path: Path) -> None:
    session = runtimes.load(save_model(tmp_path / "m.onnx", RELU))
    session.close()
    with pytest.raises(runtimes.SessionClosed):
        session.trim()


def test_any_kind_of_input_lets_itself_be_trimmed(tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes")
    inputs = [
        onnx.helper.make_tensor_value_info("any", 1, None),
        onnx.helper.make_tensor_value_info("text", onnx.TensorProto.STRING, [2, "n"]),
        onnx.helper.make_tensor_value_info("more_text", onnx.TensorProto.STRING, [2]),
        onnx.helper.make_tensor_value_info("scalar", 1, []),
        onnx.helper.make_tensor_value_info("fixed", 1, [3, 5]),
        onnx.helper.make_tensor_value_info("half", onnx.TensorProto.BFLOAT16, [None, 2]),
    ]
    for taken in (inputs[:-1], [inputs[0], *inputs[3:]]):  # strings, and a dtype that goes another way
        outputs = [onnx.helper.make_tensor_value_info(f"y{i}", each.type.tensor_type.elem_type, None)
                   for i, each in enumerate(taken)]  # fmt: skip
        nodes = [onnx.helper.make_node("Identity", [each.name], [f"y{i}"]) for i, each in enumerate(taken)]
        graph = onnx.helper.make_graph(nodes, "g", taken, outputs)
        path = tmp_path / "m.onnx"
        onnx.save(onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 19)]), path)
        with runtimes.load(path) as session:
            session.trim()


def test_out_of_memory(tmp_path: Path) -> None:
    path = save_model(
        tmp_path / "m.onnx",
        "g (int64[1] n) => (float[N] y) { y = ConstantOfShape<value = float[1] {1.0}>(n) }",
    )
    with pytest.raises(runtimes.RunFailed, match="out of memory") as caught:
        runtimes.load(path).run({"n": np.array([1 << 52])})
    assert "smaller batch" in str(caught.value)


def test_bound_outputs_that_do_not_fit(tmp_path: Path) -> None:
    """Declared shapes are believed when buffers are made; a model that lies about them fails, typed."""
    path = save_model(tmp_path / "m.onnx", "g (float[N] x, int64[1] shape) => (float[N] y) { y = Reshape(x, shape) }")
    binding = runtimes.load(path).bind({"x": (4,), "shape": (1,)})
    binding.inputs["shape"][...] = 4
    binding.run()
    binding.inputs["shape"][...] = 3
    with pytest.raises(runtimes.RunFailed):
        binding.run()


# --- the file that says which CPU this is


def test_fingerprint_is_stable_and_says_what_it_must() -> None:
    first = fingerprint("all")
    assert first == json.loads(
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import json; from runtimes.ort_cpu import fingerprint; print(json.dumps(fingerprint('all')))",
            ],
            capture_output=True,
            check=True,
            text=True,
        ).stdout
    )
    assert first["onnxruntime"] == onnxruntime.__version__
    assert all(isinstance(value, str) and value for value in first.values())
    if sys.platform == "linux" and first["machine"] == "x86_64":
        assert "sse4_2" in first["cpu"].split()
        assert first["cpu"].split() == sorted(first["cpu"].split())


def test_packed_weights_begin_on_cache_lines(tmp_path: Path) -> None:
    """A weight of an odd size before them moved them, and the kernels that load whole lines ended the process."""
    rng = np.random.default_rng(0)
    weights = [onnx.numpy_helper.from_array(rng.standard_normal(301).astype("float32"), "odd")]
    nodes = [onnx.helper.make_node("ReduceSum", ["odd"], ["s"]), onnx.helper.make_node("Add", ["x", "s"], ["v0"])]
    for index in range(3):
        weights.append(onnx.numpy_helper.from_array(rng.standard_normal((384, 384)).astype("float32"), f"w{index}"))
        nodes.append(onnx.helper.make_node("MatMul", [f"v{index}", f"w{index}"], [f"v{index + 1}"]))
    nodes.append(onnx.helper.make_node("Gather", ["odd", "i"], ["picked"]))  # keeps the odd one as it is
    info = onnx.helper.make_tensor_value_info
    inputs = [info("x", 1, ["N", 384]), info("i", 7, ["K"])]
    outputs = [info("v3", 1, ["N", 384]), info("picked", 1, ["K"])]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 19)])
    onnx.save(model, tmp_path / "m.onnx")
    compiled = runtimes.compile(tmp_path / "m.onnx", "ort-cpu", tmp_path / "compiled")
    assert compiled.prepared_file
    saved = onnx.load(compiled.directory / compiled.prepared_file, load_external_data=False)
    packed = [
        int(offset)
        for tensor in saved.graph.initializer
        for entry in tensor.external_data
        if entry.key.startswith("prepacked")
        for offset in re.findall(r"\|(\d+);", entry.value)
    ]
    assert len(packed) == 3
    assert not any(offset % 64 for offset in packed)
    feeds = {"x": rng.standard_normal((2, 384)).astype("float32"), "i": np.array([3, 300])}
    with BACKEND.load(compiled) as session:
        assert session.info["file"] == compiled.prepared_file
        for got, wanted in zip(session.run(feeds).values(), run_raw(tmp_path / "m.onnx", feeds), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5)


# --- nothing is told to anybody


def left_behind(folder: Path, model: Path, environment: dict[str, str]) -> list[str]:
    """The files that a process which runs a model leaves in its home and its temporary folder."""
    folder.mkdir()
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "TMPDIR"), str(folder))
    # ONNX Runtime tells nothing of tests that it knows as such, which would prove nothing
    inherited = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    code = f"import runtimes; runtimes.load({str(model)!r}).run({{'x': __import__('numpy').zeros((1, 3), 'float32')}})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=inherited | places | environment)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_no_telemetry(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m.onnx", RELU)
    assert left_behind(tmp_path / "off", model, {}) == []
    if not left_behind(tmp_path / "on", model, {"ORT_DISABLE_TELEMETRY": "0"}):
        pytest.skip("this build of ONNX Runtime leaves nothing anyway")
