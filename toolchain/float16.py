"""Which nodes have to stay float32 in a 16-bit graph: those whose numbers overflow or vanish on real samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from passes.base import PassFailed, label
from passes.convert_float16 import ENDLESS, KEEP_OPS, TYPES, ConvertFloat16, rounding_loss, tolerable_loss
from toolchain.errors import DataError, GraphError
from toolchain.evaluate import Feeds, reference_session
from toolchain.metrics import tensor_error

#: Largest normalised squared error of an output. Measured on MiniLM: 9e-7 and 6e-3.
BOUNDS = {"float16": 1e-4, "bfloat16": 1e-2}
#: How often what makes the error is looked for; each time, everything found at once is kept.
_ROUNDS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """A node that stays float32.

    Attributes:
        node: its name, as ``ConvertFloat16.keep`` takes it.
        reason: with the number, for a person.
    """

    node: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class KeepList:
    """What to keep, and what the graph then loses.

    Attributes:
        kept: in the order in which they were found.
        nmse: largest normalised squared error of an output on the samples.
        met: whether that is within the bound.
    """

    kept: tuple[Kept, ...]
    nmse: float
    met: bool

    @property
    def names(self) -> tuple[str, ...]:
        """For ``ConvertFloat16.keep``."""
        return tuple(each.node for each in self.kept)


def find_keep_list(
    model: ir.Model,
    samples: Sequence[Feeds],
    *,
    dtype: str = "float16",
    keep_ops: tuple[str, ...] = KEEP_OPS,
    max_nmse: float | None = None,
) -> KeepList:
    """Finds the nodes that a 16-bit graph must keep in float32.

    First by range: a node is kept if one of its float values has a number beyond the type's range, or so many that
    are too small for it that the value is not itself any more. Then by error: while an output is off by more than
    ``max_nmse``, the nodes at which it comes in are kept too. A CPU computes in float32 inside and between many nodes
    what an accelerator rounds, so the first way finds more than the second; sums inside of a node are seen by neither,
    which is what ``keep_ops`` are for.

    Args:
        model: float32; it is not changed.
        samples: inputs. All activations of one are held at a time, so keep its batch small.
        dtype: float16 or bfloat16.
        keep_ops: op types that stay float32 in any case.
        max_nmse: normalised squared error that outputs may have; None for the type's own, see ``BOUNDS``.

    Raises:
        DataError: no samples.
        GraphError: the graph cannot be converted.
    """
    if not samples:
        raise DataError("there are no samples to look for overflow on", hint="give calibration or evaluation data")
    bound = BOUNDS[dtype] if max_nmse is None else max_nmse
    kept = {each.node: each for each in _by_range(model, samples, TYPES[dtype], keep_ops)}
    names = [str(value.name) for node in model.graph for value in node.outputs if _is_float32(value)]
    outputs = {str(value.name) for value in model.graph.outputs}
    with reference_session(model, extra_outputs=names) as session:
        expected = session.run(samples[0])
    for number in range(_ROUNDS + 1):
        errors = _errors(_converted(model, dtype, tuple(kept), keep_ops), samples[0], expected)
        worst = max((error for name, error in errors.items() if name in outputs), default=0.0)
        found = [] if worst <= bound or number == _ROUNDS else _by_error(model, errors, bound, kept, keep_ops)
        if not found:
            break
        kept.update({each.node: each for each in found})
    return KeepList(tuple(kept.values()), worst, worst <= bound)


def _by_range(model: ir.Model, samples: Iterable[Feeds], kind: ir.DataType, keep_ops: tuple[str, ...]) -> list[Kept]:
    nodes = [node for node in model.graph if node.op_type not in keep_ops]
    values = {v for node in nodes for v in (*node.inputs, *node.outputs) if v is not None and _is_float32(v)}
    inputs = {value.name for value in model.graph.inputs}
    computed = {str(v.name) for v in values if v.name and not v.is_initializer()}
    peak = dict.fromkeys(computed, 0.0)
    loss = dict.fromkeys(computed, 0.0)
    with reference_session(model, extra_outputs=sorted(computed - inputs)) as session:
        for feeds in samples:
            got = {**feeds, **session.run(feeds)}
            for name in computed & set(got):
                array = got[name][np.abs(got[name]) < ENDLESS]  # masks, which stand for minus infinity, are no overflow
                peak[name] = max(peak[name], float(np.abs(array).max(initial=0)))
                with np.errstate(over="ignore"):
                    rounded = array.astype(kind.numpy()).astype(np.float64)
                if np.isfinite(rounded).all():
                    loss[name] = max(loss[name], rounding_loss(array, rounded))
    limit, least = float(kind.max), tolerable_loss(kind)
    kept = []
    for node in nodes:
        for value in (*node.outputs, *node.inputs):
            name = str(value.name) if value is not None else ""
            if peak.get(name, 0.0) > limit:
                kept.append(Kept(label(node), f"{name!r} reaches {peak[name]:.4g}, beyond {limit:g}"))
                break
            if loss.get(name, 0.0) > least:
                kept.append(Kept(label(node), f"{name!r} loses {loss[name]:.2g} of its energy to rounding"))
                break
    return kept


def _converted(model: ir.Model, dtype: str, keep: tuple[str, ...], keep_ops: tuple[str, ...]) -> ir.Model:
    copy = model.clone()
    try:
        ConvertFloat16(dtype=dtype, keep=keep, keep_ops=keep_ops)(copy)
    except PassFailed as error:
        raise GraphError(f"convert_float16: {error}", where=error.node, hint=error.hint) from error
    return copy


def _errors(candidate: ir.Model, feeds: Feeds, expected: Feeds) -> dict[str, float]:
    """The normalised squared error of every value that both graphs have."""
    names = [str(v.name) for node in candidate.graph for v in node.outputs if v.name in expected]
    with reference_session(candidate, extra_outputs=names) as session:
        got = session.run(feeds)
    return {
        name: tensor_error(expected[name], got[name]).nmse
        for name in names
        if name in got and got[name].shape == expected[name].shape
    }


def _by_error(
    model: ir.Model, errors: dict[str, float], bound: float, kept: dict[str, Kept], keep_ops: tuple[str, ...]
) -> list[Kept]:
    """Nodes whose result is beyond the bound while what they read is well within it."""
    found = []
    for node in model.graph:
        if label(node) in kept or node.op_type in keep_ops:
            continue
        after = max((errors.get(str(v.name), 0.0) for v in node.outputs), default=0.0)
        before = max((errors.get(str(v.name), 0.0) for v in node.inputs if v is not None), default=0.0)
        if after > bound and before < after / 4:
            found.append(Kept(label(node), f"its result is off by {after:.2g}, what it reads by {before:.2g}"))
    return found


def _is_float32(value: ir.Value) -> bool:
    return isinstance(value.type, ir.TensorType) and value.dtype == ir.DataType.FLOAT
