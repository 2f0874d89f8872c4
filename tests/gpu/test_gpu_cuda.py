"""The seam to CUDA on a GPU."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from runtimes import _cuda, _cuda_packages
from runtimes._device_array import DeviceArray, on_device


def test_what_is_uploaded_comes_back(gpu: _cuda.Device) -> None:
    host, back = gpu.page_locked(1 << 20), gpu.page_locked(1 << 20)
    host[...] = np.random.default_rng(0).integers(0, 256, 1 << 20)
    memory, other, stream = gpu.allocate(1 << 20), gpu.allocate(1 << 20), gpu.stream()
    start, end = gpu.event(), gpu.event()
    with gpu:
        stream.record(start)
        stream.upload(memory.address, host)
        stream.copy(other.address, memory.address, 1 << 20)
        stream.download(back, other.address)
        stream.record(end)
        stream.synchronize()
    assert np.array_equal(back, host)
    assert 0 < end.milliseconds_since(start) < 1000


def test_a_captured_graph_does_it_again(gpu: _cuda.Device) -> None:
    _cuda.require_graphs()
    host, back = gpu.page_locked(64), gpu.page_locked(64)
    memory, stream = gpu.allocate(64), gpu.stream()

    def work() -> None:
        stream.upload(memory.address, host)
        stream.download(back, memory.address)

    with gpu:
        back[...] = 0
        host[...] = 1
        graph = stream.capture(work)
        stream.synchronize()
        assert not back.any()  # recorded, not run
        for value in (2, 3):
            host[...] = value
            graph.launch(stream)
            stream.synchronize()
            assert (back == value).all()


def test_a_capture_that_fails_leaves_the_stream_usable(gpu: _cuda.Device) -> None:
    stream = gpu.stream()

    def work() -> None:
        raise ValueError("no")

    with gpu, pytest.raises(ValueError, match="no"):
        stream.capture(work)
    host, memory = gpu.page_locked(8), gpu.allocate(8)
    with gpu:
        stream.upload(memory.address, host)
        stream.synchronize()


def test_too_much_memory_is_told_with_what_is_free(gpu: _cuda.Device) -> None:
    free, total = gpu.memory()
    assert 0 < free <= total
    with pytest.raises(_cuda.OutOfDeviceMemory, match=f"{total * 2:,} bytes of GPU memory were asked for; GPU 0 has"):
        gpu.allocate(total * 2)
    gpu.allocate(1 << 20)  # and nothing is broken by it


def test_memory_is_freed_with_its_last_reference_in_any_thread(gpu: _cuda.Device) -> None:
    size = 256 << 20
    held = [gpu.allocate(size), gpu.stream(), gpu.event(), gpu.page_locked(1 << 20)]
    before, _ = gpu.memory()
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    gc.collect()
    after, _ = gpu.memory()
    assert after - before >= size


def test_contexts_nest_and_threads_do_not_disturb_each_other(gpu: _cuda.Device) -> None:
    wrong: list[object] = []

    def work(index: int) -> None:
        host, back, memory, stream = gpu.page_locked(4096), gpu.page_locked(4096), gpu.allocate(4096), gpu.stream()
        for value in range(200):
            host[...] = (value + index) % 256
            with gpu, gpu:
                stream.upload(memory.address, host)
                stream.download(back, memory.address)
                stream.synchronize()
            if not np.array_equal(back, host):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_another_stream_can_be_waited_for(gpu: _cuda.Device) -> None:
    """A long copy on one stream, and a read of its end on another that waits for it."""
    if _cuda_packages.bindings() is None:
        pytest.skip("cuda-bindings: not installed")
    size = 512 << 20
    first, second = gpu.stream(), gpu.stream()
    a, b, host = gpu.allocate(size), gpu.allocate(size), gpu.page_locked(16)
    mark = gpu.page_locked(16)
    for value in (1, 2, 3):
        mark[...] = value
        with gpu:
            first.upload(a.address + size - 16, mark)
            for _ in range(10):
                first.copy(b.address, a.address, size)
            second.wait_for(first.handle)
            second.download(host, b.address + size - 16)
            second.synchronize()
        assert (host == value).all()
        with gpu:
            first.synchronize()


def test_arrays_of_torch_and_cupy_are_read_where_they_are(gpu: _cuda.Device) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch: without CUDA")
    stream = gpu.stream()
    tensor = torch.arange(6, dtype=torch.bfloat16, device="cuda").reshape(2, 3)
    with gpu:
        found = on_device(tensor, name="x", ordinal=0, stream=stream)
    assert found is not None
    assert (found.address, found.shape, found.dtype.name) == (tensor.data_ptr(), (2, 3), "bfloat16")
    ours = DeviceArray(found.address, found.shape, found.dtype, 0, tensor)
    back = torch.from_dlpack(ours)
    assert back.data_ptr() == tensor.data_ptr()
    assert torch.equal(back, tensor)
