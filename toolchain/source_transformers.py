"""Models of the transformers library: those of the zoo, ``hf:ID`` and ``hf:FOLDER``."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from toolchain import hub
from toolchain.errors import SourceError
from toolchain.models import EXAMPLE_BATCH, EXAMPLE_SEQUENCE, Source, TorchModel, image_inputs, versions
from toolchain.preprocessing import ImagePreprocessing, read_transformers
from toolchain.weights import (
    PIP_EXPORT,
    Weights,
    fallback_line,
    file_sha256,
    random_weights,
    seeded,
    state_sha256,
    weights_from_file,
)
from toolchain.zoo import ZOO, ZooEntry


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' progress bars and notes; its errors still raise."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load(source: Source, weights: str, seed: int) -> TorchModel:
    """Builds ``hf:ID``, ``hf:FOLDER``, or a model of the zoo that is transformers' own."""
    entry = ZOO[source.reference] if source.kind == "zoo" else None
    repository = entry.repository if entry else source.reference
    try:
        import transformers
    except ImportError as error:
        raise SourceError(f"transformers is missing: {error}", where=source.public, hint=PIP_EXPORT) from error
    folder, reason = _locate(source, weights, repository, entry)
    with _quiet():
        architecture, config = _configuration(
            transformers, source, folder if weights == "auto" else None, folder, entry
        )
        notes: tuple[str, ...] = ()
        if weights == "auto" and folder is not None and hub.weight_files(folder):
            module, record = _pretrained(architecture, config, folder, repository, source)
        else:
            with seeded(seed):
                module = architecture._from_config(config)
            if weights not in ("auto", "random"):
                record = weights_from_file(module, Path(weights))
            else:
                if weights == "auto":
                    notes = (fallback_line(source.name, reason or "the model has none", seed),)
                record = random_weights(module, seed, notes[0] if notes else None)
    module.eval().float()
    preprocessing = entry.preprocessing if entry else (read_transformers(folder) if folder else None)
    example, axes = example_inputs(module, preprocessing, where=source.public)
    return TorchModel(
        module=module,
        example_inputs=example,
        dynamic_axes=axes,
        input_names=tuple(example),
        output_names=None,
        positional=False,
        weights=record,
        preprocessing=preprocessing,
        labels=_labels(config),
        label_offset=entry.label_offset if entry else 0,
        provenance=versions("torch", "transformers"),
        warnings=notes,
    )


def _locate(source: Source, weights: str, repository: str, entry: ZooEntry | None) -> tuple[Path | None, str | None]:
    """The folder with configuration and, for ``auto``, weights; and why there is none, or none with weights."""
    if source.path is not None:
        return source.path, None
    want_weights = weights == "auto"
    if entry is not None and not want_weights:
        return None, None  # the zoo's own configuration is enough
    folder = hub.cached_snapshot(repository, source.revision)
    if folder is not None and (hub.weight_files(folder) or not want_weights):
        return folder, None
    if hub.offline():
        reason = "the hub is switched off by HF_HUB_OFFLINE, and they are not in the local cache"
    elif not hub.reachable():
        reason = "the hub is out of reach, and they are not in the local cache"
    else:
        try:
            return hub.download(repository, source.revision, with_weights=want_weights), None
        except SourceError as error:
            if entry is None:
                raise
            reason = error.what
    if folder is None and entry is None:
        raise SourceError(
            f"{source.public} is not known here: " + reason.replace("they are", "it is"),
            where=source.public,
            hint="give a local folder as hf:FOLDER, or make the hub reachable (HF_ENDPOINT, proxies)",
        )
    return folder, reason


def _configuration(
    transformers: Any, source: Source, with_weights: Path | None, folder: Path | None, entry: ZooEntry | None
) -> tuple[Any, Any]:
    """The class and its configuration: the zoo's own, unless pretrained weights bring theirs."""
    if entry is not None:
        architecture = getattr(transformers, entry.architecture)
        if with_weights is None or not hub.weight_files(with_weights):
            config = architecture.config_class(**entry.config)
        else:
            config = architecture.config_class.from_pretrained(with_weights, local_files_only=True)
    else:
        assert folder is not None, "a model of the hub without an entry in the zoo has a folder"
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SourceError(
                f"its config.json is not one that transformers knows: {str(error).strip().splitlines()[0]}",
                where=source.public,
                hint="a newer transformers may know it; a model with code of its own needs FILE.py:FACTORY",
            ) from error
        name = (getattr(config, "architectures", None) or [""])[0]
        architecture = getattr(transformers, name, None)
        if architecture is None:
            if name:
                raise SourceError(
                    f"transformers has no class {name}", where=source.public, hint="write a FILE.py:FACTORY"
                )
            architecture = transformers.MODEL_MAPPING[type(config)]
    # The eager attention is a plain MatMul-Softmax-MatMul, which every runtime knows how to fuse.
    config._attn_implementation = "eager"
    if getattr(config, "use_cache", False):
        config.use_cache = False
    return architecture, config


def _pretrained(
    architecture: Any, config: Any, folder: Path, repository: str, source: Source
) -> tuple[torch.nn.Module, Weights]:
    files = hub.weight_files(folder)
    variant = files[0].name.split(".")[1] if files[0].name.count(".") == 2 and len(files) == 1 else None
    try:
        module, report = architecture.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=files[0].suffix != ".bin",
            variant=variant,
            weights_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers has no common base for what it finds wrong with a file
        raise SourceError(
            f"the pretrained weights cannot be loaded: {type(error).__name__}: {str(error).strip().splitlines()[0]}",
            where=f"{repository or source.public}: {files[0].name}",
            hint="remove them from the hub's cache to fetch them anew, or use --weights random",
        ) from error
    # It would fill these with random numbers and go on.
    if lost := sorted([*map(str, report["missing_keys"]), *map(str, report["mismatched_keys"])]):
        raise SourceError(
            f"the pretrained weights lack {len(lost)} of the model's tensors: {', '.join(lost[:3])}",
            where=f"{repository or source.public}: {files[0].name}",
            hint="the checkpoint is for another head: write a FILE.py:FACTORY, or use --weights random",
        )
    weight_file = [file for file in files if file.suffix != ".json"]
    sha256 = file_sha256(weight_file[0]) if len(weight_file) == 1 else state_sha256(module)
    origin = files[0].name if source.path is not None else f"hub:{repository}@{folder.name}"
    return module, Weights("pretrained", origin, sha256)


def _labels(config: Any) -> tuple[str, ...] | None:
    names = getattr(config, "id2label", None) or {}
    if not names or all(str(name) == f"LABEL_{i}" for i, name in names.items()):
        return None
    return tuple(str(names[i]) for i in sorted(names))


def example_inputs(
    module: Any, preprocessing: ImagePreprocessing | None = None, *, where: str
) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    """Example inputs of a transformers model, by its task: ``pixel_values``, or token ids and their masks.

    Raises:
        SourceError: a task of another kind (audio, several modalities).
    """
    config = module.config
    main = getattr(module, "main_input_name", "input_ids")
    if main == "pixel_values":
        pixels = getattr(config, "image_size", None) or 224
        size = preprocessing.size if preprocessing else (pixels, pixels) if isinstance(pixels, int) else pixels
        return image_inputs(getattr(config, "num_channels", 3), *size), {"pixel_values": {0: "batch"}}
    if main != "input_ids" or getattr(config, "is_encoder_decoder", False):
        raise SourceError(
            f"{type(module).__name__} takes {main}: which inputs to export it with is not known",
            where=where,
            hint="write a FILE.py:FACTORY that returns (module, example_inputs)",
        )
    length = min(EXAMPLE_SEQUENCE, getattr(config, "max_position_embeddings", None) or EXAMPLE_SEQUENCE)
    generator = torch.Generator().manual_seed(0)
    # From 3 on: the first ids are often padding, which RoBERTa's positions depend on.
    ids = torch.randint(min(3, config.vocab_size - 1), config.vocab_size, (EXAMPLE_BATCH, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - length // 4 :] = 0  # a padded row, so that the mask is exported and compared
    example = {"input_ids": ids, "attention_mask": mask}
    if (getattr(config, "type_vocab_size", None) or 0) > 1:
        example["token_type_ids"] = (torch.arange(length) >= length // 2).long().expand(EXAMPLE_BATCH, -1).contiguous()
    takes = inspect.signature(module.forward).parameters
    example = {name: tensor for name, tensor in example.items() if name in takes}
    return example, {name: {0: "batch", 1: "sequence"} for name in example}
