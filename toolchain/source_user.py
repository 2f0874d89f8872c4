"""The user's own models: a factory in a Python file, or a program that torch.export saved."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import logging
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from toolchain import user_code
from toolchain.errors import DataError, SourceError
from toolchain.models import Source, TorchModel, versions
from toolchain.preprocessing import ImagePreprocessing
from toolchain.source_transformers import example_inputs
from toolchain.weights import Weights, file_sha256, seeded, state_sha256, weights_from_file

_FACTORY_KEYS = (
    "module",
    "example_inputs",
    "dynamic_axes",
    "output_names",
    "preprocessing",
    "labels",
    "label_offset",
)


def load_factory(source: Source, weights: str, seed: int) -> TorchModel:
    """Runs ``FILE.py:FACTORY``, seeded. It returns a module of transformers, ``(module, example_inputs)``,
    an exported program, or a dict with ``module``, ``example_inputs`` and any of ``dynamic_axes``,
    ``output_names``, ``preprocessing``, ``labels``, ``label_offset``.

    ``example_inputs`` is a dict by the names of ``forward``'s parameters, or a tuple or tensor by position.
    The first axis is a dynamic ``batch`` unless ``dynamic_axes`` (input → axis → name) says otherwise.
    """
    path = source.path
    assert path is not None, "a factory has a file"
    if weights == "random":
        raise SourceError(
            "a factory makes its own weights; there is nothing to randomise",
            where=source.public,
            hint="leave --weights auto (the factory runs with torch seeded), or give a file",
        )
    with seeded(seed):
        function = user_code.load(path, source.function or "", error=SourceError)
        made = user_code.call(function, path, error=SourceError)
    fields = _factory_fields(made, f"{path.name}:{source.function}")
    module = fields["module"]
    if isinstance(module, torch.export.ExportedProgram):
        return dataclasses.replace(_program_model(module, Weights("embedded", path.name)), source_file=path)
    module.eval()
    record = Weights("embedded", path.name, state_sha256(module), seed)
    if weights != "auto":
        record = weights_from_file(module, Path(weights))
    where = f"{path.name}:{source.function}"
    example, axes, positional = _factory_inputs(fields, where)
    preprocessing = fields.get("preprocessing")
    if isinstance(preprocessing, Mapping):
        try:
            preprocessing = ImagePreprocessing.from_json(preprocessing)
        except DataError as error:
            raise SourceError(error.what, where=where, hint=error.hint) from error
    outputs = fields.get("output_names")
    labels = fields.get("labels")
    return TorchModel(
        module=module,
        example_inputs=example,
        dynamic_axes=axes,
        input_names=tuple(example),
        output_names=tuple(map(str, outputs)) if outputs else None,
        positional=positional,
        weights=record,
        preprocessing=preprocessing,
        labels=tuple(map(str, labels)) if labels else None,
        label_offset=int(fields.get("label_offset") or 0),
        provenance=versions("torch"),
        source_file=path,
    )


def _factory_fields(made: Any, where: str) -> dict[str, Any]:
    if isinstance(made, tuple) and len(made) == 2:
        made = {"module": made[0], "example_inputs": made[1]}
    elif isinstance(made, (torch.nn.Module, torch.export.ExportedProgram)):
        made = {"module": made}
    if not isinstance(made, Mapping):
        raise SourceError(
            f"the factory returns a {type(made).__name__}",
            where=where,
            hint="return (module, example_inputs), or a dict with the keys " + ", ".join(_FACTORY_KEYS),
        )
    if odd := [key for key in made if key not in _FACTORY_KEYS]:
        raise SourceError(
            f"the factory returns an unknown key {odd[0]!r}",
            where=where,
            hint="keys: " + ", ".join(_FACTORY_KEYS),
        )
    if not isinstance(made.get("module"), (torch.nn.Module, torch.export.ExportedProgram)):
        raise SourceError(
            f"the factory's module is a {type(made.get('module')).__name__}",
            where=where,
            hint="make it a torch.nn.Module",
        )
    return dict(made)


def _factory_inputs(
    fields: Mapping[str, Any], where: str
) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]], bool]:
    module, example = fields["module"], fields.get("example_inputs")
    if example is None:
        if hasattr(module, "config") and hasattr(module, "main_input_name"):
            by_name, by_task = example_inputs(module, where=where)
            given = _user_axes(fields, by_name, where)
            return by_name, by_task if given is None else given, False
        raise SourceError(
            "which inputs to export the module with?", where=where, hint="return (module, example_inputs)"
        )
    if isinstance(example, torch.Tensor):
        example = (example,)
    positional = not isinstance(example, Mapping)
    named: dict[str, Any]
    if isinstance(example, Mapping):
        order = [*inspect.signature(module.forward).parameters]
        named = {str(name): example[name] for name in order if name in example}
        named |= {str(name): value for name, value in example.items()}
    else:
        named = dict(zip(_parameters(module, len(example)), example, strict=True))
    if not named or not all(isinstance(value, torch.Tensor) for value in named.values()):
        raise SourceError("example_inputs are not all tensors", where=where, hint="bind other arguments in the module")
    inputs: dict[str, torch.Tensor] = named
    axes = _user_axes(fields, inputs, where)
    if axes is None:
        sizes = {tensor.shape[0] if tensor.dim() else None for tensor in inputs.values()}
        # Only where all inputs agree on it is the first axis surely the batch.
        axes = {name: {0: "batch"} for name in inputs} if len(sizes) == 1 and None not in sizes else {}
        if sizes == {1}:
            # torch.export makes a size of 1 a constant, so the example needs two rows.
            inputs = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    return inputs, axes, positional


def _parameters(module: torch.nn.Module, count: int) -> list[str]:
    """Names of the first parameters of ``forward``; ``input_i`` where it takes ``*args``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds][:count]
    return names + [f"input_{i}" for i in range(len(names), count)]


def _user_axes(
    fields: Mapping[str, Any], example: Mapping[str, torch.Tensor], where: str
) -> dict[str, dict[int, str]] | None:
    given = fields.get("dynamic_axes")
    if given is None:
        return None
    try:
        axes = {str(name): {int(axis): str(size) for axis, size in sizes.items()} for name, sizes in given.items()}
        fits = all(0 <= axis < example[name].dim() for name, sizes in axes.items() for axis in sizes)
    except (AttributeError, KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise SourceError(
            f"dynamic_axes is {given!r}",
            where=where,
            hint="wanted: {input: {axis: name}} for " + ", ".join(example),
        )
    return axes


# --- .pt2 -----------------------------------------------------------------------------------------------


def load_pt2(source: Source, weights: str, seed: int) -> TorchModel:
    """Reads what ``torch.export.save`` wrote, if it needs no unpickling of objects.

    Still a file to take from people you trust: torch reads its symbolic sizes with sympy, which evaluates.
    """
    path = source.path
    assert path is not None, "a .pt2 has a file"
    if weights != "auto":
        raise SourceError("a .pt2 holds its own weights", where=source.public, hint="leave --weights auto")
    _refuse_pickles(path)
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what it logs on the way to an exception is in the exception
    try:
        program = torch.export.load(path)
    except Exception as error:  # a damaged archive raises anything from KeyError to RuntimeError
        raise SourceError(
            f"not a program that this torch reads: {type(error).__name__}: {str(error).strip().split(chr(10))[0]}",
            where=str(path),
            hint=f"save it anew with torch.export.save under torch {torch.__version__}",
        ) from error
    finally:
        logger.setLevel(level)
    return _program_model(program, Weights("embedded", path.name, file_sha256(path)))


def _refuse_pickles(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith("_config.json") and _names_pickles(archive.read(entry)):
                    raise _pickled(path, entry.filename)
                if entry.filename.endswith(".pt") and entry.file_size:
                    try:
                        torch.load(io.BytesIO(archive.read(entry)), map_location="cpu", weights_only=True)
                    except Exception as error:  # UnpicklingError and whatever a damaged one raises
                        raise _pickled(path, entry.filename) from error
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise SourceError(f"not a .pt2: {error}", where=str(path), hint="write it with torch.export.save") from error


def _names_pickles(text: bytes) -> bool:
    try:
        payloads = json.loads(text).get("config", {})
        return any(
            entry.get("use_pickle") or str(entry.get("path_name", "")).startswith(("custom_obj", "opaque_obj"))
            for entry in payloads.values()
        )
    except (ValueError, AttributeError):
        return True  # not the layout that was judged safe


def _pickled(path: Path, entry: str) -> SourceError:
    return SourceError(
        f"the program holds pickled objects ({entry}), and loading those runs code",
        where=str(path),
        hint="if you trust it: write a FILE.py:FACTORY that returns torch.export.load(...)",
    )


def _program_model(program: torch.export.ExportedProgram, record: Weights) -> TorchModel:
    """A TorchModel of an exported program; its own symbolic sizes become ``batch``, or keep their names."""
    names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    args, kwargs = program.example_inputs or ((), {})
    leaves: Sequence[Any] = torch.utils._pytree.tree_leaves((args, kwargs))
    if len(leaves) != len(names) or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise SourceError(
            "the program has inputs other than tensors, or was saved without its example inputs",
            where=record.origin,
            hint="export it again with torch.export.export(module, example_inputs) and tensors only",
        )
    axes: dict[str, dict[int, str]] = {name: {} for name in names}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in axes:
            shape = node.meta["val"].shape
            axes[node.name] = {
                axis: "batch" if axis == 0 else f"{node.name}_{axis}"
                for axis, size in enumerate(shape)
                if isinstance(size, torch.SymInt)
            }
    return TorchModel(
        module=program.module(),
        example_inputs=dict(zip(names, leaves, strict=True)),
        dynamic_axes=axes,
        input_names=tuple(names),
        output_names=None,
        positional=not kwargs,
        weights=record,
        provenance=versions("torch"),
        program=program,
    )
