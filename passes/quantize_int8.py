"""Quantises a graph to 8-bit integers, in the dialect of Q/DQ that the target turns into integer kernels.

Before and after, for ONNX Runtime on the CPU (q is QuantizeLinear, dq is DequantizeLinear)::

    x -> Conv(w, b) -> Relu -> y        x -> q -> dq -> Conv(dq(w8), dq(b32)) -> q -> dq -> y

The arithmetic is that of Jacob et al. 2018 (arXiv 1712.05877): ``real = scale * (integer - zero_point)``; weights
signed and symmetric with a scale for each output channel, activations by their calibrated range. Which nodes, and
where q and dq go, is the dialect's:

========== =================== ============================================ ======================
dialect    activations         q and dq                                     bias
========== =================== ============================================ ======================
ort-cpu    uint8, asymmetric   inputs and output (``_quant_outputs.py``)    int32, scale s_x * s_w
openvino   uint8, asymmetric   inputs and output, ConvTranspose too         int32, scale s_x * s_w
tensorrt   int8, symmetric     inputs, of an Add one (``_quant_inputs.py``) float32
========== =================== ============================================ ======================

The table of embeddings that a Gather reads becomes int8 with a scale for each row. On ONNX Runtime and OpenVINO the
rows that were looked up are scaled; TensorRT allows integer constants before a DequantizeLinear alone, so there the
table as a whole is dequantised in the graph, and in TensorRT-RTX's kernel only the rows that are read.

A graph in one dialect does not run well on the runtime of another, or not at all: so it is quantised last, from
one calibration, once for each target. On x86 without VNNI the 16-bit sums of uint8 times int8 saturate; ONNX
Runtime avoids that if the session option ``session.x64quantprecision`` is 1.

Declined: whatever has no range, no constant weight, or another type than float32; nodes in subgraphs and
functions; and the whole of a graph that is quantised already.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from passes import _quant_inputs, _quant_outputs
from passes._graph import Names, Scope, default_opset, scopes
from passes._integer_weights import embedding_weight, require_opset
from passes._qdq import carry_out
from passes._quant import Affine, Calibration, TensorRange, affine_s8, affine_u8, symmetric_s8
from passes._quant_plan import LAYERS, Decline, Plan
from passes._shapes import infer_shapes
from passes.base import Declined, InvalidOption, Outcome, Pass, PassFailed, label

#: ops of graphs that are quantised, in any of the forms that ONNX has
_QUANTISED = (
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "DynamicQuantizeLSTM",
    "ConvInteger",
    "MatMulInteger",
)


#: tables of embeddings with fewer elements stay in float
_SMALLEST_TABLE = 1 << 14
#: for each dialect the integers that activations may have, its own first
DIALECTS = {"ort-cpu": ("uint8", "int8"), "tensorrt": ("int8",), "openvino": ("uint8", "int8")}


@dataclasses.dataclass(frozen=True)
class QuantizeInt8(Pass):
    """Quantises weights and activations to 8-bit integers, as the target's kernels want it.

    Attributes:
        dialect: ort-cpu, tensorrt or openvino.
        calibration: the ranges of the graph's values; without it there is nothing to quantise by.
        exclude: nodes that stay in float, by name, or as reports name them.
        granularity: channel for a weight scale for each output channel, tensor for one.
        weights: balanced covers the largest weight and rounds so that the errors of a channel cancel; amax rounds
            to the nearest instead; mse clips where the squared error is least.
        activations: uint8 or int8; None for the dialect's own.
    """

    dialect: str = "ort-cpu"
    calibration: Calibration | None = dataclasses.field(default=None, repr=False)
    exclude: tuple[str, ...] = ()
    granularity: str = "channel"
    weights: str = "balanced"
    activations: str | None = None

    def __post_init__(self) -> None:
        for option, allowed in (
            ("dialect", tuple(DIALECTS)),
            ("granularity", ("channel", "tensor")),
            ("weights", ("balanced", "amax", "mse")),
            ("activations", (None, *DIALECTS.get(self.dialect, ()))),
        ):
            if getattr(self, option) not in allowed:
                raise InvalidOption(
                    f"option {option} of pass quantize_int8 is {getattr(self, option)!r}",
                    hint="wanted: " + ", ".join(str(a) for a in allowed if a is not None),
                )

    def call(self, model: ir.Model) -> Outcome:
        if self.calibration is None:
            raise PassFailed(
                "quantize_int8 needs a calibration", hint="toolchain calibrate MODEL --data DATA makes one"
            )
        if (found := quantised(model)) is not None:
            reason = f"the model is quantised already: this is a {found.op_type}"
            return Outcome(model, False, declined=(Declined(label(found), reason),))
        self._check_opset(model)
        check_exclude(model, self.exclude)
        changed = fill_in_types(model)
        names = Names(model)
        ops = [node.op_type for node in model.graph]
        ranges = self.calibration.ranges
        plan = _plan(model, names, self.dialect, lambda name: ranges.get(name), self.exclude)
        changed |= [node.op_type for node in model.graph] != ops
        if plan.layers or plan.tables:
            carry_out(
                Scope(model.graph, default_opset(model.opset_imports), False),
                plan,
                names,
                affine=self._affine,
                dtype=np.uint8 if self._type() == "uint8" else np.int8,
                per_channel=self.granularity == "channel",
                weights=self.weights,
            )
        fired = len(plan.layers) + len(plan.tables) + len(plan.others)
        return Outcome(model, changed or fired > 0, fired=fired, declined=(*plan.declined, *_inner(model)))

    def _type(self) -> str:
        return self.activations or DIALECTS[self.dialect][0]

    def _affine(self, range_: TensorRange) -> Affine:
        if self.dialect == "tensorrt":
            return symmetric_s8(range_.amax)
        return (affine_u8 if self._type() == "uint8" else affine_s8)(range_.low, range_.high)

    def _check_opset(self, model: ir.Model) -> None:
        opset = default_opset(model.opset_imports)
        least = 13 if self.granularity == "channel" else 10
        if opset < least:
            raise PassFailed(
                f"the model has opset {opset}; QuantizeLinear {'by channel ' if least == 13 else ''}came with {least}",
                hint="export it with a newer opset",
            )


def quantizable(model: ir.Model, dialect: str) -> tuple[str, ...]:
    """The nodes that ``QuantizeInt8`` of this dialect would compute in integers, given a range for every value.

    Layers and what computes between them, in the graph's order, named as ``exclude`` takes them; not those that
    only move elements. Empty for a model that is quantised already. The model is not changed.

    Raises:
        InvalidOption: there is no such dialect.
    """
    QuantizeInt8(dialect=dialect)
    if quantised(model) is not None:
        return ()
    copy = model.clone()
    fill_in_types(copy)
    plan = _plan(copy, Names(copy), dialect, lambda name: _ANY, ())
    chosen = {*plan.layers, *plan.tables, *plan.others}
    return tuple(label(node) for node in copy.graph if node in chosen)


def quantised(model: ir.Model) -> ir.Node | None:
    """The first node by which a model shows that it is quantised, as Q/DQ or as QOperator; None if it is not."""
    for scope in scopes(model):
        for node in scope.graph:
            if node.op_type in _QUANTISED or node.op_type.startswith("QLinear"):
                return node
    return None


#: a range for every value, where only its being there matters
_ANY = TensorRange(0.0, 1.0, 1.0, 0.0, 1.0, "minmax")


def _plan(
    model: ir.Model,
    names: Names,
    dialect: str,
    range_named: Callable[[str], TensorRange | None],
    exclude: tuple[str, ...],
) -> Plan:
    if dialect == "tensorrt":
        made = _quant_inputs.plan(model.graph, lambda value: range_named(str(value.name)), frozenset(exclude))
    else:
        made = _plan_outputs(model, names, dialect, range_named, exclude)
    _add_tables(made, Scope(model.graph, default_opset(model.opset_imports), False), exclude)
    return made


def _plan_outputs(
    model: ir.Model,
    names: Names,
    dialect: str,
    range_named: Callable[[str], TensorRange | None],
    exclude: tuple[str, ...],
) -> Plan:
    shield = dialect == "ort-cpu"
    same = _quant_outputs.prepare(model, names, shield=shield)
    return _quant_outputs.plan(
        model.graph,
        lambda value: range_named(same.get(str(value.name), str(value.name))),
        frozenset(exclude),
        kernels=frozenset(LAYERS) - (frozenset({"ConvTranspose"}) if dialect == "ort-cpu" else frozenset()),
        shield=shield,
    )


def _add_tables(plan: Plan, scope: Scope, exclude: tuple[str, ...]) -> None:
    """Adds the look-ups of embeddings to a plan: they need no calibration, and the dialects differ in form alone."""
    found: dict[ir.Node, ir.Value] = {}
    for node in scope.graph:
        try:
            table = embedding_weight(node, _SMALLEST_TABLE)
            if table is None:
                continue
            if label(node) in exclude:
                raise Decline("excluded")
            if not plan.gather_integers:
                require_opset(scope, 13, "DequantizeLinear by row")
            found[node] = table
        except Decline as reason:
            plan.declined.append(Declined(label(node), str(reason)))
    for node, table in found.items():
        if table.is_graph_output() or any(
            use.node not in found and use.node not in plan.layers for use in table.uses()
        ):
            why = "something else reads its table as floats: integers would come on top of it"
            plan.declined.append(Declined(label(node), why))
        else:
            plan.tables.append(node)


def fill_in_types(model: ir.Model) -> bool:
    """Fills in unknown types, where there are any. Returns whether it did."""
    return any(v.type is None for node in model.graph for v in node.outputs) and infer_shapes(model)


def check_exclude(model: ir.Model, exclude: tuple[str, ...]) -> None:
    """Raises PassFailed for a name that no node has, with the nearest ones."""
    known = {label(node) for scope in scopes(model) for node in scope.graph}
    for name in exclude:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise PassFailed(
                f"there is no node {name!r} to exclude",
                hint=f"did you mean {' or '.join(near)}?" if near else "toolchain inspect lists the nodes",
            )


def _inner(model: ir.Model) -> tuple[Declined, ...]:
    return tuple(
        Declined(label(node), "it is in a subgraph or a function, which calibration does not see")
        for scope in scopes(model)
        if scope.graph is not model.graph
        for node in scope.graph
        if node.op_type in LAYERS
    )
