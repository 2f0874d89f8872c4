"""Float weights replaced by integer ones, for passes that need no calibration: which nodes, and the constants.

A weight that several nodes read is stored once in each graph, and the float one goes with its last reader.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from passes._graph import Names, Scope, attribute_int, constant, given, is_op, new_constant, remove, set_inputs
from passes._linear import drop_unused
from passes._quant_plan import Decline
from passes._quant_weights import QuantizedWeight, quantize_weight
from passes.base import label


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """A weight as constants of a graph.

    Attributes:
        values: int8.
        scale: float32, as in ``QuantizedWeight``.
        zero_point: int8 zeros in the shape of the scale; None where it was not asked for.
    """

    values: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None


class WeightStore:
    """Puts integer weights into graphs, each weight once for each form that is asked for."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self._stored: dict[tuple[object, ...], Stored] = {}
        self._replaced: dict[ir.Value, None] = {}

    def put(
        self,
        scope: Scope,
        weight: ir.Value,
        form: tuple[object, ...],
        make: Callable[[], QuantizedWeight],
        *,
        before: ir.Node,
        zero_point: bool = True,
    ) -> Stored:
        """The constants of ``weight`` in one form, made by ``make`` where they are not there yet."""
        self._replaced[weight] = None
        # In a function constants are nodes: one before its first reader is there for all that follow.
        key = (scope.graph, weight, *form)
        if key not in self._stored:
            made = make()
            scale = np.asarray(made.scale, np.float32)

            def add(data: np.ndarray, part: str) -> ir.Value:
                return new_constant(scope, data, self.names.fresh(f"{weight.name}_{part}"), before=before)

            self._stored[key] = Stored(
                add(made.values, "quantized"),
                add(scale, "scale"),
                add(np.zeros(scale.shape, np.int8), "zero_point") if zero_point else None,
            )
        return self._stored[key]

    def forget_floats(self) -> None:
        """Takes the float weights out of the model that nobody reads any more."""
        for value in self._replaced:
            producer = value.producer()
            if producer is None:
                drop_unused(value)
            elif not value.uses() and not value.is_graph_output() and producer.graph is not None:
                remove(producer)


def new_node(
    op_type: str,
    inputs: Iterable[ir.Value | None],
    name: str,
    *,
    names: Names,
    before: ir.Node,
    outputs: tuple[tuple[str, ir.DataType], ...],
    attributes: tuple[ir.Attr, ...] = (),
) -> ir.Node:
    """Adds a node before another; ``outputs`` are names, as far as they are free, and types."""
    node = ir.Node("", op_type, list(inputs), list(attributes), num_outputs=len(outputs), name=names.fresh(name))
    for value, (wanted, dtype) in zip(node.outputs, outputs, strict=True):
        value.name, value.type = names.fresh(wanted), ir.TensorType(dtype)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return node


def turn_into(node: ir.Node, op_type: str, *, domain: str = "") -> None:
    """Makes the node another op, without attributes: its outputs stay the values that they are."""
    node.op_type, node.domain, node.version = op_type, domain, None
    node.overload = ""
    node.attributes.clear()


def require_large(tensor: ir.TensorProtocol, smallest: int) -> None:
    """Raises Decline for a weight that is not worth it."""
    size = math.prod(tensor.shape.numpy())
    if size < smallest:
        raise Decline(f"its weight has {size} elements, less than {smallest}: integers would not pay")


def require_opset(scope: Scope, least: int, what: str) -> None:
    """Raises Decline in a graph that is too old."""
    if scope.opset < least:
        raise Decline(f"opset {scope.opset}: {what} came with {least}")


def embedding_weight(node: ir.Node, smallest: int) -> ir.Value | None:
    """The weight of a Gather that looks up rows of a float32 table; None for any other Gather.

    Raises:
        Decline: the table is not worth it.
    """
    weight = given(node, 0)
    tensor = constant(weight)
    if not is_op(node, "Gather") or tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return None
    if len(tensor.shape) != 2 or attribute_int(node, "axis", 0) not in (0, -2):
        return None
    require_large(tensor, smallest)
    return weight


def look_up_integers(node: ir.Node, stored: Stored, names: Names) -> None:
    """Gather(float table) -> Cast(Gather(integer table)) * Gather(scales), with a scale for each row.

    The rows that were looked up are scaled, not the table, whatever the runtime does with constants. A scale for each
    column, which DequantizeLinear could apply, is slower in ONNX Runtime and on MiniLM's words 3.7 dB worse.

    Args:
        stored: with scales [rows, 1].
    """
    output, indices = node.outputs[0], node.inputs[1]

    def add(op_type: str, inputs: list[ir.Value | None], part: str, dtype: ir.DataType, attribute: ir.Attr) -> ir.Value:
        made = new_node(
            op_type,
            inputs,
            f"{label(node)}_{part}",
            names=names,
            before=node,
            outputs=((f"{output.name}_{part}", dtype),),
            attributes=(attribute,),
        )
        return made.outputs[0]

    rows = add("Gather", [stored.values, indices], "quantized", ir.DataType.INT8, ir.AttrInt64("axis", 0))
    scales = add("Gather", [stored.scale, indices], "scale", ir.DataType.FLOAT, ir.AttrInt64("axis", 0))
    real = add("Cast", [rows], "unscaled", ir.DataType.FLOAT, ir.AttrInt64("to", ir.DataType.FLOAT.value))
    for value in (rows, real):
        value.shape = output.shape.copy() if output.shape is not None else None
    turn_into(node, "Mul")
    set_inputs(node, [real, scales])


def quantize_table(tensor: ir.TensorProtocol, *, method: str) -> QuantizedWeight:
    """Quantises a table of embeddings; its scales are [rows, 1]."""
    made = quantize_weight(tensor, 0, method=method)
    return QuantizedWeight(made.values, made.scale[:, None], 0)
