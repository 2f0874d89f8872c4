"""Which values of a graph calibration has to look at, and which get their range from those.

Looking costs a pass over the value's elements, and keeps the runtime from fusing it away. So:

* A value that only a Relu or a Clip reads is not looked at: a quantiser that saturates at the bounds of the
  activation *is* the activation, so the value takes the range of what comes out. (It could not be observed for
  nothing either: ONNX Runtime computes both in one kernel.)
* What only moves or chooses elements (Reshape, Transpose, MaxPool, a Pad with zeros ...) has the range of what goes in.
* What Concat joins has the distributions of its inputs, added up.
* What a layer hands to a BatchNormalization alone is fused away before anything is quantised.
* What only leads into a Softmax (scores plus a mask of minus infinity) is quantised by nobody, the product that
  makes the scores aside.

On EfficientNet-Lite0 that leaves 61 of 95 values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from passes._graph import FLOATS, constant, given, is_op, only_use, scalar
from toolchain.errors import CalibrationError

#: products: what reads and gives them is worth quantising whatever is around it
_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: ops that some runtime computes on integers; a value next to none of them needs no range
_QUANTISABLE = frozenset(
    """
    Add AveragePool BatchNormalization Celu Clip Concat Conv ConvTranspose Div Elu GRU Gelu Gemm GlobalAveragePool
    GlobalLpPool GlobalMaxPool HardSigmoid HardSwish InstanceNormalization LSTM LayerNormalization LeakyRelu MatMul Max
    MaxPool Mean Min Mish Mul PRelu Pow RMSNormalization RNN ReduceMax ReduceMean ReduceMin ReduceSum Relu Resize Selu
    Sigmoid Softmax Softplus Softsign Sqrt Sub Sum Swish Tanh ThresholdedRelu Upsample Where
    """.split()
)
#: every element of the first output is one of the first input
_MOVES = frozenset(
    """
    DepthToSpace Dropout Expand Flatten GlobalMaxPool Identity MaxPool Reshape SpaceToDepth Squeeze Tile
    Transpose Unsqueeze
    """.split()
)
#: element by element on the way to a Softmax
_TO_SOFTMAX = frozenset(
    "Add Cast Div Expand Identity Max Min Mul Reshape Squeeze Sub Transpose Unsqueeze Where".split()
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to look at.

    Attributes:
        graph: digest of the graph, see ``graph_digest``.
        inputs: names of graph inputs that are observed.
        outputs: names of values that nodes of the main graph compute, in order; all are observed.
        same: for a value that is not observed, the observed one with the same range.
        joined: for the output of a Concat, the observed values that it is made of.
        bounds: what the values of a Relu or a Clip cannot pass, by name of its output.
        channel_inputs: values read by MatMul and Gemm, whose last axis counts the channels.
        channel_outputs: values that layers with weights give, and the axis of their channels.
    """

    graph: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    same: Mapping[str, str]
    joined: Mapping[str, tuple[str, ...]]
    bounds: Mapping[str, tuple[float, float]]
    channel_inputs: tuple[str, ...] = ()
    channel_outputs: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def observed(self) -> tuple[str, ...]:
        """Inputs, then outputs."""
        return self.inputs + self.outputs

    def ranged(self) -> Iterator[str]:
        """Every value that gets a range."""
        yield from self.observed
        yield from self.same
        yield from self.joined


def plan(model: ir.Model, *, channels: bool = False) -> Plan:
    """Decides what of the main graph to observe.

    Args:
        model: with the types of its values known.
        channels: also observe every input and output of a layer with weights itself, for statistics by channel.

    Raises:
        CalibrationError: nothing in the graph could be quantised.
    """
    graph = model.graph
    scores = _scores(graph)
    order = [v for v in graph.inputs if not v.is_initializer()]
    order += [v for node in graph for v in node.outputs]
    candidates = {v: None for v in order if v.name and v.dtype in FLOATS and v not in scores and constant(v) is None}
    wanted = {_carrier(v, candidates) for v in candidates if _near_quantisable(v) and not _before_normalisation(v)}
    joined = {
        v: parts
        for v in candidates
        if v in wanted and (parts := _parts(v, candidates)) is not None and all(part in wanted for part in parts)
    }
    by_channel_in, by_channel_out = _channels(graph, candidates) if channels else ({}, {})
    observed = [v for v in candidates if (v in wanted and v not in joined) or v in by_channel_in or v in by_channel_out]
    if not observed:
        raise CalibrationError(
            "nothing in this graph could be quantised",
            where=graph.name or "the main graph",
            hint="calibration looks at the float values of the main graph around Conv, Gemm, MatMul, Add and the like",
        )
    known = set(observed) | set(joined)
    same = {v: _carrier(v, candidates) for v in candidates if v not in known}
    return Plan(
        graph=graph_digest(model),
        inputs=tuple(_name(v) for v in observed if v.producer() is None),
        outputs=tuple(_name(v) for v in observed if v.producer() is not None),
        same={_name(v): _name(carrier) for v, carrier in same.items() if carrier in known},
        joined={_name(v): tuple(map(_name, parts)) for v, parts in joined.items()},
        bounds={_name(v): found for v in observed if (found := _bounds(v.producer())) is not None},
        channel_inputs=tuple(map(_name, by_channel_in)),
        channel_outputs={_name(v): axis for v, axis in by_channel_out.items()},
    )


def graph_digest(model: ir.Model) -> str:
    """SHA-256 (hex) over the main graph: ops, attributes, names, wiring, and of every weight dtype, shape and 256
    elements spread over it. Metadata, doc strings, recorded shapes and opset numbers do not count.

    Ranges belong to weights, so other weights are another graph; reading all of them would take longer than
    the calibration of a small model.
    """
    digest = hashlib.sha256()

    def say(*parts: object) -> None:
        digest.update("\0".join(map(str, parts)).encode())
        digest.update(b"\n")

    say("in", *(v.name for v in model.graph.inputs), "out", *(v.name for v in model.graph.outputs))
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        say(
            "" if node.domain == "ai.onnx" else node.domain,
            node.op_type,
            *(None if v is None else v.name for v in node.inputs),
            "->",
            *(v.name for v in node.outputs),
        )
        for name, attribute in sorted(node.attributes.items()):
            if attribute.is_ref():
                say(name, "ref", attribute.ref_attr_name)
            elif attribute.type == ir.AttributeType.TENSOR:
                say(name, *_contents(attribute.as_tensor()))
            elif attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                say(name, attribute.value)
    for name in sorted(model.graph.initializers):
        tensor = model.graph.initializers[name].const_value
        if tensor is not None:
            say(name, *_contents(tensor))
    return digest.hexdigest()


def _contents(tensor: ir.TensorProtocol) -> tuple[str, ...]:
    data = tensor.numpy().reshape(-1)
    some = data[:: max(1, math.ceil(data.size / 256))]
    return (
        tensor.dtype.name,
        str(list(tensor.shape)),
        repr(some.tolist()) if data.dtype == object else some.tobytes().hex(),
    )


def _name(value: ir.Value) -> str:
    assert value.name
    return value.name


def _near_quantisable(value: ir.Value) -> bool:
    producer = value.producer()
    return (producer is not None and is_op(producer, *_QUANTISABLE)) or any(
        is_op(use.node, *_QUANTISABLE) for use in value.uses()
    )


def _before_normalisation(value: ir.Value) -> bool:
    reader = only_use(value)
    return is_op(value.producer(), *_LINEAR) and is_op(reader, "BatchNormalization")


def _carrier(value: ir.Value, candidates: Mapping[ir.Value, None]) -> ir.Value:
    """The value whose range this one takes; itself where there is none such."""
    reader = only_use(value)
    if reader is not None and value is reader.inputs[0] and _bounds(reader) is not None:
        return reader.outputs[0]
    producer = value.producer()
    if producer is None or value is not producer.outputs[0]:
        return value
    source = given(producer, 0)
    if source is None or source not in candidates or not (is_op(producer, *_MOVES) or _pads_zeros(producer)):
        return value
    return _carrier(source, candidates)


def _parts(value: ir.Value, candidates: Mapping[ir.Value, None]) -> tuple[ir.Value, ...] | None:
    """What a Concat joins; None where that is not all observed, or is itself a Concat."""
    producer = value.producer()
    if not is_op(producer, "Concat"):
        return None
    assert producer is not None
    if any(v is None or v not in candidates for v in producer.inputs):
        return None
    parts = [_carrier(v, candidates) for v in producer.inputs if v is not None]
    return None if any(is_op(part.producer(), "Concat") for part in parts) else tuple(parts)


def _bounds(node: ir.Node | None) -> tuple[float, float] | None:
    """What a Relu or a Clip with constant bounds lets through."""
    if is_op(node, "Relu"):
        return 0.0, math.inf
    if not is_op(node, "Clip"):
        return None
    assert node is not None
    limits = []
    for index, name, default in ((1, "min", -math.inf), (2, "max", math.inf)):
        value, attribute = given(node, index), node.attributes.get(name)
        limit: float | None = default
        if value is not None:
            limit = scalar(value)
        elif attribute is not None:
            limit = None if attribute.is_ref() else attribute.as_float()
        if limit is None:
            return None
        # The runtime compares in the tensor's own type: 0.1 is the float32 that is nearest.
        limits.append(float(np.float32(limit)))
    return limits[0], limits[1]


def _pads_zeros(node: ir.Node) -> bool:
    if not is_op(node, "Pad"):
        return False
    value = given(node, 2)
    return node.attributes.get_string("mode", "constant") != "constant" or value is None or scalar(value) == 0


def _scores(graph: ir.Graph) -> set[ir.Value]:
    """Values that lead into a Softmax and nowhere else, and are no product."""
    leads: set[ir.Value] = set()
    inputs = list(graph.inputs)
    for value in [v for node in reversed(graph) for v in node.outputs] + inputs:
        uses = value.uses()
        if uses and not value.is_graph_output() and all(_leads_on(use.node, leads) for use in uses):
            leads.add(value)
    return {value for value in leads if not is_op(value.producer(), *_LINEAR)}


def _leads_on(node: ir.Node, leads: set[ir.Value]) -> bool:
    return is_op(node, "Softmax", "LogSoftmax") or (
        is_op(node, *_TO_SOFTMAX) and all(output in leads for output in node.outputs)
    )


def _channels(graph: ir.Graph, candidates: Mapping[ir.Value, None]) -> tuple[dict[ir.Value, None], dict[ir.Value, int]]:
    """Inputs of products with a constant weight, and outputs of layers with the axis of their channels."""
    inputs: dict[ir.Value, None] = {}
    outputs: dict[ir.Value, int] = {}
    for node in graph:
        if not is_op(node, *_LINEAR) or constant(given(node, 1)) is None:
            continue
        source, result = node.inputs[0], node.outputs[0]
        if is_op(node, "MatMul", "Gemm") and source in candidates:
            assert source is not None
            inputs[source] = None
        if result in candidates:
            outputs[result] = 1 if is_op(node, "Conv", "ConvTranspose") else -1
    return inputs, outputs
