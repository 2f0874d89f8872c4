"""Samples for calibration and evaluation, and plausible inputs where there are none.

A dataset is spelled as one text:

* ``file.npz``: an array for each input, by its name, samples along axis 0; ``labels`` if there are any.
* ``file.npy``: the array of a model with one input.
* a folder of images, flat, or with a folder for each class.
* ``file.py:function``: a function of the user's that yields ``{input: array}``, or such a dict and labels.

Arrays are the model's inputs as they are; only images are preprocessed.
"""

from __future__ import annotations

import itertools
import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes import TensorSpec
from toolchain import user_code
from toolchain.errors import DataError
from toolchain.image_folder import CLASS_FILES, IMAGE_SUFFIXES, open_images
from toolchain.preprocessing import ImagePreprocessing
from toolchain.samples import (
    Batch,
    Dataset,
    Request,
    check_arrays,
    check_labels,
    fixed_batch,
    sha256_of,
    spread,
)
from toolchain.seeded import seeded_inputs
from toolchain.weights import file_sha256
from toolchain.zoo import ZOO

__all__ = ["CLASS_FILES", "IMAGE_SUFFIXES", "Batch", "Dataset", "open_dataset", "preprocessing_of", "seeded_inputs"]


def open_dataset(
    text: str,
    *,
    inputs: Sequence[TensorSpec],
    preprocessing: ImagePreprocessing | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    class_names: Sequence[str] | None = None,
    class_count: int | None = None,
    label_offset: int = 0,
) -> Dataset:
    """Opens a dataset and checks what can be checked without reading it all.

    Args:
        text: see the module's docstring.
        inputs: what the model takes. A fixed first dimension is the batch size, whatever ``batch_size``.
        preprocessing: for images.
        batch_size: samples a batch; the last one may be smaller. A function's own batches stay as they are.
        limit: use this many samples, evenly spread over files and arrays, the first ones of a function.
        class_names: the model's own names of its classes: a folder may be named after one.
        class_count: number of the model's classes: that many folders, sorted, are 0, 1, 2, ...
        label_offset: added to every label, where the model counts a background class first.

    Raises:
        DataError: it is not there, holds nothing, cannot be read, or does not fit ``inputs``.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise DataError("batch_size and limit are at least 1", where=f"batch_size={batch_size}, limit={limit}")
    if not inputs:
        raise DataError("the model has no inputs to feed", where=text)
    request = Request(tuple(inputs), preprocessing, batch_size, limit, class_names, class_count, label_offset)
    if found := user_code.split(text):
        return _python(*found, request)
    path = Path(text)
    try:
        if path.is_dir():
            return open_images(path, request)
        if path.suffix in (".npz", ".npy") and path.exists():
            return _arrays(path, request)
        exists = path.exists()
    except OSError as error:
        raise DataError(f"unreadable: {error.strerror}", where=error.filename or text) from error
    raise DataError(
        "not a dataset" if exists else "no such dataset",
        where=text,
        hint="give a .npz, a .npy, a folder of images, or FILE.py:FUNCTION",
    )


def preprocessing_of(text: str) -> ImagePreprocessing:
    """The preprocessing that a zoo name or a .json file stands for, as ``--preprocessing`` takes it.

    Raises:
        DataError: neither, or the file does not say it as ``ImagePreprocessing.to_json`` does.
    """
    if text in ZOO:
        known = ZOO[text].preprocessing
        if known is None:
            raise DataError(f"{text} takes no images", where=f"--preprocessing {text}")
        return known
    try:
        tree = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"neither a zoo name nor a readable .json file: {error}",
            where=f"--preprocessing {text}",
            hint=f"zoo names: {', '.join(name for name, entry in ZOO.items() if entry.preprocessing)}",
        ) from error
    return ImagePreprocessing.from_json(tree)


def _arrays(path: Path, request: Request) -> Dataset:
    inputs, offset = request.inputs, request.label_offset
    arrays = _read_arrays(path, inputs)
    found = arrays.pop("labels", None) if "labels" not in {spec.name for spec in inputs} else None
    check_arrays(arrays, inputs, path.name)
    labels = None if found is None else check_labels(found, path.name) + offset
    counts = {name: len(array) for name, array in arrays.items()} | ({} if labels is None else {"labels": len(labels)})
    count = counts[inputs[0].name]
    if any(n != count for n in counts.values()):
        shown = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise DataError(f"the arrays have different numbers of samples: {shown}", where=str(path))
    if not count:
        raise DataError("no samples", where=str(path))
    chosen = spread(count, request.limit)
    step, dropped = fixed_batch(inputs, request.batch_size, len(chosen), path.name)

    def batches() -> Iterator[Batch]:
        for start in range(0, len(chosen) - dropped, step):
            rows = chosen[start : start + step]
            yield Batch(
                {name: np.ascontiguousarray(array[rows]) for name, array in arrays.items()},
                None if labels is None else labels[rows],
            )

    def digest() -> str:
        return sha256_of(file_sha256(path), str(chosen.tolist()), str(step), str(offset))

    return Dataset(
        kind=path.suffix[1:],
        name=path.name,
        labelled=labels is not None,
        len_hint=len(chosen) - dropped,
        dropped=dropped,
        _batches=batches,
        _digest=digest,
    )


def _read_arrays(path: Path, inputs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    try:
        if path.suffix == ".npy":
            if len(inputs) != 1:
                names = ", ".join(spec.name for spec in inputs)
                raise DataError(
                    f"one array for a model with {len(inputs)} inputs",
                    where=str(path),
                    hint=f"save a .npz with the arrays {names}",
                )
            return {inputs[0].name: np.load(path, mmap_mode="r", allow_pickle=False)}
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"unreadable: {error}",
            where=str(path),
            hint="write it with numpy.save or numpy.savez, without objects",
        ) from error


_END = object()


def _python(path: Path, name: str, request: Request) -> Dataset:
    inputs = request.inputs
    function = user_code.load(path, name, error=DataError)
    where = f"{path.name}:{name}"
    fixed = any(spec.shape and isinstance(spec.shape[0], int) for spec in inputs)  # then no batch can be cut

    def batches() -> Iterator[Batch]:
        left = math.inf if request.limit is None else request.limit
        items = user_code.call(lambda: iter(function()), path, error=DataError)
        for number in itertools.count():
            item = user_code.call(lambda: next(items, _END), path, error=DataError)
            if item is _END:
                if number == 0:
                    raise DataError("it yields nothing", where=where, hint="yield {input: array}")
                return
            batch = _python_batch(item, inputs, f"{where}, batch {number}")
            count = len(next(iter(batch.inputs.values())))
            if count > left and not fixed:
                keep = int(left)
                batch = Batch(
                    {key: array[:keep] for key, array in batch.inputs.items()},
                    None if batch.labels is None else batch.labels[:keep],
                )
            yield Batch(batch.inputs, None if batch.labels is None else batch.labels + request.label_offset)
            left -= count
            if left <= 0:
                return

    return Dataset(
        kind="python",
        name=where,
        labelled=None,
        len_hint=None,
        _batches=batches,
        _digest=lambda: sha256_of(user_code.digest(path), name, str(request.limit), str(request.label_offset)),
    )


def _python_batch(item: Any, inputs: Sequence[TensorSpec], where: str) -> Batch:
    labels = None
    if isinstance(item, tuple) and len(item) == 2:
        item, labels = item
    if not isinstance(item, Mapping):
        raise DataError(
            f"it yields a {type(item).__name__}",
            where=where,
            hint="yield {input: array}, or ({input: array}, labels)",
        )
    arrays = {str(key): np.asarray(value) for key, value in item.items()}
    check_arrays(arrays, inputs, where)
    count = len(arrays[inputs[0].name])
    for spec in inputs:
        fixed = spec.shape[0] if spec.shape else None
        size = len(arrays[spec.name])
        if isinstance(fixed, int) and size != fixed:
            raise DataError(f"{spec.name} has {size} samples, the model takes exactly {fixed}", where=where)
    if labels is not None:
        labels = check_labels(labels, where)
        if len(labels) != count:
            raise DataError(f"{len(labels)} labels for {count} samples", where=where)
    return Batch(arrays, labels)
