"""How quantisation is tested: min/max ranges from seeded inputs, integers against float, kernels against Q/DQ."""

from __future__ import annotations

import collections
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from pass_support import random_feeds, run_ort, to_bytes

from passes._quant import Calibration, TensorRange
from passes.base import Outcome
from passes.quantize_int8 import QuantizeInt8
from toolchain.metrics import tensor_error

Feeds = dict[str, np.ndarray]


def min_max(proto: onnx.ModelProto, samples: list[Feeds]) -> Calibration:
    """The extremes of every float value of the main graph over the samples."""
    model = ir.from_proto(proto)
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    names = [value.name for node in model.graph for value in node.outputs if value.name]
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for feeds in samples:
        for name, data in [*zip(names, run_ort(watched, feeds), strict=True), *feeds.items()]:
            if data.dtype == np.float32 and data.size:
                low[name] = min(low.get(name, np.inf), float(data.min()))
                high[name] = max(high.get(name, -np.inf), float(data.max()))
    return Calibration("", len(samples), {name: span(low[name], high[name]) for name in low})


def span(low: float, high: float) -> TensorRange:
    """A range without clipping."""
    return TensorRange(low, high, max(abs(low), abs(high)), low, high, "minmax")


def quantise(
    proto: onnx.ModelProto,
    *,
    nmse: float | None = 1e-3,
    sizes: dict[str, int] | None = None,
    samples: int = 3,
    **options: object,
) -> tuple[onnx.ModelProto, Outcome]:
    """Calibrates on seeded inputs, quantises, and holds what the pass promises.

    Valid, same inputs and outputs, a second run changes nothing, outputs within ``nmse`` of float, and so is
    every value whose name survives.
    """
    onnx.checker.check_model(proto, full_check=True)
    feeds = [random_feeds(proto, seed, sizes) for seed in range(samples)]
    model = ir.from_proto(proto)
    before = to_bytes(model)
    calibration = min_max(proto, feeds)
    outcome = QuantizeInt8(calibration=calibration, **options)(model)  # type: ignore[arg-type]
    assert outcome.modified == (to_bytes(model) != before)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    for side in ("input", "output"):
        assert [(v.name, v.type) for v in getattr(after.graph, side)] == [
            (v.name, v.type) for v in getattr(proto.graph, side)
        ]
    again = QuantizeInt8(calibration=calibration, **options)(model)  # type: ignore[arg-type]
    assert not again.modified
    assert not again.fired
    if nmse is not None:
        shared = {o for node in proto.graph.node for o in node.output if o} & {
            o for node in after.graph.node for o in node.output
        }
        for one in feeds:
            for expected, got in zip(
                run_ort(_watch(proto, shared), one), run_ort(_watch(after, shared), one), strict=True
            ):
                assert expected.shape == got.shape
                if expected.dtype == np.float32:
                    assert tensor_error(expected, got).nmse <= nmse
    return after, outcome


def _watch(proto: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    given = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in sorted(names - given))
    return copy


def in_kernels(proto: onnx.ModelProto, *, level: str = "ALL", nmse: float = 1e-4) -> collections.Counter[str]:
    """The ops of ONNX Runtime's own optimised graph, whose results are those of the Q/DQ graph.

    Args:
        nmse: the kernels round where Q/DQ does not; a step of one unit here and there.
    """
    session, found = _optimised(proto, level)
    for seed in range(2):
        feeds = random_feeds(proto, seed)
        for expected, got in zip(run_ort(proto, feeds), session.run(None, feeds), strict=True):
            assert expected.shape == got.shape
            assert tensor_error(expected, got).nmse <= nmse
    return found


def optimised_ops(proto: onnx.ModelProto) -> collections.Counter[str]:
    """The ops of ONNX Runtime's own optimised graph."""
    return _optimised(proto, "ALL")[1]


def _optimised(proto: onnx.ModelProto, level: str) -> tuple[ort.InferenceSession, collections.Counter[str]]:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session, op_counts(onnx.load(path))


def op_counts(proto: onnx.ModelProto) -> collections.Counter[str]:
    """The ops of the main graph."""
    return collections.Counter(node.op_type for node in proto.graph.node)
