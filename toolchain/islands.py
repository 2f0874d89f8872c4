"""Which nodes an INT8 graph computes slower than the float graph, borders between the two kinds counted.

ONNX Runtime's profiler says how long each node takes in either graph, and how long a QuantizeLinear or
DequantizeLinear takes for each element. To choose for every node between integers and float, so that the nodes' times
and those of the borders have the least sum, is a minimum cut: the source's side computes in integers, the sink's in
float, and an edge between two nodes is what a border there costs (Stone 1977, "Multiprocessor Scheduling with the Aid
of Network Flow Algorithms"). What is in integers and comes out on the side of float is slower for being there.

A prediction: the runtime fuses, and lays out memory, by what is next to what. So the result has to be measured as a
whole, and looked at again once it was carried out.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Collection, Sequence

import onnx_ir as ir

from passes._graph import is_op, only_use
from passes.base import label
from runtimes import Target
from toolchain.evaluate import Feeds
from toolchain.minimum_cut import minimum_cut
from toolchain.node_times import NodeTime, node_times

#: Gains below this share of the whole are noise.
_LEAST_GAIN = 0.02
#: Milliseconds for an element of a border where no border was seen.
_BORDER_MS = 5e-7
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_INTEGERS = (ir.DataType.UINT8, ir.DataType.INT8)
_TAG = re.compile(r"<(\d+)>")
#: The ends of the cut, and the graph's inputs.
_SOURCE, _SINK, _INPUTS = -1, -2, -3


def can_profile(target: Target) -> bool:
    """Whether the time of single nodes is known there."""
    return target.runtime == "ort-cpu"


def slower_in_int8(model: ir.Model, quantised: ir.Model, computing: Collection[str], feeds: Feeds) -> dict[str, float]:
    """The nodes that are in integers and would better be in float.

    Args:
        model: the float graph.
        quantised: made from it, in the dialect of ``ort-cpu``; nodes that it keeps have the same names.
        computing: the names of the nodes that may compute in integers, from ``quantizable``.
        feeds: inputs to run both on.

    Returns:
        Their names as ``exclude`` takes them, each with the milliseconds that it takes more in float (less than
        nothing where it takes less), in the graph's order; empty where there is not enough to gain.
    """
    nodes = list(model.graph)
    index = {label(node): number for number, node in enumerate(nodes)}
    integer = _in_integers(quantised, set(computing), index)
    profiles = node_times([_tagged(model, index), _tagged(quantised, index)], feeds)
    as_float, as_int8 = (_by_tag(profile) for profile in profiles)
    units = _units(nodes, set(as_float))
    float_ms, int8_ms = (_by_unit(times, units) for times in (as_float, as_int8))
    rate, least = _border(profiles[1])
    elements = {units[tag]: 0 for tag in range(len(nodes))}
    for entry in profiles[0]:
        if (tag := _tag(entry)) is not None:
            elements[units[tag]] = max(elements[units[tag]], entry.output_bytes // 4)
    elements[_INPUTS] = sum(array.size for array in feeds.values())

    movable = {units[index[name]] for name in integer}
    capacities: dict[tuple[object, object], float] = collections.defaultdict(float)
    for unit in set(units.values()):
        capacities[_SOURCE, unit] += float_ms.get(unit, 0.0)
        capacities[unit, _SINK] += int8_ms.get(unit, 0.0) if unit in movable else math.inf
    capacities[_INPUTS, _SINK] = math.inf
    for unit, readers in _readers(model, nodes, units).items():
        # One DequantizeLinear serves all who read floats of integers, and one QuantizeLinear the other way.
        border = least + rate * elements[unit]
        capacities[unit, ("dq", unit)] += border
        capacities[("q", unit), unit] += border
        for reader in readers:
            capacities[("dq", unit), reader] = math.inf
            capacities[reader, ("q", unit)] = math.inf
    stay = minimum_cut(capacities, _SOURCE, _SINK)
    now, then = (_cost(capacities, side) for side in ({*movable, *_gadgets(capacities, movable)}, stay))
    if now - then < _LEAST_GAIN * now:
        return {}
    costs = {name: as_float.get(index[name], 0.0) - as_int8.get(index[name], 0.0) for name in integer}
    # What only moves elements goes with its neighbours, unless it is what takes long.
    return {
        name: ms for name, ms in costs.items() if units[index[name]] not in stay and (name in computing or ms < -least)
    }


def _in_integers(quantised: ir.Model, computing: set[str], index: dict[str, int]) -> list[str]:
    """The nodes of the float graph that the quantised one computes on integers, in its order."""
    found = []
    for node in quantised.graph:
        name = label(node)
        if name not in index:
            continue
        values = [value for value in node.inputs if value is not None]
        moves = any(value.dtype in _INTEGERS for value in values)
        reads = any(is_op(v.producer(), "DequantizeLinear") and not _constant_integers(v) for v in values)
        if moves or (name in computing and reads):
            found.append(name)
    return found


def _constant_integers(value: ir.Value) -> bool:
    producer = value.producer()
    source = producer.inputs[0] if producer is not None else None
    return source is not None and source.is_initializer()


def _tagged(model: ir.Model, index: dict[str, int]) -> ir.Model:
    """A copy whose nodes and values have the numbers of their float nodes in their names: the runtime names what
    it makes after either."""
    copy = model.clone()
    outputs = {value.name for value in copy.graph.outputs}
    names = [label(node) for node in copy.graph]
    for number, (node, name) in enumerate(zip(copy.graph, names, strict=True)):
        tag = index.get(name)
        if tag is None and is_op(node, "Max") and len(node.inputs) == 1:
            tag = _only_reader(node, index)  # keeps the node after it in float, which pays for it
        mark = f"<{tag}>" if tag is not None else ""
        node.name = f"n{number}{mark}"
        for place, value in enumerate(node.outputs):
            if value.name and value.name not in outputs:
                value.name = f"v{number}.{place}{mark}"
    return copy


def _only_reader(node: ir.Node, index: dict[str, int]) -> int | None:
    reader = only_use(node.outputs[0])
    return None if reader is None else index.get(label(reader))


def _tag(entry: NodeTime) -> int | None:
    found = _TAG.search(entry.name)
    return None if found is None else int(found[1])


def _by_tag(profile: Sequence[NodeTime]) -> dict[int, float]:
    """Milliseconds of each tagged node."""
    found: dict[int, float] = collections.defaultdict(float)
    for entry in profile:
        if (tag := _tag(entry)) is not None and entry.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            found[tag] += entry.ms
    return found


def _units(nodes: Sequence[ir.Node], timed: set[int]) -> dict[int, int]:
    """For each node the first of those that the runtime computes with it in the float graph: what has no time of its
    own was fused, a layer into the activation after it, anything else into what it reads."""
    number = {node: i for i, node in enumerate(nodes)}
    parent = {i: i for i in range(len(nodes))}

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, node in enumerate(nodes):
        if i in timed:
            continue
        reader = only_use(node.outputs[0]) if is_op(node, *_LAYERS) else None
        source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        other = number.get(reader) if reader is not None else number.get(source) if source is not None else None
        if other is not None:
            a, b = sorted((root(i), root(other)))
            parent[b] = a
    return {i: root(i) for i in parent}


def _by_unit(times: dict[int, float], units: dict[int, int]) -> dict[int, float]:
    found: dict[int, float] = collections.defaultdict(float)
    for tag, ms in times.items():
        found[units[tag]] += ms
    return found


def _border(profile: Sequence[NodeTime]) -> tuple[float, float]:
    """Milliseconds of a QuantizeLinear or DequantizeLinear for each element, and at the least."""
    seen = [
        (entry.ms, entry.output_bytes // (4 if entry.op_type == "DequantizeLinear" else 1))
        for entry in profile
        if entry.op_type in ("QuantizeLinear", "DequantizeLinear") and entry.output_bytes
    ]
    if not seen:
        return _BORDER_MS, 0.0
    return sum(ms for ms, _ in seen) / sum(count for _, count in seen), min(ms for ms, _ in seen)


def _readers(model: ir.Model, nodes: Sequence[ir.Node], units: dict[int, int]) -> dict[int, set[int]]:
    """For each unit, and for the graph's inputs, the other units that read floats of it."""
    number = {node: i for i, node in enumerate(nodes)}
    found: dict[int, set[int]] = collections.defaultdict(set)
    made = [(units[i], value) for i, node in enumerate(nodes) for value in node.outputs]
    made += [(_INPUTS, value) for value in model.graph.inputs if not value.is_initializer()]
    for unit, value in made:
        if value.dtype != ir.DataType.FLOAT:
            continue
        for use in value.uses():
            if use.node in number and units[number[use.node]] != unit:
                found[unit].add(units[number[use.node]])
    return found


def _gadgets(capacities: dict[tuple[object, object], float], side: set[int]) -> set[object]:
    """The helper nodes of the borders that are on the source's side where the units of ``side`` are."""
    helpers = {end for edge in capacities for end in edge if isinstance(end, tuple)}
    found: set[object] = {_SOURCE}
    for helper in helpers:
        kind, unit = helper
        if kind == "dq":  # on the source's side if all who read it are
            readers = [b for (a, b) in capacities if a == helper]
            if unit in side and all(reader in side for reader in readers):
                found.add(helper)
        elif any(a in side for (a, b) in capacities if b == helper):
            found.add(helper)
    return found


def _cost(capacities: dict[tuple[object, object], float], side: set[object]) -> float:
    """The sum of the edges that leave a side."""
    return sum(capacity for (a, b), capacity in capacities.items() if a in side and b not in side)
