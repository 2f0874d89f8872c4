"""What prune_channels finds in real graphs, how long that takes, and that what is left computes what it should.

    python benchmarks/pruning_graphs.py [--models resnet50 vit_b_16] [--assets FOLDER] [--ratio 0.3] [--json o.json]

Each graph is cut as exported and again behind the default passes. "error" is the normalised squared error between the
cut graph and the whole one with the weights masked that read what was cut, on ONNX Runtime without optimisations;
"moved" is that between the cut graph and the whole one as it was, which shows that the first is not small for nothing.
The last row is the analysis of a chain of residual blocks of a thousand nodes. Weights of zoo models are random.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import passes
from passes._channel_cut import apply, masked
from passes._channel_groups import analyze
from passes._channel_scores import importance, plan
from passes.base import PassFailed
from passes.prune_channels import prepare
from toolchain.evaluate import run_reference
from toolchain.export import export_source
from toolchain.metrics import tensor_error
from toolchain.models import resolve
from toolchain.zoo import ZOO

#: real graphs and the sizes of their inputs where they leave them open
GRAPHS: dict[str, dict[str, tuple[int, ...]]] = {
    "cifar10-resnets/cifar_resnet20": {"input": (2, 3, 32, 32)},
    "cifar10-resnets/cifar_resnet56": {"input": (2, 3, 32, 32)},
    "mlperf-resnet8/mlperf_resnet8_float": {},
    "mlperf-resnet8/mlperf_resnet8_int8_qdq": {},
    "onnx-graphs/basic_pitch": {},
    "onnx-graphs/chars2vec_loop": {},
    "onnx-graphs/plcmos_v2_gru": {"degraded_audio": (1, 1, 48, 257), "rater_embed": (1, 64)},
    "onnx-graphs/rapidocr_cls": {"x": (1, 3, 48, 48)},
    "onnx-graphs/silero_vad": {"input": (1, 576), "state": (2, 1, 128)},
    "onnx-graphs/swift_f0_stft": {"input_audio": (1, 16000)},
}


def feeds(model: ir.Model, sizes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Seeded inputs; open sizes are 2 where ``sizes`` is silent."""
    rng = np.random.default_rng(0)
    result = {}
    for value in model.graph.inputs:
        if value.is_initializer() or value.shape is None or value.dtype is None:
            continue
        shape = sizes.get(str(value.name), tuple(n if isinstance(n, int) and n > 0 else 2 for n in value.shape))
        dtype = value.dtype.numpy()
        data = rng.integers(0, 2, shape) if dtype.kind in "iub" else rng.standard_normal(shape)
        result[str(value.name)] = np.asarray(data, dtype=dtype)
    return result


def parameters(model: ir.Model) -> int:
    """Numbers in initializers."""
    return sum(v.const_value.size for v in model.graph.initializers.values() if v.const_value is not None)


def measure(model: ir.Model, ratio: float, sizes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Cuts the model and compares it with its masked twin."""
    prepare(model)
    started = time.perf_counter()
    analysis = analyze(model)
    row: dict[str, Any] = {"nodes": len(model.graph), "seconds": time.perf_counter() - started}
    row |= {
        "groups": len(analysis.groups),
        "heads": sum(group.kind == "heads" for group in analysis.groups),
        "declined": [f"{each.node}: {each.reason}" for each in analysis.declined],
    }
    cut = plan(analysis.groups, importance(model, analysis.groups), ratio=ratio)
    if not cut.count:
        return row | {"parameters": 1.0}
    given = [feeds(model, sizes)]
    whole, before = run_reference(model, given), parameters(model)
    twin = run_reference(masked(model, cut), given)
    started = time.perf_counter()
    apply(model, cut)
    row["apply"] = time.perf_counter() - started
    after = run_reference(model, given)
    return row | {
        "parameters": parameters(model) / before,
        "error": _worst(twin, after),
        "moved": _worst(whole, after),
    }


def _worst(a: Any, b: Any) -> float:
    pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x]
    return max((tensor_error(x, y).nmse for x, y in pairs if x.dtype.kind == "f"), default=0.0)


def chain(blocks: int) -> ir.Model:
    """Residual blocks of convolution, normalisation and ReLU: ten nodes each, 256 channels."""
    lines, inputs = [], []
    for i in range(blocks):
        lines.append(f"c{i} = Conv (r{i}, w{i}) n{i} = BatchNormalization (c{i}, s, s, s, s) a{i} = Relu (n{i})")
        lines.append(f"d{i} = Conv <group = 256> (a{i}, g{i}) e{i} = Relu (d{i}) f{i} = Conv (e{i}, v{i})")
        lines.append(f"m{i} = GlobalAveragePool (f{i}) h{i} = Sigmoid (m{i}) k{i} = Mul (f{i}, h{i})")
        lines.append(f"r{i + 1} = Add (r{i}, k{i})")
        inputs += [f"float[256, 256, 1, 1] w{i}, float[256, 256, 1, 1] v{i}, float[256, 1, 1, 1] g{i}"]
    text = (
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[1, 3, 8, 8] x, float[256] s, float[256, 3, 1, 1] stem, '
        f"float[9, 256, 1, 1] head, {', '.join(inputs)}) => (float[1, 9, 8, 8] y) "
        f"{{ r0 = Conv (x, stem) {' '.join(lines)} y = Conv (r{blocks}, head) }}"
    )
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs)[1:]:
        assert value.shape is not None
        data = np.ones([int(n) for n in value.shape.numpy()], np.float32)
        value.const_value = ir.Tensor(data, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def sources(names: list[str], assets: Path) -> Iterator[tuple[str, ir.Model, dict[str, tuple[int, ...]]]]:
    """The models of the zoo and the graphs that are there."""
    for name in names:
        model = export_source(resolve(name), weights="random").model
        sizes = {
            str(v.name): (1, *(n if isinstance(n, int) else 9 for n in list(v.shape)[1:]))
            for v in model.graph.inputs
            if v.shape is not None
        }
        yield name, model, sizes
    for name, sizes in GRAPHS.items():
        if (path := assets / "models" / f"{name}.onnx").is_file():
            yield name.rpartition("/")[2], ir.load(path), sizes


def optimised(model: ir.Model) -> ir.Model:
    """A copy behind the default passes."""
    copy = ir.from_proto(ir.to_proto(model))
    for name in passes.DEFAULT_PIPELINE:
        passes.make(name)(copy)
    return copy


def line(row: Mapping[str, Any]) -> str:
    """What ``measure`` found, behind a graph's name."""
    proof = f"{row['error']:9.1e}{row['moved']:9.1e}" if "error" in row else f"  {'; '.join(row['declined'])[:90]}"
    counts = f"{row['groups']:>7}{row['heads']:>6}{len(row['declined']):>5}{row['parameters']:>11.3f}"
    return f"{row['nodes']:>5}{row['seconds']:>8.3f} s{counts}{proof}"


def concluded(name: str, ratio: float, rows: Sequence[Mapping[str, Any]], path: Path | None) -> int:
    """Prints the line of JSON, and writes it to a path. 1 where a cut graph is not the whole one masked."""
    text = json.dumps({"benchmark": name, "ratio": ratio, "rows": rows})
    if path is not None:
        path.write_text(text)
    print(text)
    return 0 if all(row.get("error", 0.0) <= 1e-10 for row in rows) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(ZOO))
    parser.add_argument("--assets", type=Path, default=Path(__file__).resolve().parent.parent.parent / "shared/assets")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{'graph':<28}{'form':<10}nodes  analysis groups heads kept parameters    error    moved")
    rows = []
    for name, model, sizes in sources(options.models, options.assets):
        for form, each in (("optimised", optimised(model)), ("exported", model)):
            try:
                row = measure(each, options.ratio, sizes)
            except PassFailed as error:
                print(f"{name:<28}{form:<10}{error}")
                continue
            rows.append({"graph": name, "form": form, **row})
            print(f"{name:<28}{form:<10}{line(row)}", flush=True)
    model = chain(100)
    prepare(model)
    started = time.perf_counter()
    groups = analyze(model).groups
    seconds = time.perf_counter() - started
    print(f"{'a chain of 100 blocks':<38}{len(model.graph):>5}{seconds:>8.3f} s{len(groups):>7}")
    rows.append({"graph": "chain", "nodes": len(model.graph), "seconds": seconds, "groups": len(groups)})
    return concluded("pruning_graphs", options.ratio, rows, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
