"""What every backend checks before a model runs: names, types, dtypes, ranks and sizes of the inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.base import InvalidInput, RunFailed, TargetUnavailable, TensorSpec

#: How many sets of input shapes a session remembers as good.
_REMEMBERED = 256
#: Cache lines, and the widest vector register.
_ALIGNMENT = 64
#: A name that ONNX lets stand for a size. Others ("?", "-1", "2*s0") are remarks or expressions.
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def is_symbol(dim: int | str | None) -> bool:
    """Whether a dimension is a name that stands for one size wherever it appears."""
    return isinstance(dim, str) and dim != "None" and _SYMBOL.fullmatch(dim) is not None


def check_place(outputs: object) -> None:
    """Raises InvalidInput where ``run(outputs=...)`` is neither "host" nor "device"."""
    if outputs not in ("host", "device"):
        raise InvalidInput(f"outputs={outputs!r}: it is 'host' or 'device'")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of ``TensorSpec.dtype``; strings are objects.

    Raises:
        TargetUnavailable: the dtype is one of ml_dtypes', which is not installed.
    """
    if name == "string":
        return np.dtype(object)
    if name == "bfloat16" or name.startswith("float8"):
        try:
            import ml_dtypes
        except ImportError:
            raise TargetUnavailable(f"numpy alone has no {name}", hint="run: pip install ml_dtypes") from None
        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return found
    return np.dtype(name)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An uninitialised C-ordered array that begins on a cache line."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def output_shapes(
    specs: Sequence[TensorSpec],
    inputs: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
    run: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's outputs for one set of input shapes, as ``Session.bind`` needs them.

    Args:
        specs: the outputs.
        inputs: an array for each input, which may be written over.
        sizes: of the symbolic dimensions, from ``InputCheck.shapes``.
        run: asked where the declared shapes do not tell.

    Raises:
        InvalidInput: a shape depends on data, or a trial run failed.
    """
    known: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        dims = [sizes.get(d) if isinstance(d, str) and is_symbol(d) else d for d in spec.shape or ()]
        sized = tuple(d for d in dims if isinstance(d, int))
        if spec.shape is not None and len(sized) == len(dims):
            known[spec.name] = sized
    if len(known) == len(specs):
        return known
    # See what two different inputs give.
    trials = []
    for value in (0, 1):
        for array in inputs.values():
            array.fill(value)
        try:
            trials.append({name: array.shape for name, array in run(inputs).items()})
        except RunFailed as error:
            raise InvalidInput(
                f"the shapes of the outputs are unknown, and a trial run failed: {error.what}",
                hint="use run() for this model",
            ) from error
    for name, shape in trials[0].items():
        if shape != trials[1][name]:
            raise InvalidInput(
                f"the shape of output {name!r} depends on the data: "
                f"{list(shape)} for zeros, {list(trials[1][name])} for ones",
                where=f"output {name!r}",
                hint="use run() for this model",
            )
    return trials[0]


class InputCheck:
    """Checks feeds against the specs of a model. Safe to call from many threads.

    A set of shapes that was accepted once is remembered, so that a repeated call costs well under a
    microsecond: one identity comparison of types and dtypes for each input and one look-up of the shapes.
    """

    def __init__(self, specs: Sequence[TensorSpec], *, others: tuple[type, ...] = ()) -> None:
        """``others``: types with ``shape`` and ``dtype`` that are taken as they are beside numpy's arrays."""
        self._specs = tuple(specs)
        self._others = others
        self._count = len(self._specs)
        # Strings must be looked at one by one each time: no array has None for its dtype.
        self._wanted = tuple(
            (spec.name, None if spec.dtype == "string" else numpy_dtype(spec.dtype)) for spec in self._specs
        )
        self._accepted: set[tuple[tuple[int, ...], ...]] = set()

    def __call__(self, feeds: Mapping[str, np.ndarray], /) -> Mapping[str, np.ndarray]:
        """Returns feeds that a runtime may be given as they are.

        Raises:
            InvalidInput: with what was given and what is wanted.
        """
        try:
            if len(feeds) == self._count:
                shapes = []
                for name, dtype in self._wanted:
                    array = feeds[name]
                    if type(array) is not np.ndarray or array.dtype is not dtype:
                        break
                    shapes.append(array.shape)
                else:
                    if tuple(shapes) in self._accepted:
                        return feeds
        except (KeyError, TypeError):
            return self._thorough(feeds)
        return self._thorough(feeds)

    def shapes(self, shapes: Mapping[str, Sequence[int]], /) -> dict[str, int]:
        """Checks input shapes and returns the size that each symbolic dimension has in them."""
        if not isinstance(shapes, Mapping):
            raise InvalidInput(f"shapes are given as a dict of name to sizes, not as {type(shapes).__name__}")
        self._check_names(shapes, "shapes")
        sizes: dict[str, int] = {}
        for spec in self._specs:
            if not isinstance(shapes[spec.name], Sequence):
                raise InvalidInput(f"not a shape: {shapes[spec.name]!r}", where=f"input {spec.name!r}")
            shape = tuple(shapes[spec.name])
            if not all(isinstance(size, (int, np.integer)) and size >= 0 for size in shape):
                raise InvalidInput(f"not a shape: {shape}", where=f"input {spec.name!r}")
            self._check_shape(spec, shape, spec.dtype, sizes)
        return sizes

    def _thorough(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        if not isinstance(feeds, Mapping):
            raise InvalidInput(
                f"inputs are given as a dict of name to array, not as {type(feeds).__name__}",
                hint=f"wanted: {self._wanted_text()}",
            )
        self._check_names(feeds, "inputs")
        checked: dict[str, np.ndarray] = {}
        sizes: dict[str, int] = {}
        strings = False
        for spec, (_, dtype) in zip(self._specs, self._wanted, strict=True):
            array = self._array(spec, feeds[spec.name])
            if dtype is None:
                strings = True
                array = _strings(spec, array)
            elif array.dtype != dtype:
                raise InvalidInput(
                    f"input {spec.name!r}: {_given(array)} was given, {_wanted(spec)} is wanted",
                    where=f"input {spec.name!r}",
                    hint=_dtype_hint(spec, array, dtype),
                )
            self._check_shape(spec, array.shape, str(array.dtype), sizes)
            checked[spec.name] = array
        if not strings:
            if len(self._accepted) >= _REMEMBERED:
                self._accepted.clear()
            self._accepted.add(tuple(array.shape for array in checked.values()))
        return checked

    def _check_names(self, given: Mapping[str, Any], what: str) -> None:
        names = {spec.name for spec in self._specs}
        if given.keys() == names:
            return
        missing = [spec.name for spec in self._specs if spec.name not in given]
        unknown = [repr(name) for name in given if name not in names]
        parts = [f"no {', '.join(map(repr, missing))}"] if missing else []
        if unknown:
            parts.append(f"unknown: {', '.join(unknown)}")
        raise InvalidInput(f"wrong {what}: {'; '.join(parts)}", hint=f"wanted: {self._wanted_text()}")

    def _wanted_text(self) -> str:
        return "; ".join(map(str, self._specs)) or "no inputs at all"

    def _array(self, spec: TensorSpec, value: object) -> np.ndarray:
        if type(value) is np.ndarray or isinstance(value, self._others):
            return value  # type: ignore[return-value]
        # np.ma is imported by being named, and takes milliseconds: only for what is no plain array.
        if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
            return np.asarray(value)  # a subclass such as memmap, seen as what it is
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        hint = f"np.asarray(value, dtype={spec.dtype!r})" if spec.dtype != "string" else None
        if isinstance(value, np.ma.MaskedArray):
            hint = "the mask would be lost: decide with .filled(value)"
        elif kind.startswith("torch."):
            hint = "value.numpy(force=True)"
        raise InvalidInput(
            f"input {spec.name!r}: a {kind} was given, a numpy array ({_wanted(spec)}) is wanted",
            where=f"input {spec.name!r}",
            hint=hint,
        )

    def _check_shape(self, spec: TensorSpec, shape: tuple[int, ...], dtype: str, sizes: dict[str, int]) -> None:
        if spec.shape is None:
            return
        reason = ""
        if len(shape) != len(spec.shape):
            reason = f"{len(shape)} dimensions in place of {len(spec.shape)}"
        else:
            for axis, (size, dim) in enumerate(zip(shape, spec.shape, strict=True)):
                if isinstance(dim, int):
                    if size != dim:
                        reason = f"dimension {axis} is {size} in place of {dim}"
                        break
                elif is_symbol(dim) and sizes.setdefault(str(dim), size) != size:
                    reason = f"dimension {axis} is {size}, but {dim!r} is {sizes[str(dim)]} before"
                    break
        if reason:
            raise InvalidInput(
                f"input {spec.name!r}: {dtype}{list(shape)} was given, {_wanted(spec)} is wanted: {reason}",
                where=f"input {spec.name!r}",
            )


def _wanted(spec: TensorSpec) -> str:
    return str(spec).removeprefix(f"{spec.name}: ")


def _given(array: np.ndarray) -> str:
    order = "" if array.dtype.isnative else "big-endian " if array.dtype.str[0] == ">" else "little-endian "
    return f"{order}{array.dtype.name}{list(array.shape)}"


def _dtype_hint(spec: TensorSpec, array: np.ndarray, dtype: np.dtype[Any]) -> str:
    if array.dtype.newbyteorder("=") == dtype:
        return f"bring it to this machine's byte order: array.astype({spec.dtype!r})"
    return f"nothing is cast silently: array.astype({spec.dtype!r}) if that is what you mean"


def _strings(spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    """An object array of str, whatever numpy keeps the strings in."""
    if array.dtype.kind in "UT":
        return array.astype(object)
    wrong: str | None = None
    if array.dtype.kind != "O":
        wrong = str(array.dtype)
    else:
        # ONNX Runtime would write str(x) of anything else, such as "b'abc'" for bytes and "None" for None.
        wrong = next((type(item).__name__ for item in array.flat if not isinstance(item, str)), None)
    if wrong is not None:
        raise InvalidInput(
            f"input {spec.name!r}: {wrong} was given, {_wanted(spec)} is wanted",
            where=f"input {spec.name!r}",
            hint="give an array of str: np.array([...], dtype=object)",
        )
    return array
