"""Commands that look and tidy: inspect, doctor, passes, targets, init, cache."""

from __future__ import annotations

import collections
import datetime
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import onnx_ir as ir
import typer
from rich.text import Text

import passes as pass_table
import runtimes
from passes._graph import constant
from runtimes import package
from toolchain import console, models
from toolchain.as_json import to_json
from toolchain.cache import Cache, Entry
from toolchain.doctor import diagnose
from toolchain.recipe import from_dict
from toolchain.recipe_file import commented
from toolchain.tables import Rows, megabytes, table

looking = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="print the result as one line of JSON")]


@looking.command()
def init(
    model: Annotated[str, typer.Argument(help="the model to write a recipe for", show_default=False)],
    json: Json = False,
) -> None:
    """Writes a commented recipe to standard output: toolchain init resnet50 > recipe.yaml."""
    models.resolve(model)
    if json:
        console.print_json(from_dict({"model": model}, origin="command line").model_dump())
    else:
        sys.stdout.write(commented(model))


@looking.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="an artifact's folder, or an .onnx file", show_default=False)],
    target: Annotated[
        str | None, typer.Option(help="tensorrt or tensorrt-rtx: says which nodes of an .onnx file it takes")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="show what each node of an .onnx file costs")] = False,
    time: Annotated[bool, typer.Option("--time", help="with --layers: also how long each takes on ort-cpu")] = False,
    batch: Annotated[int, typer.Option(help="batch that costs are counted for", min=1)] = 1,
    dim: Annotated[
        list[str] | None,
        typer.Option("--dim", help="size of a symbolic dimension, such as sequence=128; repeat", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Shows what a model takes, gives and costs, or what an artifact holds."""
    rows: Rows | None = None
    if target is not None:
        found = _inspect_network(path, runtimes.Target.parse(target))
    elif path.is_dir():
        if layers or time:
            raise runtimes.InvalidInput(
                "layers are looked at in an .onnx file", where=str(path), hint=f"{path}/VARIANT/model.onnx is one"
            )
        found = _inspect_artifact(path)
    else:
        model, found = _inspect_model(path)
        sizes = console.parse_dims(dim)
        costs, rows = _costs(model, batch=batch, dims=sizes, layers=layers or time, time=time)
        found |= costs
    if json:
        console.print_json(found)
        return
    found.pop("layers", None)
    for key, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        lines = value if isinstance(value, list) else [value]
        for number, line in enumerate(lines):
            console.out.print(Text(f"{key if number == 0 else '':<14} {line}"))
    if rows is not None:
        console.out.print(table(rows))


def _inspect_model(path: Path) -> tuple[ir.Model, dict[str, Any]]:
    from toolchain.evaluate import input_specs, output_specs
    from toolchain.onnx_file import read_onnx

    model = read_onnx(path)
    scopes = [model.graph, *model.graph.subgraphs(), *model.functions.values()]
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    # some exporters keep weights in Constant nodes
    weights += [
        t for node in model.graph if node.op_type == "Constant" and (t := constant(node.outputs[0])) is not None
    ]
    ops = collections.Counter(
        node.op_type if not node.domain else f"{node.domain}.{node.op_type}" for g in scopes for node in g
    )
    return model, {
        "model": path.name,
        "producer": f"{model.producer_name or 'unknown'} {model.producer_version or ''}".strip(),
        "ir version": model.ir_version,
        "opsets": {domain or "ai.onnx": version for domain, version in model.opset_imports.items()},
        "inputs": [str(spec) for spec in input_specs(model)],
        "outputs": [str(spec) for spec in output_specs(model)],
        "parameters": sum(int(w.size) for w in weights),
        "weights": megabytes(sum(w.nbytes for w in weights)),
        "nodes": sum(ops.values()),
        "ops": dict(ops.most_common()),
    }


def _costs(
    model: ir.Model, *, batch: int, dims: dict[str, int], layers: bool, time: bool
) -> tuple[dict[str, Any], Rows | None]:
    """What the model costs, and with ``layers`` the table of its nodes."""
    from toolchain.layer_latency import layer_latency
    from toolchain.model_cost import cost_of

    # a model that was only to be looked at is not run
    cost = cost_of(model, batch=batch, dims=dims, run=layers)
    found: dict[str, Any] = {
        "macs": cost.macs,
        "operations": cost.operations,
        "activations": "not known, since a shape depends on the data; --layers runs the model to see it"
        if cost.peak_bytes is None
        else f"{megabytes(cost.peak_bytes)} at once, at {cost.peak_node}",
    }
    if cost.unknown:
        found["not counted"] = f"{len(cost.unknown)} nodes of unknown shape, such as {cost.unknown[0]}"
    if not layers:
        return found, None
    times = layer_latency(model, batch=batch, dims=dims) if time else None
    taken = {} if times is None else {layer.node: layer for layer in times.layers}
    found["layers"] = [
        {**to_json(node), "intensity": node.intensity}
        | ({} if times is None else {"milliseconds": taken[node.node].milliseconds if node.node in taken else 0.0})
        for node in cost.nodes
    ]
    header: tuple[str, ...] = ("node", "op", "output", "parameters", "MMACs", "live memory", "operations/byte")
    rows: list[tuple[str, ...]] = [
        (
            node.node,
            node.op_type,
            "?" if node.output is None else "x".join(map(str, node.output)) or "scalar",
            str(node.parameters),
            "?" if node.macs is None else f"{node.macs / 1e6:.2f}",
            "?" if node.live_bytes is None else megabytes(node.live_bytes),
            "?" if node.intensity is None else f"{node.intensity:.2f}",
        )
        for node in cost.nodes
    ]
    if times is not None:
        found["milliseconds"] = times.total_ms
        found["overhead_milliseconds"] = times.overhead_ms
        header += ("ms", "share")
        whole = sum(layer.milliseconds for layer in times.layers) + times.overhead_ms or 1.0
        spent = [taken[node.node].milliseconds if node.node in taken else 0.0 for node in cost.nodes]
        rows = [(*row, f"{ms:.3f}", f"{ms / whole:.1%}") for row, ms in zip(rows, spent, strict=True)]
    return found, ("Layers", header, rows)


def _inspect_network(path: Path, target: runtimes.Target) -> dict[str, Any]:
    from runtimes.tensorrt_engine import inspect_network

    if path.is_dir():
        raise runtimes.InvalidInput(
            "nodes are looked at in an .onnx file", where=str(path), hint=f"{path}/VARIANT/model.onnx is one"
        )
    from toolchain.onnx_file import read_onnx

    nodes = len(read_onnx(path).graph)
    report = inspect_network(path, target)
    return {
        "model": path.name,
        "target": f"{target}, {report.version}",
        "accepted": "yes" if report.accepted else "no",
        "nodes": f"{report.supported} of {nodes} are supported"
        + (f", in {report.parts} parts" if report.parts > 1 else ""),
        "not supported": [str(one) for one in report.unsupported],
        "what helps": list(dict.fromkeys(one.advice for one in report.unsupported if one.advice)),
    }


def _inspect_artifact(path: Path) -> dict[str, Any]:
    found = package.read_package(path)
    found.verify()
    variants = []
    for variant in found.variants:
        state = runtimes.backend(variant.target.runtime).can_run(variant.target)
        here = "runs here" if state.available else f"does not run here: {state.reason}"
        variants.append(f"{variant.name}: {variant.precision} for {variant.target}, {here}")
    metadata = found.metadata
    try:
        with runtimes.load(path) as session:
            inputs, outputs = [str(s) for s in session.inputs], [str(s) for s in session.outputs]
            taken = dict(session.info)
    except runtimes.TargetUnavailable as error:
        inputs, outputs, taken = [], [], {"nothing": error.what}
    weights = {key: value for key, value in metadata["source"]["weights"].items() if value is not None}
    latency = [
        f"{name}: p50 {row['p50']:.3f} ms at batch {row['batch']}" + ("" if row["valid"] else " (not valid)")
        for name, rows in (metadata.get("latency_ms") or {}).items()
        for row in rows
    ]
    return {
        "artifact": found.name,
        "digests": f"all {len(found.files)} files are as they were written",
        "warnings": metadata.get("warnings") or "none",
        "model": metadata["source"]["model"],
        "weights": weights,
        "inputs": inputs,
        "outputs": outputs,
        "variants": variants,
        "loads": taken,
        "preprocessing": metadata.get("preprocessing") or "none",
        "latency": latency,
    }


@looking.command()
def doctor(json: Json = False) -> None:
    """Says what this machine can run, and why not."""
    found = diagnose()
    if json:
        console.print_json(found)
        return
    m = found.machine
    console.out.print(Text(f"{m.cpu}, {m.cores} cores, {m.memory / 1e9:.1f} GB; {m.system}; Python {m.python}"))
    console.out.print(Text(f"cache: {found.cache}, {found.cache_free / 1e9:.1f} GB free"))
    console.out.print(table(_targets_section("Runtimes", found.runtimes)))
    rows = [(name, *_state(a)) for name, a in found.sources.items()]
    console.out.print(
        table(("Sources of models and data", ("from", "works", "version", "why not", "what mends it"), rows))
    )
    for finding in found.findings:
        console.out.print(Text(f"problem: {finding.what}\n  next: {finding.remedy}", style="yellow"))


def _state(state: runtimes.Availability) -> tuple[str, str, str, str]:
    return "yes" if state.available else "no", state.version or "-", state.reason or "-", state.remedy or "-"


def _targets_section(title: str, states: dict[str, runtimes.Availability]) -> Rows:
    rows = []
    for name, state in states.items():
        runs, *rest = _state(state)
        rows.append((name, runs, "yes" if _builds(name, state) else "no", *rest))
    return title, ("target", "runs", "builds", "version", "why not", "what mends it"), rows


def _builds(name: str, state: runtimes.Availability) -> bool:
    """Whether it can be compiled for here: some compile for devices that are not. What is absent is not asked."""
    if state.available or state.version is None:
        return state.available
    return runtimes.backend(name).can_compile(runtimes.Target(name)).available


@looking.command()
def targets(json: Json = False) -> None:
    """Lists the targets of `build`, whether each runs here, and whether it can be built for here."""
    found = runtimes.available()
    if json:
        console.print_json({name: {**to_json(a), "builds": _builds(name, a)} for name, a in found.items()})
        return
    console.out.print(table(_targets_section("Targets", found)))


@looking.command()
def passes(json: Json = False) -> None:
    """Lists the graph passes, their options, and the order of the default pipeline."""
    order = {name: number for number, name in reversed(list(enumerate(pass_table.DEFAULT_PIPELINE, start=1)))}
    names = sorted(pass_table.PASSES, key=lambda name: (order.get(name, len(order) + 99), name))
    if json:
        console.print_json(
            {
                "default_pipeline": pass_table.DEFAULT_PIPELINE,
                "passes": [
                    {"name": n, "summary": pass_table.summary(n), "options": pass_table.options(n)} for n in names
                ],
            }
        )
        return
    rows = [
        (
            str(order.get(name, "-")),
            name,
            pass_table.summary(name),
            "; ".join(f"{o.name}: {o.type} = {o.default}" for o in pass_table.options(name)) or "-",
        )
        for name in names
    ]
    console.out.print(table(("Passes", ("default", "pass", "what it does", "options"), rows)))


cache = typer.Typer(help="Shows or empties the cache of stages.", no_args_is_help=True)
looking.add_typer(cache, name="cache")


@cache.command("list")
def list_cache(json: Json = False) -> None:
    """Lists what is kept, least recently used first."""
    store = Cache()
    entries = store.entries()
    if json:
        console.print_json(
            {
                "root": str(store.root),
                "cap": store.cap,
                "entries": [{**to_json(e), "path": str(e.path)} for e in entries],
            }
        )
        return
    rows = [(e.stage, e.key[:12], megabytes(e.size), _when(e.used)) for e in entries]
    console.out.print(table((str(store.root), ("stage", "key", "size", "last used"), rows)))
    console.out.print(Text(f"{megabytes(sum(e.size for e in entries))} of {megabytes(store.cap)}"))


@cache.command("prune")
def prune_cache(
    size: Annotated[str | None, typer.Option(help="keep at most this much, such as 2G", show_default="the cap")] = None,
    json: Json = False,
) -> None:
    """Removes the least recently used entries until the rest fits."""
    from toolchain.cache import parse_size

    store = Cache()
    _told(store.evict(cap=parse_size(size, where="--size") if size else None), json)


@cache.command("clear")
def clear_cache(json: Json = False) -> None:
    """Removes every entry that no running build uses, the receipts of checked digests, and what runtimes compiled."""
    store = Cache()
    for folder in ("receipts", "openvino", "kernels"):
        shutil.rmtree(store.root / folder, ignore_errors=True)
    _told(store.clear(), json)


def _told(gone: list[Entry], json: bool) -> None:
    if json:
        console.print_json([{**to_json(e), "path": str(e.path)} for e in gone])
    else:
        console.out.print(Text(f"removed {len(gone)} entries, {megabytes(sum(e.size for e in gone))}"))


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).isoformat(sep=" ", timespec="seconds")
