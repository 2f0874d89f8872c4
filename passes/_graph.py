"""What passes ask about a graph and do to it: constants, opsets, names, replacing a value.

Two facts about ONNX shape all of this. An initializer that is also a graph input is only a default, the
caller may override it, so it is not a constant. And a node in a subgraph of If, Loop or Scan may use any
value of the graphs around it, so the uses of a value are not all in one graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from passes.base import graphs, in_standard_domain

#: floats that passes compute with
FLOATS = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE})


@dataclasses.dataclass(frozen=True, slots=True)
class Scope:
    """One graph, with what its surroundings decide for it.

    Attributes:
        graph: the nodes; for a function this is its body.
        opset: version of the default domain, 0 where it is not imported.
        in_function: bodies of functions hold no initializers, only Constant nodes.
    """

    graph: ir.Graph
    opset: int
    in_function: bool


def scopes(model: ir.Model) -> Iterator[Scope]:
    """Every graph of the model, outermost first, with the opset version that holds in it."""
    opset, in_function = 0, False
    for item in graphs(model):
        if isinstance(item, ir.Function):
            opset, in_function = default_opset(item.opset_imports), True
            yield Scope(item.graph, opset, True)
        else:
            if item is model.graph:
                opset, in_function = default_opset(model.opset_imports), False
            yield Scope(item, opset, in_function)


def default_opset(imports: dict[str, int]) -> int:
    """The version of ONNX's own operators; 0 where they are not imported."""
    return imports.get("", imports.get("ai.onnx", 0))


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether the node is one of these ops of the default domain."""
    return node is not None and node.op_type in op_types and in_standard_domain(node)


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that the value always holds, or None.

    Initializers (in any enclosing graph) and Constant nodes count. Not: initializers that are graph
    inputs too, sparse constants, attributes that a function's caller sets.
    """
    if value is None:
        return None
    node = value.producer()
    if node is None:
        if value.is_initializer() and not value.is_graph_input():
            return value.const_value
        return None
    if not is_op(node, "Constant") or len(node.attributes) != 1:
        return None
    attribute = next(iter(node.attributes.values()))
    if attribute.is_ref():
        return None
    match attribute.name:
        case "value":
            return attribute.as_tensor()
        case "value_int" | "value_ints":
            return ir.Tensor(np.array(attribute.value, dtype=np.int64), name=value.name)
        case "value_float" | "value_floats":
            return ir.Tensor(np.array(attribute.value, dtype=np.float32), name=value.name)
    return None


def array(value: ir.Value | None, *, max_size: int | None = None) -> np.ndarray | None:
    """``constant`` as a numpy array (ml_dtypes for bfloat16), unless it has over ``max_size`` elements."""
    tensor = constant(value)
    if tensor is None or (max_size is not None and tensor.size > max_size):
        return None
    return tensor.numpy()


def integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """The elements of a small constant integer tensor of rank 0 or 1, or None."""
    data = array(value, max_size=1024)
    if data is None or data.ndim > 1 or data.dtype.kind not in "iu":
        return None
    return tuple(int(i) for i in data.reshape(-1))


def scalar(value: ir.Value | None) -> float | None:
    """The one element of a constant numeric tensor as a float, or None."""
    data = array(value, max_size=1)
    return float(data.reshape(-1)[0]) if data is not None and data.size == 1 and data.dtype.kind != "O" else None


def given(node: ir.Node, index: int) -> ir.Value | None:
    """The input at ``index``; None where it is left out, either way of leaving it out."""
    return node.inputs[index] if index < len(node.inputs) else None


def attribute_ints(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """A list attribute; None where it is absent or a reference to a function's attribute."""
    found = node.attributes.get(name)
    return None if found is None or found.is_ref() else tuple(found.as_ints())


def attribute_int(node: ir.Node, name: str, default: int) -> int | None:
    """An integer attribute or its default; None where only a function's caller knows it."""
    found = node.attributes.get(name)
    if found is None:
        return default
    return None if found.is_ref() else found.as_int()


def attribute_float(node: ir.Node, name: str, default: float) -> float | None:
    """A float attribute or its default; None where only a function's caller knows it."""
    found = node.attributes.get(name)
    if found is None:
        return default
    return None if found.is_ref() else found.as_float()


def rank(value: ir.Value | None) -> int | None:
    """How many dimensions the value has, where that is known."""
    if value is None:
        return None
    if value.shape is not None:
        return len(value.shape)
    tensor = constant(value)
    return None if tensor is None else len(tensor.shape)


def dims(value: ir.Value | None) -> tuple[int | str | None, ...] | None:
    """The shape: ints where fixed, names where symbolic, None where unknown; None if the rank is unknown."""
    if value is None:
        return None
    shape: ir.Shape | ir.ShapeProtocol | None = value.shape
    if shape is None:
        tensor = constant(value)
        if tensor is None:
            return None
        shape = tensor.shape
    # Some exporters write -1 for a dimension that they do not know.
    return tuple((d if d >= 0 else None) if isinstance(d, int) else d.value for d in shape)


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether both are known to have one shape: equal numbers or equal names in every dimension."""
    left, right = dims(a), dims(b)
    return left is not None and left == right and None not in left


def only_use(value: ir.Value) -> ir.Node | None:
    """The one node that reads the value, if it is read once and is no output of its graph."""
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None


def can_replace(old: ir.Value, new: ir.Value) -> bool:
    """Whether ``replace(old, new)`` would keep every graph's outputs as they are, in name and in number.

    An output of a graph can only be replaced by something that a node of the same graph computes and
    that is not an output itself: inputs, initializers and outer values keep their own names.
    """
    if old.type is not None and new.type is not None and type(old.type) is not type(new.type):
        return False
    if not old.is_graph_output():
        return True
    producer = new.producer()
    return producer is not None and producer.graph is old.graph and not new.is_graph_output()


def replace(old: ir.Value, new: ir.Value) -> None:
    """Lets ``new`` stand wherever ``old`` stood; in place of a graph output it takes over name and type.

    Callers ask ``can_replace`` first. The node that makes ``old`` stays, without users.
    """
    if old.is_graph_output():
        name, kind, shape = old.name, old.type, old.shape
        old.name = None
        new.name = name
        new.type = kind if kind is not None else new.type
        new.shape = shape if shape is not None else new.shape
    else:
        if new.shape is None and old.shape is not None:
            new.shape = old.shape.copy()
        if new.type is None:
            new.type = old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def remove(node: ir.Node) -> None:
    """Takes a node that nobody reads out of its graph, and what is in its subgraphs with it."""
    graph = node.graph
    assert graph is not None
    # The nodes of a subgraph would go on counting as users of the outer values that they captured.
    for attribute in node.attributes.values():
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        bodies = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()
        for body in bodies:
            for inner in ir.traversal.RecursiveGraphIterator(body):
                for index in range(len(inner.inputs)):
                    inner.replace_input_with(index, None)
    graph.remove(node, safe=True)


class Names:
    """Hands out value names that are used nowhere in the model, in any graph."""

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str] = set()
        for scope in scopes(model):
            self._taken.update(v.name for v in scope.graph.inputs if v.name)
            self._taken.update(scope.graph.initializers)
            self._taken.update(v.name for node in scope.graph for v in node.outputs if v.name)

    def fresh(self, wanted: str) -> str:
        """``wanted``, or ``wanted_1``, ``wanted_2``, ... if that is taken."""
        name, count = wanted, 0
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name


def new_constant(scope: Scope, data: np.ndarray, name: str, *, before: ir.Node) -> ir.Value:
    """Adds a constant: an initializer of the graph; inside a function a Constant node before ``before``."""
    tensor = ir.Tensor(data, name=name)
    if not scope.in_function:
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(data.shape), const_value=tensor)
        scope.graph.register_initializer(value)
        return value
    node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], name=name)
    value = node.outputs[0]
    value.name, value.type, value.shape = name, ir.TensorType(tensor.dtype), ir.Shape(data.shape)
    scope.graph.insert_before(before, node)
    return value


def set_constant(value: ir.Value, data: np.ndarray) -> None:
    """Gives an initializer or a Constant node another tensor."""
    old = constant(value)
    assert old is not None
    tensor = ir.Tensor(data, dtype=old.dtype, name=value.name)
    node = value.producer()
    if node is None:
        value.const_value = tensor
    else:
        node.attributes.clear()
        node.attributes.add(ir.AttrTensor("value", tensor))
    value.shape = ir.Shape(data.shape)


def set_inputs(node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
    """Gives the node these inputs, however many it had."""
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
