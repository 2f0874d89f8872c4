"""Work that is fetched later."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from toolchain.serving.base import InvalidRequest, NotFound, Overloaded, Unavailable
from toolchain.serving.control import Place
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


def test_names_of_several_workers_say_who_has_the_task(tmp_path: Path) -> None:
    async def run() -> None:
        mine, asked = Tasks(place=Place(2, tmp_path)), []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append((await reader.readuntil(b"\r\n\r\n")).split(b" ")[1])
            body = b'"m"\n{"state":"done"}' if asked[-1] == b"/result/1.there" else b"no"
            writer.write(b"HTTP/1.1 %d x\r\n\r\n%s" % (200 if body != b"no" else 404, body))
            writer.close()

        server = await asyncio.start_unix_server(answer, tmp_path / "worker-1.sock")
        async with server:
            name = mine.start("m", give(b"1"), size=0)
            assert name.startswith("2.")
            await settle()
            assert await mine.find(name) == ("m", b'{"task":"%s","state":"done","result":1}' % name.encode())
            assert await mine.find("1.there") == ("m", b'{"state":"done"}')
            for other in ("1.not", "3.there", "2.there", "there", "1.x y", "1.x\r\nHost:", "1.", "10000.a", "01.a"):
                with pytest.raises(NotFound):
                    await mine.find(other)
            assert asked == [b"/result/1.there", b"/result/1.not"]
        # The socket is there, and nobody behind it: it may be there again in a moment.
        with pytest.raises(Unavailable):
            await mine.find("1.there")

    asyncio.run(run())


def test_draining_waits_for_what_is_pending_and_a_little_for_whoever_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolchain.serving.tasks.FETCH_SECONDS", 0.3)

    async def run() -> None:
        tasks, go = Tasks(), asyncio.Event()
        name = tasks.start("m", give(b"1", after=go), size=0)
        drained = asyncio.create_task(tasks.drained(20))
        await asyncio.sleep(0.4)
        assert not drained.done()
        go.set()
        await settle()
        assert not drained.done()
        assert tasks.tell(name)[0] == "m"
        async with asyncio.timeout(10):
            await drained
        # Nobody comes for this one, and the time that a shutdown has bounds it all.
        tasks.start("m", give(b"2"), size=0)
        async with asyncio.timeout(10):
            await tasks.drained(20)
        tasks.start("m", give(b"3", after=asyncio.Event()), size=0)
        async with asyncio.timeout(10):
            await tasks.drained(0.1)

    asyncio.run(run())
