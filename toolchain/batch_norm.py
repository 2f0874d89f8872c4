"""BatchNormalization put back behind convolutions for training, and folded into them again afterwards.

A graph that is deployed has its BatchNormalization in the weights of its convolutions. It trains badly so: filters
differ in scale by an order of magnitude, an optimiser's step is too large for some and too small for others, and
nothing holds what each layer gives to the next. ``with_batch_norm`` makes of each convolution::

    y = w x + b      ->      y = gamma (v - mean) / sqrt(var + epsilon) + beta,   v = s (w x + b)

with the mean and variance of v over samples, and gamma and beta such that y is what it was; s brings each filter to the
norm sqrt(2), which is what He et al. (2015, arXiv 1502.01852) begin with. ``fold_back`` is the way back.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from passes._graph import Names, Scope, constant, default_opset, is_op, new_constant, set_constant
from toolchain.errors import DataError
from toolchain.evaluate import Feeds, reference_session

_EPSILON = 1e-5
_NORM = np.sqrt(2.0)


def with_batch_norm(model: ir.Model, samples: Iterable[Feeds]) -> ir.Model:
    """A copy of a graph with BatchNormalization behind each convolution that has weights and a bias of its own.

    Args:
        model: float32; it stays as it is.
        samples: inputs, in batches of any size; gone through once.

    Raises:
        DataError: no samples.
        InvalidInput, RunFailed: a sample does not fit, or the graph fails.
    """
    made = model.clone()
    convolutions = [node for node in made.graph if _has_own(node)]
    moments = _moments(model, [str(node.outputs[0].name) for node in convolutions], samples)
    names, scope = Names(made), Scope(made.graph, default_opset(made.opset_imports), False)
    for node in convolutions:
        output = node.outputs[0]
        mean, variance = moments[str(output.name)]
        weight, bias = (_numbers(value) for value in node.inputs[1:3])
        norms = np.sqrt(np.square(weight).sum(axis=tuple(range(1, weight.ndim))))
        scale = np.where(norms > 0, _NORM / np.where(norms > 0, norms, 1.0), 1.0)
        set_constant(node.inputs[1], (weight * _column(scale, weight)).astype(np.float32))  # type: ignore[arg-type]
        set_constant(node.inputs[2], (bias * scale).astype(np.float32))  # type: ignore[arg-type]
        spread = variance * np.square(scale)
        parameters = {
            "scale": np.sqrt(spread + _EPSILON) / scale, "bias": mean, "mean": mean * scale, "var": spread,
        }  # fmt: skip
        values = [
            new_constant(scope, data.astype(np.float32), names.fresh(f"{output.name}_{key}"), before=node)
            for key, data in parameters.items()
        ]
        norm = ir.Node(
            "", "BatchNormalization", [output, *values], attributes=[ir.AttrFloat32("epsilon", _EPSILON)], num_outputs=1
        )
        (after,) = norm.outputs
        after.name, after.shape, after.type = names.fresh(f"{output.name}_normalized"), output.shape, output.type
        for user, index in list(output.uses()):
            if user is not norm:
                user.replace_input_with(index, after)
        made.graph.insert_after(node, norm)
    return made


def fold_back(trained: ir.Model, model: ir.Model) -> None:
    """Puts the weights of what ``with_batch_norm`` made into the graph that it was made of, by name, in place.

    Args:
        trained: with other numbers by now.
        model: gets them; nodes and names stay.
    """
    theirs = {str(node.outputs[0].name): node for node in trained.graph}
    held = {str(value.name): value for value in trained.graph.initializers.values()}
    normalized = set()
    for node in model.graph:
        there = theirs.get(str(node.outputs[0].name))
        users = [] if there is None else [user for user, _ in there.outputs[0].uses()]
        if there is None or len(users) != 1 or not is_op(users[0], "BatchNormalization") or not _has_own(node):
            continue
        gamma, beta, mean, variance = (_numbers(value) for value in users[0].inputs[1:5])
        factor = gamma / np.sqrt(variance + users[0].attributes.get_float("epsilon", _EPSILON))
        weight, bias = (_numbers(value) for value in there.inputs[1:3])
        new = (weight * _column(factor, weight), beta + factor * (bias - mean))
        for value, data in zip(node.inputs[1:3], new, strict=True):
            set_constant(value, data.astype(np.float32))  # type: ignore[arg-type]
            normalized.add(str(value.name))  # type: ignore[union-attr]
    for name, value in model.graph.initializers.items():
        if name in held and name not in normalized:
            tensor = constant(held[name])
            assert tensor is not None
            set_constant(value, tensor.numpy())


def _has_own(node: ir.Node) -> bool:
    """Whether it is a convolution with float32 weights and bias that nobody else reads, inside the graph."""
    if not is_op(node, "Conv") or len(node.inputs) < 3 or node.outputs[0].is_graph_output():
        return False
    tensors = [constant(value) for value in node.inputs[1:3]]
    return all(
        tensor is not None and tensor.dtype == ir.DataType.FLOAT and value is not None and len(value.uses()) == 1
        for tensor, value in zip(tensors, node.inputs[1:3], strict=True)
    )


def _moments(model: ir.Model, names: list[str], samples: Iterable[Feeds]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of each channel of some values, [N, C, ...], over samples and places: float64 [C] each."""
    sums = {name: np.zeros(0) for name in names}
    squares, counts = dict(sums), dict.fromkeys(names, 0)
    with reference_session(model, extra_outputs=names) as session:
        for feeds in samples:
            found = session.run(feeds)
            for name in names:
                rows = np.moveaxis(np.asarray(found[name], dtype=np.float64), 1, -1)
                rows = rows.reshape(-1, rows.shape[-1])
                if not counts[name]:
                    sums[name], squares[name] = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
                sums[name] += rows.sum(axis=0)
                squares[name] += np.square(rows).sum(axis=0)
                counts[name] += len(rows)
    if names and not all(counts.values()):
        raise DataError("there are no samples to take statistics over", hint="give some hundreds")
    means = {name: sums[name] / counts[name] for name in names}
    return {name: (means[name], np.maximum(squares[name] / counts[name] - means[name] ** 2, 0.0)) for name in names}


def _numbers(value: ir.Value | None) -> np.ndarray:
    tensor = constant(value)
    assert tensor is not None
    return tensor.numpy().astype(np.float64)


def _column(factor: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return factor.reshape(-1, *[1] * (weight.ndim - 1))
