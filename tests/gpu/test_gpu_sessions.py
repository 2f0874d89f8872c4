"""Sessions on a GPU: numerics against ort-cpu, arrays on the device, CUDA graphs, memory, errors."""

from __future__ import annotations

import dataclasses
import gc
import threading
from pathlib import Path
from typing import Any

import gpu_models
import numpy as np
import pytest
from gpu_support import Build, compile_options, require_modules

import runtimes
from runtimes import _cuda
from runtimes._device_array import DeviceArray
from runtimes.testing import save_model

RELU = "g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }"


@pytest.mark.parametrize("precision", gpu_models.BOUNDS)
@pytest.mark.parametrize("batch", [1, 5])
def test_results_are_those_of_the_cpu(tmp_path: Path, build: Build, target: str, precision: str, batch: int) -> None:
    reference = build(gpu_models.conv_net(tmp_path / "fp32.onnx", "fp32"), "ort-cpu")
    session = build(gpu_models.conv_net(tmp_path / f"{precision}.onnx", precision), target)
    x = gpu_models.images(batch)
    given, wanted = session.run({"x": x})["y"], reference.run({"x": x})["y"]
    assert gpu_models.error(given, wanted) <= gpu_models.BOUNDS[precision]


def test_int8_is_that_of_the_cpu(tmp_path: Path, build: Build, target: str) -> None:
    """The same Q/DQ graph: what differs is where a sum is rounded to the next integer."""
    model = gpu_models.conv_net(tmp_path / "int8.onnx", "int8")
    x = gpu_models.images(4)
    wanted = build(model, "ort-cpu").run({"x": x})["y"]
    assert gpu_models.error(build(model, target).run({"x": x})["y"], wanted) <= 2e-2


def test_a_real_network(assets: Path, build: Build, target: str) -> None:
    [model] = assets.glob("models/cifar10-resnets/*resnet20*.onnx")
    x = np.random.default_rng(0).normal(0, 1, (8, 3, 32, 32)).astype("float32")
    wanted = next(iter(build(model, "ort-cpu").run({"input": x}).values()))
    given = next(iter(build(model, target).run({"input": x}).values()))
    assert gpu_models.error(given, wanted) <= 1e-4
    assert (given.argmax(1) == wanted.argmax(1)).all()


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_the_device_in_and_out(tmp_path: Path, build: Build, target: str, gpu: _cuda.Device, cuda_graph: bool) -> None:
    session = build(gpu_models.conv_net(tmp_path / "m.onnx", "fp32"), target, cuda_graph=cuda_graph)
    relu = build(save_model(tmp_path / "r.onnx", "g (float[N, 10] x) => (float[N, 10] y) { y = Relu(x) }"), target)
    for batch in (1, 4, 1, 4):
        x = gpu_models.images(batch)
        wanted = session.run({"x": x})["y"]
        left = session.run({"x": x}, outputs="device")["y"]
        assert (left.shape, left.dtype, left.__dlpack_device__()) == (wanted.shape, wanted.dtype, (2, 0))
        assert gpu_models.error(left.numpy(), wanted) <= 1e-6
        # Straight into the next session, without a copy, and from there to the host.
        assert np.array_equal(relu.run({"x": left})["y"], np.maximum(left.numpy(), 0))
        again = session.run({"x": relu_input(gpu, x)})["y"]
        assert gpu_models.error(again, wanted) <= 1e-6


def relu_input(gpu: _cuda.Device, x: np.ndarray) -> Any:
    """An array on the device that knows ``__cuda_array_interface__`` only."""
    memory, staging, stream = gpu.allocate(x.nbytes), gpu.page_locked(x.nbytes), gpu.stream()
    staging[...] = x.reshape(-1).view(np.uint8)
    with gpu:
        stream.upload(memory.address, staging)

    class Array:
        __cuda_array_interface__ = {  # noqa: RUF012
            "version": 3, "shape": x.shape, "typestr": x.dtype.str, "data": (memory.address, False),
            "strides": None, "stream": stream.handle,
        }  # fmt: skip
        held = (memory, staging, stream)

    return Array()


def test_an_address_that_is_not_aligned(tmp_path: Path, build: Build, target: str, gpu: _cuda.Device) -> None:
    session = build(save_model(tmp_path / "r.onnx", RELU), target)
    rows = session.run({"x": np.arange(12, dtype="float32").reshape(4, 3) - 6}, outputs="device")["y"]
    shifted = DeviceArray(rows.address + 12, (3, 3), rows.dtype, 0, rows)
    assert np.array_equal(session.run({"x": shifted})["y"], rows.numpy()[1:])


def test_torch_in_and_out(tmp_path: Path, build: Build, target: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch: without CUDA")
    session = build(save_model(tmp_path / "r.onnx", "g (float[N, 512] x) => (float[N, 512] y) { y = Neg(x) }"), target)
    side = torch.cuda.Stream()
    for round_ in range(10):
        with torch.cuda.stream(side):
            x = torch.ones(512, 512, device="cuda")
            for _ in range(50):  # still computing when the session is called
                x = (x @ x) / 512
            x = x + round_
            y = torch.from_dlpack(session.run({"x": x}, outputs="device")["y"])
        assert torch.equal(y, torch.full_like(y, -(1 + round_)))
    with pytest.raises(runtimes.InvalidInput, match="grad"):
        session.run({"x": torch.ones(1, 512, device="cuda", requires_grad=True)})
    with pytest.raises(runtimes.InvalidInput, match="C order"):
        session.run({"x": torch.ones(512, 4, device="cuda").T})
    with pytest.raises(runtimes.InvalidInput, match="float16"):
        session.run({"x": torch.ones(4, 512, device="cuda", dtype=torch.float16)})
    with pytest.raises(runtimes.InvalidInput, match="in place of"):
        session.run({"x": torch.ones(4, 511, device="cuda")})


@pytest.mark.usefixtures("gpu")
def test_results_outlive_the_session(tmp_path: Path, build: Build, target: str) -> None:
    session = build(save_model(tmp_path / "r.onnx", RELU), target)
    x = np.ones((4, 3), "float32")
    left = session.run({"x": x}, outputs="device")["y"]
    for value in range(20):
        session.run({"x": x * value}, outputs="device")
    session.close()
    del session
    gc.collect()
    assert np.array_equal(left.numpy(), x)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", gpu_models.BOUNDS)
def test_a_graph_changes_nothing(tmp_path: Path, build: Build, target: str, precision: str) -> None:
    model = gpu_models.conv_net(tmp_path / "m.onnx", precision)
    plain, recorded = build(model, target), build(model, target, cuda_graph=True)
    for batch in (1, 8, 1, 3, 8, 8, 1):
        x = gpu_models.images(batch) * (1 + batch)
        assert gpu_models.error(recorded.run({"x": x})["y"], plain.run({"x": x})["y"]) <= gpu_models.BOUNDS[precision]
    binding = recorded.bind({"x": (2, 3, 32, 32)})
    for factor in (1, 2, 3):
        binding.inputs["x"][...] = gpu_models.images(2) * factor
        binding.run()
        wanted = plain.run({"x": np.array(binding.inputs["x"])})["y"]
        assert gpu_models.error(binding.outputs["y"], wanted) <= gpu_models.BOUNDS[precision]


@pytest.mark.usefixtures("gpu")
def test_graphs_in_many_threads(tmp_path: Path, build: Build, target: str) -> None:
    session = build(save_model(tmp_path / "r.onnx", RELU), target, cuda_graph=True)
    wrong: list[object] = []

    def work(index: int) -> None:
        try:
            for value in range(50):
                x = np.full((1 + index % 3, 3), value - 25, "float32")
                if not np.array_equal(session.run({"x": x})["y"], np.maximum(x, 0)):
                    wrong.append(index)
        except runtimes.Error as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []


def test_memory_is_given_back(tmp_path: Path, build: Build, target: str, gpu: _cuda.Device) -> None:
    """A model with 64 MiB of weights: what one cycle kept would be 640 MiB after ten."""
    model = save_model(
        tmp_path / "m.onnx",
        "g (float[N, 4096] x) => (float[N, 4096] y) { s = Constant<value_ints = [4096, 4096]>() "
        " w = ConstantOfShape<value = float[1] {0.5}>(s)  y = MatMul(x, w) }",
    )
    options = compile_options(target, model, largest=8)
    compiled = runtimes.compile(model, target, tmp_path / "c", options=options)
    backend = runtimes.backend(compiled.target.runtime)
    feeds = {"x": np.ones((1, 4096), "float32")}

    def cycle() -> None:
        with backend.load(compiled, options=backend.options_type(**options) if options else None) as session:
            session.run(feeds, outputs="device")
            session.bind({"x": (1, 4096)}).run()
        gc.collect()

    for _ in range(2):
        cycle()
    before, _ = gpu.memory()
    for _ in range(10):
        cycle()
    assert before - gpu.memory()[0] < 128 << 20


def test_shapes_outside_every_profile_print_the_profiles(tmp_path: Path, build: Build, target: str) -> None:
    if not target.startswith("tensorrt"):
        pytest.skip(f"{target}: has no profiles")
    model = save_model(tmp_path / "r.onnx", RELU)
    session = build(model, target, profiles=[{"N": [2, 4, 8]}, {"N": [16, 16, 32]}])
    for batch in (2, 8, 16, 32):
        assert session.run({"x": np.ones((batch, 3), "float32")})["y"].shape == (batch, 3)
    for use in (
        lambda: session.run({"x": np.ones((9, 3), "float32")}),
        lambda: session.bind({"x": (33, 3)}),
        lambda: session.run({"x": np.ones((1, 3), "float32")}, outputs="device"),
    ):
        with pytest.raises(runtimes.InvalidInput, match="no profile of the engine takes") as caught:
            use()
        assert "[2, 3] to [8, 3], fastest at [4, 3]" in str(caught.value)
        assert "[16, 3] to [32, 3]" in str(caught.value)
    empty = session.run({"x": np.ones((0, 3), "float32")})["y"]
    assert (empty.shape, empty.dtype) == ((0, 3), np.dtype("float32"))


def test_an_engine_for_another_gpu_is_told(tmp_path: Path, target: str) -> None:
    if not target.startswith("tensorrt"):
        pytest.skip(f"{target}: has no engines")
    model = save_model(tmp_path / "r.onnx", RELU)
    compiled = runtimes.compile(model, target, tmp_path / "c", options=compile_options(target, model))
    other = dataclasses.replace(compiled, fingerprint={**compiled.fingerprint, "compute_capabilities": "3.5"})
    with pytest.raises(runtimes.TargetUnavailable, match=r"3\.5"):
        runtimes.backend(target).load(other)


@pytest.mark.usefixtures("gpu")
def test_a_device_that_is_not_there(tmp_path: Path, target: str) -> None:
    with pytest.raises(runtimes.TargetUnavailable, match="there is no GPU 99"):
        runtimes.compile(save_model(tmp_path / "r.onnx", RELU), f"{target}:99", tmp_path / "c")


def test_ort_cuda_is_raw_onnx_runtime(tmp_path: Path, build: Build, target: str) -> None:
    if target != "ort-cuda":
        pytest.skip(f"{target}: not ONNX Runtime")
    import onnxruntime

    model = gpu_models.conv_net(tmp_path / "m.onnx", "fp32")
    raw = onnxruntime.InferenceSession(str(model), providers=[("CUDAExecutionProvider", {"use_tf32": "0"})])
    x = gpu_models.images(4)
    session = build(model, target)
    assert np.array_equal(session.run({"x": x})["y"], raw.run(None, {"x": x})[0])
    assert session.info["tf32"] == "off"
    assert session.info["on_cpu"] == "nothing"


def test_nodes_on_the_cpu_are_named(tmp_path: Path, build: Build, target: str) -> None:
    if target != "ort-cuda":
        pytest.skip(f"{target}: runs no node on the CPU")
    model = save_model(
        tmp_path / "m.onnx",
        "g (float[N, 3] x) => (float[N, 3] y) { [there] h = Relu(x)  [here] d = Det(w)  [back] y = Add(h, d) }".replace(
            "{ [there]", "<float[2, 2] w = {1, 2, 3, 4}> { [there]"
        ),
    )
    session = build(model, target, graph_level="disabled")
    assert "here (Det)" in session.info["on_cpu"]
    with pytest.raises(runtimes.CompileFailed, match=r"here \(Det\)"):
        build(model, target, graph_level="disabled", cpu_nodes=False)


@pytest.mark.usefixtures("gpu")
def test_compiled_kernels_are_there_for_the_next_session(tmp_path: Path, build: Build, target: str) -> None:
    if target != "tensorrt-rtx":
        pytest.skip(f"{target}: compiles no kernels while it runs")
    model = gpu_models.conv_net(tmp_path / "m.onnx", "fp16")
    compiled = runtimes.compile(model, target, tmp_path / "c", options=compile_options(target, model))
    backend = runtimes.backend(target)
    x, found = gpu_models.images(2), []
    for _ in range(2):
        with backend.load(compiled) as session:
            found.append((session.info["kernels"], session.run({"x": x})["y"]))
    assert found[0][0].startswith("no kernels in the cache yet")
    assert found[1][0].endswith("bytes of compiled kernels from the cache")
    assert np.array_equal(found[0][1], found[1][1])
    with backend.load(compiled, options=backend.options_type(kernel_cache=False)) as session:
        assert session.info["kernels"] == "not kept"
        assert np.array_equal(session.run({"x": x})["y"], found[0][1])


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", gpu_models.BOUNDS)
def test_an_engine_can_be_looked_into(tmp_path: Path, target: str, precision: str) -> None:
    if not target.startswith("tensorrt"):
        pytest.skip(f"{target}: has no engines")
    require_modules("engine_debug", "polygraphy", "onnx_ir", "onnxscript", "rich")
    from toolchain.engine_debug import debug_engine

    model = gpu_models.conv_net(tmp_path / "m.onnx", precision)
    options = compile_options(target, model, layer_information=True)
    compiled = runtimes.compile(model, target, tmp_path / "c", options=options)
    found = debug_engine(compiled, [{"x": gpu_models.images(2)}], layers=True)
    assert [one.tensor for one in found.outputs] == ["y"]
    assert {"c1", "c2", "y"} <= {one.tensor for one in found.tensors}
    assert max(one.nmse for one in (*found.outputs, *found.tensors)) <= gpu_models.BOUNDS[precision]
    if target == "tensorrt":
        assert found.layers
        assert all(layer.kind for layer in found.layers)
    else:
        assert "layers are not shown" in found.remarks[0]
