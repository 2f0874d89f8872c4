"""Replaces a layer by two or more smaller ones of low rank, where that saves multiply-accumulates.

::

    x -> MatMul(w [I, O]) -> y          x -> MatMul([I, r]) -> MatMul([r, O]) -> y            r (I + O) < I O
    x -> Conv(w 1x1) -> y               x -> Conv(1x1, I to r) -> Conv(1x1, r to O) -> y
    x -> Conv(w k x k) -> y   tucker:   x -> Conv(1x1, I to s) -> Conv(k x k, s to r) -> Conv(1x1, r to O) -> y
                              cp:       x -> Conv(1x1, I to r) -> Conv(k x 1, each of r) -> Conv(1 x k, each of r)
                                          -> Conv(1x1, r to O) -> y

The factors are those of the singular value decomposition, of Tucker's, or of the canonical polyadic one; with
``moments`` of what is least in the layer's output (``_low_rank.py``, with the papers).

The rank is the least that keeps ``energy`` or stays within ``error`` (both of the weight, or with ``moments`` of the
output; energy = 1 - error^2), or the largest that costs at most ``ratio`` of the MACs. A square matrix of which that
is 0.9 has less than half its rank left, and a wide one most of its energy at half the MACs; so with scope global the
ratio is that of all layers together, and they are cut where the least energy is lost for what is saved: each layer's
losses over its costs, whole included, at their lower convex hull. Measured on MiniLM at 0.9 of the MACs: cosine to the
embeddings of the whole model 0.95 with moments and 0.92 without, against 0.91 and 0.71 of scope layer
(``benchmarks/sparsity.py``).

A layer stays as it is where the rank saves nothing, and the report says what it would have cost; so does one that
follows or leads another with nothing between, not even a bias: the two are factors already, and a second run changes
nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes._graph import FLOATS, Names, Scope, attribute_ints, constant, given, is_op, new_constant, only_use, scopes
from passes._linear import LINEAR, NotLinear, canonical, drop_unused, oriented
from passes._low_rank import Bound, Half, Layer, Plan, factorize, require_tensorly, share_out
from passes.base import RECORDS, Declined, InvalidOption, Outcome, Pass, label
from passes.quantize_int8 import check_exclude

#: a second run in scope global would cut what the first left whole
_RECORD = f"{RECORDS}factorize_low_rank"
KERNELS = ("tucker", "cp", "none")
SCOPES = ("global", "layer")
#: of a Conv: where its taps lie
_TAPS = ("pads", "strides", "dilations", "auto_pad")


@dataclasses.dataclass(frozen=True, eq=False)
class InputMoments:
    """How the inputs of layers vary together.

    Attributes:
        moments: for each layer, by ``passes.base.label`` of its node, E[x x^T] over samples and places of its input
            channels: float64 [I, I].
    """

    moments: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class FactorizeLowRank(Pass):
    """Replaces Gemm, MatMul and Conv by factors of low rank where that saves multiply-accumulates.

    Attributes:
        energy: least share of the squared singular values that is kept; 0.9 where none of the three is given.
        error: most that a layer may be off, relative to its weight's norm.
        ratio: most MACs that may be left.
        scope: of ratio: global (all layers together), or layer (each of them); cp knows the latter only.
        kernels: tucker, cp, or none, which leaves convolutions alone that are wider than one tap.
        moments: of the layers' inputs, for what is least in the output.
        least_saving: share of a layer's MACs that has to go for it to be worth another node.
        exclude: nodes that stay as they are, by name, or as reports name them.
    """

    lossy: ClassVar[bool] = True

    energy: float | None = None
    error: float | None = None
    ratio: float | None = None
    scope: str = "global"
    kernels: str = "tucker"
    moments: InputMoments | None = dataclasses.field(default=None, repr=False)
    least_saving: float = 0.05
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        asked = [name for name in ("energy", "error", "ratio") if getattr(self, name) is not None]
        if len(asked) > 1:
            raise InvalidOption(f"{' and '.join(asked)} of pass factorize_low_rank exclude each other")
        for name in (*asked, "least_saving"):
            value = getattr(self, name)
            if not (0 <= value < 1 if name == "least_saving" else 0 < value < 1):
                raise InvalidOption(
                    f"option {name} of pass factorize_low_rank is {value}", hint="wanted: above 0 and below 1"
                )
        for name, allowed in (("kernels", KERNELS), ("scope", SCOPES)):
            if getattr(self, name) not in allowed:
                raise InvalidOption(
                    f"option {name} of pass factorize_low_rank is {getattr(self, name)!r}",
                    hint="wanted: " + ", ".join(allowed),
                )

    def call(self, model: ir.Model) -> Outcome:
        if self.kernels == "cp":
            require_tensorly()
        check_exclude(model, self.exclude)
        together = self.ratio is not None and self.scope == "global" and self.kernels != "cp"
        if together and _RECORD in model.metadata_props:
            already = f"its layers share a ratio of {model.metadata_props[_RECORD]} already"
            return Outcome(model, False, declined=(Declined("model", already),))
        names = Names(model)
        declined: list[Declined] = []
        fired, before, after, cost = 0, 0, 0, 0
        found: list[tuple[Scope, ir.Node, Layer]] = []
        for scope in scopes(model):
            for node in scope.graph:
                if not is_op(node, *LINEAR) or constant(given(node, 1)) is None:
                    continue
                try:
                    if label(node) in self.exclude:
                        raise NotLinear("excluded")
                    found.append((scope, node, self._layer(node)))
                except NotLinear as reason:
                    declined.append(Declined(label(node), str(reason)))
        bound = self._bound()
        ratios = [self.ratio] * len(found)
        if together and self.ratio is not None:
            ratios = [*share_out([layer for _, _, layer in found], self.ratio, bound.worth)]
        for (scope, node, layer), ratio in zip(found, ratios, strict=True):
            cost += layer.cost
            try:
                if ratio == 1:
                    raise NotLinear("cutting other layers loses less for what it saves")
                plan = factorize(layer, dataclasses.replace(bound, ratio=ratio), cp=self.kernels == "cp")
            except NotLinear as reason:
                declined.append(Declined(label(node), str(reason)))
                continue
            _carry_out(scope, node, plan, names)
            fired += 1
            before, after = before + plan.before * layer.places, after + plan.after * layer.places
        if not fired:
            return Outcome(model, False, declined=tuple(declined))
        remarks = [
            f"{fired} layers keep {after / before:.1%} of their multiply-accumulates; each is two nodes or more now"
        ]
        if together:
            model.metadata_props[_RECORD] = f"{self.ratio:g}"
            left = 1 - (before - after) / cost
            if self.ratio is not None and left > self.ratio + 1e-9:
                remarks.append(f"a ratio of {self.ratio:g} cannot be reached: rank 1 of each leaves {left:.1%}")
        return Outcome(model, True, fired=fired, declined=tuple(declined), remarks=tuple(remarks))

    def _bound(self) -> Bound:
        lost = 1 - (0.9 if self.energy is None else self.energy) if self.error is None else self.error**2
        return Bound(self.ratio, lost, 1 - self.least_saving)

    def _layer(self, node: ir.Node) -> Layer:
        """What can be factorised. Raises NotLinear."""
        value = given(node, 1)
        tensor = constant(value)
        assert value is not None
        assert tensor is not None
        if tensor.dtype not in FLOATS:
            raise NotLinear(f"its weight is {tensor.dtype.name.lower()}")
        if len(value.uses()) != 1 or value.is_graph_output():
            others = ", ".join(label(user) for user, _ in value.uses() if user is not node) or "the graph's output"
            raise NotLinear(f"its weight is read by {others} too (fold_constants takes Shape away)")
        if (other := _other_factor(node)) is not None:
            raise NotLinear(f"it is a factor already: between it and {label(other)} there is nothing")
        if node.op_type == "ConvTranspose":
            raise NotLinear("a ConvTranspose is not factorised")
        weight = canonical(node, tensor.numpy())
        if weight.shape[0] != 1:
            raise NotLinear(f"it has {weight.shape[0]} groups: what is left of each is small already")
        half = self._half(node, weight.shape[2])
        places = _places(node)
        if weight.shape[3] == 1:
            return Layer(weight[0, :, :, 0], half, 1, places)
        if self.kernels == "none":
            raise NotLinear("kernels wider than one tap are left alone")
        kernel = weight[0].reshape(*weight.shape[1:3], *tensor.shape.numpy()[2:])
        return Layer(kernel, half, math.prod(attribute_ints(node, "strides") or (1,)), places)

    def _half(self, node: ir.Node, inputs: int) -> Half:
        """Of the moments of the node's inputs. Raises NotLinear where there are none."""
        if self.moments is None:
            return Half()
        found = self.moments.moments.get(label(node))
        if found is None or np.shape(found) != (inputs, inputs):
            raise NotLinear(f"there are no moments of its {inputs} input channels")
        return Half.of(found)


def _other_factor(node: ir.Node) -> ir.Node | None:
    """The layer that this one and nothing else reads, or that alone reads this one, with no bias between."""
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    if before is not None and _plain(before) and only_use(before.outputs[0]) is node:
        return before
    after = only_use(node.outputs[0]) if _plain(node) else None
    if after is not None and is_op(after, *LINEAR) and after.inputs[0] is node.outputs[0]:
        return after if constant(given(after, 1)) is not None else None
    return None


def _plain(node: ir.Node) -> bool:
    return is_op(node, *LINEAR) and constant(given(node, 1)) is not None and given(node, 2) is None


def _places(node: ir.Node) -> int:
    """How many places the output of a layer has in a sample, as far as it is written in the graph: of what is symbolic,
    such as the length of a sequence, there is one."""
    shape = node.outputs[0].shape
    if shape is None:
        return 1
    sizes = shape[2:] if node.op_type == "Conv" else shape[1:-1]
    return math.prod(size for size in sizes if isinstance(size, int) and size > 0)


def _carry_out(scope: Scope, node: ir.Node, plan: Plan, names: Names) -> None:
    """Puts the factors in the node's place; its output, bias and alpha are the last one's."""
    old = node.inputs[1]
    tensor = constant(old)
    assert tensor is not None
    assert old is not None
    dtype, output = tensor.dtype.numpy(), node.outputs[0]
    source = node.inputs[0]
    assert source is not None
    last = len(plan.factors) - 1
    axes = len(tensor.shape) - 2
    for number, factor in enumerate(plan.factors[:-1]):
        if node.op_type == "Conv":
            data, attributes = _kernel(node, factor, number, last, axes)
            op_type = "Conv"
        else:  # MatMul keeps all axes before the last, and Gemm has two
            data, attributes, op_type = factor.T, [], "MatMul"
        name = names.fresh(f"{output.name}_factor_{number}")
        weight = new_constant(
            scope, np.ascontiguousarray(data).astype(dtype), names.fresh(f"{name}_weight"), before=node
        )
        made = ir.Node("", op_type, [source, weight], attributes, name=names.fresh(f"{label(node)}_factor_{number}"))
        made.outputs[0].name, made.outputs[0].type = name, ir.TensorType(tensor.dtype)
        assert node.graph is not None
        node.graph.insert_before(node, made)
        source = made.outputs[0]
    data = plan.factors[-1]
    if node.op_type == "Conv":
        data = data.reshape(*data.shape, *[1] * axes)
        for name in (*_TAPS, "kernel_shape"):
            node.attributes.pop(name, None)
    else:
        data = oriented(node, data[None, :, :, None], data.shape)
    name = names.fresh(f"{output.name}_weight")
    weight = new_constant(scope, np.ascontiguousarray(data).astype(dtype), name, before=node)
    node.replace_input_with(0, source)
    node.replace_input_with(1, weight)
    drop_unused(old)


def _kernel(node: ir.Node, factor: np.ndarray, number: int, last: int, axes: int) -> tuple[np.ndarray, list[ir.Attr]]:
    """The weight and attributes of a factor of a Conv. Where it has one tap only, the first does the stepping, in fewer
    places; else the first keeps all places, so that the border is that of the kernel."""
    taps = [a for name, a in node.attributes.items() if name in _TAPS]
    if number == 0:
        return factor.reshape(*factor.shape, *[1] * axes), taps if last == 1 else []
    if factor.ndim > 2:
        return factor, taps
    axis = number - 1
    shape = [len(factor), 1, *[1] * axes]
    shape[2 + axis] = factor.shape[1]
    attributes = [ir.AttrInt64("group", len(factor))]
    for name, neutral in (("strides", 1), ("dilations", 1)):
        if (given_values := attribute_ints(node, name)) is not None:
            attributes.append(ir.AttrInt64s(name, [v if i == axis else neutral for i, v in enumerate(given_values)]))
    if (pads := attribute_ints(node, "pads")) is not None:
        attributes.append(ir.AttrInt64s("pads", [v if i % axes == axis else 0 for i, v in enumerate(pads)]))
    if "auto_pad" in node.attributes:
        attributes.append(node.attributes["auto_pad"])
    return factor.reshape(shape), attributes
