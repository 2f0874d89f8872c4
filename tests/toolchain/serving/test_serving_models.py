"""Models in memory: loaded once, evicted under a cap, fetched back, described without being loaded, and always a
ServingError."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from versions_support import X, factor_of, model_bytes, reason, request, scaled, serving, states, until, write_artifact

from runtimes import InvalidArtifact
from toolchain.serving import loading
from toolchain.serving.base import DeadlineExceeded, ModelFailed, NotFound, Overloaded, Unavailable
from toolchain.serving.models import Models
from toolchain.serving.options import ModelOptions, ResultCache, Rollout, ServerOptions
from toolchain.serving.repository import open_source

MB = 1 << 20
LAZY = ModelOptions(preload=False)


class Counted:
    """``loading.make``, counted, and held up where it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loads: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        make = loading.make

        def counted(version: Any, *args: Any, **more: Any) -> loading.Made:
            self.loads.append(version.model)
            if version.model in self.gates:
                assert self.gates[version.model].wait(20)
            return make(version, *args, **more)

        monkeypatch.setattr(loading, "make", counted)

    def hold(self, model: str) -> threading.Event:
        self.gates[model] = threading.Event()
        return self.gates[model]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def flat_memory() -> int:
    """Resident memory that never grows: then a version takes what its files do."""
    return 100 * MB


def write_four(root: Path) -> Path:
    """Models a, b, c, d of 4 MB each."""
    for index, name in enumerate("abcd"):
        write_artifact(root / name / "1", 2.0 + index, padding=4 * MB)
    return root


def test_all_that_transports_ask(tmp_path: Path) -> None:
    write_artifact(tmp_path / "m" / "a" / "1", 2.0, labels=["cat", "dog"], preprocessing={"size": [2, 2]}, source="x")
    write_artifact(tmp_path / "m" / "b" / "1", 3.0)
    (tmp_path / "m" / "b" / "serving.yaml").write_text("labels: names.txt\nbatching: {max_batch_size: 8}\n")
    (tmp_path / "m" / "b" / "names.txt").write_text("eins\nzwei\n")

    async def run() -> None:
        async with serving(tmp_path / "m") as models:
            assert models.names() == ("a", "b")
            assert models.is_ready()
            assert models.is_ready("a", "1")
            info = models.info("a")
            assert (info.name, info.version, info.platform, info.precision) == ("a", "1", "ort-cpu", "fp32")
            assert (info.max_batch_size, info.labels, info.preprocessing) == (64, ("cat", "dog"), {"size": [2, 2]})
            assert info.metadata == {"source": "x"}
            assert (models.info("b").labels, models.info("b").max_batch_size) == (("eins", "zwei"), 8)
            assert models.model_options("b").batching.max_batch_size == 8
            assert models.versions("a") == ("1",)
            response = await models.infer(request("b", id="7"))
            assert (response.model, response.version, response.id) == ("b", "1", "7")
            np.testing.assert_array_equal(response.outputs["y"], 3 * X)
            assert models.all_statistics()["b", "1"].success.count == 1
            assert models.loaded("b") is not None
            assert states(models) == {("a", "1"): "READY", ("b", "1"): "READY"}
            resources = models.resources()
            assert [one["model"] for one in resources["models"]] == ["a", "b"]
            assert resources["loads"] == 2
            for model, version, error in (("c", "", NotFound), ("a", "2", NotFound), ("a", "../1", NotFound)):
                with pytest.raises(error):
                    models.info(model, version)
                with pytest.raises(error):
                    await models.infer(request(model, version))
            with pytest.raises(NotFound, match="there are: a, b"):
                models.versions("c")
        assert not models.is_ready("a")
        with pytest.raises(Unavailable, match="shutting down"):
            await models.infer(request("a"))

    asyncio.run(run())


def test_a_bare_file_and_its_batches(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(model_bytes(scaled(5)))
    mixing = tmp_path / "mixing.onnx"
    mixing.write_bytes(model_bytes("g (float[n, 2] x) => (float[n, 2] y) { y = Softmax <axis = 0> (x) }"))

    async def run() -> None:
        async with serving(path) as models:
            assert factor_of(await models.infer(request("net"))) == 5
            assert (models.info("net").digest, models.info("net").max_batch_size) == ("", 64)
        async with serving(mixing) as models:
            assert models.info("mixing").max_batch_size == 0  # each row's result depends on the others

    asyncio.run(run())


def test_two_requests_for_a_cold_model_load_it_once_and_one_that_gives_up_ends_nothing(
    tmp_path: Path, counted: Counted
) -> None:
    write_artifact(tmp_path / "m" / "a" / "1", 2.0)
    write_artifact(tmp_path / "m" / "b" / "1", 3.0)

    async def run() -> None:
        async with serving(tmp_path / "m", defaults=LAZY) as models:
            assert states(models)["a", "1"] == "UNAVAILABLE"
            assert models.is_ready("a")
            assert [spec.name for spec in models.info("a").inputs] == ["x"]
            assert counted.loads == []
            gate = counted.hold("a")
            asked = [asyncio.create_task(models.infer(request("a"))) for _ in range(3)]
            await until(lambda: counted.loads == ["a"])
            assert states(models)["a", "1"] == "LOADING"
            asked[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked[0]
            late = request("a", deadline_ns=time.monotonic_ns() + 50_000_000)
            with pytest.raises(DeadlineExceeded):
                await models.infer(late)
            # Loading one does not block another, nor the loading of another.
            assert factor_of(await models.infer(request("b"))) == 3
            gate.set()
            assert [factor_of(response) for response in await asyncio.gather(*asked[1:])] == [2, 2]
            assert counted.loads == ["a", "b"]

    asyncio.run(run())


def test_the_least_recently_used_leaves_under_a_cap(tmp_path: Path, counted: Counted) -> None:
    root = write_four(tmp_path / "m")

    async def run() -> None:
        # 85 % of the cap is 112.5 MB, and the server has 100: room for three of 4 MB.
        cap = int(112.5 * MB / 0.85)
        async with serving(root, defaults=LAZY, max_memory=cap, resident=flat_memory) as models:
            for name in "abca":
                await models.infer(request(name))
            assert counted.loads == ["a", "b", "c"]
            assert factor_of(await models.infer(request("d"))) == 5
            assert [one["model"] for one in models.resources()["models"]] == ["a", "c", "d"]
            assert models.resources()["evictions"] == 1
            assert states(models)["b", "1"] == "UNAVAILABLE"
            assert "room for d" in reason(models, "b", "1")
            assert models.is_ready("b")
            assert factor_of(await models.infer(request("b"))) == 3
            assert [one["model"] for one in models.resources()["models"]] == ["a", "b", "d"]
            assert models.all_statistics()["b", "1"].success.count == 2  # counts outlive the session

    asyncio.run(run())


def test_pinned_and_busy_ones_stay_and_what_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_four(tmp_path / "m")
    (root / "a" / "serving.yaml").write_text("pin: true")
    write_artifact(root / "large" / "1", padding=16 * MB)
    monkeypatch.setattr("toolchain.serving.residency._ROOM_S", 0.3)

    async def run() -> None:
        cap = int(104.5 * MB / 0.85)
        async with serving(root, defaults=LAZY, max_memory=cap, resident=flat_memory) as models:
            await models.infer(request("a"))
            with pytest.raises(Overloaded, match="busy or pinned"):
                await models.infer(request("b"))
            assert [one["model"] for one in models.resources()["models"]] == ["a"]
            with pytest.raises(Unavailable, match="--max-memory"):
                await models.infer(request("large"))
        (root / "a" / "serving.yaml").unlink()
        async with serving(root, defaults=LAZY, max_memory=cap, resident=flat_memory) as models:
            await models.infer(request("a"))
            loaded = models.loaded("a")
            assert loaded is not None
            gate = threading.Event()
            run_session = loaded.session.run

            def held(feeds: Any, **more: Any) -> Any:
                assert gate.wait(20)
                return run_session(feeds, **more)

            monkeypatch.setattr(loaded.session, "run", held)
            # Away from the loop, where a model as small as this would run.
            asked = asyncio.create_task(models.infer(request("a", x=np.ones((64, 2), np.float32))))
            await asyncio.sleep(0.05)
            waiting = asyncio.create_task(models.infer(request("b")))
            await asyncio.sleep(0.1)
            assert loaded.busy
            assert states(models)["a", "1"] == "READY"
            gate.set()
            assert factor_of(await asked) == 2
            assert factor_of(await waiting) == 3
            assert states(models)["a", "1"] == "UNAVAILABLE"

    asyncio.run(run())


def test_what_was_used_most_comes_back_when_there_is_room(tmp_path: Path, counted: Counted) -> None:
    root = write_four(tmp_path / "m")

    async def run() -> None:
        cap = int(108.5 * MB / 0.85)
        async with serving(root, defaults=LAZY, max_memory=cap, resident=flat_memory) as models:
            for name in ["a"] * 3 + ["b"] * 9 + ["c", "d"]:
                await models.infer(request(name))
            assert [one["model"] for one in models.resources()["models"]] == ["c", "d"]
            await models.unload("c")
            await models.unload("d")
            await until(lambda: [one["model"] for one in models.resources()["models"]] == ["a", "b"])
            assert counted.loads == ["a", "b", "c", "d", "b", "a"]
            assert models.resources()["prefetches"] == 2
            await asyncio.sleep(0.6)
            assert models.resources()["prefetches"] == 2  # c and d were unloaded by hand

    asyncio.run(run())


def test_what_a_session_takes_is_measured(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "m", padding=64 * MB)

    async def run() -> None:
        async with serving(path, defaults=LAZY) as models:
            await models.infer(request("m"))
            (one,) = models.resources()["models"]
            assert one["measured"]
            assert 40 * MB < one["bytes"] < 400 * MB

    asyncio.run(run())


def test_counts_of_versions_that_are_gone_are_forgotten_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "m"
    write_artifact(root / "a" / "1", 1.0)
    at_once = ModelOptions(rollout=Rollout(trial_seconds=0, trial_requests=0))
    for name, value in (("_TICK_S", 0.01), ("_TIDY_S", 0.01), ("_COUNTS_S", 0.5)):
        monkeypatch.setattr(f"toolchain.serving.models.{name}", value)

    async def run() -> None:
        async with serving(root, defaults=at_once, result_cache={"max_bytes": 1 << 20, "max_age_seconds": 0.3}) as one:
            await one.infer(request("a"))
            assert one.cache_statistics()["entries"] == 1
            write_artifact(root / "a" / "2", 2.0)
            await until(lambda: one.info("a").version == "2")
            await until(lambda: one.cache_statistics()["entries"] == 0)
            await asyncio.sleep(0.7)
            assert set(one.all_statistics()) == {("a", "1"), ("a", "2")}, "it is on disk, and may come back"
            shutil.rmtree(root / "a" / "1")
            await until(lambda: set(one.all_statistics()) == {("a", "2")})
            write_artifact(root / "a" / "3", 3.0)
            await until(lambda: one.info("a").version == "3")
            assert one.all_statistics()["a", "2"].success.count == 0

    asyncio.run(run())


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is looked at all the time, and what is done about it is done at once."""
    monkeypatch.setattr("toolchain.serving.relief._STEP_S", 0.0)
    monkeypatch.setattr("toolchain.serving.models._TICK_S", 0.01)
    monkeypatch.setattr("toolchain.serving.memory.HORIZON_S", 0.0)


@pytest.mark.usefixtures("prompt")
def test_relief_shrinks_then_evicts_then_refuses_and_grows_again(tmp_path: Path) -> None:
    root = write_four(tmp_path / "m")
    used = [200 * MB]

    async def run() -> None:
        async with serving(root, max_memory=1000 * MB, resident=lambda: used[0]) as models:
            loaded = models.loaded("a")
            assert loaded is not None
            assert loaded.batch_limit == 64
            used[0] = 870 * MB
            await until(lambda: loaded.batch_limit == 8)
            assert (models.resources()["relief"], models.resources()["evictions"]) == ("shrink", 0)
            used[0] = 930 * MB
            await until(lambda: models.resources()["relief_evictions"] == 4)
            assert models.is_ready("a")
            used[0] = 985 * MB
            await until(lambda: models.resources()["relief"] == "refuse")
            with pytest.raises(Overloaded, match="out of memory"):
                await models.infer(request("a"))
            assert models.resources()["refusals"] == 1
            assert models.all_statistics()["a", "1"].failures["REJECTED"] == 1
            used[0] = 200 * MB
            await until(lambda: models.resources()["relief"] == "none")
            await until(lambda: models.resources()["batch_share"] == 1)
            await models.infer(request("a"))
            again = models.loaded("a")
            assert again is not None
            assert again.batch_limit == 64

    asyncio.run(run())


@pytest.mark.usefixtures("prompt")
def test_a_version_loaded_while_memory_is_short_has_small_batches_too(tmp_path: Path) -> None:
    root = write_four(tmp_path / "m")
    used = [200 * MB]

    async def run() -> None:
        async with serving(root, max_memory=1000 * MB, resident=lambda: used[0], defaults=LAZY) as models:
            used[0] = 870 * MB
            await until(lambda: models.resources()["batch_share"] == 0.125)
            used[0] = 830 * MB  # there is room, and memory is still called short
            await until(lambda: models.resources()["room_bytes"] > 15 * MB)
            await models.infer(request("a"))
            loaded = models.loaded("a")
            assert loaded is not None
            assert loaded.batch_limit == 8
            assert models.resources()["relief"] == "shrink"

    asyncio.run(run())


def test_unloaded_by_hand_and_loaded_again(tmp_path: Path) -> None:
    write_artifact(tmp_path / "m" / "a" / "1")

    async def run() -> None:
        async with serving(tmp_path / "m") as models:
            await models.unload("a")
            await until(lambda: not models.resources()["models"])
            assert states(models) == {("a", "1"): "UNAVAILABLE"}
            assert not models.is_ready("a")
            with pytest.raises(Unavailable, match="unloaded by an operator"):
                await models.infer(request("a"))
            await asyncio.sleep(0.2)
            assert states(models) == {("a", "1"): "UNAVAILABLE"}  # looking at the disk does not undo it
            await models.load("a")
            assert factor_of(await models.infer(request("a"))) == 2
            for method in (models.load, models.unload, models.rollback):
                with pytest.raises(NotFound):
                    await method("nothing")

    asyncio.run(run())


def test_what_the_runtime_refuses_is_a_serving_error(tmp_path: Path) -> None:
    graph = "g (int64[n] x) => (float[n] y) <float[3] t = {1.0, 2.0, 3.0}> { y = Gather(t, x) }"
    feeds = {"x": np.array([0, 2])}
    write_artifact(tmp_path / "a", graph=graph, feeds=feeds, expected=np.array([1, 3], np.float32))

    async def run() -> None:
        async with serving(tmp_path / "a") as models:
            with pytest.raises(ModelFailed):
                await models.infer(request("a", x=np.array([7])))
            assert models.all_statistics()["a", "1"].failures["BACKEND"] == 1
            assert (await models.infer(request("a", x=np.array([1])))).outputs["y"].tolist() == [2]

    asyncio.run(run())


def test_one_artifact_that_cannot_be_loaded_ends_the_start(tmp_path: Path) -> None:
    """There is nothing else to serve; the error says what to do. In a repository it is tried again, as below."""
    artifact = write_artifact(tmp_path / "m" / "a" / "1", more={"recipe.yaml": b"model: x\n"})

    async def run() -> None:
        defaults = ModelOptions(target="tensorrt")
        with pytest.raises(InvalidArtifact, match="nothing for target 'tensorrt'") as caught:
            async with serving(artifact, defaults=defaults):
                pass
        assert "toolchain build" in str(caught.value.hint)
        async with serving(tmp_path / "m", defaults=defaults) as models:
            assert states(models) == {("a", "1"): "UNAVAILABLE"}

    asyncio.run(run())


def test_a_model_that_is_broken_at_first_is_served_when_it_is_whole(tmp_path: Path) -> None:
    root = tmp_path / "m"
    folder = write_artifact(root / "a" / "1")
    weights = (folder / "v" / "model.onnx").read_bytes()
    (folder / "v" / "model.onnx").write_bytes(weights[:-1])  # a copy that goes on

    async def run() -> None:
        async with serving(root) as models:
            assert states(models) == {("a", "1"): "UNAVAILABLE"}
            why = reason(models, "a", "1")
            assert "model.onnx" in why
            assert str(tmp_path) not in why, "where models lie is nothing for clients"
            assert not models.is_ready()
            with pytest.raises(Unavailable, match=r"model\.onnx"):
                await models.infer(request("a"))
            with pytest.raises(Unavailable, match=r"model\.onnx"):
                await models.load("a")
            (folder / "v" / "model.onnx").write_bytes(weights)
            await until(lambda: models.is_ready("a"))
            assert factor_of(await models.infer(request("a"))) == 2

    asyncio.run(run())


def test_a_cold_model_that_cannot_be_loaded_gives_way_to_the_one_before(tmp_path: Path) -> None:
    root = tmp_path / "m"
    write_artifact(root / "a" / "1", 2.0)
    write_artifact(root / "a" / "2", 3.0, expected=X)  # fails its self-test

    async def run() -> None:
        async with serving(root, defaults=LAZY) as models:
            with pytest.raises(Unavailable, match="off by"):
                await models.infer(request("a", "2"))
            assert factor_of(await models.infer(request("a"))) == 2
            assert states(models) == {("a", "1"): "READY", ("a", "2"): "UNAVAILABLE"}

    asyncio.run(run())


def test_models_that_come_and_go(tmp_path: Path) -> None:
    root = tmp_path / "m"
    root.mkdir()

    async def run() -> None:
        async with serving(root) as models:
            assert (models.names(), models.is_ready()) == ((), False)
            write_artifact(root / "a" / "1")
            await until(lambda: models.names() == ("a",) and models.is_ready("a"))
            (root / "a" / "serving.yaml").write_text("batching: {max_batch_size: 4}")
            await until(lambda: models.info("a").max_batch_size == 4)
            (root / "a" / "serving.yaml").write_text("batching: {max_batch_size: many}")
            await until(lambda: "max_batch_size" in reason(models, "a", "1"))
            assert models.info("a").max_batch_size == 4
            assert factor_of(await models.infer(request("a"))) == 2
            shutil.rmtree(root / "a")
            await until(lambda: models.names() == ())
            with pytest.raises(NotFound):
                await models.infer(request("a"))
            assert models.switches[-1]["what"] == "withdrawn"

    asyncio.run(run())


def test_the_result_cache_is_shared_and_told(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a")

    async def run() -> None:
        async with serving(tmp_path / "a", result_cache=ResultCache(max_bytes=MB)) as models:
            assert not (await models.infer(request("a"))).cached
            assert (await models.infer(request("a"))).cached
            assert models.cache_statistics()["hits"] == 1
        async with serving(tmp_path / "a") as models:
            assert models.cache_statistics() == {"enabled": False}

    asyncio.run(run())


def test_a_source_that_is_gone_at_the_start(tmp_path: Path) -> None:
    root = tmp_path / "m"
    root.mkdir()
    source = open_source(root)
    root.rmdir()

    async def run() -> None:
        models = Models(ServerOptions(), source)
        with pytest.raises(InvalidArtifact, match="cannot be read"):
            await models.start()
        await models.stop()

    asyncio.run(run())
