"""Bias correction on samples: means by batches of any size, both modes, and that only what comes before is run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from toolchain_support import conv_net

from passes import DEFAULT_PIPELINE
from passes.correct_bias import layer_inputs, quantised_layers
from passes.quantize_int8 import QuantizeInt8
from toolchain.bias_correction import Mode, channel_means, correct_bias
from toolchain.calibration import calibrate
from toolchain.errors import DataError, GraphError
from toolchain.evaluate import Feeds, run_reference
from toolchain.optimize import optimize
from toolchain.recipe import PassStep


@pytest.fixture
def model() -> ir.Model:
    found = ir.from_proto(conv_net())
    optimize(found, [PassStep(name=name) for name in DEFAULT_PIPELINE])
    return found


@pytest.fixture
def batches() -> list[Feeds]:
    rng = np.random.default_rng(0)
    return [{"image": rng.random((count, 3, 16, 16), dtype=np.float32)} for count in (16, 16, 5)]


def quantised(model: ir.Model, batches: list[Feeds]) -> ir.Model:
    copy = model.clone()
    QuantizeInt8(calibration=calibrate(model, batches, method="minmax"), granularity="tensor")(copy)
    return copy


def test_means_do_not_depend_on_the_batches(model: ir.Model, batches: list[Feeds]) -> None:
    axes = layer_inputs(model)
    assert axes
    assert set(axes.values()) <= {1, -1}
    whole = [{"image": np.concatenate([feeds["image"] for feeds in batches])}]
    parts, once = channel_means(model, iter(batches), axes), channel_means(model, whole, axes)
    for name in axes:
        np.testing.assert_allclose(parts[name], once[name], rtol=1e-6)
    np.testing.assert_allclose(once["image"], whole[0]["image"].mean(axis=(0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("mode", ["fast", "sequential"])
def test_means_of_the_layers_come_back(model: ir.Model, batches: list[Feeds], mode: Mode) -> None:
    candidate = quantised(model, batches)
    layers = list(quantised_layers(model, candidate))
    assert len(layers) > 1
    steps: list[tuple[int, int]] = []

    def off() -> float:
        """How far the means of the outputs are off, over all layers and channels."""
        theirs = {str(x.node.outputs[0].name): 1 if "Conv" in x.node.op_type else -1 for x in layers}
        mine = {str(x.reference.outputs[0].name): 1 if "Conv" in x.node.op_type else -1 for x in layers}
        found, wanted = channel_means(candidate, batches, theirs), channel_means(model, batches, mine)
        return sum(
            float(np.square(a - b).sum() / np.square(b).sum())
            for a, b in zip(found.values(), wanted.values(), strict=True)
        )

    before = off()
    done = correct_bias(model, candidate, batches, mode=mode, on_progress=lambda *step: steps.append(step))
    assert done.corrected == len(layers)
    assert not done.declined
    assert steps[-1] == (len(layers), len(layers))
    # What the layer before shifts, only the sequential mode takes back; what is left is the rounding of the bias.
    assert off() < before / (1.2 if mode == "fast" else 1e4)


def test_sequential_again_finds_nothing_to_speak_of(model: ir.Model, batches: list[Feeds]) -> None:
    candidate = quantised(model, batches)
    correct_bias(model, candidate, batches, mode="sequential")
    before = run_reference(candidate, batches)
    correct_bias(model, candidate, batches, mode="sequential")
    after = run_reference(candidate, batches)
    for a, b in zip(before, after, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=1e-3)


def test_nothing_to_do(model: ir.Model, batches: list[Feeds]) -> None:
    with pytest.raises(DataError, match="samples"):
        correct_bias(model, quantised(model, batches), [])
    with pytest.raises(GraphError, match="layer"):
        correct_bias(model, model, batches)
