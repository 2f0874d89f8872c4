"""Fixtures of the tests that need an NVIDIA GPU. Without one, and without a runtime, they skip by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_support import TARGETS, Build, compile_options

import runtimes
from runtimes import _cuda
from runtimes._driver import driver


@pytest.fixture(scope="session")
def gpu() -> _cuda.Device:
    """The first GPU."""
    if reason := driver().reason:
        pytest.skip(f"gpu: {reason}")
    if _cuda.package() is None:
        pytest.skip("gpu: neither pycuda nor cuda-bindings is installed")
    return _cuda.device(0)


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """Each target that runs here."""
    name = str(request.param)
    state = runtimes.backend(name).can_run(runtimes.Target(name))
    if not state.available:
        pytest.skip(f"{name}: {state.reason}")
    return name


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Compiles and loads; what it made is closed at the end."""
    made: list[runtimes.Session] = []

    def build(model: Path, target: str, **options: Any) -> runtimes.Session:
        folder = tmp_path / f"{target}-{len(made)}"
        typed = compile_options(target, model, **options)
        compiled = runtimes.compile(model, target, folder, options=typed)
        backend = runtimes.backend(compiled.target.runtime)
        known = backend.options_type(**typed) if typed else None
        made.append(backend.load(compiled, options=known))
        return made[-1]

    yield build
    for session in made:
        session.close()
