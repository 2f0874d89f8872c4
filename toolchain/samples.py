"""What every dataset is made of: batches, what was asked for, and the checks against the model's inputs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from runtimes import TensorSpec
from toolchain.errors import DataError
from toolchain.preprocessing import ImagePreprocessing


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Some samples.

    Attributes:
        inputs: an array for each input of the model, samples along axis 0.
        labels: int64 [samples], the index of each one's class; None where there are none.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Batches that can be gone through again and again; made by ``open_dataset``.

    Attributes:
        kind: ``npz``, ``npy``, ``images`` or ``python``.
        name: the file's or folder's own name, without its path.
        labelled: whether every batch has labels; None where that shows only on iterating.
        len_hint: number of samples; None where it is not known beforehand.
        classes: number of classes that occur in the labels, for folders of images.
        skipped: files of a folder that are no images.
        dropped: samples at the end that do not fill a batch, where the model has a fixed batch size.
    """

    kind: str
    name: str
    labelled: bool | None
    len_hint: int | None
    classes: int | None = None
    skipped: int = 0
    dropped: int = 0
    _batches: Callable[[], Iterator[Batch]] = dataclasses.field(repr=False, default=lambda: iter(()))
    _digest: Callable[[], str] = dataclasses.field(repr=False, default=lambda: "")

    def __iter__(self) -> Iterator[Batch]:
        """The batches, from the first on. Raises DataError where one cannot be read or does not fit."""
        return self._batches()

    @property
    def whole(self) -> int | None:
        """Number of samples with those that were dropped; None where it is not known beforehand."""
        return None if self.len_hint is None else self.len_hint + self.dropped

    def describe(self) -> dict[str, Any]:
        """What a manifest records: JSON values, and no path of this machine."""
        return {
            "kind": self.kind,
            "name": self.name,
            "samples": self.len_hint,
            "labelled": self.labelled,
            "classes": self.classes,
            "skipped": self.skipped,
            "dropped": self.dropped,
        }

    def fingerprint(self) -> str:
        """A key (hex) that changes when the samples, their order, labels or preprocessing do.

        Files of arrays and code are read whole; of images the name, size and time of change count.
        """
        return self._digest()


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What ``open_dataset`` was asked for, besides the place; see there."""

    inputs: tuple[TensorSpec, ...]
    preprocessing: ImagePreprocessing | None
    batch_size: int
    limit: int | None
    class_names: Sequence[str] | None
    class_count: int | None
    label_offset: int


def check_arrays(arrays: Mapping[str, np.ndarray], inputs: Sequence[TensorSpec], where: str) -> None:
    """Raises DataError unless there is an array for each input, and no other, of its dtype and shape."""
    wanted = "wanted: " + "; ".join(map(str, inputs))
    names = {spec.name for spec in inputs}
    if odd := sorted(names.symmetric_difference(arrays)):
        problem = "there is no array for" if odd[0] in names else "the model has no"
        raise DataError(f"{problem} input {odd[0]!r}", where=where, hint=wanted)
    sizes: dict[str, tuple[int, str]] = {}
    for spec in inputs:
        array = arrays[spec.name]
        given = f"{spec.name} is {array.dtype}{list(array.shape)}"
        if array.dtype.name != spec.dtype and not (spec.dtype == "string" and array.dtype.kind in "OSU"):
            raise DataError(f"another dtype: {given}", where=where, hint=f"{wanted}; convert it with .astype")
        if array.ndim < 1:
            raise DataError(f"no axis of samples: {given}", where=where, hint=wanted)
        if spec.shape is None:
            continue
        if array.ndim != len(spec.shape):
            raise DataError(f"another rank: {given}", where=where, hint=wanted)
        for axis, (size, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
            if axis == 0:  # the axis of samples: here of all of them, not of one batch
                continue
            known = dim if isinstance(dim, int) else None
            if isinstance(dim, str):
                known = sizes.setdefault(dim, (size, spec.name))[0]
            if known is not None and size != known:
                raise DataError(f"axis {axis} is {size}, not {known}: {given}", where=where, hint=wanted)


def check_labels(labels: Any, where: str) -> np.ndarray:
    """Labels as int64 [samples]. Raises DataError for anything but one integer a sample."""
    array: np.ndarray = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"labels are {array.dtype}{list(array.shape)}", where=where, hint="wanted: one integer a sample"
        )
    return array.astype(np.int64)


def spread(count: int, limit: int | None) -> np.ndarray:
    """Indices of at most ``limit`` of ``count`` samples, evenly spaced: a sorted folder gives every class."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


def fixed_batch(inputs: Sequence[TensorSpec], asked: int, count: int, where: str) -> tuple[int, int]:
    """The batch size that the model allows, and how many samples at the end do not fill one."""
    fixed = {spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)}
    if not fixed:
        return asked, 0
    if len(fixed) > 1:
        raise DataError(
            f"the inputs have different fixed first dimensions: {sorted(fixed, key=int)}",
            where=where,
            hint="give a FILE.py:FUNCTION that yields whole inputs",
        )
    step = int(fixed.pop())
    if step > count:
        raise DataError(f"{count} samples, but the model takes exactly {step}", where=where, hint="add samples")
    return step, count % step


def sha256_of(*parts: str) -> str:
    """One digest (hex) of several texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
