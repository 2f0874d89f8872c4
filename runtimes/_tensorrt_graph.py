"""What TensorRT says of a graph: which nodes it takes, which not, and what avoids those."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtimes._tensorrt_api import Api
from runtimes.base import CompileFailed
from runtimes.model_file import ModelFile, check_model_file

#: ONNX's number of an element type -> TensorRT's name of it, for what goes in and out of an engine.
_TYPES = {
    1: "FLOAT",
    2: "UINT8",
    3: "INT8",
    6: "INT32",
    7: "INT64",
    9: "BOOL",
    10: "HALF",
    16: "BF16",
    17: "FP8",
    22: "INT4",
    23: "FP4",
}
_DOUBLE = 11
#: The others, for messages.
_OTHER_TYPES = {
    0: "of no type",
    4: "uint16",
    5: "int16",
    8: "string",
    _DOUBLE: "float64",
    12: "uint32",
    13: "uint64",
    14: "complex64",
    15: "complex128",
}
#: "While parsing node number 1 [FooBar -> "y"]:", the only place that has an output where a node has no name
_MEANING = re.compile(r'&& "([^"]+)"\.?$|^[^"]*[()&=<>!][^" ]*: ([A-Z].*)$')
_PARSING = re.compile(r'While parsing node number (\d+) \[(\S+) -> "([^"]*)"')


@dataclasses.dataclass(frozen=True, slots=True)
class Unsupported:
    """A node, or an input or output, that TensorRT does not take.

    Attributes:
        node: its name, or ``Op -> first output`` where it has none.
        op: the operator; "" for an input or output of the graph.
        reason: why, for a person.
        advice: what avoids it. None where nothing is known.
    """

    node: str
    op: str
    reason: str
    advice: str | None = None

    def __str__(self) -> str:
        return f"{self.node}{f' ({self.op})' if self.op and self.op not in self.node else ''}: {self.reason}"


@dataclasses.dataclass(frozen=True, slots=True)
class NetworkReport:
    """What TensorRT says of a graph before anything is built.

    Attributes:
        target: the runtime that was asked.
        version: of it.
        accepted: whether it takes all of the graph.
        supported: how many nodes at the top level it takes.
        parts: into how many pieces the others cut those.
        unsupported: the others, inside functions and branches too, and why.
    """

    target: str
    version: str
    accepted: bool
    supported: int
    parts: int
    unsupported: tuple[Unsupported, ...]


def inspect_graph(api: Api, model: Path) -> NetworkReport:
    """Asks TensorRT which nodes of a graph it takes, without building anything or needing a GPU.

    Raises:
        InvalidModel: the file is no ONNX model.
    """
    flavor = api.flavor
    if foreign := foreign_types(check_model_file(model)):
        # the parser gives up at the first of these and says nothing of the nodes
        return NetworkReport(flavor.target, api.version, False, 0, 0, foreign)
    logger = api.logger()
    builder = api.trt.Builder(logger)
    network = builder.create_network(api.network_flags())
    parser = api.trt.OnnxParser(network, logger)
    accepted = parser.supports_model_v2(model.read_bytes(), str(model))
    # each holds nodes that are supported; they are marked as such only where all of the graph is
    parts = [len(parser.get_subgraph_nodes(i)) for i in range(parser.num_subgraphs)]
    unsupported = () if accepted else parser_errors(api, parser, logger)
    return NetworkReport(flavor.target, api.version, accepted, sum(parts), len(parts), unsupported)


def foreign_types(checked: ModelFile) -> tuple[Unsupported, ...]:
    """Inputs and outputs of a type that no engine takes or gives."""
    return tuple(
        Unsupported(
            name,
            "",
            f"it is {_OTHER_TYPES.get(number, f'of element type {number}')}, which no engine takes or gives",
            "cast it in the graph, or outside of it",
        )
        for name, number in checked.element_types.items()
        if number not in _TYPES and number != _DOUBLE
    )


def check_types(api: Api, network: Any, checked: ModelFile, model: Path) -> None:
    """TensorRT takes float64 for float32 without a word: then a caller's arrays would be refused, or misread."""
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    changed = []
    for tensor in tensors:
        number = checked.element_types.get(tensor.name)
        became = tensor.dtype.name
        readable = "float32" if became == "FLOAT" else became
        if number is not None and _TYPES.get(number) != became:
            was = _OTHER_TYPES.get(number) or _TYPES[number]
            reason = f"it is {was} in the graph, and {api.flavor.title} would make it {readable}"
            changed.append(Unsupported(tensor.name, "", reason, f"export the model with {readable} in its place"))
    if changed:
        raise not_supported(api, model, changed)


#: Operators of ONNX Runtime's own optimiser and CPU kernels, and ONNX's integer operators without Q/DQ.
_OF_ORT = frozenset(
    (
        *("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QLinearAdd"),
        *("QLinearMul", "QGemm", "QLinearConcat", "QLinearGlobalAveragePool", "QLinearSigmoid", "QAttention"),
        *("FusedConv", "FusedMatMul", "FusedGemm", "NhwcFusedConv", "SkipLayerNormalization", "BiasGelu"),
        *("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "EmbedLayerNormalization", "ReorderInput", "ReorderOutput"),
    )
)


def _advice(op: str, said: str) -> str | None:
    """What in the toolchain would avoid it, from the operator and the parser's own words."""
    words = said.lower()
    if "shiftisallzeros" in words or "zero point" in words:
        return "TensorRT's INT8 is symmetric: quantise the float model for this target, so that zero-points are 0"
    if op in _OF_ORT:
        return "it is for ONNX Runtime's CPU kernels: build from the float model, which is lowered for this target then"
    if "initializer" in words or "constant" in words or "weights" in words:
        return "the pass fold_constants computes what does not depend on inputs: build with the default passes"
    if "plugin" in words or said in ("false", ""):
        return "export the model without this op, or leave the part with it out; ort-cuda and ort-cpu may run it"
    return None


def parser_errors(api: Api, parser: Any, logger: Any) -> tuple[Unsupported, ...]:
    outputs = {}
    for _, text in logger.messages:
        if match := _PARSING.search(text):
            outputs[int(match[1]), match[2]] = match[3]
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        op = error.node_operator()
        label = error.node_name()
        said = " ".join(error.desc().split())
        stack = [name for name in error.local_function_stack() if name]
        if stack:
            label = f"{label or op} in {' / '.join(stack)}"
        elif not label and op:
            label = f"{op} -> {outputs.get((error.node(), op), f'node {error.node()}')}"
        one = Unsupported(label or "the graph", op, _reason(api, op, said), _advice(op, said))
        if one not in found:
            found.append(one)
    if not found:
        found.append(Unsupported("the graph", "", last_error(logger)))
    return tuple(found)


def _reason(api: Api, op: str, text: str) -> str:
    """The parser's words, where they are more than the expression that was false."""
    if text in ("false", ""):
        return f"{api.flavor.title} {api.version} has no {op}"
    if "Plugin not found" in text:
        return f"{api.flavor.title} {api.version} has no {op}, and there is no plugin of that name"
    # 'Assertion failed: (condition) && "what it means"', or 'condition: What it means': the second half is for people
    if match := _MEANING.search(text):
        return match[1] or match[2]
    return text.removeprefix("Assertion failed: ")


def not_supported(api: Api, model: Path, found: Sequence[Unsupported]) -> CompileFailed:
    first = found[0]
    more = "".join(f"\n        {one}" for one in found[1:8])
    if len(found) > 8:
        more += f"\n        and {len(found) - 8} more"
    advice = list(dict.fromkeys(one.advice for one in found if one.advice))
    return CompileFailed(
        f"{api.flavor.title} {api.version} does not take this graph: {first}{more}",
        where=f"{model}, {'node' if first.op else 'tensor'} {first.node!r}",
        hint="\n        ".join(advice) or f"see all of it: toolchain inspect --target {api.flavor.target} {model}",
    )


def last_error(logger: Any) -> str:
    """What the builder said last that was an error, without the source line it came from."""
    errors = [text for severity, text in logger.messages if severity in ("ERROR", "INTERNAL_ERROR")]
    # where there is no driver, that is said again after every other error
    telling = [text for text in errors if "checkMacros.cpp" not in text] or errors
    if not telling:
        return "it does not say why"
    text = " ".join(telling[-1].split())
    text = re.sub(r"^\S+: Error Code \d+: ", "", text)
    return re.sub(r"\s*\(?In \S+ at \S+:\d+\)?", "", text)
