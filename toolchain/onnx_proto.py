"""The message classes of ONNX alone: without the rest of the package onnx, which is 10 MB and a tenth of a second."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any


@functools.cache
def onnx_proto() -> Any:
    """The module of ModelProto, GraphProto, TensorProto and so on.

    They are the very classes that the package has, whichever is imported first: protobuf makes one for each message.
    """
    spec = None if "onnx" in sys.modules else importlib.util.find_spec("onnx")
    path = None if spec is None or spec.origin is None else Path(spec.origin).with_name("onnx_ml_pb2.py")
    if path is None or not path.is_file():
        import onnx

        return onnx
    # Not under its own name: whoever imports onnx later is to get all of it.
    alone = importlib.util.spec_from_file_location("toolchain._onnx_ml_pb2", path)
    assert alone is not None
    assert alone.loader is not None
    module = importlib.util.module_from_spec(alone)
    alone.loader.exec_module(module)
    return module
