"""Finds what can be cut in a graph: groups of channels, each channel with all the indices that go with it.

``find_groups`` lays atoms along every axis (``_channel_graph.py``) and collects the classes that may go. Classes that
lie on the same axes of the same tensors are one group: they are alternatives, any of them may go as long as one stays.
A residual stream is one group over all blocks that add to it; the channels that a block keeps to itself are another.
A whole attention head is one channel of its group, 3 x 64 columns and 64 rows of weights wide.

Depends on: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning" (arXiv 2301.12900), for the idea of a group;
the index-level classes are ours, since they make Concat, Split, Reshape and grouped convolutions nothing special.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes._channel_graph import ChannelGraph, Role
from passes._channel_rules import visit
from passes._graph import constant
from passes.base import Declined, label

#: how many other axes of a split are tried where one turned out to be kept
_TRIES = 3


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Member:
    """The indices of one axis of one tensor that belong to a group.

    Attributes:
        value: the tensor's name, a weight or an activation.
        axis: of the tensor.
        roles: what a weight's axis is to its layers: ``out`` its outputs, ``in`` its inputs, ``bias``, ``scale`` of
            a normalisation, ``other``; empty for an activation.
        positions: int64 [count, width], for each channel of the group its indices along the axis.
    """

    value: str
    axis: int
    roles: tuple[Role, ...]
    positions: npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Group:
    """Channels of which any may be cut, each with everything that goes with it.

    Attributes:
        name: of the first layer that makes them, with ``#2``, ``#3`` where a layer makes several groups.
        kind: ``heads`` for whole attention heads, else ``channels``.
        count: how many there are.
        width: how many outputs of the first layer one of them is: 1, or the size of a head or group.
        layers: labels of the layers that make them, in the order of the graph.
        readers: labels of the layers that sum over them.
        members: the axes of all tensors that they lie on, weights first.
    """

    name: str
    kind: str
    count: int
    width: int
    layers: tuple[str, ...]
    readers: tuple[str, ...]
    members: tuple[Member, ...]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Analysis:
    """The groups of a graph, where its layers are kept whole, and the atoms that both come from.

    Attributes:
        graph: atoms along all axes.
        groups: by the order of their first layers.
        declined: layers none of whose outputs can be cut, with the reason.
        roots: for each group name the atoms of its channels, int64 [count].
    """

    graph: ChannelGraph
    groups: tuple[Group, ...]
    declined: tuple[Declined, ...]
    roots: dict[str, npt.NDArray[np.int64]]


def find_groups(model: ir.Model) -> tuple[Group, ...]:
    """What can be cut in the main graph of a model, which stays as it is.

    Raises:
        passes.base.PassFailed: the graph contradicts itself.
    """
    return analyze(model).groups


def analyze(model: ir.Model) -> Analysis:
    """``find_groups``, with the reasons for what cannot be cut. Raises PassFailed.

    Where an axis is split, whole heads go if the outer of the new axes carries the channels, as attention wants it; if
    the largest does, there is more to choose from, as where channels are shuffled. What leaves less whole is taken.
    """
    graph = _lay(model, largest_first=False)
    frozen = graph.atoms.reasons()
    if graph.carriers:
        other = _lay(model, largest_first=True)
        others = other.atoms.reasons()
        if _reach(other, others) > _reach(graph, frozen):
            graph, frozen = other, others
    return _collect(graph, frozen)


def _lay(model: ir.Model, *, largest_first: bool) -> ChannelGraph:
    """Lays atoms along all axes; where an axis of a split turns out to be kept, the next is tried."""
    preferred: dict[ir.Node, int] = {}
    while True:
        graph = ChannelGraph(model, preferred, largest_first=largest_first)
        for node in model.graph:
            visit(graph, node)
        for value in model.graph.outputs:
            graph.keep_whole(value, f"it is in the output {value.name!r}")
        frozen = graph.atoms.reasons()
        kept = [
            node
            for node, (order, atoms) in graph.carriers.items()
            if preferred.get(node, 0) + 1 < len(order) and (frozen[graph.atoms.roots(atoms)] >= 0).all()
        ]
        if not kept or max(preferred.values(), default=0) >= _TRIES:
            return graph
        # Queries are kept where keys are: then it is the keys that have to be split in another way.
        themselves = graph.atoms.kept_themselves()
        at_fault = [node for node in kept if themselves[graph.atoms.roots(graph.carriers[node][1])].any()]
        preferred.update({node: preferred.get(node, 0) + 1 for node in at_fault or kept})


def _reach(graph: ChannelGraph, frozen: npt.NDArray[np.int64]) -> tuple[float, int]:
    """How many weights lie on channels that can be cut, and how many classes those are."""
    weights, classes = 0.0, set()
    for layer in graph.layers:
        labels = graph.axes[layer.weight][layer.axis]
        tensor = constant(layer.weight)
        if labels is not None and tensor is not None:
            roots = graph.atoms.roots(labels)
            free = roots[frozen[roots] < 0]
            weights += tensor.size * len(free) / len(labels)
            classes.update(free.tolist())
    return weights, len(classes)


def _collect(graph: ChannelGraph, frozen: npt.NDArray[np.int64]) -> Analysis:
    atoms = graph.atoms
    # A class's signature is the sum of random numbers of the axes that it lies on, once for each index there.
    random = np.random.default_rng(0)
    signature = np.zeros(atoms.count + 1, dtype=np.uint64)
    arrays: dict[int, npt.NDArray[np.int64]] = {}
    for _, _, labels in _axes(graph):
        if id(labels) not in arrays:
            arrays[id(labels)] = atoms.roots(labels)
            np.add.at(signature, arrays[id(labels)], random.integers(1 << 63, dtype=np.uint64))
    where: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
    group_of = np.full(atoms.count + 1, -1, dtype=np.int64)
    place = np.zeros(atoms.count + 1, dtype=np.int64)
    made: list[npt.NDArray[np.int64]] = []
    sources: list[str] = []
    for layer in graph.layers:
        made_here = graph.axes[layer.weight][layer.axis]
        if made_here is None:
            continue
        roots = arrays[id(made_here)]
        new = roots[(frozen[roots] < 0) & (group_of[roots] < 0)]
        ordered = new[np.sort(np.unique(new, return_index=True)[1])]
        keys = signature[ordered]
        for key in keys[np.sort(np.unique(keys, return_index=True)[1])]:
            chosen = ordered[keys == key]
            group_of[chosen], place[chosen] = len(made), np.arange(len(chosen))
            made.append(chosen)
            sources.append(label(layer.node))
    for key, roots in arrays.items():
        where[key] = _positions(roots, group_of, place)
    groups = _groups(graph, made, sources, arrays, where)
    return Analysis(
        graph, groups, _declined(graph, arrays, frozen), {g.name: a for g, a in zip(groups, made, strict=True)}
    )


def _axes(graph: ChannelGraph) -> Iterator[tuple[ir.Value, int, npt.NDArray[np.int64]]]:
    for value, axes in graph.axes.items():
        for axis, labels in enumerate(axes):
            if labels is not None:
                yield value, axis, labels


def _positions(
    roots: npt.NDArray[np.int64], group_of: npt.NDArray[np.int64], place: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The indices of an axis that belong to a group, sorted by group and channel, and their groups."""
    at = np.flatnonzero(group_of[roots] >= 0)
    of = roots[at]
    order = np.lexsort((place[of], group_of[of]))
    return at[order], group_of[of][order]


def _groups(
    graph: ChannelGraph,
    made: list[npt.NDArray[np.int64]],
    sources: list[str],
    arrays: dict[int, npt.NDArray[np.int64]],
    where: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
) -> tuple[Group, ...]:
    members: list[list[Member]] = [[] for _ in made]
    layers: list[dict[str, None]] = [{} for _ in made]
    readers: list[dict[str, None]] = [{} for _ in made]
    for value, axis, labels in _axes(graph):
        at, of = where[id(labels)]
        is_weight = constant(value) is not None
        roles = graph.roles.get((value, axis), []) if is_weight else []
        if not len(at):
            continue
        starts = np.flatnonzero(np.diff(of, prepend=-1))
        for start, positions in zip(starts, np.split(at, starts[1:]), strict=True):
            index = int(of[start])
            names = tuple(dict.fromkeys(role for role, _ in roles)) if roles or not is_weight else ("other",)
            table = positions.reshape(len(made[index]), -1)
            members[index].append(Member(str(value.name), axis, names, table))
            for role, node in roles:
                if role == "out":
                    layers[index][label(node)] = None
                elif role == "in":
                    readers[index][label(node)] = None
    batched = set()
    for labels in graph.heads:
        batched.update(graph.atoms.roots(labels).tolist())
    order = {label(node): i for i, node in enumerate(graph.model.graph)}
    counts: dict[str, int] = {}
    result = []
    for index, atoms in enumerate(made):
        source = sources[index]
        counts[source] = counts.get(source, 0) + 1
        name = source if counts[source] == 1 else f"{source}#{counts[source]}"
        own = sorted(members[index], key=lambda m: not m.roles)
        wide = next(m.positions.shape[1] for m in own if "out" in m.roles)
        kind = "heads" if not batched.isdisjoint(atoms.tolist()) else "channels"
        made_by, read_by = (tuple(sorted(names, key=order.__getitem__)) for names in (layers[index], readers[index]))
        result.append(Group(name, kind, len(atoms), wide, made_by, read_by, tuple(own)))
    return tuple(result)


def _declined(
    graph: ChannelGraph, arrays: dict[int, npt.NDArray[np.int64]], frozen: npt.NDArray[np.int64]
) -> tuple[Declined, ...]:
    found: dict[str, Declined] = {}
    for layer in graph.layers:
        labels = graph.axes[layer.weight][layer.axis]
        if labels is None:
            reason = graph.whole.get((layer.weight, layer.axis), "there is one alone")
        else:
            why = frozen[arrays[id(labels)]]
            if (why < 0).any():
                continue
            reason = graph.atoms.reason(int(why.min()))
        name = label(layer.node)
        found.setdefault(name, Declined(name, f"its outputs stay whole: {reason}"))
    for node in graph.model.graph:
        inside = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
        if inside:
            found.setdefault(label(node), Declined(label(node), f"what is inside a {node.op_type} stays whole"))
    return tuple(found.values())
