"""What the loss says of each channel: first-order Taylor importance, from labelled samples and gradients in torch.

Cutting a channel sets the weights that read it to zero (``passes/_channel_cut.py``). To first order the loss changes
by minus the sum, over all those weights w, of w dL/dw; importance is the square of that sum, mean over the samples
(Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv 1906.10771, eq. 8, with the weights
behind the gate in place of the gate). The sum is taken over all layers that read the channel before it is squared: the
cut takes all of them at once. Numbers of different groups are of one unit, and can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes._channel_groups import Group
from toolchain.errors import DataError, GraphError, SourceError
from toolchain.samples import Batch
from toolchain.weights import PIP_EXPORT

if TYPE_CHECKING:
    from toolchain.torch_module import GraphModule

#: Samples of which the gradient is averaged before it is squared. One tells most and costs most; of a hundred, near a
#: minimum of the loss, little is left.
_TOGETHER = 8


def taylor_importance(
    model: ir.Model,
    groups: Sequence[Group],
    batches: Iterable[Batch],
    *,
    on_progress: Callable[[int], None] = lambda samples: None,
) -> dict[str, npt.NDArray[np.float64]]:
    """How much the loss would change without each channel, squared: for each group name float64 [count].

    The loss is the cross-entropy of the first output of class scores. Groups that no weight reads are left out.

    Args:
        model: float32 or float64, prepared as ``passes.prune_channels.prepare`` does; it is not changed.
        groups: of that graph.
        batches: labelled samples, gone through once.
        on_progress: is called with the number of samples done.

    Raises:
        SourceError: torch is not installed.
        GraphError: torch cannot compute the graph, or it has no class scores.
        DataError: no samples, none with labels, labels that are no class of the model, or gradients that are not
            finite.
    """
    try:
        import torch

        from toolchain.torch_module import to_torch
    except ImportError as error:
        raise SourceError(
            f"importance taylor needs gradients, and so torch: {error}",
            hint=f"{PIP_EXPORT}, or take importance activation",
        ) from error
    try:
        module = to_torch(model)
    except GraphError as error:
        error.hint = "take importance activation, which needs no torch"
        raise
    slots = {name: slot for slot, name in module.tensor_names.items()}
    parameters = dict(module.named_parameters())
    read = {
        group.name: [m for m in group.members if "in" in m.roles and slots.get(m.value) in parameters]
        for group in groups
    }
    weights = {m.value: parameters[slots[m.value]] for members in read.values() for m in members}
    found = {group.name: np.zeros(group.count) for group in groups if read[group.name]}
    fixed = any(value.shape is not None and isinstance(value.shape[0], int) for value in model.graph.inputs)
    samples = parts = 0
    for batch in batches:
        if batch.labels is None:
            raise DataError(
                "importance taylor needs labels: it asks how the loss changes",
                hint="a folder with a subfolder for each class, a .npz with labels, or importance activation",
            )
        step = len(batch.labels) if fixed else _TOGETHER
        for start in range(0, len(batch.labels), step):
            part = slice(start, start + step)
            feeds = {name: torch.from_numpy(np.ascontiguousarray(a[part])) for name, a in batch.inputs.items()}
            loss = _loss(model, module, feeds, torch.from_numpy(batch.labels[part].astype(np.int64)))
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            change = {
                name: (weights[name] * gradient).detach().numpy().astype(np.float64)
                for name, gradient in zip(weights, gradients, strict=True)
                if gradient is not None
            }
            for name, total in found.items():
                each = np.zeros(len(total))
                for member in read[name]:
                    if member.value in change:
                        moved = np.moveaxis(change[member.value], member.axis, 0)
                        each += moved.reshape(len(moved), -1).sum(axis=1)[member.positions].sum(axis=1)
                total += each**2
            parts += 1
            samples += len(batch.labels[part])
            on_progress(samples)
    if not parts:
        raise DataError("there are no samples to gather gradients on", hint="--data FOLDER")
    if not all(np.isfinite(total).all() for total in found.values()):
        raise DataError("gradients on the samples are not finite", hint="look for samples that are not finite")
    return {name: total / parts for name, total in found.items()}


def _loss(model: ir.Model, module: GraphModule, feeds: dict[str, Any], labels: Any) -> Any:
    """Cross-entropy, mean over the samples. Raises GraphError, DataError."""
    import torch

    values = module.values(feeds, module.graph_outputs)
    for output in model.graph.outputs:
        scores = values[str(output.name)]
        if scores.ndim != 2 or not scores.dtype.is_floating_point or scores.shape[1] < 2:
            continue
        first, last = int(labels.min()), int(labels.max())
        if first < 0 or last >= scores.shape[1]:
            raise DataError(f"the labels go from {first} to {last}, the model has {scores.shape[1]} classes")
        maker = output.producer()
        kind = "" if maker is None else maker.op_type
        if kind == "LogSoftmax":
            return torch.nn.functional.nll_loss(scores, labels)
        if kind == "Softmax":
            return torch.nn.functional.nll_loss(scores.clamp_min(torch.finfo(scores.dtype).tiny).log(), labels)
        return torch.nn.functional.cross_entropy(scores, labels)
    raise GraphError(
        "importance taylor needs a model that gives class scores, [batch, classes]", hint="take importance activation"
    )
