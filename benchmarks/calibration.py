"""What calibration costs: time over a plain forward pass on the same samples, and peak memory over a plain session.

    python benchmarks/calibration.py --model artifacts/resnet50/ort-cpu-fp32/model.onnx --samples 64 512
    python benchmarks/calibration.py --model model.onnx --images ../shared/assets/imagenet/calibration50 \\
        --preprocessing efficientnet_lite0 [--no-peers] [--json out.json]
    python benchmarks/calibration.py --work WORK --models resnet20 minilm --no-peers

Every measurement is a fresh child process; the sides take turns (A B C A B C ...), and each time is divided by that of
its neighbour that only runs the model. ``plain`` is ``runtimes.load`` and ``run`` over batches of ``--batch``; the
clock runs for the forward pass alone, not for imports and load. For ours it runs for all of ``calibrate``: reading,
planning, making the session, the pass, deriving the ranges. For the peers (``onnxruntime.quantization.calibrate``) it
runs for making the calibrater, collecting and computing. Without ``--images`` the samples are seeded noise; with fewer
images than samples, images come again. Peak memory is VmHWM of the process, imports and all; samples are read from disk
a batch at a time. ``--batches`` takes folders of .npz instead, a batch each and an array for every input. ``--work`` is
the folder of ``quantization.py --work``: then each of ``--models`` there is measured on its 64 and 512 samples.
``--cores 1`` holds every child to one core: there the ratios bear other work on the machine. Beside each time stand
what is not in it: the seconds that the imports took and, of ``plain``, the load and the first run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import runtimes
from toolchain.data import open_dataset
from toolchain.seeded import seeded_inputs
from toolchain.zoo import ZOO

ROOT = Path(__file__).resolve().parent.parent
OURS = ("minmax", "percentile", "entropy", "mse", "auto")
PEERS = ("MinMax", "Percentile", "Entropy")

_CHILD = """
import json, os, sys, time
begun = time.perf_counter()
import numpy as np
side, method, model, data, batch, cores = sys.argv[1:7]
batch, cores = int(batch), int(cores)
if cores:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
clock = time.process_time if cores == 1 else time.perf_counter
if os.path.exists(data + "/meta.json"):
    meta = json.loads(open(data + "/meta.json").read())
    count, name, shape = meta["samples"], meta["input"], tuple(meta["shape"])
    size = int(np.prod(shape))
else:
    size = 0

def batches():
    if not size:
        for file in sorted(os.listdir(data)):
            with np.load(data + "/" + file) as arrays:
                yield {name: arrays[name] for name in arrays.files}
        return
    with open(data + "/samples.f32", "rb") as file:
        for start in range(0, count, batch):
            n = min(batch, count - start)
            yield {name: np.fromfile(file, np.float32, n * size).reshape(n, *shape)}

loaded = warmed = 0.0
if side == "plain":
    import onnxruntime
    import runtimes
    imported = time.perf_counter()
    session = runtimes.load(model, options={"intra_op_threads": cores})
    loaded = time.perf_counter() - imported
    session.run(next(batches()))
    warmed = time.perf_counter() - imported - loaded
    started = clock()
    for feeds in batches():
        session.run(feeds)
elif side == "ours":
    import pathlib
    import onnxruntime
    from toolchain.calibration import calibrate
    imported = time.perf_counter()
    started = clock()
    calibrate(pathlib.Path(model), batches(), method=method)
else:
    import pathlib, tempfile
    import onnxruntime
    from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator
    class Reader(CalibrationDataReader):
        def __init__(self):
            self.items = batches()
        def get_next(self):
            return next(self.items, None)
    imported = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        started = clock()
        calibrator = create_calibrator(
            pathlib.Path(model), augmented_model_path=folder + "/a.onnx", calibrate_method=CalibrationMethod[method]
        )
        calibrator.collect_data(Reader())
        calibrator.compute_data()
ended = clock()
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps({
    "seconds": ended - started, "peak_mb": int(peak.split()[1]) * 1024 / 1e6,
    "imports": imported - begun, "load": loaded, "first_run": warmed,
}))
"""


def child(side: str, method: str, model: Path, data: Path, batch: int, cores: int) -> dict[str, float] | str:
    """Seconds and peak MB of one process, or the last line of what it died of."""
    command = [sys.executable, "-c", _CHILD, side, method, str(model), str(data), str(batch), str(cores)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:80] if done.stderr.strip() else f"exit code {done.returncode}"
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def prepare(model: Path, count: int, images: Path | None, preprocessing: str | None, folder: Path) -> Path:
    """Writes ``count`` samples as raw float32, and what they are."""
    folder.mkdir()
    with runtimes.load(model) as session:
        specs = session.inputs
    if len(specs) != 1 or specs[0].dtype != "float32":
        raise SystemExit("this benchmark feeds models with one float32 input")
    if images is None:
        samples = seeded_inputs(specs, batch=min(count, 64))[specs[0].name]
    else:
        spec = ZOO[preprocessing].preprocessing if preprocessing else None
        dataset = open_dataset(str(images), inputs=specs, preprocessing=spec, limit=count)
        samples = np.concatenate([batch.inputs[specs[0].name] for batch in dataset])
    with open(folder / "samples.f32", "wb") as file:
        for i in range(count):
            file.write(np.ascontiguousarray(samples[i % len(samples)]).tobytes())
    meta = {"samples": count, "input": specs[0].name, "shape": list(samples.shape[1:])}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def measure(model: Path, data: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a side, each against the plain run of its round."""
    sides = [("plain", "-")] + [("ours", m) for m in options.methods]
    sides += [] if options.no_peers else [("onnxruntime", m) for m in PEERS]
    taken: dict[tuple[str, str], list[dict[str, float]]] = {side: [] for side in sides}
    failed: dict[tuple[str, str], str] = {}
    for _ in range(options.rounds):
        for side in sides:
            if side in failed:
                continue
            found = child(*side, model, data, options.batch, options.cores)
            if isinstance(found, str):
                failed[side] = found
            else:
                taken[side].append(found)
    plain = taken["plain", "-"]
    rows = []
    for side in sides:
        row: dict[str, Any] = {"side": side[0], "method": side[1]}
        if side in failed:
            row["failed"] = failed[side]
        else:
            pairs = list(zip(taken[side], plain, strict=True))
            row["seconds"] = round(statistics.median(a["seconds"] for a, _ in pairs), 3)
            row["time_ratio"] = round(statistics.median(a["seconds"] / b["seconds"] for a, b in pairs), 2)
            row["peak_mb"] = round(statistics.median(a["peak_mb"] for a, _ in pairs), 1)
            row["memory_ratio"] = round(statistics.median(a["peak_mb"] / b["peak_mb"] for a, b in pairs), 2)
            for key in ("imports", "load", "first_run"):
                row[key] = round(statistics.median(a[key] for a, _ in pairs), 3)
        rows.append(row)
    return rows


def main() -> None:
    """Measures, prints a table and one line of JSON for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path)
    what.add_argument("--work", type=Path, help="of quantization.py: its models on its samples")
    parser.add_argument("--models", nargs="+", help="with --work: which; all without")
    parser.add_argument("--images", type=Path, help="a folder of images; seeded noise without")
    parser.add_argument("--preprocessing", choices=[n for n, e in ZOO.items() if e.preprocessing], help="for --images")
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--batches", type=Path, nargs="+", help="folders of .npz, in place of --samples and --images")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cores", type=int, default=0, help="hold every child to so many; 0 leaves them all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(OURS))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    found = [measure_model(*each, options) for each in wanted(options)]
    for result in found:
        print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(found) + "\n")


def wanted(options: argparse.Namespace) -> list[tuple[str, Path, list[Path]]]:
    """What a model is called, its file, and folders of batches; none where samples are to be made."""
    if options.model:
        return [(options.model.name, options.model, options.batches or [])]
    names = options.models or sorted(path.parent.name for path in options.work.glob("*/fp32.onnx"))
    return [
        (name, options.work / name / "fp32.onnx", [options.work / name / f"memory{n}" for n in options.samples])
        for name in names
    ]


def measure_model(name: str, model: Path, batches: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """The rows of a model for each number of samples, or each folder of batches; printed as they come."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for of in batches or options.samples:
            if isinstance(of, Path):
                data, title = of.resolve(), of.name
            else:
                data = prepare(model, of, options.images, options.preprocessing, Path(folder) / str(of))
                title = f"{of} samples in batches of {options.batch}"
            rows = results[str(of)] = measure(model, data, options)
            print(f"\n{name}, {title}")
            for row in rows:
                label = f"{row['side']} {row['method']}"
                if "failed" in row:
                    print(f"  {label:26} failed: {row['failed']}")
                    continue
                outside = f"imports {row['imports']:.2f}"
                if row["side"] == "plain":
                    outside += f", load {row['load']:.3f}, first run {row['first_run']:.3f}"
                print(
                    f"  {label:26} {row['seconds']:>8.3f} s  {row['time_ratio']:>6.2f} x   "
                    f"{row['peak_mb']:>7.0f} MB  {row['memory_ratio']:>5.2f} x   {outside} s"
                )
    return {"benchmark": "calibration", "model": name, "batch": options.batch, "results": results}


if __name__ == "__main__":
    main()
