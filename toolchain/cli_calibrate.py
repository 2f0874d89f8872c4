"""``toolchain calibrate``: ranges for INT8 from samples, or from an old TensorRT cache."""

from __future__ import annotations

import collections
import json as jsons
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

import runtimes
from runtimes import package
from toolchain import calibration as calibrations
from toolchain import console
from toolchain.calibration import Calibration, Method, Observed
from toolchain.clipping import PERCENTILE
from toolchain.data import Dataset, open_dataset
from toolchain.errors import CalibrationError, DataError
from toolchain.evaluate import input_specs
from toolchain.onnx_file import read_onnx
from toolchain.preprocessing import ImagePreprocessing
from toolchain.storage import require_other
from toolchain.tables import table
from toolchain.tensorrt_cache import read_tensorrt_cache, write_tensorrt_cache
from toolchain.zoo import ZOO

calibrating = typer.Typer()


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
    preprocessing: Annotated[
        str | None,
        typer.Option(
            help="for images and a bare .onnx: a zoo name whose preprocessing is right, or a .json file",
            show_default="the artifact's",
        ),
    ] = None,
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
    file, spec = _model(model)
    graph = read_onnx(file)
    destination = output or Path(f"{model.name.removesuffix('.onnx')}.calibration.json")
    inputs = [model, *([Path(data)] if data else [])]
    for path in (destination, *([export_tensorrt_cache] if export_tensorrt_cache else [])):
        require_other(path, *inputs)
    said: dict[str, Any] = {"output": str(destination)}
    if import_tensorrt_cache is not None:
        imported = read_tensorrt_cache(import_tensorrt_cache, graph)
        result = imported.calibration
        said |= {"unknown": imported.unknown, "uncovered": imported.uncovered}
    else:
        assert data is not None
        dataset = open_dataset(
            data,
            inputs=input_specs(graph),
            preprocessing=preprocessing_of(preprocessing) if preprocessing else spec,
            limit=limit,
            batch_size=batch_size,
        )
        state = destination.with_name(f"{destination.name}.state")
        del graph  # it was checked; the file is read again, without a second copy of the weights to be kept
        found = _observe(file, dataset, state, resume=resume, channels=channels)
        result = found.calibration(method=chosen, percentile=percentile)
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
    said |= _summary(result)
    if json:
        console.print_json(said)
    else:
        _show(said)


def _observe(file: Path, dataset: Dataset, state: Path, *, resume: bool, channels: bool) -> Observed:
    with console.status("calibrating") as on_status:

        def progress(samples: int) -> None:
            on_status(f"calibrating: {samples} samples", samples / dataset.len_hint if dataset.len_hint else None)

        try:
            return calibrations.observe(
                file, dataset, channels=channels, data=dataset.fingerprint(), state=state, resume=resume,
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


def _model(path: Path) -> tuple[Path, ImagePreprocessing | None]:
    """The graph's file, and the preprocessing where an artifact knows it."""
    if not path.is_dir():
        return path, None
    found = package.read_package(path)
    found.verify()
    variant = next((v for v in found.variants if v.precision == "fp32" and v.model_file), None)
    if variant is None:
        raise CalibrationError("the artifact holds no float model to calibrate", where=str(path))
    tree = found.metadata.get("preprocessing")
    return path / variant.directory / str(variant.model_file), ImagePreprocessing.from_json(tree) if tree else None


def preprocessing_of(text: str) -> ImagePreprocessing:
    """The preprocessing that a zoo name or a .json file stands for. Raises DataError."""
    if text in ZOO:
        known = ZOO[text].preprocessing
        if known is None:
            raise DataError(f"{text} takes no images", where="--preprocessing")
        return known
    try:
        tree = jsons.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"neither a zoo name nor a readable .json file: {error}",
            where=f"--preprocessing {text}",
            hint=f"zoo names: {', '.join(name for name, entry in ZOO.items() if entry.preprocessing)}",
        ) from error
    return ImagePreprocessing.from_json(tree)


def _summary(result: Calibration) -> dict[str, Any]:
    ranges = result.ranges
    return {
        "graph": result.graph,
        "samples": result.samples,
        "tensors": len(ranges),
        "methods": dict(collections.Counter(r.method for r in ranges.values()).most_common()),
        "constant": [name for name, r in ranges.items() if r.minimum == r.maximum],
    }


def _show(said: dict[str, Any]) -> None:
    rows = [(name, str(count)) for name, count in said["methods"].items()]
    console.out.print(Text(f"{said['tensors']} ranges from {said['samples']} samples", style="bold"))
    console.out.print(table(("", ("method", "tensors"), rows)))
    for key, text in (
        ("constant", "never changed"),
        ("unknown", "in the cache but not in the graph"),
        ("uncovered", "in the graph but not in the cache, so without a range"),
    ):
        names = said.get(key) or ()
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            console.out.print(Text(f"{text}: {', '.join(names[:5])}{more}", style="yellow"))
    for key in ("output", "histograms", "tensorrt_cache"):
        if key in said:
            console.out.print(Text(f"wrote {said[key]}"))
