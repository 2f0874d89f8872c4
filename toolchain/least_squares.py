"""Least squares for a layer from streamed moments: its rows, their sums, and the solution for weights and bias.

A layer with g groups is g regressions of O/g outputs each on d = I/g * taps inputs. Only sums over rows are kept, for
two halves of the samples apart, so that a ridge can be fitted on one and judged on the other.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from passes._graph import attribute_ints

#: relative to the mean square of an input
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
#: bytes of rows that are multiplied at once
_BLOCK = 1 << 26
_TURNS, _TOLERANCE = 400, 1e-7


@dataclasses.dataclass(eq=False)
class Moments:
    """Sums over rows: xx float64 [g, d, d], xy [g, d, o], yy [g, o], x [g, d], y [g, o]."""

    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray
    x: np.ndarray
    y: np.ndarray
    count: int = 0

    @classmethod
    def empty(cls, groups: int, inputs: int, outputs: int) -> Moments:
        """Of no rows."""
        g, d, o = groups, inputs, outputs
        return cls(np.zeros((g, d, d)), np.zeros((g, d, o)), np.zeros((g, o)), np.zeros((g, d)), np.zeros((g, o)))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Takes rows in: x float32 [n, g, d], y float32 [n, g, o]."""
        left, right = np.ascontiguousarray(x.transpose(1, 0, 2)), np.ascontiguousarray(y.transpose(1, 0, 2))
        turned = left.transpose(0, 2, 1)
        self.xx += turned @ left
        self.xy += turned @ right
        self.yy += np.einsum("gno,gno->go", right, right)
        self.x += left.sum(axis=1, dtype=np.float64)
        self.y += right.sum(axis=1, dtype=np.float64)
        self.count += len(x)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
            self.x + other.x,
            self.y + other.y,
            self.count + other.count,
        )

    def error(self, weight: np.ndarray, bias: np.ndarray) -> float:
        """Mean over rows of the squared error of all outputs, of weight [g, d, o] and bias [g, o]."""
        n = self.count
        total = (
            self.yy.sum()
            - 2 * (weight * self.xy).sum()
            - 2 * (bias * self.y).sum()
            + (weight * (self.xx @ weight)).sum()
            + 2 * (bias * np.einsum("gd,gdo->go", self.x, weight)).sum()
            + n * (bias * bias).sum()
        )
        return max(float(total), 0.0) / n

    @property
    def power(self) -> float:
        """Mean over rows of the squared outputs."""
        return float(self.yy.sum()) / self.count


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """A fit: weight [g, d, o], bias [g, o], the ridge (inf where the weights are as they were), and mean squared errors
    before and after on rows that it was not fitted on."""

    weight: np.ndarray
    bias: np.ndarray
    ridge: float
    before: float
    after: float


def solve(
    halves: Sequence[Moments],
    weight: np.ndarray,
    bias: np.ndarray,
    *,
    ridges: Sequence[float] = RIDGES,
    intercept: bool = True,
    mask: np.ndarray | None = None,
) -> Solution:
    """The best weights and bias for a layer, drawn to what they are.

    Args:
        halves: moments of two halves of the samples; one where there is one sample.
        weight: [g, d, o], as it is.
        bias: [g, o], as it is.
        ridges: of which the best on the other half is taken; ``math.inf`` moves the bias alone.
        intercept: whether the bias may change.
        mask: bool [g, d, o], False where a weight stays zero.
    """
    pairs = list(zip(halves, reversed(halves), strict=True))
    before = sum(judge.error(weight, bias) for _, judge in pairs) / len(pairs)
    errors = {
        ridge: sum(judge.error(*_fit(fit, weight, bias, ridge, intercept, mask)) for fit, judge in pairs) / len(pairs)
        for ridge in ridges
    }
    ridge = min(errors, key=lambda each: errors[each])
    whole = sum(halves[1:], start=halves[0])
    new, moved = _fit(whole, weight, bias, ridge, intercept, mask)
    return Solution(new, moved, ridge, before, errors[ridge])


def _fit(
    moments: Moments, weight: np.ndarray, bias: np.ndarray, ridge: float, intercept: bool, mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    n = moments.count
    mean_x, mean_y = moments.x / n, moments.y / n
    if ridge < math.inf:
        if intercept:
            covariance = moments.xx / n - mean_x[:, :, None] * mean_x[:, None, :]
            shared = moments.xy / n - mean_x[:, :, None] * mean_y[:, None, :]
        else:
            covariance = moments.xx / n
            shared = moments.xy / n - mean_x[:, :, None] * bias[:, None, :]
        rest = shared - covariance @ weight
        # an input that is always the same says nothing; the tiny number keeps the matrix regular then
        strength = ridge * np.trace(covariance, axis1=1, axis2=2) / covariance.shape[1] + 1e-12
        matrix = covariance + strength[:, None, None] * np.eye(covariance.shape[1])
        delta = np.linalg.solve(matrix, rest) if mask is None else _on_support(matrix, rest, mask)
        weight = weight + delta
    return weight, mean_y - np.einsum("gd,gdo->go", mean_x, weight) if intercept else bias


def _on_support(matrix: np.ndarray, rest: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Solves for each output on its own unmasked inputs: conjugate gradients, all outputs at once, projected."""
    precondition = 1 / np.einsum("gdd->gd", matrix)[:, :, None]
    solution = np.zeros_like(rest)
    residual = rest * mask
    goal = _TOLERANCE * np.sqrt(np.square(residual).sum(axis=1, keepdims=True))
    direction = precondition * residual
    inner = (residual * direction).sum(axis=1, keepdims=True)
    for _ in range(_TURNS):
        if (np.sqrt(np.square(residual).sum(axis=1, keepdims=True)) <= goal).all():
            break
        moved = (matrix @ direction) * mask
        curve = (direction * moved).sum(axis=1, keepdims=True)
        step = np.divide(inner, curve, out=np.zeros_like(inner), where=curve > 0)
        solution += step * direction
        residual -= step * moved
        conditioned = precondition * residual
        following = (residual * conditioned).sum(axis=1, keepdims=True)
        ratio = np.divide(following, inner, out=np.zeros_like(inner), where=inner > 0)
        direction, inner = conditioned + ratio * direction, following
    return solution


def rows(
    node: ir.Node, x: np.ndarray, y: np.ndarray, kernel: Sequence[int], group: int, chosen: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What a layer multiplies and what it should give, block by block.

    Args:
        node: Conv, Gemm or MatMul.
        x: its input.
        y: its target, channels along axis 1 for Conv, else the last.
        kernel: spatial sizes of the filter; empty for Gemm and MatMul.
        group: of a Conv.
        chosen: int64, which rows, counted over samples and places.

    Yields:
        x float32 [n, g, I/g * taps], y float32 [n, g, O/g], and of which sample each is, int64 [n].
    """
    if node.op_type == "Conv":
        windows = _windows(node, x, kernel)
        targets = np.moveaxis(y, 1, -1)
        sizes = windows.shape[: 1 + len(kernel)]
        width = math.prod(windows.shape[1 + len(kernel) :])
    else:
        windows, targets = x.reshape(len(x), -1, x.shape[-1]), y.reshape(len(y), -1, y.shape[-1])
        sizes, width = windows.shape[:2], windows.shape[-1]
    if targets.shape[: len(sizes)] != sizes:
        raise ValueError(f"the layer gives {list(sizes)} places, its target has {list(targets.shape[: len(sizes)])}")
    step = max(_BLOCK // (4 * width), 1)
    for start in range(0, len(chosen), step):
        part = chosen[start : start + step]
        at = np.unravel_index(part, sizes)
        left = windows[at].reshape(len(part), group, -1).astype(np.float32, copy=False)
        yield left, targets[at].reshape(len(part), group, -1).astype(np.float32, copy=False), at[0]


def places(node: ir.Node, x: np.ndarray, y: np.ndarray) -> int:
    """How many rows a batch has."""
    return int(y.size // y.shape[1 if node.op_type == "Conv" else -1])


def _windows(node: ir.Node, x: np.ndarray, kernel: Sequence[int]) -> np.ndarray:
    """A view [N, places..., C, taps...] of what a convolution multiplies its filter with."""
    rank = len(kernel)
    strides = attribute_ints(node, "strides") or (1,) * rank
    dilations = attribute_ints(node, "dilations") or (1,) * rank
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = attribute_ints(node, "pads") or (0,) * (2 * rank)
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto == "VALID":
        pads = (0,) * (2 * rank)
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max((math.ceil(n / s) - 1) * s + r - n, 0) for n, s, r in zip(x.shape[2:], strides, reach, strict=True)
        ]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = tuple(itertools.chain(*((small, large) if auto == "SAME_UPPER" else (large, small))))
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + rank)))
    steps = (1, 1, *strides, *dilations)
    view = view[tuple(slice(None, None, step) for step in steps)]
    return np.moveaxis(view, 1, 1 + rank)
