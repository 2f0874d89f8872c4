"""Layers as products of smaller ones: ranks, bases, and which layer is cut how far.

Matrices: the truncated singular value decomposition, the best of its rank (Eckart and Young 1936). Kernels: Tucker's
decomposition over both channel axes (Kim et al. 2016, arXiv 1511.06530), found by orthogonal iteration from the
higher-order SVD (De Lathauwer et al. 2000); or the canonical polyadic one (Lebedev et al. 2015, arXiv 1412.6553), by
tensorly's alternating least squares.

With S = E[x x^T] of the layer's input, what is kept small is the error of the *output*: W L with S = L L^T is
decomposed, and what multiplies x gets L^-1 from the right (Wang et al. 2024, "SVD-LLM", arXiv 2403.07378). For a k x k
kernel S is that of single places, which neglects how neighbours depend on each other.

Energy is the sum of the squares of a weight, that of W L where there is an L. Weights are float64 [O, I], or
[O, I, k...] with more than one tap.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from passes._linear import NotLinear
from passes.base import PassFailed

#: of the mean of the moments, added to each so that channels that were always zero can be divided by
_DAMPING = 1e-6
_ITERATIONS = 5
_CP_SWEEPS = 60
#: shares of a layer's MACs at which ``share_out`` looks
_GRID = tuple(step / 40 for step in range(1, 40))
#: a ratio that was computed from a cost must not lose a rank to rounding
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Half:
    """A square root of the moments, and its inverse; None stands for the identity."""

    root: np.ndarray | None = None
    inverse: np.ndarray | None = None

    @classmethod
    def of(cls, moments: np.ndarray) -> Half:
        """The L of S = L L^T for moments S [I, I], and its inverse."""
        values, vectors = np.linalg.eigh(np.asarray(moments, np.float64))
        values = np.sqrt(np.maximum(values, 0) + _DAMPING * max(float(values.mean()), 1e-30))
        return cls((vectors * values) @ vectors.T, (vectors / values) @ vectors.T)

    def weighted(self, weight: np.ndarray) -> np.ndarray:
        """[O, I, ...] with its inputs multiplied by the root."""
        return weight if self.root is None else np.einsum("oi...,ij->oj...", weight, self.root, optimize=True)

    def back(self, factor: np.ndarray) -> np.ndarray:
        """[r, I] that reads what was weighted, as one that reads the input itself."""
        return factor if self.inverse is None else factor @ self.inverse


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Layer:
    """What can be factorised.

    Attributes:
        weight: [O, I], or [O, I, k...] with more than one tap.
        half: of its moments.
        stepping: places of the input for each of the output.
        places: of the output.
    """

    weight: np.ndarray
    half: Half
    stepping: int
    places: int

    @property
    def cost(self) -> int:
        """Its MACs."""
        return self.weight.size * self.places


@dataclasses.dataclass(frozen=True, slots=True)
class Bound:
    """How far a layer is cut.

    Attributes:
        ratio: to the largest rank that costs at most this share of its MACs; None for the least rank within ``lost``.
        lost: share of its energy that may go.
        worth: share of its MACs above which another node is not worth it.
    """

    ratio: float | None
    lost: float
    worth: float


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Plan:
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


def factorize(layer: Layer, bound: Bound, *, cp: bool) -> Plan:
    """The factors of a layer; kernels by Tucker, or as ``cp``. Raises NotLinear where they save too little."""
    if layer.weight.ndim == 2:
        plan = _matrix(layer, bound)
    else:
        plan = (_cp if cp else _tucker)(layer, bound)
    if plan.after > bound.worth * plan.before:
        raise NotLinear(f"{plan.how} would take {plan.after / plan.before:.0%} of its MACs")
    return plan


def share_out(layers: Sequence[Layer], ratio: float, worth: float) -> list[float]:
    """What each layer is to keep, so that together they keep the ratio or as near as they come; 1 is all of it.

    They are cut where the least energy is lost for what is saved, along the lower convex hull of each layer's losses
    over its costs.
    """
    kept = [1.0] * len(layers)
    steps = []
    for index, layer in enumerate(layers):
        hull = _hull([(1.0, 0.0), *_curve(layer, [r for r in _GRID if r <= worth])])
        for (share, lost), (less, more) in itertools.pairwise(hull):
            steps.append(((more - lost) / ((share - less) * layer.cost), index, less))
    over = (1 - ratio) * sum(layer.cost for layer in layers)
    for _, index, share in sorted(steps):  # along a hull the steps get dearer, so those of a layer are in order
        if over <= 0:
            break
        cost = layers[index].cost
        # the last goes no further than it has to
        last = min(kept[index] - over / cost, worth) if (kept[index] - share) * cost > over else share
        over -= (kept[index] - last) * cost
        kept[index] = last
    return kept


def require_tensorly() -> None:
    """Raises PassFailed where it is not installed."""
    try:
        import tensorly  # noqa: F401
    except ImportError as error:
        raise PassFailed(
            f"kernels cp needs tensorly: {error}", hint="pip install 'onnx-toolchain[low-rank]', or take tucker"
        ) from error


def _matrix(layer: Layer, bound: Bound) -> Plan:
    """[O, I] as [O, r] times [r, I]."""
    outputs, inputs = layer.weight.shape
    u, s, vt = np.linalg.svd(layer.half.weighted(layer.weight), full_matrices=False)
    rank = _least_rank(s, bound.lost) if bound.ratio is None else _matrix_rank(layer.weight.shape, bound.ratio)
    if rank < 1:
        raise NotLinear(f"rank 1 would take {(outputs + inputs) / (outputs * inputs):.0%} of its MACs")
    root = np.sqrt(s[:rank])
    factors = (layer.half.back(root[:, None] * vt[:rank]), u[:, :rank] * root)
    return Plan(factors, outputs * inputs, rank * (outputs + inputs), f"rank {rank} of {min(outputs, inputs)}")


def _tucker(layer: Layer, bound: Bound) -> Plan:
    """[O, I, k...] as [O, r], [r, s, k...] and [s, I]."""
    shape, before = layer.weight.shape, layer.weight.size
    weighted = layer.half.weighted(layer.weight)
    (left, s_left), (right, s_right) = _bases(weighted)
    if bound.ratio is not None:
        r, s = _tucker_ranks(shape, layer.stepping, bound.ratio)
    else:  # what both modes lose adds up at most, so each may lose half
        r, s = (_least_rank(singular, bound.lost / 2) for singular in (s_left, s_right))
    left, right = left[:, :r], right[:, :s]
    after = _tucker_cost(shape, layer.stepping, r, s)
    if after <= bound.worth * before:
        left, right = _orthogonal_iteration(weighted, left, right)
    core = np.einsum("oi...,or,is->rs...", weighted, left, right, optimize=True)
    how = f"ranks {r} of {shape[0]} and {s} of {shape[1]}"
    return Plan((layer.half.back(right.T), core, left), before, after, how)


def _cp(layer: Layer, bound: Bound) -> Plan:
    """[O, I, k...] as [r, I], one [r, k] for each axis, and [O, r]."""
    outputs, inputs, *taps = layer.weight.shape
    before = layer.weight.size
    # each axis in turn goes from the resolution of the input to that of the output
    each = layer.stepping * (inputs + sum(taps)) + outputs
    most = int((bound.ratio or bound.worth) * before / each)
    if most < 1:
        raise NotLinear(f"rank 1 would take {each / before:.0%} of its MACs")
    weighted = layer.half.weighted(layer.weight)
    norm = float(np.square(weighted).sum())
    ranks = [most] if bound.ratio is not None else sorted({max(1, most * part // 8) for part in (1, 2, 3, 4, 6, 8)})
    letters = "oiabc"[: weighted.ndim]
    equation = f"r,{','.join(f'{letter}r' for letter in letters)}->{letters}"
    lost = math.inf
    for rank in ranks:
        weights, factors = _parafac(weighted, rank)
        rebuilt = np.einsum(equation, weights, *factors, optimize=True)
        lost = float(np.square(weighted - rebuilt).sum()) / norm if norm else 0.0
        if bound.ratio is not None or lost <= bound.lost:
            break
    else:
        raise NotLinear(f"rank {most}, the largest that saves MACs, keeps {1 - lost:.1%} of the energy")
    left, right, *spatial = factors
    in_order = (layer.half.back(right.T), *(factor.T for factor in spatial), left * weights)
    return Plan(in_order, before, rank * each, f"rank {rank}")


def _parafac(weight: np.ndarray, rank: int) -> tuple[np.ndarray, Sequence[np.ndarray]]:
    from tensorly.decomposition import parafac

    found = parafac(
        weight, rank, n_iter_max=_CP_SWEEPS, init="random", random_state=0, normalize_factors=True, tol=1e-6
    )
    return np.asarray(found[0]), [np.asarray(factor) for factor in found[1]]


def _tail(singular: np.ndarray) -> np.ndarray:
    """The share of the energy that is beyond each rank, from 0 to all."""
    squares = np.square(singular)
    left: np.ndarray = np.append(np.cumsum(squares[::-1])[::-1], 0.0) / max(float(squares.sum()), 1e-300)
    return left


def _least_rank(singular: np.ndarray, lost: float) -> int:
    """The least rank, from 1, beyond which there is at most this share of the energy."""
    return int(np.argmax(_tail(singular)[1:] <= lost + 1e-12)) + 1


def _matrix_rank(shape: tuple[int, ...], ratio: float) -> int:
    """The largest rank that costs at most this share."""
    return int(ratio * math.prod(shape) / sum(shape) + _ROUNDING)


def _tucker_cost(shape: tuple[int, ...], stepping: int, r: int, s: int) -> int:
    """MACs for each place of the output; the first factor runs at the resolution of the input."""
    return stepping * shape[1] * s + s * r * math.prod(shape[2:]) + r * shape[0]


def _tucker_ranks(shape: tuple[int, ...], stepping: int, ratio: float) -> tuple[int, int]:
    """The largest ranks that cost at most this share. Raises NotLinear."""
    most = ratio * math.prod(shape) + _ROUNDING
    return _largest(lambda r, s: _tucker_cost(shape, stepping, r, s) <= most, shape[0], shape[1])


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


def _basis(wide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors and singular values of [n, m] with many more columns than rows, largest first."""
    values, vectors = np.linalg.eigh(wide @ wide.T)
    return vectors[:, ::-1], np.sqrt(np.maximum(values[::-1], 0))


def _bases(kernel: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Of the output and the input channels of [O, I, k...], see ``_basis``."""
    outputs, inputs = kernel.shape[:2]
    return _basis(kernel.reshape(outputs, -1)), _basis(kernel.swapaxes(0, 1).reshape(inputs, -1))


def _orthogonal_iteration(weight: np.ndarray, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Improves the bases of both channel axes in turn."""
    for _ in range(_ITERATIONS):
        seen = np.einsum("oi...,is->os...", weight, right, optimize=True).reshape(len(left), -1)
        left = _basis(seen)[0][:, : left.shape[1]]
        seen = np.einsum("oi...,or->ir...", weight, left, optimize=True).reshape(len(right), -1)
        right = _basis(seen)[0][:, : right.shape[1]]
    return left, right


def _curve(layer: Layer, ratios: Iterable[float]) -> list[tuple[float, float]]:
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
            most = sum(float(tail[min(rank, len(tail) - 1)]) for tail, rank in zip(lost, ranks, strict=True))
            found.append((ratio, most))
    return found


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
