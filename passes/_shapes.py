"""Shape inference that never moves a weight: onnx's own, on a copy of the graph without its big tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
import onnx_ir as ir

from passes.base import PassFailed

#: tensors up to this many elements travel with the graph: shapes, axes, indices, repeats
_SMALL = 256


def skeleton(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.Value]]:
    """The model as a proto in which every big initializer of the main graph is a typed graph input instead.

    Returns:
        The proto, and the initializers that became inputs, by name. The model is as it was.
    """
    big = {
        name: value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.size > _SMALL
    }
    tensors = {name: value.const_value for name, value in big.items()}
    try:
        for value in big.values():
            value.const_value = ir.Tensor(np.empty(0, np.bool_), name=value.name)
        proto = ir.to_proto(model)
    finally:
        for name, value in big.items():
            value.const_value = tensors[name]
    small = [tensor for tensor in proto.graph.initializer if tensor.name not in big]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(small)
    listed = {value.name for value in proto.graph.input}
    for name, tensor in tensors.items():
        assert tensor is not None
        if name not in listed:
            shape = [d if isinstance(d, int) else None for d in tensor.shape]
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), shape))
    _forget_negative_dimensions(proto.graph)
    return proto, big


def inferred(model: ir.Model) -> onnx.ModelProto:
    """The model's ``skeleton`` with all types and shapes that onnx's inference can tell; the model is as it was.

    Raises:
        PassFailed: the graph contradicts itself.
    """
    proto, _ = skeleton(model)
    try:
        result = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        raise PassFailed(
            f"shape inference refuses the graph: {error}", hint="check the model with onnx.checker"
        ) from error
    if any(node.op_type == "SequenceAt" for node in result.graph.node):
        _forget_invented_names(result.graph, {dim.dim_param for dim in _dimensions(proto.graph)})
    return result


def infer_shapes(model: ir.Model) -> bool:
    """Fills in types and shapes that are unknown, of every value that onnx's inference can tell.

    What is known already stays as it is, inputs and outputs of the model included.

    Returns:
        Whether anything was filled in.

    Raises:
        PassFailed: the graph contradicts itself.
    """
    return _merge(model.graph, inferred(model).graph)


def _dimensions(graph: onnx.GraphProto) -> Iterator[onnx.TensorShapeProto.Dimension]:
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield from value.type.tensor_type.shape.dim


def _forget_negative_dimensions(graph: onnx.GraphProto) -> None:
    """Some exporters write -1 for a dimension that they do not know; onnx would calculate with it."""
    for dimension in _dimensions(graph):
        if dimension.dim_value < 0:
            dimension.ClearField("dim_value")


def _forget_invented_names(graph: onnx.GraphProto, known: set[str]) -> None:
    """onnx's inference gives all tensors of a sequence one name for a size that differs among them, and what is
    computed from them too. Runtimes reuse buffers by names."""
    for dimension in _dimensions(graph):
        if dimension.dim_param and dimension.dim_param not in known:
            dimension.ClearField("dim_param")


def _merge(graph: ir.Graph, proto: onnx.GraphProto) -> bool:
    infos = {info.name: info.type for info in proto.value_info}
    changed = False
    for node, node_proto in zip(graph, proto.node, strict=True):
        changed |= _fill(node.outputs, infos)
        for attribute in node_proto.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                changed |= _merge(node.attributes[attribute.name].as_graph(), attribute.g)
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                bodies = node.attributes[attribute.name].as_graphs()
                for body, body_proto in zip(bodies, attribute.graphs, strict=True):
                    changed |= _merge(body, body_proto)
    return changed


def _fill(values: Iterable[ir.Value], infos: dict[str, onnx.TypeProto]) -> bool:
    changed = False
    for value in values:
        info = infos.get(value.name or "")
        if info is None or value.is_graph_output():
            continue
        if value.type is None:
            value.type = ir.serde.deserialize_type_proto_for_type(info)
            changed |= value.type is not None
        shape = ir.serde.deserialize_type_proto_for_shape(info)
        if shape is None:
            continue
        if value.shape is None:
            value.shape = shape
            changed = True
        elif len(value.shape) == len(shape):
            for index, (old, new) in enumerate(zip(value.shape, shape, strict=True)):
                vague = not isinstance(old, int) and (isinstance(new, int) or old.value is None)
                if vague and old != new:
                    if value.shape.frozen:
                        value.shape = value.shape.copy()
                    value.shape[index] = new
                    changed = True
    return changed
