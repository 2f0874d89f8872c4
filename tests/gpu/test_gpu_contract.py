"""The contract of ``runtimes.Session`` on every runtime that uses a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from gpu_support import compile_options

import runtimes
from runtimes.testing import Load, RuntimeContract

_STRINGS = (
    "echo-string",
    "a_string_in_and_out_is_in_the_specs",
    "only_text_is_a_string",
    "numpys_own_strings_are_taken",
)


class GpuContract(RuntimeContract):
    cycles: ClassVar[int] = 100

    def compile_options(self, model: Path) -> Any:
        return compile_options(self.target, model)

    def test_results_can_be_left_on_the_device(self, load: Load) -> None:
        session = load("g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }")
        feeds = {"x": np.array([[-1, 2, 3]], "float32")}
        left = session.run(feeds, outputs="device")["y"]
        assert left.__dlpack_device__() == (2, 0)
        assert np.array_equal(left.numpy(), [[0, 2, 3]])
        with pytest.raises(runtimes.InvalidInput, match="'host' or 'device'"):
            session.run(feeds, outputs="cpu")  # type: ignore[arg-type]


class TestOrtCuda(GpuContract):
    target = "ort-cuda"
    cannot: ClassVar = dict.fromkeys((*_STRINGS, "bind_strings"), "has no kernel for strings: no node runs on the GPU")


class TestTensorRT(GpuContract):
    target = "tensorrt"
    cannot: ClassVar = {
        **dict.fromkeys((*_STRINGS, "bind_strings"), "has no strings"),
        **dict.fromkeys(("echo-int16", "echo-uint16", "echo-uint32", "echo-uint64"), "has no such integers"),
        **dict.fromkeys(("echo-double", "double-exact"), "has no float64"),
        "names_that_stand_for_no_size_are_not_compared": "takes equal names for equal sizes, whatever the name",
        "bound_results_of_another_shape_are_told": "has no Compress",
    }


class TestTensorRTRTX(TestTensorRT):
    target = "tensorrt-rtx"
    cannot: ClassVar = {**TestTensorRT.cannot, "bind_refuses_shapes_that_depend_on_data": "has no NonZero"}
