"""``toolchain debug quantization``: layer by layer, who hurts and how much."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import onnx_ir as ir
import typer
from rich.text import Text

from passes._quant import Calibration
from runtimes import InvalidArtifact, package
from toolchain import calibration_file, console
from toolchain.artifact import CALIBRATION, EXPORTED
from toolchain.data import open_dataset
from toolchain.debug import debug_quantization, write_page
from toolchain.errors import DataError
from toolchain.evaluate import class_count, input_specs
from toolchain.onnx_file import read_onnx
from toolchain.optimize import optimize
from toolchain.preprocessing import ImagePreprocessing
from toolchain.recipe import Recipe, from_dict
from toolchain.render import table
from toolchain.seeded import seeded_inputs

debugging = typer.Typer()
debug = typer.Typer(help="Looks into an artifact layer by layer.", no_args_is_help=True)
debugging.add_typer(debug, name="debug")

#: Layers that the terminal shows; the page and --json have all.
_SHOWN = 20


@debug.callback()
def _group() -> None:
    """Keeps `quantization` a word of its own while it is the only one."""


@debug.command()
def quantization(
    artifact: Annotated[Path, typer.Argument(help="an artifact with an INT8 variant", show_default=False)],
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", help="samples to measure on", show_default="seeded inputs")
    ] = None,
    limit: Annotated[int, typer.Option(help="samples to measure on", min=1)] = 8,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="also write an HTML page with histograms", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the result as one line of JSON")] = False,
) -> None:
    """Shows for each quantised layer what its rounding does to the output, and the flag that leaves it out."""
    found = package.read_package(artifact)
    found.verify()
    recipe = from_dict(found.metadata["recipe"], origin="the artifact's recipe")
    variant = next((v for v in found.variants if v.precision == "int8"), None)
    if variant is None or not (artifact / CALIBRATION).is_file():
        raise InvalidArtifact(
            "the artifact has no INT8 variant", where=str(artifact), hint="build one with --precision int8 --data ..."
        )
    with console.status("optimising") as on_status:
        model, calibration = _float_graph(artifact, recipe)
        specs = input_specs(model)
        if eval_data is None:
            samples = [seeded_inputs(specs, batch=1, seed=recipe.seed + n, dims=recipe.dims) for n in range(limit)]
        else:
            preprocessing = found.metadata.get("preprocessing")
            dataset = open_dataset(
                eval_data,
                inputs=specs,
                preprocessing=ImagePreprocessing.from_json(preprocessing) if preprocessing else None,
                class_names=found.metadata.get("labels"),
                class_count=class_count(model),
                label_offset=found.metadata.get("label_offset", 0),
                batch_size=1,
                limit=limit,
            )
            samples = [batch.inputs for batch in itertools.islice(dataset, limit)]
        if not samples:
            raise DataError("no sample to measure on", where=eval_data)
        result = debug_quantization(
            model, variant.target, calibration, samples, weights=recipe.quantize.weights, on_status=on_status
        )
    if output is not None:
        write_page(result, output, title=f"{found.name}: INT8 layer by layer")
    if json:
        console.print_json(result)
        return
    header = ("layer", "op", "share", "alone, noise/signal", "own", "weight", "input", "leave it in float")
    rows = [
        (
            layer.node, layer.op_type, f"{layer.share:.1%}", f"{layer.alone_nmse:.2g}", f"{layer.own_nmse:.2g}",
            "-" if layer.weight_sqnr_db is None else f"{layer.weight_sqnr_db:.1f} dB",
            "-" if layer.input_sqnr_db is None else f"{layer.input_sqnr_db:.1f} dB", layer.flag,
        )
        for layer in result.layers[:_SHOWN]
    ]  # fmt: skip
    console.out.print(table((f"{found.name} on {result.samples} samples", header, rows), console.out.width))
    if len(result.layers) > _SHOWN:
        console.out.print(Text(f"and {len(result.layers) - _SHOWN} more layers; -o PAGE.html or --json has all", "dim"))
    console.out.print(Text(f"everything in INT8: noise/signal of the output {result.total_nmse:.2g}"))
    if output is not None:
        console.out.print(Text(f"wrote {output}"))


def _float_graph(artifact: Path, recipe: Recipe) -> tuple[ir.Model, Calibration]:
    """The optimised float graph, made again from the exported one, and the calibration that was made on it."""
    model = read_onnx(artifact / EXPORTED)
    optimize(model, recipe.pipeline())
    calibration = calibration_file.read(artifact / CALIBRATION)
    calibration_file.require_match(calibration, model, where=CALIBRATION)
    return model, calibration
