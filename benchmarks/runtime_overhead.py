"""What our session costs over ONNX Runtime itself: run, bind, and import.

    python benchmarks/runtime_overhead.py [--model resnet50.onnx] [--json out.json]

Both sides run the same model in one process, in alternating blocks (A B A B ...), so that a machine that speeds
up or slows down does it to both. Reported is the median over all blocks of the time of one call, and the median
of the differences of neighbouring blocks with their quartiles. The raw side is the public API: ``session.run(None,
feeds)`` and ``session.run_with_iobinding(binding)``. Import times are whole child processes, alternating too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

import runtimes

ROOT = Path(__file__).resolve().parent.parent


def block(call: Callable[[], object], calls: int) -> float:
    """Seconds per call."""
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls


def compare(
    name: str, raw: Callable[[], object], ours: Callable[[], object], *, calls: int, blocks: int
) -> dict[str, Any]:
    """Alternating blocks of both; times in microseconds."""
    for call in (raw, ours):
        block(call, max(calls // 2, 2))
    pairs = [(block(raw, calls) * 1e6, block(ours, calls) * 1e6) for _ in range(blocks)]
    differences = [b - a for a, b in pairs]
    low, middle, high = statistics.quantiles(differences, n=4)
    return {
        "what": name,
        "raw_us": round(statistics.median(a for a, _ in pairs), 3),
        "ours_us": round(statistics.median(b for _, b in pairs), 3),
        "difference_us": round(middle, 3),
        "quartiles_us": [round(low, 3), round(high, 3)],
    }


def measure(label: str, file: Path, feeds: dict[str, np.ndarray], *, calls: int, blocks: int) -> list[dict[str, Any]]:
    """Run and bind of one model."""
    # Idle threads of the one side must not spin while the other is measured.
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    raw = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    ours = runtimes.load(file, options={"spinning": False})
    binding = ours.bind({name: array.shape for name, array in feeds.items()})
    for name, array in feeds.items():
        binding.inputs[name][...] = array
    io = raw.io_binding()
    kept = []
    for name, array in feeds.items():
        kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
        io.bind_ortvalue_input(name, kept[-1])
    for name, array in binding.outputs.items():
        kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.empty_like(array)))
        io.bind_ortvalue_output(name, kept[-1])
    return [
        compare(f"run, {label}", lambda: raw.run(None, feeds), lambda: ours.run(feeds), calls=calls, blocks=blocks),
        compare(f"bind, {label}", lambda: raw.run_with_iobinding(io), binding.run, calls=calls, blocks=blocks),
    ]


def imports(rounds: int) -> dict[str, Any]:
    """Seconds of a child process that imports; the interpreter's start counts on both sides."""
    codes = ("import numpy, onnxruntime", "import runtimes")

    def child(code: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        return time.perf_counter() - started

    for code in codes:
        child(code)
    pairs = [(child(codes[0]), child(codes[1])) for _ in range(rounds)]
    ratios = [b / a for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "what": "import",
        "raw_ms": round(statistics.median(a for a, _ in pairs) * 1e3, 1),
        "ours_ms": round(statistics.median(b for _, b in pairs) * 1e3, 1),
        "ratio": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
    }


def main() -> None:
    """Measures, prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an ONNX file with one float32 image input, such as ResNet-50")
    parser.add_argument("--blocks", type=int, default=200, help="blocks of each side")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "one_node.onnx"
        onnx.save(
            onnx.parser.parse_model(
                '<ir_version: 9, opset_import: ["": 19]> g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }'
            ),
            file,
        )
        feeds = {"x": np.ones((1, 4), "float32")}
        rows += measure("one node", file, feeds, calls=1000, blocks=arguments.blocks)
    if arguments.model:
        with runtimes.load(arguments.model) as session:
            (spec,) = session.inputs
        shape = [size if isinstance(size, int) else 1 for size in spec.shape or ()]
        feeds = {spec.name: np.random.default_rng(0).standard_normal(shape).astype(spec.dtype)}
        rows += measure(arguments.model.stem, arguments.model, feeds, calls=3, blocks=max(arguments.blocks // 4, 10))
    for row in rows:
        low, high = row["quartiles_us"]
        print(
            f"{row['what']:24} raw {row['raw_us']:>10.2f} us   ours {row['ours_us']:>10.2f} us   "
            f"difference {row['difference_us']:>+8.2f} us  [{low:+.2f}, {high:+.2f}]"
        )
    imported = imports(20)
    low, high = imported["quartiles"]
    print(
        f"{'import':24} raw {imported['raw_ms']:>10.1f} ms   ours {imported['ours_ms']:>10.1f} ms   "
        f"ratio {imported['ratio']:>13.2f}     [{low:.2f}, {high:.2f}]"
    )
    result = json.dumps(
        {"benchmark": "runtime_overhead", "onnxruntime": onnxruntime.__version__, "rows": [*rows, imported]}
    )
    print(result)
    if arguments.json:
        arguments.json.write_text(result + "\n")


if __name__ == "__main__":
    main()
