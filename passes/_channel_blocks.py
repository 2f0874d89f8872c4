"""Residual blocks: ``y = x + F(x)``, where F(x) can be taken out as a whole (Veit et al. 2016, arXiv 1605.06431).

That is so where all that F computes with is x and constants, nothing else reads what is inside, and x has the shape of
y, so that x can stand in for it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from passes._graph import (
    FLOATS,
    Names,
    Scope,
    constant,
    default_opset,
    is_op,
    new_constant,
    remove,
    replace,
    same_shape,
)
from passes.base import PassFailed, label


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Block:
    """A residual block.

    Attributes:
        name: label of the Add that ends it.
        layers: labels of its nodes with weights, in the order of the graph.
        end: the Add.
        side: which input of the Add is x.
        nodes: all that go with it, the last first, the Add not among them.
    """

    name: str
    layers: tuple[str, ...]
    end: ir.Node
    side: int
    nodes: tuple[ir.Node, ...]

    @property
    def shortcut(self) -> ir.Value:
        """x, as it is now: where it is the sum of a block that was taken out, it is what that one read."""
        value = self.end.inputs[self.side]
        assert value is not None
        return value


def find_blocks(model: ir.Model) -> tuple[Block, ...]:
    """The residual blocks of the main graph that can be taken out; each alone, for one may lie inside another."""
    order = {node: index for index, node in enumerate(model.graph)}
    found = []
    for node in model.graph:
        if not is_op(node, "Add") or len(node.inputs) != 2 or node.outputs[0].is_graph_output():
            continue
        for index in (0, 1):
            shortcut, branch = node.inputs[index], node.inputs[1 - index]
            if shortcut is None or branch is None or constant(shortcut) is not None:
                continue
            nodes = _inside(node, branch, shortcut, order)
            if nodes and same_shape(shortcut, node.outputs[0]) and branch.dtype in FLOATS:
                ordered = sorted(nodes, key=order.__getitem__)
                weighted = [n for n in ordered if is_op(n, "Conv", "ConvTranspose", "Gemm", "MatMul")]
                if weighted:
                    layers = tuple(label(n) for n in weighted)
                    found.append(Block(label(node), layers, node, index, tuple(reversed(ordered))))
                    break
    return tuple(found)


def _inside(end: ir.Node, branch: ir.Value, shortcut: ir.Value, order: dict[ir.Node, int]) -> set[ir.Node] | None:
    """The nodes between the shortcut and the branch; None if anything else goes in or out."""
    nodes: set[ir.Node] = set()
    pending, reached = [branch], False
    while pending:
        value = pending.pop()
        producer = value.producer()
        if value is shortcut:
            reached = True
        elif constant(value) is not None or (producer is not None and producer in nodes):
            continue
        elif (
            producer is None
            or producer not in order
            or any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in producer.attributes.values())
        ):
            return None
        else:
            nodes.add(producer)
            pending.extend(each for each in producer.inputs if each is not None)
    inside = all(
        not output.is_graph_output() and all(use.node in nodes or use.node is end for use in output.uses())
        for node in nodes
        for output in node.outputs
    )
    return nodes if reached and inside else None


def named(model: ir.Model, names: Sequence[str]) -> list[Block]:
    """The blocks of these names. Raises PassFailed where there is none."""
    if not names:
        return []
    known = {block.name: block for block in find_blocks(model)}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            there = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known) or 'none'}"
            raise PassFailed(f"no residual block ends in {name!r} that could be taken out", hint=there)
    chosen = [known[name] for name in dict.fromkeys(names)]
    # One that lies in another goes with it.
    return [a for a in chosen if not any(a.end in b.nodes for b in chosen)]


def drop(block: Block) -> None:
    """Takes the block out: what read its sum reads the shortcut."""
    replace(block.end.outputs[0], block.shortcut)
    for node in (block.end, *block.nodes):
        remove(node)


def silence(model: ir.Model, block: Block) -> None:
    """Multiplies the block's own part of the sum by zero."""
    index = 1 - block.side
    branch = block.end.inputs[index]
    assert branch is not None
    assert branch.dtype is not None
    names = Names(model)
    scope = Scope(model.graph, default_opset(model.opset_imports), False)
    zero = new_constant(scope, np.zeros((), branch.dtype.numpy()), names.fresh(f"{branch.name}_zero"), before=block.end)
    node = ir.Node("", "Mul", [branch, zero], name=names.fresh(f"{branch.name}_silence"))
    node.outputs[0].name = names.fresh(f"{branch.name}_silenced")
    model.graph.insert_before(block.end, node)
    block.end.replace_input_with(index, node.outputs[0])
