"""The tables of ``quantization.py``, and where ours falls short of what is asked of it."""

from __future__ import annotations

from typing import Any

from _quantization_models import Case

#: What is asked of ours for every model: multiples of a run of the float model, and of its file.
TIME, MEMORY, SIZE, ENGINE = 2.0, 1.3, 0.3, 0.4
#: Ratios of latency that are nearer than this are the same.
SAME = 0.03
_QUALITY = {False: ("top1", "agreement"), True: ("spearman", "cosine", "least_cosine")}
_COST = ("seconds", "time_ratio", "total_seconds", "imports_mb", "peak_mb", "memory_ratio")


def show(case: Case, found: dict[str, Any]) -> None:
    """Prints the tables of one model."""
    quality = _QUALITY[case.transformer]
    sizes = list(found["rows"][0]["latency"])
    heads = [*quality, "calib s", "x", "total s", "imports MB", "MB", "x", *(f"b{s} /FP32" for s in sizes), "file MB"]
    print(f"\n{case.name}" + ("" if case.scored else " (random weights: its answers are not scored)"))
    print(f"  {'':30}" + "".join(f"{head:>13}" for head in heads))
    for row in found["rows"]:
        if "failed" in row:
            print(f"  {row['tool']:30}  failed: {row['failed']}")
            continue
        digits = 4 if case.transformer else 2
        cells = [_cell(row.get(name), digits) for name in quality]
        cells += [_cell(row.get(name)) for name in _COST]
        cells += [_latency(row["latency"].get(size), row["tool"] == "FP32") for size in sizes]
        print(f"  {row['tool']:30}" + "".join(f"{cell:>13}" for cell in [*cells, _cell(row["size_mb"])]))
    for row in found["memory"]:
        name = f"ours, {row['samples']} samples"
        if "failed" in row:
            print(f"  {name:30}  failed: {row['failed']}")
        else:
            print(
                f"  {name:30}  {row['seconds']:.2f} s, {row['time_ratio']:.2f} x; "
                f"{row['peak_mb']:.0f} MB, {row['memory_ratio']:.2f} x"
            )
    print(f"  {'TensorRT':30}  {_engines(found['tensorrt'])}")
    for line in shortfalls(case, found):
        print(f"  short of what is asked: {line}")


def _cell(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _latency(found: dict[str, Any] | None, absolute: bool) -> str:
    if found is None:
        return "failed"
    return (f"{found['ms']:.2f} ms" if absolute else f"{found['ratio']:.3f}") + (" ?" if found["disturbed"] else "")


def _engines(found: dict[str, Any]) -> str:
    if "failed" in found:
        return str(found["failed"])
    parts = [
        f"{found[f'{kind}_int8']} of {found[kind]} {kind} read two DQs" for kind in ("convs", "matmuls") if found[kind]
    ]
    parts.append(f"residual Adds next to a Conv {found['residuals_int8']}, in FP32 {found['residuals']}")
    for capability, (float32, int8) in found["engines"].items():
        parts.append(f"{capability} {int8 / 1e6:.1f} of {float32 / 1e6:.1f} MB, {int8 / float32:.2f}")
    return "; ".join(parts)


def shortfalls(case: Case, found: dict[str, Any]) -> list[str]:
    """Where a number of ours misses its bound, or a peer's is better; a line each."""
    rows = {row["tool"]: row for row in found["rows"] if "failed" not in row}
    short: list[str] = []

    def ask(what: str, value: float | None, bound: float, *, least: bool = False) -> None:
        if value is not None and (value < bound if least else value > bound):
            short.append(f"{what} {value:.4g}, wanted at {'least' if least else 'most'} {bound:.4g}")

    float32, bounds = rows["FP32"], case.bounds
    main = _QUALITY[case.transformer][0]
    for name in ("ours", "ours dynamic"):
        row = rows.get(name)
        if row is None:
            short.append(f"{name} made no file") if name == "ours" or case.transformer else None
            continue
        dynamic = name.endswith("dynamic")
        peers = [
            peer
            for tool, peer in rows.items()
            if tool != "FP32" and not tool.startswith("ours") and tool.endswith("dynamic") == dynamic
        ]
        ask(f"{name}: calibration x", row.get("time_ratio"), TIME)
        ask(f"{name}: memory x", row.get("memory_ratio"), MEMORY)
        ask(f"{name}: file x", row["size_mb"] / float32["size_mb"], SIZE)
        if main in row:
            if "drop" in bounds:
                ask(f"{name}: {main} lost", float32[main] - row[main], bounds["drop"])
            for measure in ("agreement", "cosine"):
                if measure in bounds:
                    ask(f"{name}: {measure}", row[measure], bounds[measure], least=True)
            best = max((peer[main] for peer in peers if main in peer), default=row[main])
            ask(f"{name}: {main} beside the best peer", row[main], best, least=True)
        for size, each in row["latency"].items():
            if "latency" in bounds:
                ask(f"{name}: latency of batch {size}", each["ratio"], bounds["latency"])
            fastest = min((peer["latency"][size]["ratio"] for peer in peers), default=each["ratio"])
            if each["ratio"] > fastest * (1 + SAME):
                ask(f"{name}: latency of batch {size} beside the fastest peer", each["ratio"], fastest)
    if found["no_latency"]:
        short.append(f"latency was not measured: {found['no_latency']}")
    ratios = [row["memory_ratio"] for row in found["memory"] if "failed" not in row]
    for row in found["memory"]:
        ask(f"{row['samples']} samples: calibration x", row.get("time_ratio"), TIME)
        ask(f"{row['samples']} samples: memory x", row.get("memory_ratio"), MEMORY)
    if len(ratios) > 1:
        ask("memory of many samples over that of few", ratios[-1] / ratios[0], 1 + SAME)
    trt = found["tensorrt"]
    if "failed" not in trt:
        ask("TensorRT: Convs that read two DQs", trt["convs_int8"], trt["convs"], least=True)
        ask("TensorRT: residual Adds next to a Conv", trt["residuals_int8"], trt["residuals"], least=True)
        for capability, (whole, int8) in trt["engines"].items():
            ask(f"TensorRT: engine x, {capability}", int8 / whole, ENGINE)
    return short
