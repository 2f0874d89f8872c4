"""Does a model compute each row of a batch by itself? Asked of the model, by running it.

Batching is only right where a row's result does not depend on the rows beside it. Most models are like that, and some
are not: dynamic quantisation takes one scale from the whole batch, BatchNormalization left in training mode takes its
statistics from it, a softmax may run over the wrong axis. So a row is run alone, and between rows that are unlike it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from runtimes import Error, Session
from toolchain.serving.base import ModelInfo

#: Relative error (Euclidean) of a row between others against the row alone. Kernels for one row and for many add up in
#: another order, which is some 1e-7 and may tip a rounding in an integer graph; a neighbour's scale is 1e-2.
BOUND = 2e-3


def why_rows_depend(session: Session, info: ModelInfo, feeds: Mapping[str, np.ndarray]) -> str | None:
    """Says why requests to this model must not be put into one batch; None where they may.

    Args:
        session: the model.
        info: its inputs and outputs, all with a batch axis.
        feeds: plausible inputs, one row or more; the first row is looked at.
    """
    row = {name: np.ascontiguousarray(array[:1]) for name, array in feeds.items()}
    other = {name: _unlike(array) for name, array in row.items()}
    try:
        alone = session.run(row)
        between = session.run({name: np.concatenate([row[name], other[name], row[name]]) for name in row})
    except Error as error:
        return f"it does not run three rows at once: {error.what}"
    for spec in info.outputs:
        one, three = alone[spec.name], between[spec.name]
        if one.ndim == 0 or len(one) != 1 or three.shape != (3, *one.shape[1:]):
            return f"the output {spec.name!r} of one row has the shape {list(one.shape)}, of three {list(three.shape)}"
        for place in (0, 2):
            if (error_of := _error(three[place : place + 1], one)) > BOUND:
                return f"the output {spec.name!r} of a row differs by {error_of:.1e} with other rows beside it"
    return None


def _unlike(array: np.ndarray) -> np.ndarray:
    """Another row of the same kind: the same values in the reverse order, and floats four times as large."""
    turned = array.reshape(-1)[::-1].reshape(array.shape)
    return np.ascontiguousarray(turned * array.dtype.type(4) if array.dtype.kind == "f" else turned)


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.dtype.kind not in "fiuV":
        return 0.0 if np.array_equal(found, wanted) else np.inf
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    difference = float(np.linalg.norm(np.where(same, 0, a - b)))
    return difference / max(float(np.linalg.norm(b[np.isfinite(b)])), 1e-12) if difference else 0.0
