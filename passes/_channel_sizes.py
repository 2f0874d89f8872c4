"""How channels go through nodes that read or write sizes: Tile, Expand, Resize, Shape.

Sizes that are constants are rewritten. Sizes that are computed are those of the whole graph, Shape sees to that, so
that what is computed from them stays right; a node that wants the lesser size gets it by arithmetic of its own.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

from passes._channel_atoms import Labels
from passes._channel_graph import ChannelGraph, Editor
from passes._graph import array, attribute_int, attribute_ints, given, integers
from passes.base import label


def tile(graph: ChannelGraph, node: ir.Node) -> None:
    """Repeated as a whole along axes."""
    axes, repeats = graph.of(node.inputs[0]), integers(given(node, 1))
    if axes is None or repeats is None or len(repeats) != len(axes):
        return graph.opaque(node, f"{label(node)}: its repeats are computed")
    graph.keep_whole(given(node, 1), f"{label(node)} reads repeats there")
    tiled = [
        labels if labels is None or times == 1 else np.tile(labels, times) if times else None
        for labels, times in zip(axes, repeats, strict=True)
    ]
    for labels, times in zip(axes, repeats, strict=True):
        if times == 0:
            graph.atoms.freeze(labels, f"{label(node)} repeats it not once")
    graph.set(node.outputs[0], tiled)


def expand(graph: ChannelGraph, node: ir.Node) -> None:
    """Broadcast to a shape, which is lessened where the channels are."""
    x, shape = node.inputs[0], given(node, 1)
    axes, new = graph.of(x), graph.dims(node.outputs[0])
    old = graph.dims(x)
    if x is None or shape is None or axes is None or new is None or old is None:
        return graph.opaque(node, f"{label(node)}: its shapes are not known")
    length = graph.dims(shape)
    result: list[Labels] = [None] * len(new)
    for back in range(1, len(axes) + 1):
        labels = axes[-back]
        if labels is not None and new[-back] == len(labels):
            result[-back] = labels
        else:
            graph.atoms.freeze(labels, f"{label(node)} expands it to something that is not known")
    entries = integers(shape)
    count = length[0] if length else None
    if not isinstance(count, int):
        return graph.opaque(node, f"{label(node)}: its shape is not known")
    told = result[-count:] if count else []
    if entries is not None:
        graph.rewrites.append(functools.partial(_rewrite_sizes, node, 1, entries, told))
    elif any(labels is not None for labels in told):
        graph.rewrites.append(functools.partial(_rewrite_computed_expand, node, told))
    graph.keep_whole(shape, f"{label(node)} reads sizes there")
    graph.set(node.outputs[0], result)


def _rewrite_computed_expand(node: ir.Node, axes: list[Labels], editor: Editor) -> None:
    """Sizes of axes that are cut become 1, which leaves them as they come."""
    kept = [labels is None or editor.size(labels) == len(labels) for labels in axes]
    if all(kept):
        return
    for op_type, by in (("Mul", [int(whole) for whole in kept]), ("Add", [int(not whole) for whole in kept])):
        value = node.inputs[1]
        assert value is not None
        editor.adjust(value, op_type, by, readers=[(node, 1)])


def _rewrite_sizes(node: ir.Node, index: int, entries: tuple[int, ...], axes: list[Labels], editor: Editor) -> None:
    """Sizes of axes; an entry of 1 stands for whatever there is."""
    new = [
        entry if labels is None or entry == 1 else editor.size(labels)
        for entry, labels in zip(entries, [*[None] * (len(entries) - len(axes)), *axes], strict=True)
    ]
    if new != list(entries):
        editor.set_ints(node, index, new, "sizes")


def resize(graph: ChannelGraph, node: ir.Node) -> None:
    """Resize and Upsample: axes whose size stays the same go through; sizes that say so are rewritten."""
    x = node.inputs[0]
    axes, old, new = graph.of(x), graph.dims(x), graph.dims(node.outputs[0])
    if axes is None or old is None or new is None:
        return graph.opaque(node, f"{label(node)}: its shapes are not known")
    at = attribute_ints(node, "axes") or tuple(range(len(axes)))
    at = tuple(axis % len(axes) for axis in at)
    scaled = array(given(node, 1 if node.op_type == "Upsample" or graph.opset < 11 else 2))
    sizes = given(node, 3)
    whole = node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    result: list[Labels] = []
    lessened: list[Labels] = []
    for axis, labels in enumerate(axes):
        if labels is None or axis not in at:
            result.append(labels)
            continue
        by = None if scaled is None or scaled.size != len(at) else float(scaled[at.index(axis)])
        same = (sizes is not None and new[axis] == old[axis] == len(labels)) or by == 1.0
        if not same or whole:
            graph.atoms.freeze(labels, f"{label(node)} interpolates along it")
        result.append(labels if same and not whole else None)
    if sizes is not None:
        lessened = [result[axis] for axis in at]
        entries = integers(sizes)
        if entries is not None:
            graph.rewrites.append(functools.partial(_rewrite_sizes, node, 3, entries, lessened))
        elif any(labels is not None for labels in lessened):
            graph.rewrites.append(functools.partial(_rewrite_computed_sizes, node, 3, lessened))
    for value in node.inputs[1:]:
        graph.keep_whole(value, f"{label(node)} reads numbers for each axis there")
    graph.set(node.outputs[0], result)


def _rewrite_computed_sizes(node: ir.Node, index: int, axes: list[Labels], editor: Editor) -> None:
    delta = [0 if labels is None else editor.size(labels) - len(labels) for labels in axes]
    value = node.inputs[index]
    if any(delta) and value is not None:
        editor.adjust(value, "Add", delta, readers=[(node, index)])


def shape(graph: ChannelGraph, node: ir.Node) -> None:
    """Sizes as numbers. What is computed from them goes on with those of the whole graph (see ``restore_shape``)."""
    axes = graph.of(node.inputs[0])
    start = attribute_int(node, "start", 0)
    if axes is None or start is None:
        return graph.opaque(node, f"{label(node)}: the rank of its input is not known")
    end = attribute_int(node, "end", len(axes))
    seen = axes[slice(start, end)]
    if node.outputs[0].is_graph_output():
        for labels in seen:
            graph.atoms.freeze(labels, f"{label(node)} gives its size as an output of the graph")
    if any(labels is not None for labels in seen):
        graph.shapes.append(functools.partial(_restore_shape, node, seen))
    graph.set(node.outputs[0], [None])


def _restore_shape(node: ir.Node, seen: list[Labels], editor: Editor) -> None:
    """Adds what was cut to a Shape: whatever wants the lesser number got it as a constant of its own."""
    value = node.outputs[0]
    delta = [0 if labels is None else len(labels) - editor.size(labels) for labels in seen]
    readers = [(use.node, use.idx) for use in value.uses()]
    if any(delta) and readers:
        editor.adjust(value, "Add", delta, readers=readers)
