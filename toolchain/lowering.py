"""What each target compiles: the optimised or pruned graph as it is, or what becomes of it at a precision. Stages."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import runtimes
from toolchain.as_json import dumps, from_json
from toolchain.cache import digest_of
from toolchain.candidates import Tools
from toolchain.data import Batch
from toolchain.evaluate import reference_session
from toolchain.float16 import find_keep_list
from toolchain.judge import Judge
from toolchain.line import Line
from toolchain.lower import BY_PASS, INT8_FP16, TUNED, lower_by_pass, tuned
from toolchain.machine import cpu_model
from toolchain.onnx_file import write_onnx
from toolchain.quantization import Int8Report, quantise_within_budget


@dataclasses.dataclass(frozen=True, slots=True)
class Lowered:
    """The graph of one target at one precision: its key, the folder of ``model.onnx``, and how INT8 came about."""

    precision: str
    key: str
    folder: Path
    int8: Int8Report | None


def lower(line: Line, target: runtimes.Target, precision: str) -> Lowered:
    """The graph that the target compiles: the optimised one, or its INT8 form.

    Raises:
        FidelityError: INT8 cannot meet the budget.
    """
    if precision == "fp32":
        plain = Lowered(precision, line.float_key, line.float_folder, None)
        if target.runtime not in TUNED:
            return plain
        key = digest_of({"graph": line.float_key, "tuned for": target.runtime})
        folder = line.stage("lower", key, functools.partial(_tuned, line, target))
        changed = (folder / "model.onnx").exists()
        return Lowered(precision, key, folder, None) if changed else plain
    if precision in BY_PASS:
        exclude = tuple(line.recipe.quantize.exclude)
        judged_on = line.judged_on.fingerprint() if line.judged_on else None
        key = digest_of({"graph": line.float_key, "precision": precision, "exclude": exclude, "on": judged_on})
        return Lowered(precision, key, line.stage("lower", key, functools.partial(_by_pass, line, precision)), None)
    # the processor too: candidates are judged on its kernels
    ranges = digest_of({"ranges": {n: dataclasses.astuple(r) for n, r in line.calibration.ranges.items()}})
    judged_on = line.judged_on.fingerprint() if line.judged_on else None
    options = line.recipe.quantize.model_dump()
    key = digest_of(
        {"graph": line.float_key, "target": str(target), "ranges": ranges, "options": options}
        | {"judged_on": judged_on, "cpu": cpu_model(), "seed": line.recipe.seed}
        | {"data": line.calibration_data.fingerprint() if line.calibration_data else None}
        | {"precision": precision, "return_slower": line.recipe.precision == "auto"}
    )
    folder = line.stage("lower", key, functools.partial(_int8, line, target, precision))
    report = from_json(Int8Report, json.loads((folder / "int8.json").read_text(encoding="utf-8")))
    return Lowered(precision, key, folder, report)


def _tuned(line: Line, target: runtimes.Target, working: Path) -> None:
    """Writes nothing where the target takes the optimised graph as it is."""
    model = tuned(line.float_model, target)
    if model is not None:
        write_onnx(model, working / "model.onnx")


def _by_pass(line: Line, precision: str, working: Path) -> None:
    exclude = tuple(line.recipe.quantize.exclude)
    if precision == "fp16":
        exclude += _beyond_half(line)
    model, _ = lower_by_pass(line.float_model, precision, exclude=exclude)
    write_onnx(model, working / "model.onnx")


def _beyond_half(line: Line) -> tuple[str, ...]:
    """The nodes whose numbers 16 bits do not hold."""
    line.on_status("fp16: looking for what overflows")
    samples = [{name: array[:1] for name, array in batch.inputs.items()} for batch in _judged_batches(line)[:4]]
    return find_keep_list(line.float_model, samples).names


def _int8(line: Line, target: runtimes.Target, precision: str, working: Path) -> None:
    options = line.recipe.quantize
    batches = _judged_batches(line)
    half = _beyond_half(line) if precision == INT8_FP16 else None
    with reference_session(line.float_folder / "model.onnx") as reference:
        judge = Judge(reference, batches, metric=options.metric)
    model, report = quantise_within_budget(
        line.float_model,
        target,
        line.calibration,
        judge,
        [{name: array[:1] for name, array in batch.inputs.items()} for batch in batches],
        data="seeded random inputs" if line.judged_on is None else line.judged_on.name,
        max_drop=options.max_drop,
        exclude=tuple(options.exclude),
        weights=options.weights,
        tools=Tools(options.equalization, options.smooth_quant, options.bias_correction),
        calibration_data=line.calibration_data or (),
        method=options.method,
        percentile=options.percentile,
        return_slower=line.recipe.precision == "auto",
        half=half,
        on_status=line.on_status,
    )
    write_onnx(model, working / "model.onnx")
    (working / "int8.json").write_text(dumps(report), encoding="utf-8")


def _judged_batches(line: Line) -> list[Batch]:
    if line.judged_on is not None:
        return list(line.judged_on)
    return [Batch(feeds, None) for feeds in line.samples]
