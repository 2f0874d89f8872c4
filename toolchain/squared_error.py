"""The squared error of 8-bit quantisers on histograms, and the ranges where it is least, for many tensors at once.

A quantiser of step u gives the level v_k = k u to what lies between the edges e_k and e_k+1, midway to its neighbours.
On a distribution that is even within each bin its error, summed by parts over the levels, needs one function at the
edges alone, which is a parabola within each bin::

    sum of (x - v)^2  =  S2 - 2 v_last S1 + v_last^2 S0 + 2 u * (sum over k of G(e_k))
    G(e)  =  sum over x < e of (x - e)

with S0, S1, S2 the moments of the whole. The symmetric quantiser treats x and -x alike, so its error is that of 128
levels from zero on the absolute values.

What a range cuts off adds at least its squared distance to the range, which cumulated moments give for nothing: in the
search a candidate whose bound is above the least error so far is not computed. That leaves about a quarter of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from passes._quant import TensorRange
from toolchain.histogram import HALF_BINS, Distribution

_LEVELS_U8, _LEVELS_S8 = 256, 255
#: what the search shrinks a range by: these first, whose errors are the bounds for the next, down to a hundredth
_WIDE = 2.0 ** (-np.array([0, 2, 4]) / 4)
_NARROW = 2.0 ** (-np.array([1, 3, *range(5, 27)]) / 4)
#: then one side alone, low or high, [2, n]
_LOPSIDED = np.stack([np.append(_NARROW, np.ones_like(_NARROW)), np.append(np.ones_like(_NARROW), _NARROW)])
#: then around the best, whose neighbours are 6 / 24 of an octave away
_FINE = 2.0 ** (np.array([-4, -3, -2, -1, 1, 2, 3, 4]) / 24)
#: low and high by themselves around the best, [2, n]: each grid fills the gaps of the one before
_GRIDS = tuple(
    2.0 ** (np.array([(i, k) for i in range(-n, n + 1) for k in range(-n, n + 1) if i or k]).T / parts)
    for n, parts in ((2, 3), (1, 9), (1, 30))
)
#: quantisers that are computed at once: what numpy makes of them on the way stays in the cache
_AT_ONCE = 48


class Errors:
    """Squared errors of the quantisers of several tensors, and the ranges of least error."""

    def __init__(self, found: Sequence[Distribution]) -> None:
        self._low = np.array([each.minimum for each in found])
        self._high = np.array([each.maximum for each in found])
        self._width = np.array([each.width for each in found])
        total = np.array([each.total for each in found])
        self._signed = _Moments([each.counts for each in found], -HALF_BINS, self._width, total)
        self._absolute = _Moments([each.absolute for each in found], 0, self._width, total)

    def of_ranges(self, ways: Sequence[Sequence[TensorRange]]) -> tuple[np.ndarray, np.ndarray]:
        """Mean squared errors [ways, tensors] of ranges, in the asymmetric quantiser and in the symmetric one.

        In the square of the tensor's unit. ``ways`` holds for each way a range for each tensor.
        """
        low, high, amax = (
            np.array([[getattr(range_, name) for range_ in way] for way in ways]) for name in ("low", "high", "amax")
        )
        rows = np.tile(np.arange(len(self._width)), len(ways))
        asymmetric = self._asymmetric(rows, low.reshape(-1), high.reshape(-1))
        symmetric = self._symmetric(rows, low.reshape(-1), amax.reshape(-1))
        return asymmetric.reshape(low.shape), symmetric.reshape(low.shape)

    def least_symmetric(self) -> np.ndarray:
        """The amax [tensors] of least error."""
        widest = np.maximum(-self._low, self._high)
        search = _Search(self._symmetric, self._absolute, np.zeros_like(widest), widest)
        rows = np.arange(len(widest))
        search.shrink(rows, _WIDE, _WIDE)
        search.shrink(rows, _NARROW, _NARROW)
        search.around(rows, _FINE, _FINE)
        return search.high

    def least_asymmetric(self) -> tuple[np.ndarray, np.ndarray]:
        """low [tensors] and high [tensors] of least error. A side that does not reach zero stays as it is."""
        low, high = np.minimum(self._low, 0.0), np.maximum(self._high, 0.0)
        search = _Search(self._asymmetric, self._signed, low, high)
        rows = np.arange(len(low))
        search.shrink(rows, _WIDE, _WIDE)
        search.shrink(rows, _NARROW, _NARROW)
        one_sided = (low == 0) | (high == 0)
        search.around(rows[one_sided], _FINE, _FINE)
        # of a lopsided tensor the short side is best left whole
        search.shrink(rows[~one_sided], _LOPSIDED[0], _LOPSIDED[1])
        for grid in _GRIDS:
            search.around(rows[~one_sided], *grid)
        return np.where(low == 0, self._low, search.low), np.where(high == 0, self._high, search.high)

    def _asymmetric(self, rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Mean squared error [n] of the quantisers 0..255 that cover each low..high [n] and zero, of tensors [n]."""
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
        step = np.where(high > low, high - low, 1.0) / (_LEVELS_U8 - 1)
        zero_point = np.clip(np.rint(-low / step), 0, _LEVELS_U8 - 1)
        return self._signed.errors(rows, step, zero_point, _LEVELS_U8)

    def _symmetric(self, rows: np.ndarray, _: np.ndarray, amax: np.ndarray) -> np.ndarray:
        """Mean squared error [n] of the quantisers -127..127 that cover -amax..amax, amax [n], of tensors [n]."""
        step = np.where(amax > 0, amax, 127.0) / 127
        return self._absolute.errors(rows, step, np.zeros(len(rows)), _LEVELS_S8 // 2 + 1)


class _Search:
    """Looks for the ranges of least error among candidates; all arrays are [tensors] or, of candidates, [tensors, n].

    Attributes:
        low, high: the best so far.
    """

    def __init__(
        self,
        errors: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
        moments: _Moments,
        least: np.ndarray,
        most: np.ndarray,
    ) -> None:
        self.low, self.high = least.copy(), most.copy()
        self._least, self._most = least, most
        self._found = np.full(len(least), np.inf)
        self._errors, self._moments = errors, moments

    def shrink(self, rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """Tries the widest ranges times each pair of the factors low [n] and high [n], for the tensors ``rows``."""
        self._try(rows, self._least[rows, None] * low, self._most[rows, None] * high)

    def around(self, rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """Tries the best so far times each pair of the factors low [n] and high [n], no wider than the widest."""
        lows = np.maximum(self.low[rows, None] * low, self._least[rows, None])
        self._try(rows, lows, np.minimum(self.high[rows, None] * high, self._most[rows, None]))

    def _try(self, rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        # An exact zero moves the quantiser by up to half a step.
        half = (high - low) / (2 * (_LEVELS_U8 - 1))
        bound = self._moments.cut_off(rows[:, None], low - half, high + half)
        row, column = np.nonzero(bound < self._found[rows, None])
        errors = np.full(low.shape, np.inf)
        errors[row, column] = self._errors(rows[row], low[row, column], high[row, column])
        best = errors.argmin(axis=1)
        better = np.flatnonzero(errors[np.arange(len(rows)), best] < self._found[rows])
        changed, best = rows[better], best[better]
        self._found[changed] = errors[better, best]
        self.low[changed], self.high[changed] = low[better, best], high[better, best]


class _Moments:
    """Cumulated moments of several histograms.

    Args:
        counts: of each tensor float64 [bins].
        start: where the first bin begins, in bins.
        width: of a bin, in the unit of each tensor [tensors].
        total: weight of all elements of each tensor, those in no bin included [tensors].
    """

    def __init__(self, counts: Sequence[np.ndarray], start: int, width: np.ndarray, total: np.ndarray) -> None:
        rows, bins = len(counts), counts[0].size
        left = np.arange(start, start + bins, dtype=np.float64)
        square = left * left + left + 1 / 3
        # one bin more, empty, for edges that lie beyond
        self._counts = np.empty((rows, bins + 1))
        self._below = np.empty((3, rows, bins + 1))
        self._counts[:, -1] = 0.0
        self._below[:, :, 0] = 0.0
        for row, each in enumerate(counts):  # one after the other: what is made on the way stays in the cache
            self._counts[row, :-1] = each
            each.cumsum(out=self._below[0, row, 1:])
            (each * (left + 0.5)).cumsum(out=self._below[1, row, 1:])
            (each * square).cumsum(out=self._below[2, row, 1:])
        self._whole = self._below[:, :, -1]
        self._start, self._bins = start, bins
        self._width, self._scale = width, width**2 / total

    def cut_off(self, rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """At most the mean squared distance of the elements to what low..high leaves of the tensors ``rows``.

        All of one shape, or broadcast to it; low and high in the tensor's unit.
        """
        width = self._width[rows]
        result = np.zeros(low.shape)
        for bound, above in ((np.floor(low / width), False), (np.ceil(high / width), True)):
            index = np.clip(bound - self._start, 0, self._bins).astype(np.intp)
            edge = index + self._start
            zeroth, first, second = self._below[:, rows, index]
            if above:
                whole = self._whole[:, rows]
                zeroth, first, second = whole[0] - zeroth, whole[1] - first, whole[2] - second
            result += second - 2 * edge * first + edge * edge * zeroth
        return np.asarray(result * self._scale[rows])

    def errors(self, rows: np.ndarray, step: np.ndarray, zero_point: np.ndarray, levels: int) -> np.ndarray:
        """Mean squared error [n] of quantisers of ``levels`` from 0 to levels - 1, each on one of the tensors.

        In the square of the tensor's unit, as ``step`` [n] is in its unit.
        """
        unit = step / self._width[rows]
        first = (0.5 - zero_point) * unit - self._start  # edges count from the left end of the bins
        steps = np.arange(levels - 1, dtype=np.float64)
        zeroth, moment, _ = self._below.reshape(3, -1)
        sums = np.empty(len(rows))
        for start in range(0, len(rows), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            edges = unit[some, None] * steps
            edges += first[some, None]
            np.maximum(edges, 0, out=edges)  # G is 0 at the left end, and before it
            index = np.minimum(edges, self._bins).astype(np.intp)
            inside = edges - index
            index += (rows[some] * (self._bins + 1))[:, None]
            inside *= inside
            inside *= self._counts.take(index)
            inside *= 0.5
            edges += self._start
            edges *= zeroth.take(index)
            edges += inside
            np.subtract(moment.take(index), edges, out=edges).sum(axis=1, out=sums[some])
        zeroth, moment, second = self._whole[:, rows]
        last = (levels - 1 - zero_point) * unit
        error = second - 2 * last * moment + last * last * zeroth + 2 * unit * sums
        return np.asarray(np.maximum(error, 0.0) * self._scale[rows])
