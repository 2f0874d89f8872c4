"""The way of a request to a version and back: waiting for it to be loaded, and asking the old one where a trial fails.

What a version on trial fails at is answered by the one in service. What a version that was to be loaded by this request
cannot be, the next best is: ``changeover.py`` puts it in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time

from runtimes import Error
from toolchain.serving.base import DeadlineExceeded, ModelFailed, Request, Response, ServingError, Unavailable
from toolchain.serving.changeover import Changeover
from toolchain.serving.loaded import Loaded
from toolchain.serving.residency import Entry, Residency, failure
from toolchain.serving.rollout import Trial, Window

_log = logging.getLogger(__name__)

#: Copies of requests that a version on trial in the shadow works on at once; more are left out.
_SHADOWS = 16


class Answering:
    """Answers requests. Used on the event loop's thread.

    Args:
        residency: loads what is not in memory.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._shadows: set[asyncio.Task[None]] = set()

    async def answer(self, model: Changeover, entry: Entry, request: Request) -> Response:
        """Answers with a version that was picked for a request. Raises ServingError."""
        trial = model.lineup.trial
        if trial is None:
            return await self._answer(model, entry, request, entry.window)
        return await self._on_trial(model, trial, entry, request)

    async def stop(self) -> None:
        """Ends what nobody waits for."""
        for task in self._shadows:
            task.cancel()
        await asyncio.gather(*self._shadows, return_exceptions=True)

    async def _answer(self, model: Changeover, entry: Entry, request: Request, window: Window | Trial) -> Response:
        entry.in_use += 1
        entry.recent += 1
        try:
            loaded = entry.loaded
            if loaded is None:
                loaded = await self._wait(model, entry, request)
            began = entry.last_used_ns = time.monotonic_ns()
            response = await loaded.infer(request)
            if not response.cached:
                window.answered(time.monotonic_ns() - began)
            return response
        except ModelFailed:
            window.failed()
            raise
        except ServingError:
            raise
        except Exception as error:
            window.failed()
            entry.statistics.rejected("OTHER")
            _log.exception("%s: a request failed", entry)
            raise ModelFailed(f"{type(error).__name__} while the request was handled") from error
        finally:
            entry.in_use -= 1
            if not entry.in_use:
                self._residency.left()

    async def _wait(self, model: Changeover, entry: Entry, request: Request) -> Loaded:
        """The version, once it is loaded; or what took its place where it cannot be."""
        left = None if request.deadline_ns is None else max(request.deadline_ns - time.monotonic_ns(), 0) * 1e-9
        try:
            return await asyncio.wait_for(self._residency.acquire(entry), left)
        except TimeoutError:
            entry.statistics.rejected("REJECTED")
            raise DeadlineExceeded(f"the deadline passed while {entry} was loaded") from None
        except Error as error:
            model.rejected_at_use(entry, error)
            await model.settled()
            other = model.lineup.stable
            if not request.version and other is not None and other is not entry and other.loaded is not None:
                return other.loaded
            entry.statistics.rejected("OTHER")
            raise failure(error) from error

    async def _on_trial(self, model: Changeover, trial: Trial, entry: Entry, request: Request) -> Response:
        """A request while a version is on trial: what that fails at, the old version answers."""
        stable, candidate = model.lineup.stable, model.lineup.candidate
        if entry is not candidate or stable is None:
            response = await self._answer(model, entry, request, entry.window)
            if trial.mode == "shadow" and candidate is not None and entry is stable:
                self._copy_to(model, trial, candidate, request)
            return response
        try:
            return await self._tried(model, trial, candidate, request)
        except (ModelFailed, Unavailable):
            if request.version:
                raise
            return await self._answer(model, stable, request, stable.window)

    async def _tried(self, model: Changeover, trial: Trial, entry: Entry, request: Request) -> Response:
        token = object()
        trial.running[token] = time.monotonic_ns()
        try:
            return await self._answer(model, entry, request, trial)
        finally:
            del trial.running[token]

    def _copy_to(self, model: Changeover, trial: Trial, entry: Entry, request: Request) -> None:
        if len(self._shadows) >= _SHADOWS:
            return

        async def copy() -> None:
            # What became of it is counted in the trial.
            with contextlib.suppress(ServingError):
                await self._tried(model, trial, entry, dataclasses.replace(request, deadline_ns=None, received_ns=0))

        task = asyncio.create_task(copy())
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)
