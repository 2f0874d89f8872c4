"""PyTorch module → ``onnx_ir.Model``, once, and checked against PyTorch before anything is built on it.

The exporter is ``torch.onnx.export(dynamo=True)`` with its optimiser off: what becomes of the graph is the
passes' business, and theirs alone. Its result is taken as it is in memory, without the trace of the machine
that made it, and run node by node beside the module on inputs of two sizes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from passes.base import graphs
from toolchain.errors import ExportFailed, SourceError
from toolchain.export_check import compare, run_module, trial_inputs
from toolchain.export_errors import export_failed, quiet
from toolchain.metrics import TensorError
from toolchain.models import Source, TorchModel, load_torch, versions
from toolchain.onnx_file import check_weights, read_onnx
from toolchain.preprocessing import ImagePreprocessing
from toolchain.weights import Weights, file_sha256

if TYPE_CHECKING:
    import torch

__all__ = ["Exported", "compare_on", "export", "export_source", "import_onnx"]


@dataclasses.dataclass(frozen=True)
class Exported:
    """A graph, what is known about it, and how far it is from PyTorch.

    Attributes:
        model: the graph, unoptimised; the weights are in memory.
        torch_error: for each output, the largest error over the inputs that were compared; empty for a
            model that was ONNX from the start.
        weights: what the numbers are.
        opset: of the standard domain.
        preprocessing: for images, where it is known.
        labels: names of the classes, where they are real ones.
        label_offset: what a dataset's label lacks to the model's class index.
        provenance: the source and the versions of what made the graph.
        warnings: lines to show once.
    """

    model: ir.Model
    torch_error: Mapping[str, TensorError]
    weights: Weights
    opset: int
    preprocessing: ImagePreprocessing | None = None
    labels: tuple[str, ...] | None = None
    label_offset: int = 0
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_meta(self) -> dict[str, Any]:
        """Everything but the graph, as JSON values."""
        return {
            "torch_error": {name: dataclasses.asdict(error) for name, error in self.torch_error.items()},
            "weights": dataclasses.asdict(self.weights),
            "opset": self.opset,
            "preprocessing": self.preprocessing.to_json() if self.preprocessing else None,
            "labels": list(self.labels) if self.labels else None,
            "label_offset": self.label_offset,
            "provenance": dict(self.provenance),
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_meta(cls, model: ir.Model, meta: Mapping[str, Any]) -> Exported:
        """Puts together again what ``to_meta`` took apart."""
        return cls(
            model=model,
            torch_error={name: TensorError(**error) for name, error in meta["torch_error"].items()},
            weights=Weights(**meta["weights"]),
            opset=meta["opset"],
            preprocessing=ImagePreprocessing.from_json(meta["preprocessing"]) if meta["preprocessing"] else None,
            labels=tuple(meta["labels"]) if meta["labels"] else None,
            label_offset=meta["label_offset"],
            provenance=dict(meta["provenance"]),
            warnings=tuple(meta["warnings"]),
        )


def import_onnx(source: Source) -> Exported:
    """Takes an ONNX file as it is.

    Raises:
        InvalidModel, GraphError: see ``onnx_file.read_onnx``.
    """
    assert source.path is not None, "an ONNX source has a file"
    model = read_onnx(source.path)
    return Exported(
        model=model,
        torch_error={},
        weights=Weights("embedded", source.path.name, file_sha256(source.path)),
        opset=_opset(model),
        provenance={
            "source": source.public,
            **({"producer": model.producer_name} if model.producer_name else {}),
        },
    )


def export_source(source: Source, *, weights: str = "auto", seed: int = 0, opset: int | None = None) -> Exported:
    """Any source as an ``Exported``: an ONNX file as it is, everything else through PyTorch.

    Raises:
        SourceError, ExportFailed, InvalidModel, GraphError: from the steps.
    """
    if source.kind == "onnx":
        if weights != "auto" or opset is not None:
            option = "--weights" if weights != "auto" else "--opset"
            raise SourceError(
                f"{option} has no effect on an ONNX file: it has its own weights and opset",
                where=source.public,
                hint=f"leave {option} out",
            )
        return import_onnx(source)
    return export(load_torch(source, weights=weights, seed=seed), opset=opset)


def compare_on(exported: Exported, model: TorchModel, samples: Sequence[Mapping[str, np.ndarray]]) -> Exported:
    """The same export, with its error against PyTorch measured on these inputs: real ones say more than drawn ones.

    Raises:
        ExportFailed: an output is further from PyTorch's than ``bounds.float_bound``.
    """
    names = tuple(exported.torch_error)
    references = [
        {name: array for name, (_, array) in zip(names, run_module(model, inputs), strict=True)} for inputs in samples
    ]
    return dataclasses.replace(exported, torch_error=compare(exported.model, samples, references))


def export(model: TorchModel, *, opset: int | None = None) -> Exported:
    """Exports a module and compares the graph's outputs with the module's, on drawn inputs of two sizes that
    are not the example's.

    Args:
        model: from ``models.load_torch``.
        opset: of the standard domain, 18 or newer; None is the exporter's own choice.

    Raises:
        ExportFailed: torch.export or the translation fails, or an output is further from PyTorch's than
            ``bounds.float_bound``; with the line of the user's code and what to do.
    """
    trials = trial_inputs(model)
    expected = [run_module(model, inputs) for inputs in trials]
    names = model.output_names or tuple(f"{name}_out" if name in model.input_names else name for name, _ in expected[0])
    if taken := sorted(set(names) & set(model.input_names)):
        raise ExportFailed(f"{taken[0]!r} names an input and an output", where="output_names", hint="rename one")
    if len(names) != len(expected[0]):
        raise ExportFailed(
            f"{len(names)} output names for {len(expected[0])} outputs",
            where=", ".join(names),
            hint="name every output",
        )
    graph = _translate(model, names, opset)
    _own_outputs(graph, model.input_names, names)
    _strip(graph)
    _name_axes(graph, model)
    check_weights(graph, where="the exported graph")
    found = _opset(graph)
    if opset is not None and found != opset:
        raise ExportFailed(
            f"the exporter gives opset {found}, not {opset}",
            where="opset",
            hint=f"leave it out, or take {found}",
        )
    references = [{name: array for name, (_, array) in zip(names, result, strict=True)} for result in expected]
    return Exported(
        model=graph,
        torch_error=compare(graph, trials, references),
        weights=model.weights,
        opset=found,
        preprocessing=model.preprocessing,
        labels=model.labels,
        label_offset=model.label_offset,
        provenance={**model.provenance, **versions("torch", "onnxscript", "onnx-ir")},
        warnings=model.warnings,
    )


def _opset(model: ir.Model) -> int:
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def _translate(model: TorchModel, names: Sequence[str], opset: int | None) -> ir.Model:
    import torch

    arguments: dict[str, Any] = {}
    if model.program is None:
        axes = [dict(model.dynamic_axes.get(name, {})) for name in model.input_names]
        tensors = [model.example_inputs[name] for name in model.input_names]
        if model.positional:
            arguments = {"args": tuple(tensors), "dynamic_shapes": _by_position(model.module, axes)}
        else:
            by_name = dict(zip(model.input_names, axes, strict=True))
            arguments = {
                "kwargs": dict(zip(model.input_names, tensors, strict=True)),
                "dynamic_shapes": by_name,
            }
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                model.program or model.module,
                **arguments,
                input_names=list(model.input_names),
                output_names=list(names),
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise export_failed(error, model) from error
    assert program is not None, "with dynamo=True there is a program"
    return program.model


def _by_position(module: torch.nn.Module, axes: list[dict[int, str]]) -> tuple[Any, ...]:
    """torch.export wants the shapes of ``*args`` as one nested tuple."""
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    named = sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return (*axes[:named], tuple(axes[named:]))
    return tuple(axes)


def _own_outputs(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Gives every output a value and a name of its own.

    Where ``forward`` returns an input, a weight, or one tensor twice, the exporter makes that value the
    output and names it so; and it takes the names as they are, also those that another value bears.
    """
    graph = model.graph
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    own: list[ir.Value] = []
    for value in graph.outputs:
        if value.producer() is None or value in own:
            node = ir.node("Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            value = node.outputs[0]
        own.append(value)
    for index, value in enumerate(own):
        graph.outputs[index] = value
    for part in graphs(model):
        for value in [*part.initializers.values()] if isinstance(part, ir.Graph) else []:
            if value.name in outputs:
                value.name = f"{value.name}_value"
        for node in part:
            for value in node.outputs:
                if value.name in outputs:
                    value.name = f"{value.name}_value"
    for value, name in zip(own, outputs, strict=True):
        value.name = name


def _strip(model: ir.Model) -> None:
    """Takes off what ties the graph to this process and machine; keeps each node's place in the module.

    The exporter leaves stack traces with file paths and the whole traced program; the weights are wrappers
    around torch's tensors, here made plain arrays over the same memory.
    """
    model.metadata_props.clear()
    model.doc_string = None
    for graph in graphs(model):
        graph.metadata_props.clear()
        graph.meta.clear()
        values = list(graph.inputs)
        if isinstance(graph, ir.Graph):
            graph.doc_string = None
            values += graph.initializers.values()
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is not None:
                    value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
        for node in graph:
            namespace = node.metadata_props.get("namespace")
            node.metadata_props.clear()
            if namespace:
                node.metadata_props["namespace"] = namespace
            node.meta.clear()
            node.doc_string = None
            values += node.outputs
        for value in values:
            value.metadata_props.clear()
            value.meta.clear()
            value.doc_string = None


def _name_axes(graph: ir.Model, model: TorchModel) -> None:
    """Renames torch's symbols (``s77``) to those of ``dynamic_axes``, also inside ``2*s77``."""
    names: dict[str, str] = {}
    for value in graph.graph.inputs:
        for axis, name in model.dynamic_axes.get(value.name or "", {}).items():
            dim = value.shape[axis] if value.shape is not None else None
            if isinstance(dim, ir.SymbolicDim) and dim.value and dim.value != name:
                names.setdefault(dim.value, name)
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for part in graphs(graph):
        for value in [*part.inputs, *(output for node in part for output in node.outputs)]:
            if value.shape is None:
                continue
            value.shape = ir.Shape(
                [
                    pattern.sub(lambda m: names[m[0]], dim.value)
                    if isinstance(dim, ir.SymbolicDim) and dim.value
                    else dim
                    for dim in value.shape
                ]
            )
