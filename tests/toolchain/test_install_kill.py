"""Kill -9 at 200 random moments of an install: afterwards there is always a whole version in service.

Most installs run without the self-test's own process, so that the moments fall on what changes the disk; the others
run all of it. A small process that has imported nothing but the installer forks them and kills them: what is killed
is the install and not the start of Python.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundle_support import make_artifact
from toolchain_support import ROOT

import runtimes
from runtimes import _versions
from runtimes import install as installing
from runtimes.package import read_package
from toolchain.bundle import bundle

KILLS = 200
WITH_SELFTEST = 15

#: Reads lines of bundle, root, seconds and whether to test; answers each with whether the install ended by itself.
KILLER = """
import os, signal, sys, time
from runtimes import install as installing
# A process that is killed loses nothing that it wrote; waiting for the disk only spreads the moments thin.
os.fsync = lambda descriptor: None
real = installing.selftest_apart
for line in sys.stdin:
    path, root, seconds, tested = line.rstrip().split("\\t")
    installing.selftest_apart = real if tested == "yes" else lambda folder, **_: ()
    child = os.fork()
    if child == 0:
        try:
            installing.install(path, root)
        finally:
            os._exit(0)
    time.sleep(float(seconds))
    os.kill(child, signal.SIGKILL)
    print("ended" if os.WIFEXITED(os.waitpid(child, 0)[1]) else "killed", flush=True)
"""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two artifacts of one name."""
    folder = tmp_path_factory.mktemp("bundles")
    made = []
    for seed in range(2):
        artifact = make_artifact(folder / f"artifact{seed}", seed=seed, channels=4096)
        bundle(artifact, folder / f"b{seed}.tar", platform="linux-x86_64", with_ort_format=False)
        made.append(folder / f"b{seed}.tar")
    return made


@pytest.fixture
def killer() -> Iterator[subprocess.Popen[str]]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{KILLER}"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as ran:
        yield ran


def install_and_die(killer: subprocess.Popen[str], path: Path, root: Path, after_s: float, *, tested: bool) -> bool:
    """Installs and kills that after some time. Returns whether it had ended by itself."""
    assert killer.stdin is not None
    assert killer.stdout is not None
    killer.stdin.write(f"{path}\t{root}\t{after_s}\t{'yes' if tested else 'no'}\n")
    killer.stdin.flush()
    return killer.stdout.readline() == "ended\n"


def whole(root: Path, digests: set[str]) -> int:
    """The number in service, after everything there was held against its digests."""
    number = _versions.current(root)
    assert number is not None
    for one in _versions.installed(root):
        package = read_package(root / str(one))
        package.verify(receipts=False)
        assert package.digest in digests
    return number


def test_killed_at_200_moments_there_is_a_whole_version(
    bundles: list[Path], tmp_path: Path, killer: subprocess.Popen[str]
) -> None:
    root = tmp_path / "root"
    rng = random.Random(200)
    digests = {installing.verify(path).digest for path in bundles}
    installing.install(bundles[0], root)
    # The moments are drawn from twice what an install takes, as far as the ones before have told.
    longest = {True: 1.0, False: 0.05}
    ended = cut = left = 0
    before = whole(root, digests)
    for number in range(KILLS):
        tested = number < WITH_SELFTEST
        by_itself = install_and_die(killer, bundles[number % 2], root, rng.uniform(0, longest[tested]), tested=tested)
        longest[tested] *= 0.85 if by_itself else 1.1
        after = whole(root, digests)
        assert after >= before
        ended += by_itself
        cut += not by_itself and after == before
        left += any(name.startswith(".incoming-") for name in os.listdir(root))
        before = after
    # The moments did fall into the installs: some ended, many were cut off, and some of those half way.
    assert ended > 10
    assert cut > 50
    assert left > 25
    done = installing.install(bundles[0], root, keep=2)
    assert sorted(os.listdir(root)) == sorted([".lock", "latest", *map(str, _versions.installed(root))]), (
        "what the killed ones left is gone"
    )
    assert len(_versions.installed(root)) == 2
    with runtimes.load(root) as session:
        assert session.info["digest"] == done.digest
