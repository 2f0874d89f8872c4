"""``toolchain encode`` and ``toolchain decode``: weights as a few shared values in a compact file, and back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import onnx_ir as ir
import typer
from rich.text import Text

from runtimes import Error, InvalidInput, InvalidModel
from toolchain import codecs, console
from toolchain.evaluate import input_specs, run_reference
from toolchain.metrics import TensorError, tensor_error
from toolchain.onnx_file import read_onnx, write_onnx
from toolchain.seeded import seeded_inputs
from toolchain.storage import reported, require_outside_artifacts
from toolchain.tables import Rows, decibels, megabytes, table

coding = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="print the result as one line of JSON")]
#: weights and reasons that are shown; --json has all
_SHOWN = 8


@coding.command()
def encode(
    model: Annotated[Path, typer.Argument(help="an .onnx file", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="the file to write", show_default=False)],
    codec: Annotated[str, typer.Option(help="kmeans, or log: zero and powers of two")] = "kmeans",
    levels: Annotated[int, typer.Option(help="values of a weight: 2 to 256, of log an odd number from 3 to 255")] = 16,
    smallest: Annotated[int, typer.Option(help="weights of fewer elements stay as they are", min=1)] = 1024,
    dim: Annotated[
        list[str] | None,
        typer.Option(help="NAME=SIZE of a dimension of the inputs that outputs are compared on; may be repeated"),
    ] = None,
    json: Json = False,
) -> None:
    """Writes a model's weights as few shared values, entropy coded; reads them back, and says what that costs."""
    _require_other(model, output)
    graph = read_onnx(model)
    dims = console.parse_dims(dim)
    with console.status("encode") as on_status:
        require_outside_artifacts(output)
        # compared before it takes the place of what was there
        with reported(output, "the encoded model"), tempfile.TemporaryDirectory(dir=output.parent) as folder:
            made = Path(folder) / output.name
            done = codecs.encode(graph, made, codec=codec, levels=levels, smallest=smallest)  # type: ignore[arg-type]
            on_status("encode: reading it back")
            back = codecs.decode(made)
            errors, not_run = _compared(graph, back, dims)
            os.replace(made, output)
        on_status("encode: the same file under a common compressor")
        raw = codecs.float_file(graph)
        tool, squeezed = codecs.compressed(raw)
    if json:
        console.print_json({
            "output": str(output), "codec": codec, "levels": levels, "size": done.size, "graph_bytes": done.graph_bytes,
            "float_size": len(raw), "compressor": tool, "compressed_float_size": squeezed, "outputs": errors,
            "not_compared": not_run, "tensors": done.tensors, "kept": done.kept,
        })  # fmt: skip
        return
    sizes: Rows = (
        "Size",
        ("file", "size", "of the float file"),
        [
            (str(model), megabytes(len(raw)), "100.0 %"),
            (f"the same, {tool}", megabytes(squeezed), f"{squeezed / len(raw):.1%}"),
            (f"{output}: {codec}, {levels} values", megabytes(done.size), f"{done.size / len(raw):.1%}"),
        ],
    )
    worst = sorted(done.tensors, key=lambda t: t.nmse, reverse=True)[:_SHOWN]
    rows = [(t.name, str(t.elements), f"{8 * t.encoded_bytes / t.elements:.2f}", f"{t.nmse:.1e}") for t in worst]
    header = ("weight", "elements", "bits each", "noise/signal")
    console.out.print(table(sizes))
    if rows:
        of = f" (the noisiest of {len(done.tensors)})" if len(done.tensors) > len(rows) else ""
        console.out.print(table((f"Encoded weights{of}", header, rows)))
    compared = [(name, f"{e.max_abs:.2g}", decibels(e)) for name, e in errors.items()]
    if compared:
        console.out.print(table(("Outputs on made-up inputs", ("output", "largest error", "SQNR"), compared)))
    if not_run is not None:
        console.err.print(Text(f"warning: outputs were not compared: {not_run}", style="bold yellow"))
    kept = [d for d in done.kept if d.reason != codecs.VECTOR]
    for declined in kept[:_SHOWN]:
        console.out.print(Text(f"kept {declined.node}: {declined.reason}", style="dim"))
    if len(kept) > _SHOWN:
        console.out.print(Text(f"and {len(kept) - _SHOWN} more", style="dim"))
    if not done.tensors:
        console.err.print(Text("warning: no weight was encoded: see --smallest", style="bold yellow"))
    console.out.print(Text(f"wrote {output} and read it back; `toolchain decode` makes an ordinary float model of it"))


@coding.command()
def decode(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="what `toolchain encode` wrote", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="the .onnx file to write", show_default=False)],
    json: Json = False,
) -> None:
    """Makes an ordinary float model of encoded weights; it is as fast and as large as before."""
    _require_other(path, output)
    with console.status("decode"):
        graph = codecs.decode(path)
        write_onnx(graph, output)
    packed, size = path.stat().st_size, len(codecs.float_file(graph))
    if json:
        console.print_json({"output": str(output), "encoded_size": packed, "size": size})
        return
    console.out.print(Text(f"wrote {output}, {megabytes(size)}, from {megabytes(packed)}"))


def _compared(model: ir.Model, back: ir.Model, dims: dict[str, int]) -> tuple[dict[str, TensorError], str | None]:
    """By output, or why not: a graph that takes no made-up inputs is encoded all the same."""
    samples = [seeded_inputs(input_specs(model), batch=1, dims=dims)]
    try:
        (before,), (after,) = run_reference(model, samples), run_reference(back, samples)
    except Error as error:
        return {}, error.what
    return {name: tensor_error(before[name], after[name]) for name in before}, None


def _require_other(source: Path, output: Path) -> None:
    """Neither command writes over what it reads. Raises InvalidInput, and InvalidModel where there is no such file."""
    if not source.is_file():
        raise InvalidModel("there is no such file", where=str(source), hint="check the path")
    if output.exists() and output.samefile(source):
        raise InvalidInput("the output is the file that is read", where=str(output), hint="write to another one")
