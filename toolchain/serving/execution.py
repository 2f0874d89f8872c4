"""Runs a batch: inputs below each other, one run, each request's own rows. In a thread, and touches nothing shared.

If the run of several requests fails, each is run by itself: one that the model cannot take does not fail the others.

Inputs are gathered into new arrays. Arrays that are kept and written anew, or bound to the session, save nothing that
could be measured (eight images of 600 kB: 0.3 ms of 22), and a runtime may hand out its input as an output.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np

from runtimes import InvalidInput, Session, SessionClosed
from toolchain.serving.base import InvalidRequest, ModelFailed, ServingError, Unavailable
from toolchain.serving.padding import Layout

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One run of the model.

    Attributes:
        of: which requests, as indices into the batch.
        began_ns: ``time.monotonic_ns()`` before the inputs were gathered.
        input_ns, infer_ns, output_ns: gathering inputs, running, handing out.
        outputs: of each request; empty where it failed.
        error: why it failed.
    """

    of: Sequence[int]
    began_ns: int
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    outputs: Sequence[Arrays] = ()
    error: ServingError | None = None


class RowsLost(ModelFailed):
    """The outputs of a batch do not have its rows: the model cannot be given several requests at once."""


def run_together(session: Session, layout: Layout, batch: Sequence[Arrays], rows: Sequence[int]) -> list[Run]:
    """Runs requests as one batch; if that fails, one by one.

    Args:
        session: the model.
        layout: how its requests are put together.
        batch: the inputs of each.
        rows: how many each has.

    Returns:
        One run of all; or the one that failed, with no requests in it, and a run of each.
    """
    whole = _run(session, layout, range(len(batch)), batch, rows)
    if whole.error is None or len(batch) == 1:
        return [whole]
    alone = [_run(session, layout, (index,), (inputs,), rows[index : index + 1]) for index, inputs in enumerate(batch)]
    return [dataclasses.replace(whole, of=()), *alone]


def _run(session: Session, layout: Layout, of: Sequence[int], batch: Sequence[Arrays], rows: Sequence[int]) -> Run:
    began = time.monotonic_ns()
    if len(batch) == 1:
        return _run_one(session, of, batch[0], began)
    try:
        feeds = layout.gather(batch)
        gathered = time.monotonic_ns()
        outputs = session.run(feeds)
        ran = time.monotonic_ns()
        total = sum(rows)
        for name, array in outputs.items():
            if not array.ndim or len(array) != total:
                raise RowsLost(f"the output {name!r} of a batch of {total} rows has the shape {list(array.shape)}")
        parts = layout.hand_out(outputs, batch, rows)
    except Exception as error:  # noqa: BLE001 - a runtime of another distribution may raise anything
        return Run(of, began, error=_told(error))
    return Run(of, began, gathered - began, ran - gathered, time.monotonic_ns() - ran, parts)


def _run_one(session: Session, of: Sequence[int], inputs: Arrays, began: int) -> Run:
    """Fed with its own arrays where they are aligned, and answered with those that came out."""
    try:
        # What lies askew in a request is copied here and not on the event loop; gathering copies anyway.
        outputs = session.run({name: array if array.flags.aligned else array.copy() for name, array in inputs.items()})
    except Exception as error:  # noqa: BLE001 - as above
        return Run(of, began, error=_told(error))
    return Run(of, began, 0, time.monotonic_ns() - began, 0, (outputs,))


def _told(error: Exception) -> ServingError:
    """An error of the runtime as one that a client is told."""
    if isinstance(error, ServingError):
        return error
    if isinstance(error, InvalidInput):
        return InvalidRequest(error.what, hint=error.hint)
    if isinstance(error, SessionClosed):
        return Unavailable("the model was unloaded", hint="send the request again")
    return ModelFailed(f"the model failed: {getattr(error, 'what', None) or error or type(error).__name__}")
