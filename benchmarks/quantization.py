"""INT8 beside the other tools: accuracy, cost of calibration, latency, size; and what TensorRT makes of ours.

    python benchmarks/quantization.py [--models resnet20 minilm ...] [--quick] [--work DIR] [--json out.json]
                                      [--nncf-python PYTHON] [--trt-python PYTHON] [--threads 2] [--assets DIR]

All tools start from the same float graph, which the toolchain optimised (and for ``onnxruntime.quantization``
``quant_pre_process`` besides, without its symbolic shape inference where that gives up), and read the same batches
from the disk. Every job is a fresh process.

calibration  seconds from samples to ranges; x is against a process that only runs the model over the same batches,
             right before it. NNCF does not tell calibration from the rest: there it is all of it.
memory       VmHWM of that process at that time, imports and all; x is against the process that only runs the model.
latency      milliseconds of FP32, and of the others over FP32, on ONNX Runtime: all files of a model in one process,
             a block of runs each in turn; the median over the rounds of the ratio within a round. A question mark
             says that something else had the machine: then it is the fastest run over the fastest, for all.
even         where a tool fails on the samples as they come, since the last batch is smaller or sentences have many
             lengths, it gets another row with batches that are all alike.
TensorRT     the same calibration in the TensorRT dialect, built by tensorrt-rtx, without a GPU.

``--work`` keeps what was found, each as it comes: a run that was interrupted goes on from there (and takes
it for granted: give a new folder after a change to the code). NNCF and TensorRT may live in other interpreters than
this one. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _quantization_models import CASES, MEMORY_SAMPLES, Case, prepare, score
from _quantization_tables import show

from passes import PASSES

ROOT = Path(__file__).resolve().parent.parent
SIZES = (1, 8)
CAPABILITIES = ("SM86", "SM89")
METHODS = ("MinMax", "Percentile", "Entropy")
_CHILD = Path(__file__).with_name("_quantization_child.py")
_SECONDS = 3600
#: A tool that has taken so long is not run again: its ratio is far from where noise matters.
_ENOUGH_SECONDS = 60
#: Runs that are usually so much slower than the fastest had to share the machine.
_DISTURBED = 1.25

Row = dict[str, Any]


def child(do: str, *, python: str = sys.executable, **job: Any) -> dict[str, Any]:
    """The answer of one process; ``{"failed": what it died of}`` where there is none."""
    environment = {**os.environ}
    if python == sys.executable:  # another interpreter has its own packages, and needs none of ours
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [python, str(_CHILD), json.dumps({"do": do, **job})]
    # in a folder of its own: onnxruntime.quantization leaves files where it is run
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = subprocess.run(
                command, cwd=scratch, capture_output=True, text=True, check=False, env=environment, timeout=_SECONDS
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"no end after {_SECONDS} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines and done.returncode > 0 else f"exit code {done.returncode}"
        return {"failed": reason[:160]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


class Work:
    """The folder of one model's results, each of which is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def kept(self, name: str, make: Callable[[], Any], *depends: Any) -> Any:
        """What ``make`` gave, now or in an earlier run that had the same ``depends`` (JSON values)."""
        path = self.folder / f"{name}.json"
        key = json.dumps(depends)
        if path.exists():
            found = json.loads(path.read_text())
            if found["key"] == key:
                return found["result"]
        print(f"  {self.folder.name}: {name}", file=sys.stderr, flush=True)
        result = make()
        working = path.with_suffix(".working")
        working.write_text(json.dumps({"key": key, "result": result}))
        working.replace(path)  # a run that is killed leaves no half
        return result


def tools(case: Case, python: str | None) -> list[tuple[str, dict[str, Any]]]:
    """What makes an INT8 file: a name, and the job without ``model``, ``samples`` and ``write``."""
    found: list[tuple[str, dict[str, Any]]] = [("ours", {"do": "ours", "dialect": "ort-cpu"})]
    if case.transformer:
        found.append(("ours, as NNCF", {"do": "ours_tools"}))  # SmoothQuant and bias correction
    found += [(f"onnxruntime {method}", {"do": "onnxruntime_static", "method": method}) for method in METHODS]
    if python:
        found.append(("NNCF", {"do": "nncf", "python": python, "transformer": case.transformer}))
    if case.transformer:
        if "quantize_dynamic" in PASSES:
            found.append(("ours dynamic", {"do": "ours_dynamic"}))
        found.append(("onnxruntime dynamic", {"do": "onnxruntime_dynamic"}))
    return found


def against_plain(job: dict[str, Any], plain: dict[str, Any], rounds: int) -> Row:
    """Seconds and memory of a job, each time right after a process that only runs the model."""
    taken: list[tuple[dict[str, Any], dict[str, Any]]] = []
    while len(taken) < rounds and sum(found["total_seconds"] for found, _ in taken) < _ENOUGH_SECONDS:
        base = child("plain", **plain)
        found = child(**job)
        for answer in (base, found):
            if "failed" in answer:
                return answer
        taken.append((found, base))
    row: Row = {name: statistics.median(f[name] for f, _ in taken) for name in taken[0][0]}
    for name, of in (("time_ratio", "seconds"), ("memory_ratio", "peak_mb")):
        row[name] = statistics.median(f[of] / b[of] for f, b in taken)
    return row


def made(work: Work, case: Case, python: str | None, rounds: int) -> list[Row]:
    """A row for every tool; where it made a file, with its name."""
    float32, ready = str(work.folder / "fp32.onnx"), str(work.folder / "preprocessed.onnx")
    before = work.kept("preprocess", lambda: _preprocessed(float32, ready))
    rows: list[Row] = []
    for name, job in tools(case, python):
        theirs = job["do"].startswith("onnxruntime")
        if theirs and "failed" in before:
            rows.append({"tool": name, "failed": f"quant_pre_process: {before['failed']}"})
            continue
        job = {**job, "model": ready if theirs else float32}
        if job["do"].endswith("_dynamic"):
            rows.append(_row(name, lambda write: child(**job, write=write), work, ("total_seconds",)))  # noqa: B023
            continue
        for samples in ("calibration", "even"):
            source = str(work.folder / samples)
            plain = {"model": float32, "samples": source}
            row = _row(
                name if samples == "calibration" else f"{name}, even",
                lambda write: against_plain({**job, "samples": source, "write": write}, plain, rounds),  # noqa: B023
                work,
            )
            rows.append(row)
            if "failed" not in row:
                break
    if not python:
        rows.append({"tool": "NNCF", "failed": "not installed"})
    return rows


def _preprocessed(model: str, write: str) -> dict[str, Any]:
    found = child("preprocess", model=model, write=write, symbolic=True)
    # where its symbolic shape inference gives up, its documentation says to leave that out
    return child("preprocess", model=model, write=write, symbolic=False) if "failed" in found else found


def _row(tool: str, make: Callable[[str], Row], work: Work, only: tuple[str, ...] = ()) -> Row:
    file = f"{tool.replace(', ', '-').replace(' ', '-')}.onnx"
    found = work.kept(tool, lambda: make(str(work.folder / file)))
    if "failed" in found:
        return {"tool": tool, "failed": found["failed"]}
    return {"tool": tool, "file": file, **{name: found[name] for name in only or found}}


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model."""
    rounds, seconds = (1, 3.0) if options.quick else (3, 20.0)
    work = Work(options.work / (f"{case.name}-quick" if options.quick else case.name))
    folder = work.folder
    work.kept("prepare", lambda: prepare(case, options.assets, folder, quick=options.quick))
    rows = [_row("FP32", lambda _: child("plain", **_plain(folder)), work, ("seconds", "imports_mb", "peak_mb"))]
    rows[0]["file"] = "fp32.onnx"
    rows += made(work, case, options.nncf_python, rounds)
    whole = [row for row in rows if "failed" not in row]
    files = [folder / row["file"] for row in whole]
    job = {
        "models": [str(file) for file in files],
        "feeds": str(folder / "latency.npz"),
        "sizes": list(SIZES),
        "seconds": seconds,
        "threads": options.threads,
    }
    blocks = work.kept("latency", lambda: child("latency", **job), job)
    for i, (row, file) in enumerate(zip(whole, files, strict=True)):
        row["size_mb"] = file.stat().st_size / 1e6
        row["latency"] = {} if "failed" in blocks else _against_float(blocks, i)
        if case.scored:
            row.update(work.kept(f"score {row['tool']}", lambda: _scored(work, file)))  # noqa: B023  called at once
    memory = [
        work.kept(f"memory {count}", lambda: _memory(folder, count, rounds))  # noqa: B023  called at once
        for count in MEMORY_SAMPLES
    ]
    tensorrt = work.kept("tensorrt", lambda: _tensorrt(folder, options.trt_python), options.trt_python)
    return {"rows": rows, "memory": memory, "tensorrt": tensorrt, "no_latency": blocks.get("failed")}


def _plain(folder: Path, samples: str = "calibration") -> dict[str, str]:
    return {"model": str(folder / "fp32.onnx"), "samples": str(folder / samples)}


def _against_float(blocks: dict[str, Any], index: int) -> dict[str, Any]:
    """For every batch size: milliseconds, the ratio to FP32, and whether something else had the machine.

    Runs of more than a few milliseconds are interrupted where others wait for the cores, shorter ones are not: then
    medians tell more of the others than of the files, and what is compared is the fastest run of each.
    """
    result = {}
    for size, found in blocks.items():
        usual = [statistics.median(block[0] for block in side) for side in found]
        least = [min(block[1] for block in side) for side in found]
        # of all files or of none: a median over a median is not to be compared with a fastest over a fastest
        disturbed = any(m > _DISTURBED * x for m, x in zip(usual, least, strict=True))
        ratio = statistics.median(a[0] / b[0] for a, b in zip(found[index], found[0], strict=True))
        result[size] = {
            "ms": least[index] if disturbed else usual[index],
            "ratio": least[index] / least[0] if disturbed else ratio,
            "disturbed": disturbed,
        }
    return result


def _scored(work: Work, file: Path) -> dict[str, Any]:
    samples = str(work.folder / "evaluation")
    answers = []
    for each in (work.folder / "fp32.onnx", file):
        answers.append(each.with_suffix(".answers.npz"))
        if each is file or not answers[-1].exists():
            found = child("outputs", model=str(each), samples=samples, write=str(answers[-1]))
            if "failed" in found:
                return {"failed": found["failed"]}
    return score(work.folder, *answers)


def _memory(folder: Path, count: int, rounds: int) -> Row:
    plain = _plain(folder, f"memory{count}")
    row = against_plain({"do": "ours", "dialect": "ort-cpu", "write": "", **plain}, plain, rounds)
    return {"samples": count, **row}


def _tensorrt(folder: Path, python: str | None) -> dict[str, Any]:
    if python is None:
        return {"failed": "not installed"}
    float32, int8 = str(folder / "fp32.onnx"), str(folder / "tensorrt.onnx")
    quantised = child("ours", **_plain(folder), write=int8, dialect="tensorrt")
    if "failed" in quantised:
        return quantised
    return child("tensorrt", python=python, float32=float32, int8=int8, capabilities=list(CAPABILITIES))


def _interpreter(asked: str | None, module: str) -> str | None:
    """The interpreter that has the module: the one asked for, else this one, else none."""
    if asked:
        return os.path.abspath(asked)  # not resolved: a virtual environment is known by its link
    return sys.executable if importlib.util.find_spec(module) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    assets = os.environ.get("ASSETS", ROOT.parent / "shared" / "assets")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--assets", type=Path, default=Path(assets))
    parser.add_argument("--work", type=Path, help="keep the files and results here, and go on from there")
    parser.add_argument("--quick", action="store_true", help="few samples and one round: to see that it works")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime, for latency")
    parser.add_argument("--nncf-python", help="an interpreter that has nncf and onnx")
    parser.add_argument("--trt-python", help="an interpreter that has tensorrt_rtx")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    options.nncf_python = _interpreter(options.nncf_python, "nncf")
    options.trt_python = _interpreter(options.trt_python, "tensorrt_rtx")
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        # absolute: the children run elsewhere
        options.work = (options.work or Path(temporary)).resolve()
        options.assets = options.assets.resolve()
        for name in options.models:
            results[name] = measure(CASES[name], options)
            show(CASES[name], results[name])
    result = {"benchmark": "quantization", "quick": options.quick, "threads": options.threads, "models": results}
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
