"""Is the ranking of layers by one forward pass the exact one, and what does the budget search cost with it?

The exact way quantises each layer alone and runs the whole model, once for each; ``toolchain/sensitivity.py`` runs all
of them on the float model's activations at once. Printed for each model: Spearman's rank correlation of the two, how
much of the exact worst tenth and quarter is in the worst of the ranking, the time of either, and how many evaluations
the search took for a budget of a half, a fifth and a twentieth of what is lost with everything quantised.

    python benchmarks/sensitivity.py --assets ../shared/assets
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from _quantization_models import CASES, prepare, spearman

from passes.quantize_int8 import quantizable
from runtimes import Target
from toolchain.budget import search
from toolchain.calibration import calibrate
from toolchain.data import Batch
from toolchain.errors import GraphError
from toolchain.evaluate import Feeds, reference_session
from toolchain.judge import Judge, candidate_session
from toolchain.lower import dialect_of, lower_int8
from toolchain.machine import cpu_model
from toolchain.sensitivity import layer_sensitivities

CPU = Target("ort-cpu")
#: Shares of the full loss that the search is asked to stay below.
_BUDGETS = (0.5, 0.2, 0.05)
_SAMPLES = 4
#: Samples that the exact way runs on: with few of them the error of ten logits is a matter of luck.
_TRUTH = 32
_MODELS = ("efficientnet_lite0", "resnet20", "minilm")


def _read(folder: Path, count: int) -> list[Feeds]:
    """The first samples, one at a time."""
    found: list[Feeds] = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        found += [{n: a[i : i + 1] for n, a in arrays.items()} for i in range(len(next(iter(arrays.values()))))]
        if len(found) >= count:
            break
    return found[:count]


def _batches(samples: Sequence[Feeds]) -> list[Batch]:
    """Neighbours of one shape together."""
    found: list[list[Feeds]] = []
    for feeds in samples:
        same = found and all(found[-1][0][n].shape == a.shape for n, a in feeds.items())
        found[-1].append(feeds) if same else found.append([feeds])
    return [Batch({n: np.concatenate([f[n] for f in group]) for n in group[0]}, None) for group in found]


def measure(name: str, assets: Path, *, quick: bool) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(CASES[name], assets, Path(folder), quick=quick)
        model = ir.load(Path(folder) / "fp32.onnx")
        data = _read(Path(folder) / "calibration", 16 if quick else 64)
        calibration = calibrate(model, data)
        samples = data[:_SAMPLES]
        with reference_session(model) as session:
            judge = Judge(session, _batches(data[:_TRUTH]), metric="nmse")
        nodes = quantizable(model, dialect_of(CPU))

        def drop(exclude: Sequence[str]) -> float:
            made, _ = lower_int8(model, CPU, calibration, exclude=tuple(exclude))
            with candidate_session(made, CPU) as candidate:
                return judge.drop(candidate)

        def drop_or_all(exclude: Sequence[str]) -> float:
            try:
                return drop(exclude)
            except GraphError:  # nothing is left in INT8
                return math.inf

        started = time.perf_counter()
        ranked = layer_sensitivities(model, lower_int8(model, CPU, calibration)[0], nodes, samples)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        exact: dict[str, float] = {}
        for layer in ranked:
            try:
                exact[layer.node] = drop([node for node in nodes if node != layer.node])
            except GraphError:  # alone it is not quantised: a pooling, an activation
                continue
        exact_seconds = time.perf_counter() - started
        order = [layer.node for layer in ranked if layer.node in exact]
        own = np.array([layer.rank for layer in ranked if layer.node in exact])
        full = drop(())
        searches = {}
        for share in _BUDGETS:
            found = search([layer.node for layer in ranked], drop_or_all, share * full)
            searches[str(share)] = {"evaluations": len(found.trials), "returned": len(found.excluded), "met": found.met}
        return {
            "model": name,
            "layers": len(order),
            "spearman": spearman(own, np.array([exact[node] for node in order])),
            "worst_tenth": _overlap(order, exact, 0.1),
            "worst_quarter": _overlap(order, exact, 0.25),
            "seconds": seconds,
            "exact_seconds": exact_seconds,
            "full_drop": full,
            "searches": searches,
        }


def _overlap(order: Sequence[str], exact: dict[str, float], share: float) -> float:
    """How much of the exact worst is among as many of the ranking's worst."""
    count = max(1, round(share * len(order)))
    worst = sorted(exact, key=lambda node: -exact[node])[:count]
    return len(set(worst) & set(order[:count])) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder of real weights and images")
    parser.add_argument(
        "--models", nargs="+", choices=list(CASES), default=["efficientnet_lite0", "resnet20", "minilm"]
    )
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    options = parser.parse_args()
    rows = [measure(name, options.assets, quick=options.quick) for name in options.models]
    print(f"{'model':20} layers  rank corr.  worst 10 %  25 %   one pass  one each   evaluations, layers returned for")
    print(f"{'':64}" + "   " + "  ".join(f"{share:g} of the loss" for share in _BUDGETS))
    for row in rows:
        tried = "  ".join(f"{s['evaluations']:6}, {s['returned']:3}{' ' * 5}" for s in row["searches"].values())
        print(
            f"{row['model']:20} {row['layers']:6}  {row['spearman']:10.3f}  {row['worst_tenth']:10.0%}"
            f"  {row['worst_quarter']:4.0%}  {row['seconds']:7.2f} s {row['exact_seconds']:7.1f} s  {tried}"
        )
    print(json.dumps({"benchmark": "sensitivity", "cpu": cpu_model(), "samples": [_SAMPLES, _TRUTH], "rows": rows}))


if __name__ == "__main__":
    main()
