"""A graph as a torch module, and its trained weights back into the graph: nothing is exported again.

``to_torch`` makes a module whose parameters are the graph's initializers, under their own names, and whose forward
executes the nodes one by one (``torch_ops.py``). ``write_back`` puts the numbers back: nodes, names and shapes of the
graph stay as they are. A converter of others was looked for: onnx2torch, the one in use, has not been released since
2024 and knows operators up to opset 16 or so.

Weights that are pruned stay so: each zero of a weight matrix or filter is held by a mask, whatever the optimiser does.

BatchNormalization: a graph that went through the default passes has none, they are in the weights of the convolutions.
Such a module trains with what was the running statistics frozen, which is what a short fine-tuning wants anyway, but
learning rates have to be smaller, a tenth of what the network was trained with. To train with batch statistics, put it
back for the time of training (``batch_norm.py``), or prune the graph before ``fuse_conv_bn``: BatchNormalization is
then computed as torch does, and its running mean and variance come back too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from passes._graph import constant, default_opset, given, is_op, set_constant
from passes.base import in_standard_domain, label
from passes.prune_weights import Masks
from toolchain.errors import GraphError
from toolchain.torch_ops import OPERATORS, Call, Operator, Tensor, torch_dtype

_TRAINED = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE})
#: inputs that are learned, by operator; Add and Mul besides, where a constant has more than one element
_LEARNED = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "BatchNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "PRelu": (1,),
    "Gather": (0,),
}
_ELEMENTWISE = ("Add", "Mul", "Sub", "Div")
_STATISTICS = (3, 4)


class GraphModule(torch.nn.Module):
    """Executes a graph in torch. Made by ``to_torch``.

    Called with the graph's inputs, in their order or by name, it gives the output, or a tuple of several.

    ``named_parameters`` gives the names of initializers, with ``/`` for ``.``, which torch does not take;
    ``tensor_names`` has the names as they are in the graph.
    """

    def __init__(
        self,
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        steps: Sequence[_Step],
        learned: Mapping[str, np.ndarray],
        fixed: Mapping[str, np.ndarray],
        statistics: Mapping[str, np.ndarray],
        masks: Mapping[str, np.ndarray],
    ) -> None:
        super().__init__()
        self.graph_inputs = tuple(inputs)
        self.graph_outputs = tuple(outputs)
        #: names in the graph of parameters and running statistics, by their name in torch
        self.tensor_names: dict[str, str] = {}
        self._steps = tuple(steps)
        self._masks: dict[str, str] = {}
        taken: set[str] = set()
        self._slots: dict[str, str] = {}
        for name, data in learned.items():
            slot = self._slots[name] = _slot(name, taken)
            self.register_parameter(slot, torch.nn.Parameter(_tensor(data)))
            self.tensor_names[slot] = name
            if name in masks:
                mask = _slot(f"{name}_mask", taken)
                self.register_buffer(mask, _tensor(masks[name]).to(torch.bool), persistent=False)
                self._masks[slot] = mask
        for name, data in statistics.items():
            slot = self._slots[name] = _slot(name, taken)
            self.register_buffer(slot, _tensor(data))
            self.tensor_names[slot] = name
        for name, data in fixed.items():
            slot = self._slots[name] = _slot(name, taken)
            self.register_buffer(slot, _tensor(data), persistent=False)

    @property
    def masked(self) -> int:
        """How many weights are held at zero."""
        return sum(int((~getattr(self, mask)).sum()) for mask in self._masks.values())

    def forward(self, *args: Tensor, **by_name: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The graph's outputs. Raises GraphError where an input is missing or a node cannot be computed."""
        feeds = dict(zip(self.graph_inputs, args, strict=False)) | by_name
        found = self.values(feeds, self.graph_outputs)
        results = tuple(found[name] for name in self.graph_outputs)
        return results[0] if len(results) == 1 else results

    def values(self, feeds: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Any values of the main graph, by name: what distillation on features compares.

        Raises:
            GraphError: no such input or value, or a node cannot be computed.
        """
        missing = [name for name in self.graph_inputs if name not in feeds]
        unknown = [name for name in feeds if name not in self.graph_inputs]
        if missing or unknown:
            raise GraphError(
                f"the inputs {', '.join(missing) or 'given'} are missing, {', '.join(unknown) or 'none'} are unknown",
                hint=f"the graph takes {', '.join(self.graph_inputs)}",
            )
        values: dict[str, Tensor] = dict(feeds)
        for name, slot in self._slots.items():
            values[name] = self.weight(slot)
        wanted = set(names)
        for step in self._steps:
            step.run(values, training=self.training)
            for name in step.last:
                if name not in wanted:
                    del values[name]
        absent = [name for name in names if name not in values]
        if absent:
            raise GraphError(f"the graph has no value {absent[0]!r}", hint="names are those of the graph's values")
        return {name: values[name] for name in names}

    def weight(self, slot: str) -> Tensor:
        """What the graph computes with for a parameter or buffer, by its name in torch: masked where it is pruned."""
        tensor: Tensor = getattr(self, slot)
        mask = self._masks.get(slot)
        return tensor if mask is None else torch.where(getattr(self, mask), tensor, 0.0)


class _Step:
    """A node with all that does not change from run to run."""

    def __init__(self, node: ir.Node, opset: int) -> None:
        self.label = label(node)
        self.inputs = [None if value is None else str(value.name) for value in node.inputs]
        self.outputs = [str(value.name or "") for value in node.outputs]
        self.operator: Operator = OPERATORS[node.op_type]
        self.attributes = {name: _plain(attribute) for name, attribute in node.attributes.items()}
        self.opset = opset
        #: values that nobody reads afterwards
        self.last: list[str] = []

    def run(self, values: dict[str, Tensor], *, training: bool) -> None:
        given = [values[name] if name else None for name in self.inputs]
        call = Call(self.label, given, self.attributes, self.opset, sum(map(bool, self.outputs)), training)
        try:
            result = self.operator(call)
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
            shapes = ", ".join("-" if t is None else str(list(t.shape)) for t in given)
            raise GraphError(
                f"torch cannot compute this node: {error}", where=f"{self.label}, inputs of shape {shapes}"
            ) from error
        several = result if isinstance(result, tuple) else (result,)
        for name, tensor in zip((n for n in self.outputs if n), several, strict=False):
            values[name] = tensor


def to_torch(model: ir.Model, *, masks: Masks | None = None) -> GraphModule:
    """Makes a module of the main graph, in evaluation mode: ``train()`` switches dropout and batch statistics on.

    Args:
        model: a float32 or float64 graph, pruned or not, not quantised; it stays as it is.
        masks: which elements of weights stay zero, by initializer; None for every zero of every weight matrix and
            filter. Biases and normalisations are held by no mask.

    Raises:
        GraphError: an operator that torch has no function for here, control flow, 16-bit or quantised weights,
            a mask that does not fit.
    """
    _check(model)
    opset = default_opset(model.opset_imports)
    constants = _constants(model)
    learned, statistics = _sort(model, constants)
    data = {name: tensor.numpy() for name, tensor in constants.items()}
    held = _masks(data, learned, masks)
    steps = [_Step(node, opset) for node in model.graph if node.op_type != "Constant"]
    read = {str(value.name) for value in model.graph.outputs} | set(data)
    for step in reversed(steps):
        names = [name for name in dict.fromkeys([*step.inputs, *step.outputs]) if name and name not in read]
        step.last = names
        read.update(names)
    inputs = [str(value.name) for value in model.graph.inputs if str(value.name) not in data]
    module = GraphModule(
        inputs=inputs,
        outputs=[str(value.name) for value in model.graph.outputs],
        steps=[step for step in steps if set(step.outputs) - {""}],
        learned={name: data[name] for name in data if name in learned},
        statistics={name: data[name] for name in data if name in statistics},
        fixed={name: data[name] for name in data if name not in learned and name not in statistics},
        masks=held,
    )
    return module.eval()


def write_back(module: GraphModule, model: ir.Model) -> int:
    """Puts a module's weights and running statistics into the graph that it was made from, by name, in place.

    Returns:
        How many tensors are other than before.

    Raises:
        GraphError: a tensor is not in the graph, has another shape, or is not finite; the model is as it was then.
    """
    values = {str(v.name): v for v in model.graph.initializers.values()}
    values |= {str(n.outputs[0].name): n.outputs[0] for n in model.graph if is_op(n, "Constant")}
    written: list[tuple[ir.Value, np.ndarray]] = []
    for slot, name in module.tensor_names.items():
        data = module.weight(slot).detach().cpu().numpy()
        tensor = constant(values.get(name))
        if tensor is None or tuple(tensor.shape.numpy()) != data.shape:
            there = "is not in the graph" if tensor is None else f"has the shape {list(tensor.shape.numpy())} there"
            raise GraphError(
                f"{name!r} of shape {list(data.shape)} {there}",
                hint="the module goes back into the graph that it was made from, with its parameters as they were",
            )
        if not np.isfinite(data).all():
            raise GraphError(f"the trained weight {name!r} is not finite", hint="train with a smaller learning rate")
        data = data.astype(tensor.dtype.numpy())  # a copy: the module may go on training
        if not np.array_equal(data, tensor.numpy()):
            written.append((values[name], data))
    for value, data in written:
        set_constant(value, data)
    return len(written)


def _check(model: ir.Model) -> None:
    """Everything that is in the way at once, so that nobody finds it out one by one."""
    wrong: dict[str, list[str]] = {}
    for node in model.graph:
        if node.op_type == "Constant" and constant(node.outputs[0]) is not None:
            continue
        if not in_standard_domain(node) or node.op_type not in OPERATORS:
            name = node.op_type if in_standard_domain(node) else f"{node.domain}.{node.op_type}"
            wrong.setdefault(name, []).append(label(node))
    if wrong:
        shown = ", ".join(f"{name} ({len(at)}, first {at[0]})" for name, at in sorted(wrong.items()))
        quantised = any("Quantize" in name or name.startswith("QLinear") for name in wrong)
        raise GraphError(
            f"no module can be made of this graph: it has {shown}",
            hint="fine-tune before quantising" if quantised else "take reconstruction alone, which needs no torch",
        )


def _constants(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Constant values of the main graph by name. Raises GraphError for a type that torch does not have."""
    values = [*model.graph.initializers.values(), *(n.outputs[0] for n in model.graph if is_op(n, "Constant"))]
    found = {}
    for value in values:
        tensor = value.const_value if value.is_initializer() else constant(value)
        if tensor is None:
            raise GraphError("an initializer holds no numbers", where=str(value.name))
        torch_dtype(tensor.dtype, str(value.name))
        if tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            raise GraphError(
                f"its weights are {tensor.dtype.name.lower()}",
                where=str(value.name),
                hint="fine-tune in float32 and convert to 16 bits afterwards",
            )
        found[str(value.name)] = tensor
    return found


def _sort(model: ir.Model, constants: Mapping[str, ir.TensorProtocol]) -> tuple[set[str], set[str]]:
    """Which constants are learned, and which are running statistics."""
    learned: set[str] = set()
    statistics: set[str] = set()
    for node in model.graph:
        indices: Sequence[int] = _LEARNED.get(node.op_type, range(2) if node.op_type in _ELEMENTWISE else ())
        for index in indices:
            tensor = constants.get(str(getattr(given(node, index), "name", "")))
            if tensor is None or tensor.dtype not in _TRAINED:
                continue
            if node.op_type not in _ELEMENTWISE or tensor.size > 1:
                learned.add(str(node.inputs[index].name))  # type: ignore[union-attr]
        if node.op_type == "BatchNormalization":
            names = [str(getattr(given(node, index), "name", "")) for index in _STATISTICS]
            statistics.update(name for name in names if name in constants)
    return learned - statistics, statistics


def _masks(data: Mapping[str, np.ndarray], learned: set[str], masks: Masks | None) -> dict[str, np.ndarray]:
    """For each weight that has zeros to hold, a bool array of its shape, True where it is trained."""
    if masks is None:
        weights = {name: data[name] for name in learned if data[name].ndim >= 2 and max(data[name].shape[1:]) > 1}
        return {name: each != 0 for name, each in weights.items() if not each.all()}
    found = {}
    for name, mask in masks.masks.items():
        if name not in learned or data[name].shape != np.shape(mask):
            raise GraphError(
                f"there is a mask of shape {list(np.shape(mask))} for {name!r}, which is "
                + (f"of shape {list(data[name].shape)}" if name in learned else "no weight of the graph"),
                hint="masks go by the name and shape of initializers",
            )
        found[name] = np.asarray(mask, dtype=np.bool_)
    return found


def _slot(name: str, taken: set[str]) -> str:
    """A name that torch takes for a parameter, and that is nobody's."""
    base = name.replace(".", "/") or "_"
    if hasattr(torch.nn.Module, base) or re.fullmatch(r"_\w*|training|graph_inputs|graph_outputs|tensor_names", base):
        base = f"/{base}"
    if hasattr(GraphModule, base):
        base = f"/{base}"
    slot, count = base, 0
    while slot in taken:
        count += 1
        slot = f"{base}#{count}"
    taken.add(slot)
    return slot


def _tensor(data: np.ndarray) -> Tensor:
    # a copy: a parameter must not write into the graph's own memory, which may be a mapped file
    return torch.from_numpy(np.array(data, order="C"))


def _plain(attribute: ir.Attr) -> Any:
    if attribute.is_ref():
        raise GraphError(f"the attribute {attribute.name!r} is known to a function's caller alone")
    match attribute.type:
        case ir.AttributeType.TENSOR:
            return attribute.as_tensor().numpy()
        case ir.AttributeType.GRAPH | ir.AttributeType.GRAPHS:
            raise GraphError("control flow cannot be trained", where=attribute.name)
    return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value
