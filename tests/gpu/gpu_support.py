"""What the tests on a GPU share: the targets, and how a graph is compiled for each."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import runtimes

#: ``GPU_TARGETS=ort-cpu`` runs what can be run without a GPU, to try the tests themselves.
TARGETS = tuple(os.environ.get("GPU_TARGETS", "ort-cuda,tensorrt,tensorrt-rtx").split(","))

#: From an ONNX file, a target and options to a session.
Build = Callable[..., runtimes.Session]


def compile_options(target: str, model: Path, *, largest: int = 512, **options: Any) -> Any:
    """What a target needs to take every size from 1 to ``largest`` where the graph leaves one open."""
    if not target.startswith("tensorrt"):
        return options or None
    inputs = onnx.load(model, load_external_data=False).graph.input
    names = {dim.dim_param for value in inputs for dim in value.type.tensor_type.shape.dim if dim.dim_param}
    return {"profiles": [{name: [1, min(8, largest), largest] for name in names}] if names else [], **options}


def require_modules(what: str, *modules: str) -> None:
    """Skips where one does not import, and says why: what it imports itself may be what is missing."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            pytest.skip(f"{what}: {module} does not import: {error}")
