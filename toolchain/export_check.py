"""Is the exported graph the module? Both run on the same inputs, and the outputs are compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from runtimes import Error
from toolchain.bounds import float_bound
from toolchain.errors import ExportFailed
from toolchain.export_errors import first_line, quiet, user_line
from toolchain.metrics import TensorError, tensor_error
from toolchain.models import TorchModel

if TYPE_CHECKING:
    import torch

#: the largest normalised squared error that an export may have against PyTorch, by the coarsest float among


def trial_inputs(model: TorchModel) -> list[dict[str, np.ndarray]]:
    """Inputs of two sizes, neither of them the example's, with values drawn like the example's.

    Lengths only get shorter, since a model may have a longest one (positions).
    """
    trials = []
    for number, batch in enumerate((1, 3)):
        generator = np.random.default_rng(number)
        sizes: dict[str, int] = {}
        trial = {}
        for name, tensor in model.example_inputs.items():
            example = _to_numpy(tensor)
            shape = list(example.shape)
            for axis, symbol in model.dynamic_axes.get(name, {}).items():
                shorter = max(1, shape[axis] - 1 - number * (shape[axis] // 2))
                size = batch if axis == 0 else shorter
                shape[axis] = sizes.setdefault(symbol, size)
            trial[name] = _like(example, shape, generator)
        trials.append(trial)
        if not sizes:  # nothing is dynamic: the second would be of the same shape
            break
    return trials


def _like(example: np.ndarray, shape: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    if example.size == 0:
        return np.zeros(shape, example.dtype)
    if example.dtype.kind not in "iub":
        seen = example.astype(np.float64)
        values: np.ndarray = generator.standard_normal(shape) * (seen.std() or 1.0) + seen.mean()
        return values.astype(example.dtype)
    # Identifiers, masks, flags: only values that the example shows are surely allowed.
    drawn: np.ndarray = generator.choice(example.reshape(-1), size=shape)
    return drawn


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no word for it; ml_dtypes has
        bits: np.ndarray = tensor.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: np.ndarray = tensor.numpy()
    return array


def _to_torch(array: np.ndarray) -> torch.Tensor:
    import torch

    array = np.array(array)  # a copy of its own: the module may write into it
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def run_module(model: TorchModel, inputs: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """The module's outputs, named by their place in what ``forward`` gives."""
    import torch

    if odd := sorted(set(inputs).symmetric_difference(model.input_names)):
        raise ExportFailed(f"samples do not fit the model's inputs: {odd[0]}", where=", ".join(model.input_names))
    tensors = {name: _to_torch(inputs[name]) for name in model.input_names}
    try:
        with torch.no_grad(), quiet():
            if model.positional:
                result = model.module(*tensors.values())
            else:
                result = model.module(**tensors)
    except Exception as error:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ExportFailed(
            f"the module itself fails on {shapes}: {first_line(error)}",
            where=user_line(error, model.source_file) or model.provenance.get("source"),
            hint="these differ from the example in batch size and length: if the module cannot take that, "
            "give dynamic_axes={} in the factory",
        ) from error
    named = list(_named(result, ""))
    if not named:
        raise ExportFailed(
            f"forward gives a {type(result).__name__}, no tensor",
            where=model.provenance.get("source"),
            hint="return a tensor, or a tuple or dict of tensors",
        )
    return named


def _named(result: Any, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a nested result in the exporter's order, named ``logits`` or ``hidden_0``."""
    import torch

    if isinstance(result, torch.Tensor):
        yield prefix or "output", _to_numpy(result)
        return
    pairs: list[tuple[Any, Any]] = []
    if isinstance(result, Mapping):
        pairs = list(result.items())
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        pairs = list(zip(result._fields, result, strict=True))
    elif isinstance(result, (tuple, list)):
        pairs = [(f"output_{i}" if not prefix else i, value) for i, value in enumerate(result)]
        if len(pairs) == 1 and not prefix:
            pairs = [("output", result[0])]
    for key, value in pairs:
        yield from _named(value, f"{prefix}_{key}" if prefix else str(key))


def compare(
    graph: ir.Model,
    trials: Sequence[Mapping[str, np.ndarray]],
    references: Sequence[Mapping[str, np.ndarray]],
) -> dict[str, TensorError]:
    """The largest error of each output over all trials. Raises ExportFailed beyond the bound."""
    from toolchain.evaluate import run_reference

    try:
        results = run_reference(graph, [dict(trial) for trial in trials])
    except Error as error:
        raise ExportFailed(
            f"the exported graph does not run: {error.what}",
            where=error.where,
            hint=error.hint or "report this model",
        ) from error
    worst: dict[str, TensorError] = {}
    for trial, reference, result in zip(trials, references, results, strict=True):
        for name, wanted in reference.items():
            shapes = ", ".join(f"{key} {list(array.shape)}" for key, array in trial.items())
            if wanted.shape != result[name].shape:
                raise ExportFailed(
                    f"{name} is {list(result[name].shape)} in ONNX and {list(wanted.shape)} in PyTorch",
                    where=shapes,
                    hint="a size was frozen while tracing: look for int() or shape arithmetic in Python",
                )
            distance = tensor_error(wanted, result[name])
            if not _within(distance, graph):
                raise ExportFailed(
                    f"{name} differs from PyTorch by nmse {distance.nmse:.2g}, at most {distance.max_abs:.2g}",
                    where=shapes,
                    hint="is the module deterministic? a branch on values is frozen as it was traced",
                )
            if name not in worst or distance.nmse > worst[name].nmse:
                worst[name] = distance
    return worst


def _within(error: TensorError, graph: ir.Model) -> bool:
    limit = float_bound(graph)
    if math.isinf(error.nmse) and not math.isinf(error.max_abs):
        return error.max_abs**2 <= limit  # PyTorch gives zeros throughout: there is nothing to be relative to
    return error.nmse <= limit
