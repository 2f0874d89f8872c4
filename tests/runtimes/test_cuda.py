"""The seam to CUDA and arrays on a GPU, as far as that goes without one; the rest is in tests/gpu."""

from __future__ import annotations

import ast
import ctypes
import gc
import inspect
import weakref
from typing import Any

import numpy as np
import pytest

import runtimes
from runtimes import _cuda, _cuda_packages, _device_array
from runtimes._driver import Driver, Gpu, driver

TWO = Driver((12, 4), (Gpu("NVIDIA A", (8, 6)), Gpu("NVIDIA B", (9, 0))))


def test_an_old_driver_is_told_with_both_versions() -> None:
    with pytest.raises(_cuda.DriverTooOld) as caught:
        _cuda.require_driver(cuda=13, who="onnxruntime-gpu 1.31.1", state=TWO)
    assert caught.value.what == "the NVIDIA driver supports CUDA 12.4, onnxruntime-gpu 1.31.1 wants CUDA 13"
    # An old driver often also fails to start: its age is what helps.
    failing = Driver((11, 8), (), "the NVIDIA driver fails: error 804")
    with pytest.raises(_cuda.DriverTooOld, match=r"11\.8"):
        _cuda.require_driver(cuda=12, who="x", state=failing)


@pytest.mark.parametrize("cuda", [None, 11, 12])
def test_a_new_enough_driver_is_taken(cuda: int | None) -> None:
    _cuda.require_driver(cuda=cuda, who="x", state=TWO)


def test_no_driver_is_told() -> None:
    none = Driver(None, (), "there is no NVIDIA driver: libcuda.so.1 was not found")
    with pytest.raises(_cuda.NoDriver, match=r"TensorRT needs an NVIDIA GPU: .*libcuda\.so\.1"):
        _cuda.require_driver(cuda=13, who="TensorRT", state=none)
    with pytest.raises(_cuda.NoDriver):
        _cuda.require_device(0, none)


@pytest.mark.parametrize("ordinal", [2, -1])
def test_a_device_that_is_not_there_is_told_with_those_that_are(ordinal: int) -> None:
    _cuda.require_device(1, TWO)
    with pytest.raises(_cuda.NoSuchDevice, match=f"no GPU {ordinal}") as caught:
        _cuda.require_device(ordinal, TWO)
    assert "0: NVIDIA A, 1: NVIDIA B" in str(caught.value)


def test_without_a_driver_a_device_is_refused_for_real() -> None:
    if driver().reason is None:
        pytest.skip("there is a GPU here")
    with pytest.raises(_cuda.NoDriver):
        _cuda.device(0)


def test_errors_are_branches_of_the_one_tree() -> None:
    for kind in (_cuda.NoDriver, _cuda.DriverTooOld, _cuda.NoSuchDevice, _cuda.NoCudaPackage):
        assert issubclass(kind, runtimes.TargetUnavailable)
    for kind in (_cuda.CudaFailed, _cuda.OutOfDeviceMemory):
        assert issubclass(kind, runtimes.RunFailed)


def test_every_function_of_cuda_bindings_exists() -> None:
    """A name that is wrong would show on a GPU only."""
    bindings = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    used = {
        (node.value.attr, node.attr) if isinstance(node.value, ast.Attribute) else ("", node.attr)
        for module in (_cuda, _cuda_packages)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Attribute)
    }
    functions = {name for _, name in used if name.startswith("cu") and name[2:3].isupper()}
    assert len(functions) > 20
    assert [name for name in sorted(functions) if not hasattr(bindings, name)] == []
    members = {(owner, name) for owner, name in used if owner.startswith("CU")}
    assert len(members) >= 4
    assert [one for one in sorted(members) if not hasattr(getattr(bindings, one[0]), one[1])] == []


def test_memory_is_released_with_its_last_view() -> None:
    block = (ctypes.c_uint8 * 16)(*range(16))
    released: list[int] = []
    array = _cuda.view_memory(ctypes.addressof(block), 16, lambda: released.append(1))
    view = array[4:12].view("float32").reshape(2, 1)
    assert view.ctypes.data == ctypes.addressof(block) + 4
    view[...] = 1.5
    assert bytes(block[4:8]) == np.float32(1.5).tobytes()
    del array
    gc.collect()
    assert released == []
    del view
    gc.collect()
    assert released == [1]


def test_empty_memory_is_released_too() -> None:
    block = (ctypes.c_uint8 * 1)()
    released: list[int] = []
    array = _cuda.view_memory(ctypes.addressof(block), 0, lambda: released.append(1))
    assert array.shape == (0,)
    del array
    gc.collect()
    assert released == [1]


class _Offer:
    """Host memory, offered through the capsules that arrays on a GPU are offered with."""

    def __init__(self, array: np.ndarray, owner: object = None) -> None:
        self.array, self.owner = array, owner

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any:
        return _device_array.to_capsule(
            self.array.ctypes.data, self.array.shape, self.array.dtype, (1, 0), self.owner or self.array
        )


DTYPES = ("float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (5,), (), (0, 3), (1, 7)])
def test_what_is_handed_out_arrives(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.asarray(np.arange(int(np.prod(shape))).reshape(shape) % 3).astype(dtype)
    taken = np.from_dlpack(_Offer(array))
    assert taken.dtype == array.dtype
    assert taken.shape == shape
    assert np.array_equal(taken, array)
    found = _device_array.from_capsule(_Offer(array).__dlpack__(), "x")
    assert (found.dtype, found.shape) == (array.dtype, shape)
    if array.size:
        assert found.address == array.ctypes.data


def test_bfloat16_goes_through_dlpack() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.arange(4).astype(ml_dtypes.bfloat16)
    assert _device_array.from_capsule(_Offer(array).__dlpack__(), "x").dtype == array.dtype


def test_the_owner_lives_as_long_as_the_consumer() -> None:
    class Owner:
        pass

    owner = Owner()
    alive = weakref.ref(owner)
    offer = _Offer(np.ones(3), owner)
    taken = np.from_dlpack(offer)
    unused = offer.__dlpack__()
    del offer, owner
    gc.collect()
    assert alive() is not None
    del taken
    assert alive() is not None
    del unused
    gc.collect()
    assert alive() is None
    assert not _device_array._handed_out


def test_the_producer_lives_as_long_as_what_was_taken() -> None:
    array = np.arange(6.0)
    alive = weakref.ref(array)
    found = _device_array.from_capsule(array.__dlpack__(), "x")
    del array
    gc.collect()
    assert alive() is not None
    del found
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("view", [lambda a: a.T, lambda a: a[:, ::2], lambda a: a[::-1]])
def test_only_c_order_is_taken_from_a_gpu(view: Any) -> None:
    array = view(np.arange(12.0).reshape(3, 4))
    with pytest.raises(runtimes.InvalidInput, match="C order"):
        _device_array.from_capsule(array.__dlpack__(), "x")


@pytest.mark.parametrize("view", [lambda a: a[1:], lambda a: a[:1].T.reshape(4, 1), lambda a: a[:, :0]])
def test_views_in_c_order_are_taken(view: Any) -> None:
    array = view(np.arange(12.0).reshape(3, 4))
    assert _device_array.from_capsule(array.__dlpack__(), "x").shape == array.shape


def test_unknown_types_are_refused() -> None:
    with pytest.raises(runtimes.InvalidInput, match="unknown DLPack type"):
        _device_array.from_capsule(np.ones(2, "complex64").__dlpack__(), "x")
    with pytest.raises(BufferError, match="complex64"):
        _device_array.to_capsule(0, (0,), np.dtype("complex64"), (2, 0), None)


class _Interface:
    def __init__(self, **told: Any) -> None:
        self.__cuda_array_interface__ = {
            "version": 3, "shape": (2, 3), "typestr": "<f4", "data": (512, False), "strides": None, **told
        }  # fmt: skip


class _Stream:
    """Notes which streams it is made to wait for."""

    handle = 7

    def __init__(self) -> None:
        self.waited: list[int] = []

    def wait_for(self, handle: int) -> None:
        self.waited.append(handle)


@pytest.mark.parametrize(
    ("told", "waited"),
    [({}, []), ({"stream": None}, []), ({"stream": 1}, [1]), ({"stream": 94123, "strides": (12, 4)}, [94123])],
)
def test_arrays_with_the_cuda_array_interface(told: dict[str, Any], waited: list[int]) -> None:
    stream = _Stream()
    found = _device_array.on_device(_Interface(**told), name="x", ordinal=3, stream=stream)
    assert found is not None
    assert (found.address, found.shape, found.dtype, found.ordinal) == (512, (2, 3), np.dtype("float32"), 3)
    assert stream.waited == waited


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"mask": object()}, "mask would be lost"),
        ({"typestr": "<V2"}, "does not say what"),
        ({"strides": (4, 8)}, "C order"),
    ],
)
def test_arrays_with_the_cuda_array_interface_that_are_refused(told: dict[str, Any], said: str) -> None:
    with pytest.raises(runtimes.InvalidInput, match=said):
        _device_array.on_device(_Interface(**told), name="x", ordinal=0, stream=_Stream())


def test_what_is_not_on_a_gpu_is_left_to_others() -> None:
    for value in (np.ones(2), [1.0], None, _Offer(np.ones(2))):
        assert _device_array.on_device(value, name="x", ordinal=0, stream=_Stream()) is None


def test_another_gpu_is_told() -> None:
    array = _device_array.DeviceArray(512, (2,), np.dtype("float32"), 1, None)
    with pytest.raises(runtimes.InvalidInput, match="on GPU 1, the session on GPU 0"):
        _device_array.on_device(array, name="x", ordinal=0, stream=_Stream())
    same = _device_array.on_device(array, name="x", ordinal=1, stream=_Stream())
    assert same is array


def test_the_producer_is_given_the_stream_that_will_read() -> None:
    asked: list[object] = []

    class Tensor:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self, *, stream: object = None) -> Any:
            asked.append(stream)
            return _device_array.to_capsule(512, (2,), np.dtype("int8"), (2, 0), None)

    found = _device_array.on_device(Tensor(), name="x", ordinal=0, stream=_Stream())
    assert found is not None
    assert found.address == 512
    assert asked == [7]


def test_an_array_that_its_owner_does_not_hand_over() -> None:
    class Tensor:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self, *, stream: object = None) -> Any:
            raise BufferError("requires gradient, detach it first")

    with pytest.raises(runtimes.InvalidInput, match="detach it first"):
        _device_array.on_device(Tensor(), name="x", ordinal=0, stream=_Stream())


def test_a_device_array_says_where_it_is() -> None:
    array = _device_array.DeviceArray(512, (2, 3), np.dtype("float16"), 1, None)
    assert array.nbytes == 12
    assert array.__cuda_array_interface__["data"] == (512, False)
    assert array.__dlpack_device__() == (2, 1)
    with pytest.raises(BufferError):
        array.__dlpack__(copy=True)
    with pytest.raises(BufferError):
        array.__dlpack__(dl_device=(1, 0))
    empty = _device_array.DeviceArray(512, (0, 3), np.dtype("float16"), 0, None)
    assert empty.__cuda_array_interface__["data"] == (0, False)
