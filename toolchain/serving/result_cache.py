"""Answers kept by what was asked: least recently used, bounded by bytes and age, each computed once at a time.

The key is a digest (BLAKE2b, 20 bytes) of the model, its version, the digest of its artifact, the outputs asked for,
and every input's name, dtype, shape and bytes, read where they lie. Two requests that ask the same at the same time
are computed once: the second waits for the first (single flight).

The digest of an image takes about as long as its way over the network, so large inputs are digested in a thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping

import numpy as np

from toolchain.serving.base import DeadlineExceeded, InvalidRequest, ModelFailed, Request, Response, ServingError
from toolchain.serving.options import ResultCache as Bounds

#: Inputs of more bytes are digested in a thread; fewer take less time than the way there.
_IN_THREAD = 1 << 16
#: What an entry takes beside its arrays, bytes: measured on entries of one small array.
_ENTRY = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    outputs: Mapping[str, np.ndarray]
    size: int
    made_ns: int


class ResultCache:
    """The answers of all models.

    Args:
        bounds: how many bytes, and for how long. With ``max_bytes`` 0 nothing is kept, and nobody should ask.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._age_ns = int(bounds.max_age_seconds * 1e9)
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._flights: dict[bytes, asyncio.Future[Mapping[str, np.ndarray] | ServingError | None]] = {}
        self._digests = concurrent.futures.ThreadPoolExecutor(1, "digest")
        self._bytes = self._hits = self._misses = self._shared = self._evicted = self._expired = 0

    def statistics(self) -> dict[str, int | float]:
        """Counts since the start; ``bytes`` and ``entries`` as they are now."""
        return {
            "entries": len(self._entries),
            "bytes": self._bytes,
            "max_bytes": self._bounds.max_bytes,
            "max_age_seconds": self._bounds.max_age_seconds,
            "hits": self._hits,
            "shared": self._shared,
            "misses": self._misses,
            "evicted": self._evicted,
            "expired": self._expired,
        }

    def clear(self) -> None:
        """Forgets all answers: memory is short."""
        self._evicted += len(self._entries)
        self._entries.clear()
        self._bytes = 0

    def forget_old(self) -> None:
        """Forgets answers that are too old: those of a version that is gone are never asked for again."""
        now = time.monotonic_ns()
        for key in [key for key, entry in self._entries.items() if now - entry.made_ns > self._age_ns]:
            self._expired += 1
            self._drop(key)

    def close(self) -> None:
        """Forgets all answers, and ends the thread."""
        self.clear()
        self._digests.shutdown(wait=False)

    async def key(self, request: Request, *, version: str, artifact: str) -> bytes:
        """The digest of what is asked. Loads and copies nothing.

        Args:
            request: what is asked.
            version: that answers it.
            artifact: the digest of what that version is made of.
        """
        if sum(array.nbytes for array in request.inputs.values()) <= _IN_THREAD:
            return digest(request, version=version, artifact=artifact)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._digests, lambda: digest(request, version=version, artifact=artifact))

    async def answer(
        self,
        key: bytes,
        request: Request,
        compute: Callable[[Request], Awaitable[Response]],
        *,
        failed: Callable[[ServingError | asyncio.CancelledError], None],
    ) -> tuple[Mapping[str, np.ndarray], bool]:
        """The outputs for a request, computed if need be, and whether they were there.

        What fails because of the request itself fails for all that ask the same; what one of them suffers alone, such
        as its deadline, makes the next one compute.

        Args:
            key: of the request.
            request: what is asked.
            compute: answers it, and counts it where that fails.
            failed: counts it where it fails because of what another one computes.

        Raises:
            ServingError: as ``compute`` does; DeadlineExceeded too while it waits for another's computing.
        """
        while True:
            kept = self._kept(key)
            if kept is not None:
                self._hits += 1
                return kept, True
            flight = self._flights.get(key)
            if flight is None:
                self._misses += 1
                return await self._compute(key, request, compute), False
            try:
                found = await _followed(flight, request.deadline_ns)
                if isinstance(found, ServingError):
                    raise type(found)(found.what, where=found.where, hint=found.hint)
            except (ServingError, asyncio.CancelledError) as error:
                failed(error)
                raise
            if found is not None:
                self._shared += 1
                return found, True

    async def _compute(
        self, key: bytes, request: Request, compute: Callable[[Request], Awaitable[Response]]
    ) -> Mapping[str, np.ndarray]:
        flight = self._flights[key] = asyncio.get_running_loop().create_future()
        told: Mapping[str, np.ndarray] | ServingError | None = None
        try:
            response = await compute(request)
            told = outputs = _owned(response.outputs)
            self._keep(key, outputs)
            return outputs
        except (InvalidRequest, ModelFailed) as error:
            told = error
            raise
        finally:
            del self._flights[key]
            flight.set_result(told)

    def _kept(self, key: bytes) -> Mapping[str, np.ndarray] | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if time.monotonic_ns() - entry.made_ns > self._age_ns:
            self._expired += 1
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry.outputs

    def _keep(self, key: bytes, outputs: Mapping[str, np.ndarray]) -> None:
        size = sum(array.nbytes for array in outputs.values()) + _ENTRY
        if size > self._bounds.max_bytes:
            return
        while self._bytes + size > self._bounds.max_bytes:
            self._evicted += 1
            self._drop(next(iter(self._entries)))
        self._entries[key] = _Entry(outputs, size, time.monotonic_ns())
        self._bytes += size

    def _drop(self, key: bytes) -> None:
        self._bytes -= self._entries.pop(key).size


def digest(request: Request, *, version: str, artifact: str) -> bytes:
    """BLAKE2b over all that an answer depends on, each part with its length before it. Inputs hold no strings."""
    hashed = hashlib.blake2b(digest_size=20)
    texts = [request.model, version, artifact, str(len(request.outputs)), *request.outputs]
    for name in sorted(request.inputs):
        array = request.inputs[name]
        texts += [name, array.dtype.name, str(array.shape)]
    for text in texts:
        raw = text.encode()
        hashed.update(b"%d:" % len(raw))
        hashed.update(raw)
    for name in sorted(request.inputs):
        # uint8, since the buffer protocol does not know bfloat16; a view, not a copy.
        hashed.update(np.ascontiguousarray(request.inputs[name]).reshape(-1).view(np.uint8).data)
    return hashed.digest()


def _owned(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of their own: a view would keep the whole batch. Read-only: many are answered with them."""
    found = {}
    for name, array in outputs.items():
        own = array.copy() if array.base is not None else array
        own.flags.writeable = False
        found[name] = own
    return found


async def _followed(
    flight: asyncio.Future[Mapping[str, np.ndarray] | ServingError | None], deadline_ns: int | None
) -> Mapping[str, np.ndarray] | ServingError | None:
    """What another request's computing comes to. Giving up here does not end that."""
    if deadline_ns is None:
        return await asyncio.shield(flight)
    try:
        left = (deadline_ns - time.monotonic_ns()) * 1e-9
        return await asyncio.wait_for(asyncio.shield(flight), max(left, 0))
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed while the same request of another was computed") from None
