"""What the numbers in a model are, and how files of them are read.

Nothing here unpickles: safetensors, or torch's own format with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from toolchain.errors import SourceError

if TYPE_CHECKING:
    import torch

PIP_EXPORT = "pip install 'onnx-toolchain[export]'"
_TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin")


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """What the numbers in a model are.

    Attributes:
        kind: ``pretrained`` from a hub or package; ``random``; ``file``: the user's; ``embedded``: part
            of the source itself, as in an ONNX file, or made by the user's factory.
        origin: where they are from, never a path of this machine: ``hub:<id>@<revision>``, a package and
            its version, or a file's name. None for random ones.
        sha256: of the file, or of the module's state where there is no one file.
        seed: of random ones, and what a factory was seeded with.
        note: why they are not what was asked for. None where they are.
    """

    kind: Literal["pretrained", "random", "file", "embedded"]
    origin: str | None = None
    sha256: str | None = None
    seed: int | None = None
    note: str | None = None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def state_sha256(module: torch.nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a module's state, in the order of the names."""
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Reads a file of weights: .safetensors, or .pt/.pth without unpickling objects.

    A ``state_dict``, ``model_state_dict`` or ``model`` entry is unwrapped, and the prefix that
    DataParallel (``module.``) or torch.compile (``_orig_mod.``) puts before every name is taken off.

    Raises:
        SourceError: no such file, another format, damaged, or it holds more than tensors.
    """
    import torch

    if not path.is_file():
        raise SourceError("no such file of weights", where=str(path), hint="check the path")
    if path.suffix == ".safetensors":
        state = _read_safetensors(path)
    elif path.suffix in _TORCH_SUFFIXES:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError ...: all mean "not readable"
            # Not torch's own words: they advise to unpickle.
            raise SourceError(
                f"weights are not readable without unpickling ({type(error).__name__})",
                where=str(path),
                hint="save them with safetensors, or as a plain state_dict with torch.save",
            ) from error
    else:
        raise SourceError(
            f"not a file of weights: {path.name}",
            where=str(path),
            hint="give a .safetensors, .pt or .pth file",
        )
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise SourceError("the file holds more than tensors by name", where=str(path), hint="save module.state_dict()")
    for prefix in ("module.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise SourceError(f"safetensors is missing: {error}", where=path.name, hint=PIP_EXPORT) from error
    try:
        return dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise SourceError(f"weights are not readable: {error}", where=str(path), hint="get the file anew") from error


def load_strictly(module: torch.nn.Module, state: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Copies weights into a module; every name and shape has to match.

    Two kinds of name may be absent: one tied to a name that is there, and a BatchNorm's
    ``num_batches_tracked``, which only training reads.

    Raises:
        SourceError: says how many names are missing, unexpected or of another shape, and the first few.
    """
    own = module.state_dict()
    present = {own[name].data_ptr() for name in state if name in own}
    missing = [
        name
        for name, tensor in own.items()
        if name not in state
        and not name.endswith("num_batches_tracked")
        and not (tensor.numel() and tensor.data_ptr() in present)
    ]
    unexpected = [name for name in state if name not in own]
    misshaped = [
        f"{name} is {list(state[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} {word}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for word, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if names
    ]
    if problems:
        raise SourceError(
            "the weights are not this model's: " + "; ".join(problems),
            where=where,
            hint=f"the model has {len(own)} tensors, the file {len(state)}: another variant, or class count?",
        )
    module.load_state_dict(dict(state), strict=False)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch for the block and leaves its generator as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def random_weights(module: torch.nn.Module, seed: int, note: str | None = None) -> Weights:
    """The record of a module that was built under ``seeded``."""
    return Weights("random", sha256=state_sha256(module), seed=seed, note=note)


def weights_from_file(module: torch.nn.Module, path: Path) -> Weights:
    """Reads a file into a module, strictly, and gives the record. Raises SourceError."""
    load_strictly(module, read_state(path), where=str(path))
    return Weights("file", origin=path.name, sha256=file_sha256(path))


def fallback_line(name: str, reason: str, seed: int) -> str:
    """The one line that says that ``auto`` ended in random weights."""
    return f"{name}: no pretrained weights ({reason}); going on with random ones, seed {seed}"
