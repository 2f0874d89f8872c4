"""The fork by target: one optimised graph and one calibration become the graph that a target wants."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

import passes
from passes._quant import Calibration
from passes.base import Declined, PassFailed, label
from passes.convert_float16 import ConvertFloat16
from passes.quantize_int8 import QuantizeInt8
from runtimes import Target
from toolchain.errors import GraphError
from toolchain.opset import at_least

#: Runtime -> the dialect of Q/DQ that it turns into integer kernels.
DIALECTS: Mapping[str, str] = {
    "ort-cpu": "ort-cpu",
    "openvino-cpu": "openvino",
    "ort-cuda": "tensorrt",  # its CUDA provider runs Q/DQ as they stand, its TensorRT provider fuses them
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt",
    "reference": "ort-cpu",
}


def dialect_of(target: Target) -> str:
    """The dialect that a target understands.

    Raises:
        GraphError: none is known for it.
    """
    dialect = DIALECTS.get(target.runtime)
    if dialect is None:
        raise GraphError(
            f"there is no INT8 for target {target}", where=f"target {target}", hint=f"known: {', '.join(DIALECTS)}"
        )
    return dialect


#: Precisions that one pass makes of the float graph, with no calibration: name -> pass.
BY_PASS: Mapping[str, str] = {
    "int8-dynamic": "quantize_dynamic",
    "int8-weights": "quantize_weights",
    "fp16": "convert_float16",
}

#: INT8 with what stays in float in 16 bits: the targets that have both kinds of arithmetic.
INT8_FP16 = "int8-fp16"
#: Precisions that need the ranges of a calibration.
CALIBRATED = ("int8", INT8_FP16)
#: From here on Q/DQ have 16-bit scales.
_HALF_OPSET = 19


def lower_half(quantised: ir.Model, target: Target, *, keep: tuple[str, ...] = ()) -> ir.Model:
    """A copy of an INT8 graph in which what stays in float, Q and DQ too, is in 16 bits.

    Args:
        quantised: from ``lower_int8``.
        target: of the TensorRT dialect: kernels for a CPU are found by Q/DQ in float32.
        keep: nodes that stay in float32; those that are not there any more do not matter.

    Raises:
        GraphError: another dialect, or the graph cannot be converted.
    """
    if dialect_of(target) != "tensorrt":
        raise GraphError(
            f"{INT8_FP16} is for GPUs: {target} has no kernels for it",
            where=f"target {target}",
            hint="--precision int8",
        )
    copy = at_least(quantised, _HALF_OPSET).clone()
    there = {label(node) for node in copy.graph}
    try:
        ConvertFloat16(keep=tuple(name for name in keep if name in there))(copy)
    except PassFailed as error:
        raise GraphError(f"convert_float16: {error}", where=error.node, hint=error.hint) from error
    return copy


#: Runtime -> passes over the float graph that are for this runtime alone: exact, and measured to be faster on it.
TUNED: Mapping[str, tuple[str, ...]] = {
    "ort-cpu": ("shield_layer_norm",),
}


def tuned(model: ir.Model, target: Target) -> ir.Model | None:
    """A copy of the float graph as the target's runtime is fastest with it; None where it is that already."""
    copy = model.clone()
    # a list: each pass is to run, whether one before it changed anything or not
    changed = any([passes.make(name)(copy).modified for name in TUNED.get(target.runtime, ())])
    return copy if changed else None


def lower_by_pass(
    model: ir.Model, precision: str, *, exclude: tuple[str, ...] = ()
) -> tuple[ir.Model, tuple[Declined, ...]]:
    """A copy of the float graph in a precision that needs no calibration.

    Args:
        model: optimised, float32.
        precision: one of BY_PASS.
        exclude: nodes that stay in float32.

    Raises:
        GraphError: an unknown node in ``exclude``, or nothing could be converted.
    """
    copy = model.clone()
    name = BY_PASS[precision]
    option = "keep" if precision == "fp16" else "exclude"
    try:
        outcome = passes.make(name, **{option: exclude})(copy)
    except PassFailed as error:
        raise GraphError(f"{name}: {error}", where=error.node, hint=error.hint) from error
    declined: tuple[Declined, ...] = getattr(outcome, "declined", ())
    if not outcome.modified:
        reason = declined[0].reason if declined else "it has no layer that this precision is for"
        raise GraphError(f"nothing of this model can be {precision}: {reason}", hint="build it with --precision fp32")
    return copy, declined


def lower_int8(
    model: ir.Model,
    target: Target,
    calibration: Calibration,
    *,
    exclude: tuple[str, ...] = (),
    weights: str = "balanced",
) -> tuple[ir.Model, tuple[Declined, ...]]:
    """A copy of the float graph, quantised in the target's dialect. The copy shares the float weights it keeps.

    Args:
        model: optimised, float32.
        target: decides the dialect.
        calibration: of this graph.
        exclude: nodes that stay in float.
        weights: how weight scales are chosen, see ``QuantizeInt8``.

    Returns:
        The quantised graph, and what was left out and why.

    Raises:
        GraphError: no dialect for the target, an unknown node in ``exclude``, or nothing could be quantised.
    """
    copy = model.clone()
    try:
        outcome = QuantizeInt8(dialect=dialect_of(target), calibration=calibration, exclude=exclude, weights=weights)(
            copy
        )
    except PassFailed as error:
        raise GraphError(f"quantize_int8: {error}", where=error.node, hint=error.hint) from error
    declined: tuple[Declined, ...] = getattr(outcome, "declined", ())
    if not getattr(outcome, "fired", 0):
        reason = declined[0].reason if declined else "it has no layer that has integer kernels"
        raise GraphError(f"nothing of this model can be quantised: {reason}", hint="build it with --precision fp32")
    return copy, declined
