"""Sets weights to zero, one by one or N of each M, by how little they matter.

::

    x -> Conv(w) -> y        x -> Conv(w * mask) -> y

What a weight is worth (``method``):

* l1: its magnitude, as in torch.nn.utils.prune (Han et al. 2015, arXiv 1506.02626).
* l2: within a layer that order; in scope global its share of the squared norm of its layer's weights that are not
  smaller (LAMP, Lee et al. 2021, arXiv 2010.07611), which does not depend on the scale of a layer. Folding
  BatchNormalization gives every layer a scale of its own, and l1 in scope global then empties layers.
* wanda: its magnitude times the norm of the input channel that it multiplies, |w| * ||x|| (Sun et al. 2023, "A Simple
  and Effective Pruning Approach for Large Language Models", arXiv 2306.11695); in scope global its share, as of l2.
  ``toolchain/layer_statistics.py`` gathers the norms.
* random: nothing; the control that every other method has to beat.

Measured on CIFAR ResNet-20 without any recovery, top-1 of 91.48 % at 50 and 70 % zeros: l2 global 88.7 and 62.3, wanda
global 88.4 and 57.4, wanda by channel 83.4 and 54.3, l1 by layer 85.8 and 41.7, l1 global 59.5 and 15.7, random 10 %
(``benchmarks/sparsity.py``).

``pattern`` "2:4" keeps 2 of each 4 consecutive *input channels*, at every tap of a convolution: the form that the
sparse kernels of TensorRT take (Mishra et al. 2021, arXiv 2104.08378; builder flag SPARSE_WEIGHTS). A last group that
is not full keeps as many as a full one, so that padding it with zeros keeps the promise.

**Zeros that lie anywhere do not make a dense runtime faster**: it multiplies by them. They make the file smaller
once it is compressed, and the outcome's remark says how much. Only ``pattern`` on a runtime with such kernels, or
``prune_channels``, saves time.

The name of a weight stays, so that masks can be kept by it; a weight that several layers read is pruned once, one
that anything else reads is left alone. Weights that are zero already count, and a second run changes nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes._graph import FLOATS, constant, given, is_op, scopes
from passes._linear import LINEAR, NotLinear, canonical, oriented
from passes.base import Declined, InvalidOption, Outcome, Pass, PassFailed, label
from passes.quantize_int8 import check_exclude

METHODS = ("l1", "l2", "wanda", "random")
SCOPES = ("layer", "channel", "global")
#: bytes of each weight that the compressed size is estimated from
_SAMPLE = 1 << 18


@dataclasses.dataclass(frozen=True, eq=False)
class InputNorms:
    """How large the inputs of layers are.

    Attributes:
        norms: for each layer, by ``passes.base.label`` of its node, the L2 norm of each of its input channels over
            all samples and places: float64 [I].
    """

    norms: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Masks:
    """Which weights stay.

    Attributes:
        masks: a bool array for each weight, True where it stays, in the weight's own shape and under its name; under
            ``NAME_mask``, as torch.nn.utils.prune names its buffers, in the shape that torch gives the weight, which
            for MatMul and Gemm without transB is the transposed one.
    """

    masks: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PruneWeights(Pass):
    """Sets the least important weights of Conv, ConvTranspose, Gemm and MatMul to zero.

    Attributes:
        sparsity: share of zeros afterwards, above 0 and below 1; None for 0.5, or for what ``pattern`` gives.
        method: l1, l2, wanda or random.
        scope: who competes: the weights of a layer, of an output channel, or of the whole model (global); None for
            global with l2, channel with wanda (as its authors do), else layer.
        pattern: N:M, such as 2:4: of each M consecutive input channels N stay.
        norms: of the layers' inputs, for wanda.
        masks: take these, and ask no method.
        seed: of random.
        exclude: nodes that stay as they are, by name, or as reports name them.
    """

    lossy: ClassVar[bool] = True

    sparsity: float | None = None
    method: str = "l2"
    scope: str | None = None
    pattern: str | None = None
    norms: InputNorms | None = dataclasses.field(default=None, repr=False)
    masks: Masks | None = dataclasses.field(default=None, repr=False)
    seed: int = 0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise InvalidOption(
                f"option sparsity of pass prune_weights is {self.sparsity}", hint="wanted: above 0 and below 1"
            )
        for option, allowed in (("method", METHODS), ("scope", (None, *SCOPES))):
            if getattr(self, option) not in allowed:
                raise InvalidOption(
                    f"option {option} of pass prune_weights is {getattr(self, option)!r}",
                    hint="wanted: " + ", ".join(a for a in allowed if a is not None),
                )
        if self.pattern is not None:
            parse_pattern(self.pattern)
            if self.sparsity is not None or self.scope is not None:
                raise InvalidOption(
                    f"pattern {self.pattern} says by itself how many weights go, and which compete",
                    hint="leave sparsity and scope out",
                )
        if self.masks is not None and (self.pattern or self.sparsity or self.scope or self.method != "l2"):
            raise InvalidOption("masks say by themselves which weights go", hint="give masks and exclude alone")

    def call(self, model: ir.Model) -> Outcome:
        if self.method == "wanda" and self.norms is None:
            raise PassFailed(
                "method wanda needs the norms of the layers' inputs",
                hint="gather them with toolchain.layer_statistics.input_norms, or take method l1",
            )
        check_exclude(model, self.exclude)
        layers, declined = _layers(model, self.exclude)
        if not layers and not declined:
            nothing = "the model has no layer with a constant weight: there is nothing to prune"
            return Outcome(model, False, remarks=(nothing,))
        if self.masks is not None:
            keep = _given_masks(layers, self.masks)
        else:
            keep = self._choose(layers, declined)
        changed: list[tuple[np.ndarray, np.ndarray]] = []
        for layer, mask in keep:
            before = layer.data
            zeros = before == 0
            if not (~mask & ~zeros).any():
                share = float(zeros.mean()) if zeros.size else 0.0
                there = f"{share:.1%} are zero already" if share else "none of it is to go"
                declined.append(Declined(layer.name, f"its weight needs no new zeros: {there}"))
                continue
            after = np.where(mask, before, np.zeros((), before.dtype))
            layer.write(after)
            changed.append((before, after))
        remarks = (_remark(changed, self.pattern),) if changed else ()
        return Outcome(model, bool(changed), fired=len(changed), declined=tuple(declined), remarks=remarks)

    def _choose(self, layers: Sequence[_Layer], declined: list[Declined]) -> list[tuple[_Layer, np.ndarray]]:
        scored: list[tuple[_Layer, np.ndarray]] = []
        for number, layer in enumerate(layers):
            try:
                scored.append((layer, self._scores(layer, number)))
            except NotLinear as reason:
                declined.append(Declined(layer.name, str(reason)))
        if self.pattern is not None:
            return self._by_pattern(scored, declined)
        share = 0.5 if self.sparsity is None else self.sparsity
        scope = self._scope()
        if scope == "global":
            every = np.concatenate([scores.reshape(-1) for _, scores in scored]) if scored else np.empty(0)
            kept = _keep_best(every[None], share)[0]
            ends = np.cumsum([scores.size for _, scores in scored])
            parts = np.split(kept, ends[:-1]) if scored else []
            return [(layer, layer.oriented(p.reshape(s.shape))) for (layer, s), p in zip(scored, parts, strict=True)]
        found = []
        for layer, scores in scored:
            rows = scores.reshape(scores.shape[0] * scores.shape[1] if scope == "channel" else 1, -1)
            found.append((layer, layer.oriented(_keep_best(rows, share).reshape(scores.shape))))
        return found

    def _scope(self) -> str:
        if self.pattern is not None:
            return "group"
        return self.scope or {"l2": "global", "wanda": "channel"}.get(self.method, "layer")

    def _by_pattern(
        self, scored: Sequence[tuple[_Layer, np.ndarray]], declined: list[Declined]
    ) -> list[tuple[_Layer, np.ndarray]]:
        assert self.pattern is not None
        keep, of = parse_pattern(self.pattern)
        found = []
        for layer, scores in scored:
            if scores.shape[2] < of:
                declined.append(
                    Declined(
                        layer.name,
                        f"it has {scores.shape[2]} input channels a group, less than the {of} of {self.pattern}",
                    )
                )
                continue
            found.append((layer, layer.oriented(_keep_in_groups(scores, keep, of))))
        return found

    def _scores(self, layer: _Layer, number: int) -> np.ndarray:
        """What each weight is worth, float64 [g, O/g, I/g, taps]; below 0 where it is zero already."""
        weight = canonical(layer.nodes[0], layer.data)
        if self.method == "random":
            scores = np.random.default_rng([self.seed, number]).random(weight.shape)
        else:
            scores = np.abs(weight)
            if self.method == "wanda":
                scores *= self._norms_of(layer, weight).reshape(weight.shape[0], 1, -1, 1)
            if self._scope() == "global" and self.method in ("l2", "wanda"):
                scores = _share_of_larger(scores)
        scores[weight == 0] = -1
        return scores

    def _norms_of(self, layer: _Layer, weight: np.ndarray) -> np.ndarray:
        assert self.norms is not None
        inputs, squares = weight.shape[0] * weight.shape[2], np.zeros(())
        for node in layer.nodes:
            norm = self.norms.norms.get(label(node))
            if norm is None or np.size(norm) != inputs:
                raise NotLinear(f"there is no norm for each of the {inputs} input channels of {label(node)}")
            squares = squares + np.square(np.asarray(norm, np.float64).reshape(-1))
        return np.sqrt(squares)


def parse_pattern(text: str) -> tuple[int, int]:
    """Reads ``N:M``: how many stay, of how many. Raises InvalidOption."""
    match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise InvalidOption(
            f"option pattern of pass prune_weights is {text!r}", hint="wanted: N:M with 0 < N < M, such as 2:4"
        )
    return int(match[1]), int(match[2])


def masks_of(model: ir.Model) -> Masks:
    """Where the weights of the model's layers are not zero, of those that have zeros, by the weight's name."""
    layers, _ = _layers(model, ())
    found = {layer.weight.name or layer.name: layer.data != 0 for layer in layers}
    return Masks({name: mask for name, mask in found.items() if not mask.all()})


def fits_pattern(model: ir.Model, pattern: str) -> dict[str, bool]:
    """For each layer with at least M input channels a group, by its node's label, whether its weight is N:M."""
    keep, of = parse_pattern(pattern)
    found = {}
    for layer in _layers(model, ())[0]:
        weight = canonical(layer.nodes[0], layer.data)
        if weight.shape[2] >= of:
            found[layer.name] = bool((_groups(weight != 0, of, False).sum(axis=-1) <= keep).all())
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """A weight, and the layers that read it."""

    weight: ir.Value
    nodes: tuple[ir.Node, ...]
    data: np.ndarray

    @property
    def name(self) -> str:
        return label(self.nodes[0])

    def oriented(self, mask: np.ndarray) -> np.ndarray:
        """A mask [g, O/g, I/g, taps] in the weight's own shape."""
        return oriented(self.nodes[0], mask, self.data.shape)

    def write(self, data: np.ndarray) -> None:
        tensor = ir.Tensor(np.ascontiguousarray(data), name=self.weight.name)
        producer = self.weight.producer()
        if producer is None:
            self.weight.const_value = tensor
        else:  # a Constant node, as the bodies of functions have
            producer.attributes.clear()
            producer.attributes.add(ir.AttrTensor("value", tensor))


def _layers(model: ir.Model, exclude: Sequence[str]) -> tuple[list[_Layer], list[Declined]]:
    readers: dict[ir.Value, list[ir.Node]] = {}
    for scope in scopes(model):
        for node in scope.graph:
            weight = given(node, 1)
            if is_op(node, *LINEAR) and weight is not None and constant(weight) is not None:
                readers.setdefault(weight, []).append(node)
    layers, declined = [], []
    for weight, nodes in readers.items():
        try:
            layers.append(_layer(weight, nodes, exclude))
        except NotLinear as reason:
            declined.append(Declined(label(nodes[0]), str(reason)))
    return layers, declined


def _layer(weight: ir.Value, nodes: list[ir.Node], exclude: Sequence[str]) -> _Layer:
    tensor = constant(weight)
    assert tensor is not None
    if any(label(node) in exclude for node in nodes):
        raise NotLinear("excluded")
    if tensor.dtype not in FLOATS:
        raise NotLinear(f"its weight is {tensor.dtype.name.lower()}")
    if weight.is_graph_output():
        raise NotLinear("its weight is an output of the graph")
    for node, index in weight.uses():
        if (index != 1 or not is_op(node, *LINEAR)) and not is_op(node, "Shape", "Size"):
            raise NotLinear(f"{label(node)} ({node.op_type}) reads its weight too")
    shapes = {canonical(node, np.empty(tensor.shape.numpy(), np.bool_)).shape for node in nodes}
    kinds = {(node.op_type, str(node.attributes.get("transB"))) for node in nodes}
    if len(shapes) != 1 or len(kinds) != 1:
        raise NotLinear("its weight is read in several ways")
    return _Layer(weight, tuple(nodes), tensor.numpy())


def _share_of_larger(magnitudes: np.ndarray) -> np.ndarray:
    """The square of each over the sum of the squares of all that are not smaller."""
    flat = np.square(magnitudes).reshape(-1)
    order = np.argsort(-flat, kind="stable")
    shares: np.ndarray = np.zeros_like(flat)
    total = np.cumsum(flat[order])
    shares[order] = flat[order] / np.where(total > 0, total, 1)
    return shares.reshape(magnitudes.shape)


def _keep_best(rows: np.ndarray, share: float) -> np.ndarray:
    """A bool array of the shape of ``rows`` [n, m], False for the lowest ``share`` of each row; of equals the first
    goes. Rounded down, so that no row loses all."""
    keep = np.ones(rows.shape, np.bool_)
    count = min(math.floor(share * rows.shape[1] + 1e-9), rows.shape[1] - 1) if rows.size else 0
    if count > 0:
        lowest = np.argsort(rows, axis=1, kind="stable")[:, :count]
        np.put_along_axis(keep, lowest, False, axis=1)
    return keep


def _groups(array: np.ndarray, of: int, fill: float | bool) -> np.ndarray:
    """[g, O/g, I/g, taps] as [g, O/g, taps, groups, M], the last group filled up."""
    moved = np.moveaxis(array, 2, 3)
    rest = -moved.shape[3] % of
    padded = np.pad(moved, [(0, 0)] * 3 + [(0, rest)], constant_values=fill)
    return padded.reshape(*moved.shape[:3], -1, of)


def _keep_in_groups(scores: np.ndarray, keep: int, of: int) -> np.ndarray:
    groups = _groups(scores, of, -2.0)
    best = np.zeros(groups.shape, np.bool_)
    np.put_along_axis(best, np.argsort(-groups, axis=-1, kind="stable")[..., :keep], True, axis=-1)
    flat = best.reshape(*groups.shape[:3], -1)[..., : scores.shape[2]]
    return np.moveaxis(flat, 3, 2)


def _given_masks(layers: Sequence[_Layer], masks: Masks) -> list[tuple[_Layer, np.ndarray]]:
    """The masks of the layers that have one. Raises PassFailed for one that is of no layer or of another shape."""
    by_weight = {str(layer.weight.name): layer for layer in layers}
    by_node = {label(node): layer for layer in layers for node in layer.nodes}
    found = []
    for key, mask in masks.masks.items():
        layer = by_weight.get(key) or by_node.get(key)
        torch_form = layer is None and key.endswith("_mask")
        if torch_form:
            layer = next((by_weight[name] for name in _torch_names(key) if name in by_weight), None)
        if layer is None:
            names = [*by_weight, *by_node]
            near = difflib.get_close_matches(key.removesuffix("_mask"), names, n=3, cutoff=0.4)
            raise PassFailed(
                f"there is no weight {key!r} to mask",
                hint=f"did you mean {' or '.join(near)}?" if near else "toolchain inspect --layers lists the layers",
            )
        mask = np.asarray(mask)
        if torch_form and mask.ndim == 2 and layer.nodes[0].op_type in ("Gemm", "MatMul"):
            mask = oriented(layer.nodes[0], mask[None, :, :, None], mask.shape)
        if mask.shape != layer.data.shape:
            raise PassFailed(
                f"the mask {key!r} is {list(mask.shape)}, the weight {list(layer.data.shape)}",
                node=layer.name,
                hint="a mask has the shape of its weight",
            )
        if mask.dtype.kind not in "bfiu" or not np.isin(mask, (0, 1)).all():
            raise PassFailed(f"the mask {key!r} holds other values than 0 and 1", node=layer.name)
        found.append((layer, mask.astype(np.bool_)))
    return found


def _torch_names(key: str) -> Iterator[str]:
    name = key.removesuffix("_mask")
    yield name
    yield name.removeprefix("module.")


def storage_remark(dense: ir.Model, pruned: ir.Model, pattern: str | None = None) -> str:
    """What the zeros of a pruned model are good for, beside the model before any of them: the remark of the pass, where
    the pass came after others of its kind."""
    held = {layer.name: layer.data for layer in _layers(dense, ())[0]}
    pairs = [(held[layer.name], layer.data) for layer in _layers(pruned, ())[0] if layer.name in held]
    return _remark([(a, b) for a, b in pairs if ((b == 0) & (a != 0)).any()], pattern)


def _remark(changed: Sequence[tuple[np.ndarray, np.ndarray]], pattern: str | None) -> str:
    """What the zeros are good for."""
    before = sum(_deflated(a) for a, _ in changed)
    after = sum(_deflated(b) for _, b in changed)
    zeros = sum(int((b == 0).sum()) for _, b in changed) / sum(b.size for _, b in changed)
    sizes = (
        f"{zeros:.1%} of the weights of {len(changed)} layers are zero; compressed (zlib, estimated) they take "
        f"{after / 1e6:.2f} MB in place of {before / 1e6:.2f}, uncompressed as much as before"
    )
    if pattern is None:
        return f"{sizes}. Zeros that lie anywhere do not make a dense runtime faster: prune_channels does"
    return f"{sizes}. {pattern} zeros only make runtimes faster that have kernels for them (TensorRT: 2:4)"


def _deflated(data: np.ndarray) -> float:
    """Bytes of the array under zlib, from a part of it."""
    raw = np.ascontiguousarray(data).reshape(-1)
    part = raw[: max(1, _SAMPLE // data.dtype.itemsize)]
    return len(zlib.compress(part.tobytes(), 1)) * raw.size / part.size
