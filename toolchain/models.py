"""Where a model comes from: a zoo name, ``hf:ID``, ``timm:NAME``, ``torchvision:NAME``, ``FILE.py:FACTORY``,
``FILE.pt2`` or ``FILE.onnx``.

``resolve`` reads the text and imports nothing heavy; ``fingerprint`` names the content for a cache, still
without torch; ``load_torch`` builds the module. The builders of each kind are in ``torch_sources``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import re
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from toolchain import hub, user_code
from toolchain.errors import SourceError
from toolchain.preprocessing import ImagePreprocessing
from toolchain.weights import PIP_EXPORT, Weights, file_sha256
from toolchain.zoo import ZOO

if TYPE_CHECKING:
    import torch

__all__ = ["ZOO", "Source", "TorchModel", "Weights", "fingerprint", "load_torch", "resolve"]

Kind = Literal["zoo", "hf", "timm", "torchvision", "factory", "pt2", "onnx"]
_PREFIXES: Mapping[str, Kind] = {"hf": "hf", "timm": "timm", "torchvision": "torchvision"}


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A model's origin, read from what the user wrote.

    Attributes:
        kind: which of the ways it is.
        name: what its artifact is called by default: letters, digits, ``.``, ``_`` and ``-``.
        public: how manifests and reports name it; never a path of this machine.
        reference: the zoo name, the hub's id, or the name within timm or torchvision; "" for files.
        path: the file, or the local folder of ``hf:FOLDER``; None where it has none.
        function: the factory's name; None for the other kinds.
        revision: of ``hf:ID@REVISION``; "main" where none is given.
    """

    kind: Kind
    name: str
    public: str
    reference: str = ""
    path: Path | None = None
    function: str | None = None
    revision: str = "main"


@dataclasses.dataclass(frozen=True)
class TorchModel:
    """A PyTorch module that is ready to be exported.

    Attributes:
        module: in eval mode, on the CPU.
        program: for ``.pt2``, the exported program that ``module`` runs; None for the other kinds.
        example_inputs: a tensor for each input, batch size 2, in the order of ``input_names``.
        dynamic_axes: for each input, axis → the name of its symbolic size.
        input_names: names of the graph's inputs.
        output_names: names of the graph's outputs; None: named after the structure of what ``forward`` gives.
        positional: whether ``forward`` takes the inputs by position instead of by name.
        preprocessing: for images, where it is known.
        labels: names of the classes, where they are real ones.
        label_offset: what a dataset's label lacks to the model's class index (1 with a background class).
        weights: what the numbers are.
        provenance: the source and the versions of the packages that made the module.
        warnings: lines that the caller shows once.
        source_file: the user's own file, for error messages.
    """

    module: torch.nn.Module
    example_inputs: Mapping[str, torch.Tensor]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...] | None
    positional: bool
    weights: Weights
    preprocessing: ImagePreprocessing | None = None
    labels: tuple[str, ...] | None = None
    label_offset: int = 0
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    program: torch.export.ExportedProgram | None = None
    source_file: Path | None = None


def resolve(text: str) -> Source:
    """Reads a model's origin.

    Raises:
        SourceError: no such name (with the nearest ones) or file, or a file of another kind.
    """
    text = text.strip()
    prefix, colon, rest = text.partition(":")
    if colon and prefix in _PREFIXES:
        return _library(_PREFIXES[prefix], rest, text)
    if text in ZOO:
        return Source("zoo", text, text, reference=text)
    if found := user_code.split(text):
        path, function = found
        _require_file(path, text)
        name = path.stem if function in ("factory", "model", "main", "build", "create") else function
        return Source("factory", _slug(name), f"{path.name}:{function}", path=path, function=function)
    path = Path(text)
    if path.suffix.lower() in (".onnx", ".pt2"):
        _require_file(path, text)
        return Source("onnx" if path.suffix.lower() == ".onnx" else "pt2", _slug(path.stem), path.name, path=path)
    raise _unknown(text, path)


def _library(kind: Kind, rest: str, text: str) -> Source:
    if not rest:
        raise SourceError(f"no name after {kind}:", where=text, hint=f"write {kind}:NAME")
    if kind != "hf":
        return Source(kind, _slug(rest.rsplit("/", 1)[-1]), text, reference=rest)
    path = Path(rest)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SourceError("the folder has no config.json", where=rest, hint="give a transformers model's folder")
        name = path.resolve().name
        return Source("hf", _slug(name), f"hf:{name}", path=path)
    repository, at, revision = rest.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository, re.ASCII) or (at and not revision):
        raise SourceError(
            "neither a folder nor an id on the hub",
            where=text,
            hint="write hf:OWNER/MODEL, hf:OWNER/MODEL@REVISION",
        )
    return Source("hf", _slug(repository.rsplit("/", 1)[-1]), text, reference=repository, revision=revision or "main")


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("._-") or "model"


def _require_file(path: Path, text: str) -> None:
    if path.is_dir():
        raise SourceError("a folder, not a file", where=text, hint="name the model file in it")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, _neighbours(path), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "check the path"
        raise SourceError("no such file", where=text, hint=hint)


def _neighbours(path: Path) -> list[str]:
    try:
        return [p.name for p in path.parent.iterdir() if p.suffix == path.suffix]
    except OSError:
        return []


def _unknown(text: str, path: Path) -> SourceError:
    if path.suffix == ".py":
        return SourceError("which function makes the model?", where=text, hint=f"write {text}:FACTORY")
    if path.suffix in (".pt", ".pth", ".th", ".safetensors", ".bin"):
        return SourceError(
            "a file of weights is not a model",
            where=text,
            hint=f"name the architecture and give the file as weights: MODEL --weights {text}",
        )
    if text and path.exists():
        return SourceError("not a model that can be read", where=text, hint="give a .onnx, a .pt2 or FILE.py:FACTORY")
    near = difflib.get_close_matches(text.lower().replace("-", "_"), ZOO, n=3, cutoff=0.5)
    kinds = "hf:ID, timm:NAME, torchvision:NAME, FILE.py:FACTORY, FILE.pt2, FILE.onnx"
    return SourceError(
        f"no model is called {text!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""),
        where="model",
        hint=f"take one of {', '.join(ZOO)}, or {kinds}",
    )


def load_torch(source: Source, *, weights: str = "auto", seed: int = 0) -> TorchModel:
    """Builds the module. Takes seconds; downloads where ``auto`` may.

    Args:
        source: of any kind but ``onnx``.
        weights: ``auto``: pretrained ones from the local cache, the hub, or a package, else seeded random
            ones and a line in ``warnings``; ``random``; or the path of a file. A factory and a ``.pt2``
            have their own: only ``auto``, and for a factory a path.
        seed: of random weights.

    Raises:
        SourceError: a package is missing, the weights are not the model's, the user's factory failed, ...
    """
    if source.kind == "onnx":
        raise SourceError("an ONNX file is not loaded with torch", where=source.public, hint="read it as it is")
    try:
        import torch  # noqa: F401 - here, so that every kind says the same where it is missing
    except ImportError as error:
        raise SourceError(f"PyTorch is missing: {error}", where=source.public, hint=PIP_EXPORT) from error
    from toolchain import source_libraries, source_transformers, source_user

    lite = source.kind == "zoo" and ZOO[source.reference].provider == "efficientnet_lite_pytorch"
    loaders: Mapping[str, Callable[[Source, str, int], TorchModel]] = {
        "zoo": source_libraries.load_efficientnet_lite if lite else source_transformers.load,
        "hf": source_transformers.load,
        "timm": source_libraries.load_timm,
        "torchvision": source_libraries.load_torchvision,
        "factory": source_user.load_factory,
        "pt2": source_user.load_pt2,
    }
    model = loaders[source.kind](source, weights, seed)
    return dataclasses.replace(model, provenance={"source": source.public, **model.provenance})


#: batch size and sequence length of example inputs; torch.export would take 0 and 1 for constants
EXAMPLE_BATCH, EXAMPLE_SEQUENCE = 2, 16


def image_inputs(channels: int, height: int, width: int) -> dict[str, torch.Tensor]:
    """The example input of an image model: ``pixel_values``, float32 [2, channels, height, width], normal."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(EXAMPLE_BATCH, channels, height, width, generator=generator)}


def fingerprint(source: Source, *, weights: str = "auto", seed: int = 0) -> dict[str, str]:
    """Names what ``load_torch`` or reading the ONNX file would give, without doing it: no torch, no model.

    Equal fingerprints mean equal models. Where ``auto`` could still bring in other weights (the hub is
    within reach and nothing is cached yet), the fingerprint is unlike any other, so that nothing is
    ever reused; take it again after ``load_torch``, when the download is in the cache. Where the hub is
    out of reach it says so, and stops being equal once the weights can be had.

    What a factory reads in ways that its source does not show (the network, paths put together at run
    time) is not seen; see ``user_code.digest``.

    Raises:
        SourceError: a file cannot be read.
        InvalidModel: an ONNX file is damaged or points outside its folder.
    """
    parts = {"kind": source.kind, "reference": source.reference, "weights": weights}
    try:
        match source.kind:
            case "onnx":
                return {**parts, **_onnx_parts(source)}
            case "pt2":
                parts["file"] = file_sha256(_path(source))
            case "factory":
                parts["file"] = user_code.digest(_path(source))
                parts["function"] = source.function or ""
        if weights not in ("auto", "random"):
            parts["weights"] = file_sha256(Path(weights))
        else:
            parts |= _source_parts(source, weights)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", where=str(error.filename or source.public)) from error
    parts["seed"] = str(seed)
    parts |= {name: _version(name) for name in _packages(source)}
    return parts


def _path(source: Source) -> Path:
    assert source.path is not None, f"a source of kind {source.kind} has a path"
    return source.path


def _onnx_parts(source: Source) -> dict[str, str]:
    from runtimes.model_file import check_model_file

    path = _path(source)
    parts = {"file": file_sha256(path)}
    for number, file in enumerate(check_model_file(path).data_files):
        parts[f"data {number}"] = file_sha256(file)
    return parts


def _source_parts(source: Source, weights: str) -> dict[str, str]:
    """What decides about weights that no file was given for."""
    if source.kind == "zoo":
        entry = ZOO[source.reference]
        if weights == "random":
            return {"config": repr(entry)}
        if entry.provider == "transformers":
            return {"config": repr(entry), **_hub_parts(entry.repository, "main", weights)}
        return {"config": repr(entry), entry.repository: _version(entry.repository)}
    if source.kind == "hf" and source.path is not None:
        files = [source.path / "config.json", source.path / "preprocessor_config.json"]
        if weights == "auto":
            files += hub.weight_files(source.path)
        return {file.name: file_sha256(file) for file in files if file.is_file()}
    if source.kind == "hf":
        return _hub_parts(source.reference, source.revision, weights)
    if source.kind in ("timm", "torchvision") and weights == "auto":
        # They keep their own caches; what is in them is not known from here.
        return {"hub": f"unknown {uuid.uuid4().hex}"}
    return {}


def _hub_parts(repository: str, revision: str, weights: str) -> dict[str, str]:
    folder = hub.cached_snapshot(repository, revision)
    if folder is not None:
        files = hub.weight_files(folder) if weights == "auto" else []
        if files or weights == "random" or hub.offline() or not hub.reachable():
            return {"hub": f"{folder.name} {' '.join(file.name for file in files)}".strip()}
    elif hub.offline() or not hub.reachable():
        return {"hub": "out of reach"}
    return {"hub": f"not cached yet {uuid.uuid4().hex}"}


def _packages(source: Source) -> tuple[str, ...]:
    packages = ("torch", "transformers", "safetensors", "onnxscript", "onnx-ir", "onnx")
    match source.kind:
        case "timm":
            return (*packages, "timm")
        case "torchvision":
            return (*packages, "torchvision")
        case "zoo" if ZOO[source.reference].provider != "transformers":
            return (*packages, ZOO[source.reference].provider)
    return packages


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def versions(*packages: str) -> dict[str, str]:
    """The versions of packages, for provenance; "absent" where one is not installed."""
    return {"python": ".".join(map(str, sys.version_info[:3])), **{name: _version(name) for name in packages}}
