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
from typing import TYPE_CHECKING

import numpy as np

from toolchain.errors import CalibrationError
from toolchain.wiring import Constant, Op, Reference, Wiring, wiring_of

if TYPE_CHECKING:
    import onnx_ir as ir

#: types of elements that calibration looks at
_FLOATS = frozenset({"FLOAT16", "BFLOAT16", "FLOAT", "DOUBLE"})

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


def plan(graph: ir.Model | Wiring, *, channels: bool = False) -> Plan:
    """Decides what of the main graph to observe.

    Args:
        graph: with the types of its values known.
        channels: also observe every input and output of a layer with weights itself, for statistics by channel.

    Raises:
        CalibrationError: nothing in the graph could be quantised.
    """
    wiring = graph if isinstance(graph, Wiring) else wiring_of(graph)
    scores = _scores(wiring)
    order = [name for name in wiring.inputs if name not in wiring.initializers]
    order += [name for node in wiring.nodes for name in node.outputs if name]
    candidates = dict.fromkeys(
        name
        for name in order
        if wiring.dtypes.get(name) in _FLOATS and name not in scores and not wiring.is_constant(name)
    )
    wanted = {
        _carrier(wiring, name, candidates)
        for name in candidates
        if _near_quantisable(wiring, name) and not _before_normalisation(wiring, name)
    }
    joined = {
        name: parts
        for name in candidates
        if name in wanted
        and (parts := _parts(wiring, name, candidates)) is not None
        and all(part in wanted for part in parts)
    }
    by_channel_in, by_channel_out = _channels(wiring, candidates) if channels else ({}, {})
    observed = [v for v in candidates if (v in wanted and v not in joined) or v in by_channel_in or v in by_channel_out]
    if not observed:
        raise CalibrationError(
            "nothing in this graph could be quantised",
            where=wiring.name or "the main graph",
            hint="calibration looks at the float values of the main graph around Conv, Gemm, MatMul, Add and the like",
        )
    known = set(observed) | set(joined)
    same = {name: _carrier(wiring, name, candidates) for name in candidates if name not in known}
    return Plan(
        graph=graph_digest(wiring),
        inputs=tuple(name for name in observed if name not in wiring.producers),
        outputs=tuple(name for name in observed if name in wiring.producers),
        same={name: carrier for name, carrier in same.items() if carrier in known},
        joined=joined,
        bounds={n: found for n in observed if (found := _bounds(wiring, wiring.producers.get(n))) is not None},
        channel_inputs=tuple(by_channel_in),
        channel_outputs=by_channel_out,
    )


def graph_digest(graph: ir.Model | Wiring) -> str:
    """SHA-256 (hex) over the main graph: ops, attributes, names, wiring, and of every weight dtype, shape and 256
    elements spread over it. Metadata, doc strings, recorded shapes and opset numbers do not count.

    Ranges belong to weights, so other weights are another graph; reading all of them would take longer than
    the calibration of a small model.
    """
    wiring = graph if isinstance(graph, Wiring) else wiring_of(graph)
    digest = hashlib.sha256()

    def say(*parts: object) -> None:
        digest.update("\0".join(map(str, parts)).encode())
        digest.update(b"\n")

    def say_constant(name: str, found: Constant) -> None:
        say(name, found.dtype, list(found.shape), found.some)

    say("in", *wiring.inputs, "out", *wiring.outputs)
    for node in wiring.nested:
        say(node.domain, node.op_type, *node.inputs, "->", *node.outputs)
        for name, value in sorted(node.attributes.items()):
            if isinstance(value, Reference):
                say(name, "ref", value.name)
            elif isinstance(value, Constant):
                say_constant(name, value)
            else:
                say(name, value)
    for name in sorted(wiring.initializers):
        say_constant(name, wiring.initializers[name])
    return digest.hexdigest()


def _near_quantisable(wiring: Wiring, name: str) -> bool:
    producer = wiring.producers.get(name)
    return (producer is not None and producer.is_a(*_QUANTISABLE)) or any(
        reader.is_a(*_QUANTISABLE) for reader in wiring.readers.get(name, ())
    )


def _before_normalisation(wiring: Wiring, name: str) -> bool:
    producer, reader = wiring.producers.get(name), wiring.only_reader(name)
    return producer is not None and producer.is_a(*_LINEAR) and reader is not None and reader.is_a("BatchNormalization")


def _carrier(wiring: Wiring, name: str, candidates: Mapping[str, None]) -> str:
    """The value whose range this one takes; itself where there is none such."""
    reader = wiring.only_reader(name)
    if reader is not None and name == reader.inputs[0] and _bounds(wiring, reader) is not None:
        return str(reader.outputs[0])
    producer = wiring.producers.get(name)
    if producer is None or name != producer.outputs[0]:
        return name
    source = producer.given(0)
    if source not in candidates or not (producer.is_a(*_MOVES) or _pads_zeros(wiring, producer)):
        return name
    assert source is not None
    return _carrier(wiring, source, candidates)


def _parts(wiring: Wiring, name: str, candidates: Mapping[str, None]) -> tuple[str, ...] | None:
    """What a Concat joins; None where that is not all observed, or is itself a Concat."""
    producer = wiring.producers.get(name)
    if producer is None or not producer.is_a("Concat"):
        return None
    if any(source not in candidates for source in producer.inputs):
        return None
    parts = tuple(_carrier(wiring, source, candidates) for source in producer.inputs if source is not None)
    makers = [wiring.producers.get(part) for part in parts]
    return None if any(maker is not None and maker.is_a("Concat") for maker in makers) else parts


def _bounds(wiring: Wiring, node: Op | None) -> tuple[float, float] | None:
    """What a Relu or a Clip with constant bounds lets through."""
    if node is None or not node.is_a("Relu", "Clip"):
        return None
    if node.is_a("Relu"):
        return 0.0, math.inf
    limits = []
    for index, key, default in ((1, "min", -math.inf), (2, "max", math.inf)):
        value, limit = node.given(index), node.attributes.get(key, default)
        if value is not None:
            limit = wiring.scalar(value)
        if limit is None or isinstance(limit, Reference):
            return None
        # The runtime compares in the tensor's own type: 0.1 is the float32 that is nearest.
        limits.append(float(np.float32(limit)))
    return limits[0], limits[1]


def _pads_zeros(wiring: Wiring, node: Op) -> bool:
    if not node.is_a("Pad"):
        return False
    value = node.given(2)
    return node.attributes.get("mode", "constant") != "constant" or value is None or wiring.scalar(value) == 0


def _scores(wiring: Wiring) -> set[str]:
    """Values that lead into a Softmax and nowhere else, and are no product."""
    leads: set[str] = set()
    kept = {*wiring.outputs, *wiring.nested_outputs}
    names = [name for node in reversed(wiring.nodes) for name in node.outputs if name]
    for name in [*names, *wiring.inputs]:
        readers = wiring.readers.get(name)
        if readers and name not in kept and all(_leads_on(reader, leads) for reader in readers):
            leads.add(name)
    makers = {name: wiring.producers.get(name) for name in leads}
    return {name for name, maker in makers.items() if maker is None or not maker.is_a(*_LINEAR)}


def _leads_on(node: Op, leads: set[str]) -> bool:
    return node.is_a("Softmax", "LogSoftmax") or (
        node.is_a(*_TO_SOFTMAX) and all(output in leads for output in node.outputs)
    )


def _channels(wiring: Wiring, candidates: Mapping[str, None]) -> tuple[dict[str, None], dict[str, int]]:
    """Inputs of products with a constant weight, and outputs of layers with the axis of their channels."""
    inputs: dict[str, None] = {}
    outputs: dict[str, int] = {}
    for node in wiring.nodes:
        if not node.is_a(*_LINEAR) or not wiring.is_constant(node.given(1)):
            continue
        source, result = node.given(0), node.outputs[0]
        if node.is_a("MatMul", "Gemm") and source in candidates:
            assert source is not None
            inputs[source] = None
        if result in candidates:
            assert result is not None
            outputs[result] = 1 if node.is_a("Conv", "ConvTranspose") else -1
    return inputs, outputs
