"""Random graphs of layers and of what moves channels about, in any rank, with an open batch where seeds say so."""

from __future__ import annotations

import math
import random

import numpy as np
import onnx
from onnx import helper

#: sizes are numbers, or a number of batches: "N", "4*N"
Size = int | str
BATCH = 3
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def batches(size: Size) -> int:
    """What a size is a multiple of the batch by, or the number that it is."""
    return size if isinstance(size, int) else int(size.rpartition("*")[0] or 1)


def named(count: int, *, batch: bool) -> Size:
    return count if not batch else "N" if count == 1 else f"{count}*N"


class Maker:
    """A graph that grows step by step from ``x``, each step behind one of the last values."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.opset = self.pick.choice([11, 12, 13, 17, 18, 20])
        batch: Size = "N" if self.pick.random() < 0.5 else BATCH
        self.input: list[Size] = self.pick.choice([[batch, 6, 8], [batch, 4, 6, 4], [4, batch, 6], [batch, 8]])
        self.values: list[tuple[str, list[Size]]] = [("x", self.input)]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, data: object, dtype: type = np.int64) -> str:
        name = f"k{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.array(data, dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        scale = 1.3 / math.sqrt(max(1, math.prod(shape[1:])))
        return self.constant(self.numbers.standard_normal(shape) * scale, np.float32)

    def node(self, op: str, inputs: list[str], count: int = 1, **attributes: object) -> list[str]:
        outputs = [f"n{len(self.nodes)}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return outputs

    def add(self, op: str, inputs: list[str], shape: list[Size], **attributes: object) -> str:
        (name,) = self.node(op, inputs, **attributes)
        self.values.append((name, shape))
        return name

    def axis(self, axis: int, rank: int) -> int:
        return axis - rank if self.pick.random() < 0.4 else axis

    def target(self, old: list[Size], new: list[Size]) -> str:
        """The shape that a Reshape reads, some of it copied or left open, or computed from the input's batch."""
        open_ = [axis for axis, size in enumerate(new) if isinstance(size, str)]
        if open_ and self.pick.random() < 0.4:
            whole = next(((v, s.index("N")) for v, s in self.values if "N" in s), None)
            assert whole is not None
            (shape,) = self.node("Shape", [whole[0]])
            (batch,) = self.node("Gather", [shape, self.constant([whole[1]])])
            each = [
                self.node("Mul", [batch, self.constant([batches(size)])])[0]
                if isinstance(size, str)
                else self.constant([size])
                for size in new
            ]
            return self.node("Concat", each, axis=0)[0]
        written = [-1 if isinstance(size, str) else size for size in new]
        if not open_ and self.pick.random() < 0.4:
            written[self.pick.randrange(len(new))] = -1
        for axis, (before, after) in enumerate(zip(old, new, strict=False)):
            if before == after and self.pick.random() < 0.5:
                written[axis] = 0
        return self.constant(written)

    def reshaped(self, x: str, old: list[Size], new: list[Size]) -> str:
        return self.add("Reshape", [x, self.target(old, new)], new)

    # --- steps; each does nothing where it does not fit

    def dense(self, x: str, shape: list[Size]) -> None:
        if len(shape) > 1 and isinstance(shape[-1], int):
            out = self.pick.choice([4, 6, 8])
            y = self.add("MatMul", [x, self.weight(shape[-1], out)], [*shape[:-1], out])
            self.add("Add", [y, self.weight(out)], [*shape[:-1], out])

    def from_the_left(self, x: str, shape: list[Size]) -> None:
        if len(shape) > 1 and isinstance(shape[-2], int) and shape[-2] > 1:
            self.add("MatMul", [self.weight(4, shape[-2]), x], [*shape[:-2], 4, shape[-1]])

    def activation(self, x: str, shape: list[Size]) -> None:
        self.add(self.pick.choice(["Relu", "Tanh", "Softplus"]), [x], shape)

    def combined(self, x: str, shape: list[Size]) -> None:
        fitting = [
            v
            for v, other in self.values
            if len(other) <= len(shape) and all(a in (b, 1) for a, b in zip(other[::-1], shape[::-1], strict=False))
        ]
        self.add(self.pick.choice(["Add", "Mul"]), [x, self.pick.choice(fitting)], shape)

    def transpose(self, x: str, shape: list[Size]) -> None:
        order = self.pick.sample(range(len(shape)), len(shape))
        self.add("Transpose", [x], [shape[axis] for axis in order], perm=order)

    def reshape(self, x: str, shape: list[Size]) -> None:
        new = list(shape)
        for _ in range(self.pick.randint(1, 3)):
            at = self.pick.randrange(len(new))
            pair = new[at : at + 2]
            if self.pick.random() < 0.5 and len(pair) == 2 and not all(isinstance(size, str) for size in pair):
                new[at : at + 2] = [
                    named(batches(pair[0]) * batches(pair[1]), batch=any(isinstance(size, str) for size in pair))
                ]
            elif len(new) < 5:
                count = batches(new[at])
                factor = self.pick.choice([f for f in range(1, count + 1) if count % f == 0])
                parts = [factor, named(count // factor, batch=isinstance(new[at], str))]
                new[at : at + 1] = self.pick.sample(parts, 2)
        self.reshaped(x, shape, new)

    def concat(self, x: str, shape: list[Size]) -> None:
        at = self.pick.randrange(len(shape))
        fitting = [
            (v, other[at])
            for v, other in self.values
            if len(other) == len(shape) and [*other[:at], 0, *other[at + 1 :]] == [*shape[:at], 0, *shape[at + 1 :]]
        ]
        other, size = self.pick.choice(fitting)
        if isinstance(size, int) and isinstance(shape[at], int) and size + shape[at] < 30:
            wide = [*shape[:at], size + shape[at], *shape[at + 1 :]]
            self.add("Concat", self.pick.sample([x, other], 2), wide, axis=self.axis(at, len(shape)))

    def cuttable(self, shape: list[Size]) -> tuple[int, int] | None:
        found = [(axis, size) for axis, size in enumerate(shape) if isinstance(size, int) and size > 2]
        return self.pick.choice(found) if found else None

    def parted(self, x: str, shape: list[Size]) -> None:
        """Split, or a sequence that is read by number."""
        if (found := self.cuttable(shape)) is None:
            return
        at, size = found
        first = self.pick.randint(1, size - 1)
        sizes, axis = [first, size - first], self.axis(at, len(shape))
        if self.pick.random() < 0.5:
            given = {"split": sizes} if self.opset < 13 else {}
            parts = self.node("Split", [x] if given else [x, self.constant(sizes)], 2, axis=axis, **given)
        else:
            (sequence,) = self.node("SplitToSequence", [x, self.constant(sizes)], axis=axis)
            parts = [self.node("SequenceAt", [sequence, self.constant(i)])[0] for i in (0, -1)]
        for part, length in self.pick.sample([*zip(parts, sizes, strict=True)], 2):
            self.values.append((part, [*shape[:at], length, *shape[at + 1 :]]))

    def sliced(self, x: str, shape: list[Size]) -> None:
        if (found := self.cuttable(shape)) is None:
            return
        at, size = found
        first, last = sorted(self.pick.sample(range(size + 1), 2))
        step = self.pick.choice([1, 1, 2])
        bounds = [self.constant([n]) for n in (first, last, self.axis(at, len(shape)), step)]
        self.add("Slice", [x, *bounds], [*shape[:at], len(range(first, last, step)), *shape[at + 1 :]])

    def gathered(self, x: str, shape: list[Size]) -> None:
        if (found := self.cuttable(shape)) is None:
            return
        at, size = found
        rows = [self.pick.randrange(-size, size) for _ in range(self.pick.randint(1, size))]
        one = len(rows) == 1 and len(shape) > 1
        new = [*shape[:at], *([] if one else [len(rows)]), *shape[at + 1 :]]
        self.add("Gather", [x, self.constant(rows[0] if one else rows)], new, axis=self.axis(at, len(shape)))

    def padded(self, x: str, shape: list[Size]) -> None:
        if (found := self.cuttable(shape)) is not None and found[1] < 12:
            at, size = found
            pads = [0] * (2 * len(shape))
            pads[at], pads[at + len(shape)] = 1, 2
            self.add("Pad", [x, self.constant(pads)], [*shape[:at], size + 3, *shape[at + 1 :]])

    def reduced(self, x: str, shape: list[Size]) -> None:
        if len(shape) > 1:
            at, keep = self.pick.randrange(len(shape)), self.pick.randint(0, 1)
            new = [*shape[:at], *([1] if keep else []), *shape[at + 1 :]]
            given = {"axes": [at]} if self.opset < 18 else {}
            self.add("ReduceMax", [x] if given else [x, self.constant([at])], new, keepdims=keep, **given)

    def heads(self, x: str, shape: list[Size]) -> None:
        """Attention whose heads are merged with the batch."""
        if len(shape) != 3 or not isinstance(shape[1], int) or not isinstance(shape[2], int) or shape[2] % 2:
            return
        batch, steps, width = shape
        parted: list[Size] = [batch, steps, 2, width // 2]
        turned: list[Size] = [batch, 2, steps, width // 2]
        merged: list[Size] = [named(2 * batches(batch), batch=isinstance(batch, str)), steps, width // 2]
        made = []
        for _ in range(3):
            a = self.reshaped(self.add("MatMul", [x, self.weight(width, width)], shape), shape, parted)
            made.append(self.reshaped(self.add("Transpose", [a], turned, perm=[0, 2, 1, 3]), turned, merged))
        (keys,) = self.node("Transpose", [made[1]], perm=[0, 2, 1])
        (scores,) = self.node("MatMul", [made[0], keys])
        (shares,) = self.node("Softmax", [scores], axis=2)
        out = self.reshaped(self.add("MatMul", [shares, made[2]], merged), merged, turned)
        self.reshaped(self.add("Transpose", [out], parted, perm=[0, 2, 1, 3]), parted, shape)

    def recurrent(self, x: str, shape: list[Size]) -> None:
        if len(shape) != 3 or not isinstance(shape[2], int):
            return
        kind, ways, units = self.pick.choice([*GATES]), self.pick.randint(1, 2), self.pick.choice([4, 6])
        steps, batch, rows = shape[0], shape[1], GATES[kind] * units
        inputs = [x, self.weight(ways, rows, shape[2]), self.weight(ways, rows, units), self.weight(ways, 2 * rows), ""]
        if isinstance(steps, int) and isinstance(batch, int) and self.pick.random() < 0.4:
            inputs[4] = self.constant([self.pick.randint(1, steps) for _ in range(batch)], np.int32)
        states = [v for v, other in self.values if other == [ways, batch, units]]
        if states and self.pick.random() < 0.7:
            inputs.append(self.pick.choice(states))
        elif isinstance(batch, int) and self.pick.random() < 0.5:
            inputs.append(self.weight(ways, batch, units))
        direction = "bidirectional" if ways == 2 else "forward"
        out, last = self.node(kind, inputs, 2, hidden_size=units, direction=direction)
        self.values += [(out, [steps, ways, batch, units]), (last, [ways, batch, units])]
        turned = self.add("Transpose", [out], [steps, batch, ways, units], perm=[0, 2, 1, 3])
        self.add("Reshape", [turned, self.constant([0, 0, -1])], [steps, batch, ways * units])

    def model(self) -> onnx.ModelProto:
        """With the last value, one axis of it summed over if it has one, as the output."""
        name, shape = self.values[-1]
        at = next((axis for axis, size in enumerate(shape) if isinstance(size, int) and size > 1), None)
        if at is None or len(shape) < 2 or self.pick.random() < 0.2:
            self.nodes.append(helper.make_node("Relu", [name], ["y"]))
        else:
            order = [*(axis for axis in range(len(shape)) if axis != at), at]
            (turned,) = self.node("Transpose", [name], perm=order)
            self.nodes.append(helper.make_node("MatMul", [turned, self.weight(batches(shape[at]), 3)], ["y"]))
        x = helper.make_tensor_value_info("x", 1, self.input)
        y = helper.make_tensor_value_info("y", 1, [None] * len(shape))
        graph = helper.make_graph(self.nodes, "generated", [x], [y], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


STEPS = (
    *[Maker.dense] * 3, *[Maker.reshape] * 3, *[Maker.transpose] * 2, *[Maker.recurrent] * 2, Maker.from_the_left,
    Maker.activation, Maker.combined, Maker.concat, Maker.parted, Maker.sliced, Maker.gathered, Maker.padded,
    Maker.reduced, Maker.heads,
)  # fmt: skip


def generated(seed: int) -> onnx.ModelProto:
    """The graph of a seed: an input ``x``, whose batch may be ``N``, and an output ``y``."""
    maker = Maker(seed)
    maker.pick.choice([maker.dense, maker.from_the_left])("x", maker.input)
    for _ in range(maker.pick.randint(4, 12)):
        maker.pick.choice(STEPS)(maker, *maker.pick.choice(maker.values[-5:]))
    return maker.model()
