"""A weight as a few shared values: k-means, or powers of two, and a scale for each channel.

``kmeans`` gives each weight tensor ``levels`` values of its own, those that minimise the squared error (Han et al.
2016, "Deep Compression", arXiv 1510.00149, section 3): Lloyd's algorithm in one dimension, begun from Panter and Dite's
asymptotically best density, from evenly spaced values and, for few levels, from dynamic programming over a fine grid,
whichever ends best. ``log`` takes zero and powers of two (Miyashita et al. 2016, arXiv 1603.01025), each weight the
nearest. A tensor that holds zeros keeps exactly those, so what was pruned stays pruned.

Each output channel has a scale: channels that differ by orders of magnitude, as folded BatchNormalization leaves them
in depthwise convolutions, else share values that suit the largest only. kmeans divides by the largest magnitude of a
channel: by the root mean square the few large weights are far from all values, and the error at 256 values was measured
1.5 to 3 times as large, that of the worst channel 6 times and more. log divides by the power of two nearest to that.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

from runtimes import InvalidInput

Codec = Literal["kmeans", "log"]

#: rounds of Lloyd's algorithm, at most
_ROUNDS = 200
#: far above the least that float32 holds, far below what matters
_SMALLEST_SCALE = 2.0**-100
#: up to so many levels the best clusters are searched for, among borders of so many cells
_EXACT, _CELLS = 32, 768


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """A weight whose elements share values.

    Attributes:
        values: float32, ascending.
        scales: float32, one for each index of ``axis``, above zero.
        codes: uint8, of the weight's shape: the index of each element's value.
        axis: of the channels.
    """

    values: np.ndarray
    scales: np.ndarray
    codes: np.ndarray
    axis: int

    def restored(self) -> np.ndarray:
        """The weight, float32: each element's value times its channel's scale."""
        weight: np.ndarray = self.values[self.codes] * _along(self.scales, self.codes.ndim, self.axis)
        return weight


def check_levels(codec: str, levels: int) -> None:
    """Raises InvalidInput: an unknown codec, or levels out of range."""
    if codec not in ("kmeans", "log"):
        raise InvalidInput(f"no codec is called {codec!r}", hint="take kmeans or log")
    fine = 2 <= levels <= 256 if codec == "kmeans" else 3 <= levels <= 255 and levels % 2 == 1
    if not fine:
        wanted = "2 to 256" if codec == "kmeans" else "an odd number from 3 to 255"
        raise InvalidInput(f"{levels} levels", where=f"codec {codec}", hint=f"wanted: {wanted}")


def quantise(data: np.ndarray, *, codec: Codec = "kmeans", levels: int = 16, axis: int = 0) -> Shared:
    """Shares at most ``levels`` values among the elements of a weight.

    Args:
        data: floats of any shape but a scalar's, finite.
        codec: kmeans or log.
        levels: 2 to 256 of kmeans; of log 3 to 255, an odd number: zero, and as many negative as positive powers.
        axis: of the channels that get a scale each.

    Raises:
        InvalidInput: an unknown codec, or levels out of range.
    """
    check_levels(codec, levels)
    numbers = data.astype(np.float32)
    scales = np.abs(numbers).max(axis=tuple(i for i in range(data.ndim) if i != axis), initial=0)
    if codec == "log":
        scales = np.exp2(_nearest_power(scales))
    # a channel of zeros has none, and one of numbers so small that float32 has no full precision for them needs none
    scales = np.where(scales >= _SMALLEST_SCALE, scales, 1.0).astype(np.float32)
    flat = (numbers / _along(scales, data.ndim, axis)).reshape(-1)
    if codec == "log":
        values = _powers(levels)  # the largest of each channel is nearest to 1 times its scale
    else:
        values = _kmeans(flat[flat != 0], levels - 1 if (flat == 0).any() else levels)
        if (flat == 0).any():
            values = np.unique(np.append(values[values != 0], np.float32(0)))
    codes = _nearest(flat, values)
    zero = np.flatnonzero(values == 0)
    if zero.size:
        # what was not zero becomes zero only where that is the nearest; what was, always
        codes[flat == 0] = zero[0]
    return Shared(values, scales, codes.reshape(data.shape), axis)


def _along(scales: np.ndarray, ndim: int, axis: int) -> np.ndarray:
    """[n] as an array of so many axes, n along this one."""
    return scales.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _powers(levels: int) -> np.ndarray:
    """Zero and the powers of two from 1 down, of both signs."""
    powers = 2.0 ** -np.arange((levels - 1) // 2, dtype=np.float64)
    return np.concatenate([-powers, [0.0], powers[::-1]]).astype(np.float32)


def _nearest_power(magnitude: np.ndarray) -> np.ndarray:
    """The exponent of the power of two that is nearest; of zero a very small one."""
    # a power is nearest from three quarters of it on
    exponents = np.floor(np.log2(np.maximum(magnitude, _SMALLEST_SCALE / 2) / 1.5)) + 1
    held: np.ndarray = np.minimum(exponents, 127)  # float32 holds no larger power
    return held


def _kmeans(flat: np.ndarray, levels: int) -> np.ndarray:
    """The values of 1-D k-means, float32 ascending; fewer where there are fewer different numbers."""
    ordered = np.sort(flat.astype(np.float64))
    different = np.unique(ordered)
    if len(different) <= levels or not levels:
        return different.astype(np.float32)[:levels] if levels else np.empty(0, np.float32)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    squares = np.concatenate([[0.0], np.cumsum(np.square(ordered))])
    starts = [_by_density(ordered, levels), np.linspace(ordered[0], ordered[-1], levels)]
    if levels <= _EXACT:
        starts.append(_by_dynamic_programming(ordered, sums, squares, levels))
    best, least = different[:levels], math.inf
    for start in starts:
        centres, error = _lloyd(ordered, sums, squares, start)
        if error < least:
            best, least = centres, error
    return np.unique(best.astype(np.float32))


def _by_density(ordered: np.ndarray, levels: int) -> np.ndarray:
    """Panter and Dite 1951: the best values lie as dense as the cube root of the density of the numbers."""
    # with few numbers in a bin the cube root is that of their noise, and the tails get too many values
    counts, edges = np.histogram(ordered, bins=min(max(len(ordered) // 16, 64), 2048))
    share = np.concatenate([[0.0], np.cumsum(np.cbrt(counts))])
    centres: np.ndarray = np.interp((np.arange(levels) + 0.5) / levels * share[-1], share, edges)
    return centres


def _by_dynamic_programming(ordered: np.ndarray, sums: np.ndarray, squares: np.ndarray, levels: int) -> np.ndarray:
    """The best clusters whose borders are among ``_CELLS`` (Wang and Song 2011, "Ckmeans.1d.dp"): with fewer numbers
    than that, the best there are."""
    if len(ordered) <= _CELLS:
        borders = np.arange(len(ordered) + 1)
    else:
        inner = np.searchsorted(ordered, _by_density(ordered, _CELLS))
        borders = np.unique(np.concatenate([[0], inner, [len(ordered)]]))
    count = np.maximum(borders[None, :] - borders[:, None], 1)
    within = sums[borders][None, :] - sums[borders][:, None]
    cost = squares[borders][None, :] - squares[borders][:, None] - within * within / count
    cost[np.tril_indices(len(borders), -1)] = np.inf  # a cluster ends after it begins
    best, chosen = cost[0], []
    for _ in range(levels - 1):
        total = best[:, None] + cost
        chosen.append(total.argmin(axis=0))
        best = total.min(axis=0)
    ends = [len(borders) - 1]
    for step in reversed(chosen):
        ends.append(int(step[ends[-1]]))
    ends.append(0)
    cuts = borders[ends[::-1]]
    centres: np.ndarray = np.diff(sums[cuts])[np.diff(cuts) > 0] / np.diff(cuts)[np.diff(cuts) > 0]
    return centres


def _lloyd(ordered: np.ndarray, sums: np.ndarray, squares: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, float]:
    """Lloyd's algorithm on sorted numbers: a cluster is a range of them, its sums are differences."""
    error = math.inf
    for _ in range(_ROUNDS):
        borders = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        borders = np.concatenate([[0], borders, [len(ordered)]])
        counts = np.diff(borders)
        totals = np.diff(sums[borders])
        centres = np.where(counts > 0, totals / np.maximum(counts, 1), centres)
        now = float((np.diff(squares[borders]) - totals * totals / np.maximum(counts, 1)).sum())
        if now >= error * (1 - 1e-7):
            break
        error = now
    return centres, error


def _nearest(flat: np.ndarray, values: np.ndarray) -> np.ndarray:
    borders = (values[1:].astype(np.float64) + values[:-1]) / 2
    found: np.ndarray = np.searchsorted(borders, flat.astype(np.float64)).astype(np.uint8)
    return found
