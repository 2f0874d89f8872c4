"""Masks of weights in files: written as ``.npz``, read from there and from what torch.nn.utils.prune leaves behind."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from passes.prune_weights import Masks
from toolchain.errors import SourceError
from toolchain.storage import write_bytes
from toolchain.weights import read_state

_SUFFIX = "_mask"


def write_masks(masks: Masks, path: Path) -> None:
    """Writes masks as a compressed ``.npz``: a bool array for each weight, under its name. Raises StorageError."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        # not numpy's savez: it takes names as keywords, and dates its entries
        for name, mask in sorted(masks.masks.items()):
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(info, "w") as entry:
                np.lib.format.write_array(entry, np.asarray(mask, np.bool_), allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def read_masks(path: Path) -> Masks:
    """Reads masks: ``.npz`` of ``write_masks`` or of one's own making, or a state dict (``.pt``, ``.pth``, ``.th``,
    ``.safetensors``) of a module under torch.nn.utils.prune, of which the buffers ``*_mask`` are taken.

    Raises:
        SourceError: no such file, damaged, not readable without unpickling, or there is no mask in it.
    """
    if path.suffix == ".npz":
        return Masks(_read_npz(path))
    try:
        state = read_state(path)
    except ImportError as error:
        raise SourceError(
            f"a state dict is read with torch: {error}", where=str(path), hint="pip install torch, or save an .npz"
        ) from error
    found = {name: tensor.numpy() for name, tensor in state.items() if name.endswith(_SUFFIX)}
    if not found:
        raise SourceError(
            f"the file holds no mask among {len(state)} tensors",
            where=str(path),
            hint="save the module's state_dict() before prune.remove(): the masks are its buffers *_mask",
        )
    return Masks(found)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise SourceError("no such file of masks", where=str(path), hint="check the path")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise SourceError(f"the masks are not readable: {error}", where=str(path), hint="write them anew") from error
    if not found:
        raise SourceError("the file holds no mask", where=str(path))
    return found
