"""What zeros, low rank and shared values are worth: accuracy, compressed size, MACs and latency.

    python benchmarks/sparsity.py [--parts PART ...] [--quick] [--work DIR] [--json out.json]

pruning   CIFAR ResNet-20, 5,000 images: top-1 by sparsity and method, bytes of the weights under zstd (or lzma), and
          latency against the dense graph.
minilm    the same question on a transformer: Spearman on STS-B dev, magnitude against Wanda.
rank      low rank on MiniLM: accuracy and MACs, each layer by itself or all together, with and without moments.
rank-resnets  the same on CIFAR ResNet-20 and ResNet-56.
rank-latency  latency of low rank on MiniLM and on ResNet-50's shapes (random weights: nothing else means something);
          with --work and --seconds 0 first, the graphs are there already when it is measured.
codecs    k-means and powers of two: size of the file against the float file under zstd (or lzma), accuracy.
sparse    2:4 through tensorrt-rtx with SPARSE_WEIGHTS, where it is installed.

Latencies are ratios to the graph as it was, measured turn by turn in one process at batch 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from _quantization_models import CASES, prepare, score

import passes
import runtimes
from passes.factorize_low_rank import InputMoments
from passes.prune_weights import PruneWeights, fits_pattern
from runtimes import Target
from toolchain.candidates import turn_by_turn
from toolchain.codecs import compressed, decode, encode
from toolchain.judge import compiled_folder
from toolchain.layer_statistics import input_moments, input_norms
from toolchain.model_cost import cost_of
from toolchain.onnx_file import read_onnx, temporary_onnx, write_onnx

ROOT = Path(__file__).resolve().parent.parent
SPARSITIES = (0.5, 0.7, 0.9)
Row = dict[str, Any]
Feeds = dict[str, np.ndarray]


def read(folder: Path) -> list[Feeds]:
    """The batches of a folder, in order."""
    found = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            found.append({name: file[name] for name in file.files})
    return found


def weights_of(model: ir.Model) -> bytes:
    """The float weights, one after the other."""
    values = model.graph.initializers.values()
    tensors = [v.const_value for v in values if v.const_value is not None]
    return b"".join(t.tobytes() for t in tensors if t.dtype.is_floating_point())


class Bench:
    """One model, its samples, and what its float graph answers."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.folder = options.work / name
        if not (self.folder / "truth.npz").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            prepare(CASES[name], options.assets, self.folder, quick=options.quick)
        self.evaluation = read(self.folder / "evaluation")
        if not (self.folder / "float.answers.npz").exists():
            self._answer(self.model(), self.folder / "float.answers.npz")

    def model(self) -> ir.Model:
        """A fresh copy of the float graph."""
        return read_onnx(self.folder / "fp32.onnx")

    def calibration(self) -> list[Feeds]:
        return read(self.folder / "calibration")

    def moments(self) -> InputMoments:
        """Of the inputs of its layers, over the calibration samples."""
        path = self.folder / "moments.npz"
        if not path.exists():
            found = input_moments(self.model(), self.calibration()).moments
            np.savez(path, *found.values(), names=np.array(list(found)))
        with np.load(path) as file:
            return InputMoments({str(name): file[f"arr_{i}"] for i, name in enumerate(file["names"])})

    def scored(self, model: ir.Model) -> dict[str, float]:
        """See ``_quantization_models.score``."""
        path = self.folder / "candidate.answers.npz"
        self._answer(model, path)
        return score(self.folder, self.folder / "float.answers.npz", path)

    def _answer(self, model: ir.Model, path: Path) -> None:
        with temporary_onnx(model) as file, runtimes.load(file, target="ort-cpu") as session:
            first = session.outputs[0].name
            np.savez(path, *[session.run(feeds)[first] for feeds in self.evaluation])


def latency(model: ir.Model, dense: ir.Model, seconds: float) -> float:
    """Latency over that of the dense graph."""
    target = Target("ort-cpu")
    with compiled_folder(model, target) as a, compiled_folder(dense, target) as b:
        return turn_by_turn(a, b, seconds=seconds).ratio


def show(title: str, rows: Sequence[Row]) -> list[Row]:
    """Prints a table."""
    print(f"\n{title}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *[[_text(row.get(name)) for name in names] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print(
            "  "
            + "  ".join(
                cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )
    return list(rows)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) and abs(value) < 10 else (
        f"{value:.2f}" if isinstance(value, float) else str(value)
    )  # fmt: skip


def pruned(model: ir.Model, **options: Any) -> ir.Model:
    """The model, pruned."""
    PruneWeights(**options)(model)
    return model


def pruning(bench: Bench, sparsities: Iterable[float], timed: bool, options: argparse.Namespace) -> list[Row]:
    """Every method at every sparsity; latency of one, since where the zeros lie makes no difference."""
    started = time.perf_counter()
    norms = input_norms(bench.model(), bench.calibration())
    gathered = time.perf_counter() - started
    tool, before = compressed(weights_of(bench.model()))
    rows: list[Row] = [{"model": "dense", **bench.scored(bench.model()), f"{tool} MB": before / 1e6}]
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("random", {"method": "random"}),
        ("l1, by layer", {"method": "l1"}),
        ("l1, global", {"method": "l1", "scope": "global"}),
        ("l2, global (LAMP)", {}),
        ("Wanda, by channel", {"method": "wanda", "norms": norms}),
        ("Wanda, by layer", {"method": "wanda", "norms": norms, "scope": "layer"}),
        ("Wanda, global", {"method": "wanda", "norms": norms, "scope": "global"}),
    ]
    for sparsity in sparsities:
        for name, chosen in kinds:
            model = pruned(bench.model(), sparsity=sparsity, **chosen)
            row = {"model": f"{name}, {sparsity:.0%}", **bench.scored(model)}
            row[f"{tool} MB"] = compressed(weights_of(model))[1] / 1e6
            if timed and name == "l1, by layer":
                row["latency x"] = latency(model, bench.model(), options.seconds)
            rows.append(row)
    for name, chosen in (("magnitude", {}), ("Wanda", {"method": "wanda", "norms": norms})):
        for pattern in ("2:4", "4:8", "1:4"):
            model = pruned(bench.model(), pattern=pattern, **chosen)
            rows.append({"model": f"{name}, {pattern}", **bench.scored(model)})
            rows[-1][f"{tool} MB"] = compressed(weights_of(model))[1] / 1e6
    return show(f"pruning {bench.folder.name}; norms gathered in {gathered:.1f} s", rows)


def factorised(dense: Callable[[], ir.Model], **options: Any) -> tuple[ir.Model, Row]:
    """The model with factors, and how many layers were, and MACs over those before."""
    model = dense()
    before = cost_of(model).macs
    outcome = passes.make("factorize_low_rank", **options)(model)
    after = cost_of(model).macs
    return model, {"layers": getattr(outcome, "fired", 0), "MACs x": after / before}


#: what is compared of low rank: name, scope, and whether with moments
RANKS = (
    ("each, weights", "layer", False),
    ("each, moments", "layer", True),
    ("together, weights", "global", False),
    ("together, moments", "global", True),
)


def rank(bench: Bench, ratios: Sequence[float], options: argparse.Namespace) -> list[Row]:
    """Low rank: each layer at the ratio or all together, with and without what the layers read."""
    moments = bench.moments()
    answers = bench.folder / "float.answers.npz"
    rows: list[Row] = [{"model": "dense", **score(bench.folder, answers, answers)}]
    for ratio in options.ratios or ratios:
        for name, scope, with_moments in RANKS:
            model, row = factorised(bench.model, ratio=ratio, scope=scope, moments=moments if with_moments else None)
            rows.append({"model": f"{name}, {ratio}", **bench.scored(model), **row})
            print(json.dumps(rows[-1]), file=sys.stderr)
    return show(f"low rank, {bench.folder.name}", rows)


def rank_latency(bench: Bench, ratios: Sequence[float], options: argparse.Namespace) -> list[Row]:
    """Latency over MACs; weights alone, since what numbers the factors hold makes no difference."""
    rows = []
    for ratio in options.ratios or ratios:
        for name, scope, with_moments in RANKS:
            if with_moments:
                continue
            path = bench.folder / f"{scope}_{ratio}.onnx"
            started = time.perf_counter()
            if not path.exists():
                write_onnx(factorised(bench.model, ratio=ratio, scope=scope)[0], path)
            model = read_onnx(path)
            row: Row = {"model": f"{name}, {ratio}", "MACs x": cost_of(model).macs / cost_of(bench.model()).macs}
            row["seconds"] = time.perf_counter() - started
            if options.seconds:
                row["latency x"] = latency(model, bench.model(), options.seconds)
            rows.append(row)
    return show(f"latency of low rank, {bench.folder.name}", rows)


def codecs(bench: Bench, options: argparse.Namespace) -> list[Row]:
    """Sizes on the disk, and what the decoded model is worth."""
    file = bench.folder / "fp32.onnx"
    tool, baseline = compressed(file.read_bytes())
    rows: list[Row] = [{"model": "float file", "MB": file.stat().st_size / 1e6, **bench.scored(bench.model())}]
    rows.append({"model": tool, "MB": baseline / 1e6})
    kinds: list[tuple[str, str, int]] = [("k-means", "kmeans", n) for n in (256, 64, 32, 16, 8)]
    kinds += [("powers of two", "log", n) for n in (31, 15, 7)]
    for prune in (None, 0.5, 0.7):
        for name, codec, levels in kinds if prune is None else [("k-means", "kmeans", 32)]:
            model = bench.model()
            if prune is not None:
                pruned(model, sparsity=prune)
            path = bench.folder / "encoded"
            started = time.perf_counter()
            report = encode(model, path, codec=codec, levels=levels)  # type: ignore[arg-type]
            encoded = time.perf_counter() - started
            started = time.perf_counter()
            back = decode(path)
            row: Row = {"model": f"{name}, {levels}" + (f", {prune:.0%} pruned" if prune else "")}
            row |= {"MB": report.size / 1e6, f"x {tool}": report.size / baseline, **bench.scored(back)}
            ideal = sum(t.entropy_bytes for t in report.tensors)
            row["coder x entropy"] = sum(t.encoded_bytes for t in report.tensors) / ideal
            row |= {"encode s": encoded, "decode s": time.perf_counter() - started}
            rows.append(row)
    return show(f"codecs, {bench.folder.name}", rows)


def sparse(bench: Bench, options: argparse.Namespace) -> list[Row]:
    """2:4 through the builder of tensorrt-rtx; no GPU is needed to build."""
    if not importlib.util.find_spec("tensorrt_rtx"):
        print("\n2:4: tensorrt-rtx is not installed")
        return []
    import tensorrt_rtx as trt

    rows = []
    for name, model in (("dense", bench.model()), ("2:4", pruned(bench.model(), pattern="2:4"))):
        held = fits_pattern(model, "2:4")
        path = bench.folder / "trt.onnx"
        write_onnx(model, path)
        for flag in (False, True):
            logger = trt.Logger(trt.Logger.ERROR)
            builder = trt.Builder(logger)
            network = builder.create_network(0)
            parser = trt.OnnxParser(network, logger)
            config = builder.create_builder_config()
            config.num_compute_capabilities = 1
            config.set_compute_capability(trt.ComputeCapability.SM86, 0)
            profile = builder.create_optimization_profile()
            if not parser.parse(path.read_bytes()):
                raise SystemExit(str(parser.get_error(0)))
            for i in range(network.num_inputs):
                tensor = network.get_input(i)
                shape = [1 if d < 0 else d for d in tensor.shape]
                profile.set_shape(tensor.name, shape, shape, shape)
            config.add_optimization_profile(profile)
            if flag:
                config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
            started = time.perf_counter()
            engine = builder.build_serialized_network(network, config)
            rows.append(
                {
                    "model": f"{name}{', SPARSE_WEIGHTS' if flag else ''}",
                    "layers 2:4": f"{sum(held.values())} of {len(held)}",
                    "builds": "no" if engine is None else "yes",
                    "engine MB": None if engine is None else engine.nbytes / 1e6,
                    "seconds": time.perf_counter() - started,
                }
            )
    return show(f"2:4 with tensorrt-rtx {trt.__version__}, {bench.folder.name}, for SM86", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    assets = os.environ.get("ASSETS", ROOT.parent / "shared" / "assets")
    parts: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
        "pruning": lambda o: pruning(Bench("resnet20", o), SPARSITIES, True, o),
        "minilm": lambda o: pruning(Bench("minilm", o), SPARSITIES[:2], False, o),
        "rank": lambda o: rank(Bench("minilm", o), (0.9, 0.75, 0.5), o),
        "rank-resnets": lambda o: [r for n in ("resnet20", "resnet56") for r in rank(Bench(n, o), (0.75, 0.5), o)],
        "rank-latency": lambda o: [
            r
            for name, ratios in (("minilm", (0.9, 0.75, 0.5)), ("resnet50", (0.75, 0.5)))
            for r in rank_latency(Bench(name, o), ratios, o)
        ],
        "codecs": lambda o: codecs(Bench("resnet20", o), o) + codecs(Bench("efficientnet_lite0", o), o),
        "sparse": lambda o: sparse(Bench("resnet50", o), o),
    }
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--assets", type=Path, default=Path(assets))
    parser.add_argument("--work", type=Path, help="keep the models and samples here")
    parser.add_argument("--quick", action="store_true", help="few samples: to see that it works")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each comparison of latencies")
    parser.add_argument("--ratios", nargs="+", type=float, help="of low rank: these only")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        options.work = (options.work or Path(temporary)).resolve()
        options.assets = options.assets.resolve()
        result = {"benchmark": "sparsity", "quick": options.quick, **{p: parts[p](options) for p in options.parts}}
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
