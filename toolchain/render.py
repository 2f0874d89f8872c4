"""Shows a build report to a person: in the terminal, and as one HTML page that needs nothing else."""

from __future__ import annotations

import html as escape
from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from toolchain.benchmark import BenchReport, Comparison
from toolchain.prune_account import PruneReport
from toolchain.quantization import Int8Report
from toolchain.report import BuildReport
from toolchain.tables import Rows, decibels, megabytes, milliseconds, numeric, percent, table

_DECLINED_SHOWN = 3


def described_weights(report: BuildReport) -> str:
    """Such as ``pretrained (hub:microsoft/resnet-50)`` or ``random (seed 0)``."""
    kind, origin = report.weights.get("kind"), report.weights.get("origin")
    return f"{kind} ({origin or 'seed ' + str(report.weights.get('seed'))})"


def _loss(metric: str, value: float) -> str:
    """A loss in words: points of accuracy, share of samples, or noise over signal."""
    if metric == "top1":
        return f"{'gains ' if value < 0 else ''}{100 * abs(value):.2f} points of top-1"
    return f"{100 * value:.2f} % other class" if metric == "agreement" else f"{value:.2g} noise/signal"


def _tools(int8: Int8Report) -> str:
    """The accuracy tools that were used."""
    used = {
        "equalization": int8.equalization,
        "SmoothQuant": int8.smooth_quant,
        "bias correction": int8.bias_correction,
    }
    return ", ".join(f"{n} ({v})" if v != "on" else n for n, v in used.items() if v != "none") or "-"


def sections(report: BuildReport) -> list[Rows]:
    """The report's tables as (title, header, rows): one source for the terminal and the page."""
    found: list[Rows] = []
    header: Sequence[str]
    rows: list[tuple[str, ...]] = [
        (
            v.name,
            v.target,
            v.precision,
            megabytes(v.size),
            "-" if v.prepared_size is None else megabytes(v.prepared_size),
            milliseconds(v.benchmark.rows[0].percentiles_ms[50]) if v.benchmark else "-",
            "not run here" if v.benchmark is None else "yes" if v.benchmark.rows[0].valid else "not valid, see below",
        )
        for v in report.variants
    ]
    batch = next((f", batch {v.benchmark.rows[0].batch}" for v in report.variants if v.benchmark), "")
    header = ("variant", "target", "precision", "model size", "prepared", f"p50 ms{batch}", "valid")
    found.append(("Variants, best first", header, rows))
    rows = [
        ("ONNX against PyTorch", name, f"{e.max_abs:.2g}", decibels(e), percent(e.top1_agreement))
        for name, e in report.torch_error.items()
    ]
    if report.prune is not None:
        found += prune_sections(report.prune)
    against = "the pruned graph" if report.prune is not None and report.prune.changed else "ONNX"
    for variant in report.variants:
        rows += [
            (f"{variant.name} against {against}", name, f"{e.max_abs:.2g}", decibels(e), percent(e.top1_agreement))
            for name, e in variant.fidelity.outputs.items()
        ]
    found.append(("Fidelity", ("compared", "output", "largest error", "SQNR", "top-1 agreement"), rows))
    rows = [
        (
            v.name,
            str(v.int8.quantised),
            _loss(v.int8.metric, v.int8.drop),
            _loss(v.int8.metric, v.int8.full_drop),
            "-" if v.int8.max_drop is None else _loss(v.int8.metric, v.int8.max_drop),
            _tools(v.int8),
            str(v.int8.evaluations),
            f"{v.int8.data} ({v.int8.samples}), {v.int8.judged_on}",
        )
        for v in report.variants
        if v.int8
    ]
    if rows:
        header = (
            "variant",
            "nodes in INT8",
            "loss",
            "all in INT8",
            "budget",
            "with",
            "evaluations",
            "judged on",
        )
        found.append(("INT8 against float32", header, rows))
    rows = [
        (v.name, trial.tools, "-" if trial.drop is None else _loss(v.int8.metric, trial.drop), trial.note or "-")
        for v in report.variants
        if v.int8 and len(v.int8.tried) > 1
        for trial in v.int8.tried
    ]
    if rows:
        found.append(("Tried, everything in INT8", ("variant", "with", "loss", "why not"), rows))
    rows = [
        (
            v.name,
            r.node,
            r.op_type,
            r.reason,
            f"{r.nmse:.2g}",
            "-" if r.cost_ms is None else f"{r.cost_ms:+.3f} ms",
        )
        for v in report.variants
        if v.int8
        for r in v.int8.returned
    ]
    if rows:
        header = ("variant", "node", "op", "for", "own noise/signal", "float costs")
        found.append(("Left in float", header, rows))
    rows = [
        (v.name, label, percent(top1), percent(top5), str(v.accuracy.samples), percent(v.accuracy.agreement))
        for v in report.variants
        if v.accuracy
        for label, top1, top5 in (
            ("artifact", v.accuracy.top1, v.accuracy.top5),
            ("exported model", v.accuracy.reference_top1, v.accuracy.reference_top5),
        )
    ]
    if rows:
        data = next(v.accuracy.data for v in report.variants if v.accuracy)
        found.append((f"Accuracy on {data}", ("variant", "of", "top-1", "top-5", "samples", "same class"), rows))
    rows = [
        (
            p.name,
            "changed" if p.changed else "-",
            str(p.fired) if p.fired else "-",
            f"{p.nodes_before} → {p.nodes_after}" if p.nodes_before != p.nodes_after else str(p.nodes_after),
            f"{p.seconds * 1e3:.0f} ms",
            "-" if not p.declined else str(len(p.declined)),
        )
        for p in report.passes
    ]
    found.append(("Passes", ("pass", "graph", "fired", "nodes", "time", "declined"), rows))
    rows = [(p.name, d.node, d.reason) for p in report.passes for d in p.declined[:_DECLINED_SHOWN]]
    if rows:
        found.append(("Declined (the first of each pass; report.json has all)", ("pass", "node", "why"), rows))
    for variant in report.variants:
        if variant.benchmark is not None:
            found.append(bench_section(variant.benchmark, title=f"Benchmark of {variant.name}"))
    rows = [(s.name, "from cache" if s.cached else "ran", f"{s.seconds:.2f} s") for s in report.stages]
    found.append(("Stages", ("stage", "how", "time"), rows))
    return found


def prune_sections(report: PruneReport) -> list[Rows]:
    """What was cut, what that saves, and what it costs."""
    rows: list[tuple[str, ...]] = [
        ("parameters", f"{report.parameters[0]:,}", f"{report.parameters[1]:,}", _share(report.parameters)),
        ("multiply-accumulates", f"{report.macs[0]:,}", f"{report.macs[1]:,}", _share(report.macs)),
    ]
    if report.latency_ratio is not None:
        rows.append(("latency, turn by turn", "1", f"{report.latency_ratio:.3f}", percent(report.latency_ratio)))
    found: list[Rows] = [(f"Pruned: {report.method}, {report.asked}", ("", "before", "after", "left"), rows)]
    if report.changed:
        losses = [("the cut alone", _loss(report.metric, report.drop_cut))]
        if report.recovery:
            losses.append((f"after {' and '.join(report.recovery)}", _loss(report.metric, report.drop)))
        found.append((f"Lost on {report.data} ({report.samples})", ("", "loss"), losses))
    rows = [
        (g.name, g.kind, str(g.layers), str(g.before), str(g.after), "-" if g.alone is None else f"{g.alone:.1e}")
        for g in report.groups
    ]
    if rows:
        header = ("first layer", "what", "layers", "before", "after", "half of it alone loses")
        found.append(("Channels, by what goes together", header, rows))
    return found


def prune_notes(report: PruneReport) -> list[str]:
    """What the tables of pruning do not tell."""
    lines = [f"the residual block that ends in {name} went as a whole" for name in report.blocks]
    lines += [f"left whole: {each.node}: {each.reason}" for each in report.whole]
    lines += report.remarks
    if report.proof is not None:
        lines.append(
            f"the cut graph is the whole one with the weights masked that read what went: NMSE {report.proof:.1e}"
        )
    return lines


def _share(pair: tuple[int, int]) -> str:
    return percent(pair[1] / pair[0]) if pair[0] else "-"


def bench_section(report: BenchReport, *, title: str) -> Rows:
    """One row a batch size and thread count."""
    percentiles = sorted({p for row in report.rows for p in row.percentiles_ms})
    header = (
        "batch", "threads", *(f"p{p} ms" for p in percentiles), "mean ms", "min ms", "max ms", "CoV", "samples/s",
        "runs", "load ms", "first ms", "peak MB", "valid",
    )  # fmt: skip
    rows = [
        (
            str(r.batch),
            "auto" if r.threads == 0 else str(r.threads),
            *(milliseconds(r.percentiles_ms[p]) for p in percentiles),
            milliseconds(r.mean_ms),
            milliseconds(r.min_ms),
            milliseconds(r.max_ms),
            f"{r.cov:.2f}",
            f"{r.throughput:.1f}",
            str(len(r.samples_ms)),
            milliseconds(r.load_ms),
            milliseconds(r.first_ms),
            f"{r.peak_memory_mb:.0f}",
            "yes" if r.valid else "no",
        )
        for r in report.rows
    ]
    return title, header, rows


def notes(report: BuildReport) -> list[str]:
    """What no table says: remarks of passes and runtimes, why a row may not be quoted, where it was measured."""
    lines = [] if report.prune is None else prune_notes(report.prune)
    lines += [f"{p.name}: {remark}" for p in report.passes for remark in p.remarks]
    if report.calibration is not None:
        lines.append(f"calibration: {report.calibration.described()}")
    for variant in report.variants:
        bench = variant.benchmark
        if variant.remark:
            lines.append(f"{variant.name}: {variant.remark}")
        if variant.not_run:
            lines.append(
                f"{variant.name} was not run here ({variant.not_run}): its graph was, on the reference runtime"
            )
        if bench is None:
            continue
        lines += [f"{variant.name}, batch {r.batch}: not valid, {r.reason}" for r in bench.rows if not r.valid]
        lines += [f"{variant.name}: {text}" for key, text in bench.info.items() if key == "remarks" and text]
        runtime = bench.info.get("runtime", "")
        lines.append(
            f"{variant.name} was measured {bench.measured_at} on {bench.cpu}, {bench.cores} cores"
            + (f", with {runtime}" if runtime else "")
        )
    return lines


def show(report: BuildReport, console: Console) -> None:
    """Prints the report; warnings first."""
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", style="bold yellow"))
    weights = described_weights(report)
    console.print(
        Text(f"{report.name}: {report.model}, weights: {weights}, opset {report.opset}, ")
        + Text(f"exported {megabytes(report.exported_size)}")
    )
    parts: list[Table | Text] = []
    for section in sections(report):
        parts += [Text(""), table(section, console.width)]
    parts += [Text("")] + [Text(line, style="dim") for line in notes(report)]
    console.print(Group(*parts))


def comparison_table(found: Sequence[Comparison], a: str, b: str) -> Table:
    """The A/B table of ``toolchain bench --vs``."""
    rows = [
        (
            str(c.batch), "auto" if c.threads == 0 else str(c.threads), milliseconds(c.a_ms), milliseconds(c.b_ms),
            f"{c.ratio:.3f}", f"{c.ratio_low:.3f} to {c.ratio_high:.3f}", str(c.blocks),
        )
        for c in found
    ]  # fmt: skip
    header = ("batch", "threads", "A ms", "B ms", "A/B", "80 % of blocks", "blocks")
    return table((f"A = {a}, B = {b}, turn by turn", header, rows))


_STYLE = """
:root { color-scheme: light dark; --line: #d0d5dd; --dim: #667085; --warn: #b54708; --warn-bg: #fffaeb; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a3f47; --dim: #98a2b3; --warn: #fdb022; --warn-bg: #2b2110; }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p.dim, ul.dim { color: var(--dim); margin: .25rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem 1.25rem .25rem 0; text-align: left; vertical-align: top; }
th, td { border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 500; white-space: nowrap; }
.number { text-align: right; white-space: nowrap; }
.warning { border-left: 4px solid var(--warn); background: var(--warn-bg); padding: .5rem 1rem; margin: .75rem 0; }
"""


def html(report: BuildReport) -> str:
    """The report as one self-contained page, light or dark as the reader's system is."""
    text = escape.escape
    weights = described_weights(report)
    body = [f"<h1>{text(report.name)}</h1>"]
    body.append(
        f'<p class="dim">{text(report.model)} · weights {text(weights)} · opset {report.opset} · '
        f"exported {megabytes(report.exported_size)}</p>"
    )
    body += [f'<div class="warning">{text(warning)}</div>' for warning in report.warnings]
    for section in sections(report):
        title, header, rows = section
        kinds = [' class="number"' if right else "" for right in numeric(section)]
        head = "".join(f"<th{kind}>{text(name)}</th>" for name, kind in zip(header, kinds, strict=True))
        lines = "".join(
            "<tr>" + "".join(f"<td{kind}>{text(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
            for row in rows
        )
        body.append(f"<h2>{text(title)}</h2><div class=scroll><table><tr>{head}</tr>{lines}</table></div>")
    body.append('<ul class="dim">' + "".join(f"<li>{text(line)}</li>" for line in notes(report)) + "</ul>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{text(report.name)}</title><style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"
    )
