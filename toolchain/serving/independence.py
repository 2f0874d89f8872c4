"""Does a model compute each row of a batch by itself? Asked of the model, by running it.

Batching is only right where a row's result does not depend on the rows beside it. Most models are like that, and some
are not: dynamic quantisation takes one scale from the whole batch, BatchNormalization left in training mode takes its
statistics from it, a softmax may run over the wrong axis. So a row is run alone, and between rows that are unlike it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from runtimes import Error, Session, TensorSpec

#: Relative error (Euclidean) of a row between others against the row alone. Kernels for one row and for many add up in
#: another order, which is some 1e-7, and in an integer graph may tip a rounding now and then; a neighbour's scale is
#: 1e-2.
BOUND = 2e-3


def batch_axis(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether the first axis of all inputs and outputs may vary, and nothing says that it differs between inputs."""
    specs = (*inputs, *outputs)
    if not inputs or not outputs or any(not spec.shape or isinstance(spec.shape[0], int) for spec in specs):
        return False
    return len({spec.shape[0] for spec in inputs if spec.shape and spec.shape[0] is not None}) <= 1


def why_rows_depend(session: Session, feeds: Mapping[str, np.ndarray]) -> str | None:
    """Says why requests to this model must not be put into one batch; None where they may.

    Args:
        session: the model; all inputs and outputs have a batch axis.
        feeds: inputs that it runs on, one row or more; the first row is looked at.
    """
    row = {name: np.ascontiguousarray(array[:1]) for name, array in feeds.items()}
    try:
        alone = session.run(row)
        between = session.run({name: np.concatenate([one, _unlike(one), one]) for name, one in row.items()})
    except Error as error:
        return f"it does not run three rows at once: {error.what}"
    for name, one in alone.items():
        three = between[name]
        if one.ndim == 0 or len(one) != 1 or three.shape != (3, *one.shape[1:]):
            return f"the output {name!r} of one row has the shape {list(one.shape)}, of three {list(three.shape)}"
        for place in (0, 2):
            if (distance := _distance(three[place : place + 1], one)) > BOUND:
                return f"the output {name!r} of a row differs by {distance:.1e} with other rows beside it"
    return None


def _unlike(array: np.ndarray) -> np.ndarray:
    """Another row of the same kind: the same values in the reverse order, and floats four times as large."""
    turned = array.reshape(-1)[::-1].reshape(array.shape)
    return np.ascontiguousarray(turned * array.dtype.type(4) if array.dtype.kind == "f" else turned)


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.dtype.kind not in "fiu":
        return 0.0 if np.array_equal(found, wanted) else np.inf
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    difference = float(np.linalg.norm(np.where(same, 0, a - b)))
    return difference and difference / max(float(np.linalg.norm(b[np.isfinite(b)])), 1e-12)
