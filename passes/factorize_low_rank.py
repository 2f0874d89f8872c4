"""Replaces a layer by two or more smaller ones of low rank, where that saves multiply-accumulates.

::

    x -> MatMul(w [I, O]) -> y          x -> MatMul([I, r]) -> MatMul([r, O]) -> y            r (I + O) < I O
    x -> Conv(w 1x1) -> y               x -> Conv(1x1, I to r) -> Conv(1x1, r to O) -> y
    x -> Conv(w k x k) -> y   tucker:   x -> Conv(1x1, I to s) -> Conv(k x k, s to r) -> Conv(1x1, r to O) -> y
                              cp:       x -> Conv(1x1, I to r) -> Conv(k x 1, each of r) -> Conv(1 x k, each of r)
                                          -> Conv(1x1, r to O) -> y

Matrices: the truncated singular value decomposition, the best of its rank (Eckart and Young 1936). Kernels: Tucker's
decomposition over both channel axes (Kim et al. 2016, arXiv 1511.06530), found by orthogonal iteration from the
higher-order SVD (De Lathauwer et al. 2000); or the canonical polyadic one (Lebedev et al. 2015, arXiv 1412.6553), by
tensorly's alternating least squares.

With ``moments``, S = E[x x^T] of the layer's input, what is kept small is the error of the *output*: W L with
S = L L^T is decomposed, and what multiplies x gets L^-1 from the right (Wang et al. 2024, "SVD-LLM", arXiv 2403.07378).
For a k x k kernel S is that of single places, which neglects how neighbours depend on each other.

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
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from passes._graph import FLOATS, Names, Scope, attribute_ints, constant, given, is_op, new_constant, only_use, scopes
from passes._linear import LINEAR, NotLinear, canonical, drop_unused, oriented
from passes.base import RECORDS, Declined, InvalidOption, Outcome, Pass, PassFailed, label
from passes.quantize_int8 import check_exclude

#: of the mean of the moments, added to each so that channels that were always zero can be divided by
_DAMPING = 1e-6
_ITERATIONS = 5
_CP_SWEEPS = 60
#: a second run in scope global would cut what the first left whole
_RECORD = f"{RECORDS}factorize_low_rank"
SCOPES = ("global", "layer")
#: shares of a layer's MACs at which scope global looks
_GRID = tuple(step / 40 for step in range(1, 40))


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
        given = [name for name in ("energy", "error", "ratio") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidOption(f"{' and '.join(given)} of pass factorize_low_rank exclude each other")
        for name in (*given, "least_saving"):
            value = getattr(self, name)
            if not (0 <= value < 1 if name == "least_saving" else 0 < value < 1):
                raise InvalidOption(
                    f"option {name} of pass factorize_low_rank is {value}", hint="wanted: above 0 and below 1"
                )
        if self.kernels not in ("tucker", "cp", "none"):
            raise InvalidOption(
                f"option kernels of pass factorize_low_rank is {self.kernels!r}", hint="wanted: tucker, cp, none"
            )
        if self.scope not in SCOPES:
            raise InvalidOption(
                f"option scope of pass factorize_low_rank is {self.scope!r}", hint=f"wanted: {', '.join(SCOPES)}"
            )

    def call(self, model: ir.Model) -> Outcome:
        if self.kernels == "cp":
            _tensorly()
        check_exclude(model, self.exclude)
        together = self.ratio is not None and self.scope == "global" and self.kernels != "cp"
        if together and _RECORD in model.metadata_props:
            return Outcome(
                model, False, remarks=(f"its layers share a ratio of {model.metadata_props[_RECORD]} already",)
            )
        names = Names(model)
        declined: list[Declined] = []
        fired, before, after, cost = 0, 0, 0, 0
        found: list[tuple[Scope, ir.Node, _Layer]] = []
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
        ratios = self._together([layer for _, _, layer in found]) if together else [self.ratio] * len(found)
        for (scope, node, layer), ratio in zip(found, ratios, strict=True):
            cost += layer.weight.size * layer.places
            try:
                if ratio == 1:
                    raise NotLinear("cutting other layers loses less for what it saves")
                plan = dataclasses.replace(self, ratio=ratio)._plan(layer)
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

    def _layer(self, node: ir.Node) -> _Layer:
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
            return _Layer(weight[0, :, :, 0], half, 1, places)
        if self.kernels == "none":
            raise NotLinear("kernels wider than one tap are left alone")
        kernel = weight[0].reshape(*weight.shape[1:3], *tensor.shape.numpy()[2:])
        return _Layer(kernel, half, math.prod(attribute_ints(node, "strides") or (1,)), places)

    def _plan(self, layer: _Layer) -> _Plan:
        """Raises NotLinear where it saves nothing."""
        if layer.weight.ndim == 2:
            plan = self._matrix(layer.weight, layer.half)
        else:
            make = self._tucker if self.kernels == "tucker" else self._cp
            plan = make(layer.weight, layer.half, layer.stepping)
        if plan.after > (1 - self.least_saving) * plan.before:
            raise NotLinear(f"{plan.how} would take {plan.after / plan.before:.0%} of its MACs")
        return plan

    def _together(self, layers: Sequence[_Layer]) -> Sequence[float | None]:
        """What each layer is to keep, so that together they keep the ratio or as near as they come; 1 is all of it."""
        assert self.ratio is not None
        kept = [1.0] * len(layers)
        costs = [layer.weight.size * layer.places for layer in layers]
        steps = []
        for index, layer in enumerate(layers):
            hull = _hull([(1.0, 0.0), *_curve(layer, [r for r in _GRID if r <= 1 - self.least_saving])])
            for (ratio, lost), (less, more) in itertools.pairwise(hull):
                steps.append(((more - lost) / ((ratio - less) * costs[index]), index, less))
        over = (1 - self.ratio) * sum(costs)
        for _, index, ratio in sorted(steps):  # along a hull the steps get dearer, so those of a layer are in order
            if over <= 0:
                break
            saved = (kept[index] - ratio) * costs[index]
            # the last goes no further than it has to
            last = min(kept[index] - over / costs[index], 1 - self.least_saving) if saved > over else ratio
            over -= (kept[index] - last) * costs[index]
            kept[index] = last
        return kept

    def _half(self, node: ir.Node, inputs: int) -> _Half:
        """The L of S = L L^T, and its inverse."""
        if self.moments is None:
            return _Half(None, None)
        found = self.moments.moments.get(label(node))
        if found is None or np.shape(found) != (inputs, inputs):
            raise NotLinear(f"there are no moments of its {inputs} input channels")
        values, vectors = np.linalg.eigh(np.asarray(found, np.float64))
        values = np.sqrt(np.maximum(values, 0) + _DAMPING * max(float(values.mean()), 1e-30))
        return _Half((vectors * values) @ vectors.T, (vectors / values) @ vectors.T)

    def _rank(self, singular: np.ndarray) -> int | None:
        """The least rank within the bound; None where the ratio decides."""
        if self.ratio is not None:
            return None
        energy = 1 - self._lost()
        squares = np.square(singular)
        total = float(squares.sum())
        kept: np.ndarray = np.cumsum(squares) / total if total else np.ones(len(squares))
        return min(int(np.searchsorted(kept, energy - 1e-12)) + 1, len(singular))

    def _matrix(self, matrix: np.ndarray, half: _Half) -> _Plan:
        """[O, I] as [O, r] times [r, I]."""
        outputs, inputs = matrix.shape
        u, s, vt = np.linalg.svd(half.weighted(matrix), full_matrices=False)
        rank = self._rank(s)
        if rank is None:
            assert self.ratio is not None
            rank = _matrix_rank(matrix.shape, self.ratio)
        if rank < 1:
            raise NotLinear(f"rank 1 would take {(outputs + inputs) / (outputs * inputs):.0%} of its MACs")
        root = np.sqrt(s[:rank])
        first, second = half.back(root[:, None] * vt[:rank]), u[:, :rank] * root
        return _Plan(
            (first, second), outputs * inputs, rank * (outputs + inputs), f"rank {rank} of {min(matrix.shape)}"
        )

    def _tucker(self, kernel: np.ndarray, half: _Half, positions: int) -> _Plan:
        """[O, I, k...] as [O, r], [r, s, k...] and [s, I]."""
        outputs, inputs, before = kernel.shape[0], kernel.shape[1], kernel.size
        weighted = half.weighted(kernel)
        (left, s_left), (right, s_right) = _bases(weighted)
        if self.ratio is not None:
            r, s = _tucker_ranks(kernel.shape, positions, self.ratio)
        else:
            # what both modes lose adds up at most, so each may lose half
            share = dataclasses.replace(self, energy=1 - self._lost() / 2, error=None)
            r, s = share._rank(s_left) or 1, share._rank(s_right) or 1
        after = _tucker_cost(kernel.shape, positions, r, s)
        if after <= (1 - self.least_saving) * before:
            left, right = _orthogonal_iteration(weighted, left[:, :r], right[:, :s])
        core = np.einsum("oi...,or,is->rs...", weighted, left[:, :r], right[:, :s], optimize=True)
        factors = (half.back(right[:, :s].T), core, left[:, :r])
        return _Plan(factors, before, after, f"ranks {r} of {outputs} and {s} of {inputs}")

    def _lost(self) -> float:
        if self.error is not None:
            return self.error**2
        return 1 - (self.energy if self.energy is not None else 0.9)

    def _cp(self, kernel: np.ndarray, half: _Half, positions: int) -> _Plan:
        """[O, I, k...] as [r, I], one [r, k] for each axis, and [O, r]."""
        outputs, inputs, *taps = kernel.shape
        before = outputs * inputs * math.prod(taps)
        # each axis in turn goes from the resolution of the input to that of the output
        each = positions * (inputs + sum(taps)) + outputs
        most = int((self.ratio or 1 - self.least_saving) * before / each)
        if most < 1:
            raise NotLinear(f"rank 1 would take {each / before:.0%} of its MACs")
        weighted = half.weighted(kernel)
        norm = float(np.square(weighted).sum())
        ranks = [most] if self.ratio is not None else sorted({max(1, most * part // 8) for part in (1, 2, 3, 4, 6, 8)})
        lost = math.inf
        for rank in ranks:
            weights, factors = _parafac(weighted, rank)
            rebuilt = np.einsum(_cp_equation(len(taps)), weights, *factors, optimize=True)
            lost = float(np.square(weighted - rebuilt).sum()) / norm if norm else 0.0
            if self.ratio is not None or lost <= self._lost():
                break
        else:
            raise NotLinear(f"rank {most}, the largest that saves MACs, keeps {1 - lost:.1%} of the energy")
        left, right, *spatial = factors
        return _Plan(
            (half.back(right.T), *(factor.T for factor in spatial), left * weights),
            before, rank * each, f"rank {rank}",
        )  # fmt: skip


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


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Half:
    """A square root of the moments, and its inverse; None stands for the identity."""

    root: np.ndarray | None
    inverse: np.ndarray | None

    def weighted(self, weight: np.ndarray) -> np.ndarray:
        """[O, I, ...] with its inputs multiplied by the root."""
        return weight if self.root is None else np.einsum("oi...,ij->oj...", weight, self.root, optimize=True)

    def back(self, factor: np.ndarray) -> np.ndarray:
        """[r, I] that reads what was weighted, as one that reads the input itself."""
        return factor if self.inverse is None else factor @ self.inverse


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Plan:
    """What a layer becomes.

    Attributes:
        factors: in the order in which they run: [r, I], then kernels, then [O, r].
        before, after: MACs for each place of the output.
        how: the rank, for a person.
    """

    factors: tuple[np.ndarray, ...]
    before: int
    after: int
    how: str


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Layer:
    """What can be factorised.

    Attributes:
        weight: [O, I], or [O, I, k...] with more than one tap.
        half: of its moments.
        stepping: places of the input for each of the output.
        places: of the output.
    """

    weight: np.ndarray
    half: _Half
    stepping: int
    places: int


def _places(node: ir.Node) -> int:
    """How many places the output of a layer has in a sample, as far as it is written in the graph: of what is symbolic,
    such as the length of a sequence, there is one."""
    shape = node.outputs[0].shape
    if shape is None:
        return 1
    sizes = shape[2:] if node.op_type == "Conv" else shape[1:-1]
    return math.prod(size for size in sizes if isinstance(size, int) and size > 0)


def _curve(layer: _Layer, ratios: Iterable[float]) -> list[tuple[float, float]]:
    """For ratios of its MACs, the share of the energy that is lost at most; those that no rank has are left out."""
    weighted = layer.half.weighted(layer.weight)
    if layer.weight.ndim == 2:
        lost = [_tail(np.linalg.svd(weighted, compute_uv=False))]
    else:
        lost = [_tail(singular) for _, singular in _bases(weighted)]
    found = []
    for ratio in ratios:
        try:
            if layer.weight.ndim == 2:
                ranks: tuple[int, ...] = (_matrix_rank(layer.weight.shape, ratio),)
            else:
                ranks = _tucker_ranks(layer.weight.shape, layer.stepping, ratio)
        except NotLinear:
            continue
        if min(ranks) >= 1:
            # both modes together lose at most the sum
            found.append(
                (ratio, sum(float(tail[min(rank, len(tail) - 1)]) for tail, rank in zip(lost, ranks, strict=True)))
            )
    return found


def _tail(singular: np.ndarray) -> np.ndarray:
    """The share of the energy that is beyond each rank, from 0 to all."""
    squares = np.square(singular)
    left: np.ndarray = np.append(np.cumsum(squares[::-1])[::-1], 0.0) / max(float(squares.sum()), 1e-300)
    return left


def _hull(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of (ratio, loss), from the largest ratio down."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points, reverse=True):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x0 - x) < (y - y0) * (x0 - x1):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def _matrix_rank(shape: tuple[int, ...], ratio: float) -> int:
    """The largest rank that costs at most this share."""
    # a ratio that was computed from a cost must not lose a rank to rounding
    return int(ratio * math.prod(shape) / sum(shape) + 1e-9)


def _tucker_cost(shape: tuple[int, ...], stepping: int, r: int, s: int) -> int:
    """MACs for each place of the output; the first factor runs at the resolution of the input."""
    return stepping * shape[1] * s + s * r * math.prod(shape[2:]) + r * shape[0]


def _tucker_ranks(shape: tuple[int, ...], stepping: int, ratio: float) -> tuple[int, int]:
    """The largest ranks that cost at most this share. Raises NotLinear."""
    most = ratio * math.prod(shape) + 1e-9
    return _largest(lambda r, s: _tucker_cost(shape, stepping, r, s) <= most, shape[0], shape[1])


def _bases(kernel: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Of the output and the input channels of [O, I, k...], see ``_basis``."""
    outputs, inputs = kernel.shape[:2]
    return _basis(kernel.reshape(outputs, -1)), _basis(kernel.swapaxes(0, 1).reshape(inputs, -1))


def _largest(fits: Callable[[int, int], bool], most_r: int, most_s: int) -> tuple[int, int]:
    """The largest ranks in one proportion to the full ones that fit. Raises NotLinear where none do."""
    low, high = 0, max(most_r, most_s)

    def ranks(step: int) -> tuple[int, int]:
        share = step / max(most_r, most_s)
        return max(1, int(share * most_r)), max(1, int(share * most_s))

    if not fits(1, 1):
        raise NotLinear("even rank 1 costs more than that")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(*ranks(middle)) else (low, middle)
    return ranks(low)


def _orthogonal_iteration(weight: np.ndarray, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Improves the bases of both channel axes in turn."""
    for _ in range(_ITERATIONS):
        seen = np.einsum("oi...,is->os...", weight, right, optimize=True).reshape(len(left), -1)
        left = _basis(seen)[0][:, : left.shape[1]]
        seen = np.einsum("oi...,or->ir...", weight, left, optimize=True).reshape(len(right), -1)
        right = _basis(seen)[0][:, : right.shape[1]]
    return left, right


def _basis(wide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors and singular values of [n, m] with many more columns than rows, largest first."""
    values, vectors = np.linalg.eigh(wide @ wide.T)
    return vectors[:, ::-1], np.sqrt(np.maximum(values[::-1], 0))


def _cp_equation(axes: int) -> str:
    letters = "oiabc"[: 2 + axes]
    return f"r,{','.join(f'{letter}r' for letter in letters)}->{letters}"


def _tensorly() -> Any:
    try:
        import tensorly
    except ImportError as error:
        raise PassFailed(
            f"kernels cp needs tensorly: {error}", hint="pip install 'onnx-toolchain[low-rank]', or take tucker"
        ) from error
    return tensorly


def _parafac(weight: np.ndarray, rank: int) -> tuple[np.ndarray, Sequence[np.ndarray]]:
    from tensorly.decomposition import parafac

    found = parafac(
        weight, rank, n_iter_max=_CP_SWEEPS, init="random", random_state=0, normalize_factors=True, tol=1e-6
    )
    return np.asarray(found[0]), [np.asarray(factor) for factor in found[1]]


def _carry_out(scope: Scope, node: ir.Node, plan: _Plan, names: Names) -> None:
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
        for name in ("pads", "strides", "dilations", "auto_pad", "kernel_shape"):
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
    if last == 1:
        kept = [a for name, a in node.attributes.items() if name in ("pads", "strides", "dilations", "auto_pad")]
        return factor.reshape(*factor.shape, *[1] * axes), list(kept)
    if number == 0:
        return factor.reshape(*factor.shape, *[1] * axes), []
    if factor.ndim > 2:
        kept = [a for name, a in node.attributes.items() if name in ("pads", "strides", "dilations", "auto_pad")]
        return factor, list(kept)
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
