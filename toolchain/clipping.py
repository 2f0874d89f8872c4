"""From a distribution to the range that a quantiser covers: the methods of calibration.

Each gives a pair low, high for an asymmetric quantiser of 256 levels, and an amax for a symmetric one of 255:

* ``minmax``: the extremes that were seen.
* ``moving-average``: the extremes of single samples, averaged (Krishnamoorthi 2018, arXiv 1806.08342).
* ``percentile``: cuts a fixed share of the elements off, half of it at either end for low and high.
* ``entropy``: the threshold with the least Kullback-Leibler divergence between the clipped distribution and the same in
  levels (Migacz, "8-bit inference with TensorRT", 2017). Exact zeros do not count: every quantiser has a zero.
  It gives one threshold; low and high are the extremes cut off at it.
* ``mse``: the range of least squared quantisation error, clipping and rounding together, by search.
* ``auto``: of minmax, moving-average, percentile and mse the one with the least squared error, but of those that are
  within 2 % of the least the one that stands first here: where clipping gains nothing, nothing is clipped. Entropy is
  not among them: its error is never below that of mse.

The squared error (``toolchain/squared_error.py``) is that of the quantiser which ``passes._quant`` makes of the range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from passes._quant import TensorRange
from toolchain.histogram import HALF_BINS, Distribution
from toolchain.squared_error import Errors

Method = Literal["auto", "minmax", "moving-average", "percentile", "entropy", "mse"]
METHODS: tuple[str, ...] = get_args(Method)
#: percent of the elements that the ``percentile`` method covers
PERCENTILE = 99.99
#: in ``auto``, an error this much above the least is as good
_TOLERANCE = 1.02
#: tensors that are searched at once: of that many numpy's calls hardly count any more
_AT_ONCE = 32


def tensor_ranges(
    found: Sequence[Distribution], *, method: Method = "auto", percentile: float = PERCENTILE
) -> list[TensorRange]:
    """The range of each tensor by one of the methods.

    A constant tensor gets its one value as low and high, and its absolute value as amax; where that is zero the
    quantiser's scale is 1.
    """
    ranges = _minmax(found)
    if method == "minmax":
        return ranges
    # Freed at once: from then on glibc keeps blocks of up to this size (2 MB) for the next that asks. Without it each
    # array of the search is fresh pages from the system, which takes half as long again.
    kept = np.empty(1 << 18)
    del kept
    varied = [i for i, each in enumerate(found) if each.minimum < each.maximum]
    for start in range(0, len(varied), _AT_ONCE):
        some = varied[start : start + _AT_ONCE]
        for i, range_ in zip(some, _derived([found[i] for i in some], method, percentile), strict=True):
            ranges[i] = range_
    return ranges


def _derived(found: list[Distribution], method: Method, percentile: float) -> list[TensorRange]:
    match method:
        case "moving-average":
            return _averaged(found)
        case "percentile":
            return [_percentile(each, percentile) for each in found]
        case "entropy":
            return [_entropy(each) for each in found]
        case "mse":
            return _least(found, Errors(found))
    return _auto(found, percentile)


def _auto(found: list[Distribution], percentile: float) -> list[TensorRange]:
    errors = Errors(found)
    ways = [_minmax(found), _averaged(found), [_percentile(each, percentile) for each in found], _least(found, errors)]
    asymmetric, symmetric = errors.of_ranges(ways)
    scores = np.maximum(_relative(asymmetric), _relative(symmetric))
    first = (scores <= np.maximum(_TOLERANCE, scores.min(axis=0))).argmax(axis=0)
    return [ways[way][i] for i, way in enumerate(first)]


def _relative(errors: np.ndarray) -> np.ndarray:
    """Errors [ways, tensors] over the least of each tensor; where that is 0 they are 1 or infinite."""
    least = errors.min(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(errors == least, 1.0, errors / least)


def squared_error(found: Distribution, range_: TensorRange) -> tuple[float, float]:
    """Mean squared error of a tensor in the asymmetric quantiser of the range, and in the symmetric one.

    In the square of the tensor's unit.
    """
    asymmetric, symmetric = Errors([found]).of_ranges([[range_]])
    return float(asymmetric[0, 0]), float(symmetric[0, 0])


def _range(found: Distribution, low: float, high: float, method: str, amax: float | None = None) -> TensorRange:
    widest = max(abs(low), abs(high))
    return TensorRange(low, high, widest if amax is None else amax, found.minimum, found.maximum, method)


def _minmax(found: Sequence[Distribution]) -> list[TensorRange]:
    return [_range(each, each.minimum, each.maximum, "minmax") for each in found]


def _averaged(found: Sequence[Distribution]) -> list[TensorRange]:
    return [_range(each, each.mean_minimum, each.mean_maximum, "moving-average") for each in found]


def _least(found: Sequence[Distribution], errors: Errors) -> list[TensorRange]:
    lows, highs = errors.least_asymmetric()
    found_ranges = zip(found, lows.tolist(), highs.tolist(), errors.least_symmetric().tolist(), strict=True)
    return [_range(each, low, high, "mse", amax) for each, low, high, amax in found_ranges]


def _percentile(found: Distribution, percentile: float) -> TensorRange:
    tail = (1 - percentile / 100) / 2
    low, high = _quantiles(found.counts, HALF_BINS, found.zeros, (tail, 1 - tail))
    (amax,) = _quantiles(found.absolute, 0, found.zeros, (percentile / 100,))
    low, high = max(low * found.width, found.minimum), min(high * found.width, found.maximum)
    return _range(found, low, high, "percentile", min(amax * found.width, max(-found.minimum, found.maximum)))


def _quantiles(counts: np.ndarray, zero: int, zeros: float, shares: tuple[float, ...]) -> list[float]:
    """The values, in bins from zero, below which those shares of the elements are, by linear interpolation in a bin.

    ``zeros`` elements lie between the bins ``zero - 1`` and ``zero``.
    """
    ends = counts.cumsum()
    below = float(ends[zero - 1]) if zero else 0.0
    held_in_bins = float(ends[-1])
    values = []
    for share in shares:
        target = share * (held_in_bins + zeros)
        if zeros and below < target <= below + zeros:
            values.append(0.0)
            continue
        target = min(target - zeros if target > below else target, held_in_bins)
        # The first bin that reaches it holds something: an empty one does not reach further than the one before.
        index = int(ends.searchsorted(target))
        held = float(counts[index])
        inside = (target - (float(ends[index]) - held)) / held if held else 0.0
        values.append(index - zero + max(0.0, inside))
    return values


def _entropy(found: Distribution) -> TensorRange:
    counts = found.absolute
    if not counts.any():  # the few elements that are not zero were not sampled
        return _range(found, found.minimum, found.maximum, "entropy")
    divergences = _Divergences(counts)
    one_sided = found.minimum >= 0 or found.maximum <= 0
    amax = divergences.threshold(128) * found.width
    wide = divergences.threshold(256) * found.width if one_sided else amax
    low, high = max(found.minimum, -wide), min(found.maximum, wide)
    return _range(found, low, high, "entropy", min(amax, max(-found.minimum, found.maximum)))


class _Divergences:
    """How far a distribution [HALF_BINS] of absolute values is from the same cut off and merged into levels.

    The reference keeps what is cut off in its last bin. A level's weight spreads evenly over those of its bins that
    hold anything. Many thresholds are computed at once, from cumulated sums at the edges of the levels.
    """

    def __init__(self, counts: np.ndarray) -> None:
        self._counts = counts
        self._used = int(np.flatnonzero(counts)[-1]) + 1
        held = counts > 0
        logs = np.log(counts, out=np.zeros_like(counts), where=held)
        self._total, self._occupied, self._entropies = np.zeros((3, counts.size + 1))
        for cumulated, each in ((self._total, counts), (self._occupied, held), (self._entropies, counts * logs)):
            np.cumsum(each, out=cumulated[1:])

    def threshold(self, levels: int) -> int:
        """The number of bins to keep, so that what is kept diverges least in so many levels: the best of about 128."""
        if self._used <= levels:
            return self._used
        keep = np.arange(levels, self._used + 1, max(1, (self._used - levels) // 128))
        return int(keep[int(np.argmin(self._of(keep, levels)))])

    def _of(self, keep: np.ndarray, levels: int) -> np.ndarray:
        """The divergence [n], with so many bins [n] kept."""
        edges = keep[:, None] * np.arange(levels + 1) // levels
        mass = np.diff(self._total.take(edges), axis=1)
        bins = np.diff(self._occupied.take(edges), axis=1)
        whole, kept, last = self._total[-1], self._total[keep], self._counts[keep - 1]
        cut = whole - kept
        # The last bin holds what was cut off, so it is occupied even if nothing was in it.
        bins[:, -1] += (last == 0) & (cut > 0)
        floor = 1e-9 * whole
        # sum of p log p with p the reference's bins, minus sum of p log q: both before they are normalised
        ended = last + cut
        own = self._entropies[keep - 1] + ended * np.log(np.where(ended > 0, ended, 1.0))
        density = np.log(np.maximum(mass, floor) / np.maximum(bins, 1))
        mass[:, -1] += cut  # the reference's
        cross = (mass * density).sum(axis=1)
        return np.asarray((own - cross) / whole - np.log(whole) + np.log(np.maximum(kept, floor)))
