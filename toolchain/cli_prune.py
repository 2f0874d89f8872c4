"""`toolchain prune`: a smaller graph from a float one, with the account of what was cut and what it costs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from passes.prune_weights import masks_of
from toolchain import console
from toolchain.cache import digest_of
from toolchain.console import Preprocessing
from toolchain.data import Dataset, open_dataset, preprocessing_of
from toolchain.errors import GraphError, RecipeError, StorageError
from toolchain.evaluate import class_count, input_specs
from toolchain.masks import write_masks
from toolchain.onnx_file import read_onnx, write_onnx
from toolchain.recipe import Prune, from_dict
from toolchain.render import prune_notes, prune_sections
from toolchain.samples import Batch
from toolchain.seeded import seeded_inputs
from toolchain.tables import table

pruning = typer.Typer()

#: Calibration samples, as in a recipe; and made-up ones where there are none.
_LIMIT = 512
_MADE_UP = 8


@pruning.command()
def prune(
    model: Annotated[Path, typer.Argument(help="an .onnx file, float", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="the .onnx file to write", show_default=False)],
    ratio: Annotated[
        float | None, typer.Option(help="how much goes: 0.3 is three channels of ten", show_default=False)
    ] = None,
    target_macs: Annotated[
        float | None,
        typer.Option(help="share of the multiply-accumulates that is left, such as 0.5", show_default=False),
    ] = None,
    target_latency: Annotated[
        float | None, typer.Option(help="share of the latency on this CPU that is left", show_default=False)
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="cut as much as loses no more than this, such as 0.01", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option(help="channels, weights (zeros, no faster), or low-rank")] = "channels",
    pattern: Annotated[
        str | None, typer.Option(help="for weights: N of each M stay, such as 2:4", show_default=False)
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(help="for weights: these stay; .npz, or a state dict of torch's prune", show_default=False),
    ] = None,
    save_masks: Annotated[
        Path | None, typer.Option(help="also write which weights are left, as .npz", show_default=False)
    ] = None,
    importance: Annotated[
        str,
        typer.Option(
            help="l1, l2, batch-norm, activation, taylor (gradients: labels, torch), wanda (weights), random, or auto: "
            "by the data"
        ),
    ] = "auto",
    scope: Annotated[
        str, typer.Option(help="who competes with --ratio: layer, global; for weights also channel")
    ] = "auto",
    data: Annotated[
        str | None,
        typer.Option(help="samples to rank and to reconstruct on: a folder of images, .npz, ...", show_default=False),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option("--eval-data", help="labelled samples that the loss is measured on", show_default=False),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="use this many evaluation samples", show_default="all")] = None,
    preprocessing: Preprocessing = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="a layer that stays whole; may be repeated", show_default=False)
    ] = None,
    round_to: Annotated[
        int | None,
        typer.Option(help="channels that are left are a multiple of this", show_default="4, 8 or 16 by size"),
    ] = None,
    min_channels: Annotated[int, typer.Option(help="so many channels of a layer stay")] = 1,
    blocks: Annotated[
        bool, typer.Option("--blocks/--no-blocks", help="whether a search may take out whole residual blocks")
    ] = True,
    reconstruct: Annotated[
        bool | None,
        typer.Option(
            "--reconstruct/--no-reconstruct", help="fit what is left to the samples", show_default="with --data"
        ),
    ] = None,
    finetune: Annotated[
        str | None,
        typer.Option(help="a training loop, FILE.py:FUNCTION: it gets the pruned graph in torch", show_default=False),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            help="with --finetune: cut and train so many times, much at first and little in the end; where it was "
            "interrupted, the same command goes on"
        ),
    ] = 1,
    dim: Annotated[
        list[str] | None,
        typer.Option("--dim", help="size of a symbolic dimension, such as sequence=128; repeat", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="of importance random, and of made-up inputs")] = 0,
    json: Annotated[bool, typer.Option("--json", help="print the result as one line of JSON")] = False,
) -> None:
    """Cuts what matters least out of an ONNX file, and says what that saves and costs."""
    from toolchain.finetune import forget_rounds, loop_digest, trainer
    from toolchain.pruning import ALREADY, Given
    from toolchain.pruning import prune as run_prune

    asked = _asked(
        method=method, ratio=ratio, target_macs=target_macs, target_latency=target_latency, max_drop=max_drop,
        pattern=pattern, masks=masks, importance=importance, scope=scope, exclude=exclude or [], round_to=round_to,
        min_channels=min_channels, blocks=blocks, reconstruct="auto" if reconstruct is None else reconstruct,
        finetune=finetune, rounds=rounds, data={"calibration": data, "evaluation": eval_data}, seed=seed,
    )  # fmt: skip
    if save_masks is not None and method != "weights":
        raise RecipeError(
            f"masks say which single weights are left, and method {method} leaves smaller tensors",
            where="--save-masks",
            hint="leave --save-masks out, or take --method weights",
        )
    if output.resolve() == model.resolve():
        raise StorageError("the result would replace the model", where=str(output), hint="choose another --output")
    train = None if finetune is None else trainer(finetune)
    graph = read_onnx(model)
    specs = input_specs(graph)
    dims = console.parse_dims(dim)

    def opened(text: str | None, most: int | None) -> Dataset | None:
        if text is None:
            return None
        images = None if preprocessing is None else preprocessing_of(preprocessing)
        return open_dataset(
            text, inputs=specs, preprocessing=images, class_count=class_count(graph), batch_size=25, limit=most
        )

    calibration, evaluation = opened(data, _LIMIT), opened(eval_data, limit)
    judged_on = evaluation or calibration
    fingerprints = [None if each is None else each.fingerprint() for each in (calibration, evaluation)]
    folder = output.with_name(f"{output.name}.rounds")
    made_up = [Batch(seeded_inputs(specs, batch=1, seed=seed + i, dims=dims), None) for i in range(_MADE_UP)]
    with console.status("prune") as on_status:
        made, report = run_prune(
            graph,
            asked,
            Given(
                calibration=calibration or (),
                judged=made_up if judged_on is None else list(judged_on),
                data="seeded random inputs" if judged_on is None else judged_on.name,
                dims=dims,
                seed=seed,
                fine_tune=train,
                folder=folder,
                key=digest_of({"loop": finetune and loop_digest(finetune), "data": fingerprints}),
                on_status=on_status,
            ),
        )
        if not report.changed:
            forget_rounds(folder)
            on = "; a larger cut goes on from here" if report.remarks[0] == ALREADY else ""
            raise GraphError(report.remarks[0], where=str(model), hint=f"nothing was written{on}")
        write_onnx(made, output)
        forget_rounds(folder)
        if save_masks is not None:
            write_masks(masks_of(made), save_masks)
    if json:
        console.print_json({"output": str(output), "prune": report})
        return
    for section in prune_sections(report):
        console.out.print(table(section, console.out.width))
        console.out.print(Text(""))
    for line in prune_notes(report):
        console.out.print(Text(line, style="dim"))
    console.out.print(Text(f"wrote {output}"))


def _asked(*, data: dict[str, Any], seed: int, **options: Any) -> Prune:
    """What was asked, checked as a recipe's section is. Raises RecipeError with the option."""
    try:
        recipe = from_dict({"model": "-", "prune": options, "data": data, "seed": seed}, origin="command line")
    except RecipeError as error:
        key = re.split(r"[.\s]", error.where or "")[-1]
        error.where = f"--{key.replace('_', '-')}" if key in {*Prune.model_fields, "seed"} else None
        raise
    assert recipe.prune is not None
    return recipe.prune
