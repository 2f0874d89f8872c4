"""Computes in 16-bit floats: values, weights and the nodes between them, with casts where something stays float32.

::

    x -> Conv(w) -> LayerNormalization -> y      becomes, with LayerNormalization kept,
    x -> Cast(16) -> Conv(w16) -> Cast(32) -> LayerNormalization -> y

Half the memory and, where the hardware has 16-bit arithmetic, twice the speed or more. TensorRT 11 takes a network's
precision from its graph alone, so this is what FP16 means there. float16 ends at 65504 and loses precision below
6.1e-5; bfloat16 has the range of float32 and 8 bits of precision.

A node is converted if ONNX allows the type where it has float32 (the type constraints of its schema decide). It stays
float32, with casts around it, if it is named, of an op named, or has a constant that the type cannot hold: those are
declined with the number. Numbers at the end of float32's range, which masks use for minus infinity, become the end
of the 16-bit range. Nodes with subgraphs, and functions, stay float32. A value keeps its name in 16 bits; its float32
form is new. Inputs and outputs stay float32 unless asked otherwise.

A quantised graph becomes INT8 with the rest in 16 bits: from opset 19 on, QuantizeLinear and DequantizeLinear have a
16-bit scale and 16-bit floats, with no cast between them and the layer, so that a runtime still finds the pattern.
The scale of a channel of weights that 16 bits do not hold is made one that they do, and its integers with it.

What overflows on real samples, ``toolchain/float16.py`` finds. Measured on MiniLM-L6-v2: nothing does, the embeddings
keep a cosine similarity of 1.0000000 in float16, and the file is half as large.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from passes._graph import Names, Scope, array, attribute_int, constant, default_opset, given, is_op, new_constant
from passes._linear import drop_unused
from passes._shapes import infer_shapes
from passes.base import Declined, InvalidOption, Outcome, Pass, PassFailed, in_standard_domain, label

TYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}

#: Their intermediate sums and powers leave the range or the precision of 16 bits when their results do not.
KEEP_OPS = (
    "CumSum",
    "Exp",
    "LogSoftmax",
    "LpNormalization",
    "Pow",
    "ReduceL2",
    "ReduceLogSumExp",
    "ReduceMean",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
)
#: Their type is not that of what they compute with: it is what they are there for, or an attribute says it.
_TYPE_MAKERS = frozenset(
    """
    Bernoulli CastLike Constant ConstantOfShape DynamicQuantizeLinear EyeLike Multinomial RandomNormal RandomNormalLike
    RandomUniform RandomUniformLike Range SequenceEmpty
    """.split()
)
#: The least scale of weights, with 5 bits of precision left in float16: what is lost below is 5e-7 of a weight.
_LEAST_SCALE = 2.0**-20
#: By how much rounding may change a scale of weights before its integers are made anew.
_SCALE_CHANGE = 2.0**-9
#: beyond this a number is meant as infinity
ENDLESS = 1e30


@dataclasses.dataclass(frozen=True)
class ConvertFloat16(Pass):
    """Converts float32 to 16-bit floats, but for what is kept.

    Attributes:
        dtype: float16 or bfloat16.
        keep: nodes that stay float32, by name.
        keep_ops: op types that stay float32.
        keep_io: inputs and outputs of the graph stay float32.
    """

    dtype: str = "float16"
    keep: tuple[str, ...] = ()
    keep_ops: tuple[str, ...] = KEEP_OPS
    keep_io: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in TYPES:
            raise InvalidOption(
                f"option dtype of pass convert_float16 is {self.dtype!r}", hint="wanted: " + ", ".join(TYPES)
            )

    def call(self, model: ir.Model) -> Outcome:
        known = {label(node) for node in model.graph}
        for name in self.keep:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
                raise PassFailed(
                    f"there is no node {name!r} to keep",
                    hint=f"did you mean {' or '.join(near)}?" if near else "toolchain inspect lists the nodes",
                )
        typed = any(v.type is None for node in model.graph for v in node.outputs) and infer_shapes(model)
        conversion = _Conversion(model, self)
        fired = conversion.run()
        return Outcome(model, typed or fired > 0, fired=fired, declined=tuple(conversion.declined))


class _Conversion:
    def __init__(self, model: ir.Model, options: ConvertFloat16) -> None:
        self.graph = model.graph
        self.opset = default_opset(model.opset_imports)
        self.scope = Scope(model.graph, self.opset, False)
        self.names = Names(model)
        self.options = options
        self.type = TYPES[options.dtype]
        self.declined: list[Declined] = []
        #: values that are 16 bits wide afterwards
        self.narrow: set[ir.Value] = set()
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.tensors: dict[ir.Value, np.ndarray] = {}

    def run(self) -> int:
        """Converts, and says how many nodes."""
        before = [value for value in self.graph.inputs if _is_float32(value) and not self.options.keep_io]
        outputs = [value for value in self.graph.outputs if _is_float32(value)]
        self.narrow.update(before)
        nodes = list(self.graph)
        rescaled = sum(
            self._rescale(node) for node in nodes if is_op(node, "DequantizeLinear") and self._converts(node)
        )
        chosen = {node: found for node in nodes if (found := self._sites(node)) is not None}
        for node in reversed(nodes):
            # Integers become 16-bit floats at once only where nobody wants them in float32.
            if node.op_type == "Cast" and node in chosen:
                uses = node.outputs[0].uses()
                if any(use.node not in chosen or use.idx not in chosen[use.node][0] for use in uses):
                    del chosen[node]
                    self.narrow.discard(node.outputs[0])
        # Uses are looked up before the first change, inside of subgraphs too.
        sites = [(use.node, use.idx, value) for value in self.narrow for use in value.uses()]
        for node, (inputs, _) in chosen.items():
            for index in inputs:
                value = node.inputs[index]
                assert value is not None
                node.replace_input_with(index, self._as(value, self.type, before=node))
            if node.op_type == "Cast":
                node.attributes.add(ir.AttrInt64("to", self.type.value))
        for value in self.narrow:
            value.type = ir.TensorType(self.type)
        for node, index, value in sites:
            if node not in chosen or index not in chosen[node][0]:
                node.replace_input_with(index, self._as(value, ir.DataType.FLOAT, before=node))
        for value in outputs:
            self._output(value)
        for value in self.tensors:
            drop_unused(value)
        return len(chosen) + len(before) + rescaled

    def _kept(self, node: ir.Node) -> bool:
        return node.op_type in self.options.keep_ops or label(node) in self.options.keep

    def _converts(self, node: ir.Node) -> bool:
        """Whether the node gives 16-bit floats in this opset, and may."""
        return bool((self._allowed(node) or ((), ()))[1]) and not self._kept(node)

    def _rescale(self, node: ir.Node) -> bool:
        """Makes the scales of integer weights ones that 16 bits hold, where they are not. Returns whether it did."""
        integers, scale = (array(given(node, index)) for index in (0, 1))
        zero_point = array(given(node, 2))
        axis = attribute_int(node, "axis", 1)
        if integers is None or scale is None or axis is None or scale.ndim > 1 or scale.dtype != np.float32:
            return False
        if zero_point is not None and zero_point.any():
            return False
        with np.errstate(over="ignore"):
            low = np.maximum(scale, _LEAST_SCALE).astype(self.type.numpy()).astype(np.float32)
        change = np.where(
            np.abs(low / np.maximum(scale, np.finfo(np.float32).tiny) - 1) > _SCALE_CHANGE, scale / low, 1
        )
        if not np.isfinite(low).all() or (change == 1).all():
            return False
        if scale.ndim:
            change = change.reshape([-1 if i == axis % integers.ndim else 1 for i in range(integers.ndim)])
        limits = np.iinfo(integers.dtype)
        made = np.clip(np.rint(integers * change.astype(np.float64)), -limits.max, limits.max).astype(integers.dtype)
        replaced = node.inputs[:2]
        for index, data in ((0, made), (1, np.where(np.reshape(change, scale.shape) != 1, low, scale))):
            name = self.names.fresh(f"{node.outputs[0].name}_{'scale' if index else 'integers'}")
            node.replace_input_with(index, new_constant(self.scope, data, name, before=node))
        for old in replaced:
            drop_unused(old)
        return True

    def _sites(self, node: ir.Node) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The inputs and outputs of a node that become 16 bits wide, as indices; None for a node that stays."""
        found = self._allowed(node)
        if found is None:
            return None
        inputs, outputs = found
        if self._kept(node) or not (inputs or outputs):
            return None
        if not outputs and node.inputs[inputs[0]] not in self.narrow:
            return None  # Shape, Greater and their like take what is there
        for index in inputs:
            problem = self._constant(node.inputs[index])
            if problem is not None:
                self.declined.append(Declined(label(node), problem))
                return None
        self.narrow.update(node.outputs[index] for index in outputs)
        return inputs, outputs

    def _allowed(self, node: ir.Node) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Where the node has float32 and its schema would take 16 bits; None where it cannot be converted."""
        if not in_standard_domain(node) or node.op_type in _TYPE_MAKERS or _has_graphs(node):
            return None
        if node.op_type == "Cast":
            source = node.inputs[0]
            to = node.attributes.get("to")
            from_integer = source is not None and source.dtype is not None and not source.dtype.is_floating_point()
            is_float = to is not None and not to.is_ref() and to.as_int() == ir.DataType.FLOAT
            return ((), (0,)) if from_integer and is_float else None
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, "")
        except onnx.defs.SchemaError:
            return None
        wanted = f"tensor({self.type.name.lower()})"
        free = {c.type_param_str for c in schema.type_constraints if wanted in c.allowed_type_strs}
        given = [_formal(schema.inputs, index) for index in range(len(node.inputs))]
        made = [_formal(schema.outputs, index) for index in range(len(node.outputs))]
        if is_op(node, "DequantizeLinear") and "output_dtype" not in node.attributes:
            made = given[1:2]  # without the attribute it gives the type of its scale, which no constraint says
        inputs = [
            i for i, (v, kind) in enumerate(zip(node.inputs, given, strict=True)) if _is_float32(v) and kind in free
        ]
        bound = {given[index] for index in inputs}
        outputs = []
        for index, (value, kind) in enumerate(zip(node.outputs, made, strict=True)):
            if not _is_float32(value):
                continue
            if kind not in free:
                continue  # float32 whatever comes in, such as the mean that LayerNormalization gives
            if kind not in bound:
                return None
            outputs.append(index)
        return tuple(inputs), tuple(outputs)

    def _constant(self, value: ir.Value | None) -> str | None:
        """Prepares a constant in 16 bits; gives the reason where it does not fit."""
        tensor = constant(value)
        if tensor is None or value is None or value in self.tensors:
            return None
        data = tensor.numpy()
        low = self.type.numpy()
        limit = float(self.type.max)
        endless = np.abs(data) >= ENDLESS
        with np.errstate(over="ignore"):
            rounded = np.where(endless & np.isfinite(data), np.sign(data) * limit, data).astype(low)
        finite = np.isfinite(data) & ~endless
        back = rounded.astype(np.float64)
        if not np.isfinite(back[finite]).all():
            largest = float(np.abs(data[finite]).max())
            return f"its constant {value.name!r} has {largest:.4g}, beyond the {limit:g} of {self.options.dtype}"
        loss = rounding_loss(data[finite], back[finite])
        if loss > tolerable_loss(self.type):
            smallest = float(np.abs(data[finite & (data != 0)]).min(initial=np.inf))
            return (
                f"its constant {value.name!r} loses {loss:.2g} of its energy in {self.options.dtype}: "
                f"it goes down to {smallest:.3g}"
            )
        self.tensors[value] = rounded
        return None

    def _as(self, value: ir.Value, kind: ir.DataType, *, before: ir.Node) -> ir.Value:
        """The value in another type: itself, a constant, or a Cast, one for all who want it."""
        if (value in self.narrow) == (kind == self.type):
            return value
        key = (value, kind)
        if key in self.casts:
            return self.casts[key]
        suffix = "float32" if kind == ir.DataType.FLOAT else self.options.dtype
        name = self.names.fresh(f"{value.name}_{suffix}")
        if value in self.tensors and kind == self.type:
            made = new_constant(self.scope, self.tensors[value], name, before=before)
        else:
            made = self._cast(value, kind, name)
        self.casts[key] = made
        return made

    def _cast(self, value: ir.Value, kind: ir.DataType, name: str) -> ir.Value:
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", kind.value)], name=self.names.fresh(f"{name}_cast"))
        producer = value.producer()
        if producer is not None and producer.graph is self.graph:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        result = node.outputs[0]
        result.name, result.type = name, ir.TensorType(kind)
        result.shape = value.shape.copy() if value.shape is not None else None
        return result

    def _output(self, value: ir.Value) -> None:
        """Lets an output of the graph keep its name, in the type that was asked for."""
        wanted = ir.DataType.FLOAT if self.options.keep_io else self.type
        if (value in self.narrow) == (wanted == self.type):
            return
        name = value.name
        suffix = self.options.dtype if value in self.narrow else "float32"
        if value.is_graph_input() or value.is_initializer():
            return  # what comes in goes out as it is
        result = self._as(value, wanted, before=self.graph[-1])
        value.name = self.names.fresh(f"{name}_{suffix}")
        result.name = name
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[index] = result


def rounding_loss(exact: np.ndarray, rounded: np.ndarray) -> float:
    """Squared error over squared values, of any arrays of one shape; 0 for nothing but zeros."""
    wide = exact.astype(np.float64)
    total = float(np.square(wide).sum())
    return float(np.square(rounded - wide).sum()) / total if total > 0 else 0.0


def tolerable_loss(kind: ir.DataType) -> float:
    """What ``rounding_loss`` may be: that of numbers with four bits less than the type has, 6e-5 for float16."""
    precision = {ir.DataType.FLOAT16: 11, ir.DataType.BFLOAT16: 8}[kind]
    return float(2.0 ** (2 * (4 - precision)))


def _formal(formals: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> str:
    """The type constraint of an input or output; the last formal parameter may stand for any number."""
    return str(formals[min(index, len(formals) - 1)].type_str) if formals else ""


def _is_float32(value: ir.Value | None) -> bool:
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == ir.DataType.FLOAT


def _has_graphs(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(not a.is_ref() and a.type in kinds for a in node.attributes.values())
