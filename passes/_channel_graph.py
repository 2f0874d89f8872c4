"""What the analysis of channels knows of a graph: the atoms along every axis, and what a cut has to rewrite.

Nodes are looked at in topological order, each by the rule of its op (``_channel_rules.py``). A constant brings a fresh
atom for each index of each of its axes; inputs of the graph bring none, their axes are never cut. A rule says which
atoms the axes of the outputs carry and joins what has to go together. It keeps one promise: whatever atoms are
removed, the indices that stay are computed from indices that stay by the same arithmetic, once what the rule asked to
be rewritten is rewritten. Only a contraction with a constant, such as the input channels of a convolution, looks
across atoms: there the removed terms are missing from a sum, and that is the whole of the error that a cut makes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes import _graph
from passes._channel_atoms import Atoms, Labels
from passes._graph import Names, Scope, attribute_ints, constant, default_opset, is_op, new_constant, set_inputs
from passes._shapes import inferred
from passes.base import label

Role = Literal["out", "in", "bias", "scale", "other"]
Dim = int | str | None
#: of a merged axis: its size and its atoms
Part = tuple[Dim, Labels]
Keep = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.bool_]]


class Editor:
    """Carries out what a cut rewrites in nodes.

    Attributes:
        keep: for the atoms of an axis which of its indices stay.
    """

    def __init__(self, model: ir.Model, keep: Keep) -> None:
        self.keep = keep
        self._scope = Scope(model.graph, default_opset(model.opset_imports), False)
        self._names = Names(model)

    def size(self, labels: npt.NDArray[np.int64]) -> int:
        """How many indices stay."""
        return int(self.keep(labels).sum())

    def set_ints(self, node: ir.Node, index: int, data: Sequence[int], what: str) -> None:
        """Gives the node an int64 vector as its input ``index``."""
        name = self._names.fresh(f"{node.outputs[0].name}_{what}")
        value = new_constant(self._scope, np.array(data, dtype=np.int64), name, before=node)
        inputs = [*node.inputs, *[None] * (index + 1 - len(node.inputs))]
        inputs[index] = value
        set_inputs(node, inputs)

    def adjust(
        self, value: ir.Value, op_type: str, by: Sequence[int], *, readers: Sequence[tuple[ir.Node, int]]
    ) -> None:
        """Lets the readers have ``value`` plus (Add) or times (Mul) an int64 vector in place of ``value``."""
        first = readers[0][0]
        amount = new_constant(
            self._scope, np.array(by, dtype=np.int64), self._names.fresh(f"{value.name}_by"), before=first
        )
        node = ir.Node("", op_type, [value, amount], name=self._names.fresh(f"{value.name}_adjust"))
        node.outputs[0].name = self._names.fresh(f"{value.name}_adjusted")
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        producer = value.producer()
        if producer is not None:
            self._scope.graph.insert_after(producer, node)
        else:
            self._scope.graph.insert_before(first, node)
        for reader, index in readers:
            reader.replace_input_with(index, node.outputs[0])


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Layer:
    """A node with a constant weight, and the axis of that weight along which its outputs lie."""

    node: ir.Node
    weight: ir.Value
    axis: int


class ChannelGraph:
    """Atoms along the axes of every value of a model's main graph.

    Attributes:
        atoms: the classes.
        axes: for each value with known rank the atoms along each axis.
        roles: what a constant's axis is to the nodes that read it.
        layers: nodes with a constant weight, in the order of the graph.
        rewrites: to be called with an Editor when the graph is cut.
        shapes: the same for Shape nodes, to be called after all others.
        preferred: for a Reshape that splits an axis the how manieth of the new axes carries the atoms.
        largest_first: whether these are counted from the largest, not from the outermost.
        carriers: for a Reshape that splits an axis the new axes to choose from and the atoms; filled in by its rule.
        whole: why an axis of a constant carries no atoms, where it has more than one index.
        merged: of a value by axis, for an axis whose size is not a number and that was merged from others: these.
        heads: atoms along which a product of two computed matrices is batched.
    """

    def __init__(
        self, model: ir.Model, preferred: Mapping[ir.Node, int] | None = None, *, largest_first: bool = False
    ) -> None:
        self.model = model
        self.opset = default_opset(model.opset_imports)
        self.atoms = Atoms()
        self.axes: dict[ir.Value, list[Labels]] = {}
        self.roles: dict[tuple[ir.Value, int], list[tuple[Role, ir.Node]]] = {}
        self.layers: list[Layer] = []
        self.rewrites: list[Callable[[Editor], None]] = []
        self.shapes: list[Callable[[Editor], None]] = []
        self.preferred = preferred or {}
        self.largest_first = largest_first
        self.carriers: dict[ir.Node, tuple[list[int], npt.NDArray[np.int64]]] = {}
        self.merged: dict[ir.Value, dict[int, tuple[Part, ...]]] = {}
        self.heads: list[npt.NDArray[np.int64]] = []
        self.whole: dict[tuple[ir.Value, int], str] = {}
        self._unset: set[tuple[ir.Value, int]] = set()
        self._sizes = _shapes(model)

    # --- sizes

    def dims(self, value: ir.Value | None) -> tuple[Dim, ...] | None:
        """The shape as far as known, inference included."""
        own = _graph.dims(value)
        found = None if value is None else self._sizes.get(value.name or "")
        if own is None and found is None and value in self.axes:
            return tuple(None if labels is None else len(labels) for labels in self.axes[value])
        if own is None or found is None or len(own) != len(found):
            return own if own is not None else found
        return tuple(
            b if not isinstance(a, int) and (isinstance(b, int) or a is None) else a
            for a, b in zip(own, found, strict=True)
        )

    # --- atoms

    def of(self, value: ir.Value | None) -> list[Labels] | None:
        """The atoms along each axis; None where the rank is unknown."""
        if value is None:
            return None
        self._start(value)
        if value not in self.axes:
            return None
        for axis in range(len(self.axes[value])):
            if (value, axis) in self._unset:
                self._unset.discard((value, axis))
                self.axes[value][axis] = self.atoms.fresh(self._length(value, axis))
        return self.axes[value]

    def rank(self, value: ir.Value | None) -> int | None:
        """Number of axes, without giving atoms to a constant."""
        known = self.dims(value)
        return None if known is None else len(known)

    def tie(self, labels: Labels, value: ir.Value, axis: int, reason: str) -> Labels:
        """Joins atoms with those of a value's axis; a constant that has none yet takes these over."""
        self._start(value)
        if value not in self.axes:
            self.atoms.freeze(labels, reason)
            return None
        if (value, axis) in self._unset:
            self._unset.discard((value, axis))
            if labels is not None and len(labels) != self._length(value, axis):
                self.atoms.freeze(labels, reason)
                labels = None
            if labels is None:
                self.whole[value, axis] = reason
            self.axes[value][axis] = labels
            return labels
        return self.join(labels, self.axes[value][axis], reason)

    def join(self, left: Labels, right: Labels, reason: str) -> Labels:
        """One class of each pair of atoms; an axis that is never cut keeps the other whole."""
        if left is None or right is None or len(left) != len(right):
            self.atoms.freeze(left, reason, by_another=right is None)
            self.atoms.freeze(right, reason, by_another=left is None)
            return None
        self.atoms.join(left, right)
        return left

    def keep_whole(self, value: ir.Value | None, reason: str) -> None:
        """No axis of the value is cut."""
        if value is None:
            return
        self._start(value)
        for axis in range(len(self.axes.get(value, ()))):
            if (value, axis) in self._unset:
                self._unset.discard((value, axis))
                self.axes[value][axis] = None
                self.whole[value, axis] = reason
            self.atoms.freeze(self.axes[value][axis], reason)
        for parts in self.merged.get(value, {}).values():
            for _, labels in parts:
                self.atoms.freeze(labels, reason)

    def set(self, value: ir.Value, axes: Sequence[Labels]) -> None:
        """Says which atoms the axes of a node's output carry."""
        known = self.dims(value)
        result = list(axes)
        for axis, labels in enumerate(result):
            if labels is None:
                continue
            size = known[axis] if known is not None and len(known) == len(result) else None
            if len(labels) == 1:
                self.atoms.freeze(labels, f"{value.name!r} has this channel alone")
            elif isinstance(size, int) and size != len(labels):
                self.atoms.freeze(labels, f"the shape of {value.name!r} says {size}, its inputs {len(labels)}")
            else:
                continue
            result[axis] = None
        self.axes[value] = result

    def opaque(self, node: ir.Node, reason: str) -> None:
        """Nothing that the node reads is cut, nor what it gives."""
        for value in (*node.inputs, *_captured(node)):
            self.keep_whole(value, reason)
        for value in node.outputs:
            known = self.dims(value)
            if known is not None:
                self.axes[value] = [None] * len(known)

    # --- what a layer is

    def role(self, value: ir.Value, axis: int, role: Role, node: ir.Node) -> None:
        """Notes what an axis of a constant (looking through Transpose and Cast) is to a node."""
        found = self.origin(value, axis)
        if found is None:
            return
        self.roles.setdefault(found, []).append((role, node))
        if role == "out":
            self.layers.append(Layer(node, *found))

    def contract(self, node: ir.Node, x: ir.Value, x_axis: int, w: ir.Value, w_axis: int) -> None:
        """The node sums over these axes of both; a cut leaves terms out, which is only fine by a constant's numbers."""
        reason = f"{label(node)} sums over it and reads no constant weight there"
        if self.origin(w, w_axis) is not None:
            self.role(w, w_axis, "in", node)
        elif self.origin(x, x_axis) is not None:
            self.role(x, x_axis, "in", node)
        else:
            for value, axis in ((x, x_axis), (w, w_axis)):
                axes = self.of(value)
                if axes is not None:
                    self.atoms.freeze(axes[axis], reason)
            return
        axes = self.of(x)
        self.tie(None if axes is None else axes[x_axis], w, w_axis, f"{label(node)} reads all of it")

    def origin(self, value: ir.Value, axis: int) -> tuple[ir.Value, int] | None:
        """The constant and its axis that this axis of a value is, looking through Transpose, Cast and Identity."""
        while constant(value) is None:
            node = value.producer()
            if node is None or not is_op(node, "Transpose", "Cast", "Identity") or node.inputs[0] is None:
                return None
            if node.op_type == "Transpose":
                rank = self.rank(value)
                if rank is None:
                    return None
                axis = (attribute_ints(node, "perm") or tuple(reversed(range(rank))))[axis]
            value = node.inputs[0]
        return value, axis

    def _start(self, value: ir.Value) -> None:
        """Makes a value known that no rule has: a constant, which gets its atoms when asked for, or an input."""
        if value in self.axes:
            return
        tensor = constant(value)
        if tensor is None:
            known = self.dims(value)
            if known is not None:
                self.axes[value] = [None] * len(known)
            return
        self.axes[value] = [None] * len(tensor.shape)
        self._unset.update((value, axis) for axis, size in enumerate(tensor.shape.numpy()) if size > 1)

    def _length(self, value: ir.Value, axis: int) -> int:
        tensor = constant(value)
        assert tensor is not None
        return int(tensor.shape.numpy()[axis])


def _captured(node: ir.Node) -> list[ir.Value]:
    """What the subgraphs of a node read; their own values are not known here and do no harm."""
    found: list[ir.Value] = []
    for attribute in node.attributes.values():
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        bodies = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()
        for body in bodies:
            found.extend(body.outputs)
            for inner in ir.traversal.RecursiveGraphIterator(body):
                found.extend(value for value in inner.inputs if value is not None)
    return found


def _shapes(model: ir.Model) -> dict[str, tuple[Dim, ...]]:
    """Shapes of the main graph's values by onnx's inference; the model is as it was."""
    return {
        info.name: tuple(
            d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else d.dim_param or None
            for d in info.type.tensor_type.shape.dim
        )
        for info in inferred(model).graph.value_info
        if info.type.tensor_type.HasField("shape")
    }
