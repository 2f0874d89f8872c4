"""The cache: whole entries or none, eviction of what nobody reads, several processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from toolchain.cache import Cache, cap_bytes, digest_of, parse_size
from toolchain.errors import RecipeError, StorageError

KEYS = [digest_of({"n": n}) for n in range(4)]


def fill(cache: Cache, key: str, size: int = 1000, stage: str = "export") -> None:
    with cache.writing(stage, key) as working:
        (working / "data").write_bytes(b"x" * size)


def test_a_written_entry_is_found_and_another_is_not(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    fill(cache, KEYS[0])
    with cache.reading("export", KEYS[0]) as path:
        assert path is not None
        assert (path / "data").read_bytes() == b"x" * 1000
    with cache.reading("export", KEYS[1]) as path:
        assert path is None
    with cache.reading("compile", KEYS[0]) as path:
        assert path is None


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with pytest.raises(RuntimeError), cache.writing("export", KEYS[0]) as working:
        (working / "data").write_bytes(b"half")
        raise RuntimeError
    assert cache.entries() == []
    assert list((tmp_path / "stages").iterdir()) == []


def test_a_cut_short_file_is_a_miss_and_is_replaced(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    fill(cache, KEYS[0])
    with cache.reading("export", KEYS[0]) as path:
        assert path is not None
        os.truncate(path / "data", 10)
    with cache.reading("export", KEYS[0]) as path:
        assert path is None
    fill(cache, KEYS[0])
    with cache.reading("export", KEYS[0]) as path:
        assert path is not None


def test_the_second_writer_of_an_entry_does_no_harm(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.writing("export", KEYS[0]) as first:
        (first / "data").write_bytes(b"a")
        with cache.writing("export", KEYS[0]) as second:
            (second / "data").write_bytes(b"b")
    with cache.reading("export", KEYS[0]) as path:
        assert path is not None
        assert (path / "data").read_bytes() == b"b"
    assert len(cache.entries()) == 1


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, cap=2500)
    for number, key in enumerate(KEYS[:3]):
        fill(cache, key)
        os.utime(tmp_path / "stages" / f"export-{key}" / ".lock", (number, number))
    with cache.reading("export", KEYS[0]):  # reading makes it recent
        pass
    gone = cache.evict()
    assert [entry.key for entry in gone] == [KEYS[1]]
    assert {entry.key for entry in cache.entries()} == {KEYS[0], KEYS[2]}


def test_what_is_being_read_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    fill(cache, KEYS[0])
    with cache.reading("export", KEYS[0]) as path:
        assert cache.clear() == []
        assert path is not None
        assert (path / "data").exists()
    assert len(cache.clear()) == 1
    assert cache.entries() == []


def test_many_processes_write_read_and_evict_together(tmp_path: Path) -> None:
    """Every reader sees whole entries while others write the same ones and clear the cache."""
    code = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from toolchain.cache import Cache, digest_of
        cache, seen = Cache(Path(sys.argv[1])), 0
        for round in range(60):
            key = digest_of({"n": round % 5})
            with cache.reading("export", key) as path:
                if path is not None:
                    assert (path / "a").read_bytes() == (path / "b").read_bytes() == key.encode() * 500
                    seen += 1
            if path is None:
                with cache.writing("export", key) as working:
                    (working / "a").write_bytes(key.encode() * 500)
                    (working / "b").write_bytes(key.encode() * 500)
            if round % 7 == int(sys.argv[2]):
                cache.clear()
        print(seen)
        """
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(4)
    ]
    seen = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0, 0]
    assert sum(int(text) for text in seen) > 20
    assert not [p for p in (tmp_path / "stages").iterdir() if p.name.startswith(".")]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file")
    with pytest.raises(StorageError, match="TOOLCHAIN_CACHE"), cache.writing("export", KEYS[0]):
        pytest.fail("no folder could be made there")


@pytest.mark.parametrize(
    ("text", "size"), [("500M", 500_000_000), ("1.5g", 1_500_000_000), ("20GB", 2 * 10**10), ("7", 7)]
)
def test_sizes(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_size(text, where="here") == size
    monkeypatch.setenv("TOOLCHAIN_CACHE_SIZE", text)
    assert cap_bytes() == size


@pytest.mark.parametrize("text", ["", "lots", "-1G", "5X"])
def test_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match="here"):
        parse_size(text, where="here")
