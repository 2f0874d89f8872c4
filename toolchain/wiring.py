"""What calibration has to know of a graph, and no more: names, wiring, types, and a few elements of every constant.

It comes from a model in memory or straight from a file. From a file it needs neither onnx_ir (sympy comes with that:
45 MB and a third of a second), nor all of onnx, nor the weights in memory: the wire format is walked over a memory map,
of a large initializer only the elements that the digest takes are read, and a runtime can map it from where it lies.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain.errors import GraphError
from toolchain.onnx_proto import onnx_proto

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

#: elements of a tensor that tell it from others
_TOLD = 256
#: initializers of fewer bytes are parsed with the graph
_SMALL = 4096
#: types whose elements lie in ``raw_data`` as numpy has them, by their number in TensorProto.DataType
_PLAIN = {
    1: "<f4", 2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "u1", 10: "<f2", 11: "<f8",
    12: "<u4", 13: "<u8", 16: "<u2",
}  # fmt: skip
#: the field of TensorProto that holds elements, where ``raw_data`` does not; else ``int32_data``, as bits if need be
_TYPED = {1: "float_data", 7: "int64_data", 11: "double_data", 12: "uint64_data", 13: "uint64_data"}
_BFLOAT16 = 16
_PROTO = onnx_proto()


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    """A tensor that never changes.

    Attributes:
        dtype: as ONNX names it, such as "FLOAT".
        shape: its sizes.
        some: 256 elements spread over it, or all of fewer, as hex; of strings their repr.
        scalar: the one element where there is one and it is a number, else None.
    """

    dtype: str
    shape: tuple[int, ...]
    some: str
    scalar: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """An attribute whose value is that of the enclosing function's attribute of this name."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Op:
    """A node.

    Attributes:
        op_type, domain: ONNX's own domain is "".
        inputs, outputs: names; None or "" where one is left out.
        attributes: numbers, text, tuples of those, Constant or Reference. Without subgraphs.
    """

    op_type: str
    domain: str
    inputs: tuple[str | None, ...]
    outputs: tuple[str | None, ...]
    attributes: Mapping[str, Any]

    def is_a(self, *op_types: str) -> bool:
        """Whether it is one of these ops of ONNX's own."""
        return not self.domain and self.op_type in op_types

    def given(self, index: int) -> str | None:
        """The input at ``index``; None where it is left out, either way of leaving it out."""
        return (self.inputs[index] if index < len(self.inputs) else None) or None


@dataclasses.dataclass(frozen=True)
class Wiring:
    """A main graph.

    Attributes:
        name: the graph's.
        inputs, outputs: names, in order; initializers that are inputs too included.
        nodes: those of the main graph, in order.
        nested: those of its subgraphs, each after the node that holds it, together with ``nodes``.
        nested_outputs: what subgraphs return.
        dtypes: of a value that is known to be a tensor its dtype, as ONNX names it.
        initializers: of the main graph.
        unranked: inputs that say nothing of their shape.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Op, ...]
    nested: tuple[Op, ...]
    nested_outputs: frozenset[str]
    dtypes: Mapping[str, str]
    initializers: Mapping[str, Constant]
    unranked: frozenset[str]

    @functools.cached_property
    def readers(self) -> Mapping[str, Sequence[Op]]:
        """The nodes that read a value, subgraphs' too; a node that reads it twice stands there twice."""
        found: dict[str, list[Op]] = {}
        for node in self.nested:
            for name in node.inputs:
                if name:
                    found.setdefault(name, []).append(node)
        return found

    @functools.cached_property
    def producers(self) -> Mapping[str, Op]:
        """The main graph's node that computes a value."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    def only_reader(self, name: str) -> Op | None:
        """The one node that reads the value, if it is read once and is no output of a graph."""
        readers = self.readers.get(name, ())
        kept = name in self.outputs or name in self.nested_outputs
        return readers[0] if len(readers) == 1 and not kept else None

    def is_constant(self, name: str | None) -> bool:
        """Whether the value always is one tensor. A default that the caller may override is none."""
        node = self.producers.get(name or "")
        if node is None:
            return name in self.initializers and name not in self.inputs
        return (
            node.is_a("Constant")
            and node.attributes.keys() <= {"value", "value_int", "value_ints", "value_float", "value_floats"}
            and not any(isinstance(value, Reference) for value in node.attributes.values())
        )

    def scalar(self, name: str | None) -> float | None:
        """The one element of a constant number, or None."""
        if name is None or not self.is_constant(name):
            return None
        node = self.producers.get(name)
        if node is None:
            return self.initializers[name].scalar
        (value,) = node.attributes.values()
        if isinstance(value, Constant):
            return value.scalar
        values = value if isinstance(value, tuple) else (value,)
        return float(values[0]) if len(values) == 1 else None


def wiring_of(model: ir.Model) -> Wiring:
    """The wiring of a graph in memory."""
    import onnx_ir as ir

    def constant(tensor: ir.TensorProtocol) -> Constant:
        return _constant(tensor.dtype.name, tensor.numpy())

    def value_of(attribute: ir.Attr) -> Any:
        if attribute.is_ref():
            return Reference(str(attribute.ref_attr_name))
        if attribute.type == ir.AttributeType.TENSOR:
            return constant(attribute.as_tensor())
        return tuple(attribute.value) if isinstance(attribute.value, list | tuple) else attribute.value

    subgraphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    made: dict[ir.Node, Op] = {}
    nested_outputs: set[str] = set()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        kept = {name: a for name, a in node.attributes.items() if a.is_ref() or a.type not in subgraphs}
        made[node] = Op(
            node.op_type,
            "" if node.domain == "ai.onnx" else node.domain,
            tuple(None if v is None else v.name for v in node.inputs),
            tuple(v.name for v in node.outputs),
            {name: value_of(attribute) for name, attribute in kept.items()},
        )
        if node.graph is not model.graph and node.graph is not None:
            nested_outputs |= {v.name or "" for v in node.graph.outputs}
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    return Wiring(
        name=model.graph.name or "",
        inputs=tuple(str(v.name) for v in model.graph.inputs),
        outputs=tuple(str(v.name) for v in model.graph.outputs),
        nodes=tuple(made[node] for node in model.graph),
        nested=tuple(made.values()),
        nested_outputs=frozenset(nested_outputs),
        dtypes={v.name: v.dtype.name for v in values if v.name and v.dtype is not None},
        initializers={
            name: constant(value.const_value)
            for name, value in model.graph.initializers.items()
            if value.const_value is not None
        },
        unranked=frozenset(str(v.name) for v in model.graph.inputs if v.shape is None),
    )


def read_wiring(path: Path) -> tuple[Wiring, onnx.ModelProto] | None:
    """The wiring of a file that is known to be sound, as ``read_onnx`` makes sure, and its graph.

    Returns:
        With the wiring the model, whose large initializers are external data: where they lie in this very file. None
        for what only the whole reader understands: external data already, functions, sparse tensors, types of elements
        that numpy lacks.

    Raises:
        GraphError: types that the file does not record cannot be found.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _File(data, path.name).read()
        except _Unusual:
            return None


class _Unusual(Exception):
    """Something in a file that is not read here."""


class _File:
    """An ONNX file, mapped."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self._data = data
        self._name = name
        self._weights: dict[str, Constant] = {}
        self._large: list[onnx.TensorProto] = []
        self._nested_outputs: set[str] = set()

    def read(self) -> tuple[Wiring, onnx.ModelProto]:
        model = self._skeleton()
        graph = model.graph
        if model.functions or graph.sparse_initializer or model.training_info:
            raise _Unusual
        for tensor in graph.initializer:
            self._weights[tensor.name] = _of_proto(tensor)
        nodes = [self._op(node) for node in graph.node]
        nested = [op for ops in nodes for op in ops]
        wiring = Wiring(
            name=graph.name,
            inputs=tuple(value.name for value in graph.input),
            outputs=tuple(value.name for value in graph.output),
            nodes=tuple(ops[0] for ops in nodes),
            nested=tuple(nested),
            nested_outputs=frozenset(self._nested_outputs),
            dtypes=self._dtypes(model),
            initializers=self._weights,
            unranked=frozenset(v.name for v in graph.input if not v.type.tensor_type.HasField("shape")),
        )
        graph.initializer.extend(self._large)
        return wiring, model

    def _skeleton(self) -> onnx.ModelProto:
        """The model without its large initializers, which go to ``_large`` and ``_weights``."""
        data, model, graph = self._data, bytearray(), bytearray()
        for number, tag, start, stop in self._fields(0, len(data)):
            if number != 7:
                model += data[tag:stop]
                continue
            for inner, inner_tag, first, last in self._fields(start, stop):
                if inner == 5 and last - first >= _SMALL:
                    self._weight(first, last)
                else:
                    graph += data[inner_tag:last]
        found: onnx.ModelProto = _PROTO.ModelProto.FromString(bytes(model))
        found.graph.MergeFromString(bytes(graph))
        return found

    def _fields(self, at: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Field number, where its tag begins, and where its content does and ends."""
        while at < stop:
            tag_at = at
            tag, at = self._varint(at)
            match tag & 7:
                case 0:
                    _, end = self._varint(at)
                case 1:
                    end = at + 8
                case 2:
                    size, at = self._varint(at)
                    end = at + size
                case 5:
                    end = at + 4
                case _:
                    raise _Unusual
            yield tag >> 3, tag_at, at, end
            at = end

    def _varint(self, at: int) -> tuple[int, int]:
        value = shift = 0
        while (byte := self._data[at]) > 127:
            value |= (byte & 127) << shift
            shift, at = shift + 7, at + 1
        return value | byte << shift, at + 1

    def _weight(self, start: int, stop: int) -> None:
        """A large initializer: its header, and some elements."""
        header, raw = bytearray(), None
        for number, tag, first, last in self._fields(start, stop):
            if number == 9:
                raw = (first, last)
            elif last - tag < _SMALL:
                header += self._data[tag:last]
            else:
                raise _Unusual  # elements in a field of their type
        tensor = _PROTO.TensorProto.FromString(bytes(header))
        kind = _PLAIN.get(tensor.data_type)
        if raw is None or kind is None or tensor.external_data or tensor.HasField("segment"):
            raise _Unusual
        count = math.prod(tensor.dims)
        if count * np.dtype(kind).itemsize != raw[1] - raw[0]:
            raise _Unusual
        elements = np.frombuffer(self._data, kind, count, raw[0])
        shape = tuple(tensor.dims)
        self._weights[tensor.name] = Constant(_type_name(tensor.data_type), shape, _some(elements), None)
        tensor.data_location = tensor.EXTERNAL
        for key, value in (("location", self._name), ("offset", raw[0]), ("length", raw[1] - raw[0])):
            tensor.external_data.add(key=key, value=str(value))
        self._large.append(tensor)

    def _op(self, node: onnx.NodeProto) -> list[Op]:
        """The node, then those of its subgraphs."""
        kinds = _PROTO.AttributeProto
        attributes: dict[str, Any] = {}
        inner: list[Op] = []
        for attribute in node.attribute:
            name, kind = attribute.name, attribute.type
            if attribute.ref_attr_name:
                raise _Unusual
            if kind in (kinds.GRAPH, kinds.GRAPHS):
                for graph in [attribute.g] if kind == kinds.GRAPH else attribute.graphs:
                    self._nested_outputs |= {value.name for value in graph.output}
                    inner += [op for each in graph.node for op in self._op(each)]
            elif kind == kinds.TENSOR:
                attributes[name] = _of_proto(attribute.t)
            elif kind == kinds.INT:
                attributes[name] = attribute.i
            elif kind == kinds.FLOAT:
                attributes[name] = attribute.f
            elif kind == kinds.STRING:
                attributes[name] = _text(attribute.s)
            elif kind == kinds.INTS:
                attributes[name] = tuple(attribute.ints)
            elif kind == kinds.FLOATS:
                attributes[name] = tuple(attribute.floats)
            elif kind == kinds.STRINGS:
                attributes[name] = tuple(map(_text, attribute.strings))
            else:
                raise _Unusual
        domain = "" if node.domain == "ai.onnx" else node.domain
        # the whole reader knows an input that is left out as None, an output as ""
        inputs = tuple(name or None for name in node.input)
        return [Op(node.op_type, domain, inputs, tuple(node.output), attributes), *inner]

    def _dtypes(self, model: onnx.ModelProto) -> dict[str, str]:
        """Recorded types; where one is missing, inferred ones."""
        graph = model.graph

        def recorded(of: onnx.GraphProto) -> dict[str, str]:
            infos = [*of.input, *of.value_info, *of.output]
            found = {info.name: info.type.tensor_type.elem_type for info in infos}
            return {name: _type_name(number) for name, number in found.items() if number}

        known = recorded(graph)
        if all(name in known for node in graph.node for name in node.output if name):
            return known
        import onnx

        typed = onnx.ModelProto()
        typed.CopyFrom(model)
        listed = {value.name for value in graph.input}
        for tensor in self._large:
            if tensor.name not in listed:
                typed.graph.input.append(
                    onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
                )
        try:
            inferred = onnx.shape_inference.infer_shapes(typed, check_type=False, strict_mode=False, data_prop=True)
        except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
            raise GraphError(
                f"the types of its values cannot be found: {error}", hint="check the model with onnx.checker"
            ) from error
        return {**recorded(inferred.graph), **known}


def _of_proto(tensor: onnx.TensorProto) -> Constant:
    if tensor.external_data or tensor.HasField("segment"):
        raise _Unusual
    kind = _PLAIN.get(tensor.data_type)
    if kind is None:
        raise _Unusual
    if tensor.HasField("raw_data"):
        elements = np.frombuffer(tensor.raw_data, kind)
    elif tensor.data_type in _TYPED:
        elements = np.array(getattr(tensor, _TYPED[tensor.data_type]), kind)
    else:
        bits = f"<i{np.dtype(kind).itemsize}"
        elements = np.array(tensor.int32_data, "<i4").astype(bits).view(kind)
    if elements.size != math.prod(tensor.dims):
        raise _Unusual
    found = _constant(_type_name(tensor.data_type), elements.reshape(tuple(tensor.dims)))
    if tensor.data_type == _BFLOAT16 and elements.size == 1:
        number = (elements.astype("<u4") << 16).view("<f4")
        return dataclasses.replace(found, scalar=float(number[0]))
    return found


def _constant(dtype: str, array: np.ndarray) -> Constant:
    number = array.size == 1 and array.dtype.kind != "O"
    scalar = float(array.reshape(-1)[0]) if number else None
    return Constant(dtype, tuple(array.shape), _some(array.reshape(-1)), scalar)


def _some(elements: np.ndarray) -> str:
    some = elements[:: max(1, math.ceil(elements.size / _TOLD))]
    return repr(some.tolist()) if some.dtype == object else some.tobytes().hex()


def _type_name(number: int) -> str:
    return str(_PROTO.TensorProto.DataType.Name(number))


def _text(encoded: bytes) -> str:
    try:
        return encoded.decode()
    except UnicodeDecodeError:
        raise _Unusual from None
