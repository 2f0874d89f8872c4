"""What pruning adds to INT8: the same model in INT8, whole and cut, on the same images and turn by turn.

    python benchmarks/prune_and_quantize.py [--model efficientnet_lite0] [--target-macs 0.5] [--work FOLDER]

Accuracy is that of the artifacts on the target's kernels; nothing is trained. ``--work`` keeps the artifacts and the
cache, so that an interrupted run goes on, and so that ``--only latency`` can be run when the machine is quiet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toolchain.benchmark import Plan, Subject, compare_latency
from toolchain.build import build
from toolchain.cache import Cache
from toolchain.recipe import from_dict
from toolchain.report import BuildReport


def recipe_of(options: argparse.Namespace, folder: Path, *, cut: bool) -> dict[str, object]:
    """The recipe of one side."""
    data = options.assets / "imagenet"
    tree: dict[str, object] = {
        "model": options.model,
        "name": "cut" if cut else "whole",
        "output": str(folder / ("cut" if cut else "whole")),
        "precision": "int8",
        "data": {
            "calibration": str(data / "calibration50"),
            "calibration_limit": options.calibration,
            "evaluation": str(data / "val250"),
        },
        "benchmark": {"count": 5, "duration_s": 0.0},
    }
    return tree | ({"prune": {"target_macs": options.target_macs}} if cut else {})


def described(report: BuildReport) -> dict[str, object]:
    """What a side is, from its report."""
    (variant,) = report.variants
    assert variant.accuracy is not None
    found: dict[str, object] = {
        "int8": variant.accuracy.top1,
        "exported": variant.accuracy.reference_top1,
        "bytes": variant.size,
    }
    if report.prune is not None:
        found |= {
            "macs": report.prune.macs[1] / report.prune.macs[0],
            "parameters": report.prune.parameters[1] / report.prune.parameters[0],
            "drop_cut": report.prune.drop_cut,
            "drop_recovered": report.prune.drop,
        }
    return found


def main() -> int:
    assets = Path(os.environ.get("ASSETS", Path(__file__).resolve().parent.parent.parent / "shared" / "assets"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--target-macs", type=float, default=0.5)
    parser.add_argument("--calibration", type=int, default=50)
    parser.add_argument("--assets", type=Path, default=assets)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", choices=["build", "latency"])
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="toolchain-")))
        found: dict[str, object] = {"benchmark": "prune_and_quantize", "model": options.model}
        if options.only != "latency":
            for name, cut in (("whole", False), ("cut", True)):
                recipe = from_dict(recipe_of(options, folder, cut=cut), origin="benchmark")
                found[name] = described(build(recipe, cache=Cache(folder / "cache")).report)
                print(name, json.dumps(found[name]), flush=True)
        if options.only != "build":
            plan = Plan(batch_sizes=(1, 8), duration_s=options.seconds, count=50, warmup=10)
            for row in compare_latency(Subject(str(folder / "cut")), Subject(str(folder / "whole")), plan):
                found[f"ratio_batch_{row.batch}"] = row.ratio
                print(
                    f"batch {row.batch}: cut {row.a_ms:.3f} ms, whole {row.b_ms:.3f} ms, ratio {row.ratio:.3f} "
                    f"({row.ratio_low:.3f} to {row.ratio_high:.3f})"
                )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
