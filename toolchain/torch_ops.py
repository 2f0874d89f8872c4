"""ONNX operators in terms of torch, differentiable: what ``torch_module.py`` executes a graph with.

Each function takes a ``Call`` and returns a tensor, or a tuple of them for several outputs. Specification:
https://onnx.ai/onnx/operators/, with the variants of opsets 9 to 24 that exporters still write (axes as an attribute,
Softmax over flattened axes). Sizes are integer tensors on the host, as in ONNX itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F

from toolchain.errors import GraphError

Tensor: TypeAlias = torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One execution of a node.

    Attributes:
        node: its label, for errors.
        inputs: None where one is left out.
        attributes: by name, as Python numbers, strings, lists and arrays.
        opset: version of the default domain.
        outputs: how many the node has.
        training: whether the module is in training mode.
    """

    node: str
    inputs: Sequence[Tensor | None]
    attributes: Mapping[str, Any]
    opset: int
    outputs: int = 1
    training: bool = False

    def given(self, index: int) -> Tensor | None:
        """An input that may be left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def need(self, index: int) -> Tensor:
        """An input that has to be there. Raises GraphError."""
        found = self.given(index)
        if found is None:
            raise GraphError(f"input {index} is missing", where=self.node)
        return found

    def ints(self, name: str, index: int | None = None) -> list[int] | None:
        """A list of integers: an attribute, or in later opsets the input at ``index``; None where there is none."""
        if name in self.attributes:
            found = self.attributes[name]
            return [int(i) for i in found] if isinstance(found, (list, tuple)) else [int(found)]
        tensor = None if index is None else self.given(index)
        return None if tensor is None else [int(i) for i in tensor.reshape(-1).tolist()]

    def get(self, name: str, default: Any) -> Any:
        """An attribute or its default."""
        return self.attributes.get(name, default)

    def unsupported(self, what: str) -> GraphError:
        """An error for a variant that torch has no function for."""
        return GraphError(
            f"{what} cannot be trained in torch",
            where=self.node,
            hint="fine-tune in the framework that the model comes from, or take reconstruction alone",
        )


Operator: TypeAlias = Callable[[Call], "Tensor | tuple[Tensor, ...]"]


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda call: function(call.need(0))


def _binary(function: Callable[[Tensor, Tensor], Any]) -> Operator:
    return lambda call: function(call.need(0), call.need(1))


def _variadic(function: Callable[[Tensor, Tensor], Tensor], *, mean: bool = False) -> Operator:
    def run(call: Call) -> Tensor:
        result = call.need(0)
        for index in range(1, len(call.inputs)):
            result = function(result, call.need(index))
        return result / len(call.inputs) if mean else result

    return run


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _clip(call: Call) -> Tensor:
    low = call.get("min", None) if call.opset < 11 else call.given(1)
    high = call.get("max", None) if call.opset < 11 else call.given(2)
    x = call.need(0)
    return x if low is None and high is None else torch.clamp(x, low, high)


def _prelu(call: Call) -> Tensor:
    x = call.need(0)
    return torch.where(x < 0, x * call.need(1), x)


def _gelu(call: Call) -> Tensor:
    return F.gelu(call.need(0), approximate=call.get("approximate", "none"))


def _dropout(call: Call) -> Tensor | tuple[Tensor, ...]:
    x, ratio = call.need(0), call.given(1)
    share = call.get("ratio", 0.5) if ratio is None else float(ratio)
    result = F.dropout(x, share, training=call.training)
    return result if call.outputs == 1 else (result, torch.ones_like(x, dtype=torch.bool))


def _cast(call: Call) -> Tensor:
    return call.need(0).to(torch_dtype(ir.DataType(int(call.attributes["to"])), call.node))


def torch_dtype(dtype: ir.DataType, where: str) -> torch.dtype:
    """The type in torch. Raises GraphError."""
    try:
        return torch.from_numpy(np.empty(0, dtype.numpy())).dtype
    except (TypeError, ValueError) as error:
        raise GraphError(
            f"torch cannot be trained with {dtype.name}", where=where, hint="fine-tune before quantising"
        ) from error


def _pads(call: Call, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """ONNX's pads, all begins and then all ends, with auto_pad worked out."""
    rank, auto = len(kernel), str(call.get("auto_pad", "NOTSET"))
    if auto in ("NOTSET", ""):
        return call.ints("pads") or [0] * (2 * rank)
    if auto == "VALID":
        return [0] * (2 * rank)
    strides, dilations = call.ints("strides") or [1] * rank, call.ints("dilations") or [1] * rank
    begin, end = [], []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        small, large = total // 2, total - total // 2
        begin.append(small if auto == "SAME_UPPER" else large)
        end.append(large if auto == "SAME_UPPER" else small)
    return begin + end


def _symmetric(pads: Sequence[int]) -> bool:
    half = len(pads) // 2
    return list(pads[:half]) == list(pads[half:])


def _padded(x: Tensor, pads: Sequence[int], value: float) -> Tensor:
    half = len(pads) // 2
    flat = [each for axis in reversed(range(half)) for each in (pads[axis], pads[half + axis])]
    return F.pad(x, flat, value=value) if any(flat) else x


def _convolve(call: Call) -> Tensor:
    x, weight, bias = call.need(0), call.need(1), call.given(2)
    rank = weight.ndim - 2
    pads = _pads(call, x.shape[2:], weight.shape[2:])
    if not _symmetric(pads):
        x, pads = _padded(x, pads, 0.0), [0] * (2 * rank)
    function = _by_rank(call, rank, F.conv1d, F.conv2d, F.conv3d)
    strides, dilations = call.ints("strides") or [1] * rank, call.ints("dilations") or [1] * rank
    result: Tensor = function(x, weight, bias, strides, pads[:rank], dilations, int(call.get("group", 1)))
    return result


def _convolve_transposed(call: Call) -> Tensor:
    x, weight, bias = call.need(0), call.need(1), call.given(2)
    rank = weight.ndim - 2
    pads = call.ints("pads") or [0] * (2 * rank)
    if str(call.get("auto_pad", "NOTSET")) not in ("NOTSET", "") or "output_shape" in call.attributes:
        raise call.unsupported("ConvTranspose with auto_pad or output_shape")
    function = _by_rank(call, rank, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    strides, dilations = call.ints("strides") or [1] * rank, call.ints("dilations") or [1] * rank
    extra = call.ints("output_padding") or [0] * rank
    # Unequal pads: torch gets none, and what they would have cut off is cut off here.
    equal = _symmetric(pads)
    inside = pads[:rank] if equal else [0] * rank
    y: Tensor = function(x, weight, bias, strides, inside, extra, int(call.get("group", 1)), dilations)
    if not equal:
        for axis in range(rank):
            y = y.narrow(2 + axis, pads[axis], y.shape[2 + axis] - pads[axis] - pads[rank + axis])
    return y


def _by_rank(call: Call, rank: int, *functions: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if not 1 <= rank <= len(functions):
        raise call.unsupported(f"{rank} spatial dimensions")
    return functions[rank - 1]


def _gemm(call: Call) -> Tensor:
    a, b, c = call.need(0), call.need(1), call.given(2)
    a = a.T if call.get("transA", 0) else a
    b = b.T if call.get("transB", 0) else b
    alpha, beta = float(call.get("alpha", 1.0)), float(call.get("beta", 1.0))
    y = a @ b
    y = y if alpha == 1 else alpha * y
    return y if c is None else y + (c if beta == 1 else beta * c)


def _batch_normalization(call: Call) -> Tensor:
    x, scale, bias, mean, variance = (call.need(i) for i in range(5))
    # ONNX's momentum is what is kept, torch's is what is new; the two running statistics are changed in place.
    new = 1 - float(call.get("momentum", 0.9))
    return F.batch_norm(x, mean, variance, scale, bias, call.training, new, float(call.get("epsilon", 1e-5)))


def _layer_normalization(call: Call) -> Tensor:
    x, scale, bias = call.need(0), call.need(1), call.given(2)
    axis = int(call.get("axis", -1)) % x.ndim
    epsilon = float(call.get("epsilon", 1e-5))
    if tuple(scale.shape) == tuple(x.shape[axis:]) and (bias is None or bias.shape == scale.shape):
        return F.layer_norm(x, list(x.shape[axis:]), scale, bias, epsilon)
    y = F.layer_norm(x, list(x.shape[axis:]), None, None, epsilon) * scale
    return y if bias is None else y + bias


def _instance_normalization(call: Call) -> Tensor:
    return F.instance_norm(call.need(0), weight=call.need(1), bias=call.need(2), eps=float(call.get("epsilon", 1e-5)))


def _group_normalization(call: Call) -> Tensor:
    x, scale, bias, groups = call.need(0), call.need(1), call.need(2), int(call.attributes["num_groups"])
    if scale.numel() != x.shape[1]:  # opset 18: one for each group
        scale, bias = (each.repeat_interleave(x.shape[1] // groups) for each in (scale, bias))
    return F.group_norm(x, groups, scale, bias, float(call.get("epsilon", 1e-5)))


def _softmax(function: Callable[..., Tensor]) -> Operator:
    def run(call: Call) -> Tensor:
        x = call.need(0)
        axis = int(call.get("axis", -1 if call.opset >= 13 else 1))
        if call.opset >= 13:
            return function(x, dim=axis)
        rows = x.flatten(axis % x.ndim) if axis % x.ndim else x.reshape(1, -1)
        return function(rows, dim=-1).reshape(x.shape)

    return run


def _max_pool(call: Call) -> Tensor:
    x, kernel = call.need(0), call.ints("kernel_shape") or []
    rank = len(kernel)
    if call.outputs != 1:
        raise call.unsupported("MaxPool with indices")
    pads = _pads(call, x.shape[2:], kernel)
    function = _by_rank(call, rank, F.max_pool1d, F.max_pool2d, F.max_pool3d)
    strides, dilations = call.ints("strides") or [1] * rank, call.ints("dilations") or [1] * rank
    ceil = bool(call.get("ceil_mode", 0))
    if _symmetric(pads) and all(2 * p <= k for p, k in zip(pads, kernel, strict=False)):
        return function(x, kernel, strides, pads[:rank], dilations, ceil_mode=ceil)
    y = function(_padded(x, pads, -math.inf), kernel, strides, 0, dilations, ceil_mode=ceil)
    return _without_late_windows(y, x.shape[2:], pads, strides)


def _without_late_windows(y: Tensor, size: Sequence[int], pads: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Drops windows that begin in the padding at the end: torch does so only for padding of its own."""
    for axis, (n, begin, stride) in enumerate(zip(size, pads, strides, strict=False)):
        y = y.narrow(2 + axis, 0, min(y.shape[2 + axis], -(-(n + begin) // stride)))
    return y


def _average_pool(call: Call) -> Tensor:
    x, kernel = call.need(0), call.ints("kernel_shape") or []
    rank = len(kernel)
    pads, ceil = _pads(call, x.shape[2:], kernel), bool(call.get("ceil_mode", 0))
    if any(d != 1 for d in call.ints("dilations") or ()):
        raise call.unsupported("AveragePool with dilations")
    function = _by_rank(call, rank, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
    strides, counted = call.ints("strides") or [1] * rank, bool(call.get("count_include_pad", 0))
    if _symmetric(pads) and all(2 * p <= k for p, k in zip(pads, kernel, strict=False)):
        return function(x, kernel, strides, pads[:rank], ceil, counted)
    y = _without_late_windows(function(_padded(x, pads, 0.0), kernel, strides, 0, ceil), x.shape[2:], pads, strides)
    if counted:
        return y
    ones = function(_padded(torch.ones_like(x[:1, :1]), pads, 0.0), kernel, strides, 0, ceil)
    return y / _without_late_windows(ones, x.shape[2:], pads, strides)


def _global_pool(function: Callable[..., Tensor]) -> Operator:
    return lambda call: function(call.need(0), dim=tuple(range(2, call.need(0).ndim)), keepdim=True)


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def run(call: Call) -> Tensor:
        x, axes = call.need(0), call.ints("axes", 1)
        if not axes:
            if call.get("noop_with_empty_axes", 0):
                return x
            axes = list(range(x.ndim))
        return function(x, axes, bool(call.get("keepdims", 1))) if axes else x

    return run


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = torch.prod(x, dim=axis, keepdim=keep)
    return x


def _reshape(call: Call) -> Tensor:
    x, sizes = call.need(0), call.ints("shape", 1) or []
    if not call.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(call: Call) -> Tensor:
    x, axis = call.need(0), int(call.get("axis", 1))
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _transpose(call: Call) -> Tensor:
    x = call.need(0)
    return x.permute(call.ints("perm") or list(reversed(range(x.ndim))))


def _squeeze(call: Call) -> Tensor:
    x, axes = call.need(0), call.ints("axes", 1)
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(call: Call) -> Tensor:
    x, axes = call.need(0), call.ints("axes", 1) or []
    rank = x.ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def _split(call: Call) -> tuple[Tensor, ...]:
    x, axis = call.need(0), int(call.get("axis", 0))
    sizes = call.ints("split", 1)
    if sizes is None:
        return torch.split(x, math.ceil(x.shape[axis] / call.outputs), dim=axis)
    return torch.split(x, sizes, dim=axis)


def _slice(call: Call) -> Tensor:
    x = call.need(0)
    starts, ends = call.ints("starts", 1) or [], call.ints("ends", 2) or []
    axes = call.ints("axes", 3) or list(range(len(starts)))
    steps = call.ints("steps", 4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        picked = range(*slice(start, end if step > 0 or end >= -x.shape[axis] else None, step).indices(x.shape[axis]))
        if step == 1:
            x = x.narrow(axis, picked.start, len(picked)) if picked else x.narrow(axis, 0, 0)
        else:
            x = x.index_select(axis, torch.tensor(picked, dtype=torch.int64, device=x.device))
    return x


def _gather(call: Call) -> Tensor:
    x, indices, axis = call.need(0), call.need(1), int(call.get("axis", 0))
    axis = axis % x.ndim
    flat = indices.reshape(-1).to(torch.int64)
    flat = torch.where(flat < 0, flat + x.shape[axis], flat).to(x.device)
    return x.index_select(axis, flat).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_elements(call: Call) -> Tensor:
    x, indices, axis = call.need(0), call.need(1).to(torch.int64), int(call.get("axis", 0))
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices))


def _gather_nd(call: Call) -> Tensor:
    x, indices = call.need(0), call.need(1).to(torch.int64)
    batch = [
        torch.arange(x.shape[axis], device=x.device).reshape([-1 if i == axis else 1 for i in range(indices.ndim - 1)])
        for axis in range(int(call.get("batch_dims", 0)))
    ]
    return x[(*batch, *indices.unbind(-1))]


def _cumulative_sum(call: Call) -> Tensor:
    x, axis = call.need(0), int(call.need(1))
    if call.get("reverse", 0):
        x = x.flip(axis)
    y = x.cumsum(axis, dtype=x.dtype)
    if call.get("exclusive", 0):  # moved on by one, since an infinity less itself is no number
        first, rest = min(x.shape[axis], 1), max(x.shape[axis] - 1, 0)
        y = torch.cat([torch.zeros_like(y.narrow(axis, 0, first)), y.narrow(axis, 0, rest)], axis)
    return y.flip(axis) if call.get("reverse", 0) else y


def _pad(call: Call) -> Tensor:
    x, pads, axes = call.need(0), call.ints("pads", 1) or [], call.ints("axes", 3)
    mode, value = str(call.get("mode", "constant")), call.given(2)
    fill = float(call.get("value", 0.0)) if value is None or not value.numel() else value.item()
    axes = list(range(x.ndim)) if axes is None else [a % x.ndim for a in axes]
    both = {axis: (pads[i], pads[len(axes) + i]) for i, axis in enumerate(axes)}
    flat = [each for axis in reversed(range(x.ndim)) for each in both.get(axis, (0, 0))]
    if mode == "constant":
        return F.pad(x, flat, value=fill)
    while flat and flat[-2:] == [0, 0]:  # torch pads only the last axes in these modes
        flat = flat[:-2]
    names = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in names or len(flat) // 2 > x.ndim - 1 or len(flat) > 6:
        raise call.unsupported(f"Pad in mode {mode} of {len(flat) // 2} axes")
    return F.pad(x, flat, mode=names[mode]) if flat else x


def _resize(call: Call) -> Tensor:
    x, mode = call.need(0), str(call.get("mode", "nearest"))
    place = str(call.get("coordinate_transformation_mode", "half_pixel" if call.opset >= 11 else "asymmetric"))
    scales, sizes = call.given(1 if call.opset < 11 else 2), call.ints("sizes", 3)
    if (
        "axes" in call.attributes
        or call.get("antialias", 0)
        or call.get("keep_aspect_ratio_policy", "stretch") != "stretch"
    ):
        raise call.unsupported("Resize with axes, antialias or an aspect ratio")
    if not sizes:
        if scales is None or not scales.numel():
            raise call.unsupported("Resize without scales and sizes")
        sizes = [math.floor(n * s) for n, s in zip(x.shape, scales.tolist(), strict=True)]
    if sizes[:2] != list(x.shape[:2]):
        raise call.unsupported("Resize of batch or channels")
    new, old = sizes[2:], x.shape[2:]
    whole = all(n % o == 0 for n, o in zip(new, old, strict=True))
    half = place in ("half_pixel", "pytorch_half_pixel")
    if mode == "nearest":
        floor = call.get("nearest_mode", "round_prefer_floor") == "floor"
        # by whole factors the halves of pixels round to the same neighbour
        if (place == "asymmetric" and floor) or (whole and (half or floor)):
            return F.interpolate(x, size=new, mode="nearest")
    elif mode in ("linear", "cubic") and (half or place == "align_corners"):
        names = {1: "linear", 2: "bilinear", 3: "trilinear"} if mode == "linear" else {2: "bicubic"}
        usual = mode == "linear" or (
            float(call.get("cubic_coeff_a", -0.75)) == -0.75 and not call.get("exclude_outside", 0)
        )
        if len(new) in names and usual:
            return F.interpolate(x, size=new, mode=names[len(new)], align_corners=not half)
    raise call.unsupported(f"Resize in mode {mode} with {place} coordinates")


def _expand(call: Call) -> Tensor:
    x, sizes = call.need(0), call.ints("shape", 1) or []
    return x.expand(torch.broadcast_shapes(x.shape, tuple(sizes)))


def _shape(call: Call) -> Tensor:
    x = call.need(0)
    return torch.tensor(list(x.shape)[slice(call.get("start", 0), call.get("end", None))], dtype=torch.int64)


def _constant_of_shape(call: Call) -> Tensor:
    value = torch.as_tensor(np.array(call.get("value", np.zeros(1, np.float32))))
    return value.reshape(()).expand([int(n) for n in call.need(0).tolist()]).clone()


def _depth_to_space(call: Call) -> Tensor:
    x, block = call.need(0), int(call.attributes["blocksize"])
    if call.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    y = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // block**2, h * block, w * block)


def _space_to_depth(call: Call) -> Tensor:
    x, block = call.need(0), int(call.attributes["blocksize"])
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * block**2, h // block, w // block)


def _range(call: Call) -> Tensor:
    start, limit, delta = (call.need(i) for i in range(3))
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _trilu(call: Call) -> Tensor:
    k = call.given(1)
    by = 0 if k is None else int(k)
    return torch.triu(call.need(0), by) if call.get("upper", 1) else torch.tril(call.need(0), by)


def _arg(function: Callable[..., Tensor]) -> Operator:
    return lambda call: function(call.need(0), dim=int(call.get("axis", 0)), keepdim=bool(call.get("keepdims", 1)))


#: every operator of the default domain that a module can hold
OPERATORS: dict[str, Operator] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "CastLike": lambda call: call.need(0).to(call.need(1).dtype),
    "Ceil": _unary(torch.ceil),
    "Clip": _clip,
    "Concat": lambda call: torch.cat([call.need(i) for i in range(len(call.inputs))], int(call.attributes["axis"])),
    "ConstantOfShape": _constant_of_shape,
    "Conv": _convolve,
    "ConvTranspose": _convolve_transposed,
    "Cos": _unary(torch.cos),
    "CumSum": _cumulative_sum,
    "DepthToSpace": _depth_to_space,
    "Div": _binary(_divide),
    "Dropout": _dropout,
    "Einsum": lambda call: torch.einsum(
        str(call.attributes["equation"]), *(call.need(i) for i in range(len(call.inputs)))
    ),
    "Elu": lambda call: F.elu(call.need(0), float(call.get("alpha", 1.0))),
    "Equal": _binary(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _unary(torch.floor),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool(torch.mean),
    "GlobalMaxPool": _global_pool(torch.amax),
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "GroupNormalization": _group_normalization,
    "HardSigmoid": lambda call: torch.clamp(
        call.need(0) * float(call.get("alpha", 0.2)) + float(call.get("beta", 0.5)), 0, 1
    ),
    "HardSwish": _unary(F.hardswish),
    "Identity": _unary(lambda x: x),
    "InstanceNormalization": _instance_normalization,
    "IsNaN": _unary(torch.isnan),
    "LayerNormalization": _layer_normalization,
    "LeakyRelu": lambda call: F.leaky_relu(call.need(0), float(call.get("alpha", 0.01))),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _unary(torch.log),
    "LogSoftmax": _softmax(F.log_softmax),
    "MatMul": _binary(torch.matmul),
    "Max": _variadic(torch.maximum),
    "MaxPool": _max_pool,
    "Mean": _variadic(torch.add, mean=True),
    "Min": _variadic(torch.minimum),
    "Mish": _unary(F.mish),
    "Mod": lambda call: (torch.fmod if call.get("fmod", 0) else torch.remainder)(call.need(0), call.need(1)),
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": lambda call: torch.pow(call.need(0), call.need(1)).to(call.need(0).dtype),
    "Range": _range,
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceL1": _reduce(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: torch.amax(x, axes, keepdim=keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: torch.mean(x, axes, keepdim=keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: torch.amin(x, axes, keepdim=keep)),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(lambda x, axes, keep: torch.sum(x, axes, keepdim=keep)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "Relu": _unary(F.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Round": _unary(torch.round),
    "Selu": _unary(F.selu),
    "Shape": _shape,
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Size": _unary(lambda x: torch.tensor(x.numel())),
    "Slice": _slice,
    "Softmax": _softmax(F.softmax),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(torch.sub),
    "Sum": _variadic(torch.add),
    "Swish": lambda call: call.need(0) * torch.sigmoid(call.need(0) * float(call.get("alpha", 1.0))),
    "Tanh": _unary(torch.tanh),
    "ThresholdedRelu": lambda call: torch.where(call.need(0) > float(call.get("alpha", 1.0)), call.need(0), 0.0),
    "Tile": lambda call: call.need(0).tile(tuple(call.ints("repeats", 1) or ())),
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": lambda call: torch.where(call.need(0), call.need(1), call.need(2)),
}
