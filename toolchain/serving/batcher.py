"""Puts requests together, runs them, and hands out the answers.

A request waits in a queue of bounded length, by priority and then first come first served, until an instance is free.
It then runs together with those behind it that have the same shapes (``padding.Layout``), up to the size that the
controller says (``adaptive``). Requests are never split, and a request never waits behind one that came later.

Two things keep it out of the way of small models. A batch of one request is fed with its own arrays, and nothing is
copied. And where runs are shorter than the way to a thread and back, which is measured, they run on the event loop:
the loop is held up for less time than handing the work over would take of it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from runtimes import Session
from toolchain.serving.adaptive import Controller
from toolchain.serving.base import (
    DeadlineExceeded,
    InvalidRequest,
    ModelFailed,
    ModelInfo,
    Overloaded,
    Request,
    Response,
    ServingError,
    Unavailable,
)
from toolchain.serving.execution import Arrays, RowsLost, Run, run_together
from toolchain.serving.options import Batching
from toolchain.serving.padding import Layout
from toolchain.serving.request_queue import Queue, Shapes, Waiting
from toolchain.serving.statistics import Reason, Statistics
from toolchain.serving.trimming import Kept

#: Short runs of the same shapes in a row before they move to the event loop.
_STREAK = 8
#: However long the way to a thread is, the loop is not held up for longer than that, nanoseconds.
_MOST_ON_LOOP = 200_000
#: Shapes that are remembered; beyond it all are forgotten.
_SHAPES = 4096


def reason(error: ServingError | asyncio.CancelledError) -> Reason:
    """What a failed request is counted as."""
    if isinstance(error, asyncio.CancelledError):
        return "CANCELED"
    if isinstance(error, Overloaded | DeadlineExceeded | Unavailable):
        return "REJECTED"
    return "BACKEND" if isinstance(error, ModelFailed) else "OTHER"


class Batcher:
    """The queue of one version of a model.

    Args:
        info: the version; its ``max_batch_size`` bounds batches.
        session: runs it.
        batching: the options.
        statistics: counts what happens here.
        executor: has the threads that run it, at least ``batching.instances``.
        controller: says how large batches may be, and who is let in.

    Raises:
        InvalidInput: ``batching.padding`` does not fit the model.
    """

    def __init__(
        self,
        info: ModelInfo,
        session: Session,
        batching: Batching,
        *,
        statistics: Statistics,
        executor: concurrent.futures.Executor,
        controller: Controller,
    ) -> None:
        self._info = info
        self._session = session
        self._batching = batching
        self._statistics = statistics
        self._executor = executor
        self._controller = controller
        self._layout = Layout(info, batching.padding)
        self._outputs = frozenset(spec.name for spec in info.outputs)
        self._together = info.max_batch_size > 1
        self._timeout_ns = None if batching.default_timeout_ms is None else batching.default_timeout_ms * 1_000_000
        self._queue = Queue(batching.priority_levels)
        self._expected = 0
        self._running = 0
        self._in_runs = 0
        self._started: OrderedDict[int, tuple[int, int]] = OrderedDict()  # run → (rows, began)
        self._runs = 0
        self._planned = False
        self._due: asyncio.TimerHandle | None = None
        self._drained: list[asyncio.Future[None]] = []
        self._closed = False
        self._hop_ns = float(_MOST_ON_LOOP)
        self._streaks: dict[Shapes, int] = {}
        self._quick: set[Shapes] = set()
        self._kept = Kept()

    @property
    def pending(self) -> int:
        """Requests that wait or run."""
        return len(self._queue) + self._in_runs

    async def infer(self, request: Request) -> Response:
        """Answers a request.

        Raises:
            Overloaded: the queue is full, or the answer would be late.
            DeadlineExceeded: the deadline passed before it ran.
            InvalidRequest: the model does not take these inputs.
            ModelFailed: the runtime failed.
            Unavailable: the model is closed.
        """
        now = time.monotonic_ns()
        received = request.received_ns or now
        try:
            deadline = self._deadline(request, received, now)
            if self._closed:
                raise Unavailable(f"model {self._info.name!r} is being unloaded", hint="send it again")
            for name in request.outputs:
                if name not in self._outputs:
                    raise InvalidRequest(f"model {self._info.name!r} has no output {name!r}")
            shapes = tuple([array.shape for array in request.inputs.values()])
            if shapes in self._quick and not self._queue and not self._running and not self._controller.delay_ns:
                return self._on_loop(request, shapes, received)
            waiting = self._admit(request, shapes, received, now, deadline)
        except ServingError as error:
            self._count_failure(error, now - received)
            raise
        self._queue.enter(waiting)
        self._statistics.pending += 1
        if deadline is not None:
            loop = asyncio.get_running_loop()
            waiting.timer = loop.call_later((deadline - now) * 1e-9, self._expire, waiting)
        if not self._planned:
            # Not now: others that came in with the same turn of the loop are to be in the same batch.
            self._planned = True
            asyncio.get_running_loop().call_soon(self._dispatch)
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            self._give_up(waiting)
            raise

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Around the reading of a large request: while that comes it counts as one that waits, of one row.

        Raises:
            Overloaded: it would not be let in, and need not be read. Where there are priorities nobody is refused
                here: its own is not known before it is read.
        """
        if self._batching.priority_levels == 1:
            try:
                self._refuse_late(self._queue.rows() + self._expected, 1, time.monotonic_ns(), None)
                if len(self._queue) + self._expected >= self._batching.queue_size:
                    raise self._full()
            except Overloaded as error:
                self._count_failure(error, 0)
                raise
        self._expected += 1
        try:
            yield
        finally:
            self._expected -= 1

    async def drained(self) -> None:
        """Returns when nothing waits or runs."""
        while self.pending:
            done = asyncio.get_running_loop().create_future()
            self._drained.append(done)
            await done

    def close(self) -> None:
        """Whoever waits is told that the model is unloaded; what runs is answered."""
        self._closed = True
        for waiting in [*self._queue]:
            self._leave(waiting)
            self._fail(waiting, Unavailable(f"model {self._info.name!r} was unloaded", hint="send it again"))
        self._tell_drained()

    def keeps_too_much(self, now: float) -> bool:
        """Whether the session is to give memory back; see ``trimming``. Asked a few times a second.

        Args:
            now: ``time.monotonic()``.
        """
        return self._kept.due(now, running=self._running > 0)

    async def trim(self, now: float) -> None:
        """Has the session give back the memory that it keeps, in a thread. Requests are answered meanwhile.

        Raises:
            Error: the runtime failed, or the session was closed.
        """
        self._kept.given_back(now)
        await asyncio.get_running_loop().run_in_executor(self._executor, self._session.trim)

    def separate(self) -> None:
        """Runs every request by itself from now on."""
        self._together = False

    # The queue

    def _deadline(self, request: Request, received: int, now: int) -> int | None:
        deadline = request.deadline_ns
        if deadline is None and self._timeout_ns is not None:
            deadline = received + self._timeout_ns
        if deadline is not None and deadline <= now:
            raise DeadlineExceeded("the request came after its own deadline")
        return deadline

    def _admit(self, request: Request, shapes: Shapes, received: int, now: int, deadline: int | None) -> Waiting:
        """Raises Overloaded where it is not let in."""
        rows = shapes[0][0] if self._info.max_batch_size and shapes and shapes[0] else 1
        level = self._queue.level(request.priority)
        self._refuse_late(self._queue.rows(level), rows, now, deadline)
        if len(self._queue) >= self._batching.queue_size:
            displaced = self._queue.last_below(level)
            if displaced is None:
                raise self._full()
            self._leave(displaced)
            self._fail(displaced, Overloaded("the queue is full of requests of a higher priority", hint="try again"))
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        key = self._layout.key(request.inputs)
        return Waiting(request, rows, key, shapes, level, received, now, deadline, answer)

    def _full(self) -> Overloaded:
        return Overloaded(
            f"{len(self._queue)} requests wait for model {self._info.name!r}, which is all that may",
            hint="send it again later, or serve with a larger queue_size",
        )

    def _refuse_late(self, ahead: int, rows: int, now: int, deadline: int | None) -> None:
        """Raises Overloaded where a request behind ``ahead`` rows would be answered too late."""
        if deadline is None and not self._controller.has_slo:
            return
        busy = self._running >= self._batching.instances
        if not ahead and not busy:
            return
        running, began = next(iter(self._started.values())) if busy else (0, now)
        wait = self._controller.wait_ns(ahead, running, now - began)
        if self._controller.too_late(wait, rows):
            raise Overloaded(
                f"model {self._info.name!r} could not answer within the latency that is promised",
                hint=f"send it again in {max(1, round(wait * 1e-6))} ms",
            )
        if deadline is not None and now + wait > deadline:
            raise Overloaded(
                f"the request would wait for {wait * 1e-6:.0f} ms, which is beyond its deadline",
                hint="allow it more time, or send it later",
            )

    def _leave(self, waiting: Waiting) -> bool:
        """Takes it out of the queue; False where it is not in there any more."""
        if not self._queue.leave(waiting):
            return False
        self._statistics.pending -= 1
        return True

    def _expire(self, waiting: Waiting) -> None:
        if self._leave(waiting):
            self._fail(waiting, DeadlineExceeded("the deadline passed while the request waited"))
            self._tell_drained()

    def _give_up(self, waiting: Waiting) -> None:
        """The client went away: its place is free; of a run that has begun only the answer is dropped."""
        if self._leave(waiting):
            self._tell_drained()
        if waiting.answer.cancelled():
            self._statistics.rejected("CANCELED", total_ns=time.monotonic_ns() - waiting.received_ns)
        else:
            waiting.answer.exception()  # it was answered in the same turn, and counted; asyncio wants it looked at

    def _fail(self, waiting: Waiting, error: ServingError) -> None:
        if not waiting.answer.done():
            self._count_failure(error, time.monotonic_ns() - waiting.received_ns)
            waiting.answer.set_exception(error)

    def _count_failure(self, error: ServingError, total_ns: int) -> None:
        self._statistics.rejected(reason(error), total_ns=total_ns)

    def _tell_drained(self) -> None:
        if self._drained and not self.pending:
            told, self._drained = self._drained, []
            for future in told:
                if not future.done():
                    future.set_result(None)

    # Batches

    def _dispatch(self) -> None:
        """Starts what can be started."""
        self._planned = False
        while self._queue and self._running < self._batching.instances:
            head = next(iter(self._queue))
            if head.expired(time.monotonic_ns()):  # its timer is late, because the loop is
                self._expire(head)
                continue
            if head.shapes in self._quick:
                self._leave(head)
                [run] = run_together(self._session, self._layout, (head.request.inputs,), (head.rows,))
                self._watch(head.shapes, run)
                self._answer((head,), run)
                continue
            batch = self._batch(head)
            if batch is None:
                break
            self._start(batch)
        self._tell_drained()

    def _batch(self, head: Waiting) -> list[Waiting] | None:
        """Who runs now with the first in the queue; None where it is worth waiting for more."""
        if not self._together:
            return [head]
        waiting_rows = self._queue.rows()
        if waiting_rows == head.rows:
            batch, rows = [head], head.rows
        else:
            batch, rows = self._gathered(head, self._controller.look(waiting_rows))
        preferred = [size for size in self._controller.preferred if size <= rows]
        if preferred:
            while sum(waiting.rows for waiting in batch) > preferred[-1] and len(batch) > 1:
                batch.pop()
            return batch
        delay = self._controller.delay_ns
        if not delay or rows >= self._controller.limit(1 << 30):
            return batch
        left = min(waiting.queued_ns for waiting in batch) + delay - time.monotonic_ns()
        if left <= 0:
            return batch
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(left * 1e-9, self._delay_over)
        return None

    def _delay_over(self) -> None:
        self._due = None
        self._dispatch()

    def _gathered(self, head: Waiting, limit: int) -> tuple[list[Waiting], int]:
        """The first and those behind it that have its shapes, while they fit; none is passed over for a smaller."""
        batch, rows, now = [head], head.rows, time.monotonic_ns()
        for waiting in self._queue:
            if waiting is head or waiting.key != head.key or waiting.expired(now):
                continue
            if rows + waiting.rows > limit:
                break
            batch.append(waiting)
            rows += waiting.rows
        return batch, rows

    def _start(self, batch: Sequence[Waiting]) -> None:
        for waiting in batch:
            self._leave(waiting)
        self._running += 1
        self._in_runs += len(batch)
        self._runs += 1
        number, began = self._runs, time.monotonic_ns()
        self._started[number] = (sum(waiting.rows for waiting in batch), began)
        loop = asyncio.get_running_loop()
        inputs, rows = [waiting.request.inputs for waiting in batch], [waiting.rows for waiting in batch]

        def work() -> None:
            runs = run_together(self._session, self._layout, inputs, rows)
            loop.call_soon_threadsafe(self._finish, number, batch, runs)

        try:
            # Not loop.run_in_executor: two futures that are chained take as long as a small model.
            self._executor.submit(work)
        except RuntimeError:
            error = Unavailable(f"model {self._info.name!r} is served no longer", hint="the server shuts down")
            self._finish(number, batch, [Run(range(len(batch)), began, error=error)])

    def _finish(self, number: int, batch: Sequence[Waiting], runs: Sequence[Run]) -> None:
        rows, began = self._started.pop(number)
        took = time.monotonic_ns() - began
        self._running -= 1
        self._in_runs -= len(batch)
        # Short runs on the loop are not counted: they take little.
        self._kept.ran(sum([array.nbytes for waiting in batch for array in waiting.request.inputs.values()]))
        if len(runs) == 1 and runs[0].error is None:
            self._learn(batch, rows, took, runs[0])
        for run in runs:
            if isinstance(run.error, RowsLost):
                self.separate()
            self._answer([batch[index] for index in run.of], run)
        self._dispatch()

    def _answer(self, batch: Sequence[Waiting], run: Run) -> None:
        if run.error is not None:
            for waiting in batch:
                self._fail(waiting, run.error)
            return
        now = time.monotonic_ns()
        self._count_run(sum(waiting.rows for waiting in batch), run)
        self._controller.answered([waiting.queued_ns for waiting in batch], now)
        for waiting, outputs in zip(batch, run.outputs, strict=True):
            if not waiting.answer.done():
                self._count_success(run, waiting.received_ns, now)
                waiting.answer.set_result(self._response(waiting.request, outputs, run, waiting.received_ns))

    def _response(self, request: Request, outputs: Arrays, run: Run, received: int) -> Response:
        if request.outputs:
            outputs = {name: outputs[name] for name in request.outputs}
        return Response(
            self._info.name, self._info.version, outputs, request.id,
            queue_ns=run.began_ns - received, compute_ns=run.infer_ns,
        )  # fmt: skip

    def _count_run(self, rows: int, run: Run) -> None:
        self._statistics.executed(rows, input_ns=run.input_ns, infer_ns=run.infer_ns, output_ns=run.output_ns)

    def _count_success(self, run: Run, received: int, now: int) -> None:
        self._statistics.succeeded(
            total_ns=now - received,
            queue_ns=run.began_ns - received,
            input_ns=run.input_ns,
            infer_ns=run.infer_ns,
            output_ns=run.output_ns,
        )

    # Short runs

    def _learn(self, batch: Sequence[Waiting], rows: int, took: int, run: Run) -> None:
        """What a run took and what the way to the thread took; whether these shapes may run on the loop."""
        self._controller.ran(rows, took)
        hop = took - (run.input_ns + run.infer_ns + run.output_ns)
        # Near the least of late: what is more was waiting for others.
        self._hop_ns = max(min(self._hop_ns + (hop - self._hop_ns) / 64, hop), 0.0)
        short = run.infer_ns <= min(self._hop_ns, _MOST_ON_LOOP)
        for waiting in batch:
            if len(self._streaks) >= _SHAPES:
                self._streaks.clear()
                self._quick.clear()
            self._streaks[waiting.shapes] = streak = self._streaks.get(waiting.shapes, 0) + 1 if short else 0
            if streak >= _STREAK:
                self._quick.add(waiting.shapes)

    def _on_loop(self, request: Request, shapes: Shapes, received: int) -> Response:
        """Runs a request here and now."""
        [run] = run_together(self._session, self._layout, (request.inputs,), (1,))
        self._watch(shapes, run)
        if run.error is not None:
            raise run.error
        self._count_run(shapes[0][0] if self._info.max_batch_size else 1, run)
        self._count_success(run, received, time.monotonic_ns())
        return self._response(request, run.outputs[0], run, received)

    def _watch(self, shapes: Shapes, run: Run) -> None:
        """A run on the loop that was not short any more sends its shapes back to threads."""
        if run.infer_ns > 2 * min(self._hop_ns, _MOST_ON_LOOP):
            self._quick.discard(shapes)
            self._streaks.pop(shapes, None)
