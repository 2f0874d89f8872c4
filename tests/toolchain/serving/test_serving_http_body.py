"""Bodies of HTTP: limits, compression."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from typing import Any

import pytest

from toolchain.serving import http_body
from toolchain.serving.base import InvalidRequest, TooLarge


def read(*messages: dict[str, Any], limit: int = 100, **headers: bytes) -> bytes:
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        return waiting.pop(0)

    named = {name.replace("_", "-").encode(): value for name, value in headers.items()}
    return asyncio.run(http_body.read(receive, named, max_bytes=limit))


def part(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


def test_bodies_in_one_piece_and_in_many() -> None:
    assert read(part(b"abc")) == b"abc"
    assert read(part(b"a", more=True), part(b"", more=True), part(b"bc")) == b"abc"
    assert read({"type": "http.request"}) == b""
    assert read(part(b"abc"), content_encoding=b" Identity ") == b"abc"


def test_limits_hold_before_the_rest_is_read() -> None:
    with pytest.raises(TooLarge):
        read(part(b"x" * 101))
    with pytest.raises(TooLarge):
        read(part(b"x" * 60, more=True), part(b"x" * 60, more=True))
    assert len(read(part(b"x" * 50, more=True), part(b"x" * 50))) == 100


def test_a_client_that_leaves() -> None:
    with pytest.raises(InvalidRequest, match="left"):
        read(part(b"a", more=True), {"type": "http.disconnect"})
    with pytest.raises(InvalidRequest, match="left"):
        read({"type": "http.disconnect"})


def test_compressed_bodies() -> None:
    assert read(part(gzip.compress(b"abc")), content_encoding=b"gzip") == b"abc"
    assert read(part(zlib.compress(b"abc")), content_encoding=b"Deflate") == b"abc"
    assert read(part(gzip.compress(b"ab") + gzip.compress(b"c")), content_encoding=b"gzip") == b"abc"
    assert read(part(gzip.compress(b"")), content_encoding=b"gzip") == b""


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (b"", b"gzip"),
        (b"abc", b"gzip"),
        (b"abc", b"deflate"),
        (gzip.compress(b"abc")[:-1], b"gzip"),
        (gzip.compress(b"abc") + b"x", b"gzip"),
        (zlib.compress(b"abc") + zlib.compress(b"abc"), b"deflate"),
        (b"abc", b"br"),
        (b"abc", b"gzip, gzip"),
    ],
)
def test_bodies_that_are_not_of_their_encoding(body: bytes, encoding: bytes) -> None:
    with pytest.raises(InvalidRequest):
        http_body.decompressed(body, encoding, max_bytes=100)


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
def test_a_bomb_is_never_made(encoding: bytes) -> None:
    zeros = bytes(16 << 20)
    bomb = gzip.compress(zeros) if encoding == b"gzip" else zlib.compress(zeros)
    del zeros
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            http_body.decompressed(bomb, encoding, max_bytes=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    # Nor one of many members, each below the limit.
    with pytest.raises(TooLarge):
        http_body.decompressed(gzip.compress(bytes(60)) * 2, b"gzip", max_bytes=100)


def test_exactly_the_limit_is_taken() -> None:
    assert len(http_body.decompressed(gzip.compress(bytes(100)), b"gzip", max_bytes=100)) == 100


@pytest.mark.parametrize(
    ("accepts", "encoding"),
    [
        (b"gzip", b"gzip"),
        (b"identity, deflate", b"deflate"),
        (b"GZIP;q=0.3", b"gzip"),
        (b"gzip; q=0, deflate;q=0.01", b"deflate"),
        (b"gzip;q=0.000", None),
        (b"br, zstd", None),
        (b"", None),
    ],
)
def test_answers_are_compressed_as_the_client_takes_them(accepts: bytes, encoding: bytes | None) -> None:
    answer = b"x" * 5000
    packed, how = asyncio.run(http_body.compressed(answer, accepts))
    assert how == encoding
    assert {b"gzip": gzip.decompress, b"deflate": zlib.decompress, None: bytes}[encoding](packed) == answer
    assert asyncio.run(http_body.compressed(b"small", accepts)) == (b"small", None)
