"""Histograms that grow, and the ranges that are read off them: against brute force on the elements themselves."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import pytest

from passes._quant import TensorRange
from toolchain.clipping import METHODS, PERCENTILE, Method, squared_error, tensor_ranges
from toolchain.histogram import HALF_BINS, Distribution, Histograms, NonFinite, coprime_stride, joined, merged, share


def gathered(values: np.ndarray, pieces: int = 1) -> Distribution:
    histograms = Histograms(1, sampled=None)
    for piece in np.array_split(values.astype(np.float32), pieces):
        histograms.add([piece], 1)
    found = histograms.distribution(0)
    assert found is not None
    return found


def tensor_range(found: Distribution, *, method: str = "auto", percentile: float = PERCENTILE) -> TensorRange:
    (range_,) = tensor_ranges([found], method=cast(Method, method), percentile=percentile)
    return range_


def draw(name: str, seed: int = 0, size: int = 60_000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = {
        "normal": lambda: rng.normal(size=size),
        "relu": lambda: np.maximum(rng.normal(size=size), 0),
        "relu6": lambda: np.clip(rng.normal(size=size) * 4, 0, 6),
        "laplace": lambda: rng.laplace(size=size),
        "heavy": lambda: rng.standard_t(2.5, size=size),
        "skewed": lambda: rng.exponential(size=size) - 0.3,
        "negative": lambda: -rng.exponential(size=size),
        "tiny": lambda: rng.normal(size=size) * 1e-20,
        "huge": lambda: rng.normal(size=size) * 1e20,
        "far": lambda: rng.normal(size=size) + 50,
    }[name]()
    return values.astype(np.float32)


KINDS = ["normal", "relu", "relu6", "laplace", "heavy", "skewed", "negative", "tiny", "huge", "far"]


def asymmetric_error(x: np.ndarray, low: float, high: float) -> float:
    """The quantiser 0..255 with an exact zero, element by element."""
    x = x.astype(np.float64)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return float(np.mean(((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale - x) ** 2))


def symmetric_error(x: np.ndarray, amax: float) -> float:
    x = x.astype(np.float64)
    scale = amax / 127
    return float(np.mean((np.clip(np.rint(x / scale), -127, 127) * scale - x) ** 2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_histogram_does_not_depend_on_how_its_elements_came(kind: str) -> None:
    values = draw(kind)
    ascending, descending = np.sort(np.abs(values)), np.sort(np.abs(values))[::-1]
    for one, other in (
        (gathered(values), gathered(values, pieces=501)),
        (gathered(values), gathered(values[::-1], pieces=7)),
        (gathered(ascending, pieces=100), gathered(descending, pieces=3)),
    ):
        assert one.width == other.width
        np.testing.assert_array_equal(one.counts, other.counts)
        assert (one.zeros, one.minimum, one.maximum) == (other.zeros, other.minimum, other.maximum)


@pytest.mark.parametrize("kind", KINDS)
def test_bins_hold_what_numpy_counts_in_them(kind: str) -> None:
    values = draw(kind)
    found = gathered(values, pieces=13)
    edges = np.arange(-HALF_BINS, HALF_BINS + 1) * found.width
    expected, _ = np.histogram(values[values != 0].astype(np.float64), edges)
    np.testing.assert_array_equal(found.counts, expected)
    assert found.zeros == np.count_nonzero(values == 0)
    assert found.minimum == values.min()
    assert found.maximum == values.max()
    assert found.total == values.size
    # no wider than needed: the larger side fills more than half of its bins
    assert math.log2(found.width) == int(math.log2(found.width))
    assert np.abs(values).max() >= found.width * HALF_BINS / 2


def test_merging_bins_twice_is_merging_them_by_four() -> None:
    counts = np.random.default_rng(0).integers(0, 9, 2 * HALF_BINS)
    np.testing.assert_array_equal(merged(merged(counts, 1), 1), merged(counts, 2))
    for doublings in (0, 1, 5, 11, 12, 40, 200):
        result = merged(counts, doublings)
        assert result[:HALF_BINS].sum() == counts[:HALF_BINS].sum()
        assert result[HALF_BINS:].sum() == counts[HALF_BINS:].sum()


def test_values_that_double_the_width_many_times_are_not_lost() -> None:
    histograms = Histograms(1, sampled=None)
    for power in range(-120, 120, 3):
        histograms.add([np.full((1, 9000), 2.0**power, np.float32)], 1)
    found = histograms.distribution(0)
    assert found is not None
    assert found.total == 80 * 9000
    assert found.maximum == 2.0**117


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_the_quantiser_on_the_elements(kind: str) -> None:
    values = draw(kind)
    found = gathered(values)
    for method in METHODS:
        range_ = tensor_range(found, method=method)
        asymmetric, symmetric = squared_error(found, range_)
        assert asymmetric == pytest.approx(asymmetric_error(values, range_.low, range_.high), rel=0.03)
        assert symmetric == pytest.approx(symmetric_error(values, range_.amax), rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_mse_finds_the_range_that_brute_force_finds(kind: str) -> None:
    values = draw(kind, size=8000)
    range_ = tensor_range(gathered(values), method="mse")
    widest = float(np.abs(values).max())
    best = min(symmetric_error(values, widest * f) for f in np.geomspace(0.02, 1, 150))
    assert symmetric_error(values, range_.amax) <= best * 1.03
    low, high = float(values.min()), float(values.max())
    factors = np.geomspace(0.05, 1, 30)
    grid = [(low * a, high * b) for a in (factors if low < 0 else [1]) for b in (factors if high > 0 else [1])]
    best = min(asymmetric_error(values, *pair) for pair in grid)
    assert asymmetric_error(values, range_.low, range_.high) <= best * 1.03
    assert low <= range_.low
    assert range_.high <= high


def test_mse_clips_one_outlier_of_many_and_minmax_does_not() -> None:
    values = np.append(draw("normal", size=1_000_000), np.float32(60))
    found = gathered(values)
    assert tensor_range(found, method="minmax").amax == 60
    clipped = tensor_range(found, method="mse")
    assert clipped.maximum == 60
    assert symmetric_error(values, clipped.amax) < 0.9 * symmetric_error(values, 60)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("kind", ["normal", "relu", "skewed", "laplace", "negative", "far"])
def test_percentiles_are_numpys(kind: str, percentile: float) -> None:
    values = draw(kind)
    found = gathered(values)
    range_ = tensor_range(found, method="percentile", percentile=percentile)
    tail = (100 - percentile) / 2
    within = 2 * found.width
    assert range_.low == pytest.approx(np.percentile(values, tail), abs=within)
    assert range_.high == pytest.approx(np.percentile(values, 100 - tail), abs=within)
    assert range_.amax == pytest.approx(np.percentile(np.abs(values), percentile), abs=within)


def divergence(counts: np.ndarray, keep: int, levels: int) -> float:
    """Kullback-Leibler divergence, one bin at a time, as the method is written down."""
    reference = counts[:keep].astype(np.float64).copy()
    reference[-1] += counts[keep:].sum()
    occupied = reference > 0
    candidate = np.zeros(keep)
    for level in range(levels):
        start, end = keep * level // levels, keep * (level + 1) // levels
        mass = counts[start:end].sum()
        number = occupied[start:end].sum()
        if number:
            candidate[start:end][occupied[start:end]] = mass / number
    if (candidate[occupied] <= 0).any():
        return math.inf
    p, q = reference[occupied] / reference.sum(), candidate[occupied] / candidate.sum()
    return float((p * np.log(p / q)).sum())


@pytest.mark.parametrize("kind", ["normal", "relu", "laplace", "heavy", "skewed"])
def test_entropy_has_the_least_divergence_that_brute_force_finds(kind: str) -> None:
    values = draw(kind, size=20_000)
    found = gathered(values)
    absolute = found.counts[HALF_BINS:] + found.counts[:HALF_BINS][::-1]
    range_ = tensor_range(found, method="entropy")
    kept = math.ceil(range_.amax / found.width - 1e-9)
    used = int(np.flatnonzero(absolute)[-1]) + 1
    least = min(divergence(absolute, keep, 128) for keep in range(128, used + 1, 5))
    assert divergence(absolute, kept, 128) <= least * 1.1 + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_auto_is_as_good_as_the_best_of_all(kind: str) -> None:
    found = gathered(draw(kind))
    errors = np.array([squared_error(found, tensor_range(found, method=m)) for m in METHODS[1:]])
    scores = (errors / errors.min(axis=0)).max(axis=1)
    chosen = (np.array(squared_error(found, tensor_range(found))) / errors.min(axis=0)).max()
    assert chosen <= max(1.02, scores.min()) + 1e-9


def test_auto_does_not_clip_where_clipping_gains_nothing() -> None:
    assert tensor_range(gathered(draw("relu6"))).method == "minmax"
    uniform = np.random.default_rng(0).uniform(-1, 3, 50_000)
    assert tensor_range(gathered(uniform)).method == "minmax"


def test_the_moving_average_is_of_single_samples() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(5, 40)).astype(np.float32)
    whole, one_by_one = Histograms(1, sampled=None), Histograms(1, sampled=None)
    whole.add([samples], 5)
    for sample in samples:
        one_by_one.add([sample[None]], 1)
    for histograms in (whole, one_by_one):
        found = histograms.distribution(0)
        assert found is not None
        range_ = tensor_range(found, method="moving-average")
        assert range_.low == pytest.approx(samples.min(axis=1).astype(np.float64).mean(), rel=1e-6)
        assert range_.high == pytest.approx(samples.max(axis=1).astype(np.float64).mean(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
@pytest.mark.parametrize("method", METHODS)
def test_a_constant_tensor_has_its_value_as_range(value: float, method: str) -> None:
    range_ = tensor_range(gathered(np.full(1000, value)), method=method)
    assert (range_.low, range_.high, range_.amax) == (value, value, abs(value))


@pytest.mark.parametrize("method", METHODS)
def test_elements_that_were_not_sampled_still_bound_the_range(method: str) -> None:
    """All that was sampled is zero; two elements are not."""
    histograms = Histograms(1, sampled=16)
    array = np.zeros((1, 5000), np.float32)
    array[0, 4001], array[0, 4002] = -2, 3
    histograms.add([array], 1)
    found = histograms.distribution(0)
    assert found is not None
    assert found.total == found.zeros
    range_ = tensor_range(found, method=method)
    assert -2 <= range_.low <= 0 <= range_.high <= 3
    assert 0 <= range_.amax <= 3


def test_sampling_leaves_extremes_exact_and_the_distribution_nearly() -> None:
    rng = np.random.default_rng(0)
    histograms = Histograms(2, sampled=2048, bounds={1: (0.0, 6.0)})
    everything = []
    for _ in range(30):
        array = rng.normal(size=(1, 32, 40, 40)).astype(np.float32)
        array[0, 3, 5, 7] = rng.normal() * 20
        everything.append(array)
        histograms.add([array, np.clip(array, 0, 6)], 1)
    values = np.concatenate(everything).reshape(-1)
    found, bounded = histograms.distribution(0), histograms.distribution(1)
    assert found is not None
    assert bounded is not None
    assert (found.minimum, found.maximum) == (values.min(), values.max())
    assert (bounded.minimum, bounded.maximum) == (0.0, min(6.0, values.max()))
    assert histograms.elements(0) == values.size
    assert 30 * 1800 <= found.total <= 30 * 2048
    range_ = tensor_range(found, method="percentile", percentile=99.0)
    assert range_.amax == pytest.approx(np.percentile(np.abs(values), 99), rel=0.02)


def test_a_bound_that_no_sampled_element_reached_is_not_taken_for_the_extreme() -> None:
    histograms = Histograms(1, sampled=64, bounds={0: (0.0, 6.0)})
    array = np.full((1, 4096), 2.0, np.float32)
    array[0, 1234], array[0, 2345] = 0.5, 5.5
    histograms.add([array], 1)
    found = histograms.distribution(0)
    assert found is not None
    assert (found.minimum, found.maximum) == (0.5, 5.5)


def test_strides_visit_every_channel_and_column() -> None:
    for shape in ((96, 112, 112), (64, 56, 56), (1280, 7, 7), (16, 32, 32)):
        size = math.prod(shape)
        stride = coprime_stride(size, share(size, 2048))
        channel, _, column = np.unravel_index(np.arange(0, size, stride), shape)
        assert set(column.tolist()) == set(range(shape[2]))
        assert len(set(channel.tolist())) >= min(shape[0], size // stride) * 0.99


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_nothing_is_taken_in(bad: float) -> None:
    histograms = Histograms(2, sampled=16)
    good = np.random.default_rng(0).normal(size=(2, 3000)).astype(np.float32)
    histograms.add([good, good], 2)
    before = {key: array.copy() for key, array in histograms.arrays().items()}
    spoiled = good.copy()
    spoiled[1, 777] = bad
    with pytest.raises(NonFinite):
        histograms.add([good, spoiled], 2)
    for key, array in histograms.arrays().items():
        np.testing.assert_array_equal(array, before[key])


def test_concatenated_tensors_have_the_distribution_of_the_whole() -> None:
    one, other = draw("relu", 1, 30_000), draw("laplace", 2, 90_000) * 7
    whole = gathered(np.concatenate([one, other]))
    found = joined([(gathered(one), one.size), (gathered(other), other.size)])
    assert found.width == whole.width
    np.testing.assert_allclose(found.counts, whole.counts)
    assert found.zeros == pytest.approx(whole.zeros)
    assert (found.minimum, found.maximum) == (whole.minimum, whole.maximum)


def test_tensors_without_elements_have_no_distribution() -> None:
    histograms = Histograms(2, sampled=16)
    histograms.add([np.zeros((1, 0), np.float32), np.ones((1, 3), np.float32)], 1)
    assert histograms.distribution(0) is None
    assert histograms.distribution(1) is not None
