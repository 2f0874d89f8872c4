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

from runtimes import InvalidArtifact, package
from runtimes._manifest import Variant
from toolchain import calibration_file, console
from toolchain.artifact import CALIBRATION
from toolchain.artifact_source import float_graph, preprocessing_of_artifact, recipe_of
from toolchain.as_json import from_json, to_json
from toolchain.candidates import Tools
from toolchain.console import Preprocessing, parse_dims
from toolchain.data import Dataset, open_dataset, preprocessing_of
from toolchain.debug import debug_quantization, noise_of, outputs_of, write_page
from toolchain.engine_debug import debug_engine, require_polygraphy
from toolchain.errors import DataError
from toolchain.evaluate import class_count, input_specs
from toolchain.lower import CALIBRATED, INT8_FP16
from toolchain.onnx_file import read_onnx
from toolchain.preprocessing import ImagePreprocessing
from toolchain.quantization import Int8Report
from toolchain.recipe import Recipe
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
#: Samples that may be measured on: all are in memory, and each layer runs the model on all.
_MOST = 4096


@debug.command()
def quantization(
    artifact: Annotated[Path, typer.Argument(help="an artifact with an INT8 variant", show_default=False)],
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", help="samples to measure on", show_default="seeded inputs")
    ] = None,
    limit: Annotated[int, typer.Option(help="samples to measure on")] = 8,
    data: Annotated[
        str | None,
        typer.Option(
            help="the build's calibration data, on which its accuracy tools are repeated",
            show_default="what is measured on",
        ),
    ] = None,
    preprocessing: Preprocessing = None,
    variant: Annotated[str | None, typer.Option(help="of the artifact", show_default="the first in INT8")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="also write an HTML page with histograms", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the result as one line of JSON")] = False,
) -> None:
    """Shows for each quantised layer what its rounding does to the output, and the flag that leaves it out."""
    console.require_count(limit, "--limit", _MOST)
    if output is not None:
        require_other(output)
    found = package.read_package(artifact)
    found.verify()
    recipe = recipe_of(found)
    calibrated = [v for v in found.variants if v.precision in CALIBRATED]
    chosen = next((v for v in calibrated if variant in (None, v.name)), None)
    if chosen is None or not (found.root / CALIBRATION).is_file():
        named = ", ".join(v.name for v in calibrated)
        raise InvalidArtifact(
            f"the artifact has no calibrated INT8 variant{'' if variant is None else f' {variant!r}'}",
            where=str(artifact),
            hint=f"it has: {named}" if named else "build one with --precision int8 --data ...",
        )
    report = from_json(Int8Report, found.metadata["int8"][chosen.name])
    tools = report.tools
    if data is not None and tools == Tools():
        raise DataError(
            "no accuracy tool is to be repeated on it: this INT8 is plain",
            where=f"--data {data}",
            hint="--eval-data says what to measure on",
        )
    stated = preprocessing_of(preprocessing) if preprocessing else preprocessing_of_artifact(found)
    with console.status("optimising") as on_status:
        model = float_graph(found)
        calibration = calibration_file.read(found.root / CALIBRATION)
        calibration_file.require_match(calibration, model, where=CALIBRATION)
        samples = _samples(found, recipe, model, eval_data, limit, stated)
        repeated_on = None
        if data is not None:
            repeated_on = open_dataset(
                data,
                inputs=input_specs(model),
                preprocessing=stated,
                class_names=found.metadata.get("labels"),
                class_count=class_count(model),
                batch_size=recipe.data.batch_size,
                limit=recipe.data.calibration_limit,
            )
        in_float = (*recipe.quantize.exclude, *(each.node for each in report.returned))
        result = debug_quantization(
            model,
            chosen.target,
            calibration,
            samples,
            weights=recipe.quantize.weights,
            exclude=in_float,
            tools=tools,
            data=repeated_on or (),
            method=recipe.quantize.method,
            percentile=recipe.quantize.percentile,
            on_status=on_status,
        )
        shipped = None
        if chosen.model_file is not None:
            on_status("running the graph that is shipped")
            graph = read_onnx(found.root / chosen.directory / chosen.model_file)
            shipped = noise_of(graph, samples, outputs_of(model, samples))
    on_what = "what is measured on, in place of the build's calibration data" if repeated_on is None else str(data)
    if output is not None:
        write_page(result, output, title=f"{found.name}: INT8 layer by layer")
    if json:
        told = {"variant": chosen.name, "in_float": in_float, "shipped_nmse": shipped, **to_json(result)}
        told["tools_repeated_on"] = None if tools == Tools() else on_what
        console.print_json(told)
        return
    console.out.print(Text(f"{chosen.name}, in the INT8 of {chosen.target}"))
    if tools != Tools():
        console.out.print(Text(f"quantised as it was built, with {tools}, repeated on {on_what}"))
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
    if in_float:
        console.out.print(Text(f"in float already: {', '.join(in_float)}"))
    console.out.print(Text(f"all of them in INT8: noise/signal of the output {result.total_nmse:.2g}"))
    if shipped is not None:
        console.out.print(Text(f"the graph in the artifact: {shipped:.2g}{_aside(chosen, tools, repeated_on)}"))
    if output is not None:
        console.out.print(Text(f"wrote {output}"))


def _aside(chosen: Variant, tools: Tools, repeated_on: Dataset | None) -> str:
    """Why the noise of the graph that is shipped may be another than that of the one which was made again."""
    if chosen.precision == INT8_FP16:
        return ", with the rest in 16 bits"
    return "" if tools == Tools() or repeated_on is not None else "; give the build's --data to look into that very one"


@debug.command()
def engine(
    artifact: Annotated[Path, typer.Argument(help="an artifact with an engine", show_default=False)],
    variant: Annotated[str | None, typer.Option(help="which of its variants", show_default="the first engine")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="also compare every tensor: builds a second engine")] = False,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", help="samples to compare on", show_default="seeded inputs")
    ] = None,
    limit: Annotated[int, typer.Option(help="samples to compare on")] = 4,
    dim: Annotated[
        list[str] | None, typer.Option("--dim", help="NAME=SIZE of a dimension of made-up inputs", show_default=False)
    ] = None,
    preprocessing: Preprocessing = None,
    trust: Annotated[bool, typer.Option("--trust", help="vouch for an engine that was built elsewhere")] = False,
    json: Annotated[bool, typer.Option("--json", help="print the result as one line of JSON")] = False,
) -> None:
    """Shows the layers of a TensorRT engine and how far its numbers are from ONNX Runtime's."""
    console.require_count(limit, "--limit", _MOST)
    require_polygraphy()
    found = package.read_package(artifact)
    chosen = _engine_variant(found, variant)
    found.verify(name for name in found.files if name.startswith(chosen.directory + "/"))
    recipe = recipe_of(found)
    recipe = recipe.override(dims={**recipe.dims, **parse_dims(dim)})
    compiled = dataclasses.replace(found.compiled(chosen), trusted=trust)
    if compiled.model_file is None:
        raise InvalidArtifact("the engine has no graph beside it", where=str(compiled.directory), hint="build it again")
    stated = preprocessing_of(preprocessing) if preprocessing else preprocessing_of_artifact(found)
    with console.status("reading the graph") as on_status:
        graph = read_onnx(compiled.directory / compiled.model_file)
        samples = _samples(found, recipe, graph, eval_data, limit, stated)
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
    found: package.Package,
    recipe: Recipe,
    model: ir.Model,
    eval_data: str | None,
    limit: int,
    preprocessing: ImagePreprocessing | None,
) -> list[dict[str, np.ndarray]]:
    """Inputs of batch 1: the user's, preprocessed as in the build or as is said, or made-up ones. Raises DataError."""
    specs = input_specs(model)
    if eval_data is None:
        return [seeded_inputs(specs, batch=1, seed=recipe.seed + n, dims=recipe.dims) for n in range(limit)]
    dataset = open_dataset(
        eval_data,
        inputs=specs,
        preprocessing=preprocessing,
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
