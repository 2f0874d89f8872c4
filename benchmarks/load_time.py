"""From a path to the first result: our artifact against ONNX Runtime on the same portable ONNX.

    python benchmarks/load_time.py --artifact artifacts/resnet50        # or --model resnet50.onnx
    python benchmarks/load_time.py --model resnet50.onnx --rounds 20 [--json out.json]

Each measurement is a fresh child process; the sides take turns (A B C A B C ...), so that a machine that speeds up
or slows down does it to all. Raw is ``onnxruntime.InferenceSession(model.onnx)`` with default options and one run.
Ours is ``runtimes.load(artifact)`` and one run, with the receipt of an earlier load, and without any, so that every
digest is computed. The clock starts when numpy and onnxruntime are imported, which takes both the same. The files
are in the page cache for all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import runtimes
from runtimes.package import choose_variant, read_package, write_receipt

ROOT = Path(__file__).resolve().parent.parent

_CHILD = """
import json, sys, time
import numpy, onnxruntime
side, path, shape = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
x = {name: numpy.full(size, 0.5, dtype) for name, (dtype, size) in shape.items()}
if side == "raw":
    started = time.perf_counter()
    session = onnxruntime.InferenceSession(path)
    loaded = time.perf_counter()
    session.run(None, x)
else:
    import runtimes
    started = time.perf_counter()
    session = runtimes.load(path)
    loaded = time.perf_counter()
    session.run(x)
done = time.perf_counter()
print(loaded - started, done - started)
"""


def child(side: str, path: Path, shapes: dict[str, Any], cache: Path) -> tuple[float, float]:
    """Milliseconds to a session and to the first result, in a fresh process."""
    said = subprocess.run(
        [sys.executable, "-c", _CHILD, side, str(path), json.dumps(shapes)],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TOOLCHAIN_CACHE": str(cache)},
    ).stdout
    loaded, done = map(float, said.split())
    return loaded * 1e3, done * 1e3


def pack(model: Path, root: Path) -> Path:
    """The least that is an artifact: one ort-cpu variant of a model."""
    import hashlib

    compiled = runtimes.compile(model, "ort-cpu", root / "ort-cpu-fp32")
    ours = {
        "target": "ort-cpu",
        "precision": "fp32",
        "model_file": compiled.model_file,
        "prepared_file": compiled.prepared_file,
        "fingerprint": dict(compiled.fingerprint),
    }
    body = {"ep": "CPUExecutionProvider", "device": "cpu", "executor_info": {"toolchain": ours}}
    files = {
        path.relative_to(root).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "schema_version": "1.0",
        "layout": "portable",
        "components": {"model": {"variants": {"ort-cpu-fp32": body}}},
        "additional_metadata": {"toolchain": {"schema": 1, "files": files}},
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def measure(artifact: Path, rounds: int, folder: Path) -> dict[str, Any]:
    """All sides, ``rounds`` times each, and the ratios of neighbours."""
    package = read_package(artifact)
    variant, _ = choose_variant(package, target="ort-cpu", probe=lambda name: runtimes.backend(name).probe())
    portable = package.root / variant.directory / str(variant.model_file)
    with runtimes.load(artifact, target="ort-cpu") as session:
        shapes = {
            spec.name: (spec.dtype, [size if isinstance(size, int) else 1 for size in spec.shape or ()])
            for spec in session.inputs
        }
        prepared = session.info["prepared"]
    known, unknown = folder / "known", Path("/dev/null")
    os.environ["TOOLCHAIN_CACHE"] = str(known)
    write_receipt(artifact)
    sides = {
        "raw": ("raw", portable, known),
        "ours, receipt": ("ours", artifact, known),
        "ours, no receipt": ("ours", artifact, unknown),
    }
    for side, path, cache in sides.values():
        child(side, path, shapes, cache)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (side, path, cache) in sides.items():
            times[name].append(child(side, path, shapes, cache))
    rows = []
    for name, taken in times.items():
        ratios = [raw[1] / ours[1] for raw, ours in zip(times["raw"], taken, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "what": name,
                "session_ms": round(statistics.median(t[0] for t in taken), 2),
                "first_result_ms": round(statistics.median(t[1] for t in taken), 2),
                "speedup": round(middle, 2),
                "quartiles": [round(low, 2), round(high, 2)],
            }
        )
    return {"benchmark": "load_time", "prepared": prepared, "rounds": rounds, "rows": rows}


def main() -> None:
    """Measures, prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--artifact", type=Path, help="an artifact with a variant for ort-cpu")
    what.add_argument("--model", type=Path, help="an ONNX file, of which one is made")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifact = arguments.artifact or pack(arguments.model, folder / "artifact")
        result = measure(artifact, arguments.rounds, folder)
    for row in result["rows"]:
        low, high = row["quartiles"]
        print(
            f"{row['what']:18} session {row['session_ms']:>8.2f} ms   first result {row['first_result_ms']:>8.2f} ms"
            f"   {row['speedup']:>5.2f} x raw  [{low:.2f}, {high:.2f}]"
        )
    print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
