"""Do two versions of a model take and give the same, and does a request fit one?"""

from __future__ import annotations

from typing import Any

from runtimes import TensorSpec
from toolchain.serving.base import ModelInfo, Request


def fits(request: Request, info: ModelInfo | None) -> bool:
    """Whether a request has a model's inputs, with its ranks and fixed sizes. False where they are not known."""
    return info is not None and all(
        (array := request.inputs.get(spec.name)) is not None
        and (spec.shape is None or len(spec.shape) == array.ndim)
        and all(
            not isinstance(want, int) or want == size for want, size in zip(spec.shape or (), array.shape, strict=False)
        )
        for spec in info.inputs
    )


def same(one: ModelInfo | None, other: ModelInfo | None) -> bool:
    """Whether a request that was checked against one version may be given to the other. False where it is not known."""
    return one is not None and other is not None and _signature(one) == _signature(other)


def _signature(info: ModelInfo) -> tuple[Any, ...]:
    return (_specs(info.inputs), _specs(info.outputs), info.max_batch_size)


def _specs(specs: tuple[TensorSpec, ...]) -> tuple[Any, ...]:
    fixed = [
        None if one.shape is None else tuple(d if isinstance(d, int) else None for d in one.shape) for one in specs
    ]
    return tuple(sorted((one.name, one.dtype, str(shape)) for one, shape in zip(specs, fixed, strict=True)))
