"""The contract of ``runtimes.Session``, on every backend that works here."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from runtimes import TensorSpec
from runtimes._inputs import InputCheck
from runtimes.testing import RuntimeContract


class TestOrtCpu(RuntimeContract):
    target = "ort-cpu"


class TestReference(RuntimeContract):
    target = "reference"


class TestOpenVinoCpu(RuntimeContract):
    target = "openvino-cpu"
    cannot: ClassVar = {
        **dict.fromkeys(
            (
                "echo-string",
                "a_string_in_and_out_is_in_the_specs",
                "only_text_is_a_string",
                "numpys_own_strings_are_taken",
                "bind_strings",
                "and-strings",
            ),
            "its CPU plug-in handles strings in tokenizers only, and dies of others",
        ),
        "int64-large": "computes integers in int32: larger inputs are refused",
        "double-exact": "computes float64 in float32, and says so in session.info",
    }


def test_a_service_that_sees_any_number_of_shapes_remembers_few() -> None:
    check = InputCheck([TensorSpec("x", "float32", ("N",))])
    for size in range(1000):
        check({"x": np.zeros(size, "float32")})
    assert len(check._accepted) <= 256
