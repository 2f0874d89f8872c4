"""How channels go through LSTM, GRU and RNN: inputs are summed over, and hidden units go with all their gates.

A hidden unit is a row of W and R for each gate, its biases and peepholes, and a column of R, by which all units read it
at the next step. Both directions lose the same units, since ``hidden_size`` is one number; a state that starts at zero
is left out where units go, which means the same.

Depends on: ONNX operators LSTM-7 (and 14, 22), GRU-7, RNN-7.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes._channel_graph import ChannelGraph, Editor
from passes._graph import array, attribute_int, constant, given, is_op, set_inputs
from passes.base import label

#: gates, each with a row of W and R for a unit
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_MOVES = ("Expand", "Slice", "Identity", "Cast", "Unsqueeze", "Squeeze", "Reshape", "Transpose")
_LENGTHS, _STATES, _PEEPHOLES = 4, (5, 6), 7


def recurrent(graph: ChannelGraph, node: ir.Node) -> None:
    """X [T, N, I], W [D, g*H, I], R [D, g*H, H], B [D, 2*g*H], states [D, N, H], peepholes [D, 3*H]."""
    x, w, r, bias = (given(node, index) for index in range(4))
    sizes, of_x = graph.dims(r), graph.of(x)
    hidden = None if sizes is None or len(sizes) != 3 else sizes[2]
    fixed = all(value is None or constant(value) is not None for value in (w, r, bias, given(node, _PEEPHOLES)))
    if x is None or w is None or r is None or not fixed or not isinstance(hidden, int) or of_x is None:
        return graph.opaque(node, f"{label(node)}: its weights are computed, or shapes are not known")
    if attribute_int(node, "layout", 0) != 0:
        return graph.opaque(node, f"{label(node)} has its batch in front")
    why = f"{label(node)} needs all of it"
    graph.role(w, 1, "out", node)
    graph.contract(node, x, 2, w, 2)
    graph.atoms.freeze(of_x[0], f"{label(node)} goes along it")
    batch = of_x[1]
    if any(given(node, index) is not None for index in (_LENGTHS, *_STATES)):
        graph.atoms.freeze(batch, f"{label(node)} has lengths or states for each of it")
        batch = None
    fixed_axes = [(w, 0), (r, 0), (bias, 0), (given(node, _PEEPHOLES), 0)]  # directions
    fixed_axes += [(given(node, index), axis) for index in _STATES for axis in (0, 1)]  # and the batch
    for value, axis in fixed_axes:
        axes = graph.of(value)
        graph.atoms.freeze(None if axes is None else axes[axis], why)
    of_w = graph.of(w)
    rows = None if of_w is None else of_w[1]
    units: npt.NDArray[np.int64] | None = None
    if rows is not None and len(rows) == GATES[node.op_type] * hidden and hidden > 1:
        table = rows.reshape(-1, hidden)
        graph.atoms.join(table[:1], table)
        units = np.ascontiguousarray(table[0])
    else:
        graph.atoms.freeze(rows, why)
    zeros = [index for index in _STATES if given(node, index) is not None and _is_zero(given(node, index))]
    tied = [
        (r, 1, rows),
        (r, 2, units),
        (bias, 1, _times(units, 2 * GATES[node.op_type])),
        (given(node, _PEEPHOLES), 1, _times(units, 3)),
        *((given(node, index), 2, units) for index in _STATES if index not in zeros),
    ]
    for value, axis, labels in tied:
        if value is not None:
            graph.tie(labels, value, axis, why)
    graph.role(r, 2, "in", node)
    if bias is not None:
        graph.role(bias, 1, "bias", node)
    for value in (given(node, _LENGTHS), *(given(node, index) for index in zeros)):
        graph.keep_whole(value, why)
    if units is not None:
        graph.rewrites.append(functools.partial(_fewer_units, node, units, tuple(zeros)))
    graph.set(node.outputs[0], [None, None, batch, units])
    for output in node.outputs[1:]:
        graph.set(output, [None, batch, units])


def _times(units: npt.NDArray[np.int64] | None, count: int) -> npt.NDArray[np.int64] | None:
    return None if units is None else np.tile(units, count)


def _is_zero(value: ir.Value | None) -> bool:
    """Whether it holds zeros alone, of whatever shape."""
    while value is not None:
        if (data := array(value)) is not None:
            return not data.any()
        node = value.producer()
        if node is None or not is_op(node, *_MOVES, "ConstantOfShape"):
            return False
        if node.op_type == "ConstantOfShape":
            filled = node.attributes.get("value")
            return filled is None or not filled.as_tensor().numpy().any()
        value = node.inputs[0]
    return False


def _fewer_units(node: ir.Node, units: npt.NDArray[np.int64], zeros: tuple[int, ...], editor: Editor) -> None:
    if editor.size(units) == len(units):
        return
    node.attributes.add(ir.AttrInt64("hidden_size", editor.size(units)))
    set_inputs(node, [None if index in zeros else value for index, value in enumerate(node.inputs)])
