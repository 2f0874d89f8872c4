"""What cross-compiling costs: time to an engine and its size, per GPU and precision, without a GPU.

    python benchmarks/cross_compile.py [--models resnet50 efficientnet_lite0] [--targets tensorrt-rtx:sm86 ...]
                                       [--rounds 5] [--graphs FOLDER] [--json out.json]

Weights and ranges are drawn: neither time nor size depends on them. Every round builds each engine once, one after the
other, so that what disturbs the machine disturbs all; the first round is not counted. "raw" is TensorRT's own parser
and builder in the same process on the same file, with the same profile: "x raw" is our compile, with its checks,
copies and digests, over that, the median of the ratios within a round. Size is against float32 for the same GPU.

``--graphs FOLDER`` keeps the exported graphs there and takes those that it finds: with it, and with ``--rounds 0``
first, a measurement holds nothing but builds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir

import passes
import runtimes
from passes._quant import Calibration, TensorRange
from runtimes._tensorrt_options import DEFAULT_BATCH, DEFAULT_SIZE
from toolchain import models
from toolchain.export import export_source
from toolchain.lower import lower_by_pass, lower_int8

TARGETS = ("tensorrt-rtx:sm86", "tensorrt-rtx:sm89", "tensorrt-rtx:sm120", "tensorrt-rtx:sm86,sm89", "tensorrt-rtx")
PRECISIONS = ("fp32", "fp16", "int8")


def write_graphs(name: str, folder: Path) -> dict[str, Path]:
    """The graphs that the toolchain makes of a model for TensorRT, precision -> file; those that are there are kept."""
    files = {precision: folder / f"{name}-{precision}.onnx" for precision in PRECISIONS}
    if all(file.is_file() for file in files.values()):
        return files
    graph = export_source(models.resolve(name), weights="random").model
    for step in passes.DEFAULT_PIPELINE:
        passes.make(step)(graph)
    values = [*graph.graph.inputs, *(output for node in graph.graph for output in node.outputs)]
    ranges = {value.name: TensorRange(-1.0, 1.0, 1.0, -1.0, 1.0, "minmax") for value in values if value.name}
    calibration = Calibration(graph="", samples=1, ranges=ranges)
    target = runtimes.Target("tensorrt-rtx")
    graphs = {
        "fp32": graph,
        "fp16": lower_by_pass(graph, "fp16")[0],
        "int8": lower_int8(graph, target, calibration)[0],
    }
    for precision, file in files.items():
        ir.save(graphs[precision], file)
    return files


def build_raw(trt: Any, model: Path, target: str) -> float:
    """Seconds that TensorRT itself takes, from the file to the serialised engine."""
    started = time.perf_counter()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        raise SystemExit(f"{model}: TensorRT does not parse it")
    config = builder.create_builder_config()
    device = runtimes.Target.parse(target).device
    names = device.split(",") if device else []
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        columns = [
            (size,) * 3 if size >= 0 else (DEFAULT_SIZE if axis else DEFAULT_BATCH)
            for axis, size in enumerate(tensor.shape)
        ]
        profile.set_shape(tensor.name, *(tuple(column[which] for column in columns) for which in range(3)))
    config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        raise SystemExit(f"{model}: TensorRT does not build it")
    return time.perf_counter() - started


def build_ours(model: Path, target: str, folder: Path) -> tuple[float, int]:
    """Seconds that our compile takes, and the bytes of the engine."""
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    compiled = runtimes.compile(model, target, folder)
    return time.perf_counter() - started, int(compiled.fingerprint["plan_size"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "efficientnet_lite0"])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--graphs", type=Path, metavar="FOLDER", help="where the exported graphs are, or go")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.graphs:
        options.graphs.mkdir(parents=True, exist_ok=True)
    trt = importlib.import_module("tensorrt_rtx")
    rows: list[dict[str, Any]] = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            files = write_graphs(name, options.graphs or folder)
            cases = [(target, precision) for target in options.targets for precision in PRECISIONS]
            seconds: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
            ratios: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
            sizes: dict[tuple[str, str], int] = {}
            if not options.rounds:
                continue
            for number in range(options.rounds + 1):
                for case in cases:
                    target, precision = case
                    raw = build_raw(trt, files[precision], target)
                    ours, sizes[case] = build_ours(files[precision], target, folder / "engine")
                    if number:
                        seconds[case].append(ours)
                        ratios[case].append(ours / raw)
            rows += [
                {
                    "model": name,
                    "target": target,
                    "precision": precision,
                    "seconds": statistics.median(seconds[target, precision]),
                    "fastest": min(seconds[target, precision]),
                    "over_raw": statistics.median(ratios[target, precision]),
                    "bytes": sizes[target, precision],
                    "size_over_fp32": sizes[target, precision] / sizes[target, "fp32"],
                }
                for target, precision in cases
            ]
    print(f"tensorrt_rtx {trt.__version__}, {options.rounds} rounds")
    print(f"{'model':<20}{'target':<26}{'precision':<10}{'seconds':>9}{'fastest':>9}{'x raw':>7}{'MB':>9}{'x fp32':>8}")
    for row in rows:
        print(
            f"{row['model']:<20}{row['target']:<26}{row['precision']:<10}{row['seconds']:>9.2f}{row['fastest']:>9.2f}"
            f"{row['over_raw']:>7.2f}{row['bytes'] / 1e6:>9.1f}{row['size_over_fp32']:>8.2f}"
        )
    result = {
        "benchmark": "cross_compile",
        "tensorrt_rtx": str(trt.__version__),
        "rounds": options.rounds,
        "rows": rows,
    }
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
