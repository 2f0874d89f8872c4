"""The ``toolchain`` command: the line's commands here, those that only look in ``cli_look.py``."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from toolchain import console, models, recipe_file
from toolchain.benchmark import Plan, Subject, benchmark, compare_latency
from toolchain.cache import Cache
from toolchain.cli_bundle import bundling
from toolchain.cli_calibrate import calibrating
from toolchain.cli_codec import coding
from toolchain.cli_debug import debugging
from toolchain.cli_look import looking
from toolchain.cli_prune import pruning
from toolchain.cli_serve import serving
from toolchain.errors import RecipeError
from toolchain.recipe import from_dict
from toolchain.render import bench_section, comparison_table, show
from toolchain.tables import decibels, percent, table

app = typer.Typer(
    name="toolchain",
    help="Turns a trained model into a verified, measured, portable artifact.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str,
    typer.Argument(
        help="zoo name, hf:ID, timm:NAME, torchvision:NAME, FILE.py:FACTORY, .pt2, .onnx; or a recipe.yaml to build",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print the result as one line of JSON")]
Weights = Annotated[
    str | None, typer.Option(help="auto, random, or a .safetensors, .pt or .pth file", show_default="auto")
]
Seed = Annotated[int | None, typer.Option(help="of random weights and inputs", show_default="0")]
EvalData = Annotated[
    str | None,
    typer.Option(
        "--eval-data",
        help="labelled samples: a folder with one folder a class, .npz, or FILE.py:FUNCTION",
        show_default=False,
    ),
]
Dims = Annotated[
    list[str] | None,
    typer.Option(
        "--dim", help="size of a symbolic dimension of made-up inputs, such as sequence=128; repeat", show_default=False
    ),
]
Numbers = Annotated[str | None, typer.Option(help="one number or several, such as 1,8,32", show_default="1")]


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="show the traceback of an error; anywhere on the line")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=lambda asked: _version(asked), is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Read by run() before the commands are: this entry is for --help."""


@app.command()
def build(
    model: Model,
    target: Annotated[
        list[str] | None,
        typer.Option(help="what to build for; may be repeated; auto: all that works here", show_default="ort-cpu"),
    ] = None,
    weights: Weights = None,
    seed: Seed = None,
    name: Annotated[str | None, typer.Option(help="of the artifact", show_default="from the model")] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="the artifact's folder", show_default="artifacts/NAME"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, int8, int8-fp16, auto (int8 if faster and good enough), int8-dynamic, int8-weights, fp16",
            show_default="fp16 on TensorRT, else fp32",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="samples for INT8 calibration: a folder of images, .npz, ...", show_default=False)
    ] = None,
    preprocessing: console.Preprocessing = None,
    calibration: Annotated[
        str | None, typer.Option(help="a file from `toolchain calibrate`, in place of --data", show_default=False)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="minmax, moving-average, percentile, entropy, mse, or auto", show_default="auto"),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="most that INT8 may lose, such as 0.005", show_default="no budget")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="what is lost: top1, agreement, nmse, or auto", show_default="auto")
    ] = None,
    equalization: Annotated[
        str | None, typer.Option(help="of channels between layers: none, on, or auto", show_default="auto")
    ] = None,
    smooth_quant: Annotated[
        str | None, typer.Option(help="for transformers: none, on, 0 to 1, or auto", show_default="auto")
    ] = None,
    bias_correction: Annotated[
        str | None, typer.Option(help="none, fast, sequential, or auto: if --max-drop asks for it", show_default="auto")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="a node that stays in float; may be repeated", show_default=False)
    ] = None,
    eval_data: EvalData = None,
    limit: Annotated[int | None, typer.Option(help="use this many evaluation samples", show_default="all")] = None,
    opset: Annotated[int | None, typer.Option(help="of a torch export", show_default="the exporter's")] = None,
    dim: Dims = None,
    batch_sizes: Numbers = None,
    threads: Annotated[
        str | None, typer.Option(help="as --batch-sizes; 0 is the runtime's choice", show_default="0")
    ] = None,
    max_nmse: Annotated[
        float | None, typer.Option(help="largest normalised MSE of an output", show_default="by precision")
    ] = None,
    verify_each: Annotated[bool, typer.Option("--verify-each", help="compare the outputs after every pass")] = False,
    dump_dir: Annotated[
        Path | None, typer.Option(help="write NN_pass.onnx here after every pass", show_default=False)
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="reuse nothing and keep nothing")] = False,
    json: Json = False,
) -> None:
    """Builds an artifact: export, optimize, compile, verify, benchmark, pack. Overrides what a recipe says."""
    import tempfile

    from toolchain.build import Debugging
    from toolchain.build import build as run_build

    recipe = (
        recipe_file.read(Path(model))
        if model.endswith((".yaml", ".yml"))
        else from_dict({"model": model}, origin="command line")
    )
    recipe = recipe.override(
        targets=target or None,
        weights=weights,
        seed=seed,
        name=name,
        output=output,
        precision=precision,
        data__calibration=data,
        data__preprocessing=preprocessing,
        quantize__calibration=calibration,
        quantize__method=method,
        quantize__max_drop=max_drop,
        quantize__metric=metric,
        quantize__equalization=equalization,
        quantize__smooth_quant=_number_or_word(smooth_quant),
        quantize__bias_correction=bias_correction,
        quantize__exclude=exclude or None,
        data__evaluation=eval_data,
        data__limit=limit,
        export__opset=opset,
        dims=console.parse_dims(dim) or None,
        benchmark__batch_sizes=_numbers(batch_sizes, "--batch-sizes"),
        benchmark__threads=_numbers(threads, "--threads"),
        verify__max_nmse=max_nmse,
    )
    if recipe.data.limit is not None and recipe.data.evaluation is None:
        raise RecipeError("limit has no effect without evaluation data", where="--limit", hint="--eval-data FOLDER")
    with tempfile.TemporaryDirectory(prefix="toolchain-") as own, console.status("building") as on_status:
        cache = Cache(Path(own)) if no_cache else Cache()
        built = run_build(
            recipe, cache=cache, reuse=not no_cache, debugging=Debugging(verify_each, dump_dir), on_status=on_status
        )
    if json:
        console.print_json({"artifact": str(built.path), "up_to_date": built.up_to_date, "report": built.report})
        return
    show(built.report, console.out)
    if built.up_to_date:
        console.out.print(Text(f"\n{built.path} is up to date: the same build made it, nothing was done again"))
    else:
        console.out.print(
            Text(f"\nwrote {built.path}; open report.html in it, or load it: runtimes.load({str(built.path)!r})")
        )


@app.command()
def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="the .onnx file to write")],
    weights: Weights = None,
    seed: Seed = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset", show_default="the exporter's")] = None,
    json: Json = False,
) -> None:
    """Exports a model to ONNX, unoptimised, and compares it with PyTorch."""
    from toolchain.export import export_source
    from toolchain.onnx_file import write_onnx

    with console.status(f"exporting {model}"):
        exported = export_source(models.resolve(model), weights=weights or "auto", seed=seed or 0, opset=opset)
        write_onnx(exported.model, output)
    if json:
        console.print_json({"output": str(output), **exported.to_meta()})
        return
    for warning in exported.warnings:
        console.err.print(Text(f"warning: {warning}", style="bold yellow"))
    for output_name, error in exported.torch_error.items():
        console.out.print(
            Text(f"{output_name}: largest error against PyTorch {error.max_abs:.2g}, SQNR {decibels(error)}")
        )
    console.out.print(Text(f"wrote {output}, opset {exported.opset}"))


@app.command()
def optimize(
    model: Annotated[Path, typer.Argument(help="an .onnx file", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="the .onnx file to write", show_default=False)
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--pass", help="run this pass; may be repeated", show_default="the default pipeline"),
    ] = None,
    stop_after: Annotated[str | None, typer.Option(help="end after this pass", show_default=False)] = None,
    verify_each: Annotated[bool, typer.Option("--verify-each", help="compare the outputs after every pass")] = False,
    dump_dir: Annotated[
        Path | None, typer.Option(help="write NN_pass.onnx here after every pass", show_default=False)
    ] = None,
    dim: Dims = None,
    seed: Seed = None,
    json: Json = False,
) -> None:
    """Runs graph passes over an ONNX file."""
    from toolchain.evaluate import input_specs
    from toolchain.onnx_file import read_onnx, write_onnx
    from toolchain.optimize import optimize as run_passes
    from toolchain.seeded import seeded_inputs

    recipe = from_dict({"model": str(model), "passes": only or "default"}, origin="--pass")
    graph = read_onnx(model)
    specs = input_specs(graph)
    samples = (
        [seeded_inputs(specs, batch=1 + i, seed=(seed or 0) + i, dims=console.parse_dims(dim)) for i in range(2)]
        if verify_each
        else []
    )
    with console.status("optimize") as on_status:
        reports = run_passes(
            graph,
            recipe.pipeline(),
            verify_on=samples,
            dump_dir=dump_dir,
            stop_after=stop_after,
            on_status=on_status,
        )
    if output is not None:
        write_onnx(graph, output)
    if json:
        console.print_json({"output": None if output is None else str(output), "passes": reports})
        return
    header = ("pass", "graph", "fired", "nodes", "time", "NMSE", "declined")
    rows = [
        (
            r.name, "changed" if r.changed else "-", str(r.fired), f"{r.nodes_before} → {r.nodes_after}",
            f"{r.seconds * 1e3:.0f} ms", "-" if r.nmse is None else f"{r.nmse:.1e}", str(len(r.declined)),
        )
        for r in reports
    ]  # fmt: skip
    console.out.print(table(("Passes", header, rows)))
    for report in reports:
        for remark in report.remarks:
            console.out.print(Text(f"{report.name}: {remark}"))
        for declined in report.declined:
            console.out.print(Text(f"{report.name} declined {declined.node}: {declined.reason}", style="dim"))
    if output is not None:
        console.out.print(Text(f"wrote {output}"))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="an artifact's folder, or an .onnx file", show_default=False)],
    against: Annotated[
        Path | None,
        typer.Option(help="the reference .onnx", show_default="the exported model in the artifact"),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="of the artifact", show_default="the best here")] = None,
    eval_data: EvalData = None,
    limit: Annotated[int | None, typer.Option(help="use this many evaluation samples", show_default="all")] = None,
    preprocessing: console.Preprocessing = None,
    samples: Annotated[int, typer.Option(help="seeded inputs to compare on", min=1)] = 4,
    dim: Dims = None,
    max_nmse: Annotated[
        float | None, typer.Option(help="largest normalised MSE of an output", show_default="by precision")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="compare layer by layer, by name")] = False,
    seed: Seed = None,
    json: Json = False,
) -> None:
    """Checks an artifact's digests, and compares it (or an .onnx) with its reference. Exits with 2 beyond the bound."""
    from toolchain.verify_command import verify_path

    with console.status("verify") as on_status:
        result = verify_path(
            path, against=against, variant=variant, eval_data=eval_data, limit=limit, preprocessing=preprocessing,
            samples=samples, dims=console.parse_dims(dim), max_nmse=max_nmse, layers=layers, seed=seed or 0,
            on_status=on_status,
        )  # fmt: skip
    if json:
        console.print_json(result)
    else:
        header = ("output", "largest error", "NMSE", "SQNR", "cosine", "top-1 agreement")
        rows = [
            (
                name,
                f"{e.max_abs:.2g}",
                f"{e.nmse:.1e}",
                decibels(e),
                f"{e.cosine:.8f}",
                percent(e.top1_agreement),
            )
            for name, e in result.fidelity.outputs.items()
        ]
        console.out.print(table((f"{result.candidate} against {result.reference}", header, rows)))
        if result.accuracy is not None:
            a = result.accuracy
            columns = ("of", "top-1", "top-5", "samples", "same class")
            both = [
                ("candidate", percent(a.top1), percent(a.top5), str(a.samples), percent(a.agreement)),
                ("reference", percent(a.reference_top1), percent(a.reference_top5), str(a.samples), "-"),
            ]
            console.out.print(table((f"Accuracy on {a.data}", columns, both)))
        if result.layers:
            found = [(x.name, x.node, f"{x.error.max_abs:.2g}", decibels(x.error)) for x in result.layers]
            console.out.print(table(("Layer by layer", ("value", "node", "largest error", "SQNR"), found)))
    result.require()


@app.command()
def bench(
    path: Annotated[str, typer.Argument(help="an artifact's folder, or an .onnx file", show_default=False)],
    vs: Annotated[
        str | None, typer.Option(help="another one: measured turn by turn, A B A B", show_default=False)
    ] = None,
    target: Annotated[str | None, typer.Option(help="the runtime", show_default="the best here")] = None,
    variant: Annotated[str | None, typer.Option(help="of the artifact", show_default="the best here")] = None,
    batch_sizes: Numbers = None,
    threads: Annotated[
        str | None, typer.Option(help="as --batch-sizes; 0 is the runtime's choice", show_default="0")
    ] = None,
    duration: Annotated[float, typer.Option(help="seconds to measure at least, for each row")] = 2.0,
    count: Annotated[int, typer.Option(help="runs to measure at least; a p99 needs 662")] = 662,
    warmup: Annotated[int, typer.Option(help="runs before that")] = 10,
    dim: Dims = None,
    seed: Seed = None,
    json: Json = False,
) -> None:
    """Measures latency, throughput, load time and memory, in a fresh process."""
    plan = Plan(
        batch_sizes=tuple(_numbers(batch_sizes, "--batch-sizes") or [1]),
        threads=tuple(_numbers(threads, "--threads") or [0]),
        warmup=warmup,
        duration_s=duration,
        count=count,
        dims=console.parse_dims(dim),
        seed=seed or 0,
    )
    subject = Subject(path, target=target, variant=variant)
    with console.status("benchmark") as on_status:
        if vs is not None:
            found = compare_latency(subject, Subject(vs, target=target), plan, on_status=on_status)
            if json:
                console.print_json({"a": path, "b": vs, "comparisons": found})
            else:
                console.out.print(comparison_table(found, path, vs))
            return
        report = benchmark(subject, plan, on_status=on_status)
    if json:
        console.print_json(report)
        return
    console.out.print(table(bench_section(report, title=f"{path} on {report.target}"), console.out.width))
    for row in report.rows:
        if not row.valid:
            console.out.print(Text(f"batch {row.batch}: not valid, {row.reason}", style="yellow"))
    console.out.print(
        Text(f"{report.cpu}, {report.cores} cores; " + ", ".join(f"{k}: {v}" for k, v in report.info.items()))
    )


# Those that only look come after those that make something.
app.registered_commands += pruning.registered_commands + coding.registered_commands
app.registered_commands += bundling.registered_commands + serving.registered_commands
app.registered_commands += calibrating.registered_commands + looking.registered_commands
app.registered_groups += looking.registered_groups + debugging.registered_groups


def _numbers(text: str | None, option: str) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(f"not a list of numbers: {text!r}", where=option, hint="write 1 or 1,8,32") from error


def _number_or_word(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _version(asked: bool) -> None:
    if asked:
        console.out.print(importlib.metadata.version("onnx-toolchain"))
        raise typer.Exit
