"""Versions under load: not one failed request across switches, broken versions, trials and rollbacks."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from versions_support import X, factor_of, reason, request, serving, slow, states, until, write_artifact

from runtimes import _versions
from toolchain.serving.base import InvalidRequest, NotFound, Request, ServingError, Unavailable
from toolchain.serving.models import Models
from toolchain.serving.options import ModelOptions, Rollout, VersionPolicy
from toolchain.serving.tensors import check

AT_ONCE = ModelOptions(rollout=Rollout(trial_seconds=0, trial_requests=0))
#: A table of as many numbers as a version knows: beyond it, it fails.
TABLE = "g (int64[n] x) => (float[n] y) <float[{0}] t = {{{1}}}> {{ y = Gather(t, x) }}"


def write_table(folder: Path, size: int, value: float) -> Path:
    graph = TABLE.format(size, ", ".join([f"{value}"] * size))
    return write_artifact(folder, graph=graph, feeds={"x": np.array([0])}, expected=np.array([value], np.float32))


@contextlib.asynccontextmanager
async def clients(
    models: Models, model: str = "a", *, count: int = 8, pause: float = 0.001, x: np.ndarray = X
) -> AsyncIterator[Counter[float | str]]:
    """Clients that go on asking, each one request after the other; and what they got: factors, or errors."""
    seen: Counter[float | str] = Counter()
    end = asyncio.Event()

    async def client() -> None:
        while not end.is_set():
            try:
                info = models.info(model)  # as a transport does
                check(info, {"x": ("FP32" if x.dtype == np.float32 else "INT64", list(x.shape))}, max_bytes=1 << 20)
                response = await models.infer(request(model, x=x))
                seen[float(response.outputs["y"].reshape(-1)[-1]) / max(float(x.reshape(-1)[-1]), 1)] += 1
            except ServingError as error:
                seen[f"{type(error).__name__}: {error.what}"] += 1
            await asyncio.sleep(pause)

    tasks = [asyncio.create_task(client()) for _ in range(count)]
    try:
        yield seen
    finally:
        end.set()
        await asyncio.gather(*tasks)


def log(models: Models) -> list[tuple[object, object, object]]:
    return [(one["from"], one["to"], one["what"]) for one in models.switches]


def test_not_one_failed_request_across_many_switches(tmp_path: Path) -> None:
    root = tmp_path / "m"
    write_artifact(root / "a" / "1", 1.0)

    async def run() -> None:
        async with serving(root, poll_seconds=0.02, defaults=AT_ONCE) as models:
            async with clients(models) as seen:
                for version in range(2, 5):
                    # One that cannot be read, one that computes something else now, and one that is no artifact.
                    broken = write_artifact(tmp_path / "broken", 99.0)
                    (broken / "v" / "model.onnx").write_bytes(b"nonsense")
                    broken.rename(root / "a" / str(10 * version + 1))
                    write_artifact(root / "a" / str(10 * version + 2), 98.0, expected=X)
                    (root / "a" / str(10 * version + 3)).mkdir()
                    write_artifact(root / "a" / str(10 * version), float(version))
                    await until(lambda version=version: seen[float(version)] > 20)  # type: ignore[misc]
                    for name in "123":
                        shutil.rmtree(root / "a" / f"{version}{name}")
                # The newest is taken away: the one before is back.
                (root / "a" / "40").rename(root / ".40")
                before = seen[3.0]
                await until(lambda: seen[3.0] > before + 20)
                assert set(seen) == {1.0, 2.0, 3.0, 4.0}, seen
                assert sum(seen.values()) > 500
                wanted = ["1", "20", "30", "40", "30"]
                assert [one["to"] for one in models.switches] == wanted
                await until(lambda: [one["version"] for one in models.resources()["models"]] == ["30"])
            assert sum(s.success.count for s in models.all_statistics().values()) == sum(seen.values())

    asyncio.run(run())


def test_a_version_that_crashes_the_runtime_takes_nobody_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "m"
    write_artifact(root / "a" / "1", 1.0)
    # The process that tests a new version, and no other, dies of it.
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr("runtimes._probe.child", lambda code: [sys.executable, "-c", crash])

    async def run() -> None:
        async with serving(root, defaults=AT_ONCE) as models, clients(models) as seen:
            write_artifact(root / "a" / "2", 2.0)
            await until(lambda: "signal 11" in reason(models, "a", "2"))
            assert models.resources()["loads"] == 1  # here it was never opened
            before = seen[1.0]
            await until(lambda: seen[1.0] > before + 20)
            assert set(seen) == {1.0}, seen

    asyncio.run(run())


def test_the_same_number_replaced_and_options_changed_under_load(tmp_path: Path) -> None:
    root = tmp_path / "m"
    write_artifact(root / "a" / "1", 1.0)

    async def run() -> None:
        async with serving(root, poll_seconds=0.02, defaults=AT_ONCE) as models, clients(models) as seen:
            await until(lambda: seen[1.0] > 20)
            new = write_artifact(tmp_path / "new", 2.0)
            (root / "a" / "1").rename(tmp_path / "old")  # for a moment there is no version at all
            await asyncio.sleep(0.03)
            new.rename(root / "a" / "1")
            await until(lambda: seen[2.0] > 20)
            (root / "a" / "serving.yaml").write_text(
                "batching: {max_batch_size: 16}\nrollout: {trial_seconds: 0, trial_requests: 0}"
            )
            await until(lambda: models.info("a").max_batch_size == 16)
            await until(lambda: seen[2.0] > 100)
            assert set(seen) == {1.0, 2.0}, seen
            assert log(models)[1:] == [("1", "1", "in service")] * 2
            assert len(models.all_statistics()) == 1

    asyncio.run(run())


def test_installed_versions_follow_their_pointer(tmp_path: Path) -> None:
    root = tmp_path / "a"
    for version in (1, 2):
        write_artifact(root / str(version), float(version))
    _versions.switch(root, 1)

    async def run() -> None:
        async with serving(root, poll_seconds=0.02, defaults=AT_ONCE) as models, clients(models) as seen:
            await until(lambda: seen[1.0] > 20)
            assert seen[2.0] == 0
            with pytest.raises(NotFound):
                await models.infer(request("a", "2"))
            _versions.switch(root, 2)
            await until(lambda: seen[2.0] > 20)
            _versions.switch(root, 1)  # toolchain rollback
            before = seen[1.0]
            await until(lambda: seen[1.0] > before + 20)
            assert set(seen) == {1.0, 2.0}, seen
            (root / "latest").unlink()
            (root / "latest").symlink_to("9")
            await until(lambda: "pointer" in reason(models, "a", "1"))
            assert factor_of(await models.infer(request("a"))) == 1

    asyncio.run(run())


@pytest.mark.parametrize("mode", [{}, {"canary": 0.3}, {"shadow": True}])
def test_a_version_that_fails_is_rolled_back_and_no_client_knows(tmp_path: Path, mode: dict[str, object]) -> None:
    root = tmp_path / "m"
    write_table(root / "a" / "1", 8, 1.0)
    x = np.array([6])

    async def run() -> None:
        defaults = ModelOptions(rollout=Rollout(trial_seconds=60, **mode))  # type: ignore[arg-type]
        async with serving(root, poll_seconds=0.02, defaults=defaults) as models, clients(models, x=x) as seen:
            await until(lambda: len(seen) == 1 and sum(seen.values()) > 200)
            write_table(root / "a" / "2", 4, 2.0)  # passes its self-test, and knows no 6
            await until(lambda: log(models)[-1] == ("2", "1", "rolled back"))
            assert "requests failed" in models.switches[-1]["why"]
            assert "rolled back" in reason(models, "a", "2")
            await until(lambda: states(models) == {("a", "1"): "READY", ("a", "2"): "UNAVAILABLE"})
            await asyncio.sleep(0.3)  # and it is not tried again
            assert len(models.switches) == 3
            with pytest.raises(Unavailable, match="rolled back"):
                await models.infer(request("a", "2", x=x))
            assert list(seen) == [1.0 / 6], seen
            assert models.all_statistics()["a", "2"].failures["BACKEND"] >= 3
            # Its files change: another chance.
            shutil.rmtree(root / "a" / "2")
            write_table(root / "a" / "2", 8, 2.0)
            await until(lambda: log(models)[-1] == ("1", "2", "trial"))

    asyncio.run(run())


def test_a_version_that_is_slower_is_rolled_back(tmp_path: Path) -> None:
    root = tmp_path / "m"
    write_artifact(root / "a" / "1", 1.0)

    async def run() -> None:
        defaults = ModelOptions(rollout=Rollout(trial_seconds=60, canary=0.3, max_p99_ratio=5.0))
        async with serving(root, defaults=defaults) as models, clients(models, count=2, pause=0.002) as seen:
            await until(lambda: seen[1.0] > 200)
            write_artifact(root / "a" / "2", 2.0, graph=slow(2.0, times=40))
            await until(lambda: log(models)[-1] == ("2", "1", "rolled back"))
            assert "took more than 5 times" in models.switches[-1]["why"]
            assert set(seen) == {1.0, 2.0}, seen

    asyncio.run(run())


def test_a_canary_gets_its_share_and_takes_over(tmp_path: Path) -> None:
    root = tmp_path / "m"
    write_artifact(root / "a" / "1", 1.0)

    async def run() -> None:
        rollout = Rollout(trial_seconds=0.5, trial_requests=200, canary=0.25, max_p99_ratio=None)
        async with serving(root, defaults=ModelOptions(rollout=rollout)) as models:
            async with clients(models, pause=0.001) as seen:
                await until(lambda: seen[1.0] > 50)
                write_artifact(root / "a" / "2", 2.0)
                await until(lambda: log(models)[-1] == ("1", "2", "trial"))
                before = Counter(seen)
                assert factor_of(await models.infer(request("a", "2"))) == 2
                assert factor_of(await models.infer(request("a", "1"))) == 1
                assert models.versions("a") == ("1", "2")
                assert "on trial" in reason(models, "a", "2")
                await until(lambda: log(models)[-1] == ("1", "2", "passed"))
                new, old = seen[2.0] - before[2.0], seen[1.0] - before[1.0]
                assert 0.15 < new / (new + old) < 0.4
                at_switch = seen[1.0]
                await until(lambda: seen[2.0] > 1000)
                assert seen[1.0] - at_switch <= 8
                assert set(seen) == {1.0, 2.0}, seen
            await until(lambda: states(models)["a", "1"] == "UNAVAILABLE")
            with pytest.raises(NotFound, match="versions that are served: 2"):
                models.info("a", "1")

    asyncio.run(run())


def test_a_shadow_answers_nobody_and_then_takes_over(tmp_path: Path) -> None:
    root = tmp_path / "m"
    write_artifact(root / "a" / "1", 1.0)

    async def run() -> None:
        rollout = Rollout(trial_seconds=0.3, trial_requests=100, shadow=True, max_p99_ratio=None)
        defaults = ModelOptions(rollout=rollout)
        async with serving(root, defaults=defaults) as models, clients(models, pause=0.001) as seen:
            write_artifact(root / "a" / "2", 2.0)
            await until(lambda: log(models)[-1] == ("1", "2", "trial"))
            await until(lambda: models.all_statistics()["a", "2"].success.count > 50)
            if log(models)[-1][2] == "trial":
                assert seen[2.0] == 0
            await until(lambda: seen[2.0] > 50)
            assert log(models)[-1] == ("1", "2", "passed")
            assert set(seen) == {1.0, 2.0}, seen

    asyncio.run(run())


def test_a_newer_version_ends_a_trial_and_an_operator_can_go_back(tmp_path: Path) -> None:
    root = tmp_path / "m"
    write_artifact(root / "a" / "1", 1.0)

    async def run() -> None:
        async with serving(root, defaults=ModelOptions(rollout=Rollout(canary=0.5))) as models, clients(models) as seen:
            write_artifact(root / "a" / "2", 2.0)
            await until(lambda: log(models)[-1] == ("1", "2", "trial"))
            write_artifact(root / "a" / "3", 3.0)
            await until(lambda: log(models)[-1] == ("1", "3", "trial"))
            assert log(models)[-2] == ("2", "1", "withdrawn")
            assert await models.rollback("a") == "1"
            assert log(models)[-1] == ("3", "1", "rolled back")
            await asyncio.sleep(0.2)
            assert log(models)[-1] == ("3", "1", "rolled back")  # and 2, which nobody asked for, is not tried
            assert "passed over" in reason(models, "a", "2")
            with pytest.raises(NotFound, match="no version to go back to"):
                await models.rollback("a")
            await models.load("a")  # forgives
            await until(lambda: log(models)[-1] == ("1", "3", "trial"))
            assert set(seen) <= {1.0, 2.0, 3.0}, seen

    asyncio.run(run())


def test_going_back_by_hand_when_no_trial_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "m"
    for version in (1, 2):
        write_artifact(root / "a" / str(version), float(version))

    async def run() -> None:
        async with serving(root, defaults=AT_ONCE) as models, clients(models) as seen:
            await until(lambda: seen[2.0] > 20)
            assert await models.rollback("a") == "1"
            await until(lambda: seen[1.0] > 20)
            assert "by hand" in reason(models, "a", "2")
            assert set(seen) == {1.0, 2.0}, seen

    asyncio.run(run())


def test_a_version_with_other_inputs_is_not_compared_and_requests_on_their_way_are_answered(tmp_path: Path) -> None:
    root = tmp_path / "m"
    write_artifact(root / "a" / "1", 1.0)
    other = "g (float[n, 2] image) => (float[n, 2] y) <float f = {2.0}> { y = Mul(image, f) }"

    async def run() -> None:
        async with serving(root) as models:
            on_its_way = request("a")
            write_artifact(root / "a" / "2", 2.0, graph=other, feeds={"image": X})
            await until(lambda: log(models)[-1] == ("1", "2", "in service"))
            assert "other inputs" in models.switches[-1]["why"]
            assert factor_of(await models.infer(on_its_way)) == 1
            assert factor_of(await models.infer(Request("a", "", {"image": X}))) == 2
            with pytest.raises(InvalidRequest):
                check(models.info("a"), {"x": ("FP32", [2, 2])}, max_bytes=1000)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("policy", "versions"),
    [
        (VersionPolicy(all=True), ("1", "2", "3")),
        (VersionPolicy(latest=2), ("2", "3")),
        (VersionPolicy(specific=(1, 3)), ("1", "3")),
    ],
)
def test_policies_by_number(tmp_path: Path, policy: VersionPolicy, versions: tuple[str, ...]) -> None:
    root = tmp_path / "m"
    for version in (1, 2, 3):
        write_artifact(root / "a" / str(version), float(version))

    async def run() -> None:
        async with serving(root, defaults=AT_ONCE.model_copy(update={"version_policy": policy})) as models:
            assert models.versions("a") == versions
            for version in "123":
                if version in versions:
                    assert models.info("a", version).version == version
                    assert factor_of(await models.infer(request("a", version))) == float(version)
                    assert states(models)["a", version] == "READY"
                else:
                    with pytest.raises(NotFound):
                        await models.infer(request("a", version))
                    assert "not selected" in reason(models, "a", version)
            assert factor_of(await models.infer(request("a"))) == 3
            write_artifact(root / "a" / "4", 4.0)
            if policy.specific is None:
                await until(lambda: states(models).get(("a", "4")) == "READY")
                assert factor_of(await models.infer(request("a"))) == 4
                await until(lambda: models.versions("a") == (("1", "2", "3", "4") if policy.all else ("3", "4")))
                assert factor_of(await models.infer(request("a", "3"))) == 3

    asyncio.run(run())


def test_a_switch_while_the_old_version_still_answers(tmp_path: Path) -> None:
    """The old one is closed after its last answer, not with the switch."""
    root = tmp_path / "m"
    write_artifact(root / "a" / "1", 1.0, graph=slow(1.0, times=20))

    async def run() -> None:
        async with serving(root, defaults=AT_ONCE) as models:
            old = models.loaded("a", "1")
            assert old is not None
            rows = np.ones((4, 2), np.float32)
            asked = [asyncio.create_task(models.infer(request("a", x=rows))) for _ in range(4)]
            await asyncio.sleep(0)
            write_artifact(root / "a" / "2", 2.0)
            await until(lambda: log(models)[-1] == ("1", "2", "in service"))
            assert {factor_of(one) for one in await asyncio.gather(*asked)} == {1.0}
            await until(lambda: [one["version"] for one in models.resources()["models"]] == ["2"])

    asyncio.run(run())
