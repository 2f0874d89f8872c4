"""Reconstruction: a pruned graph's layers are fitted, without training, to what the dense graph computes.

::

    dense   x ──Conv w──▶ y              minimise  Σ |y - (w'x' + b')|²  over calibration data
    pruned  x'──Conv w'─▶ y'             x' as the layers before give it, which are fitted already

Layer after layer, in the order of the graph, the weights that are left and the bias are solved for by least squares
(He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv 1707.06168, section 3.1.2; ThiNet,
Luo et al. 2017, arXiv 1707.06342). It is asymmetric: inputs are the pruned graph's, targets the dense one's, so that a
layer also takes back what those before it lost. Where a layer's output is added to something else, the target is the
dense sum less the pruned graph's other summand (section 3.2 there). Zeros of a weight that was pruned one by one
stay zero; each output is then solved for on what is left of its weights.

A ridge draws the solution to the weights as they were, so that what the data do not tell stays; how strong it is,
each layer finds out by fitting on one half of the samples and looking at the other. ``method="bias"`` keeps the weights
and moves the bias alone, by the difference of the means (Finkelstein et al. 2019, arXiv 1906.03193), which is cheap.

One pass over the samples, piece by piece (``pieces.py``). A layer costs the moments of its inputs, two matrices of
d x d doubles for d weights of an output.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from passes._channel_cut import Cut
from passes._channel_groups import find_groups
from passes._graph import Names, Scope, constant, default_opset, is_op, new_constant, only_use, set_constant, set_inputs
from passes._linear import LINEAR, Linear, NotLinear, oriented, read_linear
from passes.base import Declined, PassFailed, label
from passes.prune_channels import cut_of, prepared_copy
from toolchain.errors import DataError, GraphError
from toolchain.evaluate import Feeds
from toolchain.least_squares import RIDGES, Moments, Solution, places, rows, solve
from toolchain.pieces import Pieces, Store

Method = Literal["least-squares", "bias"]

#: a relative squared error that sums of float32 products do not tell from none
_EXACT = 1e-6


@dataclasses.dataclass(frozen=True, slots=True)
class FittedLayer:
    """What became of one layer.

    Attributes:
        node: its label.
        before, after: squared error of its output against its target, over the target's square, with the weights as
            they were and as they are; on samples that it was not fitted on.
        ridge: that was chosen, relative to the mean square of an input; ``inf`` where only the bias moved.
        compensates: whether what its output is added to is part of the target.
    """

    node: str
    before: float
    after: float
    ridge: float
    compensates: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Reconstruction:
    """What was done.

    Attributes:
        layers: those that have other weights now, in the order of the graph.
        declined: those that have not, and why.
        samples: on how many samples.
    """

    layers: tuple[FittedLayer, ...]
    declined: tuple[Declined, ...]
    samples: int


@dataclasses.dataclass(eq=False)
class _Layer:
    """A layer of the pruned graph that is to be fitted.

    Attributes:
        linear: its weight; the bias as it is now, zeros where there is none.
        source: name of what it reads.
        target: name of the dense value that it is to give, before ``other`` is taken off.
        other: name of the value of the pruned graph that is added to its output, if any.
        bias_of: the node that adds its bias, itself or an Add, and the index of that input; None where there can be
            none.
    """

    linear: Linear
    source: str
    target: str
    other: str | None
    bias_of: tuple[ir.Node, int] | None

    @property
    def node(self) -> ir.Node:
        return self.linear.node


def reconstruct(
    dense: ir.Model,
    pruned: ir.Model,
    samples: Iterable[Feeds],
    *,
    method: Method = "least-squares",
    ridge: float | None = None,
    cut: Cut | None = None,
    max_rows: int = 200_000,
    memory: int = 1 << 29,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reconstruction:
    """Fits the layers of a pruned graph to the dense one, in place. Names of weights and values stay.

    Args:
        dense: the graph before it was pruned, at the same stage of the same passes; it stays as it is.
        pruned: by ``prune_channels``, ``prune_weights`` or both; gets new weights.
        samples: inputs, in batches of any size; gone through once. 256 to 1,000 images are usual.
        method: see the module.
        ridge: relative to the mean square of a layer's inputs; None lets each layer find its own.
        cut: what was taken out of the dense graph; None reads what ``prune_channels`` noted in the pruned one.
        max_rows: so many places of all samples, drawn at random, are enough for a layer.
        memory: bytes of activations that are kept in memory; beyond them they go to a temporary folder.
        seed: of the places.
        on_progress: is called with the number of layers done, and of all.

    Raises:
        DataError: no samples, or activations that are not finite.
        GraphError: the pruned graph is not made of the dense one, or an option is out of range.
        InvalidInput, RunFailed, CompileFailed: a sample does not fit, or a graph fails.
        StorageError: no space for activations.
    """
    ridges = _ridges(method, ridge)
    if max_rows < 2:
        raise GraphError(f"max_rows is {max_rows}", hint="some thousands at least")
    try:
        whole = prepared_copy(dense)
        removed = _removed(whole, cut_of(pruned) if cut is None else cut)
    except PassFailed as error:
        raise GraphError(str(error), where=error.node, hint=error.hint) from error
    layers, declined = _layers(whole, pruned)
    fitted = []
    names, rng = Names(pruned), np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="toolchain-") as folder:
        store = Store(Path(folder), memory)
        mine, theirs = Pieces(pruned, store, ()), Pieces(whole, store, {layer.target for layer in layers})
        count = 0
        for feeds in samples:
            mine.feed(feeds)
            theirs.feed(feeds)
            count += len(next((a for a in feeds.values() if np.ndim(a)), [0]))
        if not mine.count:
            raise DataError("there are no samples to reconstruct on", hint="give at least 64; 256 to 1,000 are usual")
        left = [layer.target for layer in layers]
        for done, layer in enumerate(layers):
            mine.advance(layer.source)
            if layer.other is not None:
                mine.advance(layer.other)
            theirs.advance(layer.target)
            halves = _moments(layer, mine, theirs, removed, max_rows, rng)
            found = _fit(layer, halves, ridges) if halves else None
            power = sum(half.power for half in halves) / max(len(halves), 1) or 1.0
            if found is None:
                declined.append(Declined(label(layer.node), "the samples have too few places to fit it on"))
            elif found.before <= _EXACT * power:
                declined.append(Declined(label(layer.node), "it gives what the dense graph does already"))
            elif found.after < found.before:
                _write(pruned, layer, found, names)
                fitted.append(
                    FittedLayer(
                        label(layer.node),
                        found.before / power,
                        found.after / power,
                        found.ridge,
                        layer.other is not None,
                    )
                )
            else:
                declined.append(Declined(label(layer.node), "no other weights are better on samples not fitted on"))
            left.pop(0)
            if layer.target not in left:
                theirs.release([layer.target])
            on_progress(done + 1, len(layers))
    return Reconstruction(tuple(fitted), tuple(declined), count)


def _ridges(method: str, ridge: float | None) -> tuple[float, ...]:
    if method not in ("least-squares", "bias"):
        raise GraphError(f"there is no method {method!r}", hint="wanted: least-squares or bias")
    if ridge is not None and not 0 <= ridge < math.inf:
        raise GraphError(f"ridge is {ridge}", hint="0 or more; 0.001 is usual, None finds it")
    if method == "bias":
        return (math.inf,)
    return (*RIDGES, math.inf) if ridge is None else (ridge,)


def _removed(dense: ir.Model, cut: Cut) -> dict[tuple[str, int], np.ndarray]:
    """For each value of the dense graph and axis what was taken out of it: int64."""
    if not cut.channels:
        return {}
    groups = {group.name: group for group in find_groups(dense)}
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    for name, channels in cut.channels.items():
        group = groups.get(name)
        if group is None or max(channels, default=0) >= group.count:
            raise GraphError(
                f"the pruned graph has lost channels of {name!r}, which the dense graph does not have",
                hint="give the very graph that was pruned, behind the same passes, or the cut itself",
            )
        for member in group.members:
            found.setdefault((member.value, member.axis), []).append(member.positions[list(channels)].reshape(-1))
    return {key: np.concatenate(each) for key, each in found.items()}


def _layers(dense: ir.Model, pruned: ir.Model) -> tuple[list[_Layer], list[Declined]]:
    """The layers of the pruned graph in order, each with its target."""
    there = {str(value.name) for node in dense.graph for value in node.outputs if value.name}
    order = {node: index for index, node in enumerate(pruned.graph)}
    found, declined = [], []
    for node in pruned.graph:
        if not is_op(node, *LINEAR):
            continue
        source = node.inputs[0]
        if node.op_type == "ConvTranspose":
            declined.append(Declined(label(node), "a ConvTranspose is left as it is"))
            continue
        try:
            linear = read_linear(node)
        except NotLinear as reason:
            declined.append(Declined(label(node), str(reason)))
            continue
        if source is None or constant(source) is not None:
            declined.append(Declined(label(node), "its input is a constant"))
            continue
        output, bias_of = _bias(linear)
        target, other = str(output.name), None
        add = only_use(output)
        if add is not None and is_op(add, "Add") and str(add.outputs[0].name) in there:
            summand = add.inputs[1 - list(add.inputs).index(output)]
            maker = None if summand is None else summand.producer()
            # one that is computed later may depend on layers that are not fitted yet
            if summand is not None and constant(summand) is None and (maker is None or order[maker] < order[node]):
                target, other = str(add.outputs[0].name), str(summand.name)
        if target not in there:
            declined.append(Declined(label(node), "the dense graph has no value of this name"))
            continue
        found.append(_Layer(linear, str(source.name), target, other, bias_of))
    if not found:
        raise GraphError(
            "no layer of the pruned graph is one of the dense graph's", hint="give the graph that was pruned"
        )
    return found, declined


def _bias(linear: Linear) -> tuple[ir.Value, tuple[ir.Node, int] | None]:
    """The layer's output with its bias, and where that bias is; MatMul has none, the Add behind it may."""
    node, output = linear.node, linear.node.outputs[0]
    if node.op_type != "MatMul":
        if linear.bias is None:
            linear.bias = np.zeros(linear.outputs)
        return output, (node, 2)
    linear.bias = np.zeros(linear.outputs)
    add = only_use(output)
    if add is None or not is_op(add, "Add"):
        return output, None
    index = 1 - list(add.inputs).index(output)
    tensor = constant(add.inputs[index])
    if tensor is None or tensor.size != linear.outputs or tensor.shape.numpy()[-1] != linear.outputs:
        return output, None
    linear.bias = tensor.numpy().astype(np.float64).reshape(-1)
    return add.outputs[0], (add, index)


def _moments(
    layer: _Layer,
    mine: Pieces,
    theirs: Pieces,
    removed: Mapping[tuple[str, int], np.ndarray],
    max_rows: int,
    rng: np.random.Generator,
) -> list[Moments]:
    """The sums over the rows of two halves of the samples: of one where there is one sample, none of too few rows."""
    node, shape = layer.node, layer.linear.weight.shape
    kernel = tuple(layer.node.inputs[1].shape)[2:] if node.op_type == "Conv" else ()  # type: ignore[union-attr, arg-type]
    axis = 1 if node.op_type == "Conv" else -1
    names = [layer.source, *([] if layer.other is None else [layer.other])]
    halves = [Moments.empty(shape[0], shape[2] * shape[3], shape[1]) for _ in range(2)]
    first = 0
    share: float | None = None
    for inputs, targets in zip(mine.batches(names), theirs.batches([layer.target]), strict=True):
        x, y = inputs[layer.source], targets[layer.target]
        for place in range(y.ndim):
            gone = removed.get((layer.target, place))
            if gone is not None:
                y = np.delete(y, gone, axis=place)
        if y.shape[axis] != layer.linear.outputs:
            raise GraphError(
                f"the layer has {layer.linear.outputs} outputs, what is left of the dense graph's {y.shape[axis]}",
                where=label(node),
                hint="give the graph that was pruned, and the cut if something else than prune_channels made it",
            )
        if layer.other is not None:
            y = y - inputs[layer.other]
        count = places(node, x, y)
        share = min(1.0, max_rows / max(count * theirs.count, 1)) if share is None else share
        chosen = np.flatnonzero(rng.random(count) < share) if share < 1 else np.arange(count)
        for left, right, sample in rows(node, x * layer.linear.alpha, y, kernel, shape[0], chosen):
            odd = (sample + first) % 2 == 1
            for half, part in zip(halves, (~odd, odd), strict=True):
                if part.any():
                    half.add(left[part], right[part])
        first += len(x)
    return [half for half in halves if half.count > 1]


def _fit(layer: _Layer, halves: Sequence[Moments], ridges: Sequence[float]) -> Solution:
    weight = layer.linear.weight
    g, o, i, taps = weight.shape
    matrix = weight.reshape(g, o, i * taps).transpose(0, 2, 1)
    assert layer.linear.bias is not None
    mask = matrix != 0
    return solve(
        halves,
        matrix,
        layer.linear.bias.reshape(g, o),
        ridges=ridges,
        intercept=layer.bias_of is not None,
        mask=None if mask.all() else mask,
    )


def _write(model: ir.Model, layer: _Layer, found: Solution, names: Names) -> None:
    """Gives the layer its weights under the names that they have; a bias is added where there was none."""
    weight = layer.linear.weight
    g, o, i, taps = weight.shape
    value = layer.node.inputs[1]
    tensor = constant(value)
    assert value is not None
    assert tensor is not None
    dtype, shape = tensor.dtype.numpy(), tuple(tensor.shape.numpy())
    new = found.weight.transpose(0, 2, 1).reshape(g, o, i, taps)
    set_constant(value, np.ascontiguousarray(oriented(layer.node, new, shape)).astype(dtype))
    if layer.bias_of is None:
        return
    node, index = layer.bias_of
    bias = found.bias.reshape(-1)
    old = node.inputs[index] if index < len(node.inputs) else None
    held = constant(old)
    if (
        old is not None
        and held is not None
        and len(old.uses()) == 1
        and held.size == bias.size
        and not old.is_graph_output()
    ):
        beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
        if beta != 0:
            set_constant(old, (bias / beta).reshape(tuple(held.shape.numpy())).astype(dtype))
            return
    scope = Scope(model.graph, default_opset(model.opset_imports), False)
    fresh = new_constant(scope, bias.astype(dtype), names.fresh(f"{node.outputs[0].name}_bias"), before=node)
    set_inputs(node, [*node.inputs[:index], fresh, *node.inputs[index + 1 :]])
    if node.op_type == "Gemm":
        node.attributes.add(ir.AttrFloat32("beta", 1.0))
