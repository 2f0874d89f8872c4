"""How much each quantised layer hurts, from one forward pass for all of them.

Every layer of the quantised graph is run on the *float* model's activations, so what comes out differs from the
float layer's output by this layer's own rounding and nothing else. Noise of independent layers adds up, so the
ratio of that noise to the signal ranks the layers by what they may add to the final error. It finds what is bad by
itself; among layers that are all good it says little. Rank correlation with the exact way (quantise one layer alone,
run the whole model, once for each layer; ``benchmarks/sensitivity.py``) is 0.57 on EfficientNet-Lite0, 0.41 on MiniLM
and 0.2 on ResNet-20, where no layer stands out. To weigh the noise by how much of it would arrive at the output, were
it white, made that 0.15: rounding noise is not white.

What a layer loses by the rounding of its input is lost where that input is quantised, and an integer kernel
quantises its output: so the layers before inherit the noise of the one after, and both are returned together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from passes.base import label
from toolchain.evaluate import Feeds, reference_session, with_outputs
from toolchain.metrics import noise_to_signal

#: Appended to the name of a value where the quantised graph is fed the float model's.
_FLOAT = "__float"


@dataclasses.dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """One layer's own rounding noise.

    Attributes:
        node: as ``QuantizeInt8.exclude`` takes it.
        op_type: its operator.
        nmse: noise over signal of its output, with float inputs; the mean over the samples.
        rank: what it is ranked by: the largest ``nmse`` of itself and the layers that read it.
    """

    node: str
    op_type: str
    nmse: float
    rank: float


def layer_sensitivities(
    model: ir.Model, quantised: ir.Model, nodes: Iterable[str], samples: Sequence[Feeds]
) -> list[LayerSensitivity]:
    """Ranks the quantised nodes, the worst first.

    Args:
        model: the float graph that ``quantised`` was made from.
        quantised: with Q/DQ; its float values keep the names that they have in ``model``.
        nodes: the names of the nodes to rank, from ``passes.quantize_int8.quantizable``.
        samples: inputs; memory is that of all activations of one sample, so keep its batch small.
    """
    wanted = set(nodes)
    outputs = {
        label(node): node.outputs[0].name
        for node in model.graph
        if label(node) in wanted and node.outputs and node.outputs[0].name
    }
    cut, fed = _cut(quantised, {value.name for node in model.graph for value in node.outputs})
    produced = {value.name for node in cut.graph for value in node.outputs}
    compared = {node: name for node, name in outputs.items() if name in produced}
    kinds = {label(node): node.op_type for node in model.graph}
    total = dict.fromkeys(compared, 0.0)
    names = sorted(set(compared.values()))
    with (
        reference_session(model, extra_outputs=sorted({*names, *fed})) as float_session,
        reference_session(with_outputs(cut, names)) as cut_session,
    ):
        for sample in samples:
            expected = float_session.run(sample)
            feeds = {name + _FLOAT: expected[name] for name in fed}
            used = {spec.name for spec in cut_session.inputs}
            got = cut_session.run({**{k: v for k, v in sample.items() if k in used}, **feeds})
            for node, name in compared.items():
                total[node] += noise_to_signal(expected[name], got[name]) / len(samples)
    readers = _readers(model, set(total))
    ranked = [
        LayerSensitivity(node, kinds[node], nmse, max(nmse, *(total[r] for r in readers[node]), 0.0))
        for node, nmse in total.items()
    ]
    # of two with one rank the reader first: where inputs alone are quantised it is enough
    return sorted(ranked, key=lambda layer: (-layer.rank, -layer.nmse))


def _readers(model: ir.Model, nodes: set[str]) -> dict[str, set[str]]:
    """For each of the nodes those among them that read its output, through nodes that are not among them."""
    found: dict[str, set[str]] = {}
    for node in model.graph:
        if label(node) not in nodes:
            continue
        reached: set[str] = set()
        waiting = [user for value in node.outputs for user, _ in value.uses()]
        seen: set[ir.Node] = set()
        while waiting:
            user = waiting.pop()
            if user in seen:
                continue
            seen.add(user)
            if label(user) in nodes:
                reached.add(label(user))
            else:
                waiting += [next_ for value in user.outputs for next_, _ in value.uses()]
        found[label(node)] = reached
    return found


def _cut(quantised: ir.Model, float_names: set[str | None]) -> tuple[ir.Model, list[str]]:
    """The quantised graph with every QuantizeLinear reading a new input in place of the layer before it."""
    copy = quantised.clone()
    inputs: dict[str, ir.Value] = {}
    for node in list(copy.graph):
        if node.op_type != "QuantizeLinear":
            continue
        value = node.inputs[0]
        if value is None or value.producer() is None or value.name not in float_names:
            continue
        assert value.name is not None
        if value.name not in inputs:
            inputs[value.name] = ir.Value(name=value.name + _FLOAT, type=value.type, shape=value.shape)
        node.replace_input_with(0, inputs[value.name])
    copy.graph.inputs.extend(inputs.values())
    return copy, list(inputs)
