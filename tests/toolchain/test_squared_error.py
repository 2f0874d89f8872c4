"""The search for the range of least error, of many tensors at once, against every candidate computed."""

from __future__ import annotations

import numpy as np
import pytest

from passes._quant import TensorRange
from toolchain.histogram import Distribution, Histograms
from toolchain.squared_error import Errors


def distributions() -> list[Distribution]:
    rng = np.random.default_rng(0)
    size = 30_000
    tensors = [
        rng.normal(size=size),
        np.maximum(rng.normal(size=size), 0),
        -rng.exponential(size=size),
        np.where(rng.normal(size=size) < 1, -0.17 * rng.uniform(size=size), rng.gamma(1.5, size=size)),  # as GELU gives
        rng.standard_t(2, size=size),
        np.append(rng.normal(size=size - 1) * 1e-3, 50),
        rng.uniform(3, 5, size=size),
        np.clip(rng.normal(size=size) * 4, 0, 6),
    ]
    histograms = Histograms(len(tensors), sampled=None)
    histograms.add([tensor.astype(np.float32)[None] for tensor in tensors], 1)
    found = [histograms.distribution(i) for i in range(len(tensors))]
    return [each for each in found if each is not None]


FOUND = distributions()


def as_range(low: float, high: float, amax: float) -> TensorRange:
    return TensorRange(low, high, amax, low, high, "")


def test_tensors_that_are_searched_together_do_not_touch_each_other() -> None:
    errors = Errors(FOUND)
    lows, highs = errors.least_asymmetric()
    amaxes = errors.least_symmetric()
    for i, each in enumerate(FOUND):
        (low,), (high,) = Errors([each]).least_asymmetric()
        assert (low, high) == (lows[i], highs[i])
        assert Errors([each]).least_symmetric()[0] == amaxes[i]
    ways = [[as_range(low, high, amax) for low, high, amax in zip(lows, highs, amaxes, strict=True)]]
    together = errors.of_ranges(ways)
    for i, each in enumerate(FOUND):
        alone = Errors([each]).of_ranges([[ways[0][i]]])
        assert (alone[0][0, 0], alone[1][0, 0]) == (together[0][0, i], together[1][0, i])


@pytest.mark.parametrize("i", range(len(FOUND)))
def test_no_range_of_a_dense_grid_is_much_better(i: int) -> None:
    errors = Errors([FOUND[i]])
    (low,), (high,) = errors.least_asymmetric()
    (amax,) = errors.least_symmetric()
    asymmetric, symmetric = (float(each[0, 0]) for each in errors.of_ranges([[as_range(low, high, amax)]]))
    least, most = FOUND[i].minimum, FOUND[i].maximum
    factors = np.geomspace(0.01, 1, 60)
    grid = [(least * a, most * b) for a in (factors if least < 0 else [1]) for b in (factors if most > 0 else [1])]
    ways = [[as_range(a, b, max(-least, most) * factor)] for a, b in grid for factor in [1.0]]
    assert asymmetric <= float(errors.of_ranges(ways)[0].min()) * 1.03
    ways = [[as_range(least, most, max(-least, most) * factor)] for factor in np.geomspace(0.01, 1, 400)]
    assert symmetric <= float(errors.of_ranges(ways)[1].min()) * 1.01
    assert least <= low
    assert high <= most


@pytest.mark.parametrize("i", range(len(FOUND)))
def test_the_bound_that_spares_a_candidate_is_never_above_its_error(i: int) -> None:
    errors = Errors([FOUND[i]])
    widest = max(-FOUND[i].minimum, FOUND[i].maximum)
    low, high = min(FOUND[i].minimum, 0.0), max(FOUND[i].maximum, 0.0)
    factors = np.geomspace(1e-3, 1, 200)
    rows = np.zeros(factors.size, np.intp)
    half = (high - low) * factors / 510
    bound = errors._signed.cut_off(rows, low * factors - half, high * factors + half)
    assert (bound <= errors._asymmetric(rows, low * factors, high * factors) * (1 + 1e-9) + 1e-12 * widest**2).all()
    bound = errors._absolute.cut_off(rows, 0 * factors, widest * factors)
    assert (bound <= errors._symmetric(rows, 0 * factors, widest * factors) * (1 + 1e-9) + 1e-12 * widest**2).all()
