"""Several workers over one repository: what one found out about a version, the others know, and those to come."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from versions_support import factor_of, reason, request, scaled, serving, until, write_artifact

from toolchain.serving.models import Models
from toolchain.serving.options import ModelOptions, Rollout
from toolchain.serving.repository import Snapshot

#: A trial that ends by what fails in it only.
TRIAL = ModelOptions(rollout=Rollout(canary=0.5, trial_seconds=600, trial_requests=1, max_p99_ratio=None))
#: y = x times a factor, and a run fails where a five is asked for.
FAILS = """g (float[n, 2] x) => (float[n, 2] y)
<float f = {3.0}, float five = {5.0}, float one = {0.0}, int64[1] all = {-1}>
{ s = Equal(x, five) i = Cast <to = 7> (s) r = Reshape(i, all) m = ReduceMax <keepdims = 0> (r)
  o = Reshape(one, all) z = Gather(o, m) d = Mul(x, f) y = Add(d, z) }"""


def write(root: Path, version: int, *, graph: str | None = None) -> None:
    write_artifact(root / "a" / str(version), float(version), graph=graph or scaled(version))


async def ask(models: Models, value: float) -> float:
    return factor_of(await models.infer(request("a", x=np.full((1, 2), value, np.float32)))) / value


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "models", tmp_path / "standing"


def test_what_one_worker_rolled_back_is_rolled_back_in_all_and_not_tried_by_a_new_one(
    places: tuple[Path, Path],
) -> None:
    root, shared = places
    write(root, 2)

    async def run() -> None:
        async with serving(root, defaults=TRIAL, shared=shared) as one:
            async with serving(root, defaults=TRIAL, shared=shared) as other:
                write(root, 3, graph=FAILS)
                await until(lambda: all(models.switches[-1]["what"] == "trial" for models in (one, other)))
                for _ in range(40):
                    assert await ask(one, 5.0) == 2.0, "what the version on trial fails at, the one before answers"
                await until(lambda: one.switches[-1]["what"] == "rolled back")
                await until(lambda: other.switches[-1]["what"] == "rolled back")
                assert "by another worker" in other.switches[-1]["why"]
                assert {await ask(other, 1.0) for _ in range(10)} == {2.0}
            async with serving(root, defaults=TRIAL, shared=shared) as again:
                assert [switch["to"] for switch in again.switches] == ["2"]
                assert "rolled back by another worker" in reason(again, "a", "3")
                assert {await ask(again, 1.0) for _ in range(10)} == {2.0}
                # by hand it may be tried again, here and there
                await again.load("a")
                await until(lambda: again.switches[-1]["what"] == "trial")
        async with serving(root, defaults=TRIAL) as alone:
            assert alone.info("a").version == "3", "a server that is started anew knows of nothing"

    asyncio.run(run())


def test_what_passed_here_goes_back_too_and_the_reason_is_told_once(places: tuple[Path, Path]) -> None:
    """Which version answers does not depend on the worker: not even where a trial ended well."""
    root, shared = places
    at_once = TRIAL.model_copy(update={"rollout": Rollout(trial_seconds=0, trial_requests=0)})
    write(root, 2)

    async def run() -> None:
        async with (
            serving(root, defaults=TRIAL, shared=shared) as one,
            serving(root, defaults=at_once, shared=shared) as other,
        ):
            write(root, 3, graph=FAILS)
            await until(lambda: one.switches[-1]["what"] == "trial")
            await until(lambda: other.switches[-1]["to"] == "3")
            for _ in range(40):
                await ask(one, 5.0)
            await until(lambda: one.switches[-1]["what"] == "rolled back")
            why = one.switches[-1]["why"]
            await until(lambda: other.switches[-1]["to"] == "2")
            assert {await ask(other, 1.0) for _ in range(10)} == {2.0}
            assert reason(other, "a", "3") == f"rolled back: by another worker: {why}"
            async with serving(root, defaults=TRIAL, shared=shared) as third:
                assert reason(third, "a", "3") == f"rolled back by another worker: {why}"

    asyncio.run(run())


def test_what_is_forgiven_while_the_repository_is_looked_at_stays_so(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, shared = places
    write(root, 2)

    async def run() -> None:
        async with serving(root, defaults=TRIAL, shared=shared) as models:
            write(root, 3)
            await until(lambda: models.switches[-1]["what"] == "trial")
            await models.rollback("a")
            await until(lambda: any("barred" in path.name for path in shared.iterdir()))
            going, look = asyncio.Event(), models.source.scan
            loop, free = asyncio.get_running_loop(), threading.Event()

            def slow(defaults: ModelOptions) -> Snapshot:
                loop.call_soon_threadsafe(going.set)
                assert free.wait(10)
                return look(defaults)

            monkeypatch.setattr(models.source, "scan", slow)
            going.clear()
            await going.wait()  # what was rolled back is read, and not yet taken
            asked = asyncio.create_task(models.load("a"))
            await asyncio.sleep(0)
            free.set()
            await asked
            assert models.switches[-1]["what"] == "trial"
            await asyncio.sleep(0.3)
            assert (models.switches[-1]["what"], reason(models, "a", "3")) == ("trial", "on trial")

    asyncio.run(run())


def test_a_fact_that_cannot_be_written_is_complained_of(
    places: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    root, shared = places
    write(root, 2)

    async def run() -> None:
        async with serving(root, defaults=TRIAL, shared=shared) as models:
            (shared / f"{os.getpid()}.arriving").mkdir()
            write(root, 3)
            await until(lambda: models.switches[-1]["what"] == "trial")
            await models.rollback("a")
            await until(lambda: "other workers are not told" in caplog.text)
            assert factor_of(await models.infer(request("a"))) == 2.0

    asyncio.run(run())


def test_a_new_worker_begins_with_what_the_others_have_in_service(places: tuple[Path, Path]) -> None:
    root, shared = places
    write(root, 1)

    async def run() -> None:
        async with serving(root, defaults=TRIAL, shared=shared) as one:
            write(root, 2)
            await until(lambda: one.switches[-1]["what"] == "trial")
            async with serving(root, defaults=TRIAL, shared=shared) as again:
                said = [(switch["from"], switch["to"], switch["what"]) for switch in again.switches]
                assert said == [(None, "1", "in service"), ("1", "2", "trial")]
                assert {await ask(again, 1.0) for _ in range(20)} == {1.0, 2.0}
            write(root, 3)  # what is on trial is withdrawn, and what others have in service stays so
            await until(lambda: one.switches[-1]["to"] == "3")
            async with serving(root, defaults=TRIAL, shared=shared) as again:
                assert [switch["to"] for switch in again.switches] == ["1", "3"]

    asyncio.run(run())


def test_a_version_that_is_gone_or_replaced_is_not_begun_with(places: tuple[Path, Path]) -> None:
    root, shared = places
    write(root, 1)

    async def run() -> None:
        async with serving(root, defaults=TRIAL, shared=shared):
            pass
        (root / "a" / "1").rename(root / "a" / ".1")
        write(root, 1, graph=scaled(1).replace("Mul(x, f)", "Mul(f, x)"))
        write(root, 2)
        async with serving(root, defaults=TRIAL, shared=shared) as again:
            assert [switch["to"] for switch in again.switches] == ["2"]

    asyncio.run(run())
