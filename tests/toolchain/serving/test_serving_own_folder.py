"""The folder of a server: ours alone, gone with the server, and with the next one where the server was killed."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from toolchain.serving import own_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no workers on Windows")
HOLDS = """
import sys
from toolchain.serving import own_folder
with own_folder.made() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_only_this_user_opens_it_and_it_goes(place: Path) -> None:
    with own_folder.made() as folder:
        assert folder.parent == place
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "file").touch()
        with own_folder.made() as other:
            assert folder != other
            assert (folder / "file").exists(), "it is in use"
    assert list(place.iterdir()) == []


def test_what_a_killed_server_left_goes_when_nobody_has_it(place: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={"TMPDIR": str(place), "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
    )  # fmt: skip
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    (folder / "standing").mkdir()
    with own_folder.held(folder):  # as a worker has it, while it drains
        process.send_signal(signal.SIGKILL)
        process.wait()
        with own_folder.made():
            assert (folder / "standing").exists()
    others = [place / "toolchain-serve-link", place / "serve-of-others", place / "toolchain-serve-file"]
    others[1].mkdir()
    others[0].symlink_to(others[1])
    others[2].touch()
    with own_folder.made() as mine:
        assert sorted(place.iterdir()) == sorted([*others, mine])


def test_one_that_was_taken_for_left_is_made_anew(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that begins at the same time may look between the folder and its lock."""
    real, made = tempfile.mkdtemp, []

    def then_swept(prefix: str) -> str:
        made.append(real(prefix=prefix))
        if len(made) == 1:
            own_folder._sweep()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", then_swept)
    with own_folder.made() as folder:
        assert [str(folder)] == made[1:]
        assert folder.exists()


def test_many_that_begin_at_once(place: Path) -> None:
    wrong, together = [], threading.Barrier(8)

    def one() -> None:
        together.wait()
        for _ in range(50):
            with own_folder.made() as folder:
                if not folder.exists():
                    wrong.append(folder)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert list(place.iterdir()) == []


def test_no_place_for_it_says_what_to_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = place / ("x" * 100)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(own_folder.NoFolder, match="TMPDIR"), own_folder.made():
        pass
    deep.mkdir()
    with pytest.raises(own_folder.NoFolder, match="too long"), own_folder.made():
        pass
    assert list(deep.iterdir()) == []
