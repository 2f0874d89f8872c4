"""Where the time goes: the latency of each layer, from ONNX Runtime's profiler.

The runtime optimises the graph before it runs it: it fuses nodes, adds conversions of layout, and renames. What it runs
is mapped back to the nodes of the given graph by the values that it makes and by the names of the nodes that it kept;
what it fused counts for the layer that leads, the first with a weight (Conv and what follows it), else the
first. Conversions that it put in count for no layer, as ``overhead_ms``.

The profiler costs some microseconds a node, so the sum is above the latency that ``toolchain bench`` measures: the
shares are what counts. Medians over runs, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from passes._linear import LINEAR
from passes.base import labels
from runtimes import RunFailed
from toolchain import child
from toolchain.model_cost import feeds_of
from toolchain.onnx_file import temporary_onnx

_SECONDS = 600
#: the names that nodes and values have while they are profiled: what the runtime makes of a node, it names after it
_MARK = re.compile(r"__layer_(\d+)_")
#: conversions of layout
_CONVERSIONS = ("ReorderInput", "ReorderOutput")


@dataclasses.dataclass(frozen=True, slots=True)
class LayerTime:
    """The time of a node, with what was fused into it.

    Attributes:
        node: of the given graph, as ``passes.base.labels`` names it.
        op_type: of that node.
        milliseconds: median over runs.
        ran_as: the ops of the runtime that did it, in order.
    """

    node: str
    op_type: str
    milliseconds: float
    ran_as: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class LayerTimes:
    """Latency by layer.

    Attributes:
        layers: those that took time, in the order of the graph.
        overhead_ms: conversions that the runtime put in.
        total_ms: median of a whole run, under the profiler.
        runs: how many were measured.
    """

    layers: tuple[LayerTime, ...]
    overhead_ms: float
    total_ms: float
    runs: int


def layer_latency(
    model: ir.Model,
    *,
    batch: int = 1,
    dims: Mapping[str, int] | None = None,
    runs: int = 30,
    threads: int = 0,
) -> LayerTimes:
    """Measures each layer on ONNX Runtime's CPU kernels.

    Args:
        batch, dims: sizes of the made-up inputs, see ``seeded_inputs``.
        runs: measured runs, after 3 that are not.
        threads: 0 is the runtime's choice.

    Raises:
        DataError: no input has such a dimension.
        RunFailed: the runtime cannot run the model on made-up inputs, or is not there.
    """
    marked = model.clone()
    nodes = list(marked.graph)
    for index, node in enumerate(nodes):
        node.name = f"__layer_{index}__"
        for number, value in enumerate(node.outputs):
            if value.name:
                value.name = f"__layer_{index}_{number}__"
    feeds = feeds_of(model, batch=batch, dims=dims)
    with tempfile.TemporaryDirectory(prefix="toolchain-") as folder, temporary_onnx(marked) as path:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, **feeds)  # type: ignore[arg-type]  # no input has the name of an option
        job = {"model": str(path), "inputs": str(inputs), "folder": folder, "runs": runs, "threads": threads}
        found = _profiled(job)
        optimised = onnx.load(Path(folder) / "optimised.onnx", load_external_data=False)
    return _by_layer(list(model.graph), nodes, optimised, found)


def _profiled(job: dict[str, Any]) -> dict[str, Any]:
    command = child.command("toolchain._profile")
    try:
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"profiling did not end within {_SECONDS} s", hint="give smaller sizes with --dim") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RunFailed(
            f"profiling failed: {lines[-1][:300] if lines else f'exit code {done.returncode}'}",
            hint="say what size its dimensions have with --dim, or run `toolchain doctor` for the runtime",
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _by_layer(
    given: list[ir.Node], marked: list[ir.Node], optimised: onnx.ModelProto, found: dict[str, Any]
) -> LayerTimes:
    main = {node.name: node for node in optimised.graph.node if node.name}
    unnamed = {node.op_type for node in optimised.graph.node if not node.name}
    anchors = {name: anchor for name, node in main.items() if (anchor := _anchor(node)) is not None}
    boundaries = {name for each in optimised.graph.node for name in (*each.input, *each.output)}
    leads = _leads(marked, set(anchors.values()), boundaries)
    times: dict[int, float] = {}
    ops: dict[int, list[str]] = {}
    overhead = 0.0
    for name, op_type, milliseconds in found["nodes"]:
        if name in anchors:
            lead = leads.get(anchors[name], anchors[name])
            times[lead] = times.get(lead, 0.0) + milliseconds
            ops.setdefault(lead, []).append(op_type)
        elif name in main or op_type in unnamed:  # else in a subgraph, whose time is that of the node that holds it
            overhead += milliseconds
    named = labels(given)
    layers = tuple(
        LayerTime(named[given[index]], given[index].op_type, times[index], tuple(ops[index])) for index in sorted(times)
    )
    return LayerTimes(layers, overhead, found["total_ms"], found["runs"])


def _anchor(node: onnx.NodeProto) -> int | None:
    """The given node that this one stands for: the one whose output it makes, else the one that it is named after."""
    if node.op_type in _CONVERSIONS:
        return None
    marks = (_MARK.search(name) for name in (*node.output, node.name))
    return next((int(mark[1]) for mark in marks if mark), None)


def _leads(nodes: list[ir.Node], anchors: set[int], boundaries: set[str]) -> dict[int, int]:
    """For each node that is run, the layer that leads what was fused into it: of the nodes before it that nothing else
    stands for and whose values are not there any more, the first with a weight, else the first; itself where it has a
    weight."""
    position = {node: index for index, node in enumerate(nodes)}
    found = {}
    for anchor in anchors:
        if nodes[anchor].op_type in LINEAR:
            continue
        reached: set[int] = set()
        waiting = [anchor]
        while waiting:
            for value in nodes[waiting.pop()].inputs:
                producer = value.producer() if value is not None and value.name not in boundaries else None
                index = None if producer is None else position.get(producer)
                if producer is None or index is None or index in anchors or index in reached:
                    continue
                if producer.op_type != "Constant":
                    reached.add(index)
                    waiting.append(index)
        if reached:
            linear = [index for index in sorted(reached) if nodes[index].op_type in LINEAR]
            found[anchor] = linear[0] if linear else min(reached)
    return found
