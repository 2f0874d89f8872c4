"""``toolchain debug``: which layers hurt in INT8, and what an engine is made of and where its numbers are off."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx_ir as ir
import typer
from rich.text import Text

from passes._quant import Calibration
from runtimes import InvalidArtifact, package
from runtimes._manifest import Variant
from toolchain import calibration_file, console
from toolchain.artifact import CALIBRATION, EXPORTED
from toolchain.as_json import to_json
from toolchain.console import parse_dims
from toolchain.data import open_dataset
from toolchain.debug import debug_quantization, write_page
from toolchain.engine_debug import debug_engine, require_polygraphy
from toolchain.errors import DataError
from toolchain.evaluate import class_count, input_specs
from toolchain.lower import CALIBRATED
from toolchain.onnx_file import read_onnx
from toolchain.optimize import optimize
from toolchain.preprocessing import ImagePreprocessing
from toolchain.recipe import Recipe, from_dict
from toolchain.seeded import seeded_inputs
from toolchain.storage import require_other
from toolchain.tables import table

debugging = typer.Typer()
debug = typer.Typer(help="Looks into an artifact layer by layer.", no_args_is_help=True)
debugging.add_typer(debug, name="debug")

#: Runtimes whose variants are engines.
_ENGINES = ("tensorrt", "tensorrt-rtx")
#: Layers that the terminal shows; the page and --json have all.
_SHOWN = 20


@debug.command()
def quantization(
    artifact: Annotated[Path, typer.Argument(help="an artifact with an INT8 variant", show_default=False)],
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", help="samples to measure on", show_default="seeded inputs")
    ] = None,
    limit: Annotated[int, typer.Option(help="samples to measure on", min=1)] = 8,
    variant: Annotated[str | None, typer.Option(help="of the artifact", show_default="the first in INT8")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="also write an HTML page with histograms", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the result as one line of JSON")] = False,
) -> None:
    """Shows for each quantised layer what its rounding does to the output, and the flag that leaves it out."""
    if output is not None:
        require_other(output)
    found = package.read_package(artifact)
    found.verify()
    recipe = from_dict(found.metadata["recipe"], origin="the artifact's recipe")
    calibrated = [v for v in found.variants if v.precision in CALIBRATED]
    chosen = next((v for v in calibrated if variant in (None, v.name)), None)
    if chosen is None or not (artifact / CALIBRATION).is_file():
        named = ", ".join(v.name for v in calibrated)
        raise InvalidArtifact(
            f"the artifact has no calibrated INT8 variant{'' if variant is None else f' {variant!r}'}",
            where=str(artifact),
            hint=f"it has: {named}" if named else "build one with --precision int8 --data ...",
        )
    with console.status("optimising") as on_status:
        model, calibration = _float_graph(artifact, recipe)
        samples = _samples(found, recipe, model, eval_data, limit)
        result = debug_quantization(
            model, chosen.target, calibration, samples, weights=recipe.quantize.weights, on_status=on_status
        )
    if output is not None:
        write_page(result, output, title=f"{found.name}: INT8 layer by layer")
    if json:
        console.print_json({"variant": chosen.name, **to_json(result)})
        return
    console.out.print(Text(f"{chosen.name}, in the INT8 of {chosen.target}"))
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


@debug.command()
def engine(
    artifact: Annotated[Path, typer.Argument(help="an artifact with an engine", show_default=False)],
    variant: Annotated[str | None, typer.Option(help="which of its variants", show_default="the first engine")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="also compare every tensor: builds a second engine")] = False,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", help="samples to compare on", show_default="seeded inputs")
    ] = None,
    limit: Annotated[int, typer.Option(help="samples to compare on", min=1)] = 4,
    dim: Annotated[
        list[str] | None, typer.Option("--dim", help="NAME=SIZE of a dimension of made-up inputs", show_default=False)
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="vouch for an engine that was built elsewhere")] = False,
    json: Annotated[bool, typer.Option("--json", help="print the result as one line of JSON")] = False,
) -> None:
    """Shows the layers of a TensorRT engine and how far its numbers are from ONNX Runtime's."""
    require_polygraphy()
    found = package.read_package(artifact)
    chosen = _engine_variant(found, variant)
    found.verify(name for name in found.files if name.startswith(chosen.directory + "/"))
    recipe = from_dict(found.metadata["recipe"], origin="the artifact's recipe")
    recipe = recipe.override(dims={**recipe.dims, **parse_dims(dim)})
    compiled = dataclasses.replace(found.compiled(chosen), trusted=trust)
    if compiled.model_file is None:
        raise InvalidArtifact("the engine has no graph beside it", where=str(compiled.directory), hint="build it again")
    with console.status("reading the graph") as on_status:
        samples = _samples(found, recipe, read_onnx(compiled.directory / compiled.model_file), eval_data, limit)
        result = debug_engine(compiled, samples, layers=layers, on_status=on_status)
    if json:
        console.print_json(result)
        return
    width = console.out.width
    if result.layers:
        made_of = [(each.name, each.kind, ", ".join(each.reads), ", ".join(each.gives)) for each in result.layers]
        console.out.print(table((f"layers of {chosen.name}", ("layer", "kind", "reads", "gives"), made_of), width))
    header = ("tensor", "op", "noise/signal", "what it read", "largest difference", "cosine")
    worst = sorted(result.tensors, key=lambda one: (one.reads_nmse or 0.0) - one.nmse)[:_SHOWN]
    for title, differences in (
        (f"outputs against ONNX Runtime, {result.samples} samples", result.outputs),
        ("tensors where the most noise comes in", worst),
    ):
        rows = [
            (
                one.tensor, one.op_type, f"{one.nmse:.2g}", "-" if one.reads_nmse is None else f"{one.reads_nmse:.2g}",
                f"{one.max_abs:.3g}", f"{one.cosine:.6f}",
            )
            for one in differences
        ]  # fmt: skip
        if rows:
            console.out.print(table((title, header, rows), width))
    if len(result.tensors) > _SHOWN:
        console.out.print(Text(f"and {len(result.tensors) - _SHOWN} more tensors; --json has all", "dim"))
    for remark in result.remarks:
        console.out.print(Text(remark))


def _engine_variant(found: package.Package, name: str | None) -> Variant:
    """The variant of that name, the first engine where none is given. Raises InvalidArtifact."""
    engines = [one for one in found.variants if one.target.runtime in _ENGINES]
    chosen = next((one for one in engines if name in (None, one.name)), None)
    if chosen is None:
        there = ", ".join(f"{one.name} ({one.target})" for one in found.variants)
        raise InvalidArtifact(
            f"the artifact has no engine {name!r}" if name else "the artifact has no TensorRT engine",
            where=str(found.root),
            hint=f"it has: {there}; --target tensorrt or tensorrt-rtx builds one",
        )
    return chosen


def _samples(
    found: package.Package, recipe: Recipe, model: ir.Model, eval_data: str | None, limit: int
) -> list[dict[str, np.ndarray]]:
    """Inputs of batch 1: the user's, preprocessed as in the build, or made-up ones. Raises DataError."""
    specs = input_specs(model)
    if eval_data is None:
        return [seeded_inputs(specs, batch=1, seed=recipe.seed + n, dims=recipe.dims) for n in range(limit)]
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
    return samples


def _float_graph(artifact: Path, recipe: Recipe) -> tuple[ir.Model, Calibration]:
    """The optimised float graph, made again from the exported one, and the calibration that was made on it."""
    model = read_onnx(artifact / EXPORTED)
    optimize(model, recipe.pipeline())
    calibration = calibration_file.read(artifact / CALIBRATION)
    calibration_file.require_match(calibration, model, where=CALIBRATION)
    return model, calibration
