"""Hidden units of LSTM, GRU and RNN: what goes with them, and that what is left computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from prune_support import graph, prove, shapes, weight

from passes._channel_groups import analyze

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
HIDDEN = 8


def constants(kind: str, directions: int) -> dict[str, np.ndarray]:
    rows = GATES[kind] * HIDDEN
    return {
        "wi": weight(6, 10),
        "w": weight(directions, rows, 10),
        "r": weight(directions, rows, HIDDEN) / 3,
        "b": weight(directions, 2 * rows),
        "p": weight(directions, 3 * HIDDEN),
        "h": weight(directions, 2, HIDDEN),
        "zeros": np.zeros((directions, 2, HIDDEN), np.float32),
        "none": np.zeros((), np.float32),
        "first": np.array([directions], np.int64),
        "last": np.array([HIDDEN], np.int64),
        "flat": np.array([0, 0, -1]),
        "wo": weight(directions * HIDDEN, 5),
        "lengths": np.array([5, 3], np.int32),
    }


def net(node: str) -> str:
    """Between two layers, as torch's exporter has it: directions next to the units, then merged with them."""
    return (
        f"i = MatMul (x, wi) {node} ht = Transpose <perm = [0, 2, 1, 3]> (hs) hf = Reshape (ht, flat) "
        "y = MatMul (hf, wo)"
    )


@pytest.mark.parametrize("kind", list(GATES))
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("state", ["absent", "zero", "computed zero", "constant"])
def test_hidden_units_go(kind: str, direction: str, state: str) -> None:
    directions = 2 if direction == "bidirectional" else 1
    made = "z = Concat <axis = 0> (first, n, last) h0 = Expand (none, z) " if state == "computed zero" else ""
    made = f"n = Shape <start = 1, end = 2> (x) {made}" if made else ""
    name = {"absent": "", "zero": ", , zeros", "computed zero": ", , h0", "constant": ", , h"}[state]
    cell = f'hs = {kind} <hidden_size = {HIDDEN}, direction = "{direction}"> (i, w, r, b{name})'
    model, cut = prove(graph(net(made + cell), constants(kind, directions), x="5, 2, 6"))
    assert cut.count
    found = shapes(model)
    rows = GATES[kind] * HIDDEN // 2
    assert found["wi"] == (6, 5)
    assert found["w"] == (directions, rows, 5)
    assert found["r"] == (directions, rows, HIDDEN // 2)
    assert found["b"] == (directions, 2 * rows)
    assert found["wo"] == (directions * HIDDEN // 2, 5)
    assert next(n for n in model.graph if n.op_type == kind).attributes["hidden_size"].as_int() == HIDDEN // 2


def test_peepholes_lengths_and_the_last_state() -> None:
    cell = f"hs, hl, cl = LSTM <hidden_size = {HIDDEN}> (i, w, r, b, lengths, h, h, p)"
    body = net(cell).replace("y = MatMul (hf, wo)", "u = MatMul (hf, wo) v = MatMul (hl, wo) s = MatMul (cl, wo)")
    body += " t = Add (u, v) y = Add (t, s)"
    data = constants("LSTM", 1)
    model, cut = prove(graph(body, data, x="5, 2, 6"))
    assert cut.count
    assert shapes(model)["p"] == (1, 3 * HIDDEN // 2)


WHOLE = {
    "a state from outside": (f"hs = LSTM <hidden_size = {HIDDEN}> (i, w, r, b, , state)", "LSTM -> hs needs all of it"),
    "a weight that is computed": (f"q = Relu (r) hs = LSTM <hidden_size = {HIDDEN}> (i, w, q, b)", "computed"),
    "batch in front": (f"hs = LSTM <hidden_size = {HIDDEN}, layout = 1> (i, w, r, b)", "batch in front"),
}


@pytest.mark.parametrize("name", list(WHOLE))
def test_units_that_stay(name: str) -> None:
    cell, word = WHOLE[name]
    proto = graph(net(cell), constants("LSTM", 1) | {"state": weight(1, 2, HIDDEN)}, x="5, 2, 6")
    for tensor in [t for t in proto.graph.initializer if t.name == "state"]:
        proto.graph.initializer.remove(tensor)
        proto.graph.input.append(onnx.helper.make_tensor_value_info("state", 1, [1, 2, HIDDEN]))
    analysis = analyze(ir.from_proto(proto))
    members = {m.value for g in analysis.groups for m in g.members if "out" in m.roles}
    assert not members & {"w", "r"}
    assert any(word in each.reason for each in analysis.declined)


def test_a_state_that_a_layer_makes_keeps_its_directions_and_its_batch() -> None:
    """The channels of ``ws`` are directions and units, those of ``wb`` the batch of the state; all units are needed."""
    data = constants("GRU", 2) | {
        "wb": weight(2, 5, seed=1),
        "ws": weight(6, 2 * HIDDEN, seed=2),
        "apart": np.array([2, 2, HIDDEN]),
        "none": np.array(0),
    }
    state = (
        "m = MatMul (wb, e) c = MatMul (m, ws) d = Reshape (c, apart) h0 = Transpose <perm = [1, 0, 2]> (d) "
        f'hs = GRU <hidden_size = {HIDDEN}, direction = "bidirectional"> (i, w, r, b, , h0) y = Softmax (hs)'
    )
    body = f"i = MatMul (x, wi) e = Gather <axis = 1> (x, none) {state}"
    model, cut = prove(graph(body, data, x="5, 2, 6"))
    assert list(cut.channels) == ["MatMul -> i"]
    assert shapes(model)["ws"] == (6, 2 * HIDDEN)


def test_lengths_keep_the_batch_whole() -> None:
    data = constants("GRU", 1) | {"wb": weight(6, 4, seed=1), "wt": weight(2, 10), "lengths": np.array([5, 3, 1, 2])}
    data["lengths"] = data["lengths"].astype(np.int32)
    first = "k = MatMul (x, wb) t = Transpose <perm = [0, 2, 1]> (k) i = MatMul (t, wt)"
    cell = f"hs = GRU <hidden_size = {HIDDEN}> (i, w, r, b, lengths)"
    end = "z = Transpose <perm = [0, 1, 3, 2]> (hs) y = MatMul (z, wl)"
    data["wl"] = weight(4, 5)
    model, cut = prove(graph(f"{first} {cell} {end}", data, x="5, 2, 6"))
    assert cut.count
    assert shapes(model)["wb"] == (6, 4)
