"""What a model costs at the sizes that it is fed: ``passes/_cost.py`` with the shapes that only a run tells."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

import runtimes
from passes._cost import ModelCost, model_cost, unknown_values, with_shapes
from passes.base import PassFailed
from toolchain.errors import GraphError
from toolchain.evaluate import Feeds, input_specs, reference_session
from toolchain.seeded import seeded_inputs

__all__ = ["ModelCost", "cost_of", "feeds_of"]


def feeds_of(model: ir.Model, *, batch: int = 1, dims: Mapping[str, int] | None = None) -> Feeds:
    """The made-up inputs whose sizes are counted with. Raises DataError for a dimension that no input has."""
    return seeded_inputs(input_specs(model), batch=batch, dims=dims)


def cost_of(model: ir.Model, *, batch: int = 1, dims: Mapping[str, int] | None = None, run: bool = True) -> ModelCost:
    """Parameters, MACs, operations and memory of each node.

    Where inference does not find a shape, the model is run once on made-up inputs and the shape is looked at; where it
    does not run on them, the cost of these nodes stays unknown.

    Args:
        batch: size of the batch dimension.
        dims: sizes of other symbolic dimensions; what is not named is as ``seeded_inputs`` has it.
        run: whether the model may be run.

    Raises:
        DataError: no input has such a dimension.
        GraphError: a size contradicts the graph.
    """
    feeds = feeds_of(model, batch=batch, dims=dims)
    shapes = {name: array.shape for name, array in feeds.items()}
    try:
        known = with_shapes(model, shapes)
        missing = unknown_values(known)
        if missing and run:
            shapes.update(_looked_at(known, feeds, missing))
        return model_cost(known, shapes)
    except PassFailed as error:
        raise GraphError(str(error), where=error.node, hint=error.hint or "give other sizes with --dim") from error


def _looked_at(model: ir.Model, feeds: Feeds, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of these values in a run; none where the model does not run."""
    try:
        with reference_session(model, extra_outputs=names) as session:
            found = session.run(feeds)
    except runtimes.Error:
        return {}
    return {name: found[name].shape for name in names if name in found}
