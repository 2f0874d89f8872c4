"""One job of ``quantization.py`` in a process of its own: the argument says what, in JSON, and so is the answer.

Nothing is imported that a job does not need, so that peak memory is the tool's own, and so that the interpreter may
be one that has the tool but not this project. Samples lie on the disk as one .npz a batch and are read one by one.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Feeds = dict[str, np.ndarray]
#: Runs of one file before the next has its turn: long enough to warm the caches again, short against drift.
_BLOCK_SECONDS = 0.05


def batches(folder: str) -> Iterator[Feeds]:
    """The batches of a folder, in order."""
    for path in sorted(Path(folder).glob("*.npz")):
        with np.load(path) as file:
            yield {name: file[name] for name in file.files}


def peak_mb() -> float:
    """Peak resident memory of this process so far."""
    # VmHWM, not ru_maxrss: the latter survives exec and would count the parent's memory at the fork
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6


def open_session(model: str, threads: int = 0) -> Any:
    """ONNX Runtime on the CPU with its default options; 0 threads is its own choice."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def plain(model: str, samples: str) -> dict[str, float]:
    """Only runs the model over the samples; the clock does not see the load and the first run."""
    import onnxruntime  # noqa: F401

    imports = peak_mb()
    session = open_session(model)
    session.run(None, next(batches(samples)))
    started = time.perf_counter()
    for feeds in batches(samples):
        session.run(None, feeds)
    return _whole(started, imports)


def ours(model: str, samples: str, write: str, dialect: str) -> dict[str, float]:
    """``calibrate``, then ``quantize_int8`` with its defaults. Without ``write`` it ends after the calibration."""
    import onnxruntime  # noqa: F401  imported before the clock starts, as for the others

    from toolchain.calibration import calibrate

    imports = peak_mb()
    started = time.perf_counter()
    calibration = calibrate(Path(model), batches(samples))
    seconds, peak = time.perf_counter() - started, peak_mb()
    if write:
        # Only now, for calibration alone does not import them; the clock does not see this import either.
        begun = time.perf_counter()
        import onnx_ir as ir

        import passes

        started += time.perf_counter() - begun
        graph = ir.load(model)
        passes.make("quantize_int8", dialect=dialect, calibration=calibration)(graph)
        ir.save(graph, write)
    return {**_whole(started, imports), "seconds": seconds, "peak_mb": peak}


def ours_tools(model: str, samples: str, write: str) -> dict[str, float]:
    """``ours``, with the accuracy tools that NNCF uses on a transformer: SmoothQuant and fast bias correction."""
    import onnxruntime  # noqa: F401

    from toolchain.calibration import calibrate

    imports = peak_mb()
    started = time.perf_counter()
    calibration = calibrate(Path(model), batches(samples))
    seconds, peak = time.perf_counter() - started, peak_mb()
    begun = time.perf_counter()
    import onnx_ir as ir

    from runtimes import Target
    from toolchain.candidates import Tools, prepared_by, quantised_by
    from toolchain.clipping import PERCENTILE
    from toolchain.preparation import Prepared
    from toolchain.progress import silent
    from toolchain.samples import Batch

    started += time.perf_counter() - begun
    tools = Tools(smooth_quant="on", bias_correction="fast")
    data = [Batch(feeds, None) for feeds in batches(samples)]
    plain = Prepared(ir.load(model), calibration, 0)
    prepared = prepared_by(tools, plain, data, method="auto", percentile=PERCENTILE, on_status=silent)
    graph, _ = quantised_by(tools, prepared, Target("ort-cpu"), exclude=(), weights="balanced", data=data, samples=[])
    ir.save(graph, write)
    return {**_whole(started, imports), "seconds": seconds, "peak_mb": peak}


def ours_dynamic(model: str, write: str) -> dict[str, float]:
    """``quantize_dynamic`` with its defaults."""
    import onnx_ir as ir

    import passes

    imports = peak_mb()
    started = time.perf_counter()
    graph = ir.load(model)
    passes.make("quantize_dynamic")(graph)
    ir.save(graph, write)
    return _whole(started, imports)


def preprocess(model: str, write: str, symbolic: bool) -> dict[str, float]:
    """What onnxruntime.quantization asks for before it quantises; it can do without symbolic shapes."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    imports = peak_mb()
    started = time.perf_counter()
    quant_pre_process(model, write, skip_symbolic_shape=not symbolic)
    return _whole(started, imports)


def onnxruntime_static(model: str, samples: str, write: str, method: str) -> dict[str, float]:
    """``quantize_static``: Q/DQ, uint8 activations, int8 weights by channel.

    It calibrates and quantises in one call; the calibration is clocked from the making of its calibrater to the ranges.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType

    # the package has a function of the module's name
    quantize: Any = importlib.import_module("onnxruntime.quantization.quantize")

    found: dict[str, float] = {}
    create = quantize.create_calibrator

    def clocked(*arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        calibrator = create(*arguments, **options)
        compute = calibrator.compute_data

        def computed() -> Any:
            ranges = compute()
            found.update(seconds=time.perf_counter() - begun, peak_mb=peak_mb())
            return ranges

        calibrator.compute_data = computed
        return calibrator

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = batches(samples)

        def get_next(self) -> Feeds | None:
            return next(self.left, None)

    quantize.create_calibrator = clocked
    imports = peak_mb()
    started = time.perf_counter()
    quantize.quantize_static(
        model,
        write,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        calibrate_method=CalibrationMethod[method],
    )
    return {**_whole(started, imports), **found}


def onnxruntime_dynamic(model: str, write: str) -> dict[str, float]:
    """``quantize_dynamic``: int8 weights by channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    imports = peak_mb()
    started = time.perf_counter()
    quantize_dynamic(model, write, weight_type=QuantType.QInt8, per_channel=True)
    return _whole(started, imports)


def nncf(model: str, samples: str, write: str, transformer: bool) -> dict[str, float]:
    """``nncf.quantize`` with its defaults, fed a sample at a time as it asks; calibration is all it does."""
    import nncf  # type: ignore[import-not-found]
    import onnx

    class Samples:
        def __iter__(self) -> Iterator[Feeds]:
            for batch in batches(samples):
                for row in range(len(next(iter(batch.values())))):
                    yield {name: array[row : row + 1] for name, array in batch.items()}

    imports = peak_mb()
    started = time.perf_counter()
    quantised = nncf.quantize(
        onnx.load(model),
        nncf.Dataset(Samples()),
        subset_size=sum(1 for _ in Samples()),
        target_device=nncf.TargetDevice.CPU,
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )
    onnx.save(quantised, write)
    return _whole(started, imports)


def _whole(started: float, imports: float) -> dict[str, float]:
    """Seconds and memory of a job as a whole; ``imports`` is the memory that it had before it began."""
    seconds, peak = time.perf_counter() - started, peak_mb()
    return {
        "seconds": seconds,
        "total_seconds": seconds,
        "imports_mb": imports,
        "peak_mb": peak,
        "total_peak_mb": peak,
    }


def outputs(model: str, samples: str, write: str) -> dict[str, int]:
    """The first output on every batch, as one .npz."""
    session = open_session(model)
    name = session.get_outputs()[0].name
    found = [session.run([name], feeds)[0] for feeds in batches(samples)]
    np.savez(write, *found)
    return {"batches": len(found)}


def latency(models: list[str], feeds: str, sizes: list[int], seconds: float, threads: int) -> dict[str, Any]:
    """Median and least milliseconds of blocks of runs: every file has a block in turn, for each batch size so many
    seconds.

    Every other round goes the other way round, and a block begins with a run that does not count: what ran before,
    and its threads that still spin, weigh on nobody in particular.
    """
    sessions = [open_session(model, threads) for model in models]
    with np.load(feeds) as file:
        whole = {name: file[name] for name in file.files}
    result: dict[str, Any] = {}
    for size in sizes:
        part = {name: array[:size] for name, array in whole.items()}
        once = [min(_timed(session, part) for _ in range(3)) for session in sessions]
        runs = [max(1, round(_BLOCK_SECONDS / each)) for each in once]
        blocks: list[list[tuple[float, float]]] = [[] for _ in sessions]
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds or len(blocks[0]) < 5:
            order = range(len(sessions)) if len(blocks[0]) % 2 == 0 else range(len(sessions) - 1, -1, -1)
            for i in order:
                sessions[i].run(None, part)
                taken = [_timed(sessions[i], part) * 1e3 for _ in range(runs[i])]
                blocks[i].append((float(np.median(taken)), min(taken)))
        result[str(size)] = blocks
    return result


def _timed(session: Any, feeds: Feeds) -> float:
    started = time.perf_counter()
    session.run(None, feeds)
    return time.perf_counter() - started


def tensorrt(float32: str, int8: str, capabilities: list[str]) -> dict[str, Any]:
    """Parses both graphs, looks at what feeds each layer, and builds engines of both for every capability."""
    import tensorrt_rtx as trt  # type: ignore[import-not-found]

    logger = trt.Logger(trt.Logger.ERROR)

    def parsed(path: str) -> tuple[Any, Any]:
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(Path(path).read_bytes()):
            raise SystemExit(f"{Path(path).name}: {parser.get_error(0).desc()}")
        return builder, network

    def size(path: str, capability: str) -> int:
        builder, network = parsed(path)
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
        profile = builder.create_optimization_profile()
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        for tensor in inputs:
            least, usual, most = (
                [d if d >= 0 else (batch if axis == 0 else length) for axis, d in enumerate(tensor.shape)]
                for batch, length in ((1, 1), (1, 32), (8, 128))
            )
            if least != most:
                profile.set_shape(tensor.name, least, usual, most)
        if any(-1 in tensor.shape for tensor in inputs):
            config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise SystemExit(f"{Path(path).name}: no engine for {capability}")
        return int(engine.nbytes)

    _, network = parsed(int8)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    makers = {layer.get_output(j).name: layer for layer in layers for j in range(layer.num_outputs)}
    counts: dict[str, Any] = {"convs": 0, "convs_int8": 0, "matmuls": 0, "matmuls_int8": 0}
    for layer in layers:
        kind = {"CONVOLUTION": "convs", "DECONVOLUTION": "convs", "MATRIX_MULTIPLY": "matmuls"}.get(layer.type.name)
        if kind:
            counts[kind] += 1
            counts[f"{kind}_int8"] += _maker(makers, layer, 0) == _maker(makers, layer, 1) == "DEQUANTIZE"
    counts["residuals"] = _residuals(parsed(float32)[1])
    counts["residuals_int8"] = _residuals(network)
    counts["engines"] = {c: [size(float32, c), size(int8, c)] for c in capabilities}
    return counts


def _maker(makers: dict[str, Any], layer: Any, index: int) -> str:
    """The type of the layer that makes an input, past those that only give it another shape."""
    tensor = layer.get_input(index)
    maker = makers.get(tensor.name) if tensor is not None else None
    if maker is None:
        return ""
    return _maker(makers, maker, 0) if maker.type.name == "SHUFFLE" else str(maker.type.name)


def _residuals(network: Any) -> int:
    """Adds that a convolution feeds with nothing in between, so that the two can fuse."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    makers = {layer.get_output(j).name: layer for layer in layers for j in range(layer.num_outputs)}
    sums = [layer for layer in layers if layer.type.name == "ELEMENTWISE" and layer.num_inputs == 2]
    return sum("CONVOLUTION" in (_maker(makers, layer, 0), _maker(makers, layer, 1)) for layer in sums)


JOBS: dict[str, Callable[..., Any]] = {
    "latency": latency,
    "nncf": nncf,
    "onnxruntime_dynamic": onnxruntime_dynamic,
    "onnxruntime_static": onnxruntime_static,
    "ours": ours,
    "ours_tools": ours_tools,
    "ours_dynamic": ours_dynamic,
    "outputs": outputs,
    "plain": plain,
    "preprocess": preprocess,
    "tensorrt": tensorrt,
}


def main() -> None:
    job = json.loads(sys.argv[1])
    print(json.dumps(JOBS[job.pop("do")](**job)))


if __name__ == "__main__":
    main()
