"""Distances between tensors, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from toolchain.metrics import noise_to_signal, tensor_error


def test_by_hand() -> None:
    error = tensor_error(np.array([[3.0, 4.0]]), np.array([[3.0, 3.0]]))
    assert error.max_abs == 1
    assert error.nmse == pytest.approx(1 / 25)
    assert error.sqnr_db == pytest.approx(10 * math.log10(25))
    assert error.cosine == pytest.approx((9 + 12) / (5 * math.sqrt(18)))
    assert error.top1_agreement == 0  # [3, 3]: the first is the largest now


def test_equal_is_exact() -> None:
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    error = tensor_error(array, array.copy())
    assert (error.max_abs, error.nmse, error.sqnr_db, error.top1_agreement) == (0, 0, math.inf, 1)
    assert error.cosine == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_or_infinity_on_one_side_is_infinitely_far(bad: float) -> None:
    error = tensor_error(np.array([1.0, 2.0]), np.array([1.0, bad]))
    assert error.max_abs == error.nmse == math.inf
    assert error.cosine == 0


def test_infinities_and_nans_that_agree_are_equal() -> None:
    array = np.array([1.0, math.inf, -math.inf, math.nan])
    assert tensor_error(array, array.copy()).nmse == 0


def test_against_zero_nothing_is_small() -> None:
    assert tensor_error(np.zeros(3), np.full(3, 1e-9)).nmse == math.inf
    assert tensor_error(np.zeros(3), np.zeros(3)).cosine == 1


def test_top1_counts_rows() -> None:
    reference = np.eye(4)
    candidate = np.eye(4)
    candidate[0] = [0, 1, 0, 0]
    assert tensor_error(reference, candidate).top1_agreement == 0.75


@pytest.mark.parametrize("array", [np.array(3), np.zeros((0, 4)), np.array([1, 2], np.int64), np.array([True])])
def test_scalars_empty_integers_and_bools(array: np.ndarray) -> None:
    error = tensor_error(array, array)
    assert error.nmse == 0
    assert error.top1_agreement is None


@pytest.mark.parametrize("unit", [1e-300, 1e-30, 1.0, 1e300])
def test_the_unit_does_not_matter(unit: float) -> None:
    error = tensor_error(np.array([[3.0, 4.0]]) * unit, np.array([[3.0, 3.0]]) * unit)
    assert error.nmse == pytest.approx(1 / 25)
    assert error.cosine == pytest.approx((9 + 12) / (5 * math.sqrt(18)))
    assert error.max_abs == pytest.approx(unit)


def test_strings_are_equal_or_not() -> None:
    assert tensor_error(np.array(["a"], object), np.array(["a"], object)).nmse == 0
    assert tensor_error(np.array(["a"], object), np.array(["b"], object)).nmse == math.inf


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        tensor_error(np.zeros(2), np.zeros(3))


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25, 0.0])
@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.3])
def test_noise_to_signal_is_the_nmse_of_float32(scale: float, noise: float) -> None:
    rng = np.random.default_rng(2)
    reference = (rng.normal(size=(3, 40_000)) * scale).astype(np.float32)
    candidate = (reference * (1 + noise * rng.normal(size=reference.shape))).astype(np.float32)
    assert noise_to_signal(reference, candidate) == pytest.approx(tensor_error(reference, candidate).nmse, rel=1e-4)


def test_noise_to_signal_of_what_is_not_finite() -> None:
    values = np.array([1.0, np.inf], np.float32)
    assert noise_to_signal(values, values) == 0
    assert noise_to_signal(values, np.array([1.0, 2.0], np.float32)) == np.inf
