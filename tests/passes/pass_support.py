"""How passes are tested: graphs in ONNX text, numerics against an unoptimised reference, both before and after."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from passes.base import Outcome, Pass
from toolchain.metrics import tensor_error

HEADER = '<ir_version: {ir}, opset_import: ["" : {opset}]>\n'


def parse(text: str, *, opset: int = 20, ir_version: int = 8, **constants: np.ndarray) -> onnx.ModelProto:
    """A model from the text of its graph; inputs that ``constants`` names become initializers.

    A text that starts with ``<`` brings its own header.
    """
    header = "" if text.lstrip().startswith("<") else HEADER.format(ir=ir_version, opset=opset)
    proto = onnx.parser.parse_model(header + text)
    kept = [value for value in proto.graph.input if value.name not in constants]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    for name, data in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(data, name))
    return proto


def random_feeds(proto: onnx.ModelProto, seed: int, sizes: dict[str, int] | None = None) -> dict[str, np.ndarray]:
    """Seeded inputs for every input without a default; symbolic dimensions get ``sizes``, 2 where it is silent."""
    rng = np.random.default_rng(seed)
    defaults = {tensor.name for tensor in proto.graph.initializer}
    feeds = {}
    for value in proto.graph.input:
        if value.name in defaults:
            continue
        kind = value.type.tensor_type
        shape = [
            d.dim_value
            if d.dim_value > 0 or (d.HasField("dim_value") and d.dim_value == 0)
            else (sizes or {}).get(d.dim_param, 2)
            for d in kind.shape.dim
        ]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if dtype == np.bool_:
            feeds[value.name] = rng.random(shape) < 0.5
        elif np.issubdtype(dtype, np.integer):
            feeds[value.name] = rng.integers(0, 5, shape).astype(dtype)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
    return feeds


def run_reference(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """onnx's own evaluator."""
    return list(ReferenceEvaluator(proto).run(None, feeds))


def run_ort(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """ONNX Runtime on the CPU with every graph optimisation off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


Signature = tuple[list[tuple[str, str, list[int | str | None]]], list[tuple[str, str, list[int | str | None]]]]


def signature(proto: onnx.ModelProto) -> Signature:
    """Inputs that must be fed, and outputs: names, kinds and shapes."""
    defaults = {tensor.name for tensor in proto.graph.initializer}

    def describe(value: onnx.ValueInfoProto) -> tuple[str, str, list[int | str | None]]:
        kind = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]
        return value.name, f"{value.type.WhichOneof('value')} {kind.elem_type}", shape

    return (
        [describe(value) for value in proto.graph.input if value.name not in defaults],
        [describe(value) for value in proto.graph.output],
    )


def assert_close(before: list[np.ndarray], after: list[np.ndarray], nmse: float) -> None:
    """Every output has the dtype and shape it had, and is within ``nmse``; 0 means equal."""
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert tensor_error(a, b).nmse <= nmse


def check(
    proto: onnx.ModelProto,
    *passes: Pass,
    fired: int | None = None,
    nmse: float = 0.0,
    seeds: int = 2,
    sizes: dict[str, int] | None = None,
    run=run_reference,
) -> tuple[ir.Model, Outcome]:
    """Runs passes and holds what every pass promises; gives the model and the last pass's outcome.

    Valid before and after, same signature, same results, a second run changes nothing, and a value name
    that survives in the main graph stands for the same value.
    """
    onnx.checker.check_model(proto, full_check=True)
    model = ir.from_proto(proto)
    for each in passes:
        bytes_before = to_bytes(model)
        outcome = each(model)
        assert outcome.modified == (to_bytes(model) != bytes_before), f"{each.name} is wrong about {outcome.modified=}"
        assert outcome.modified or not outcome.fired
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert signature(after) == signature(proto)
    for each in passes:
        again = each(model)
        assert not again.modified, f"{each.name} changes the model again"
        assert again.fired == 0
    if fired is not None:
        assert outcome.fired == fired, outcome
    watched_before, watched_after = _with_all_values(proto, after)
    for seed in range(seeds):
        feeds = random_feeds(proto, seed, sizes)
        assert_close(run(proto, feeds), run(after, feeds), nmse)
        if run is run_reference and watched_before is not None:
            assert_close(run(watched_before, feeds), run(watched_after, feeds), nmse)
    return model, outcome


def _with_all_values(
    before: onnx.ModelProto, after: onnx.ModelProto
) -> tuple[onnx.ModelProto | None, onnx.ModelProto | None]:
    """Both models with every value name that they share as an output."""
    shared = {name for node in before.graph.node for name in node.output if name} & {
        name for node in after.graph.node for name in node.output if name
    }
    if not shared:
        return None, None
    copies = []
    for proto in (before, after):
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        del copy.graph.output[:]
        copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in sorted(shared))
        copies.append(copy)
    return copies[0], copies[1]


def to_bytes(model: ir.Model) -> bytes:
    """The model's bytes, in one order whatever the run."""
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def ops(model: ir.Model) -> list[str]:
    """The op types of the main graph, in order."""
    return [node.op_type for node in model.graph]
