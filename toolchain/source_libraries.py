"""Image classifiers of other packages: EfficientNet-Lite with packaged weights, timm, torchvision."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from toolchain import imagenet
from toolchain.errors import SourceError
from toolchain.models import Source, TorchModel, image_inputs, versions
from toolchain.preprocessing import ImagePreprocessing
from toolchain.weights import (
    PIP_EXPORT,
    Weights,
    fallback_line,
    file_sha256,
    load_strictly,
    random_weights,
    read_state,
    seeded,
    state_sha256,
    weights_from_file,
)
from toolchain.zoo import ZOO


def load_efficientnet_lite(source: Source, weights: str, seed: int) -> TorchModel:
    """Builds EfficientNet-Lite of the zoo; its weights are in a package, so they need no hub."""
    entry = ZOO[source.reference]
    assert entry.preprocessing is not None, "an image classifier of the zoo has its preprocessing"
    try:
        import efficientnet_lite_pytorch
    except ImportError as error:
        raise SourceError(f"{entry.provider} is missing: {error}", where=source.public, hint=PIP_EXPORT) from error
    with seeded(seed):
        module = efficientnet_lite_pytorch.EfficientNet.from_name(entry.architecture)
    module.eval()
    notes: tuple[str, ...] = ()
    package = entry.repository
    if weights == "random":
        record = random_weights(module, seed)
    elif weights != "auto":
        record = weights_from_file(module, Path(weights))
    elif file := _packaged_weights(package):
        load_strictly(module, read_state(file), where=f"{package}/{file.name}")
        record = Weights("pretrained", f"{package} {versions(package)[package]}", file_sha256(file))
    else:
        notes = (fallback_line(source.name, f"the package {package} is missing: {PIP_EXPORT}", seed),)
        record = random_weights(module, seed, notes[0])
    return TorchModel(
        module=module,
        example_inputs=image_inputs(3, *entry.preprocessing.size),
        dynamic_axes={"pixel_values": {0: "batch"}},
        input_names=("pixel_values",),
        output_names=("logits",),
        positional=True,
        weights=record,
        preprocessing=entry.preprocessing,
        # of weights that somebody trained on something else, or nobody at all, the classes are not known
        labels=imagenet.class_names() if record.kind == "pretrained" else None,
        label_offset=entry.label_offset,
        provenance=versions("torch", entry.provider),
        warnings=notes,
    )


def _packaged_weights(package: str) -> Path | None:
    # Found without importing it: the package's own code does nothing but name the file.
    for folder in map(Path, sys.path):
        files = sorted((folder / package / "models").glob("*.pth"))
        if files:
            return files[0]
    return None


def _import(package: str, source: Source) -> Any:
    try:
        return __import__(package)
    except (ImportError, RuntimeError, AttributeError) as error:
        # torchvision from PyPI beside a CPU build of torch: "operator torchvision::nms does not exist"
        raise SourceError(
            f"{package} cannot be imported: {str(error).strip().splitlines()[0]}",
            where=source.public,
            hint="install the torchvision and timm that match this torch: see pytorch.org/get-started",
        ) from error


def load_timm(source: Source, weights: str, seed: int) -> TorchModel:
    """Builds ``timm:NAME``; its pretrained configuration gives the preprocessing."""
    timm = _import("timm", source)

    def make(pretrained: bool) -> torch.nn.Module:
        module: torch.nn.Module = timm.create_model(source.reference, pretrained=pretrained)
        return module

    module, record, notes = _library_model(source, weights, seed, make)
    data = timm.data.resolve_model_data_config(module)
    channels, height, width = data["input_size"]
    share = data["crop_pct"]
    preprocessing = None
    if channels == 3 and data.get("crop_mode", "center") == "center" and height == width:
        preprocessing = ImagePreprocessing(
            size=(height, width),
            resize=math.floor(height / share),
            interpolation=data["interpolation"],
            crop="center_round",
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
        )
    example = image_inputs(channels, height, width)
    return _image_classifier(source, module, example, record, notes, preprocessing, None, "timm")


def load_torchvision(source: Source, weights: str, seed: int) -> TorchModel:
    """Builds ``torchvision:NAME``; the transforms of its default weights give the preprocessing."""
    torchvision = _import("torchvision", source)

    def make(pretrained: bool) -> torch.nn.Module:
        module: torch.nn.Module = torchvision.models.get_model(
            source.reference, weights="DEFAULT" if pretrained else None
        )
        return module

    module, record, notes = _library_model(source, weights, seed, make)
    default = torchvision.models.get_model_weights(source.reference).DEFAULT
    recipe = default.transforms()
    pixels = recipe.crop_size[0]
    preprocessing = ImagePreprocessing(
        size=(pixels, pixels),
        resize=recipe.resize_size[0],
        interpolation=recipe.interpolation.value,
        crop="center_round",
        mean=tuple(recipe.mean),
        std=tuple(recipe.std),
    )
    labels = tuple(default.meta["categories"]) if record.kind == "pretrained" else None
    example = image_inputs(3, pixels, pixels)
    return _image_classifier(source, module, example, record, notes, preprocessing, labels, "torchvision")


def _library_model(
    source: Source, weights: str, seed: int, make: Callable[[bool], torch.nn.Module]
) -> tuple[torch.nn.Module, Weights, tuple[str, ...]]:
    try:
        with seeded(seed):
            module = make(False).eval()
    except Exception as error:  # an unknown name is RuntimeError, KeyError or ValueError, by library and version
        raise SourceError(
            f"{source.kind} does not build it: {error}", where=source.public, hint="check the name"
        ) from error
    if weights == "random":
        return module, random_weights(module, seed), ()
    if weights != "auto":
        return module, weights_from_file(module, Path(weights)), ()
    try:
        module = make(True).eval()
    except Exception as error:  # noqa: BLE001 - whatever the download raises: then it goes on with random ones
        note = fallback_line(source.name, str(error).strip().split("\n")[0], seed)
        return module, random_weights(module, seed, note), (note,)
    origin = f"{source.public}, {source.kind} {versions(source.kind)[source.kind]}"
    return module, Weights("pretrained", origin, state_sha256(module)), ()


def _image_classifier(
    source: Source,
    module: torch.nn.Module,
    example: dict[str, torch.Tensor],
    record: Weights,
    notes: tuple[str, ...],
    preprocessing: ImagePreprocessing | None,
    labels: tuple[str, ...] | None,
    package: str,
) -> TorchModel:
    return TorchModel(
        module=module,
        example_inputs=example,
        dynamic_axes={"pixel_values": {0: "batch"}},
        input_names=("pixel_values",),
        output_names=("logits",),
        positional=True,
        weights=record,
        preprocessing=preprocessing,
        labels=labels,
        provenance=versions("torch", package),
        warnings=notes,
    )
