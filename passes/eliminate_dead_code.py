"""Removes what no output depends on: nodes, initializers, functions, optional outputs, opset imports.

A value that only a subgraph reads is in use. Graph inputs stay, used or not, and so do initializers
that are graph inputs: they are the model's signature.
"""

from __future__ import annotations

import dataclasses

import onnx
import onnx_ir as ir

from passes._graph import Scope, is_op, remove, scopes
from passes.base import Declined, Outcome, Pass, graphs, label

#: domains whose operators have no effect beside their outputs
_PURE_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})


@dataclasses.dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Removes unused nodes, initializers, functions, trailing optional outputs and opset imports.

    Nodes of an operator library that we do not know are kept: they may do more than compute.
    """

    def call(self, model: ir.Model) -> Outcome:
        fired = 0
        declined: list[Declined] = []
        # Innermost graphs first: what only a dead subgraph node read is then dead in the graph around it.
        # One more round catches what a removed If or Loop had captured from graphs already visited.
        while True:
            removed = 0
            declined = []
            for scope in reversed(list(scopes(model))):
                removed += _remove_nodes(model, scope, declined)
            fired += removed
            if not removed:
                break
        for scope in scopes(model):
            fired += _remove_initializers(scope.graph)
        fired += _remove_functions(model)
        fired += _remove_imports(model)
        return Outcome(model, modified=fired > 0, fired=fired, declined=tuple(declined))


def _remove_nodes(model: ir.Model, scope: Scope, declined: list[Declined]) -> int:
    removed = 0
    for node in reversed(list(scope.graph)):
        if any(v.uses() or v.is_graph_output() for v in node.outputs):
            removed += _drop_outputs(node, scope.opset)
        elif node.domain in _PURE_DOMAINS or node.op_identifier() in model.functions:
            remove(node)
            removed += 1
        else:
            declined.append(Declined(label(node), f"unused, but {node.domain}::{node.op_type} may have effects"))
    return removed


def _drop_outputs(node: ir.Node, opset: int) -> int:
    """Drops trailing optional outputs that nobody reads, such as MaxPool's indices."""
    last = node.outputs[-1]
    # The number of outputs of BatchNormalization before opset 14 says whether it is in training mode.
    if len(node.outputs) == 1 or last.uses() or last.is_graph_output() or is_op(node, "BatchNormalization"):
        return 0
    if node.domain not in ("", "ai.onnx"):
        return 0
    try:
        formal = onnx.defs.get_schema(node.op_type, opset, "").outputs
    except onnx.defs.SchemaError:
        return 0
    count = len(node.outputs)
    if count > len(formal):  # variadic: Split, Loop, ...
        return 0
    while count > 1 and formal[count - 1].option == onnx.defs.OpSchema.FormalParameterOption.Optional:
        if node.outputs[count - 1].uses() or node.outputs[count - 1].is_graph_output():
            break
        count -= 1
    dropped = len(node.outputs) - count
    if dropped:
        node.resize_outputs(count)
    return dropped


def _remove_initializers(graph: ir.Graph) -> int:
    unused = [
        name
        for name, value in graph.initializers.items()
        if not (value.uses() or value.is_graph_output() or value.is_graph_input())
    ]
    for name in unused:
        del graph.initializers[name]
    return len(unused)


def _remove_functions(model: ir.Model) -> int:
    used: set[ir.OperatorIdentifier] = set()
    waiting: list[ir.Graph | ir.Function] = [model.graph]
    while waiting:
        for node in ir.traversal.RecursiveGraphIterator(waiting.pop()):
            key = node.op_identifier()
            if key in model.functions and key not in used:
                used.add(key)
                waiting.append(model.functions[key])
    unused = [key for key in model.functions if key not in used]
    for key in unused:
        del model.functions[key]
    return len(unused)


def _remove_imports(model: ir.Model) -> int:
    # The default domain stays: a model must import something, and the passes after this one add ops of it.
    removed = 0
    everywhere = {node.domain for top in graphs(model) for node in top}
    for function in model.functions.values():
        used = {node.domain for node in ir.traversal.RecursiveGraphIterator(function)}
        removed += _prune(function.opset_imports, used)
        # Calling a function needs an import of its domain; what its body imports must be importable outside.
        everywhere |= {function.domain, *function.opset_imports}
    return removed + _prune(model.opset_imports, everywhere)


def _prune(imports: dict[str, int], used: set[str]) -> int:
    unused = [domain for domain in imports if domain not in used and domain not in ("", "ai.onnx")]
    for domain in unused:
        del imports[domain]
    return len(unused)
