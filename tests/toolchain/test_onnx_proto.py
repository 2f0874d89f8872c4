"""ONNX's message classes by themselves: the same as the package has, whichever comes first."""

from __future__ import annotations

import subprocess
import sys

import pytest
from toolchain_support import ROOT

_ALONE = """
import sys
from toolchain.onnx_proto import onnx_proto
alone = onnx_proto()
tensor = alone.TensorProto(name="w", dims=[2], data_type=1, raw_data=bytes(8))
print("onnx" in sys.modules)
import onnx
print(onnx.ModelProto is alone.ModelProto, isinstance(tensor, onnx.TensorProto))
print(onnx.onnx_ml_pb2.ModelProto is onnx.ModelProto, onnx.numpy_helper.to_array(tensor).tolist())
"""
_AFTER = """
import onnx
from toolchain.onnx_proto import onnx_proto
print(onnx_proto().ModelProto is onnx.ModelProto)
"""


@pytest.mark.parametrize(
    ("program", "expected"),
    [(_ALONE, "False\nTrue True\nTrue [0.0, 0.0]\n"), (_AFTER, "True\n")],
    ids=["first", "after"],
)
def test_the_classes_are_those_of_the_package(program: str, expected: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == expected
