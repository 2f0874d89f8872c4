"""Child process of ``benchmark.py``: loads what it is told, runs it, and answers in JSON lines.

It imports numpy, ``runtimes`` and the input generator only, so that load time and memory are those of a service.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import runtimes
from toolchain.compile import read_compiled, session_options
from toolchain.seeded import seeded_inputs

#: Runs of one side before the other has its turn: long enough to warm the caches again, short against drift.
_BLOCK_SECONDS = 0.05
#: Seconds of sleep, of which an idle process computes less than a tenth, and how many of them are waited at most.
_STEP, _LONGEST_SPIN = 0.005, 100


def main() -> int:
    job = json.load(sys.stdin)
    try:
        _run(job)
    except runtimes.Error as error:
        _say({"error": error.what, "where": error.where, "hint": error.hint})
        return 1
    return 0


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _load(subject: dict[str, Any], threads: int) -> tuple[runtimes.Session, float]:
    started = time.perf_counter()
    if subject["compiled"]:
        compiled = read_compiled(Path(subject["path"]))
        typed = session_options(compiled.target, _options(compiled.target, subject["options"], threads))
        session = runtimes.backend(compiled.target.runtime).load(compiled, options=typed)
    else:
        options = subject["options"] or None
        if threads:
            options = _options(_target(subject), subject["options"], threads)
        session = runtimes.load(subject["path"], target=subject["target"], variant=subject["variant"], options=options)
    return session, (time.perf_counter() - started) * 1e3


def _target(subject: dict[str, Any]) -> runtimes.Target:
    """What ``runtimes.load`` will take: how threads are asked for depends on it."""
    path = Path(subject["path"])
    if not path.is_dir():
        return runtimes.Target.parse(subject["target"] or "ort-cpu")
    from runtimes import package

    chosen, _ = package.choose_variant(
        package.read_package(path),
        variant=subject["variant"],
        target=subject["target"],
        can_run=lambda target: runtimes.backend(target.runtime).can_run(target),
    )
    return chosen.target


def _options(target: runtimes.Target, options: dict[str, Any], threads: int) -> dict[str, Any]:
    name = runtimes.backend(target.runtime).threads_option
    if threads and name is None:
        raise runtimes.InvalidInput(f"{target} has no number of threads to set", hint="leave --threads out")
    return {**options, name: threads} if threads and name else options


def _run(job: dict[str, Any]) -> None:
    plan, threads = job["plan"], job["threads"]
    loaded = [_load(subject, threads) for subject in job["subjects"]]
    sessions = [session for session, _ in loaded]
    for batch in plan["batch_sizes"]:
        feeds = [seeded_inputs(s.inputs, batch=batch, seed=plan["seed"], dims=plan["dims"]) for s in sessions]
        batch = _real_batch(sessions[0], feeds[0], batch)
        if len(sessions) > 1 and sessions[0].inputs != sessions[1].inputs:
            taken = [", ".join(map(str, s.inputs)) for s in sessions]
            raise runtimes.InvalidInput(f"the two do not take the same inputs: {taken[0]} and {taken[1]}")
        if job["interleave"]:
            _say({"batch": batch, "blocks_ms": _interleaved(sessions, feeds, plan)})
            continue
        session = sessions[0]
        started = time.perf_counter()
        session.run(feeds[0])
        first_ms = (time.perf_counter() - started) * 1e3
        samples = _repeat(session, feeds[0], plan, f"benchmark: batch {batch}, first run {first_ms:.1f} ms")
        _say(
            {
                "batch": batch,
                "samples_ms": samples,
                "load_ms": loaded[0][1],
                "first_ms": first_ms,
                "peak_memory_mb": _peak_memory() / 1e6,
                "info": dict(session.info),
                "target": str(session.target),
                "digest": session.info.get("digest"),
            }
        )


def _real_batch(session: runtimes.Session, feeds: dict[str, Any], wanted: int) -> int:
    """How many samples a run takes: as asked, or what the model fixes. Asking a fixed one for another is an error."""
    spec = session.inputs[0] if session.inputs else None
    if spec is None or not spec.shape or not isinstance(spec.shape[0], int):
        return wanted
    fixed = len(feeds[spec.name])
    if wanted not in (1, fixed):
        raise runtimes.InvalidInput(
            f"the model has a fixed batch of {fixed}, {wanted} was asked for",
            where=str(spec),
            hint=f"--batch-sizes {fixed}",
        )
    return fixed


def _repeat(session: runtimes.Session, feeds: dict[str, Any], plan: dict[str, Any], text: str) -> list[float]:
    for _ in range(plan["warmup"]):
        session.run(feeds)
    samples: list[float] = []
    begun = told = time.perf_counter()
    while True:
        started = time.perf_counter()
        session.run(feeds)
        ended = time.perf_counter()
        samples.append((ended - started) * 1e3)
        if ended - told > 0.5:
            told = ended
            by_time = (ended - begun) / plan["duration_s"] if plan["duration_s"] else 1.0
            _say({"progress": text, "share": min(by_time, len(samples) / plan["count"], 1.0)})
        if ended - begun >= plan["duration_s"] and len(samples) >= plan["count"]:
            return samples


def _interleaved(sessions: list[runtimes.Session], feeds: list[Any], plan: dict[str, Any]) -> list[list[float]]:
    """Medians of alternating blocks, A B A B; the order within a pair is swapped every time."""
    once = []
    for session, feed in zip(sessions, feeds, strict=True):
        for _ in range(max(1, plan["warmup"])):
            started = time.perf_counter()
            session.run(feed)
            last = time.perf_counter() - started
        once.append(last)
    runs = max(1, round(_BLOCK_SECONDS / max(once)))
    blocks: list[list[float]] = [[] for _ in sessions]
    begun = time.perf_counter()
    while True:
        order = range(len(sessions)) if len(blocks[0]) % 2 == 0 else reversed(range(len(sessions)))
        for side in order:
            _settle()
            sessions[side].run(feeds[side])  # its threads slept, and the caches are the other side's
            samples = []
            for _ in range(runs):
                started = time.perf_counter()
                sessions[side].run(feeds[side])
                samples.append((time.perf_counter() - started) * 1e3)
            blocks[side].append(statistics.median(samples))
        if time.perf_counter() - begun >= plan["duration_s"] and len(blocks[0]) * runs >= plan["count"]:
            return blocks


def _settle() -> None:
    """Waits until the threads of the side before have stopped spinning for more work: ONNX Runtime's do for tens of
    milliseconds, and take a core from whoever is measured meanwhile."""
    for _ in range(_LONGEST_SPIN):
        before = time.process_time()
        time.sleep(_STEP)
        if time.process_time() - before < _STEP / 10:
            return


def _peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    # VmHWM, not ru_maxrss: the latter survives exec and would count the parent's memory at the fork
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main())
