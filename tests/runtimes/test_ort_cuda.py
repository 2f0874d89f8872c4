"""ONNX Runtime on a GPU, as far as that goes without one: options, errors for real, and IO binding on host memory."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_support import save_model

import runtimes
from runtimes import _ort_device, ort_cuda
from runtimes._driver import driver
from runtimes.ort_cuda import Assignment, OrtCudaOptions, assignment, check_assignment, check_providers

RELU = "g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "m.onnx", RELU)


@pytest.fixture(scope="module", autouse=True)
def _no_gpu() -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if runtimes.backend("ort-cuda").probe().available:
        pytest.skip("ort-cuda works here: tests/gpu has the tests for that")


@pytest.mark.parametrize(
    "wrong",
    [
        {"graph_level": "most"},
        {"gpu_mem_limit": 0},
        {"gpu_mem_limit": 2.5e9},
        {"gpu_mem_limit": True},
        {"arena_extend_strategy": "kSameAsRequested"},
        {"cudnn_conv_algo_search": "EXHAUSTIVE"},
        {"use_tf32": 1},
        {"cuda_graph": "yes"},
        {"tensorrt": None},
        {"cpu_nodes": 0},
    ],
)
def test_wrong_options_are_told(wrong: dict[str, Any]) -> None:
    with pytest.raises(runtimes.InvalidInput, match=f"{next(iter(wrong))} is .*\n.*option .* of ort-cuda"):
        OrtCudaOptions(**wrong)


def test_unknown_options_are_told(model: Path) -> None:
    with pytest.raises(runtimes.InvalidInput, match=r"no option 'use_tf23'.*\n.*use_tf32"):
        runtimes.load(model, target="ort-cuda", options={"use_tf23": True})


def test_options_become_those_of_the_provider() -> None:
    [(name, cuda)] = ort_cuda.provider_options(OrtCudaOptions(), 0)
    assert name == "CUDAExecutionProvider"
    assert cuda["use_tf32"] == "0"  # float32 means float32
    assert "gpu_mem_limit" not in cuda
    [(_, cuda)] = ort_cuda.provider_options(
        OrtCudaOptions(
            gpu_mem_limit=1 << 30,
            arena_extend_strategy="same-as-requested",
            cudnn_conv_algo_search="heuristic",
            cudnn_conv_use_max_workspace=False,
            use_tf32=True,
            prefer_nhwc=True,
            cuda_graph=True,
        ),
        2,
    )
    assert cuda == {
        "device_id": "2",
        "gpu_mem_limit": "1073741824",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "cudnn_conv_use_max_workspace": "0",
        "use_tf32": "1",
        "prefer_nhwc": "1",
        "enable_cuda_graph": "1",
    }


def test_tensorrt_comes_first_and_keeps_its_engines_to_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOOLCHAIN_CACHE", str(tmp_path / "cache"))
    (first, tensorrt), (second, cuda) = ort_cuda.provider_options(OrtCudaOptions(tensorrt=True, cuda_graph=True), 1)
    assert (first, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert (tensorrt["device_id"], tensorrt["trt_cuda_graph_enable"], cuda["enable_cuda_graph"]) == ("1", "1", "0")
    folder = Path(tensorrt["trt_engine_cache_path"])
    assert folder.is_relative_to(tmp_path / "cache")
    assert folder.stat().st_mode & 0o077 == 0


def test_why_it_does_not_run_here_is_told(model: Path, tmp_path: Path) -> None:
    """For real: the wheel that is installed decides which of the reasons it is."""
    import onnxruntime

    state = runtimes.backend("ort-cuda").probe()
    assert not state.available
    assert state.version == onnxruntime.__version__
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        wanted = "a build without CUDA"
        assert "onnxruntime-gpu" in str(state.remedy)
    elif driver().reason:
        wanted = str(driver().reason)
    else:
        wanted = ".so"  # a library that is missing
    assert wanted in str(state.reason)
    for use in (
        lambda: runtimes.load(model, target="ort-cuda"),
        lambda: runtimes.load(model, target="ort-cuda:3"),
        lambda: runtimes.compile(model, "ort-cuda", tmp_path / "c"),
    ):
        with pytest.raises(runtimes.TargetUnavailable, match=r"ort-cuda(:3)? cannot run here") as caught:
            use()
        assert wanted in caught.value.what
    assert not (tmp_path / "c").exists()


def test_a_library_that_does_not_load_is_named_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    ort_cuda.library_missing.cache_clear()
    for provider in ("cuda", "tensorrt"):
        reason = ort_cuda.library_missing(provider)
        assert reason is not None
        assert ".so" in reason
        assert "cannot open shared object file" in reason
    assert capfd.readouterr() == ("", "")


def _session(model: Path, providers: list[Any]) -> Any:
    import onnxruntime

    options = ort_cuda._session_options(OrtCudaOptions())
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(model), options, providers=providers, enable_fallback=0)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_fell_back_is_an_error(model: Path) -> None:
    """ONNX Runtime makes this session without an error, here where it cannot use CUDA."""
    session = _session(model, [*ort_cuda.provider_options(OrtCudaOptions(), 0), "CPUExecutionProvider"])
    assert session.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(runtimes.TargetUnavailable, match="fell back from CUDAExecutionProvider to CPUExecution"):
        check_providers(session.get_providers(), OrtCudaOptions(), str(model))


def test_a_provider_that_was_asked_for_and_is_missing_is_an_error() -> None:
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    check_providers(both, OrtCudaOptions(), "m.onnx")
    with pytest.raises(runtimes.TargetUnavailable, match="fell back from TensorrtExecutionProvider"):
        check_providers(both, OrtCudaOptions(tensorrt=True), "m.onnx")


def test_nodes_are_reported_with_their_names(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m.onnx", "g (float[N] x) => (float[N] y) { [first] h = Sin(x)  y = Cos(h) }")
    found = assignment(_session(model, ["CPUExecutionProvider"]))
    assert found == Assignment(0, ("first (Sin)", "Cos"))


def test_nodes_on_the_cpu_are_an_error_where_that_was_asked_for() -> None:
    some = Assignment(5, ("a (Loop)", "b (Shape)"))
    check_assignment(some, OrtCudaOptions(), "m.onnx")
    check_assignment(Assignment(5, ()), OrtCudaOptions(cpu_nodes=False), "m.onnx")
    check_assignment(Assignment(0, ()), OrtCudaOptions(cpu_nodes=False), "m.onnx")  # folded to a constant
    with pytest.raises(runtimes.CompileFailed, match=r"2 nodes run on the CPU: a \(Loop\), b \(Shape\)"):
        check_assignment(some, OrtCudaOptions(cpu_nodes=False), "m.onnx")
    with pytest.raises(runtimes.CompileFailed, match=r"no node .* runs on the GPU: .*c9 and 2 more"):
        check_assignment(Assignment(0, tuple(f"c{i}" for i in range(12))), OrtCudaOptions(), "m.onnx")


@pytest.fixture
def on_host(tmp_path: Path) -> Any:
    """Makes the session class of GPUs over a session on the CPU: what it does with host memory is the same."""

    def make(graph: str) -> _ort_device.OrtCudaSession:
        model = save_model(tmp_path / "m.onnx", graph)
        return _ort_device.OrtCudaSession(
            _session(model, ["CPUExecutionProvider"]),
            runtimes.Target("ort-cuda"),
            file=model,
            unranked=frozenset(),
            info={},
            ordinal=0,
            cuda_graph=False,
        )

    return make


@pytest.mark.parametrize(
    "x",
    [
        np.arange(6, dtype="float32").reshape(2, 3) - 2,
        np.zeros((0, 3), "float32"),
        np.asfortranarray(np.arange(6, dtype="float32").reshape(2, 3) - 2),
        (np.arange(24, dtype="float32").reshape(4, 6) - 9)[::-2, ::2],
    ],
    ids=["plain", "empty", "fortran", "strided"],
)
def test_both_ways_to_run_agree(on_host: Any, x: np.ndarray) -> None:
    session = on_host(RELU)
    wanted = np.maximum(x, 0)
    assert np.array_equal(session.run({"x": x})["y"], wanted)
    bound = session._run_once(session._open(), {"x": x}, "host")["y"]
    assert bound.shape == x.shape
    assert np.array_equal(bound, wanted)


def test_types_that_numpy_lacks_can_be_bound(on_host: Any) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    session = on_host("g (bfloat16[N] b, bool[N] f) => (bfloat16[N] p, bool[N] r) { p = Identity(b)  r = Not(f) }")
    feeds = {"b": np.array([1.5, -2, 0], ml_dtypes.bfloat16)[::-1], "f": np.array([True, False, True])}
    found = session._run_once(session._open(), session._check(feeds), "host")
    assert list(found) == ["p", "r"]
    assert np.array_equal(found["p"], feeds["b"])
    assert found["r"].tolist() == [False, True, False]


def test_strings_stay_on_the_host(on_host: Any) -> None:
    session = on_host("g (string[N] s) => (string[N] q) { q = Identity(s) }")
    feeds = {"s": np.array(["a", "", "é"], dtype=object)}
    assert session.run(feeds)["q"].tolist() == ["a", "", "é"]
    with pytest.raises(runtimes.InvalidInput, match="strings"):
        session.run(feeds, outputs="device")


def test_a_closed_session_is_closed_in_every_way(on_host: Any) -> None:
    session = on_host(RELU)
    feeds = {"x": np.ones((1, 3), "float32")}
    session.close()
    session.close()
    for use in (
        lambda: session.run(feeds),
        lambda: session.run(feeds, outputs="device"),
        lambda: session.bind({"x": (1, 3)}),
    ):
        with pytest.raises(runtimes.SessionClosed):
            use()


@pytest.mark.parametrize("feeds", [None, 3, [1], {"x": [1.0]}, {"y": np.ones((1, 3), "float32")}])
@pytest.mark.parametrize("place", ["host", "device"])
def test_rubbish_is_told(on_host: Any, feeds: Any, place: Any) -> None:
    with pytest.raises(runtimes.InvalidInput):
        on_host(RELU).run(feeds, outputs=place)


def test_an_unknown_place_is_told(on_host: Any) -> None:
    with pytest.raises(runtimes.InvalidInput, match="'host' or 'device'"):
        on_host(RELU).run({"x": np.ones((1, 3), "float32")}, outputs="gpu")


def test_a_device_that_is_no_number_is_told() -> None:
    for device in ("sm89", "0,1"):
        with pytest.raises(runtimes.TargetUnavailable, match="write ort-cuda:0"):
            ort_cuda._ordinal(runtimes.Target("ort-cuda", device))


def test_options_are_in_no_way_lost() -> None:
    """Every option reaches the providers or the session: none is only written down."""
    plain = OrtCudaOptions()
    changed = {
        "gpu_mem_limit": 1 << 30,
        "arena_extend_strategy": "same-as-requested",
        "cudnn_conv_algo_search": "default",
    }
    elsewhere = {"graph_level", "cpu_nodes"}
    for field in dataclasses.fields(OrtCudaOptions):
        if field.name in elsewhere:
            continue
        value = changed.get(field.name, not field.default)
        other = dataclasses.replace(plain, **{field.name: value})
        assert ort_cuda.provider_options(other, 0) != ort_cuda.provider_options(plain, 0), field.name


def test_cuda_is_found_wherever_its_packages_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside ONNX Runtime it looks by itself; an unpacked one has torch's packages elsewhere on the path."""
    unpacked, system = tmp_path / "unpacked", tmp_path / "system"
    for folder in (unpacked / "nvidia/cudnn/lib", system / "nvidia/cu13/lib", system / "nvidia/cudnn/lib"):
        folder.mkdir(parents=True)
    (system / "nvidia/cu13/include").mkdir()
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(sys, "path", [str(unpacked), str(system)])
    importlib.invalidate_caches()
    assert ort_cuda.nvidia_folders(unpacked) == [system / "nvidia/cu13/lib", system / "nvidia/cudnn/lib"]
    assert ort_cuda.nvidia_folders(system) == [unpacked / "nvidia/cudnn/lib"]
    monkeypatch.setattr(sys, "path", [])
    importlib.invalidate_caches()
    assert ort_cuda.nvidia_folders(unpacked) == []
