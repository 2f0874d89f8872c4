"""Native code is loaded only where it was built, or where the caller vouches for it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from runtimes import _trust

SHA = "a" * 64
OTHER = "b" * 64


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("TOOLCHAIN_CACHE", str(root))
    return root


def test_only_what_was_noted_is_taken(cache: Path) -> None:
    assert "not built on this machine" in (_trust.refusal(SHA, trusted=False) or "")
    assert _trust.note_built(SHA, "tensorrt-rtx:sm89")
    assert _trust.refusal(SHA, trusted=False) is None
    assert _trust.refusal(OTHER, trusted=False) is not None


def test_the_caller_can_vouch() -> None:
    assert _trust.refusal(OTHER, trusted=True) is None


def test_the_note_is_for_this_user_only(cache: Path) -> None:
    _trust.note_built(SHA, "tensorrt-rtx")
    note = cache / "built" / SHA
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    assert stat.S_IMODE(note.parent.stat().st_mode) == 0o700
    assert note.read_text() == "tensorrt-rtx\n"
    assert [entry.name for entry in note.parent.iterdir()] == [SHA], "a temporary file stayed behind"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no modes")
@pytest.mark.parametrize("which", ["note", "folder"])
def test_a_note_that_others_could_write_does_not_count(cache: Path, which: str) -> None:
    _trust.note_built(SHA, "tensorrt-rtx")
    path = cache / "built" / SHA
    (path if which == "note" else path.parent).chmod(0o777)
    assert _trust.refusal(SHA, trusted=False) is not None


@pytest.mark.parametrize("kind", ["link to a file", "folder", "link to the folder", "fifo"])
def test_only_a_plain_file_counts(cache: Path, tmp_path: Path, kind: str) -> None:
    folder = cache / "built"
    target = tmp_path / "elsewhere"
    if kind == "link to the folder":
        target.mkdir(mode=0o700)
        (target / SHA).touch(mode=0o600)
        cache.mkdir()
        folder.symlink_to(target)
    else:
        folder.mkdir(parents=True, mode=0o700)
        if kind == "folder":
            (folder / SHA).mkdir()
        elif kind == "fifo":
            os.mkfifo(folder / SHA)
        else:
            target.touch(mode=0o600)
            (folder / SHA).symlink_to(target)
    assert _trust.refusal(SHA, trusted=False) is not None


def test_a_cache_that_cannot_be_written_is_told(cache: Path) -> None:
    cache.write_text("a file where the folder would be")
    assert not _trust.note_built(SHA, "tensorrt-rtx")
    assert _trust.refusal(SHA, trusted=False) is not None


def test_no_cache_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trust, "cache_root", lambda: None)
    assert not _trust.note_built(SHA, "tensorrt-rtx")
    assert _trust.refusal(SHA, trusted=False) is not None


def test_processes_that_note_at_once_lose_nothing(cache: Path) -> None:
    program = (
        "import sys; from runtimes import _trust\n"
        "for n in range(50): assert _trust.note_built(f'{n % 25:064x}', sys.argv[1])"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, str(n)]) for n in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert all(_trust.refusal(f"{n:064x}", trusted=False) is None for n in range(25))
    assert len(list((cache / "built").iterdir())) == 25


def test_own_files_come_back_whole(tmp_path: Path) -> None:
    file = tmp_path / "timings" / "some"
    assert _trust.read_own(file) is None
    assert _trust.write_own(file, b"\0one")
    assert _trust.write_own(file, b"two\xff")
    assert _trust.read_own(file) == b"two\xff"
