"""What is known of the elements of a small int64 or int32 tensor, such as a shape on its way into Reshape.

A tensor of rank 0 or 1 is described by a tuple with one entry an element: an int where it is known, the
name of a symbolic dimension where it is one (equal names are equal sizes), None where nothing is known.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from passes._graph import attribute_int, attribute_ints, constant, dims, given, integers

Element = int | str | None
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """The elements of an int64 or int32 tensor of rank 0 (then there is one) or 1."""

    elements: tuple[Element, ...]
    rank: int
    dtype: ir.DataType = ir.DataType.INT64

    def known(self) -> tuple[int, ...] | None:
        """All elements, if every one is a number."""
        numbers = tuple(e for e in self.elements if isinstance(e, int))
        return numbers if len(numbers) == len(self.elements) else None


class ContentsOf:
    """Looks up and derives contents. Nodes are shown to ``visit`` in topological order."""

    def __init__(self) -> None:
        self._known: dict[ir.Value, Contents] = {}

    def __call__(self, value: ir.Value | None) -> Contents | None:
        if value is None:
            return None
        tensor = constant(value)
        if tensor is None:
            return self._known.get(value)
        numbers = integers(value) if tensor.dtype in _INTEGERS else None
        return None if numbers is None else Contents(numbers, len(tensor.shape), tensor.dtype)

    def visit(self, node: ir.Node, opset: int) -> None:
        """Derives the contents of the node's output from those of its inputs, if its op has a rule."""
        derived = self._derive(node, opset)
        if derived is not None and len(node.outputs) >= 1:
            self._known[node.outputs[0]] = derived

    def _derive(self, node: ir.Node, opset: int) -> Contents | None:
        first = given(node, 0)
        if node.op_type == "Shape":
            return shape_slice(node)
        known = self(first)
        if known is None and node.op_type != "Concat":
            return None
        match node.op_type:
            case "Identity" | "Abs":
                # Sizes are never negative, so Abs leaves names as they are.
                assert known is not None
                return known if node.op_type == "Identity" or _no_negative(known) else None
            case "Cast" if known is not None and attribute_int(node, "to", 0) in _INTEGERS:
                to = ir.DataType(node.attributes["to"].as_int())
                # A dimension of 2^31 or more is more elements than any runtime takes.
                fits = all(_fits(e, to) for e in known.elements if isinstance(e, int))
                return Contents(known.elements, known.rank, to) if fits else None
            case "Squeeze" if known is not None and len(known.elements) == 1:
                return (
                    Contents(known.elements, 0, known.dtype)
                    if known.rank == 1 and _axes(node, opset) in (None, (0,), (-1,))
                    else None
                )
            case "Unsqueeze" if known is not None and known.rank == 0 and _axes(node, opset) in ((0,), (-1,)):
                return Contents(known.elements, 1, known.dtype)
            case "Reshape" if known is not None:
                target = integers(given(node, 1))
                if target in ((-1,), (len(known.elements),)):
                    return Contents(known.elements, 1, known.dtype)
                return Contents(known.elements, 0, known.dtype) if target == () else None
            case "Concat":
                return self._concat(node)
            case "Gather" if known is not None and known.rank == 1:
                return self._gather(node, known)
            case "Slice" if known is not None and known.rank == 1:
                return self._slice(node, known, opset)
            case "Add" | "Sub" | "Mul" | "Div" if known is not None:
                return self._arithmetic(node, known)
        return None

    def _concat(self, node: ir.Node) -> Contents | None:
        parts = [self(value) for value in node.inputs]
        if attribute_int(node, "axis", 0) not in (0, -1):
            return None
        elements: list[Element] = []
        dtype = next((part.dtype for part in parts if part is not None), ir.DataType.INT64)
        for part, value in zip(parts, node.inputs, strict=True):
            if part is not None:
                if part.rank != 1:
                    return None
                elements.extend(part.elements)
                continue
            # Nothing is known of this part's elements; its length may be.
            shape = dims(value)
            if shape is None or len(shape) != 1 or not isinstance(shape[0], int) or shape[0] > 64:
                return None
            elements.extend([None] * shape[0])
        return Contents(tuple(elements), 1, dtype)

    def _gather(self, node: ir.Node, known: Contents) -> Contents | None:
        tensor = constant(given(node, 1))
        indices = integers(given(node, 1))
        count = len(known.elements)
        if tensor is None or indices is None or any(not -count <= i < count for i in indices):
            return None
        return Contents(tuple(known.elements[i] for i in indices), len(tensor.shape), known.dtype)

    def _slice(self, node: ir.Node, known: Contents, opset: int) -> Contents | None:
        if opset < 10:
            starts, ends = attribute_ints(node, "starts"), attribute_ints(node, "ends")
            steps: tuple[int, ...] | None = (1,)
        else:
            starts, ends = integers(given(node, 1)), integers(given(node, 2))
            steps = (1,) if given(node, 4) is None else integers(given(node, 4))
        if starts is None or ends is None or steps is None or not len(starts) == len(ends) == len(steps) == 1:
            return None
        if steps[0] == 0:
            return None
        start, end, step = starts[0], ends[0], steps[0]
        count = len(known.elements)
        if step < 0:
            # Going down ONNX clamps to [-1, count - 1]; in Python's slices -1 would be the last element.
            start = min(start + count if start < 0 else start, count - 1)
            end = max(end + count if end < 0 else end, -1)
            kept = tuple(known.elements[i] for i in range(start, end, step) if i >= 0)
            return Contents(kept, 1, known.dtype)
        return Contents(known.elements[start:end:step], 1, known.dtype)

    def _arithmetic(self, node: ir.Node, left: Contents) -> Contents | None:
        right = self(given(node, 1))
        if right is None or not (
            len(left.elements) == len(right.elements) or 1 in (len(left.elements), len(right.elements))
        ):
            return None
        count = max(len(left.elements), len(right.elements))
        a = left.elements * (count if len(left.elements) == 1 else 1)
        b = right.elements * (count if len(right.elements) == 1 else 1)
        result = tuple(_combine(node.op_type, x, y, left.dtype) for x, y in zip(a, b, strict=True))
        return Contents(result, max(left.rank, right.rank), left.dtype)


def shape_slice(node: ir.Node) -> Contents | None:
    """What Shape gives: the dimensions of its input from ``start`` to ``end`` (opset 15), as far as known."""
    shape = dims(node.inputs[0])
    start = attribute_int(node, "start", 0)
    if shape is None or start is None:
        return None
    end = attribute_int(node, "end", len(shape))
    return None if end is None else Contents(tuple(shape[start:end]), 1)


def _combine(op_type: str, a: Element, b: Element, dtype: ir.DataType) -> Element:
    if op_type == "Mul" and a == 1:
        return b
    if op_type in ("Mul", "Div") and b == 1:
        return a
    if op_type == "Add" and a == 0:
        return b
    if op_type in ("Add", "Sub") and b == 0:
        return a
    if not isinstance(a, int) or not isinstance(b, int):
        return None
    if op_type == "Add":
        result = a + b
    elif op_type == "Sub":
        result = a - b
    elif op_type == "Mul":
        result = a * b
    elif b == 0:
        return None
    else:
        result = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return result if _fits(result, dtype) else None


def _fits(number: int, dtype: ir.DataType) -> bool:
    limit = 1 << (dtype.bitwidth - 1)
    return -limit <= number < limit


def _no_negative(contents: Contents) -> bool:
    return all(isinstance(e, str) or (isinstance(e, int) and e >= 0) for e in contents.elements)


def _axes(node: ir.Node, opset: int) -> tuple[int, ...] | None:
    if opset < 13:
        return attribute_ints(node, "axes")
    return None if given(node, 1) is None else integers(given(node, 1))
