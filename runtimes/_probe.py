"""Asks backends whether they work here, each in a process of its own: what crashes there takes nobody along.

A runtime's import runs native code that may die of a missing CPU feature, a broken driver or a library that is
there twice. So every backend whose packages are installed is asked by a child process; all children run at once.
A built-in one without its packages is asked here: that costs a look for a folder.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from runtimes.base import Availability, Backend, Error

#: No probe takes this long, unless it hangs.
TIMEOUT_S = 60.0
_HOME = Path(__file__).resolve().parent.parent


def probe_apart(names: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> dict[str, Availability]:
    """What each backend's ``probe`` says in a process of its own; the processes run at once.

    Args:
        names: of backends, as targets have them.
        timeout_s: when those that have not answered are ended, all together.

    Returns:
        For each name its state. One that crashed, hung or said nothing is not available, and the reason says so.
    """
    deadline = time.monotonic() + timeout_s
    children = {}
    try:
        for name in names:
            children[name] = subprocess.Popen(
                _command(name), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        return {name: _answer(child, deadline, timeout_s) for name, child in children.items()}
    finally:
        for child in children.values():
            if child.poll() is None:
                child.kill()
                child.communicate()


def absent(backend: Backend) -> bool:
    """Whether none of the packages is installed that a backend says it needs."""
    return bool(backend.packages) and all(importlib.util.find_spec(package) is None for package in backend.packages)


def main(name: str) -> None:
    """The child: probes one backend and writes its state as JSON to what was stdout."""
    # Native libraries print where they like; the answer goes where only it can go.
    answer = os.dup(1)
    os.dup2(2, 1)
    import runtimes

    try:
        state = runtimes.backend(name).probe()
        content = json.dumps(dataclasses.asdict(state))
    except Error as error:
        content = _refusal(error.what, error.hint)
    except Exception as error:  # noqa: BLE001 - another distribution's code may raise anything
        content = _refusal(f"its probe raised {type(error).__name__}: {error}")
    with open(answer, "w", encoding="utf-8") as out:
        out.write(content)


def _refusal(reason: str, remedy: str | None = None) -> str:
    return json.dumps(dataclasses.asdict(Availability(False, reason=reason, remedy=remedy)))


def child(code: str) -> list[str]:
    """The command line of a Python that finds what this one finds, and nothing that lies in the user's folder."""
    # Not python -m: that looks for modules in the current folder first.
    paths = [path for path in sys.path if path]
    start = f"import sys; sys.path = {paths if str(_HOME) in paths else [*paths, str(_HOME)]!r}; {code}"
    return [sys.executable, "-c", start]


def _command(name: str) -> list[str]:
    return child(f"from runtimes._probe import main; main({name!r})")


def _answer(child: subprocess.Popen[bytes], deadline: float, timeout_s: float) -> Availability:
    try:
        out, err = child.communicate(timeout=max(deadline - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired:
        return Availability(False, reason=f"its probe did not answer within {timeout_s:g} s")
    said = err.decode("utf-8", "replace").strip().splitlines()
    last = f": {said[-1].strip()[:200]}" if said else ""
    if child.returncode < 0:
        return Availability(False, reason=f"its probe crashed with signal {_signal(-child.returncode)}{last}")
    try:
        state = Availability(**json.loads(out))
    except (ValueError, TypeError):
        # Also after exit code 0: a library that calls exit() in the middle.
        return Availability(False, reason=f"its probe ended with exit code {child.returncode} and no answer{last}")
    if state.reason:
        state = dataclasses.replace(state, reason=" ".join(state.reason.split()))
    return state


def _signal(number: int) -> str:
    try:
        return f"{number} ({signal.Signals(number).name})"
    except ValueError:
        return str(number)
