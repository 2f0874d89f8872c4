"""ResNet-50: our artifact against ONNX Runtime on the ONNX as torch.onnx.export hands it over.

    python benchmarks/latency_vs_export.py --artifact artifacts/resnet50 [--batch-sizes 1,8,32] [--json out.json]

The other side is what someone has who never met this toolchain: the same architecture through
``torch.onnx.export(dynamo=True)`` with its defaults (its own optimiser on), loaded by ONNX Runtime with default
options. It is loaded twice: what the two copies differ by is noise, and nothing below that is a difference. All
three run in one process, in an order that is drawn anew every round; the ratios are medians over rounds, of CPU
time with one thread and of wall time with two.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

import runtimes
from toolchain import models
from toolchain.seeded import seeded_inputs


def export_as_it_comes(name: str, path: Path) -> None:
    """Writes torch's own export, untouched."""
    import torch

    model = models.load_torch(models.resolve(name), weights="auto")
    program = torch.onnx.export(
        model.module,
        (),
        kwargs=dict(model.example_inputs) if not model.positional else None,
        input_names=list(model.input_names),
        output_names=list(model.output_names or ()),
        dynamic_shapes={n: {a: torch.export.Dim(s) for a, s in axes.items()} for n, axes in model.dynamic_axes.items()},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(path)


def measure(
    artifact: str, export: Path, *, batch: int, threads: int, seconds: float
) -> dict[str, tuple[float, float, float, float]]:
    """For each side: median ms, then its ratio to the export: median, lower and upper quartile."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    copies = [onnxruntime.InferenceSession(export, options) for _ in range(2)]
    ours = runtimes.load(artifact, options={"intra_op_threads": threads})
    feeds = seeded_inputs(ours.inputs, batch=batch)
    sides: dict[str, Callable[[], object]] = {
        "export": lambda: copies[0].run(None, feeds),
        "export again": lambda: copies[1].run(None, feeds),
        "artifact": lambda: ours.run(feeds),
    }
    clock = time.process_time if threads == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
        run()
    order, generator = list(sides), random.Random(0)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(taken["export"]) < 10:
        generator.shuffle(order)
        for name in order:
            started = clock()
            sides[name]()
            taken[name].append((clock() - started) * 1e3)
    found = {}
    for name, times in taken.items():
        low, middle, high = np.percentile(np.array(times) / np.array(taken["export"]), [25, 50, 75])
        found[name] = (float(np.median(times)), float(middle), float(low), float(high))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", default="artifacts/resnet50")
    parser.add_argument("--model", default="resnet50", help="zoo name that the artifact was built from")
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each row")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print(f"{options.model}, ms and ratio to the export as it came (median, quartiles)")
    print(f"{'threads':>7} {'batch':>5} {'side':<13} {'ms':>9} {'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export.onnx"
        export_as_it_comes(options.model, path)
        for threads in (1, 2):
            for batch in (int(text) for text in options.batch_sizes.split(",")):
                found = measure(options.artifact, path, batch=batch, threads=threads, seconds=options.seconds)
                for side, (ms, ratio, low, high) in found.items():
                    print(
                        f"{threads:>7} {batch:>5} {side:<13} {ms:>9.2f} {ratio:>7.3f}   [{low:.3f}, {high:.3f}]",
                        flush=True,
                    )
                    rows.append({"threads": threads, "batch": batch, "side": side, "ms": ms, "ratio": ratio})
    result = {"benchmark": "latency_vs_export", "model": options.model, "rows": rows}
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
