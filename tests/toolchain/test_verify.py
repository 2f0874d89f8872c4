"""Fidelity, the layer by which an error comes in, and accuracy; against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest
from toolchain_support import conv_net

from toolchain.data import Batch
from toolchain.errors import DataError, FidelityError
from toolchain.evaluate import input_specs, reference_session, run_reference
from toolchain.optimize import optimize
from toolchain.recipe import Recipe
from toolchain.seeded import seeded_inputs
from toolchain.verify import compare, compare_layers, measure_accuracy, require


def models() -> tuple[ir.Model, ir.Model, list[dict[str, np.ndarray]]]:
    reference = ir.from_proto(conv_net())
    candidate = reference.clone()
    optimize(candidate, Recipe(model="x").pipeline())
    samples = [seeded_inputs(input_specs(reference), batch=b, seed=b) for b in (1, 3)]
    return reference, candidate, samples


def test_an_optimised_graph_passes() -> None:
    reference, candidate, samples = models()
    with reference_session(candidate) as session:
        fidelity = compare(run_reference(reference, samples), session, samples, bound=1e-8, inputs="seeded random")
    assert fidelity.passed
    assert fidelity.outputs["logits"].sqnr_db > 100
    require(fidelity, reference, candidate, samples[0], where="here")


def test_a_wrong_weight_fails_and_its_layer_is_named() -> None:
    reference, candidate, samples = models()
    name = next(n for n, v in candidate.graph.initializers.items() if v.shape == [8, 3, 3, 3])
    tensor = candidate.graph.initializers[name].const_value
    assert tensor is not None
    wrong = tensor.numpy().copy()
    wrong[3] *= 1.01
    candidate.graph.initializers[name].const_value = ir.Tensor(wrong)
    with reference_session(candidate) as session:
        fidelity = compare(run_reference(reference, samples), session, samples, bound=1e-8, inputs="seeded random")
    assert not fidelity.passed
    with pytest.raises(FidelityError, match="the first layer beyond the bound is 'bn'"):
        require(fidelity, reference, candidate, samples[0], where="here")


def test_layers_are_matched_by_name_through_the_passes() -> None:
    reference, candidate, samples = models()
    layers = compare_layers(reference, candidate, samples[0])
    assert [layer.name for layer in layers] == ["bn", "relu", "pool", "flat", "logits"]
    assert all(layer.error.nmse < 1e-10 for layer in layers)


def test_another_shape_is_no_small_error() -> None:
    reference, candidate, samples = models()
    expected = [{"logits": out["logits"][:, :5]} for out in run_reference(reference, samples)]
    with reference_session(candidate) as session, pytest.raises(FidelityError, match=r"float32\[1, 10\]"):
        compare(expected, session, samples, bound=1e-8, inputs="seeded random")


class Scores:
    """Gives the scores that the samples carry, as a session would."""

    def __init__(self, key: str) -> None:
        self.key = key

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"scores": feeds[self.key]}


def batches(*groups: tuple[np.ndarray, np.ndarray, list[int] | None]) -> Iterator[Batch]:
    for candidate, reference, labels in groups:
        yield Batch({"a": candidate, "b": reference}, None if labels is None else np.array(labels))


def test_top1_and_top5_by_hand() -> None:
    rng = np.random.default_rng(0)
    order = np.argsort(rng.normal(size=(6, 10)), axis=1).astype(np.float32)  # each row a permutation of 0..9
    best = order.argmax(axis=1)
    fifth = (order == 5).argmax(axis=1)
    sixth = (order == 4).argmax(axis=1)
    labels = [int(best[0]), int(fifth[1]), int(sixth[2]), int(best[3]), int(best[4]), int(sixth[5])]
    reference = np.roll(order, 1, axis=1)
    found = measure_accuracy(
        Scores("b"),
        Scores("a"),
        batches((order[:4], reference[:4], labels[:4]), (order[4:], order[4:], labels[4:])),
        data="by hand",
    )
    assert found.samples == 6
    assert found.top1 == pytest.approx(3 / 6)
    assert found.top5 == pytest.approx(4 / 6)
    assert found.agreement == pytest.approx(2 / 6)


def test_two_classes_have_no_top5() -> None:
    scores = np.array([[0.0, 1.0], [1.0, 0.0]], np.float32)
    found = measure_accuracy(Scores("a"), Scores("a"), batches((scores, scores, [1, 1])), data="x")
    assert (found.top1, found.top5, found.agreement) == (0.5, None, 1)


@pytest.mark.parametrize(
    ("scores", "labels", "said"),
    [
        (np.zeros((1, 10), np.float32), None, "needs labels"),
        (np.zeros((1, 10), np.float32), [10], "label 10 is beyond the model's 10 classes"),
        (np.zeros((1, 3, 4), np.float32), [0], "no output of class scores"),
    ],
)
def test_what_cannot_be_scored(scores: np.ndarray, labels: list[int] | None, said: str) -> None:
    with pytest.raises(DataError, match=said):
        measure_accuracy(Scores("a"), Scores("a"), batches((scores, scores, labels)), data="x")


def test_no_sample_is_an_error() -> None:
    with pytest.raises(DataError, match="no sample"):
        measure_accuracy(Scores("a"), Scores("a"), batches(), data="x")
