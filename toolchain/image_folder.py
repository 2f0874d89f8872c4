"""A folder of images as a dataset: flat, or with a folder for each class."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from toolchain.errors import DataError
from toolchain.preprocessing import ImagePreprocessing, missing_pillow, open_image, preprocess
from toolchain.samples import Batch, Dataset, Request, check_arrays, fixed_batch, sha256_of, spread

IMAGE_SUFFIXES = frozenset(".jpg .jpeg .png .bmp .gif .webp .tif .tiff .ppm .pgm".split())


def open_images(path: Path, request: Request) -> Dataset:
    """Opens the folder: finds the images and their labels, decodes none. For ``data.open_dataset``.

    Raises:
        DataError: no images, no preprocessing, a class without a label, or another input than an image.
    """
    inputs, spec = request.inputs, request.preprocessing
    if len(inputs) != 1:
        names = ", ".join(tensor.name for tensor in inputs)
        raise DataError(
            f"a folder of images feeds one input, the model has {names}", where=str(path), hint="use a .npz"
        )
    if spec is None:
        raise DataError(
            "how to preprocess the images is not known: the model's source does not say",
            where=str(path),
            hint="--preprocessing with a zoo name or a .json file (data.preprocessing in a recipe), "
            "or prepared arrays in a .npz",
        )
    chw = (3, *spec.size) if spec.layout == "NCHW" else (*spec.size, 3)
    check_arrays({inputs[0].name: np.empty((0, *chw), np.float32)}, inputs, f"{path.name} after preprocessing")
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    flat, skipped = image_files(path)
    labels: list[int] | None = None
    if folders and flat:
        raise DataError(
            f"images and folders side by side: {flat[0].name}, {folders[0].name}/",
            where=str(path),
            hint="use a flat folder, or a folder for each class",
        )
    files = flat
    if folders:
        index = _class_index(path, [folder.name for folder in folders], request)
        labels = []
        for folder in folders:
            found, others = image_files(folder)
            skipped += others
            files += found
            labels += [index[folder.name] + request.label_offset] * len(found)
    if not files:
        raise DataError(f"no images ({skipped} other files)", where=str(path), hint="add .jpg or .png files")
    chosen = spread(len(files), request.limit)
    step, dropped = fixed_batch(inputs, request.batch_size, len(chosen), path.name)
    kept = chosen[: len(chosen) - dropped].tolist()
    chunks = [kept[start : start + step] for start in range(0, len(kept), step)]

    def batches() -> Iterator[Batch]:
        for rows, images in zip(chunks, _decoded([[files[i] for i in rows] for rows in chunks], spec), strict=True):
            picked = None if labels is None else np.array([labels[i] for i in rows], np.int64)
            yield Batch({inputs[0].name: images}, picked)

    def digest() -> str:
        parts = [json.dumps(spec.to_json(), sort_keys=True), str(step)]
        for i in kept:
            status = files[i].stat()
            label = None if labels is None else labels[i]
            parts.append(f"{files[i].relative_to(path).as_posix()} {status.st_size} {status.st_mtime_ns} {label}")
        return sha256_of(*parts)

    return Dataset(
        kind="images",
        name=path.resolve().name,
        labelled=labels is not None,
        len_hint=len(kept),
        classes=None if labels is None else len({labels[i] for i in kept}),
        skipped=skipped,
        dropped=dropped,
        _batches=batches,
        _digest=digest,
    )


def image_files(folder: Path) -> tuple[list[Path], int]:
    """The images of a folder, sorted by name, and how many other files it has, hidden ones aside."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    return images, len(files) - len(images)


def _class_index(path: Path, folders: list[str], request: Request) -> dict[str, int]:
    """The label that each class folder stands for. The first of the ways that knows all of them."""
    tables = [_class_file(place / name) for place in (path, path.parent) for name in CLASS_FILES]
    if all(folder.isdecimal() for folder in folders):
        tables.append({folder: int(folder) for folder in folders})
    if request.class_names is not None:
        tables.append({name: i for i, name in enumerate(request.class_names)})
    if request.class_count == len(folders):
        tables.append({folder: i for i, folder in enumerate(folders)})
    for table in tables:
        if table is not None and all(folder in table for folder in folders):
            return {folder: table[folder] for folder in folders}
    unknown = next((f for table in tables if table for f in folders if f not in table), folders[0])
    raise DataError(
        f"which class is the folder {unknown!r}?",
        where=str(path),
        hint='add a classes.json beside or above it: ["first class", ...] or {"folder": index, ...}',
    )


#: files that say which folder is which class, looked for in the folder and in its parent
CLASS_FILES = ("wnid_to_index.json", "classes.json")


def _class_file(path: Path) -> dict[str, int] | None:
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"unreadable: {error}", where=str(path), hint="write it as JSON") from error
    if isinstance(tree, list) and all(isinstance(name, str) for name in tree):
        return {name: i for i, name in enumerate(tree)}
    if isinstance(tree, dict) and all(isinstance(i, int) and i >= 0 for i in tree.values()):
        return tree
    raise DataError("not a table of classes", where=str(path), hint='wanted: ["name", ...] or {"name": index, ...}')


def _decoded(chunks: Iterable[list[Path]], spec: ImagePreprocessing) -> Iterator[np.ndarray]:
    """Each chunk's images as one float32 array; the next chunk is decoded while this one is used."""
    try:
        import PIL.Image  # noqa: F401 - here, so that its absence is one error and not one a thread
    except ImportError as error:
        raise missing_pillow(error) from error

    def decode(file: Path) -> np.ndarray:
        image = open_image(file)
        try:
            return preprocess(image, spec)
        except DataError as error:
            raise DataError(error.what, where=str(file), hint=error.hint) from error

    pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1), "decode")
    try:
        pending: collections.deque[list[concurrent.futures.Future[np.ndarray]]] = collections.deque()
        for chunk in chunks:
            pending.append([pool.submit(decode, file) for file in chunk])
            if len(pending) > 1:
                yield np.stack([future.result() for future in pending.popleft()])
        while pending:
            yield np.stack([future.result() for future in pending.popleft()])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
