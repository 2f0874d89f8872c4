"""What the tests on a GPU share: the targets, and how a graph is compiled for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import runtimes
from runtimes.model_file import check_model_file

TARGETS = ("ort-cuda", "tensorrt", "tensorrt-rtx")

#: From an ONNX file, a target and options to a session.
Build = Callable[..., runtimes.Session]


def compile_options(target: str, model: Path, *, largest: int = 512, **options: Any) -> Any:
    """What a target needs to take every size from 1 to ``largest`` where the graph leaves one open."""
    if not target.startswith("tensorrt"):
        return options or None
    names = {dim for shape in check_model_file(model).shapes.values() for dim in shape or () if isinstance(dim, str)}
    return {"profiles": [{name: [1, min(8, largest), largest] for name in names}] if names else [], **options}
