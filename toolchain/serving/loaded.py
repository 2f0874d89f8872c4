"""One version of a model in memory: its session, its queue, and the way of a request through cache and queue."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
import uuid

from runtimes import Session
from toolchain.serving.adaptive import Controller
from toolchain.serving.base import ModelInfo, Request, Response, ServingError
from toolchain.serving.batcher import Batcher, reason
from toolchain.serving.options import ModelOptions
from toolchain.serving.result_cache import ResultCache
from toolchain.serving.statistics import Statistics


class Loaded:
    """A version that answers. All of it is used on the event loop's thread.

    Args:
        info: the version; ``max_batch_size`` bounds its batches.
        session: runs it; ``close`` closes it.
        options: how it is served.
        statistics: counts what happens.
        executor: has the threads that it runs in, at least ``options.batching.instances``.
        controller: adapts batches to what is measured; None makes one without an SLO.
        cache: keeps answers, unless the options say not to; None keeps none.

    Raises:
        InvalidInput: ``batching.padding`` does not fit the model.
    """

    def __init__(
        self,
        info: ModelInfo,
        session: Session,
        options: ModelOptions,
        *,
        statistics: Statistics,
        executor: concurrent.futures.Executor,
        controller: Controller | None = None,
        cache: ResultCache | None = None,
    ) -> None:
        self.info = info
        self.session = session
        self.statistics = statistics
        self._controller = controller or Controller(options.batching, max_batch_size=info.max_batch_size)
        self._batcher = Batcher(
            info,
            session,
            options.batching,
            statistics=statistics,
            executor=executor,
            controller=self._controller,
        )
        strings = any(spec.dtype == "string" for spec in info.inputs + info.outputs)
        self._cache = cache if options.result_cache and not strings else None
        # A bare ONNX file has no digest: what is kept of it is for this load alone.
        self._artifact = info.digest or uuid.uuid4().hex

    @property
    def pending(self) -> int:
        """Requests that wait or run."""
        return self._batcher.pending

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return self._batcher.pending > 0

    @property
    def batch_limit(self) -> int:
        """Rows that a batch may have now: what the options say, unless memory is short."""
        return self._controller.cap

    async def infer(self, request: Request) -> Response:
        """Answers a request that was checked against ``info``.

        Raises:
            ServingError: as ``Batcher.infer``.
        """
        if self._cache is None:
            return await self._batcher.infer(request)
        return await self._through_cache(self._cache, request)

    def expecting(self) -> contextlib.AbstractContextManager[None]:
        """Around the reading of a request that is large. Raises Overloaded, as ``Batcher.expecting``."""
        # What may be answered out of the cache is not refused before it is known.
        return self._batcher.expecting() if self._cache is None else contextlib.nullcontext()

    def shrink(self, share: float) -> None:
        """Memory is short: cuts the largest batch to a share of what it is now, to one row at least."""
        self._controller.shrink(share)

    def grow(self) -> None:
        """Memory is there again: doubles the largest batch, up to what the options say."""
        self._controller.grow()

    def keeps_too_much(self, now: float) -> bool:
        """Whether the session keeps much more memory than it needs by now, ``time.monotonic()``."""
        return self._batcher.keeps_too_much(now)

    async def trim(self, now: float) -> None:
        """Has the session give back what it keeps for later runs. Raises Error, as ``Batcher.trim``."""
        await self._batcher.trim(now)

    async def drain(self) -> None:
        """Returns when nothing waits or runs."""
        await self._batcher.drained()

    def close(self) -> None:
        """Frees the session. Whoever still waits is told Unavailable; what runs is answered."""
        self._batcher.close()
        self.session.close()

    async def _through_cache(self, cache: ResultCache, request: Request) -> Response:
        began = time.monotonic_ns()
        key = await cache.key(request, version=self.info.version, artifact=self._artifact)
        looked = time.monotonic_ns() - began

        def failed(error: ServingError | asyncio.CancelledError) -> None:
            self.statistics.rejected(reason(error), total_ns=time.monotonic_ns() - (request.received_ns or began))

        outputs, cached = await cache.answer(key, request, self._batcher.infer, failed=failed)
        if cached:
            total = time.monotonic_ns() - (request.received_ns or began)
            self.statistics.answered_from_cache(total_ns=total, lookup_ns=looked)
        else:
            self.statistics.cache_miss.add(looked)
        return Response(self.info.name, self.info.version, outputs, request.id, cached)
