"""``toolchain verify``: opens what the user names, artifact or file, and compares it with its reference."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

import runtimes
from runtimes import InvalidModel, package
from toolchain import bundle
from toolchain.artifact import EXPORTED, PRUNED
from toolchain.artifact_source import preprocessing_of_artifact, was_pruned
from toolchain.bounds import bound as bound_of
from toolchain.data import open_dataset, preprocessing_of
from toolchain.errors import FidelityError
from toolchain.evaluate import class_count, input_specs, reference_session, run_made_up
from toolchain.onnx_file import read_onnx
from toolchain.progress import Status
from toolchain.seeded import seeded_inputs
from toolchain.verify import Accuracy, Fidelity, LayerError, compare, compare_layers, measure_accuracy


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    """What was compared with what, and how far apart they are."""

    candidate: str
    reference: str
    fidelity: Fidelity
    accuracy: Accuracy | None
    layers: tuple[LayerError, ...]

    def require(self) -> None:
        """Raises FidelityError when an output is beyond the bound."""
        if not self.fidelity.passed:
            name, error = self.fidelity.worst
            raise FidelityError(
                f"output {name!r} is off by a normalised MSE of {error.nmse:.2g}, "
                f"the bound is {self.fidelity.bound:.0e}",
                where=self.candidate,
                hint="--layers shows where it comes in",
            )


def verify_path(
    path: Path,
    *,
    against: Path | None,
    variant: str | None,
    eval_data: str | None,
    limit: int | None,
    preprocessing: str | None,
    samples: int,
    dims: Mapping[str, int],
    max_nmse: float | None,
    layers: bool,
    seed: int,
    on_status: Status,
) -> Verification:
    """Compares an artifact's variant with the exported model in it, or an .onnx with ``against``.

    A model that was pruned is no longer the function that was exported: its variants are compared with the pruned
    float graph that the artifact holds. Accuracy is compared with the exported model's in any case.

    Raises:
        InvalidArtifact, InvalidModel, GraphError, DataError: what is named cannot be used.
        FidelityError: the two do not have the same outputs.
    """
    if not path.exists():
        raise InvalidModel("there is no such artifact or model", where=str(path), hint="check the path")
    if path.name.endswith(bundle.ENDINGS):
        raise InvalidModel(
            "that is a bundle, whose digests and signature are all that can be compared",
            where=str(path),
            hint=f"python -m runtimes verify {path}",
        )
    stated = None if preprocessing is None else preprocessing_of(preprocessing)
    labels, offset, precision = None, 0, "fp32"
    model_file: Path | None = path
    graded: Path | None = None
    if path.is_dir():
        found = package.read_package(path)
        found.verify()
        chosen, _ = package.choose_variant(
            found, variant=variant, can_run=lambda target: runtimes.backend(target.runtime).can_run(target)
        )
        model_file = found.root / chosen.directory / chosen.model_file if chosen.model_file else None
        if against is None:
            reference_file = PRUNED if was_pruned(found) else EXPORTED
            if reference_file not in found.files:
                raise FidelityError(
                    "every digest is right; the model to compare outputs with stayed behind when it was bundled",
                    where=str(path),
                    hint=f"--against REFERENCE.onnx; or, with its signature: python -m runtimes verify {path}",
                )
            against, graded = found.root / reference_file, found.root / EXPORTED
        precision = chosen.precision
        stated = stated or preprocessing_of_artifact(found)
        labels, offset = found.metadata.get("labels"), found.metadata.get("label_offset", 0)
    elif against is None:
        raise FidelityError("what is it to be compared with?", where=str(path), hint="--against REFERENCE.onnx")
    reference = read_onnx(against)
    specs = input_specs(reference)
    dataset = None
    feeds = [seeded_inputs(specs, batch=1 + i % 2, seed=seed + i, dims=dims) for i in range(samples)]
    if eval_data is not None:
        dataset = open_dataset(
            eval_data,
            inputs=specs,
            preprocessing=stated,
            limit=limit,
            class_names=labels,
            class_count=class_count(reference),
            label_offset=offset,
        )
        feeds = [batch.inputs for batch in itertools.islice(dataset, samples)]
    accuracy = None
    with (
        runtimes.load(path, variant=variant if path.is_dir() else None) as session,
        reference_session(reference) as oracle,
    ):
        expected = run_made_up(oracle, feeds)
        bound = bound_of(precision, reference) if max_nmse is None else max_nmse
        inputs = "seeded random" if dataset is None else "evaluation data"
        fidelity = compare(expected, session, feeds, bound=bound, inputs=inputs)
        if dataset is not None and dataset.labelled is not False:
            with contextlib.ExitStack() as stack:
                if graded is not None and graded != against:
                    oracle = stack.enter_context(reference_session(read_onnx(graded)))
                accuracy = measure_accuracy(
                    oracle, session, dataset, data=dataset.name, total=dataset.len_hint, on_status=on_status
                )
    compared: list[LayerError] = []
    if layers and model_file is not None:
        compared = compare_layers(reference, read_onnx(model_file), feeds[0])
    return Verification(str(path), str(against), fidelity, accuracy, tuple(compared))
