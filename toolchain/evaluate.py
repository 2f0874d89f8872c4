"""The unoptimised reference: runs an in-memory graph as it stands, with any of its values as extra outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

import runtimes
from passes._shapes import infer_shapes
from passes.base import PassFailed
from toolchain.errors import GraphError
from toolchain.onnx_file import temporary_onnx
from toolchain.seeded import open_dims

Feeds = dict[str, np.ndarray]


@contextlib.contextmanager
def reference_session(model: ir.Model | Path, *, extra_outputs: Sequence[str] = ()) -> Iterator[runtimes.Session]:
    """A session that runs a graph node by node: ONNX Runtime with every graph optimisation off, or,
    where it has no kernel for a node, onnx's ReferenceEvaluator.

    Args:
        model: a graph in memory, or a file that is known to be sound.
        extra_outputs: names of main-graph values to return besides the model's outputs; in memory only.

    Raises:
        InvalidModel, CompileFailed: neither can run it.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(model, Path):
            path = model
        else:
            path = stack.enter_context(temporary_onnx(with_outputs(model, extra_outputs) if extra_outputs else model))
        try:
            session = runtimes.load(path, target="ort-cpu", options={"graph_level": "disabled"})
        except (runtimes.CompileFailed, runtimes.TargetUnavailable):
            session = runtimes.load(path, target="reference")
        yield stack.enter_context(session)


def input_specs(model: ir.Model) -> tuple[runtimes.TensorSpec, ...]:
    """What the model must be fed: its inputs, without those that an initializer gives a default."""
    return tuple(_spec(value) for value in model.graph.inputs if not value.is_initializer())


def output_specs(model: ir.Model) -> tuple[runtimes.TensorSpec, ...]:
    """What the model gives."""
    return tuple(_spec(value) for value in model.graph.outputs)


def class_count(model: ir.Model) -> int | None:
    """The classes of the first output with two axes, where that is a number."""
    for spec in output_specs(model):
        if spec.shape is not None and len(spec.shape) == 2 and isinstance(spec.shape[1], int):
            return spec.shape[1]
    return None


def _spec(value: ir.Value) -> runtimes.TensorSpec:
    dims = None if value.shape is None else tuple(_dim(d if isinstance(d, int) else d.value) for d in value.shape)
    name = "unknown" if value.dtype is None else value.dtype.name.lower()
    return runtimes.TensorSpec(value.name or "", {"float": "float32", "double": "float64"}.get(name, name), dims)


def _dim(size: int | str | None) -> int | str | None:
    """Some exporters write -1 or 0 for a size that they do not know."""
    return None if isinstance(size, int) and size < 0 else size


def typed(model: ir.Model) -> ir.Model:
    """The model with the types of all values known; a copy where they have to be found first.

    Raises:
        GraphError: the graph contradicts itself.
    """
    if all(value.type is not None for node in model.graph for value in node.outputs if value.name):
        return model
    copy = model.clone()
    try:
        infer_shapes(copy)
    except PassFailed as error:
        raise GraphError(f"the types of its values cannot be found: {error}", where=error.node) from error
    return copy


def with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of the model, sharing its weights, that also returns the named main-graph values."""
    copy = model.clone()
    wanted = set(names) - {value.name for value in copy.graph.outputs}
    for node in copy.graph:
        for value in node.outputs:
            if value.name in wanted:
                copy.graph.outputs.append(value)
    return copy


def run_made_up(session: runtimes.Session, samples: Sequence[Feeds]) -> list[Feeds]:
    """The outputs on inputs that were drawn, not given: where the model refuses them, a size may be why.

    Raises:
        RunFailed: with the dimensions that can be set.
    """
    try:
        return [session.run(feeds) for feeds in samples]
    except runtimes.RunFailed as error:
        symbols = open_dims(session.inputs)
        if not symbols:
            raise
        raise runtimes.RunFailed(
            f"the model does not run on made-up inputs: {error.what}",
            where=error.where,
            hint=f"say what size its dimensions have: {' '.join(f'--dim {name}=SIZE' for name in symbols)}",
        ) from error


def run_reference(model: ir.Model, samples: Sequence[Feeds]) -> list[Feeds]:
    """The model's outputs on each sample, unoptimised."""
    with reference_session(model) as session:
        return run_made_up(session, samples)
