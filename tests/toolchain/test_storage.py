"""Whole files and folders, or the old ones; a full disk as a typed error."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from toolchain import storage
from toolchain.errors import StorageError


def test_a_folder_takes_the_place_of_the_old(tmp_path: Path) -> None:
    there = tmp_path / "artifact"
    for text in ("old", "new"):
        with storage.replacing_directory(there, "the artifact") as working:
            (working / "data").write_text(text)
    assert (there / "data").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    there = tmp_path / "artifact"
    with storage.replacing_directory(there, "the artifact") as working:
        (working / "data").write_text("old")
    with pytest.raises(KeyboardInterrupt), storage.replacing_directory(there, "the artifact") as working:
        (working / "data").write_text("half")
        raise KeyboardInterrupt
    assert (there / "data").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_without_the_exchange_call_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.sys, "platform", "other")
    test_a_folder_takes_the_place_of_the_old(tmp_path)


def test_killed_at_any_moment_the_folder_is_whole(tmp_path: Path) -> None:
    """A writer that replaces the folder over and over is killed; what is there always agrees with itself."""
    there = tmp_path / "artifact"
    code = textwrap.dedent(
        """
        import sys, itertools
        from pathlib import Path
        from toolchain.storage import replacing_directory
        for n in itertools.count():
            with replacing_directory(Path(sys.argv[1]), "the artifact") as working:
                for name in "abc":
                    (working / name).write_text(str(n))
            print(n, flush=True)
        """
    )
    for delay in (1, 3, 7, 20):
        child = subprocess.Popen([sys.executable, "-c", code, str(there)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(delay):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert len({(there / name).read_text() for name in "abc"}) == 1


def test_another_writer_was_first(tmp_path: Path) -> None:
    """Two writers of a folder that was not there: the later one replaces the other's."""
    there = tmp_path / "artifact"
    with storage.replacing_directory(there, "the artifact") as slow:
        (slow / "data").write_text("slow")
        with storage.replacing_directory(there, "the artifact") as fast:
            (fast / "data").write_text("fast")
    assert (there / "data").read_text() == "slow"
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_what_killed_writers_left_is_swept_after_a_day(tmp_path: Path) -> None:
    old, young, other = (tmp_path / f".{name}" for name in ("a.0123456789ab", "a.ba9876543210", "a.not-ours"))
    for path in (old, young, other):
        path.mkdir()
    for path in (old, other):
        os.utime(path, (0, 0))
    with storage.replacing_directory(tmp_path / "a", "the artifact"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.ba9876543210", ".a.not-ours", "a"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_a_typed_error() -> None:
    with pytest.raises(StorageError, match="the disk is full"), storage.reported(Path("/dev/full"), "it"):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")


def test_other_errors_of_the_system_are_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Invalid argument"), storage.reported(tmp_path, "it"):
        raise OSError(errno.EINVAL, "Invalid argument")


def test_no_output_replaces_an_input_or_lies_in_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    (tmp_path / "link.onnx").symlink_to("model.onnx")
    with pytest.raises(StorageError, match="replace an input"):
        storage.require_other(tmp_path / "link.onnx", tmp_path / "model.onnx")
    storage.require_other(tmp_path / "new.onnx", tmp_path / "model.onnx", tmp_path / "missing")
    (tmp_path / "art" / "export").mkdir(parents=True)
    (tmp_path / "art" / "manifest.json").write_text("{}")
    for name in ("manifest.json", "new.onnx", "export/new.onnx"):
        with pytest.raises(StorageError, match="lie in an artifact"):
            storage.require_other(tmp_path / "art" / name)
