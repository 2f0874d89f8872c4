"""Do these shapes and dtypes fit the model? Asked of what a request says, before a byte of its data is looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from runtimes import TensorSpec
from toolchain.serving.base import InvalidRequest, ModelInfo, TooLarge

#: The protocol's names of element types, to numpy's and the bytes of an element.
DTYPES = {
    "BOOL": ("bool", 1), "UINT8": ("uint8", 1), "UINT16": ("uint16", 2), "UINT32": ("uint32", 4),
    "UINT64": ("uint64", 8), "INT8": ("int8", 1), "INT16": ("int16", 2), "INT32": ("int32", 4), "INT64": ("int64", 8),
    "FP16": ("float16", 2), "FP32": ("float32", 4), "FP64": ("float64", 8), "BF16": ("bfloat16", 2),
}  # fmt: skip
#: numpy's (and ml_dtypes') names to the protocol's; "string" is BYTES.
NAMES = {numpy: name for name, (numpy, _) in DTYPES.items()} | {"string": "BYTES"}
MAX_RANK = 32


def check(info: ModelInfo, asked: Mapping[str, tuple[str, Sequence[int]]], *, max_bytes: int) -> None:
    """Compares what a request says of its inputs with the model's.

    Args:
        info: the model.
        asked: input name → (the protocol's name of its dtype, its shape).
        max_bytes: of all inputs together.

    Raises:
        InvalidRequest: an input is missing or unknown, or its dtype, rank or a fixed dimension is not the model's; axes
            of one symbolic name differ; or there are more rows than ``max_batch_size``.
        TooLarge: the inputs are larger than ``max_bytes``.
    """
    known = {spec.name: spec for spec in info.inputs}
    for name in asked:
        if name not in known:
            raise InvalidRequest(f"model {info.name!r} has no input {name!r}", hint=f"it takes: {_listed(info.inputs)}")
    sizes: dict[str, int] = {}
    rows: int | None = None
    total = 0
    for spec in info.inputs:
        if spec.name not in asked:
            raise InvalidRequest(f"input {spec.name!r} is missing", hint=f"the model takes: {_listed(info.inputs)}")
        dtype, shape = asked[spec.name]
        wanted = NAMES.get(spec.dtype, spec.dtype)
        if dtype != wanted:
            raise InvalidRequest(f"input {spec.name!r} is {dtype}, and the model takes {wanted}")
        _check_shape(spec, shape, sizes)
        if info.max_batch_size:
            if rows is None:
                rows = shape[0]
                if rows < 1:
                    raise InvalidRequest(f"input {spec.name!r} has {rows} rows", hint="send at least one")
                if rows > info.max_batch_size:
                    raise InvalidRequest(
                        f"the request has {rows} rows, and at most {info.max_batch_size} are run at once",
                        hint="split it, or serve the model with a larger max_batch_size",
                    )
            elif shape[0] != rows:
                raise InvalidRequest(f"inputs differ in rows: {rows} and {shape[0]} of {spec.name!r}")
        total += math.prod(shape) * (DTYPES[dtype][1] if dtype in DTYPES else 1)
    if total > max_bytes:
        raise TooLarge(f"the inputs are {total} bytes, and at most {max_bytes} are taken")


def check_outputs(info: ModelInfo, asked: Sequence[str]) -> None:
    """Raises InvalidRequest where an output asked for is not the model's, or is asked for twice."""
    known = {spec.name for spec in info.outputs}
    for name in asked:
        if name not in known:
            raise InvalidRequest(f"model {info.name!r} has no output {name!r}", hint=f"it has: {_listed(info.outputs)}")
    if len(set(asked)) != len(asked):
        raise InvalidRequest("an output is asked for twice")


def size(datatype: str, shape: Sequence[int]) -> int:
    """The bytes of a tensor; ``datatype`` is any of the protocol's names but BYTES."""
    return math.prod(shape) * DTYPES[datatype][1]


def _check_shape(spec: TensorSpec, shape: Sequence[int], sizes: dict[str, int]) -> None:
    if len(shape) > MAX_RANK or any(type(size) is not int or not 0 <= size < 1 << 48 for size in shape):
        raise InvalidRequest(f"input {spec.name!r} has the shape {list(shape)[:MAX_RANK]}, which is none")
    if spec.shape is None:
        return
    fits = len(shape) == len(spec.shape)
    for size, want in zip(shape, spec.shape, strict=False):
        if isinstance(want, int):
            fits = fits and size == want
        elif isinstance(want, str):
            fits = fits and sizes.setdefault(want, size) == size
    if not fits:
        raise InvalidRequest(f"input {spec.name!r} has the shape {list(shape)}, and the model takes {spec}")


def _listed(specs: Sequence[TensorSpec]) -> str:
    return "; ".join(str(spec) for spec in specs)
