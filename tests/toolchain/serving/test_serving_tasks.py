"""Work that is fetched later."""

from __future__ import annotations

import asyncio

import pytest

from toolchain.serving.base import InvalidRequest, NotFound, Overloaded
from toolchain.serving.tasks import Tasks


async def give(result: bytes, *, after: asyncio.Event | None = None) -> bytes:
    if after is not None:
        await after.wait()
    return result


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_pending_then_done() -> None:
    async def run() -> None:
        tasks, go = Tasks(), asyncio.Event()
        name = tasks.start("m", give(b"1", after=go), size=10)
        assert (tasks.get(name).state, tasks.get(name).size) == ("pending", 10)
        go.set()
        await settle()
        found = tasks.get(name)
        assert (found.state, found.result, found.model, found.size) == ("done", b"1", "m", 1)
        assert tasks.start("m", give(b"2"), size=0) != name

    asyncio.run(run())


def test_failures_are_kept_and_those_of_the_server_reach_its_log() -> None:
    async def wrong() -> bytes:
        raise InvalidRequest("no such input", hint="look")

    async def broken() -> bytes:
        raise RuntimeError("secret")

    async def run() -> None:
        told = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["exception"]))
        tasks = Tasks()
        first, second = tasks.start("m", wrong(), size=0), tasks.start("m", broken(), size=0)
        await settle()
        assert (tasks.get(first).state, tasks.get(first).error, tasks.get(first).status) == (
            "failed", "no such input; look", 400,
        )  # fmt: skip
        assert (tasks.get(second).state, tasks.get(second).error, tasks.get(second).status) == (
            "failed", "the server failed", 500,
        )  # fmt: skip
        assert [str(error) for error in told] == ["secret"]

    asyncio.run(run())


def test_number_and_bytes_are_bounded_and_given_back() -> None:
    async def run() -> None:
        tasks, go = Tasks(limit=2, max_bytes=100, seconds=0.05), asyncio.Event()
        one = tasks.start("m", give(b"x" * 60, after=go), size=10)
        with pytest.raises(Overloaded, match="no room"):
            tasks.start("m", give(b""), size=91)
        two = tasks.start("m", give(b"x" * 60, after=go), size=10)
        with pytest.raises(Overloaded):
            tasks.start("m", give(b""), size=0)
        go.set()
        await settle()
        # Both results together would be beyond the bound.
        assert sorted([tasks.get(one).state, tasks.get(two).state]) == ["done", "failed"]
        await asyncio.sleep(0.06)
        for name in (one, two):
            with pytest.raises(NotFound):
                tasks.get(name)
        tasks.start("m", give(b""), size=100)
        await settle()

    asyncio.run(run())


def test_work_that_takes_too_long_is_given_up() -> None:
    async def run() -> None:
        cancelled = asyncio.Event()

        async def long() -> bytes:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return b""

        tasks = Tasks(seconds=0.02, max_bytes=10)
        name = tasks.start("m", long(), size=10)
        await asyncio.sleep(0.03)
        with pytest.raises(NotFound):
            tasks.get(name)
        await settle()
        assert cancelled.is_set()
        tasks.start("m", give(b""), size=10)
        await settle()

    asyncio.run(run())


def test_a_name_that_was_never_given() -> None:
    with pytest.raises(NotFound):
        Tasks().get("x")
