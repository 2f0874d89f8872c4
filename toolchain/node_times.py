"""Where the time of a graph goes on ONNX Runtime, node by node, by its profiler."""

from __future__ import annotations

import collections
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from toolchain.evaluate import Feeds
from toolchain.onnx_file import temporary_onnx

#: Runs that are thrown away, fewest and most that count, and seconds after which fewer than the most will do.
_WARMUP, _FEWEST, _MOST, _SECONDS = 3, 8, 40, 0.6


@dataclasses.dataclass(frozen=True, slots=True)
class NodeTime:
    """A node of the graph as ONNX Runtime optimised it.

    Attributes:
        name, op_type: as it has them; what was fused has the name of one of its parts, or of a value.
        ms: the median run.
        output_bytes: of what it gives.
    """

    name: str
    op_type: str
    ms: float
    output_bytes: int


def node_times(models: Sequence[ir.Model], feeds: Feeds) -> list[list[NodeTime]]:
    """Runs the graphs turn by turn on the same inputs, and says how long each node of each took.

    Args:
        models: their nodes are told apart by name.
        feeds: inputs of all of them.
    """
    with tempfile.TemporaryDirectory(prefix="toolchain-") as folder:
        sessions = [_session(model, Path(folder) / str(number)) for number, model in enumerate(models)]
        started, runs = time.perf_counter(), 0
        while runs < _WARMUP + _FEWEST or (runs < _WARMUP + _MOST and time.perf_counter() - started < _SECONDS):
            for session in sessions:
                session.run(None, feeds)
            runs += 1
        return [_read(Path(session.end_profiling())) for session in sessions]


def _session(model: ir.Model, prefix: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    options.log_severity_level = 4
    with temporary_onnx(model) as path:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _read(file: Path) -> list[NodeTime]:
    spent: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    size: dict[tuple[str, str], int] = {}
    for event in json.loads(file.read_text(encoding="utf-8")):
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        key = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
        spent[key].append(event["dur"] / 1e3)
        size[key] = int(event["args"].get("output_size") or 0)
    return [
        NodeTime(name, op_type, statistics.median(times[_WARMUP:]), size[name, op_type])
        for (name, op_type), times in spent.items()
        if len(times) > _WARMUP
    ]
