"""Plausible inputs for any model, drawn from a seed: for checks where there is no real data."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from runtimes import TensorSpec
from toolchain.errors import DataError

#: what a symbolic dimension becomes where nothing else is said: long enough to be a sequence, small enough
#: for any table of positions
DEFAULT_DIM = 16
#: ... except the height and width of what looks like an image
DEFAULT_PIXELS = 224
#: identifiers stay below this, so that they are within any vocabulary worth the name
IDS = 8


def seeded_inputs(
    specs: Sequence[TensorSpec], *, batch: int = 1, seed: int = 0, dims: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """One set of inputs that the model should be able to run on; equal arguments give equal arrays.

    Floats are standard normal; masks are ones; identifiers and other integers are in 0..7; uint8 is a
    pixel; a scalar that is named like a sample rate is 16000. A symbol has one size wherever it occurs:
    the one in ``dims``, else ``batch`` where it is a first dimension or is named like a batch, else
    224 where it looks like the height or width of an image, else 16.

    Args:
        specs: the model's inputs.
        batch: size of the batch dimension; a fixed first dimension stays as it is.
        seed: of the random numbers; every input has its own stream, whatever the others are.
        dims: sizes of dimensions that are not fixed, by the names that ``open_dims`` gives.

    Raises:
        DataError: a dtype that has no plausible values, a size below 1, or more than fits into memory.
    """
    sizes = dict(dims or {})
    for name, size in (*sizes.items(), ("batch", batch)):
        if size < 1:
            raise DataError(f"dimension {name} is {size}", hint="sizes are at least 1")
    known = open_dims(specs)
    for name in dims or {}:
        if name not in known:
            raise DataError(
                f"no input has a dimension {name!r}",
                where=f"{name}={sizes[name]}",
                hint=f"there are: {', '.join(known) or 'none, all sizes are fixed'}",
            )
    shapes = {spec.name: _shape(spec, sizes, batch) for spec in specs}
    try:
        return {spec.name: _values(spec, shapes[spec.name], seed) for spec in specs}
    except (MemoryError, OverflowError, ValueError) as error:  # numpy's words for what no memory holds
        shown = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise DataError(
            "made-up inputs of that size do not fit into memory", where=shown, hint="smaller batches and dimensions"
        ) from error


def open_dims(specs: Sequence[TensorSpec]) -> tuple[str, ...]:
    """What ``dims`` may name: the symbols of the inputs, and ``INPUT.AXIS`` where a size has no name."""
    names = (
        _open_dim(spec, axis)
        for spec in specs
        for axis, dim in enumerate(spec.shape if spec.shape is not None else (None,))
        if not isinstance(dim, int)
    )
    return tuple(dict.fromkeys(names))


def _open_dim(spec: TensorSpec, axis: int) -> str:
    dim = spec.shape[axis] if spec.shape is not None else None
    return dim if isinstance(dim, str) else f"{spec.name}.{axis}"


def _shape(spec: TensorSpec, sizes: dict[str, int], batch: int) -> tuple[int, ...]:
    dims = spec.shape if spec.shape is not None else (None,)
    pixels = _image_axes(spec)
    shape = []
    for axis, dim in enumerate(dims):
        if isinstance(dim, int):
            shape.append(dim)
            continue
        size = DEFAULT_PIXELS if axis in pixels else DEFAULT_DIM
        named = dim or ""
        if named.lower().startswith("batch") or (axis == 0 and not _is_length(named)):
            size = batch
        shape.append(sizes.setdefault(_open_dim(spec, axis), size))
    return tuple(shape)


def _is_length(name: str) -> bool:
    return any(word in name.lower() for word in ("seq", "len", "time", "frame", "token"))


def _image_axes(spec: TensorSpec) -> tuple[int, ...]:
    if spec.shape is None or len(spec.shape) != 4 or not spec.dtype.startswith(("float", "bfloat", "uint8")):
        return ()
    return (1, 2) if spec.shape[3] in (1, 3, 4) else (2, 3)


def _values(spec: TensorSpec, shape: tuple[int, ...], seed: int) -> np.ndarray:
    generator = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    name = spec.name.lower()
    if spec.dtype == "string":
        return np.full(shape, "text", dtype=object)
    if spec.dtype == "bool":
        return np.ones(shape, bool) if "mask" in name else generator.integers(0, 2, shape).astype(bool)
    try:
        dtype = np.dtype(getattr(ml_dtypes, spec.dtype)) if hasattr(ml_dtypes, spec.dtype) else np.dtype(spec.dtype)
    except TypeError as error:
        raise DataError(f"no plausible values of dtype {spec.dtype}", where=spec.name) from error
    if "mask" in name:
        return np.ones(shape, dtype)
    if dtype.kind in "iu":
        if "token_type" in name or "segment" in name:
            return np.zeros(shape, dtype)
        if not shape and dtype.itemsize >= 4 and (name in ("sr", "fs") or "rate" in name):
            return np.full(shape, 16000, dtype)
        return generator.integers(0, 256 if dtype == np.uint8 else IDS, shape).astype(dtype)
    if dtype.kind == "c":
        return (generator.standard_normal(shape) + 1j * generator.standard_normal(shape)).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)
