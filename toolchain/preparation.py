"""What is done to a float graph before it is quantised, and the ranges of what comes out.

Cross-layer equalisation and SmoothQuant compute the same in float and spread numbers better over 8 bits. What they
change has new names, and new ranges: the changed graph is calibrated again, in one more pass over the samples. What
kept its name stands for the same numbers, so it keeps the range that it had, wherever that came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from passes._quant import Calibration
from passes.base import Pass, PassFailed, label
from passes.equalize_layers import EqualizeLayers
from passes.smooth_quant import Samples, SmoothQuant, readers_by_input
from toolchain.calibration import calibrate
from toolchain.clipping import PERCENTILE, Method
from toolchain.errors import DataError, GraphError
from toolchain.evaluate import reference_session
from toolchain.progress import Status, silent
from toolchain.samples import Batch

#: Rows of an activation that SmoothQuant measures on: of each batch at most, and in all.
_ROWS_OF_BATCH = 64
_ROWS = 512


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Prepared:
    """A float graph to be quantised.

    Attributes:
        model: computes what it did before.
        calibration: the ranges of its values.
        changes: how many places were changed.
    """

    model: ir.Model
    calibration: Calibration
    changes: int


def prepare(
    model: ir.Model,
    calibration: Calibration,
    samples: Iterable[Batch],
    *,
    equalization: bool = False,
    smooth_quant: float | Literal["auto"] | None = None,
    method: Method = "auto",
    percentile: float = PERCENTILE,
    on_status: Status = silent,
) -> Prepared:
    """A copy of the graph with weights and activations made easier to quantise, and its ranges.

    Args:
        model: optimised, float32; it is not changed.
        calibration: of ``model``.
        samples: calibration data; gone through twice or more, so no generator.
        equalization: scale channels between layers, see ``passes/equalize_layers.py``.
        smooth_quant: how much of the activations' outliers moves into weights, 0 to 1, or "auto" for the best of each
            value; None leaves them. See ``passes/smooth_quant.py``; it may insert a Mul.
        method, percentile: of the ranges of what changed.
        on_status: is told what is going on.

    Raises:
        DataError: there are no samples.
        GraphError: a pass cannot go on with the graph.
        CalibrationError: see ``calibrate``.
    """
    if next(iter(samples), None) is None:
        raise DataError("equalisation and SmoothQuant measure on calibration data", hint="--data FOLDER")
    copy = model.clone()
    for node in copy.graph:
        # A label made of an output's name changes with that: what is to stay in float is named by it.
        node.name = label(node)
    changes = 0
    if equalization:
        on_status("int8: equalising layers")
        changes += _run(EqualizeLayers(calibration=calibration), copy)
    if smooth_quant is not None:
        on_status("int8: smoothing activations")
        amax, rows = _channels(copy, samples)
        found = dataclasses.replace(calibration, channel_amax=amax)
        changes += _run(
            SmoothQuant(calibration=found, alpha=smooth_quant, samples=Samples(rows), insert_mul=True), copy
        )
    if not changes:
        return Prepared(model, calibration, 0)
    on_status("int8: calibrating what changed")
    again = calibrate(copy, samples, method=method, percentile=percentile)
    kept = {name: calibration.ranges.get(name, range_) for name, range_ in again.ranges.items()}
    return Prepared(copy, dataclasses.replace(again, ranges=kept), changes)


def _run(step: Pass, model: ir.Model) -> int:
    try:
        outcome: Any = step(model)
    except PassFailed as error:
        raise GraphError(f"{step.name}: {error}", where=error.node, hint=error.hint) from error
    return int(outcome.fired)


def _channels(model: ir.Model, samples: Iterable[Batch]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Of every value that Gemm and MatMul multiply with weights: the largest magnitude of each channel, float64
    [channels], and some rows, float32 [rows, channels], from as many samples as can be."""
    names = [str(value.name) for value in readers_by_input(model)]
    inputs = {value.name for value in model.graph.inputs}
    amax: dict[str, np.ndarray] = {}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    with reference_session(model, extra_outputs=[name for name in names if name not in inputs]) as session:
        for batch in samples:
            values = {**batch.inputs, **session.run(batch.inputs)}
            for name in names:
                table = values[name].reshape(-1, values[name].shape[-1]) if values[name].size else None
                if table is None:
                    continue
                largest = np.abs(table).max(axis=0).astype(np.float64)
                amax[name] = np.maximum(amax[name], largest) if name in amax else largest
                rows[name].append(_spread([table], _ROWS_OF_BATCH))
    return amax, {name: _spread(found, _ROWS) for name, found in rows.items() if found}


def _spread(parts: Sequence[np.ndarray], most: int) -> np.ndarray:
    """At most so many of all rows, evenly spread, in order."""
    whole = np.concatenate(parts)
    picked: np.ndarray = whole[np.linspace(0, len(whole) - 1, min(len(whole), most)).astype(int)]
    return picked
