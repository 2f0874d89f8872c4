"""Latency on an NVIDIA GPU: ORT CUDA through us against raw, TensorRT and TensorRT-RTX against ORT CUDA.

    python benchmarks/gpu.py [FILE.onnx ...] [--targets ort-cuda,tensorrt,tensorrt-rtx] [--batch-sizes 1,32]
                             [--seconds 5] [--prepare FOLDER]

Files are float32, float16 or INT8 (TensorRT's dialect) graphs with one image-like input; with none, a small
convolutional network is made in all three precisions. ``--prepare FOLDER`` needs no GPU: it writes the files of
ResNet-50 and EfficientNet-Lite0, to be carried to a machine that has a GPU and little else. ``--targets ort-cpu`` needs
none either: it tries the loop, and its numbers are those of a processor.

All sides of one row run in one process, in an order that is drawn anew every round; each runs a few times in its turn,
so that clocks and neighbours disturb all alike. Sides::

    raw            onnxruntime itself, numpy in and out
    raw-device     onnxruntime itself, IO binding on device memory: nothing is copied
    host           our session, numpy in and out
    bind           our session, page-locked arrays
    device         our session, from an array on the GPU to one on the GPU
    graph          ``bind`` with a recorded CUDA graph
    kernels        TensorRT alone: from CUDA events around the enqueued engine, as ``trtexec`` reports GPU time

Reported are p50 and p99 in milliseconds; p99 from 662 samples on (MLPerf's rule), else "-". "to raw" is the median
over that of onnxruntime itself, numpy in and out, which is measured where its target is. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import runtimes
from runtimes import _cuda
from runtimes._driver import driver
from runtimes.model_file import check_model_file

TARGETS = ("ort-cuda", "tensorrt", "tensorrt-rtx")
#: runs in one turn of a side
_TURN = 20
#: samples that a 99th percentile takes
_P99 = 662

#: One run; returns its milliseconds.
Timed = Callable[[], float]


def timed(call: Callable[[], object]) -> Timed:
    """Times a call that returns when its result is there."""

    def run() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    return run


@dataclasses.dataclass(frozen=True)
class Subject:
    """One model with the inputs of one batch size."""

    file: Path
    batch: int
    feeds: dict[str, np.ndarray]
    profile: dict[str, list[int]]


def subject(file: Path, batch: int, largest: int) -> Subject:
    """Seeded inputs for a model; its first open size is the batch, others are 1."""
    with runtimes.load(file) as session:
        specs = session.inputs
    rng = np.random.default_rng(0)
    feeds = {}
    for spec in specs:
        shape = [
            size if isinstance(size, int) else batch if axis == 0 else 1 for axis, size in enumerate(spec.shape or ())
        ]
        feeds[spec.name] = np.asarray(rng.normal(0, 1, shape)).astype(spec.dtype)
    declared = check_model_file(file).shapes
    names = {
        (dim, axis) for spec in specs for axis, dim in enumerate(declared[spec.name] or ()) if isinstance(dim, str)
    }
    return Subject(file, batch, feeds, {dim: [1, batch, largest] if axis == 0 else [1, 1, 1] for dim, axis in names})


def on_device(feeds: dict[str, np.ndarray]) -> dict[str, Any]:
    """The feeds as arrays on the GPU."""
    from runtimes._device_array import DeviceArray

    gpu = _cuda.device(0)
    placed = {}
    for name, array in feeds.items():
        memory, staging, stream = gpu.allocate(array.nbytes), gpu.page_locked(array.nbytes), gpu.stream()
        staging[...] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        with gpu:
            stream.upload(memory.address, staging)
            stream.synchronize()
        placed[name] = DeviceArray(memory.address, array.shape, array.dtype, 0, memory)
    return placed


def raw_sides(case: Subject, target: str) -> Iterator[tuple[str, Timed]]:
    """onnxruntime without us, with the same provider options."""
    import onnxruntime

    from runtimes import ort_cuda

    if target == "ort-cpu":
        session = onnxruntime.InferenceSession(str(case.file), providers=["CPUExecutionProvider"])
        yield "raw", timed(lambda: session.run(None, case.feeds))
        return
    if reason := ort_cuda.library_missing("cuda"):
        raise runtimes.TargetUnavailable(reason)
    session = onnxruntime.InferenceSession(
        str(case.file), providers=ort_cuda.provider_options(ort_cuda.OrtCudaOptions(), 0)
    )
    yield "raw", timed(lambda: session.run(None, case.feeds))
    binding = session.io_binding()
    placed = on_device(case.feeds)
    for name, array in placed.items():
        binding.bind_input(name, "cuda", 0, array.dtype, array.shape, array.address)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda", 0)

    def run() -> object:
        session.run_with_iobinding(binding)
        return placed  # which has to live as long as the binding

    yield "raw-device", timed(run)


def our_sides(case: Subject, target: str, folder: Path) -> Iterator[tuple[str, Timed]]:
    """Our session in each of its ways."""
    options: dict[str, Any] = {}
    if target.startswith("tensorrt"):
        options["profiles"] = [case.profile] if case.profile else []
    compiled = runtimes.compile(case.file, target, folder, options=options or None)
    backend = runtimes.backend(target)
    session = backend.load(compiled, options=backend.options_type(**options))
    yield "host", timed(lambda: session.run(case.feeds))
    yield "bind", timed(filled(session, case).run)
    if backend.device_class != "gpu":
        return
    placed = on_device(case.feeds)
    yield "device", timed(lambda: session.run(placed, outputs="device"))
    try:
        recorded = backend.load(compiled, options=backend.options_type(**options, cuda_graph=True))
        yield "graph", timed(filled(recorded, case).run)
    except runtimes.Error as error:
        print(f"{case.file.stem} on {target}: no graph: {error.what}", file=sys.stderr)
    if target.startswith("tensorrt"):
        yield "kernels", kernels(session, case)


def filled(session: runtimes.Session, case: Subject) -> runtimes.Binding:
    """A binding with the inputs in it."""
    binding = session.bind({name: array.shape for name, array in case.feeds.items()})
    for name, array in case.feeds.items():
        binding.inputs[name][...] = array
    return binding


def kernels(session: Any, case: Subject) -> Timed:
    """The GPU's own time for the engine, without copies."""
    session.run(case.feeds)
    execution = session._pool.make()
    gpu = _cuda.device(0)
    with gpu:
        execution.set_shapes({name: array.shape for name, array in case.feeds.items()}, {})
        execution.run_host()
    start, end = gpu.event(), gpu.event()

    def run() -> float:
        with gpu:
            execution.stream.record(start)
            execution._token[0].execute_async_v3(execution.stream.handle)
            execution.stream.record(end)
        return end.milliseconds_since(start)

    return run


def measure(sides: dict[str, Timed], seconds: float) -> dict[str, list[float]]:
    """Turns in an order that is drawn anew every round, until the time is over."""
    for run in sides.values():
        for _ in range(5):
            run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    order, until = list(sides), time.monotonic() + seconds * len(sides)
    while time.monotonic() < until:
        random.shuffle(order)
        for name in order:
            times[name] += [sides[name]() for _ in range(_TURN)]
    return times


def unavailable(target: str) -> str | None:
    """Why a target does not run here; None where it does."""
    state = runtimes.backend(target).can_run(runtimes.Target(target))
    return None if state.available else f"{target}: {state.reason}"


def rows(file: Path, batch: int, largest: int, seconds: float, targets: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each side of each target."""
    case = subject(file, batch, largest)
    with tempfile.TemporaryDirectory() as temporary:
        sides: dict[str, Timed] = {}
        for target in targets:
            try:
                if target.startswith("ort-"):
                    sides |= {f"{target} {name}": run for name, run in raw_sides(case, target)}
                sides |= {f"{target} {name}": run for name, run in our_sides(case, target, Path(temporary) / target)}
            except runtimes.Error as error:
                print(f"{file.stem} on {target}: {error.what}", file=sys.stderr)
        times = measure(sides, seconds) if sides else {}
    raw = next((float(np.median(samples)) for name, samples in times.items() if name.endswith(" raw")), None)
    for name, samples in times.items():
        p50 = float(np.median(samples))
        yield {
            "model": file.stem,
            "batch": batch,
            "side": name,
            "p50_ms": round(p50, 4),
            "p99_ms": round(float(np.percentile(samples, 99)), 4) if len(samples) >= _P99 else None,
            "samples": len(samples),
            "to_raw": round(p50 / raw, 3) if raw else None,
        }


def small_models(folder: Path) -> list[Path]:
    """The network of the GPU tests, in three precisions."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "gpu"))
    import gpu_models

    return [gpu_models.conv_net(folder / f"conv_net-{name}.onnx", name) for name in gpu_models.BOUNDS]


def prepare(folder: Path) -> None:
    """Writes ResNet-50 and EfficientNet-Lite0 in float32, float16 and INT8 with the ranges of seeded inputs."""
    from passes.convert_float16 import ConvertFloat16
    from passes.quantize_int8 import QuantizeInt8
    from toolchain import models
    from toolchain.calibration import calibrate
    from toolchain.evaluate import input_specs
    from toolchain.export import export_source
    from toolchain.onnx_file import write_onnx
    from toolchain.optimize import optimize
    from toolchain.recipe import Recipe
    from toolchain.seeded import seeded_inputs

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("resnet50", "efficientnet_lite0"):
        model = export_source(models.resolve(name)).model
        optimize(model, Recipe(model=name).pipeline())
        write_onnx(model, folder / f"{name}-fp32.onnx")
        half = model.clone()
        ConvertFloat16()(half)
        write_onnx(half, folder / f"{name}-fp16.onnx")
        samples = [seeded_inputs(input_specs(model), batch=4, seed=seed) for seed in range(4)]
        QuantizeInt8(calibration=calibrate(model, samples), dialect="tensorrt")(model)
        write_onnx(model, folder / f"{name}-int8.onnx")
        print(f"{name}: written to {folder}")


def main() -> None:
    """Prints a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--batch-sizes", default="1,32")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each side")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare)
        return
    reasons = {target: unavailable(target) for target in arguments.targets.split(",")}
    for reason in filter(None, reasons.values()):
        print(reason, file=sys.stderr)
    targets = [target for target, reason in reasons.items() if reason is None]
    if not targets:
        sys.exit("nothing to measure: no target runs here")
    sizes = [int(size) for size in arguments.batch_sizes.split(",")]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for file in arguments.files or small_models(Path(temporary)):
            for batch in sizes:
                for row in rows(file, batch, max(sizes), arguments.seconds, targets):
                    found.append(row)
                    p99 = "-" if row["p99_ms"] is None else f"{row['p99_ms']:.3f}"
                    ratio = "-" if row["to_raw"] is None else f"{row['to_raw']:.3f}"
                    print(
                        f"{row['model']:<28} {batch:>4} {row['side']:<22} p50 {row['p50_ms']:>9.3f}  p99 {p99:>9}"
                        f"  to raw {ratio:>7}  n {row['samples']}",
                        flush=True,
                    )
    state = driver()
    about = {
        "date": datetime.date.today().isoformat(),
        "gpu": state.gpus[0].name if state.gpus else None,
        "driver_cuda": "{}.{}".format(*state.cuda) if state.cuda else None,
        "versions": {name: runtimes.backend(name).probe().version for name in targets},
        "cuda_package": _cuda.package(),
    }
    print(json.dumps({"benchmark": "gpu", **about, "rows": found}))


if __name__ == "__main__":
    main()
