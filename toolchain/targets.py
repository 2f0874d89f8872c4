"""Which targets a build is for, what it takes there where nothing is said, and in which order they are shipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import runtimes
from runtimes import Target
from toolchain.recipe import AUTO

T = TypeVar("T")

#: Runtimes whose precision is FP16 where nothing is said: their users come for the tensor cores.
_HALF = ("tensorrt", "tensorrt-rtx")
#: No runtime to ship for: it is slow, and there to compare with.
_ORACLE = "reference"


def resolve(texts: Sequence[str]) -> list[Target]:
    """The targets of a recipe; ``auto`` is every runtime that works here.

    Raises:
        InvalidInput: an unknown target.
        TargetUnavailable: ``auto``, and nothing works here.
    """
    if list(texts) != [AUTO]:
        return [Target.parse(text) for text in texts]
    states = runtimes.available()
    found = [Target(name) for name, state in states.items() if state.available and name != _ORACLE]
    if not found:
        reasons = "; ".join(f"{name}: {state.reason}" for name, state in states.items() if not state.available)
        raise runtimes.TargetUnavailable(f"no runtime works here: {reasons}", hint="pip install onnxruntime")
    return found


def float_precision(target: Target) -> str:
    """What a float variant computes in where the recipe does not say."""
    return "fp16" if target.runtime in _HALF else "fp32"


def cannot_run(target: Target) -> str | None:
    """Why a model compiled for the target cannot run on this machine; None where it can."""
    state = runtimes.backend(target.runtime).can_run(target)
    return None if state.available else state.reason or "it does not run here"


def ranked(
    found: Sequence[T], *, timed: Callable[[T], bool], faster: Callable[[T, T], bool], on_gpu: Callable[[T], bool]
) -> list[T]:
    """Variants in the order in which a loader is to try them.

    First those for a GPU that is not here: they load only where there is one, and are the reason to have one. Then
    what was timed, the faster first, by insertion, so that each new one is compared with few. Last what else cannot
    run here. Equals stay in the order of the recipe.

    Args:
        found: as the recipe has them.
        timed: whether it runs here.
        faster: whether the first is faster than the second, measured turn by turn.
        on_gpu: whether it is for a GPU.
    """
    order: list[T] = []
    for item in (x for x in found if timed(x)):
        place = len(order)
        while place and faster(item, order[place - 1]):
            place -= 1
        order.insert(place, item)
    absent = [x for x in found if not timed(x)]
    return [*(x for x in absent if on_gpu(x)), *order, *(x for x in absent if not on_gpu(x))]
