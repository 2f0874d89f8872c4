"""Compiled kernels of TensorRT-RTX on disk: what is read, when it is written, and that it is only our own."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path
from typing import Any

import pytest
from tensorrt_support import ADA, AMPERE

from runtimes import _tensorrt_session
from runtimes._driver import Driver
from runtimes._tensorrt_api import FLAVORS, Api
from runtimes._tensorrt_kernels import KernelStore, kernel_file
from runtimes._tensorrt_options import TensorRTOptions, build_options
from runtimes.base import RunFailed, SessionClosed, Target

RTX = Api(next(flavor for flavor in FLAVORS if flavor.target == "tensorrt-rtx"), None, "1.7.1.116", 13)
HERE = Driver((13, 1), (ADA,))
PLAN, OTHER = "a" * 64, "b" * 64


class Runtime:
    """In place of TensorRT-RTX's runtime cache: holds bytes, and compiles when told to."""

    def __init__(self, *, takes: bool = True) -> None:
        self.content, self.takes, self.given = b"", takes, 0

    def take(self, content: bytes) -> bool:
        self.content = content if self.takes else self.content
        return self.takes

    def give(self) -> bytes:
        self.given += 1
        return self.content

    def store(self, file: Path) -> KernelStore:
        return KernelStore(file, take=self.take, give=self.give)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return kernel_file(tmp_path, RTX, ADA, HERE, PLAN)


def test_what_one_process_compiled_the_next_one_has(file: Path) -> None:
    first = Runtime()
    store = first.store(file)
    assert "no kernels in the cache yet" in store.remark
    first.content = b"kernels"
    assert store.save()
    second = Runtime()
    assert second.store(file).remark == "7 bytes of compiled kernels from the cache"
    assert second.content == b"kernels"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_it_is_written_only_when_it_grew(file: Path) -> None:
    runtime = Runtime()
    store = runtime.store(file)
    assert not store.save()
    assert not file.exists()
    for content, written in ((b"one", True), (b"one", False), (b"one and two", True), (b"", False)):
        runtime.content = content
        assert store.save() is written
    assert file.read_bytes() == b"one and two"
    again = Runtime()
    assert not again.store(file).save(), "what was read is not written again"


def test_kernels_that_are_refused_are_replaced(file: Path) -> None:
    old = Runtime()
    store = old.store(file)
    old.content = b"of another driver, and many"
    store.save()
    new = Runtime(takes=False)
    store = new.store(file)
    assert "not for this machine" in store.remark
    new.content = b"few"
    assert store.save()
    assert file.read_bytes() == b"few"


@pytest.mark.parametrize("which", ["file", "folder", "link"])
def test_kernels_that_others_could_have_written_never_reach_the_runtime(file: Path, tmp_path: Path, which: str) -> None:
    file.parent.mkdir(mode=0o700)
    if which == "link":
        (tmp_path / "elsewhere").write_bytes(b"evil")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.write_bytes(b"evil")
        file.chmod(0o666 if which == "file" else 0o600)
        file.parent.chmod(0o777 if which == "folder" else 0o700)
    runtime = Runtime()
    assert "no kernels in the cache yet" in runtime.store(file).remark
    assert runtime.content == b""


def test_every_plan_gpu_driver_and_version_has_its_own(tmp_path: Path) -> None:
    newer = dataclasses.replace(RTX, version="1.8.0")
    files = {
        kernel_file(tmp_path, RTX, ADA, HERE, PLAN),
        kernel_file(tmp_path, RTX, ADA, HERE, OTHER),
        kernel_file(tmp_path, RTX, AMPERE, HERE, PLAN),
        kernel_file(tmp_path, RTX, ADA, Driver((13, 2), (ADA,)), PLAN),
        kernel_file(tmp_path, newer, ADA, HERE, PLAN),
    }
    assert len(files) == 5
    for file in files:
        assert file.parent == tmp_path / "kernels"
        assert len(file.name) < 255
        assert "/" not in file.name
        assert " " not in file.name


def test_a_disk_that_takes_nothing_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_bytes(b"a file where the folder would be")
    runtime = Runtime()
    store = runtime.store(kernel_file(tmp_path, RTX, ADA, HERE, PLAN))
    runtime.content = b"kernels"
    assert not store.save()


def test_the_engine_is_the_same_whether_kernels_are_kept() -> None:
    assert build_options(TensorRTOptions(kernel_cache=False)) == build_options(TensorRTOptions())


class Engine:
    """As much of an engine as a session asks for before it runs."""

    inputs = outputs = profiles = ()
    on_host: frozenset[str] = frozenset()
    gpu = None
    keeps_kernels = True


@pytest.fixture
def session(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[_tensorrt_session.TensorRTSession, Runtime]:
    monkeypatch.setattr(_tensorrt_session, "Execution", lambda engine: object())
    monkeypatch.setattr(_tensorrt_session._cuda, "package", lambda: "cuda-bindings 13.0")
    runtime = Runtime()
    engine: Any = Engine()
    store = runtime.store(file)
    return _tensorrt_session.TensorRTSession(engine, Target("tensorrt-rtx"), info={}, shapes={}, store=store), runtime


def test_a_session_saves_when_it_is_closed_and_then_lets_the_engine_go(file: Path, session: Any) -> None:
    opened, runtime = session
    assert "no kernels" in opened.info["kernels"]
    runtime.content = b"compiled by a binding"
    opened.close()
    assert file.read_bytes() == b"compiled by a binding"
    given = runtime.given
    opened.close()
    assert runtime.given == given, "a closed session has nothing to ask"
    with pytest.raises(SessionClosed):
        opened.inspect(lambda engine, context: None)


def test_a_gpu_that_is_lost_does_not_keep_a_session_from_closing(session: Any) -> None:
    opened, _ = session

    def lost() -> bytes:
        raise RunFailed("the CUDA driver failed: CUDA_ERROR_ECC_UNCORRECTABLE")

    opened._store._give = lost
    opened.close()
    assert "not kept" in opened.info["kernels"]


def test_the_first_run_saves_and_later_ones_do_not_ask(
    file: Path, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, runtime = session
    import contextlib

    opened._gpu = contextlib.nullcontext()

    def run(*_: object) -> dict[str, object]:
        runtime.content = b"compiled by the first run"
        return {}

    monkeypatch.setattr(opened, "_run", run)
    for _ in range(3):
        opened.run({})
    assert file.read_bytes() == b"compiled by the first run"
    assert runtime.given == 1
