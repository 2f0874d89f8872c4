"""Computes at build time what does not depend on the inputs.

Three kinds of it::

    Add(2, 3)                              -> 5
    Gather(Shape(x: [batch, 3, 224]), 1)   -> 3            the dimension is known, x is not
    Reshape(x: [batch, 768, 14, 14],
            Concat(Shape(x)[0:1], 768, 196))
                                           -> Reshape(x, [0, 768, 196])
    CastLike(c, x: float16)                -> Cast(c, to=float16), and folded if c is constant

Exporters of PyTorch write shape arithmetic of the second and third kind for every layer. Weights do not
grow: a result of more than ``max_bytes`` is only kept where it is no larger than the constants that it
replaces and nothing else reads those.

Constant nodes of a graph become initializers, which is where shape inference, deduplication and
external data look for them. Quantize/DequantizeLinear are never folded: they mark precision.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from passes._contents import ContentsOf
from passes._evaluate import ELEMENT_TYPES, FOLDABLE, CannotEvaluate, evaluate
from passes._graph import (
    Names,
    Scope,
    array,
    attribute_int,
    constant,
    dims,
    given,
    is_op,
    new_constant,
    remove,
    scopes,
)
from passes._shapes import infer_shapes
from passes.base import Declined, Outcome, Pass, in_standard_domain, label

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
#: each round needs the one before to have changed something; exports of today need two
_MAX_ROUNDS = 20


@dataclasses.dataclass(frozen=True)
class FoldConstants(Pass):
    """Folds constants, known dimensions and shape arithmetic.

    Attributes:
        max_bytes: a folded tensor may always be this large, in bytes.
        infer_shapes: fill in unknown shapes first, with onnx's shape inference.
    """

    max_bytes: int = 1 << 18
    infer_shapes: bool = True

    def call(self, model: ir.Model) -> Outcome:
        fired = 0
        inferred = False
        declined: dict[str, Declined] = {}
        for round_ in range(_MAX_ROUNDS):
            declined.clear()
            count = self._round(model, declined, untyped=round_ > 0 or not self.infer_shapes)
            fired += count
            # Shapes come second: most of what is without a shape is folded away in the first round.
            filled = self.infer_shapes and (count > 0 or round_ == 0) and infer_shapes(model)
            inferred |= filled
            if not filled and not count and round_ > 0:
                break
        return Outcome(model, fired > 0 or inferred, fired=fired, declined=tuple(declined.values()))

    def _round(self, model: ir.Model, declined: dict[str, Declined], *, untyped: bool) -> int:
        fired = 0
        contents = ContentsOf()
        names = Names(model)
        for scope in scopes(model):
            for node in list(scope.graph):
                if not in_standard_domain(node):
                    continue
                contents.visit(node, scope.opset)
                try:
                    fired += self._fold(scope, node, contents, names, untyped=untyped)
                except CannotEvaluate as error:
                    declined[label(node)] = Declined(label(node), str(error))
        return fired

    def _fold(self, scope: Scope, node: ir.Node, contents: ContentsOf, names: Names, *, untyped: bool) -> bool:
        if node.op_type == "Constant":
            return _lift(scope, node)
        if any(a.is_ref() or a.type in _GRAPHS for a in node.attributes.values()):
            return False
        if is_op(node, "CastLike") and _cast_like(node):
            return True
        results = self._results(scope, node, contents)
        if results is not None:
            return _to_constants(scope, node, results)
        if not is_op(node, "Reshape") or scope.opset < 5:
            return False
        data = node.inputs[0]
        # The dimensions' names can only be kept on a value whose type is known: inference comes first.
        if not untyped and data is not None and data.type is None:
            return False
        return _reshape(scope, node, contents, names)

    def _results(self, scope: Scope, node: ir.Node, contents: ContentsOf) -> list[np.ndarray] | None:
        """The values of the node's outputs, if they are known whatever the inputs are."""
        if is_op(node, "Size"):
            shape = dims(node.inputs[0])
            sizes = [d for d in shape or () if isinstance(d, int)]
            if shape is not None and len(sizes) == len(shape):
                return [np.array(int(np.prod(sizes, dtype=np.int64)), np.int64)]
        inputs = [constant(value) for value in node.inputs]
        if all(t is not None or v is None for t, v in zip(inputs, node.inputs, strict=True)):
            if node.op_type not in FOLDABLE or not node.inputs:
                return None
            self._refuse_growth(node, inputs)
            results = evaluate(node, scope.opset, inputs)
            self._check_size(node, results)
            return results
        known = contents(node.outputs[0])
        numbers = known.known() if known is not None else None
        if known is None or numbers is None:
            return None
        return [np.array(numbers, known.dtype.numpy()).reshape([len(numbers)] if known.rank else [])]

    def _refuse_growth(self, node: ir.Node, inputs: list[ir.TensorProtocol | None]) -> None:
        """Refuses before the work what can be refused before it: an output whose shape is given as data."""
        if node.op_type in ("Expand", "ConstantOfShape", "Tile", "Range", "EyeLike", "OneHot"):
            size = _output_elements(node)
            itemsize = max((t.dtype.itemsize for t in inputs if t is not None), default=8)
            if size is None or size * max(itemsize, 1) > max(self.max_bytes, 0):
                raise CannotEvaluate(f"the result would have {'unknown' if size is None else size} elements")

    def _check_size(self, node: ir.Node, results: list[np.ndarray]) -> None:
        size = sum(result.nbytes for result in results)
        if size <= self.max_bytes:
            return
        freed = 0
        for value in dict.fromkeys(v for v in node.inputs if v is not None):
            tensor = constant(value)
            if tensor is not None and all(use.node is node for use in value.uses()) and not value.is_graph_output():
                freed += tensor.nbytes
        if size > freed:
            raise CannotEvaluate(f"the result has {size:,} bytes, its inputs that nothing else reads {freed:,}")


def _output_elements(node: ir.Node) -> int | None:
    """How many elements the output has, for ops that take its shape as data."""
    match node.op_type:
        case "Expand":
            target, data = array(node.inputs[1]), array(node.inputs[0])
            if target is None or data is None:
                return None
            try:
                return int(np.prod(np.broadcast_shapes(data.shape, tuple(int(d) for d in target)), dtype=object))
            except ValueError:
                return None
        case "ConstantOfShape":
            target = array(node.inputs[0])
            return None if target is None else int(np.prod([int(d) for d in target], dtype=object))
        case "Tile":
            data, repeats = array(node.inputs[0]), array(given(node, 1))
            if data is None or repeats is None or repeats.ndim != 1 or len(repeats) != data.ndim:
                return None
            return data.size * int(np.prod([int(r) for r in repeats], dtype=object))
        case "Range":
            start, limit, delta = (array(value) for value in node.inputs)
            if start is None or limit is None or delta is None or not float(delta.reshape(-1)[0]):
                return None
            span = (float(limit.reshape(-1)[0]) - float(start.reshape(-1)[0])) / float(delta.reshape(-1)[0])
            return max(0, int(np.ceil(span))) if np.isfinite(span) else None
        case "OneHot":
            data, depth = array(node.inputs[0]), array(node.inputs[1])
            return None if data is None or depth is None else data.size * int(depth.reshape(-1)[0])
    data = array(node.inputs[0])  # EyeLike: the shape of its input
    return None if data is None else data.size


def _lift(scope: Scope, node: ir.Node) -> bool:
    """Constant node -> initializer of the same name."""
    value = node.outputs[0]
    tensor = constant(value)
    # An output of a graph has to be computed by a node of it, and functions have no initializers.
    if scope.in_function or tensor is None or value.is_graph_output() or not value.name:
        return False
    if value.name in scope.graph.initializers:
        return False
    name, kind = value.name, value.type
    lifted = ir.Value(name=None, type=kind or ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.numpy().shape))
    value.name = None
    value.replace_all_uses_with(lifted)
    remove(node)
    lifted.name = name
    tensor.name = name
    lifted.const_value = tensor
    scope.graph.register_initializer(lifted)
    return True


def _cast_like(node: ir.Node) -> bool:
    """CastLike whose second input's type is known -> Cast, which does not need that input."""
    like = node.inputs[1]
    dtype = like.dtype if like is not None else None
    if dtype is None:
        tensor = constant(like)
        dtype = tensor.dtype if tensor is not None else None
    if dtype is None or dtype not in ELEMENT_TYPES:
        return False
    node.resize_inputs(1)
    node.op_type = "Cast"
    node.attributes.add(ir.AttrInt64("to", int(dtype)))
    if node.outputs[0].type is None:
        node.outputs[0].type = ir.TensorType(dtype)
    return True


def _to_constants(scope: Scope, node: ir.Node, results: list[np.ndarray]) -> bool:
    for output, result in zip(node.outputs, results, strict=True):
        if not output.name or not (output.uses() or output.is_graph_output()):
            continue
        name = output.name
        output.name = None
        if output.is_graph_output():
            tensor = ir.Tensor(result, name=name)
            made = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], name=node.name)
            scope.graph.insert_before(node, made)
            value = made.outputs[0]
            value.name = name
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(result.shape)
        else:
            value = new_constant(scope, result, name, before=node)
        if output.is_graph_output():
            declared = output.type, output.shape
            output.replace_all_uses_with(value, replace_graph_outputs=True)
            value.type, value.shape = declared[0] or value.type, declared[1] or value.shape
        else:
            output.replace_all_uses_with(value)
    remove(node)
    return True


def _reshape(scope: Scope, node: ir.Node, contents: ContentsOf, names: Names) -> bool:
    """Gives Reshape a constant target, where what is unknown of it can be said as 0 (copy) or one -1 (infer).

    0 stands for a dimension that the input has at the same place; -1 for the only one that is left.
    """
    target = given(node, 1)
    known = contents(target)
    if target is None or constant(target) is not None or known is None or known.rank != 1:
        return False
    allow_zero = attribute_int(node, "allowzero", 0)
    source = dims(node.inputs[0]) or ()
    shape: list[int] = []
    for index, element in enumerate(known.elements):
        if isinstance(element, int):
            if element == 0 and allow_zero != 0:
                return False  # means "empty" there and "copy" in what we would write
            shape.append(element)
        elif element is not None and index < len(source) and source[index] == element:
            shape.append(0)
        else:
            shape.append(-1)
    if shape.count(-1) > 1:
        return False
    # An unknown element may be 0 or -1 itself when it is no dimension; named ones are sizes.
    if any(element is None for element in known.elements):
        return False
    output = node.outputs[0]
    data = node.inputs[0]
    if output.type is None and data is not None:
        output.type = data.type
    nameless = output.type is not None and None in (dims(output) or (None,))
    if nameless and not output.is_graph_output() and 0 not in known.elements and -1 not in known.elements:
        # The target names the dimensions of the output; inference would see a -1.
        output.shape = ir.Shape(known.elements)
    if allow_zero:
        del node.attributes["allowzero"]
    name = names.fresh(f"{output.name}_shape")
    node.replace_input_with(1, new_constant(scope, np.array(shape, np.int64), name, before=node))
    return True
