"""Weights as integers: the arithmetic, against sums written out."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import onnx_ir as ir
import pytest

from passes import _quant_weights
from passes._quant import affine_s8, affine_u8, symmetric_s8
from passes._quant_weights import bias_scale_floor, quantize_array, quantize_weight


def error(weight: np.ndarray, axis: int | None, method: str) -> np.ndarray:
    made = quantize_array(weight, axis, method=method)
    shape = [1] * weight.ndim
    if axis is not None:
        shape[axis] = -1
    back = made.values * made.scale.reshape(shape).astype(np.float64)
    return np.square(back - weight).sum(axis=tuple(i for i in range(weight.ndim) if i != axis))


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("method", ["amax", "mse"])
def test_rounds_to_the_nearest(axis: int | None, method: str) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 5, 3)).astype(np.float32)
    made = quantize_array(weight, axis, method=method)
    assert made.values.dtype == np.int8
    assert made.values.shape == weight.shape
    assert made.scale.dtype == np.float32
    assert made.scale.shape == (() if axis is None else (weight.shape[axis],))
    assert made.values.min() >= -127
    shape = [1] * 3
    if axis is not None:
        shape[axis] = -1
    scale = made.scale.reshape(shape)
    inside = np.abs(weight) <= 127 * scale
    assert (np.abs(made.values * scale - weight) <= scale * 0.5001)[inside].all()
    if method == "amax":
        assert inside.all() or np.abs(weight / scale)[~inside].max() < 127.001


def test_mse_finds_the_best_clipping() -> None:
    """Against every share of amax in steps of a thousandth."""
    rng = np.random.default_rng(1)
    weight = np.concatenate(
        [rng.standard_normal((3, 2000)), rng.standard_t(3, (3, 2000)), rng.uniform(-1, 1, (2, 2000))]
    ).astype(np.float32)
    found = error(weight, 0, "mse")
    amax = np.abs(weight).max(axis=1, keepdims=True)
    best = np.full(len(weight), np.inf)
    for share in np.arange(0.3, 1.0005, 0.001):
        scale = amax * share / 127
        back = np.clip(np.rint(weight / scale), -127, 127) * scale
        best = np.minimum(best, np.square(back - weight).sum(axis=1))
    assert (found <= error(weight, 0, "amax") * (1 + 1e-5)).all()
    assert (found <= best * 1.05).all()
    assert found.sum() < error(weight, 0, "amax").sum()


@pytest.mark.parametrize(("shape", "axis"), [((8, 6, 3, 3), 0), ((40, 7), 1), ((5, 4, 3), 1), ((6, 1, 5, 5), 0)])
def test_balanced_errors_cancel(shape: tuple[int, ...], axis: int) -> None:
    weight = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    weight.reshape(-1)[::7] = 0
    nearest, made = (quantize_array(weight, axis, method=method) for method in ("amax", "balanced"))
    np.testing.assert_array_equal(made.scale, nearest.scale)
    scaled = np.moveaxis(weight, axis, 0) / made.scale.reshape(-1, *[1] * (weight.ndim - 1))
    error = np.moveaxis(made.values, axis, 0) - scaled.astype(np.float64)
    assert np.abs(error.reshape(len(error), -1).sum(axis=1)).max() <= 0.5001
    assert np.abs(error).max() < 1.0001
    assert not made.values[weight == 0].any()
    assert np.abs(made.values).max() == 127
    # one element in a few is moved, and by one
    moved = made.values.astype(int) - nearest.values
    assert np.abs(moved).max() == 1
    assert (moved != 0).mean() < 0.2


def test_balanced_stays_in_range() -> None:
    """A row that is nothing but its own extremes has nothing to move."""
    weight = np.tile(np.array([1.0, 0.996, -1.0, 0.996], np.float32), (2, 8))
    made = quantize_array(weight, 0, method="balanced")
    assert np.abs(made.values).max() == 127


def test_channels_without_anything() -> None:
    made = quantize_array(np.zeros((3, 4), np.float32), 0, method="mse")
    assert not made.values.any()
    assert (made.scale == 1).all()
    tiny = quantize_array(np.full((1, 4), 1e-42, np.float32), 0, method="amax")
    assert np.isfinite(tiny.scale).all()
    assert not tiny.values.any()


def test_a_scale_is_never_below_its_floor() -> None:
    bias = np.array([0.0, 1.0, 1e6])
    floor = bias_scale_floor(bias, 0.01)
    made = quantize_array(np.full((3, 4), 1e-9, np.float32), 0, method="amax", floor=floor)
    assert (np.abs(bias / (0.01 * made.scale.astype(np.float64))) < 2**31).all()
    assert made.scale[0] < 1e-10


def test_a_tensor_is_quantised_once_for_as_long_as_it_lives() -> None:
    tensor = ir.Tensor(np.ones((2, 2), np.float32))
    made = quantize_weight(tensor, 0, method="amax")
    assert quantize_weight(tensor, 0, method="amax") is made
    assert quantize_weight(tensor, 1, method="amax") is not made
    assert quantize_weight(tensor, 0, method="amax", factor=2.0).scale[0] == 2 * made.scale[0]
    alive = weakref.ref(tensor)
    gc.collect()  # what other tests left, before it is counted
    before = len(_quant_weights._made)
    del tensor
    gc.collect()
    assert alive() is None
    assert len(_quant_weights._made) == before - 1


@pytest.mark.parametrize(("low", "high"), [(0, 6), (-1, 3), (2, 5), (-5, -1), (0, 0), (-1e-30, 1e30)])
def test_activations_hold_zero_exactly(low: float, high: float) -> None:
    for made, lowest in ((affine_u8(low, high), 0), (affine_s8(low, high), -128)):
        assert lowest <= made.zero_point <= lowest + 255
        assert made.scale > 0
        assert (lowest - made.zero_point) * made.scale <= min(low, 0) + made.scale
        assert (lowest + 255 - made.zero_point) * made.scale >= max(high, 0) - made.scale
    assert affine_s8(low, high).zero_point == affine_u8(low, high).zero_point - 128


def test_symmetric_activations() -> None:
    assert symmetric_s8(12.7).scale == pytest.approx(0.1)
    assert symmetric_s8(12.7).zero_point == symmetric_s8(0).zero_point == 0
    assert symmetric_s8(0).scale == 1
