"""openvino-cpu and ort-cpu, through us and through their own API.

    python benchmarks/openvino_latency.py [--models resnet50,efficientnet_lite0] [--batch-sizes 1,8] [--seconds 10]

For each model, precision and batch size six sides run in one process, in an order that is drawn anew every round:
each runtime's own API, a second copy of that (what the two differ by is noise, and nothing below that is a
difference), and our session, all from the same file with the same settings. ONNX Runtime's idle threads do not spin,
or they would slow the other side down. Reported are the median of each runtime's own times, and medians over
rounds, with quartiles, of the ratios: the copy to the original, ours to the original, OpenVINO to ONNX Runtime.

FP32 is the graph that the toolchain optimised. INT8 is that graph quantised for each runtime in its own dialect, and
once more with ONNX Runtime's dialect on both; the ranges are those of seeded inputs, since speed depends on none.
The last row is a graph of one node: what a call costs by itself.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino

import runtimes
from passes.quantize_int8 import QuantizeInt8
from runtimes.testing import save_model
from toolchain import models
from toolchain.calibration import calibrate
from toolchain.evaluate import input_specs
from toolchain.export import export_source
from toolchain.onnx_file import write_onnx
from toolchain.optimize import optimize
from toolchain.recipe import Recipe
from toolchain.seeded import seeded_inputs

#: precision -> the file for ONNX Runtime, the file for OpenVINO
VARIANTS = {
    "fp32": ("fp32", "fp32"),
    "int8": ("int8-ort-cpu", "int8-openvino"),
    "int8, ORT's dialect": ("int8-ort-cpu", "int8-ort-cpu"),
}
#: what ``openvino-cpu`` asks OpenVINO for by default
CONFIG = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}

Call = Callable[[], object]


def prepare(name: str, folder: Path) -> None:
    """Writes ``fp32.onnx``, ``int8-ort-cpu.onnx`` and ``int8-openvino.onnx``."""
    exported = export_source(models.resolve(name))
    optimize(exported.model, Recipe(model=name).pipeline())
    write_onnx(exported.model, folder / "fp32.onnx")
    samples = [seeded_inputs(input_specs(exported.model), batch=4, seed=seed) for seed in range(4)]
    calibration = calibrate(exported.model, samples)
    for dialect in ("ort-cpu", "openvino"):
        model = exported.model.clone()
        QuantizeInt8(dialect=dialect, calibration=calibration)(model)
        write_onnx(model, folder / f"int8-{dialect}.onnx")


def sides(ort_file: Path, openvino_file: Path, feeds: dict[str, np.ndarray]) -> dict[str, Call]:
    """Name of a side -> one call of it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    ort = [onnxruntime.InferenceSession(ort_file, options, providers=["CPUExecutionProvider"]) for _ in range(2)]
    core = openvino.Core()
    vino = [core.compile_model(str(openvino_file), "CPU", CONFIG) for _ in range(2)]
    our_ort = runtimes.load(ort_file, options={"spinning": False})
    our_vino = runtimes.load(openvino_file, target="openvino-cpu")
    return {
        "ort": lambda: ort[0].run(None, feeds),
        "ort again": lambda: ort[1].run(None, feeds),
        "ort ours": lambda: our_ort.run(feeds),
        "openvino": lambda: vino[0](feeds),
        "openvino again": lambda: vino[1](feeds),
        "openvino ours": lambda: our_vino.run(feeds),
    }


def measure(calls: dict[str, Call], *, seconds: float, repeat: int = 1) -> dict[str, Any]:
    """Times in ms of one call, and ratios as [median, lower quartile, upper quartile]."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(max(repeat, 3)):
            call()
    order, generator = list(calls), random.Random(0)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(taken["ort"]) < 10:
        generator.shuffle(order)
        for name in order:
            started = time.perf_counter()
            for _ in range(repeat):
                calls[name]()
            taken[name].append((time.perf_counter() - started) * 1e3 / repeat)
    times = {name: np.array(values) for name, values in taken.items()}

    def ratio(of: str, to: str) -> list[float]:
        return [round(float(q), 4) for q in np.percentile(times[of] / times[to], [50, 25, 75])]

    copies = [(name, f"{name} {side}") for name in ("ort", "openvino") for side in ("again", "ours")]
    return {
        "rounds": len(times["ort"]),
        "ms": {name: round(float(np.median(values)), 4) for name, values in times.items()},
        **{copy: ratio(copy, name) for name, copy in copies},
        "openvino to ort": ratio("openvino ours", "ort ours"),
    }


def show(title: str, found: dict[str, Any]) -> None:
    """One line a runtime."""
    for name in ("ort", "openvino"):
        shown = [f"{found['ms'][name]:9.3f}"]
        for key in (f"{name} again", f"{name} ours", *(["openvino to ort"] if name == "openvino" else [])):
            middle, low, high = found[key]
            shown.append(f"{middle:6.3f} [{low:.3f}, {high:.3f}]")
        print(f"{title if name == 'ort' else '':<44} {name:<9} {'  '.join(shown)}", flush=True)


def rows(names: list[str], batches: list[int], seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for name in names:
            prepare(name, folder)
            for precision, files in VARIANTS.items():
                ort_file, openvino_file = (folder / f"{file}.onnx" for file in files)
                for batch in batches:
                    with runtimes.load(ort_file) as session:
                        feeds = seeded_inputs(session.inputs, batch=batch)
                    found = measure(sides(ort_file, openvino_file, feeds), seconds=seconds)
                    yield (
                        f"{name}, {precision}, batch {batch}",
                        {"model": name, "precision": precision, "batch": batch, **found},
                    )
        file = save_model(folder / "one.onnx", "g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
        calls = sides(file, file, {"x": np.ones((1, 4), "float32")})
        yield "one node", {"model": "one node", **measure(calls, seconds=seconds / 2, repeat=200)}


def main() -> int:
    """Measures, prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet50,efficientnet_lite0")
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    print(f"{'':<44} {'':<9} {'raw ms':>9}  {'copy/raw':<22}  {'ours/raw':<22}  openvino/ort, ours")
    kept = []
    batches = [int(text) for text in options.batch_sizes.split(",")]
    for title, found in rows(options.models.split(","), batches, options.seconds):
        show(title, found)
        kept.append(found)
    versions = {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__.split("-")[0]}
    result = json.dumps({"benchmark": "openvino_latency", **versions, "rows": kept})
    print(result)
    if options.json:
        options.json.write_text(result + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
