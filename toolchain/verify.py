"""Reference against candidate: how far apart the outputs are, from which layer on, and what it costs in accuracy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

import runtimes
from toolchain.data import Batch
from toolchain.errors import DataError, FidelityError
from toolchain.evaluate import Feeds, reference_session
from toolchain.metrics import TensorError, tensor_error
from toolchain.progress import Status, silent


@dataclasses.dataclass(frozen=True, slots=True)
class Fidelity:
    """How far a candidate is from its reference.

    Attributes:
        outputs: for each output its error over all samples taken as one tensor.
        samples: on how many samples (batch entries).
        inputs: what they were: "evaluation data", "calibration data", or "seeded random".
        bound: largest normalised MSE that was allowed.
    """

    outputs: dict[str, TensorError]
    samples: int
    inputs: str
    bound: float

    @property
    def passed(self) -> bool:
        """Whether every output is within the bound."""
        return all(error.nmse <= self.bound for error in self.outputs.values())

    @property
    def worst(self) -> tuple[str, TensorError]:
        """The output with the largest normalised MSE."""
        return max(self.outputs.items(), key=lambda item: item[1].nmse)


@dataclasses.dataclass(frozen=True, slots=True)
class LayerError:
    """The error of one value that both graphs have, in the order of the candidate's graph."""

    name: str
    node: str
    error: TensorError


@dataclasses.dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy of reference and candidate on the same labelled samples, each in 0..1.

    Attributes:
        samples: how many.
        data: what they are.
        agreement: share of samples on which both give the same class.
        top5, reference_top5: None where there are fewer than six classes.
    """

    samples: int
    data: str
    top1: float
    reference_top1: float
    top5: float | None
    reference_top5: float | None
    agreement: float


def compare(
    reference: Sequence[Feeds],
    candidate: runtimes.Session,
    samples: Sequence[Feeds],
    *,
    bound: float,
    inputs: str,
) -> Fidelity:
    """Runs the candidate on ``samples`` and compares with the reference's outputs on the same.

    Raises:
        FidelityError: an output is missing, or has another shape or dtype.
    """
    given = [candidate.run(feeds) for feeds in samples]
    outputs = {}
    for name in reference[0]:
        pairs = []
        for expected, got in zip((r[name] for r in reference), (g.get(name) for g in given), strict=True):
            if got is None or got.shape != expected.shape or got.dtype != expected.dtype:
                shown = "missing" if got is None else f"{got.dtype}{list(got.shape)}"
                raise FidelityError(
                    f"output {name!r} of the artifact is {shown}, the exported model gives "
                    f"{expected.dtype}{list(expected.shape)}",
                    hint="toolchain optimize MODEL --verify-each names the pass that changed it",
                )
            pairs.append((expected, got))
        outputs[name] = _pooled(pairs)
    count = sum(len(next((a for a in feeds.values() if a.ndim), [0])) for feeds in samples)
    return Fidelity(outputs, count, inputs, bound)


def _pooled(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> TensorError:
    """The error of several samples as if they were one tensor; their shapes may differ from sample to sample."""
    errors = [tensor_error(expected, got) for expected, got in pairs]
    tops = [e.top1_agreement for e in errors if e.top1_agreement is not None]
    flat = [np.concatenate([np.ravel(pair[side]) for pair in pairs]) for side in (0, 1)]
    whole = tensor_error(flat[0], flat[1])
    return dataclasses.replace(whole, top1_agreement=float(np.mean(tops)) if tops else None)


def compare_layers(reference: ir.Model, candidate: ir.Model, feeds: Feeds) -> list[LayerError]:
    """The error of every main-graph value that has the same name in both graphs, each run unoptimised.

    Passes keep a name only for the same value, so a shared name is the same layer.
    """
    mine = {value.name for node in reference.graph for value in node.outputs if value.name}
    shared = [
        (value.name, node) for node in candidate.graph for value in node.outputs if value.name and value.name in mine
    ]
    names = [name for name, _ in shared]
    with reference_session(reference, extra_outputs=names) as session:
        expected = session.run(feeds)
    with reference_session(candidate, extra_outputs=names) as session:
        got = session.run(feeds)
    layers = []
    for name, node in shared:
        if name in expected and name in got and expected[name].shape == got[name].shape:
            layers.append(LayerError(name, node.name or node.op_type, tensor_error(expected[name], got[name])))
    return layers


def require(fidelity: Fidelity, reference: ir.Model, candidate: ir.Model, feeds: Feeds, *, where: str) -> None:
    """Raises FidelityError when the bound is broken, naming the layer by which the error comes in."""
    if fidelity.passed:
        return
    name, error = fidelity.worst
    layers = compare_layers(reference, candidate, feeds)
    culprit = next((layer for layer in layers if layer.error.nmse > fidelity.bound), None)
    if culprit is None:
        found = "the graphs agree layer by layer, so it is the runtime's own optimisation"
        hint = "set session.graph_level to basic in the recipe, and report the model to the runtime's makers"
    else:
        found = f"the first layer beyond the bound is {culprit.name!r} (normalised MSE {culprit.error.nmse:.2g})"
        hint = "toolchain optimize MODEL --verify-each names the pass"
    raise FidelityError(
        f"output {name!r} is off by a normalised MSE of {error.nmse:.2g}, the bound is {fidelity.bound:.0e}: {found}",
        where=f"{where}, node {culprit.node}" if culprit else where,
        hint=hint + "; verify.max_nmse in the recipe moves the bound",
    )


def measure_accuracy(
    reference: runtimes.Session,
    candidate: runtimes.Session,
    batches: Iterable[Batch],
    *,
    data: str,
    total: int | None = None,
    on_status: Status = silent,
) -> Accuracy:
    """Top-1 and top-5 of both on the same labelled samples, from the first output with two axes.

    Raises:
        DataError: samples without labels, none at all, or a model that does not classify.
    """
    hits = np.zeros(4)
    same = count = 0
    classes = math.inf
    for batch in batches:
        if batch.labels is None:
            raise DataError("accuracy needs labels", where=data, hint="use a folder with one subfolder a class")
        logits = [_logits(session.run(batch.inputs), data) for session in (candidate, reference)]
        classes = logits[0].shape[1]
        if int(batch.labels.max(initial=0)) >= classes:
            raise DataError(
                f"label {int(batch.labels.max())} is beyond the model's {classes} classes",
                where=data,
                hint="check wnid_to_index.json or the order of the class folders",
            )
        for side, scores in enumerate(logits):
            # the true class is in the top k when fewer than k classes score higher
            true = np.take_along_axis(scores, batch.labels[:, None].astype(np.int64), axis=1)
            rank = (scores > true).sum(axis=1)
            hits[2 * side] += int((scores.argmax(axis=1) == batch.labels).sum())
            hits[2 * side + 1] += int((rank < 5).sum())
        same += int((logits[0].argmax(axis=1) == logits[1].argmax(axis=1)).sum())
        count += len(batch.labels)
        on_status(f"accuracy: {count} samples", count / total if total else None)
    if not count:
        raise DataError("no sample to measure accuracy on", where=data)
    top1, top5, reference_top1, reference_top5 = (float(h) / count for h in hits)
    few = classes < 6
    return Accuracy(
        count,
        data,
        top1,
        reference_top1,
        None if few else top5,
        None if few else reference_top5,
        same / count,
    )


def class_scores(outputs: Feeds) -> np.ndarray | None:
    """The first output of class scores, [batch, classes] of a float type; None where there is none."""
    for array in outputs.values():
        if array.ndim == 2 and array.dtype.kind == "f" and array.shape[1] > 1:
            return array
    return None


def _logits(outputs: Feeds, data: str) -> np.ndarray:
    found = class_scores(outputs)
    if found is not None:
        return found
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items())
    raise DataError(
        f"this model has no output of class scores [batch, classes]; it gives {shapes}",
        where=data,
        hint="leave --eval-data away; fidelity is still compared",
    )
