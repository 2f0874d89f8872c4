"""Which layers of an INT8 model hurt, and how much: each one's weight, its input, and its share of the final error."""

from __future__ import annotations

import dataclasses
import html as escape
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from passes._graph import constant, is_op
from passes._quant import Calibration, TensorRange
from passes.base import label
from passes.quantize_int8 import quantizable
from runtimes import Target
from toolchain.calibration import observe
from toolchain.candidates import Tools, prepared_by, quantised_by
from toolchain.clipping import PERCENTILE, Method
from toolchain.errors import GraphError
from toolchain.evaluate import Feeds, reference_session
from toolchain.histogram import HALF_BINS, Distribution
from toolchain.lower import dialect_of
from toolchain.metrics import tensor_error
from toolchain.opset import at_least
from toolchain.preparation import Prepared
from toolchain.progress import Status, silent
from toolchain.quantization import LEAST_OPSET
from toolchain.samples import Batch
from toolchain.sensitivity import layer_sensitivities
from toolchain.storage import write_text

#: bars of a histogram's picture
_BARS = 96


@dataclasses.dataclass(frozen=True, slots=True)
class Histogram:
    """An activation's distribution, coarse enough to look at.

    Attributes:
        edges: _BARS + 1 bounds, in the tensor's unit.
        counts: weight between them.
        low, high: what the quantiser covers.
    """

    edges: tuple[float, ...]
    counts: tuple[float, ...]
    low: float
    high: float


@dataclasses.dataclass(frozen=True, slots=True)
class LayerDebug:
    """One layer.

    Attributes:
        node, op_type: the layer.
        weight_sqnr_db: of its weight against the quantised one; None without a weight.
        input: name of its first activation.
        input_sqnr_db: of that activation against the quantised one, on the samples.
        own_nmse: noise over signal of its output when its inputs are the float model's.
        alone_nmse: noise over signal of the model's output when this layer alone is quantised.
        share: of the sum of ``alone_nmse`` over all layers, 0..1.
        flag: what leaves it in float.
        histogram: of the input; None where it was not observed.
    """

    node: str
    op_type: str
    weight_sqnr_db: float | None
    input: str
    input_sqnr_db: float | None
    own_nmse: float
    alone_nmse: float
    share: float
    flag: str
    histogram: Histogram | None


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizationDebug:
    """All layers, the worst share first, and what they add up to.

    Attributes:
        total_nmse: noise over signal of the model's output with all of ``layers`` quantised.
        samples: on how many samples.
        tools: the accuracy tools that were used, such as "bias correction (fast)", or "plain".
    """

    total_nmse: float
    samples: int
    layers: tuple[LayerDebug, ...]
    tools: str = "plain"


def debug_quantization(
    model: ir.Model,
    target: Target,
    calibration: Calibration,
    samples: Sequence[Feeds],
    *,
    weights: str = "balanced",
    exclude: tuple[str, ...] = (),
    tools: Tools | None = None,
    data: Iterable[Batch] = (),
    method: Method = "auto",
    percentile: float = PERCENTILE,
    on_status: Status = silent,
) -> QuantizationDebug:
    """Measures every layer that the target's dialect quantises.

    Args:
        model: the optimised float graph.
        target: decides the dialect.
        calibration: of ``model``.
        samples: small batches; every layer runs the whole model on them once.
        weights: as in ``QuantizeInt8``.
        exclude: nodes that stay in float; they are not among the layers.
        tools: the accuracy tools that the graph is quantised with; None for none of them. Tools that prepare the float
            graph do so once; biases are corrected anew for each layer that is quantised alone.
        data: what the tools measure on, gone through several times, so no generator; where it is empty, ``samples``.
        method, percentile: of ranges that the tools change.
        on_status: is told how far it is.

    Raises:
        GraphError: see ``lower_int8`` and ``prepare``.
    """
    tools = Tools() if tools is None else tools
    if tools != Tools():
        data = list(data) or [Batch(dict(feeds), None) for feeds in samples]
    prepared = prepared_by(
        tools,
        Prepared(at_least(model, LEAST_OPSET), calibration, 0),
        data,
        method=method,
        percentile=percentile,
        on_status=on_status,
    )
    model, calibration = prepared.model, prepared.calibration

    def quantised_without(left: tuple[str, ...]) -> ir.Model:
        return quantised_by(tools, prepared, target, exclude=left, weights=weights, data=data, samples=samples)[0]

    nodes = [node for node in quantizable(model, dialect_of(target)) if node not in exclude]
    quantised = quantised_without(exclude)
    on_status("running the float model")
    expected = outputs_of(model, samples)
    own = {layer.node: layer.nmse for layer in layer_sensitivities(model, quantised, nodes, samples)}
    on_status("observing the activations")
    distributions = dict(observe(model, samples).distributions())
    total = noise_of(quantised, samples, expected)
    alone: dict[str, float] = {}
    for number, node in enumerate(nodes):
        on_status(f"{node} alone", number / len(nodes))
        others = tuple(name for name in nodes if name != node)
        try:
            only = quantised_without((*exclude, *others))
        except GraphError:  # it is quantised with its neighbours or not at all: a pooling, an activation
            continue
        alone[node] = noise_of(only, samples, expected)
    whole = sum(alone.values()) or 1.0
    by_name = {label(node): node for node in model.graph}
    layers = [
        LayerDebug(
            node=name,
            op_type=by_name[name].op_type,
            weight_sqnr_db=_weight_sqnr(by_name[name], quantised),
            input=_input(by_name[name]),
            input_sqnr_db=_input_sqnr(by_name[name], calibration, distributions),
            own_nmse=own.get(name, 0.0),
            alone_nmse=nmse,
            share=nmse / whole,
            flag=f"--exclude {name!r}",
            histogram=_histogram(by_name[name], calibration, distributions),
        )
        for name, nmse in alone.items()
    ]
    layers.sort(key=lambda layer: -layer.share)
    count = sum(len(next(iter(feeds.values()))) for feeds in samples)
    return QuantizationDebug(total, count, tuple(layers), str(tools))


def outputs_of(model: ir.Model, samples: Sequence[Feeds]) -> list[Feeds]:
    """What the graph gives on each of the samples, unoptimised."""
    with reference_session(model) as session:
        return [session.run(feeds) for feeds in samples]


def noise_of(model: ir.Model, samples: Sequence[Feeds], expected: Sequence[Feeds]) -> float:
    """Noise over signal of the graph's worst output against what was expected, the mean over the samples."""
    errors = [
        max(tensor_error(was[name], now[name]).nmse for name in was)
        for was, now in zip(expected, outputs_of(model, samples), strict=True)
    ]
    return float(np.mean(errors))


def _weight_sqnr(node: ir.Node, quantised: ir.Model) -> float | None:
    """Of the layer's constant input against what the quantised graph dequantises in its place."""
    twin = next((n for n in quantised.graph if label(n) == label(node)), None)
    if twin is None or len(node.inputs) < 2:
        return None
    tensor = constant(node.inputs[1])
    source = twin.inputs[1].producer() if twin.inputs[1] is not None else None
    if tensor is None or source is None or not is_op(source, "DequantizeLinear"):
        return None
    parts = [constant(value) for value in source.inputs]
    if parts[0] is None or parts[1] is None:
        return None
    integers, scale = parts[0].numpy().astype(np.float64), parts[1].numpy().astype(np.float64)
    zero = parts[2].numpy().astype(np.float64) if len(parts) > 2 and parts[2] is not None else np.zeros(())
    axis = source.attributes["axis"].as_int() if "axis" in source.attributes else 1
    if scale.ndim == 1:
        shape = [1] * integers.ndim
        shape[axis] = -1
        scale, zero = scale.reshape(shape), np.broadcast_to(zero, scale.shape).reshape(shape)
    return tensor_error(tensor.numpy(), (integers - zero) * scale).sqnr_db


def _input(node: ir.Node) -> str:
    """The name of the first activation, "" where it is left out."""
    value = node.inputs[0]
    return "" if value is None else value.name or ""


def _input_range(node: ir.Node, calibration: Calibration) -> tuple[str, TensorRange] | None:
    name = _input(node)
    return (name, calibration.ranges[name]) if name in calibration.ranges else None


def _input_sqnr(node: ir.Node, calibration: Calibration, seen: dict[str, Distribution]) -> float | None:
    """From the distribution: what rounding to 256 levels and clipping do to it."""
    found = _input_range(node, calibration)
    if found is None or found[0] not in seen:
        return None
    distribution, range_ = seen[found[0]], found[1]
    centres = (np.arange(2 * HALF_BINS) - HALF_BINS + 0.5) * distribution.width
    low, high = min(range_.low, 0.0), max(range_.high, 0.0)
    step = (high - low) / 255
    clipped = centres - np.clip(centres, low, high)
    noise = float(distribution.counts @ (clipped**2 + np.where(clipped == 0, step**2 / 12, 0.0)))
    signal = float(distribution.counts @ centres**2)
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


def _histogram(node: ir.Node, calibration: Calibration, seen: dict[str, Distribution]) -> Histogram | None:
    found = _input_range(node, calibration)
    if found is None or found[0] not in seen:
        return None
    distribution, range_ = seen[found[0]], found[1]
    edges = np.linspace(distribution.minimum, distribution.maximum, _BARS + 1)
    if edges[0] == edges[-1]:
        return None
    centres = (np.arange(2 * HALF_BINS) - HALF_BINS + 0.5) * distribution.width
    counts, _ = np.histogram(centres, bins=edges, weights=distribution.counts)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()), range_.low, range_.high)


def write_page(found: QuantizationDebug, path: Path, *, title: str) -> None:
    """The layers as one HTML page, each with the picture of its input's histogram. Raises StorageError."""
    text = escape.escape
    rows = "".join(
        f"<tr><td>{number}<td>{text(layer.node)}<br><span>{text(layer.op_type)}, reads {text(layer.input)}</span>"
        f"<td class=n>{layer.share:.1%}<td class=n>{layer.alone_nmse:.2g}<td class=n>{layer.own_nmse:.2g}"
        f"<td class=n>{_db(layer.weight_sqnr_db)}<td class=n>{_db(layer.input_sqnr_db)}"
        f"<td>{_picture(layer.histogram)}<td><code>{text(layer.flag)}</code>"
        for number, layer in enumerate(found.layers, start=1)
    )
    write_text(
        path,
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{text(title)}</title><style>{_STYLE}</style>"
        f"<h1>{text(title)}</h1><p>With everything in INT8 the output's noise is {found.total_nmse:.2g} of its signal, "
        f"on {found.samples} samples. A layer's share is what it adds when it alone is quantised. The histograms are "
        "of a layer's input, the bars' heights logarithmic; what lies outside the lines is clipped.</p>"
        "<table><tr><th>#<th>layer<th class=n>share<th class=n>alone<th class=n>own<th class=n>weight<th class=n>input"
        f"<th>input's histogram<th>leave it in float{rows}</table></html>\n",
    )


def _db(value: float | None) -> str:
    return "-" if value is None else "exact" if math.isinf(value) else f"{value:.1f} dB"


def _picture(histogram: Histogram | None) -> str:
    """An SVG of the bars, with a line at either end of what the quantiser covers."""
    if histogram is None:
        return "-"
    heights = np.log1p(np.asarray(histogram.counts))
    heights = heights / (heights.max() or 1.0)
    first, last = histogram.edges[0], histogram.edges[-1]
    bars = "".join(
        f'<rect x="{index * 2}" y="{40 - 40 * h:.1f}" width="2" height="{40 * h:.1f}"/>'
        for index, h in enumerate(heights)
        if h > 0
    )
    lines = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="40"/>'
        for bound in (histogram.low, histogram.high)
        for x in (2 * _BARS * min(max((bound - first) / (last - first), 0), 1),)
    )
    described = f"from {first:.3g} to {last:.3g}, covered from {histogram.low:.3g} to {histogram.high:.3g}"
    return (
        f'<svg viewBox="0 0 {2 * _BARS} 40" width="{2 * _BARS}" height="40" role="img"><title>{described}</title>'
        f"{bars}{lines}</svg><br><span>{described}</span>"
    )


_STYLE = """
:root { color-scheme: light dark; } body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid #8884; }
th { font-weight: 500; color: #888; } .n { text-align: right; white-space: nowrap; }
span { color: #888; font-size: 12px; }
svg { background: #8881; } rect { fill: #4f7cc4; } line { stroke: #c4532d; stroke-width: 1.5; }
"""
