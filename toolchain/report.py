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
class CalibrationReport:
    """Where the ranges of INT8 came from, and what is missing of them.

    Attributes:
        source: name of the calibration file, or of the data.
        samples: how many they were measured on; 0 for ranges from a TensorRT cache.
        asked: how many there were to be; None where that is not known.
        tensors: how many ranges there are.
        without_range: values of the graph that want one and have none: what reads them stays in float.
        interrupted: beside the file lies the state of a later calibration that did not come to its end.
    """

    source: str
    samples: int
    asked: int | None
    tensors: int
    without_range: tuple[str, ...]
    interrupted: bool = False

    def described(self) -> str:
        """Such as ``250 ranges from 64 samples, model.calibration.json``."""
        origin = f"{self.samples} samples" if self.samples else "a TensorRT cache"
        return f"{self.tensors} ranges from {origin}, {self.source}"

    def warnings(self) -> tuple[str, ...]:
        """What is missing, in sentences; none where all is there."""
        found = []
        if self.asked is not None and 0 < self.samples < self.asked:
            found.append(f"calibration saw {self.samples} of {self.asked} samples")
        if self.without_range:
            more = f" and {len(self.without_range) - 5} more" if len(self.without_range) > 5 else ""
            found.append(
                f"calibration has no range for {len(self.without_range)} tensors, so what reads them stays in float: "
                f"{', '.join(self.without_range[:5])}{more}"
            )
        if self.interrupted:
            found.append(
                f"beside {self.source} lies the state of a later calibration that was interrupted; "
                "toolchain calibrate --resume ends it"
            )
        return tuple(found)


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
        calibration: where ranges came from; None where no variant is in INT8 by them.
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
    calibration: CalibrationReport | None = None
