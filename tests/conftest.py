"""Fixtures that every test may use."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports it: failed assertions of the contract then show their values.
pytest.register_assert_rewrite("runtimes.testing")

# A shell that starts us in the background has interrupts ignored, and children inherit that: then none could be sent.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def assets_dir() -> Path:
    """Where real weights and images would be: $ASSETS, or ../shared/assets beside the project."""
    return Path(os.environ.get("ASSETS", ROOT.parent / "shared" / "assets"))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real weights and images; the test skips where it is absent."""
    path = assets_dir()
    if not path.is_dir():
        pytest.skip("no real weights and images: set ASSETS to their folder")
    return path


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLCHAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield
