"""What quantisation passes share: calibrated ranges, and the arithmetic from a range to scale and zero-point.

Integer quantisation as in Jacob et al. 2018 (arXiv 1712.05877): ``real = scale * (quantised - zero_point)``.
A ``Calibration`` is made once (``toolchain/calibration.py``) and lowered into as many dialects as there are
targets; so for each tensor it holds what an asymmetric dialect needs (low, high) and what a symmetric one
needs (amax): the best clipping of one is not that of the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class TensorRange:
    """The calibrated range of one tensor.

    Attributes:
        low, high: what an asymmetric quantiser covers, in the tensor's unit; low <= high. They need not hold
            zero: ``affine`` widens them, since padding and ReLU need an exact zero.
        amax: what a symmetric quantiser covers, from -amax to amax; >= 0.
        minimum, maximum: the extremes that were seen, before any clipping.
        method: how low, high and amax were chosen: "minmax", "percentile", "entropy", "mse", "moving-average".
    """

    low: float
    high: float
    amax: float
    minimum: float
    maximum: float
    method: str


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Ranges of a graph's tensors.

    Attributes:
        graph: digest of the graph that they belong to.
        samples: how many samples (batch entries) were seen.
        ranges: for each value name of the main graph (inputs and node outputs of float type) its range. A value
            that only a Relu or a Clip reads has the range of what comes out of that.
        channel_amax: where it was asked for, for inputs of Gemm and MatMul the largest absolute value of every
            channel, float64 [channels of the last axis].
        channel_mean: where it was asked for, for outputs of Conv, ConvTranspose, Gemm and MatMul the mean of every
            output channel, float64 [channels].
        asked: how many samples there were to be; None where that is not known.
    """

    graph: str
    samples: int
    ranges: Mapping[str, TensorRange]
    channel_amax: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    channel_mean: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    asked: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Affine:
    """Scale and zero-point of one tensor: float32 and an integer of the quantised type."""

    scale: float
    zero_point: int


def affine_u8(low: float, high: float) -> Affine:
    """Asymmetric, 0..255, with an exact zero. A range of nothing but zero gets scale 1."""
    low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        return Affine(1.0, 0)
    scale = float(np.float32((high - low) / 255))
    return Affine(scale, int(np.clip(np.rint(-low / scale), 0, 255)))


def affine_s8(low: float, high: float) -> Affine:
    """Asymmetric, -128..127: ``affine_u8`` with everything 128 lower."""
    unsigned = affine_u8(low, high)
    return Affine(unsigned.scale, unsigned.zero_point - 128)


def symmetric_s8(amax: float) -> Affine:
    """Symmetric, -127..127 (-128 stays unused), zero-point 0. An amax of 0 gets scale 1."""
    return Affine(float(np.float32(amax / 127)) if amax > 0 else 1.0, 0)
