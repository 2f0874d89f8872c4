"""What layers with weights are fed, from one streaming pass over samples: norms and second moments of input channels.

``prune_weights`` weighs by the norms (Wanda), ``factorize_low_rank`` whitens by the moments. Memory is that of one
batch's activations, and of a number, or a row of numbers, for each channel, however many samples there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from passes._graph import attribute_int, constant, given, is_op
from passes._linear import LINEAR
from passes.base import labels
from passes.factorize_low_rank import InputMoments
from passes.prune_weights import InputNorms
from toolchain.errors import DataError, GraphError
from toolchain.evaluate import Feeds, reference_session


def input_norms(
    model: ir.Model, samples: Iterable[Feeds], *, on_progress: Callable[[int], None] = lambda batches: None
) -> InputNorms:
    """The L2 norm of each input channel of each layer, over all samples and places.

    Args:
        model: a float graph; it is run unoptimised, so that every value is there.
        samples: inputs, in batches of any size; gone through once.
        on_progress: is called with the number of batches done.

    Raises:
        DataError: no samples, or one whose activations are not finite.
        GraphError: the graph has no layer with a constant weight.
        InvalidInput, RunFailed: a sample does not fit, or the model fails.
    """

    def squares(rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.einsum("rc,rc->c", rows, rows)
        return found

    sums, _, axes = _gathered(model, samples, squares, on_progress)
    return InputNorms({node: np.sqrt(sums[name]) for node, (name, _) in axes.items()})


def input_moments(
    model: ir.Model, samples: Iterable[Feeds], *, on_progress: Callable[[int], None] = lambda batches: None
) -> InputMoments:
    """The second moments of the input channels of each layer, E[x x^T] over samples and places: [I, I] each.

    Arguments and errors are those of ``input_norms``.
    """
    sums, counts, axes = _gathered(model, samples, lambda rows: rows.T @ rows, on_progress)
    return InputMoments({node: sums[name] / counts[name] for node, (name, _) in axes.items()})


def _gathered(
    model: ir.Model,
    samples: Iterable[Feeds],
    of_rows: Callable[[np.ndarray], np.ndarray],
    on_progress: Callable[[int], None],
) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, tuple[str, int]]]:
    """Sums of ``of_rows`` (rows float32 [n, channels], to anything that can be added), by value; how many rows; and for
    each layer, as ``passes.base.labels`` names it, the value that it reads and the axis of its channels."""
    layers = _layers(model)
    if not layers:
        raise GraphError("the graph has no layer with a constant weight", hint="there is nothing to gather")
    wanted = dict.fromkeys(layers.values())
    inputs = {value.name for value in model.graph.inputs}
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    done = 0
    extra = list(dict.fromkeys(name for name, _ in wanted if name not in inputs))
    with reference_session(model, extra_outputs=extra) as session:
        for feeds in samples:
            values = {**feeds, **session.run(feeds)}
            for name, axis in wanted:
                moved = np.moveaxis(np.asarray(values[name]), axis, -1)
                rows = np.ascontiguousarray(moved.reshape(-1, moved.shape[-1]), dtype=np.float32)
                found = of_rows(rows).astype(np.float64)
                if not np.isfinite(found).all():
                    raise DataError(f"tensor {name!r} is not finite", where=f"batch {done}", hint="leave it out")
                sums[name] = sums[name] + found if name in sums else found
                counts[name] = counts.get(name, 0) + len(rows)
            done += 1
            on_progress(done)
    if not done:
        raise DataError("there are no samples", hint="give at least one; 64 to 256 are usual")
    return sums, counts, layers


def _layers(model: ir.Model) -> dict[str, tuple[str, int]]:
    found = {}
    for node, text in labels(model.graph).items():
        source = given(node, 0)
        if not is_op(node, *LINEAR) or source is None or constant(given(node, 1)) is None:
            continue
        if constant(source) is not None:
            continue
        turned = node.op_type == "Gemm" and attribute_int(node, "transA", 0)
        channels = 1 if node.op_type in ("Conv", "ConvTranspose") else (0 if turned else -1)
        found[text] = (str(source.name), channels)
    return found
