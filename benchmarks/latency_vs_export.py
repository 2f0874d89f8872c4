"""ResNet-50: our artifact against ONNX Runtime on the ONNX as torch.onnx.export hands it over.

    python benchmarks/latency_vs_export.py --artifact artifacts/resnet50 [--batch-sizes 1,8,32] [--json out.json]

The other side is what someone has who never met this toolchain: the same architecture through
``torch.onnx.export(dynamo=True)`` with its defaults (its own optimiser on), loaded by ONNX Runtime with default
options. Both run in one process, turn by turn; the ratio is the median over pairs of blocks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from toolchain import models
from toolchain.benchmark import Plan, Subject, compare_latency


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", default="artifacts/resnet50")
    parser.add_argument("--model", default="resnet50", help="zoo name that the artifact was built from")
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each batch size")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export.onnx"
        export_as_it_comes(options.model, path)
        plan = Plan(
            batch_sizes=tuple(int(b) for b in options.batch_sizes.split(",")),
            duration_s=options.seconds,
            count=10,
            warmup=3,
        )
        found = compare_latency(Subject(options.artifact), Subject(str(path)), plan)
    print(f"{options.model}: artifact (A) against ONNX Runtime on the export as it came (B), ms")
    print(f"{'batch':>5} {'A':>9} {'B':>9} {'A/B':>7}   80 % of blocks")
    for c in found:
        print(f"{c.batch:>5} {c.a_ms:>9.2f} {c.b_ms:>9.2f} {c.ratio:>7.3f}   {c.ratio_low:.3f} to {c.ratio_high:.3f}")
    result = {
        "benchmark": "latency_vs_export",
        "model": options.model,
        "rows": [{"batch": c.batch, "artifact_ms": c.a_ms, "export_ms": c.b_ms, "ratio": c.ratio} for c in found],
    }
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
