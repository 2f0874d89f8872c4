"""What of an artifact or a bundle runs on this machine, and why not the rest: ``python -m runtimes doctor``.

Of an artifact every variant is loaded, in a process of its own, since only that shows that it works: files are
compared with their digests, compiled code is refused where its maker is not known, and what crashes takes nobody along.
A bundle is not unpacked; of it is said whether the runtimes that its variants want are here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtimes import _probe
from runtimes._unpack import open_bundle
from runtimes.base import Error, InvalidArtifact
from runtimes.install import Recipe, bundle_manifest, recipes_of
from runtimes.package import read_package

#: Loading a variant takes no longer, unless it hangs.
TIMEOUT_S = 300.0


@dataclasses.dataclass(frozen=True, slots=True)
class Examined:
    """Whether one variant runs here.

    Attributes:
        variant, target, precision: as the manifest has them.
        runs: whether it was loaded here; of a bundle, whether its runtime works here.
        why: the file and the runtime that were used, or the reason why not.
        remedy: what mends it, where something does.
    """

    variant: str
    target: str
    precision: str
    runs: bool
    why: str
    remedy: str | None = None


def examine(path: Path) -> tuple[str, tuple[Examined, ...]]:
    """Looks at every variant of an artifact, of what is installed in a folder, or of a bundle.

    Returns:
        What it is, in a line; and what was found of each variant, best first.

    Raises:
        InvalidArtifact: it is none of these, or is damaged or unsafe as a whole.
    """
    if not path.is_dir():
        return _examine_bundle(path)
    package = read_package(path)
    title = f"{package.name} {package.version}, sha256 {package.digest}"
    found = [
        _apart(one.name, str(one.target), one.precision, f"load({os.fspath(package.root)!r}, {one.name!r})")
        for one in package.variants
    ]
    build = f"python -m runtimes compile-on-device {path}"
    return title, (*found, *_to_be_built(recipes_of(package, os.fspath(package.root)), build))


def _examine_bundle(path: Path) -> tuple[str, tuple[Examined, ...]]:
    with open_bundle(path) as reader:
        manifest = bundle_manifest(reader)
    about = manifest.metadata.get("bundle")
    platform = f" for {about['platform']}" if isinstance(about, dict) and isinstance(about.get("platform"), str) else ""
    title = f"{manifest.name} {manifest.version}, a bundle{platform}; whether its runtimes are here"
    found = [_apart(one.name, str(one.target), one.precision, f"ask({str(one.target)!r})") for one in manifest.variants]
    build = "install it, then: python -m runtimes compile-on-device ROOT"
    return title, (*found, *_to_be_built(recipes_of(manifest, os.fspath(path)), build))


def _to_be_built(recipes: Sequence[Recipe], build: str) -> Iterator[Examined]:
    """What was brought as a graph and does not run before it is built here; and whether it can be."""
    for recipe in recipes:
        found = _apart(recipe.variant, recipe.target, recipe.precision, f"ask({recipe.target!r})")
        if found.runs:
            why = f"to be built on this device, with {recipe.target} {found.why}"
            found = dataclasses.replace(found, runs=False, why=why, remedy=build)
        yield found


def _apart(variant: str, target: str, precision: str, call: str) -> Examined:
    """Lets a child process call one of the functions below."""
    about = (variant, target, precision)
    command = _probe.child(f"from runtimes import _doctor; _doctor.{call}")
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Examined(*about, False, f"it did not load within {TIMEOUT_S:g} s")
    try:
        answer = json.loads(done.stdout)
        return Examined(*about, answer["runs"], answer["why"], answer["remedy"])
    except (ValueError, KeyError, TypeError):
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return Examined(*about, False, f"it ended with exit code {done.returncode}{f': {said[-1]}' if said else ''}")


def ask(target: str) -> None:
    """In the child: says whether a target's runtime works here."""
    import runtimes

    with _answering() as answer:
        parsed = runtimes.Target.parse(target)
        state = runtimes.backend(parsed.runtime).can_run(parsed)
        why = f"version {state.version}" if state.available else state.reason
        answer |= {"runs": state.available, "why": why, "remedy": state.remedy}


def load(root: str, variant: str) -> None:
    """In the child: loads a variant and says what was taken."""
    import runtimes

    with _answering() as answer, runtimes.load(root, variant=variant) as session:
        parts = [session.info.get(key, "") for key in ("file", "runtime", "prepared")]
        why = ", ".join(part for part in parts if part not in ("", "used"))
        answer |= {"runs": True, "why": why, "remedy": None}


@contextlib.contextmanager
def _answering() -> Iterator[dict[str, Any]]:
    """Writes the answer, or the error in its place, as JSON to what was stdout."""
    out = os.dup(1)
    os.dup2(2, 1)  # native libraries print where they like
    answer: dict[str, Any] = {}
    try:
        yield answer
    except Error as error:
        answer = {"runs": False, "why": " ".join(error.what.split()), "remedy": error.hint}
    with open(out, "w", encoding="utf-8") as file:
        json.dump(answer, file)


def report(path: Path | None) -> tuple[list[str], int]:
    """The lines that ``doctor`` prints, and its exit code: 1 where nothing of the artifact runs here.

    Raises:
        InvalidArtifact: as ``examine``.
    """
    import runtimes

    if path is None:
        states = runtimes.available()
        machine = [
            (name, "yes", f"version {state.version}") if state.available else (name, "no", state.reason or "")
            for name, state in states.items()
        ]
        return _table(machine, [state.remedy for state in states.values()]), 0
    title, found = examine(path)
    if not found:
        raise InvalidArtifact("it has no variants", where=str(path))
    best = next((one.variant for one in found if one.runs), None)
    rows = [(one.variant, "yes" if one.runs else "no", one.target, one.precision, one.why) for one in found]
    last = f"the first that runs here: {best}" if best else "nothing of it runs here"
    return [f" {title}", *_table(rows, [one.remedy for one in found]), f" {last}"], 0 if best else 1


def _table(rows: Sequence[Sequence[str]], remedies: Sequence[str | None]) -> list[str]:
    """Columns as wide as they need to be; below a row what mends it."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row, remedy in zip(rows, remedies, strict=True):
        lines.append("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]))
        if remedy:
            lines.append(" " * (sum(widths) + 2 * len(widths)) + f"next: {remedy.removeprefix('run: ')}")
    return lines
