"""``toolchain calibrate``: ranges for INT8 from samples, or from an old TensorRT cache."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Annotated, Any

import onnx_ir as ir
import typer
from rich.text import Text

import runtimes
from runtimes import package
from toolchain import calibration as calibrations
from toolchain import console
from toolchain.artifact_source import float_graph, preprocessing_of_artifact
from toolchain.calibration import Calibration, Method, Observed
from toolchain.calibration_file import STATE
from toolchain.clipping import PERCENTILE
from toolchain.console import Preprocessing
from toolchain.data import Dataset, open_dataset, preprocessing_of
from toolchain.errors import CalibrationError, StorageError
from toolchain.evaluate import input_specs
from toolchain.onnx_file import read_onnx
from toolchain.preprocessing import ImagePreprocessing
from toolchain.storage import require_other
from toolchain.tables import table
from toolchain.tensorrt_cache import read_tensorrt_cache, write_tensorrt_cache

calibrating = typer.Typer()

#: Samples that may be asked for, and that may be in memory at a time: beyond that it is a slip of the finger.
_MOST, _MOST_AT_ONCE = 10_000_000, 4096


@calibrating.command()
def calibrate(
    model: Annotated[Path, typer.Argument(help="an .onnx file, or an artifact's folder", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(help="samples: a folder of images, .npz, .npy, or FILE.py:FUNCTION", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="the file to write", show_default="MODEL.calibration.json")
    ] = None,
    method: Annotated[str, typer.Option(help="auto, minmax, moving-average, percentile, entropy or mse")] = "auto",
    percentile: Annotated[float, typer.Option(help="share of the elements that percentile covers")] = PERCENTILE,
    limit: Annotated[int | None, typer.Option(help="use this many samples", show_default="all")] = None,
    batch_size: Annotated[int, typer.Option(help="samples that are read at a time")] = 8,
    preprocessing: Preprocessing = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where this was interrupted")] = False,
    channels: Annotated[bool, typer.Option("--channels", help="also gather statistics of single channels")] = False,
    histograms: Annotated[bool, typer.Option("--histograms", help="also write the histograms, as .npz")] = False,
    import_tensorrt_cache: Annotated[
        Path | None, typer.Option(help="take the ranges from this TensorRT cache, not from data", show_default=False)
    ] = None,
    export_tensorrt_cache: Annotated[
        Path | None, typer.Option(help="also write the ranges as a TensorRT cache", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the result as one line of JSON")] = False,
) -> None:
    """Finds the range of every tensor, for INT8: in one pass over samples, or from an old TensorRT cache."""
    if (data is None) == (import_tensorrt_cache is None):
        raise CalibrationError(
            "where do the ranges come from?", hint="give --data SAMPLES, or --import-tensorrt-cache FILE; one of them"
        )
    chosen = _method(method, percentile)
    console.require_count(batch_size, "--batch-size", _MOST_AT_ONCE)
    console.require_count(limit, "--limit", _MOST)
    if import_tensorrt_cache is not None:
        of_data = {"--limit": limit, "--preprocessing": preprocessing, "--resume": resume, "--channels": channels}
        given = next((option for option, value in {**of_data, "--histograms": histograms}.items() if value), None)
        if given is not None:
            raise CalibrationError("it has no effect on a TensorRT cache", where=given, hint="leave it out")
    graph, spec = _model(model)
    destination = output or Path(f"{model.name.removesuffix('.onnx')}.calibration.json")
    inputs = [model, *([Path(data)] if data else [])]
    for path in (destination, *([export_tensorrt_cache] if export_tensorrt_cache else [])):
        require_other(path, *inputs)
    if export_tensorrt_cache is not None and export_tensorrt_cache.absolute() == destination.absolute():
        raise StorageError("the cache would replace the calibration", where=str(destination), hint="write elsewhere")
    said: dict[str, Any] = {"output": str(destination)}
    if import_tensorrt_cache is not None:
        imported = read_tensorrt_cache(import_tensorrt_cache, graph)
        result = imported.calibration
        said["unknown"] = imported.unknown
    else:
        assert data is not None
        dataset = open_dataset(
            data,
            inputs=input_specs(graph),
            preprocessing=preprocessing_of(preprocessing) if preprocessing else spec,
            limit=limit,
            batch_size=batch_size,
        )
        state = destination.with_name(f"{destination.name}{STATE}")
        # A file was checked, and is read again: so there is no second copy of the weights.
        found = _observe(graph if model.is_dir() else model, dataset, state, resume=resume, channels=channels)
        result = found.calibration(method=chosen, percentile=percentile)
        result = dataclasses.replace(result, asked=limit or dataset.whole)
        if histograms:
            beside = destination.with_name(f"{destination.name.removesuffix('.json')}.npz")
            found.save(beside)
            said["histograms"] = str(beside)
    calibrations.write(result, destination)
    if import_tensorrt_cache is None:
        state.unlink(missing_ok=True)
    if export_tensorrt_cache is not None:
        write_tensorrt_cache(result, export_tensorrt_cache)
        said["tensorrt_cache"] = str(export_tensorrt_cache)
    said |= _summary(result, graph)
    if json:
        console.print_json(said)
    else:
        _show(said)


def _observe(model: ir.Model | Path, dataset: Dataset, state: Path, *, resume: bool, channels: bool) -> Observed:
    if resume and not state.exists():
        console.err.print(Text(f"there is no {state} to resume: from the start"))
    with console.status("calibrating") as on_status:

        def progress(samples: int) -> None:
            on_status(f"calibrating: {samples} samples", samples / dataset.len_hint if dataset.len_hint else None)

        try:
            return calibrations.observe(
                model, dataset, channels=channels, data=dataset.fingerprint(), state=state, resume=resume,
                on_progress=progress,
            )  # fmt: skip
        except (KeyboardInterrupt, runtimes.RunFailed):
            if state.exists():
                console.err.print(Text(f"what was gathered is in {state}; --resume goes on from there"))
            raise


def _method(method: str, percentile: float) -> Method:
    calibrations.check_method(method, percentile)
    found: Any = method
    return found  # type: ignore[no-any-return]


def _model(path: Path) -> tuple[ir.Model, ImagePreprocessing | None]:
    """The float graph, of an artifact the one that its INT8 is made of; and the preprocessing where an artifact
    knows it."""
    if not path.is_dir():
        return read_onnx(path), None
    found = package.read_package(path)
    found.verify()
    return float_graph(found), preprocessing_of_artifact(found)


def _summary(result: Calibration, graph: ir.Model) -> dict[str, Any]:
    ranges = result.ranges
    return {
        "graph": result.graph,
        "samples": result.samples,
        "asked": result.asked,
        "tensors": len(ranges),
        "methods": dict(collections.Counter(r.method for r in ranges.values()).most_common()),
        "without_range": list(calibrations.without_range(result, graph)),
        "constant": [name for name, r in ranges.items() if r.minimum == r.maximum],
    }


def _show(said: dict[str, Any]) -> None:
    rows = [(name, str(count)) for name, count in said["methods"].items()]
    console.out.print(Text(f"{said['tensors']} ranges from {said['samples']} samples", style="bold"))
    if said["asked"] is not None and said["samples"] < said["asked"]:
        console.out.print(Text(f"only {said['samples']} of {said['asked']} samples", style="yellow"))
    console.out.print(table(("", ("method", "tensors"), rows)))
    for key, text in (
        ("constant", "never changed"),
        ("unknown", "in the cache but not in the graph"),
        ("without_range", "without a range, so what reads them stays in float"),
    ):
        names = said.get(key) or ()
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            console.out.print(Text(f"{text}: {', '.join(names[:5])}{more}", style="yellow"))
    for key in ("output", "histograms", "tensorrt_cache"):
        if key in said:
            console.out.print(Text(f"wrote {said[key]}"))
