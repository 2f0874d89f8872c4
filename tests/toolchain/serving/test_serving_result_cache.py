"""Kept answers: the right ones, within their bounds, and each computed once."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from serving_support import AFFINE, Scripted, load, make, request

from toolchain.serving.base import DeadlineExceeded, ModelFailed, Request, Response
from toolchain.serving.options import ResultCache as Bounds
from toolchain.serving.result_cache import _ENTRY, ResultCache, digest


def cache(max_bytes: int = 1 << 20, max_age_seconds: float = 300.0) -> ResultCache:
    return ResultCache(Bounds(max_bytes=max_bytes, max_age_seconds=max_age_seconds))


async def started(session: Scripted) -> None:
    while not session.started.is_set():
        await asyncio.sleep(0.001)


def test_the_same_is_answered_without_a_run_and_anything_else_is_not(tmp_path: Path) -> None:
    async def scene() -> None:
        kept = cache()
        loaded = make(load(AFFINE, tmp_path), cache=kept)
        first = await loaded.infer(request(1.0, id="a"))
        again = await loaded.infer(request(1.0, id="b"))
        assert (first.cached, again.cached, again.id) == (False, True, "b")
        assert (again.outputs["y"] == 2.0).all()
        for other in (request(2.0), request(1.0, rows=2), request(1.0, outputs=("y",)), request(1.0, outputs=("z",))):
            assert not (await loaded.infer(other)).cached
        counts = loaded.statistics
        assert (counts.success.count, counts.execution_count) == (6, 5)
        assert (counts.cache_hit.count, counts.cache_miss.count) == (1, 5)
        assert {name: kept.statistics()[name] for name in ("entries", "hits", "misses", "shared")} == {
            "entries": 5, "hits": 1, "misses": 5, "shared": 0,
        }  # fmt: skip

    asyncio.run(scene())


def test_digests_tell_everything_apart_that_an_answer_depends_on() -> None:
    x = np.arange(8, dtype=np.float32)
    base = Request("m", "", {"x": x.reshape(2, 4)})
    others = [
        Request("n", "", {"x": x.reshape(2, 4)}),
        Request("m", "", {"w": x.reshape(2, 4)}),
        Request("m", "", {"x": x.reshape(4, 2)}),
        Request("m", "", {"x": x.reshape(2, 4).view(np.int32)}),
        Request("m", "", {"x": x.reshape(2, 4) + 1}),
        Request("m", "", {"x": x.reshape(2, 4)}, outputs=("y",)),
        Request("m", "", {"x": x.reshape(2, 4)}, outputs=("y", "z")),
        Request("m", "", {"x": x.reshape(2, 4)}, outputs=("yz",)),
        Request("m", "", {"x": x[:4].reshape(1, 4), "y": x[4:].reshape(1, 4)}),
        Request("m", "", {"x": x[4:].reshape(1, 4), "y": x[:4].reshape(1, 4)}),
        Request("m", "", {"x": np.zeros((0, 4), np.float32)}),
        Request("m", "", {"x": np.float32(0).reshape(())}),
        Request("m", "", {"x": x.astype(ml_dtypes.bfloat16)}),
        Request("m", "", {"x": x.astype(np.bool_)}),
    ]
    digests = [digest(one, version="1", artifact="a") for one in (base, *others)]
    digests += [digest(base, version="2", artifact="a"), digest(base, version="1", artifact="b")]
    assert len(set(digests)) == len(digests)
    assert all(len(one) == 20 for one in digests)
    # The order in which a client names its inputs, its priority and its own id are no difference.
    turned = Request("m", "", {"y": x[4:].reshape(1, 4), "x": x[:4].reshape(1, 4)}, id="7", priority=3)
    assert digest(turned, version="1", artifact="a") == digests[9]
    strided = np.arange(16, dtype=np.float32).reshape(2, 8)[:, ::2]
    assert digest(Request("m", "", {"x": strided}), version="1", artifact="a") == digest(
        Request("m", "", {"x": strided.copy()}), version="1", artifact="a"
    )


def test_a_bare_file_loaded_anew_does_not_answer_with_what_was_kept_of_the_one_before(tmp_path: Path) -> None:
    async def scene() -> None:
        kept = cache()
        session = Scripted()
        await make(session, cache=kept).infer(request())
        assert not (await make(session, cache=kept).infer(request())).cached

    asyncio.run(scene())


def test_bytes_are_bounded_and_who_was_not_asked_for_longest_goes_first() -> None:
    async def scene() -> None:
        size = 16 + _ENTRY
        kept = cache(max_bytes=3 * size)
        loaded = make(Scripted(), cache=kept)
        for value in (1.0, 2.0, 3.0, 1.0, 4.0):  # 1 is asked for again: 2 goes
            await loaded.infer(request(value))
        assert kept.statistics()["bytes"] == 3 * size
        assert kept.statistics()["evicted"] == 1
        assert [(await loaded.infer(request(value))).cached for value in (1.0, 3.0, 4.0, 2.0)] == [
            True, True, True, False,
        ]  # fmt: skip
        await loaded.infer(request(9.0, rows=64))
        await loaded.infer(request(9.0, rows=62 * 4))  # larger than everything: not kept, and nothing goes for it
        assert kept.statistics()["bytes"] <= 3 * size
        kept.clear()
        assert (kept.statistics()["entries"], kept.statistics()["bytes"]) == (0, 0)

    asyncio.run(scene())


def test_old_answers_are_computed_again() -> None:
    async def scene() -> None:
        session = Scripted()
        kept = cache(max_age_seconds=0.02)
        loaded = make(session, cache=kept)
        await loaded.infer(request())
        await asyncio.sleep(0.03)
        assert not (await loaded.infer(request())).cached
        assert len(session.seen) == 2
        assert (kept.statistics()["expired"], kept.statistics()["entries"]) == (1, 1)

    asyncio.run(scene())


def test_old_answers_that_nobody_asks_for_again_are_forgotten() -> None:
    async def scene() -> None:
        kept = cache(max_age_seconds=0.2)
        loaded = make(Scripted(), cache=kept)
        await loaded.infer(request(1.0))
        await asyncio.sleep(0.21)
        await loaded.infer(request(2.0))
        kept.forget_old()
        assert (kept.statistics()["expired"], kept.statistics()["entries"]) == (1, 1)
        assert 0 < kept.statistics()["bytes"] < 2048
        assert (await loaded.infer(request(2.0))).cached

    asyncio.run(scene())


def test_what_is_kept_is_not_a_view_of_a_batch_and_cannot_be_changed() -> None:
    async def scene() -> None:
        kept = cache()
        loaded = make(Scripted(), cache=kept)
        await asyncio.gather(*(loaded.infer(request(float(n))) for n in range(5)))
        answer = await loaded.infer(request(3.0))
        assert answer.cached
        assert answer.outputs["y"].base is None
        with pytest.raises(ValueError):
            answer.outputs["y"][0, 0] = 5.0

    asyncio.run(scene())


def test_equal_requests_are_computed_once() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        kept = cache()
        loaded = make(session, cache=kept)
        tasks = [asyncio.create_task(loaded.infer(request(1.0, id=str(n)))) for n in range(5)]
        await started(session)
        session.gate.set()
        answers = await asyncio.gather(*tasks)
        assert session.rows == [1]
        assert [answer.id for answer in answers] == list("01234")
        assert sorted(answer.cached for answer in answers) == [False, True, True, True, True]
        assert kept.statistics()["shared"] == 4
        assert loaded.statistics.success.count == 5

    asyncio.run(scene())


def test_large_inputs_are_digested_in_a_thread_and_found_again() -> None:
    async def scene() -> None:
        session = Scripted()
        loaded = make(session, cache=cache(max_bytes=1 << 24), most=1 << 16)
        answers = [await loaded.infer(request(5.0, rows=20_000)) for _ in range(2)]
        assert [answer.cached for answer in answers] == [False, True]
        assert (answers[0].outputs["y"] == answers[1].outputs["y"]).all()

    asyncio.run(scene())


def test_if_the_first_gives_up_another_computes() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session, cache=cache())
        first = asyncio.create_task(loaded.infer(request()))
        others = [asyncio.create_task(loaded.infer(request())) for _ in range(3)]
        await started(session)
        first.cancel()
        await asyncio.sleep(0.01)
        others[1].cancel()
        await asyncio.sleep(0.01)
        session.gate.set()
        found = await asyncio.gather(first, *others, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert isinstance(found[2], asyncio.CancelledError)
        assert isinstance(found[1], Response)
        assert isinstance(found[3], Response)
        assert len(session.seen) == 2

    asyncio.run(scene())


def test_a_deadline_is_each_ones_own() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session, cache=cache())
        running = asyncio.create_task(loaded.infer(request(9.0)))
        await started(session)
        soon = time.monotonic_ns() + 20_000_000
        leader = asyncio.create_task(loaded.infer(request(1.0, deadline_ns=soon)))
        await asyncio.sleep(0)
        follower = asyncio.create_task(loaded.infer(request(1.0)))
        hurried = asyncio.create_task(loaded.infer(request(9.0, deadline_ns=soon)))
        found = await asyncio.gather(leader, hurried, return_exceptions=True)
        assert [type(error) for error in found] == [DeadlineExceeded, DeadlineExceeded]
        session.gate.set()
        assert (await follower).outputs["y"][0, 0] == 2.0
        await running

    asyncio.run(scene())


def test_what_the_model_cannot_do_fails_for_all_who_ask_it_and_is_not_kept() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        session.poison = 1.0
        kept = cache()
        loaded = make(session, cache=kept)
        tasks = [asyncio.create_task(loaded.infer(request(1.0))) for _ in range(3)]
        await started(session)
        session.gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(error, ModelFailed) for error in found)
        assert len({id(error) for error in found}) == 3  # raised in three places: each has its own traceback
        assert len(session.seen) == 1
        session.poison = None
        assert not (await loaded.infer(request(1.0))).cached
        assert loaded.statistics.failures["BACKEND"] == 3

    asyncio.run(scene())


def test_models_with_strings_and_those_that_say_so_are_not_kept() -> None:
    class Words(Scripted):
        def __init__(self) -> None:
            super().__init__()
            import runtimes

            self.outputs = (runtimes.TensorSpec("y", "string", ("n", 4)),)

        def run(self, feeds: Any, /, *, outputs: str = "host") -> dict[str, Any]:
            return {"y": np.asarray(super().run(feeds)["y"], dtype=object)}

    async def scene() -> None:
        loaded = make(Words(), cache=cache())
        assert not any([(await loaded.infer(request())).cached for _ in range(2)])

    asyncio.run(scene())
