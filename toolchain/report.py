"""What a build found out, as data: kept in the artifact as ``report.json``, shown by ``render.py``."""

from __future__ import annotations

import dataclasses
from typing import Any

from toolchain.benchmark import BenchReport
from toolchain.metrics import TensorError
from toolchain.optimize import PassReport
from toolchain.prune_account import PruneReport
from toolchain.quantization import Int8Report
from toolchain.verify import Accuracy, Fidelity


@dataclasses.dataclass(frozen=True, slots=True)
class StageReport:
    """How long a stage took (wall seconds), and whether its result came from the cache."""

    name: str
    seconds: float
    cached: bool


@dataclasses.dataclass(frozen=True, slots=True)
class VariantReport:
    """One variant: what was measured on the files that are in the artifact.

    Attributes:
        name, target, precision: of the variant.
        size: bytes of the portable model.
        prepared_size: bytes of the form that is bound to this machine or to a kind of GPU; None where there is none.
        benchmark: None where its device is not here.
        int8: how it was quantised; None at other precisions.
        not_run: why it was not run here, so that its graph was verified on the reference runtime instead.
        remark: what a reader should know besides.
    """

    name: str
    target: str
    precision: str
    size: int
    prepared_size: int | None
    fidelity: Fidelity
    accuracy: Accuracy | None
    benchmark: BenchReport | None
    int8: Int8Report | None = None
    not_run: str | None = None
    remark: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class BuildReport:
    """A whole build.

    Attributes:
        model: the source as it may be told to anyone: no path of the building machine.
        weights: kind, origin, digest.
        warnings: what a reader must know before any number: random weights first.
        torch_error: for each output the error of the unoptimised ONNX against PyTorch; empty for .onnx sources.
        exported_size: bytes of the exported model.
        stages: in the order they ran.
        prune: what was cut; None where nothing was asked for.
    """

    name: str
    model: str
    weights: dict[str, Any]
    warnings: tuple[str, ...]
    opset: int
    torch_error: dict[str, TensorError]
    exported_size: int
    passes: tuple[PassReport, ...]
    variants: tuple[VariantReport, ...]
    stages: tuple[StageReport, ...]
    prune: PruneReport | None = None
