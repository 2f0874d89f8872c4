"""Which TensorRT is taken, told with stand-ins for those that are not installed here."""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Iterator

import pytest

import runtimes
from runtimes._tensorrt_api import FLAVORS, Api, find_api, require_api
from runtimes.base import Availability


class Flag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    find_api.cache_clear()
    yield
    find_api.cache_clear()


def stand_in(monkeypatch: pytest.MonkeyPatch, version: str | None) -> types.ModuleType:
    """A module ``tensorrt`` of that version; None has none, as what an uninstall leaves behind."""
    module = types.ModuleType("tensorrt")
    module.__spec__ = types.SimpleNamespace(name="tensorrt")  # type: ignore[assignment]
    if version is not None:
        module.__version__ = version  # type: ignore[attr-defined]
    module.NetworkDefinitionCreationFlag = Flag  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.mark.parametrize(("version", "major", "flags"), [("10.16.1.11", 10, 2), ("11.4.0.5", 11, 0)])
def test_strong_typing_is_asked_for_where_there_is_another(
    monkeypatch: pytest.MonkeyPatch, version: str, major: int, flags: int
) -> None:
    stand_in(monkeypatch, version)
    api = require_api("tensorrt")
    assert (api.flavor.major, api.version, api.network_flags()) == (major, version, flags)
    assert api.capabilities() == ()


@pytest.mark.parametrize("version", ["8.6.1", "9.3.0", "12.0.1"])
def test_other_versions_are_refused_with_what_is_known(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    stand_in(monkeypatch, version)
    found = find_api("tensorrt")
    assert isinstance(found, Availability)
    assert not found.available
    assert f"tensorrt {version} is installed, but 10 and 11 are known" in (found.reason or "")
    with pytest.raises(runtimes.TargetUnavailable, match="10 and 11"):
        require_api("tensorrt")


def test_a_folder_that_an_uninstall_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, None)
    found = find_api("tensorrt")
    assert isinstance(found, Availability)
    assert "does not import" in (found.reason or "")
    assert "pip install" in (found.remedy or "")


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = find_api("tensorrt-rtx")
    assert isinstance(found, Availability)
    assert (found.reason, found.remedy) == ("tensorrt_rtx is not installed", "pip install tensorrt-rtx-cu13")
    for target in ("tensorrt-rtx", "tensorrt-rtx:sm89"):
        parsed = runtimes.Target.parse(target)
        for state in (
            runtimes.backend("tensorrt-rtx").can_compile(parsed),
            runtimes.backend("tensorrt-rtx").can_run(parsed),
        ):
            assert (state.reason, state.remedy) == (found.reason, found.remedy)


@pytest.mark.parametrize(
    ("distribution", "cuda"), [("tensorrt_cu13", 13), ("tensorrt-cu12", 12), ("tensorrt", None), ("tensorrt_cux", None)]
)
def test_the_cuda_that_it_was_built_for(monkeypatch: pytest.MonkeyPatch, distribution: str, cuda: int | None) -> None:
    stand_in(monkeypatch, "11.4.0")
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: {"tensorrt": ["other", distribution]})
    assert require_api("tensorrt").cuda == cuda


def test_there_is_one_row_for_each() -> None:
    rows = [(flavor.target, flavor.major) for flavor in FLAVORS]
    assert len(set(rows)) == len(rows)


def test_the_logger_keeps_what_matters_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx: tensorrt_rtx is not installed")
    api = require_api("tensorrt-rtx")
    assert isinstance(api, Api)
    logger = api.logger()
    assert api.logger() is not logger
    for number in range(1000):
        logger.log(api.trt.ILogger.VERBOSE, "noise")
        logger.log(api.trt.ILogger.ERROR, f"error {number}")
    assert logger.messages[-1] == ("ERROR", "error 999")
    assert len(logger.messages) < 1000
    assert all(severity == "ERROR" for severity, _ in logger.messages)
    assert capfd.readouterr() == ("", "")
