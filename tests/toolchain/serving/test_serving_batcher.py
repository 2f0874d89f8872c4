"""Requests that wait: who runs with whom, in which order, who is turned away, and that all answers are right."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_support import AFFINE, FLAT, Scripted, load, make, request

from toolchain.serving.base import (
    DeadlineExceeded,
    InvalidRequest,
    ModelFailed,
    Overloaded,
    Request,
    Response,
    Unavailable,
)
from toolchain.serving.batcher import Batcher
from toolchain.serving.loaded import Loaded


async def until(condition: Callable[[], bool]) -> None:
    """Lets the loop run until something is so; fails after ten seconds."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came to be")


async def behind_a_run(loaded: Loaded, session: Scripted) -> asyncio.Task[Response]:
    """A request that runs and does not end before the gate opens; what comes later has to wait."""
    task = asyncio.create_task(loaded.infer(request(100.0, deadline_ns=time.monotonic_ns() + 60 * 10**9)))
    await until(session.started.is_set)
    return task


async def enter(loaded: Loaded, *requests: Request) -> list[asyncio.Task[Response]]:
    tasks = [asyncio.create_task(loaded.infer(one)) for one in requests]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


def test_what_came_in_during_a_run_is_run_together_and_each_gets_its_own() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session, known=FLAT)
        first = await behind_a_run(loaded, session)
        tasks = await enter(loaded, *(request(float(n), rows=1 + n % 3, id=str(n)) for n in range(6)))
        assert loaded.statistics.pending == 6
        assert loaded.pending == 7
        assert loaded.busy
        session.gate.set()
        answers = await asyncio.gather(first, *tasks)
        for n, answer in enumerate(answers[1:]):
            assert answer.outputs["y"].shape == (1 + n % 3, 4)
            assert (answer.outputs["y"] == 2 * n).all()
            assert (answer.id, answer.model, answer.version, answer.cached) == (str(n), "m", "1", False)
        assert session.rows == [1, 12]
        counts = loaded.statistics
        assert (counts.execution_count, counts.inference_count, counts.success.count) == (2, 13, 7)
        assert (counts.pending, loaded.pending, loaded.busy) == (0, 0, False)
        assert {rows: batch.infer.count for rows, batch in counts.batches.items()} == {1: 1, 12: 1}

    asyncio.run(scene())


def test_a_large_request_is_refused_before_it_is_read_where_it_would_be_after() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session, known=FLAT, queue_size=2)
        first = await behind_a_run(loaded, session)
        with loaded.expecting():
            [second] = await enter(loaded, request(1))
            with pytest.raises(Overloaded, match="1 requests wait"), loaded.expecting():
                raise AssertionError("there is one in the queue and one on its way")
        with loaded.expecting():
            pass
        assert loaded.statistics.failures["REJECTED"] == 1
        session.gate.set()
        await asyncio.gather(first, second)

    asyncio.run(scene())


def test_priorities_are_not_known_before_a_request_is_read() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session, known=FLAT, queue_size=1, priority_levels=2)
        first = await behind_a_run(loaded, session)
        [low] = await enter(loaded, request(1, priority=2))
        with loaded.expecting():
            [high] = await enter(loaded, request(2, priority=1))
        with pytest.raises(Overloaded):
            await low
        session.gate.set()
        await asyncio.gather(first, high)

    asyncio.run(scene())


def askew(value: float) -> np.ndarray:
    """Of one row, and where no runtime wants it."""
    raw = np.frombuffer(b"." + np.full((1, 4), value, np.float32).tobytes(), np.float32, offset=1).reshape(1, 4)
    assert not raw.flags.aligned
    return raw


def test_a_runtime_sees_aligned_inputs_only(tmp_path: Path) -> None:
    async def scene() -> None:
        session = Scripted()
        seen: list[bool] = []
        run = session.run

        def watched(inputs: Any, *args: Any, **more: Any) -> Any:
            seen.extend(bool(array.flags.aligned) for array in inputs.values())
            return run(inputs, *args, **more)

        session.run = watched  # type: ignore[method-assign]
        loaded = make(session, known=FLAT)
        alone = await loaded.infer(Request("m", "", {"x": askew(3)}))
        together = await asyncio.gather(*(loaded.infer(Request("m", "", {"x": askew(n)})) for n in (1, 2)))
        assert [answer.outputs["y"].tolist() for answer in (alone, *together)] == [[[2.0 * n] * 4] for n in (3, 1, 2)]
        assert session.rows == [1, 2]
        assert seen == [True, True]

    asyncio.run(scene())


def test_requests_of_one_turn_of_the_loop_share_a_batch() -> None:
    async def scene() -> None:
        session = Scripted()
        loaded = make(session, known=FLAT)
        await asyncio.gather(*(loaded.infer(request(float(n))) for n in range(5)))
        assert session.rows == [5]

    asyncio.run(scene())


def test_a_request_alone_is_fed_with_its_own_array() -> None:
    async def scene() -> None:
        session = Scripted()
        loaded = make(session)
        one = request()
        await loaded.infer(one)
        assert session.seen[0] is one.inputs["x"]

    asyncio.run(scene())


def test_a_request_is_never_split_and_none_overtakes_one_that_does_not_fit() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session, most=8, known=FLAT)
        tasks = [await behind_a_run(loaded, session)]
        tasks += await enter(loaded, *(request(float(rows), rows=rows) for rows in (5, 4, 3, 8, 1)))
        session.gate.set()
        await asyncio.gather(*tasks)
        assert session.rows == [1, 5, 7, 8, 1]

    asyncio.run(scene())


def test_only_equal_shapes_go_together_and_the_first_is_not_kept_waiting(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["": 17]>
    g (float[n, s] x) => (float[n, s] y) { y = Neg(x) }"""

    async def scene() -> None:
        loaded = make(load(text, tmp_path), known=FLAT)
        asked = [np.full((1, size), size, np.float32) for size in (3, 5, 3, 5, 5, 7)]
        answers = await asyncio.gather(*(loaded.infer(Request("m", "", {"x": x})) for x in asked))
        assert all((answer.outputs["y"] == -x).all() for x, answer in zip(asked, answers, strict=True))
        assert {rows: batch.infer.count for rows, batch in loaded.statistics.batches.items()} == {1: 1, 2: 1, 3: 1}

    asyncio.run(scene())


def test_outputs_are_those_asked_for_in_that_order(tmp_path: Path) -> None:
    async def scene() -> None:
        loaded = make(load(AFFINE, tmp_path), known=FLAT)
        asked: list[tuple[str, ...]] = [(), ("z",), ("z", "y"), ("y",)]
        answers = await asyncio.gather(*(loaded.infer(request(3.0, outputs=names)) for names in asked))
        assert [tuple(answer.outputs) for answer in answers] == [("y", "z"), ("z",), ("z", "y"), ("y",)]
        assert all((answer.outputs.get("y", 6.0) == 6.0).all() for answer in answers if "y" in answer.outputs)
        assert all((answer.outputs["z"] == -3.0).all() for answer in answers if "z" in answer.outputs)
        with pytest.raises(InvalidRequest, match="no output 'w'"):
            await loaded.infer(request(outputs=("w",)))
        assert loaded.statistics.failures == {"OTHER": 1}

    asyncio.run(scene())


def test_a_model_without_a_batch_axis_runs_one_request_at_a_time() -> None:
    async def scene() -> None:
        session = Scripted()
        loaded = make(session, most=0)
        await asyncio.gather(*(loaded.infer(request(float(n), rows=2)) for n in range(4)))
        assert session.rows == [2, 2, 2, 2]
        assert loaded.statistics.inference_count == 4

    asyncio.run(scene())


def test_priorities_go_first_and_within_one_who_came_first() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session, most=1, priority_levels=3)
        tasks = [await behind_a_run(loaded, session)]
        # (value, priority): 0 and what is none is the last.
        asked = [(1, 3), (2, 0), (3, 2), (4, 1), (5, 99), (6, 1), (7, 2)]
        tasks += await enter(loaded, *(request(float(value), priority=priority) for value, priority in asked))
        session.gate.set()
        await asyncio.gather(*tasks)
        assert [int(x[0, 0]) for x in session.seen[1:]] == [4, 6, 3, 7, 1, 2, 5]

    asyncio.run(scene())


def test_the_queue_is_bounded_and_those_of_a_higher_priority_take_the_place_of_others() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session, most=1, queue_size=3, priority_levels=2)
        tasks = [await behind_a_run(loaded, session)]
        low = await enter(loaded, *(request(float(n), priority=2) for n in (1, 2, 3)))
        with pytest.raises(Overloaded, match="3 requests wait"):
            await loaded.infer(request(4.0, priority=2))
        high = await enter(loaded, request(5.0, priority=1))
        with pytest.raises(Overloaded, match="higher priority"):
            await low[2]  # the last to come is the first to go
        assert loaded.pending == 4
        session.gate.set()
        await asyncio.gather(*tasks, *low[:2], *high)
        assert [int(x[0, 0]) for x in session.seen[1:]] == [5, 1, 2]
        assert loaded.statistics.failures == {"REJECTED": 2}
        assert loaded.statistics.success.count == 4

    asyncio.run(scene())


def test_a_deadline_ends_the_wait_while_a_run_goes_on() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session)
        first = await behind_a_run(loaded, session)
        hurried, patient = await enter(loaded, request(1.0, deadline_ns=time.monotonic_ns() + 20_000_000), request(2.0))
        with pytest.raises(DeadlineExceeded):
            await hurried  # the gate is shut: nothing but a timer can have ended it
        assert not first.done()
        assert loaded.pending == 2
        session.gate.set()
        await asyncio.gather(first, patient)
        assert [float(x[0, 0]) for x in session.seen] == [100.0, 2.0]
        assert loaded.statistics.failures == {"REJECTED": 1}

    asyncio.run(scene())


def test_an_expired_request_is_not_run_even_if_its_timer_is_late() -> None:
    async def scene() -> None:
        session = Scripted()
        loaded = make(session)
        tasks = await enter_only(loaded, request(1.0, deadline_ns=time.monotonic_ns() + 5_000_000), request(2.0))
        time.sleep(0.02)  # the loop is held up: when it goes on, the dispatch comes before the timer
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found[0], DeadlineExceeded)
        assert isinstance(found[1], Response)
        assert session.rows == [1]

    async def enter_only(loaded: Loaded, *requests: Request) -> list[asyncio.Task[Response]]:
        tasks = [asyncio.create_task(loaded.infer(one)) for one in requests]
        await asyncio.sleep(0)
        return tasks

    asyncio.run(scene())


def test_deadlines_that_have_passed_or_are_the_default() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session, default_timeout_ms=20)
        with pytest.raises(DeadlineExceeded, match="after its own deadline"):
            await loaded.infer(request(deadline_ns=time.monotonic_ns() - 1))
        first = await behind_a_run(loaded, session)
        with pytest.raises(DeadlineExceeded, match="while the request waited"):
            await loaded.infer(request(1.0))
        session.gate.set()
        await first

    asyncio.run(scene())


def test_who_gives_up_frees_a_place_and_is_not_run() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session, queue_size=2, known=FLAT)
        first = await behind_a_run(loaded, session)
        leaving, staying = await enter(loaded, request(1.0), request(2.0))
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert loaded.statistics.failures == {"CANCELED": 1}
        [new] = await enter(loaded, request(3.0))
        session.gate.set()
        await asyncio.gather(first, staying, new)
        assert session.seen[1][:, 0].tolist() == [2.0, 3.0]

    asyncio.run(scene())


def test_who_gives_up_during_the_run_takes_nothing_from_the_others() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session, known=FLAT)
        tasks = await enter(loaded, *(request(float(n)) for n in range(3)))
        await until(session.started.is_set)
        tasks[1].cancel()
        await asyncio.sleep(0)
        session.gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found[1], asyncio.CancelledError)
        assert [float(found[n].outputs["y"][0, 0]) for n in (0, 2)] == [0.0, 4.0]
        assert loaded.statistics.success.count == 2
        assert loaded.statistics.failures == {"CANCELED": 1}
        await loaded.drain()

    asyncio.run(scene())


def test_one_request_that_the_model_cannot_take_fails_alone() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        session.poison = 3.0
        loaded = make(session, known=FLAT)
        first = await behind_a_run(loaded, session)
        tasks = await enter(loaded, *(request(float(n)) for n in range(6)))
        session.gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await first
        assert isinstance(found[3], ModelFailed)
        assert "poisoned" in str(found[3])
        assert [float(found[n].outputs["y"][0, 0]) for n in (0, 1, 2, 4, 5)] == [0.0, 2.0, 4.0, 8.0, 10.0]
        assert session.rows == [1, 6, 1, 1, 1, 1, 1, 1]
        assert loaded.statistics.failures == {"BACKEND": 1}
        assert loaded.statistics.success.count == 6
        assert loaded.pending == 0

    asyncio.run(scene())


def test_what_the_runtime_does_not_take_is_the_clients_error(tmp_path: Path) -> None:
    async def scene() -> None:
        loaded = make(load(AFFINE, tmp_path), known=FLAT)
        bad = Request("m", "", {"x": np.zeros((1, 5), np.float32)})
        good = [request(float(n)) for n in range(3)]
        found = await asyncio.gather(*map(loaded.infer, [*good, bad]), return_exceptions=True)
        assert isinstance(found[3], InvalidRequest)
        assert all(isinstance(answer, Response) for answer in found[:3])
        assert loaded.statistics.failures == {"OTHER": 1}

    asyncio.run(scene())


def test_any_exception_of_a_runtime_is_a_failure_of_the_model() -> None:
    class Rude(Scripted):
        def run(self, feeds: Any, /, *, outputs: str = "host") -> dict[str, Any]:
            raise ZeroDivisionError("divided")

    async def scene() -> None:
        loaded = make(Rude())
        found = await asyncio.gather(*(loaded.infer(request()) for _ in range(2)), return_exceptions=True)
        assert all(isinstance(error, ModelFailed) and "divided" in str(error) for error in found)
        await loaded.drain()

    asyncio.run(scene())


def test_a_model_that_loses_rows_is_run_request_by_request_from_then_on(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["": 17]>
    g (float[n, 4] x) => (float[m, 4] y) <int64[1] zero = {0}> { y = ReduceSum <keepdims = 1> (x, zero) }"""

    async def scene() -> None:
        loaded = make(load(text, tmp_path), known=FLAT)
        for _ in range(2):
            answers = await asyncio.gather(*(loaded.infer(request(float(n))) for n in range(3)))
            assert [float(answer.outputs["y"][0, 0]) for answer in answers] == [0.0, 1.0, 2.0]
        assert loaded.statistics.batches.keys() == {1}

    asyncio.run(scene())


def test_a_batch_waits_for_others_until_its_delay_or_a_preferred_size() -> None:
    async def scene() -> None:
        session = Scripted()
        loaded = make(session, known=FLAT, max_queue_delay_us=10_000_000, preferred_batch_size=(2, 4))
        one = await enter(loaded, request(1.0))
        await asyncio.sleep(0.02)
        assert session.rows == []
        two = await enter(loaded, request(2.0))
        await asyncio.gather(*one, *two)
        assert session.rows == [2]
        # Three: two now, since that is preferred; the third waits. With two more it is three again.
        three = await enter(loaded, *(request(float(n)) for n in range(3)))
        await asyncio.gather(*three[:2])
        assert session.rows == [2, 2]
        five = await enter(loaded, *(request(float(n)) for n in range(3)))
        await asyncio.gather(three[2], *five)
        assert session.rows == [2, 2, 4]

    asyncio.run(scene())


def test_after_its_delay_a_batch_runs_with_what_there_is() -> None:
    async def scene() -> None:
        session = Scripted()
        loaded = make(session, known=FLAT, max_queue_delay_us=30_000)
        began = time.monotonic()
        first = await enter(loaded, request(1.0))
        await asyncio.sleep(0.002)
        second = await enter(loaded, request(2.0))
        await asyncio.gather(*first, *second)
        assert time.monotonic() - began >= 0.03
        assert session.rows == [2]

    asyncio.run(scene())


def test_who_waits_for_others_and_expires_leaves_the_rest_alone() -> None:
    async def scene() -> None:
        session = Scripted()
        loaded = make(session, known=FLAT, max_queue_delay_us=60_000)
        tasks = await enter(loaded, request(1.0, deadline_ns=time.monotonic_ns() + 10_000_000), request(2.0))
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found[0], DeadlineExceeded)
        assert session.rows == [1]

    asyncio.run(scene())


def test_instances_run_at_the_same_time() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session, most=1, instances=3)
        tasks = await enter(loaded, *(request(float(n)) for n in range(5)))
        await until(lambda: len(session.seen) == 3)
        await asyncio.sleep(0.02)
        assert len(session.seen) == 3
        session.gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(scene())


def test_drain_waits_for_the_last_and_close_tells_those_who_wait() -> None:
    async def scene() -> None:
        session = Scripted(gated=True)
        loaded = make(session, most=1)
        first = await behind_a_run(loaded, session)
        waiting = await enter(loaded, request(1.0))
        drained = asyncio.create_task(loaded.drain())
        await asyncio.sleep(0.01)
        assert not drained.done()
        session.gate.set()
        await drained
        assert first.done()
        assert waiting[0].done()
        await loaded.drain()

        session.gate.clear()
        session.started.clear()
        running = await behind_a_run(loaded, session)
        late = await enter(loaded, request(2.0))
        loaded.close()
        assert session.closed
        with pytest.raises(Unavailable, match="was unloaded"):
            await late[0]
        with pytest.raises(Unavailable, match="is being unloaded"):
            await loaded.infer(request())
        session.gate.set()
        assert (await running).outputs["y"][0, 0] == 200.0
        await loaded.drain()

    asyncio.run(scene())


def test_drain_returns_when_the_last_that_waits_gives_up_or_expires() -> None:
    async def scene() -> None:
        session = Scripted()
        loaded = make(session, known=FLAT, max_queue_delay_us=10_000_000)
        [task] = await enter(loaded, request())
        drained = asyncio.create_task(loaded.drain())
        await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.wait_for(drained, 5)
        [task] = await enter(loaded, request(deadline_ns=time.monotonic_ns() + 10_000_000))
        await asyncio.wait_for(loaded.drain(), 5)
        assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], DeadlineExceeded)

    asyncio.run(scene())


def test_an_executor_that_was_shut_down_is_an_answer_too() -> None:
    async def scene() -> None:
        loaded = make(Scripted())
        loaded._batcher._executor.shutdown()
        with pytest.raises(Unavailable, match="served no longer"):
            await asyncio.wait_for(loaded.infer(request()), 5)
        await loaded.drain()

    asyncio.run(scene())


def test_short_runs_move_to_the_loop_and_back_when_one_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    class Told(Scripted):
        def run(self, feeds: Any, /, *, outputs: str = "host") -> dict[str, Any]:
            threads.append(threading.get_ident())
            return super().run(feeds)

    learn = Batcher._learn

    def learn_with_a_long_way(self: Batcher, *arguments: Any) -> None:
        """The way to a thread takes longer than any run of this model, however busy the machine is."""
        self._hop_ns = 20e6
        learn(self, *arguments)
        self._hop_ns = 20e6

    monkeypatch.setattr("toolchain.serving.batcher._MOST_ON_LOOP", 20_000_000)
    monkeypatch.setattr(Batcher, "_learn", learn_with_a_long_way)

    async def scene() -> None:
        session = Told()
        loaded = make(session)
        here = threading.get_ident()
        for n in range(8):
            assert (await loaded.infer(request(float(n)))).outputs["y"][0, 0] == 2 * n
        assert here not in threads
        await loaded.infer(request())
        assert threads[-1] == here
        await loaded.infer(request(rows=2))  # other shapes have to show it for themselves
        assert threads[-1] != here
        session.poison = 7.0
        with pytest.raises(ModelFailed):
            await loaded.infer(request(7.0))
        assert threads[-1] == here
        session.seconds = 0.1
        await loaded.infer(request())
        assert threads[-1] == here
        session.seconds = 0.0
        await loaded.infer(request())
        assert threads[-1] != here

    asyncio.run(scene())


def test_many_clients_and_all_sizes_get_what_they_asked_for(tmp_path: Path) -> None:
    """No answer is lost, doubled or another's, whatever happens around it."""

    async def client(loaded: Loaded, number: int) -> int:
        rng = np.random.default_rng(number)
        answered = 0
        for turn in range(60):
            value = float(number * 1000 + turn)
            asked = loaded.infer(request(value, rows=int(rng.integers(1, 6)), priority=int(rng.integers(0, 4))))
            if rng.random() < 0.1:
                task = asyncio.ensure_future(asked)
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                continue
            try:
                answer = await asked
            except Overloaded:
                continue
            assert (answer.outputs["y"] == 2 * value).all()
            assert (answer.outputs["z"] == -value).all()
            answered += 1
        return answered

    async def scene() -> None:
        loaded = make(load(AFFINE, tmp_path), most=16, queue_size=24, priority_levels=3, instances=2)
        answered = sum(await asyncio.gather(*(client(loaded, n) for n in range(40))))
        await loaded.drain()
        counts = loaded.statistics
        assert counts.pending == 0
        assert answered <= counts.success.count
        assert counts.success.count + counts.failures.total() == 40 * 60
        assert counts.batch_rows.total == counts.inference_count

    asyncio.run(scene())
