"""From a distribution to the range that a quantiser covers: the methods of calibration.

Each gives a pair low, high for an asymmetric quantiser of 256 levels, and an amax for a symmetric one of 255:

* ``minmax``: the extremes that were seen.
* ``moving-average``: the extremes of single samples, averaged (Krishnamoorthi 2018, arXiv 1806.08342).
* ``percentile``: cuts a fixed share of the elements off, half of it at either end for low and high.
* ``entropy``: the threshold with the least Kullback-Leibler divergence between the clipped distribution and the same in
  levels (Migacz, "8-bit inference with TensorRT", 2017). Exact zeros do not count: every quantiser has a zero.
  It gives one threshold; low and high are the extremes cut off at it.
* ``mse``: the range of least squared quantisation error, clipping and rounding together, by search.
* ``auto``: of all these the one with the least squared error, but of those that are within 2 % of the least the one
  that stands first above: where clipping gains nothing, nothing is clipped.

The squared error is that of the quantiser which ``passes._quant`` makes of the range, with its exact zero, on a
distribution that is even within each bin: a sum over cells of levels, computed from cumulated moments.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

from passes._quant import TensorRange
from toolchain.histogram import HALF_BINS, Distribution

Method = Literal["auto", "minmax", "moving-average", "percentile", "entropy", "mse"]
METHODS: tuple[str, ...] = get_args(Method)
#: percent of the elements that the ``percentile`` method covers
PERCENTILE = 99.99
#: in ``auto``, an error this much above the least is as good
_TOLERANCE = 1.02
_LEVELS_U8, _LEVELS_S8 = 256, 255
#: what the search for the least error shrinks a range by: first down to a hundredth, then around the best
_COARSE = 2.0 ** (-np.arange(27) / 4)
_FINE = 2.0 ** (np.arange(-5, 6) / 24)
#: where each bin begins, in bins
_LEFT = np.arange(-HALF_BINS, HALF_BINS, dtype=np.float64)
#: the same with the zeros between the halves, in a bin of no width, and the end of the last
_STARTS = np.concatenate([np.arange(-HALF_BINS, 1.0), np.arange(0.0, HALF_BINS + 1)])


def tensor_range(found: Distribution, *, method: Method = "auto", percentile: float = PERCENTILE) -> TensorRange:
    """The range of a tensor by one of the methods.

    A constant tensor gets its one value as low and high, and its absolute value as amax; where that is zero the
    quantiser's scale is 1.
    """
    if found.minimum == found.maximum or method == "minmax":
        return _range(found, found.minimum, found.maximum, "minmax")
    match method:
        case "moving-average":
            return _range(found, found.mean_minimum, found.mean_maximum, method)
        case "percentile":
            return _percentile(found, percentile)
        case "entropy":
            return _entropy(found)
        case "mse":
            return _Errors(found).least()
    return _auto(found, percentile)


def _auto(found: Distribution, percentile: float) -> TensorRange:
    errors = _Errors(found)
    simple = [
        tensor_range(found, method="minmax"),
        tensor_range(found, method="moving-average"),
        _percentile(found, percentile),
    ]
    candidates = [*simple, errors.least()]
    good = _near_least(errors, candidates)
    if not good[: len(simple)].any():
        # The dearest of all: it does not better the least, so it only counts where it may come before that.
        candidates.insert(len(simple), _entropy(found))
        good = _near_least(errors, candidates)
    return candidates[int(np.argmax(good))]


def _near_least(errors: _Errors, candidates: list[TensorRange]) -> np.ndarray:
    """Of each candidate whether its error is the least, or as good, in either quantiser."""
    lows, highs, amaxes = (np.array([getattr(c, name) for c in candidates]) for name in ("low", "high", "amax"))
    scores = np.maximum(_relative(errors.asymmetric(lows, highs)), _relative(errors.symmetric(amaxes)))
    return np.asarray(scores <= max(_TOLERANCE, float(scores.min())))


def squared_error(found: Distribution, range_: TensorRange) -> tuple[float, float]:
    """Mean squared error of a tensor in the asymmetric quantiser of the range, and in the symmetric one.

    In the square of the tensor's unit.
    """
    errors = _Errors(found)
    return (
        float(errors.asymmetric(np.array([range_.low]), np.array([range_.high]))[0]),
        float(errors.symmetric(np.array([range_.amax]))[0]),
    )


def _relative(errors: np.ndarray) -> np.ndarray:
    least = float(errors.min())
    return errors / least if least > 0 else np.where(errors > 0, math.inf, 1.0)


def _range(found: Distribution, low: float, high: float, method: str, amax: float | None = None) -> TensorRange:
    widest = max(abs(low), abs(high))
    return TensorRange(low, high, widest if amax is None else amax, found.minimum, found.maximum, method)


def _percentile(found: Distribution, percentile: float) -> TensorRange:
    tail = (1 - percentile / 100) / 2
    counts = np.insert(found.counts, HALF_BINS, found.zeros)
    low, high = _quantiles(counts, _STARTS, (tail, 1 - tail))
    folded = np.append(found.zeros, _absolute(found))
    (amax,) = _quantiles(folded, _STARTS[HALF_BINS:], (percentile / 100,))
    low, high = max(low * found.width, found.minimum), min(high * found.width, found.maximum)
    return _range(found, low, high, "percentile", min(amax * found.width, max(-found.minimum, found.maximum)))


def _quantiles(counts: np.ndarray, starts: np.ndarray, shares: tuple[float, ...]) -> list[float]:
    """The values, in bins, below which those shares of the elements are, by linear interpolation within a bin.

    ``starts`` is where each bin begins, and where the last ends; the zeros have a bin without width.
    """
    ends = np.cumsum(counts)
    last = int(np.flatnonzero(counts)[-1])
    values = []
    for share in shares:
        target = share * ends[-1]
        # The first bin that reaches it and holds anything: an empty one would answer with its own edge.
        index = min(int(np.searchsorted(ends, target, side="left")), last)
        inside = (target - (ends[index] - counts[index])) / counts[index] if counts[index] else 0.0
        values.append(float(starts[index] + (starts[index + 1] - starts[index]) * min(inside, 1.0)))
    return values


def _absolute(found: Distribution) -> np.ndarray:
    """Weights [HALF_BINS] of the absolute values."""
    return np.asarray(found.counts[HALF_BINS:] + found.counts[:HALF_BINS][::-1])


def _entropy(found: Distribution) -> TensorRange:
    counts = _absolute(found)
    one_sided = found.minimum >= 0 or found.maximum <= 0
    amax = _entropy_threshold(counts, 128) * found.width
    wide = _entropy_threshold(counts, 256) * found.width if one_sided else amax
    low, high = max(found.minimum, -wide), min(found.maximum, wide)
    return _range(found, low, high, "entropy", min(amax, max(-found.minimum, found.maximum)))


def _entropy_threshold(counts: np.ndarray, levels: int) -> int:
    """The number of bins to keep, so that what is kept diverges least when its bins are merged into the levels.

    The reference keeps what is cut off in its last bin. A level's weight spreads evenly over those of its bins that
    hold anything. All thresholds are computed at once, from cumulated sums at the edges of the levels.
    """
    used = int(np.flatnonzero(counts)[-1]) + 1
    if used <= levels:
        return used
    keep = np.arange(levels, used + 1, max(1, (used - levels) // 128))
    total = np.concatenate([[0.0], np.cumsum(counts)])
    occupied = np.concatenate([[0], np.cumsum(counts > 0)])
    with np.errstate(divide="ignore", invalid="ignore"):
        entropies = np.concatenate([[0.0], np.cumsum(np.where(counts > 0, counts * np.log(counts), 0.0))])
    edges = keep[:, None] * np.arange(levels + 1) // levels
    mass = np.diff(total[edges], axis=1)
    bins = np.diff(occupied[edges], axis=1).astype(np.float64)
    kept, last = total[keep], counts[keep - 1]
    cut = total[-1] - kept
    # The last bin holds what was cut off, so it is occupied even if nothing was in it.
    bins[:, -1] += (last == 0) & (cut > 0)
    reference = mass.copy()
    reference[:, -1] += cut
    floor = 1e-9 * total[-1]
    # sum of p log p with p the reference's bins, minus sum of p log q: both before they are normalised
    with np.errstate(divide="ignore", invalid="ignore"):
        ended = np.where(last + cut > 0, (last + cut) * np.log(last + cut), 0.0)
        own = entropies[keep - 1] + ended
        density = np.log(np.maximum(mass, floor) / np.maximum(bins, 1))
    cross = np.where(reference > 0, reference * density, 0.0).sum(axis=1)
    divergence = (own - cross) / total[-1] - np.log(total[-1]) + np.log(np.maximum(kept, floor))
    return int(keep[int(np.argmin(divergence))])


class _Errors:
    """Squared errors of quantisers on one distribution. Inside, the unit is a bin.

    A quantiser of step u gives the level v_k = k u to what lies between the edges e_k and e_k+1, midway to its
    neighbours. Summed by parts over the levels, its error needs one function at the edges alone::

        sum of (x - v)^2  =  S2 - 2 v_last S1 + v_last^2 S0 + 2 u * (sum over k of G(e_k))
        G(e)  =  sum over x < e of (x - e)

    with S0, S1, S2 the moments of the whole. Within a bin, whose elements are spread evenly, G is a parabola.
    """

    def __init__(self, found: Distribution) -> None:
        self.found = found
        counts, left = found.counts, _LEFT
        below = np.zeros((2, 2 * HALF_BINS + 1))
        np.cumsum([counts, counts * (left + 0.5)], axis=1, out=below[:, 1:])
        self._zeroth, self._first = float(below[0, -1]), float(below[1, -1])
        self._second = float(np.dot(counts, left * left + left + 1 / 3))
        # One bin more at either end, for the edges that lie beyond: there G is zero, or goes on as a line.
        pieces = np.zeros((3, 2 * HALF_BINS + 2))
        pieces[0, 1:] = below[1] - np.arange(-HALF_BINS, HALF_BINS + 1) * below[0]
        pieces[1, 1:] = -below[0]
        pieces[2, 1:-1] = counts / -2
        self._pieces = pieces
        self._scale = found.width**2 / found.total

    def asymmetric(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Mean squared error [n] of the quantisers 0..255 that cover each low..high [n] and zero."""
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
        step = np.where(high > low, high - low, 1.0) / (_LEVELS_U8 - 1)
        return self._of(step, np.clip(np.rint(-low / step), 0, _LEVELS_U8 - 1), _LEVELS_U8)

    def symmetric(self, amax: np.ndarray) -> np.ndarray:
        """Mean squared error [n] of the quantisers -127..127 that cover -amax..amax, amax [n]."""
        step = np.where(amax > 0, amax, 127.0) / 127
        if self.found.minimum >= 0:  # the lower half of the levels is idle
            return self._of(step, np.zeros(len(step)), _LEVELS_S8 // 2 + 1)
        return self._of(step, np.full(len(step), 127.0), _LEVELS_S8)

    def least(self) -> TensorRange:
        """The range of least error."""
        found = self.found
        widest = max(-found.minimum, found.maximum)
        amax = self._search_symmetric(widest)
        if found.minimum >= 0:
            low, high = found.minimum, self._search_side(found.maximum)
        elif found.maximum <= 0:
            low, high = self._search_side(found.minimum), found.maximum
        else:
            low, high = self._search_both()
        return _range(found, low, high, "mse", amax)

    def _search_symmetric(self, widest: float) -> float:
        coarse = widest * _COARSE
        best = float(coarse[int(np.argmin(self.symmetric(coarse)))])
        fine = np.minimum(best * _FINE, widest)
        return float(fine[int(np.argmin(self.symmetric(fine)))])

    def _search_side(self, extreme: float) -> float:
        """low or high, where the other end is zero."""
        coarse = extreme * _COARSE
        best = float(coarse[int(np.argmin(self._sided(coarse)))])
        fine = best * _FINE
        fine = np.minimum(fine, extreme) if extreme > 0 else np.maximum(fine, extreme)
        return float(fine[int(np.argmin(self._sided(fine)))])

    def _sided(self, ends: np.ndarray) -> np.ndarray:
        return self.asymmetric(np.minimum(ends, 0.0), np.maximum(ends, 0.0))

    def _search_both(self) -> tuple[float, float]:
        """Both ends shrink alike, then each on a finer and finer grid around the best."""
        found = self.found
        best = int(np.argmin(self.asymmetric(found.minimum * _COARSE, found.maximum * _COARSE)))
        low, high = found.minimum * _COARSE[best], found.maximum * _COARSE[best]
        for spread in (np.arange(-2, 3) / 3, np.arange(-2, 3) / 9, np.arange(-2, 3) / 30):
            lows = np.maximum(low * 2.0**spread, found.minimum).repeat(len(spread))
            highs = np.tile(np.minimum(high * 2.0**spread, found.maximum), len(spread))
            best = int(np.argmin(self.asymmetric(lows, highs)))
            low, high = float(lows[best]), float(highs[best])
        return low, high

    def _of(self, step: np.ndarray, zero_point: np.ndarray, levels: int) -> np.ndarray:
        """Mean squared error [n], in the tensor's unit, of quantisers of ``levels`` from 0 to levels - 1."""
        unit = step / self.found.width
        edges = (np.arange(levels - 1) + 0.5 - zero_point[:, None]) * unit[:, None]
        edges += HALF_BINS + 1  # counted from the left end of ``_pieces``
        index = np.clip(edges, 0, 2 * HALF_BINS + 1).astype(np.intp)
        part = edges - index
        constant, slope, bend = (row.take(index) for row in self._pieces)
        bend *= part
        bend += slope
        bend *= part
        bend += constant
        last = (levels - 1 - zero_point) * unit
        error = self._second - 2 * last * self._first + last * last * self._zeroth + 2 * unit * bend.sum(axis=1)
        return np.asarray(np.maximum(error, 0.0) * self._scale)
