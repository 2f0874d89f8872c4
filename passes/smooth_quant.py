"""SmoothQuant: moves outliers from activations into the weights that read them, channel by channel.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"
(arXiv 2211.10438). One scale for a whole activation is wasted on a few channels that are a hundred times larger
than the others. For any positive s::

    Y = X W   =   (X diag(s)^-1) (diag(s) W),     s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

The division costs nothing where what makes X has numbers of its own for each channel: a LayerNormalization (also in
pieces: Mul and Add), the layer before, through Relu and through the values of attention. Where it has not, or where
something else reads X too (the residual of a post-norm transformer), a Mul does it, if that was asked for. All
layers that read X share its s.

Measured on MiniLM-L6-v2 (6 layers, post-norm, STS-B dev, ONNX Runtime on the CPU, ranges from 128 sentences): cosine
similarity of the INT8 embeddings to the float ones is 0.9933 without, 0.9930 with alpha 0.5, 0.9975 with 0.7, 0.9939
with 0.8, and 0.9976 with "auto", all with Muls. Without Muls only 6 of 25 values can be divided there, those of the
smallest outliers, and nothing gets better: 0.9932. Take minimum and maximum as ranges afterwards: what a percentile
cuts off is no outlier any more, and cosine similarity falls to 0.9956. And take a weight scale for each channel, which
"auto" measures with: with one for the whole weight what moved there does harm, 0.964 without and 0.878 with "auto".

The float result stays the same, up to rounding. Needed are the largest magnitudes of each channel of X, which
``toolchain calibrate --channels`` gathers; ranges have to be calibrated again afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from passes._graph import (
    Names,
    Scope,
    array,
    attribute_int,
    attribute_ints,
    constant,
    default_opset,
    dims,
    given,
    is_op,
    new_constant,
    only_use,
    rank,
)
from passes._linear import Linear, NotLinear, drop_unused, read_linear
from passes._quant import Calibration, affine_u8
from passes._quant_weights import quantize_array
from passes.base import Declined, InvalidOption, Outcome, Pass, PassFailed, label

#: what ``alpha="auto"`` tries
_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: as in the authors' code: below, a channel is as good as zero
_LEAST = 1e-5
_NORMALIZATIONS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


class _Decline(Exception):
    """Why a value stays as it is."""


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Rows of activations, to measure quantisation error on.

    Attributes:
        rows: for each value name float32 [rows, channels], at least 2; from as many different samples as can be,
            neighbours next to each other, for one half of them is held out to judge by.
    """

    rows: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class SmoothQuant(Pass):
    """Moves outliers of activations into the weights of the Gemm and MatMul that read them.

    Attributes:
        calibration: with the largest magnitude of each channel of the values that Gemm and MatMul read.
        alpha: how much of the outliers moves, 0 to 1; "auto" takes for each value what gives the least error on
            samples that were held out, and leaves alone what does not get better.
        samples: rows of these values; "auto" measures on them.
        insert_mul: divide by a Mul of its own where nothing before the value can do it.
    """

    calibration: Calibration | None = dataclasses.field(default=None, repr=False)
    alpha: float | str = 0.5
    samples: Samples | None = dataclasses.field(default=None, repr=False)
    insert_mul: bool = False

    def __post_init__(self) -> None:
        fine = self.alpha == "auto" if isinstance(self.alpha, str) else 0 <= self.alpha <= 1
        if not fine:
            raise InvalidOption(f"option alpha of pass smooth_quant is {self.alpha!r}", hint="wanted: 0 to 1, or auto")

    def call(self, model: ir.Model) -> Outcome:
        if self.calibration is None:
            raise PassFailed("smooth_quant needs a calibration", hint="make one with the maxima of channels")
        if self.alpha == "auto" and self.samples is None:
            raise PassFailed("smooth_quant with alpha auto needs samples", hint="give a number for alpha")
        scope = Scope(model.graph, default_opset(model.opset_imports), False)
        names = Names(model)
        declined: list[Declined] = []
        fired = 0
        for value, readers in readers_by_input(model).items():
            try:
                fired += self._smooth(scope, value, readers, names)
            except (_Decline, NotLinear) as reason:
                declined.append(Declined(label(readers[0]), str(reason)))
        return Outcome(model, fired > 0, fired=fired, declined=tuple(declined))

    def _smooth(self, scope: Scope, value: ir.Value, readers: list[ir.Node], names: Names) -> bool:
        assert self.calibration is not None
        amax = self.calibration.channel_amax.get(str(value.name))
        if amax is None:
            raise _Decline(f"the calibration has no maxima of the channels of {value.name!r}")
        layers = [read_linear(node) for node in readers]
        if any(layer.inputs != amax.size for layer in layers):
            raise _Decline(f"the calibration has {amax.size} channels of {value.name!r}")
        scale = self._scale(value, amax, layers)
        if np.ptp(scale) <= 1e-6 * scale.max():
            return False
        change: _Change | None = _Change(amax.size)
        try:
            if len(value.uses()) != len(readers) or value.is_graph_output():
                others = [label(use.node) for use in value.uses() if use.node not in readers]
                raise _Decline(f"{others[0] if others else 'an output'} reads it too")
            assert change is not None
            change.trace(value, (_last(value),))
        except (_Decline, NotLinear):
            if not self.insert_mul:
                raise
            change = None
        for layer in layers:
            layer.scale_inputs(scale)
            layer.check()
        if change is not None:
            change.carry_out(scope, scale, names)
        else:
            value = _divided(scope, value, scale, names)
        for layer in layers:
            layer.write(scope, names)
            layer.node.replace_input_with(0, value)
        return True

    def _scale(self, value: ir.Value, amax: np.ndarray, layers: list[Linear]) -> np.ndarray:
        if not isinstance(self.alpha, str):
            return migration_scale(amax, layers, self.alpha)
        assert self.samples is not None
        rows = self.samples.rows.get(str(value.name))
        if rows is None:
            raise _Decline(f"there are no samples of {value.name!r}")
        half = len(rows) // 2
        if half == 0:
            raise _Decline(f"there are too few samples of {value.name!r}")
        errors = {
            alpha: sum(
                _held_out_error(known, unseen, layers, alpha)
                for known, unseen in ((rows[:half], rows[half:]), (rows[half:], rows[:half]))
            )
            for alpha in (None, *_ALPHAS)
        }
        best = min(errors, key=lambda alpha: errors[alpha])
        if best is None:
            raise _Decline("no alpha makes the quantised result better")
        return migration_scale(amax, layers, best)


def readers_by_input(model: ir.Model) -> dict[ir.Value, list[ir.Node]]:
    """The values that Gemm and MatMul multiply with constant weights, and who reads each, in the graph's order."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        value = given(node, 0)
        if is_op(node, "MatMul", "Gemm") and constant(given(node, 1)) is not None and value is not None:
            if constant(value) is None:
                found.setdefault(value, []).append(node)
    return found


def migration_scale(amax: np.ndarray, layers: list[Linear], alpha: float) -> np.ndarray:
    """By what each channel is divided, float64 [C] > 0; ``amax`` is the largest magnitude of each, [C]."""
    weight = np.max([layer.input_absmax() for layer in layers], axis=0)
    alive = (amax > 0) & (weight > 0)
    # A channel that is zero on either side has nothing to move.
    scale = np.power(np.maximum(amax, _LEAST), alpha) / np.power(np.maximum(weight, _LEAST), 1 - alpha)
    middle = float(np.exp(np.log(scale[alive]).mean())) if alive.any() else 1.0
    # Around 1, so that the numbers stay where the type is precise: one factor for all changes no result.
    return np.where(alive, np.maximum(scale / middle, _LEAST), 1.0)


def _held_out_error(known: np.ndarray, unseen: np.ndarray, layers: list[Linear], alpha: float | None) -> float:
    """Normalised squared error of the products in 8 bits, summed over the layers; None moves nothing.

    Scale and range come from one half of the rows and the error from the other: the more outliers move, the more
    channels reach the end of the range, and the more of what was not seen is cut off. Measured on the rows that
    the range was made of, the largest alpha always looks best.
    """
    known, unseen = known.astype(np.float64), unseen.astype(np.float64)
    scale = np.ones(known.shape[1]) if alpha is None else migration_scale(np.abs(known).max(axis=0), layers, alpha)
    smooth = known / scale
    found = affine_u8(float(smooth.min()), float(smooth.max()))
    integers = np.clip(np.rint(unseen / scale / found.scale) + found.zero_point, 0, 255) - found.zero_point
    total = 0.0
    for layer in layers:
        weight = layer.weight[0, :, :, 0]
        quantised = quantize_array((weight * scale).astype(np.float32), 0, method="amax")
        exact = unseen @ weight.T
        given_back = (integers * found.scale) @ (quantised.values * quantised.scale[:, None].astype(np.float64)).T
        signal = np.square(exact - exact.mean(axis=0)).sum()
        total += float(np.square(given_back - exact).sum() / max(float(signal), 1e-30))
    return total


def _divided(scope: Scope, value: ir.Value, scale: np.ndarray, names: Names) -> ir.Value:
    """The value over ``scale``, by a Mul of its own."""
    producer = value.producer()
    name = names.fresh(f"{value.name}_smoothed")
    factors = (1 / scale).astype(_dtype(value))
    node = ir.Node("", "Mul", [value], num_outputs=1, name=names.fresh(f"{value.name}_smooth"))
    node.resize_inputs(2)
    if producer is not None and producer.graph is scope.graph:
        scope.graph.insert_after(producer, node)
    else:
        scope.graph.insert_before(scope.graph[0], node)
    node.replace_input_with(1, new_constant(scope, factors, names.fresh(f"{name}_scale"), before=node))
    result = node.outputs[0]
    result.name, result.type = name, value.type
    result.shape = value.shape.copy() if value.shape is not None else None
    return result


@dataclasses.dataclass(eq=False)
class _Change:
    """What has to be divided so that a value comes out divided; found by ``trace``, done by ``carry_out``."""

    channels: int
    layers: list[Linear] = dataclasses.field(default_factory=list)
    constants: list[tuple[ir.Node, int]] = dataclasses.field(default_factory=list)
    values: list[ir.Value] = dataclasses.field(default_factory=list)

    def trace(self, value: ir.Value, axes: tuple[int, ...]) -> None:
        """Goes up from a value to what can divide it.

        Args:
            value: whose elements are to be divided.
            axes: where its channels are: the last axis, or those of heads and of channels in each head.

        Raises:
            _Decline, NotLinear: nothing can.
        """
        node = value.producer()
        if node is None or node.graph is None:
            raise _Decline(f"{value.name!r} is an input")
        if value is not node.outputs[0]:
            raise _Decline(f"{label(node)} gives it as a further output")
        self.values.append(value)
        if is_op(node, "Relu", "LeakyRelu", "Identity", "Dropout"):
            self._up(node, 0, axes)
        elif is_op(node, "Transpose"):
            perm = attribute_ints(node, "perm")
            if perm is None:
                raise _Decline(f"{label(node)} has no perm")
            self._up(node, 0, tuple(perm[axis] for axis in axes))
        elif is_op(node, "Reshape"):
            self._up(node, 0, self._before_reshape(node, axes))
        elif is_op(node, "MatMul") and constant(given(node, 1)) is None:
            self._up(node, 1, self._through_attention(node, axes))
        elif axes != (_last(value),):
            raise _Decline(f"{label(node)} ({node.op_type}) has the channels of {value.name!r} in another axis")
        elif is_op(node, "MatMul", "Gemm"):
            layer = read_linear(node)
            if layer.outputs != self.channels:
                raise _Decline(f"{label(node)} gives {layer.outputs} channels")
            self.layers.append(layer)
        elif node.op_type in _NORMALIZATIONS:
            self._normalization(node)
        elif is_op(node, "Add", "Sub", "Mul"):
            self._arithmetic(node, axes)
        else:
            raise _Decline(f"{label(node)} ({node.op_type}) cannot divide each channel")

    def _up(self, node: ir.Node, index: int, axes: tuple[int, ...]) -> None:
        value = given(node, index)
        assert value is not None
        if only_use(value) is None:
            raise _Decline(f"{value.name!r} is read by others too")
        self.trace(value, axes)

    def _arithmetic(self, node: ir.Node, axes: tuple[int, ...]) -> None:
        fixed = [index for index in (0, 1) if array(given(node, index)) is not None]
        if len(fixed) == 1:
            (index,) = fixed
            self._constant(node, index)
            if node.op_type != "Mul":
                self._up(node, 1 - index, axes)
            return
        if node.op_type != "Mul":
            raise _Decline(f"{label(node)} joins two values")
        # Of a product one factor is enough: the one that can.
        before = len(self.layers), len(self.constants), len(self.values)
        try:
            self._factor(node, 0, axes)
        except (_Decline, NotLinear):
            del self.layers[before[0] :], self.constants[before[1] :], self.values[before[2] :]
            self._factor(node, 1, axes)

    def _factor(self, node: ir.Node, index: int, axes: tuple[int, ...]) -> None:
        mine, whole = dims(given(node, index)), dims(node.outputs[0])
        if mine is None or whole is None or mine[-1:] != whole[-1:] or len(mine) != len(whole):
            raise _Decline(f"{label(node)} stretches its factors")
        self._up(node, index, axes)

    def _constant(self, node: ir.Node, index: int) -> None:
        data = array(given(node, index))
        there = rank(node.outputs[0])
        if data is None or data.size not in (1, self.channels) or data.shape[-1:] not in ((), (1,), (self.channels,)):
            raise _Decline(f"{label(node)} has no constant number for each channel")
        if there is None or data.ndim > there:
            raise _Decline(f"{label(node)} is not known to keep its shape")
        self.constants.append((node, index))

    def _normalization(self, node: ir.Node) -> None:
        there = rank(node.inputs[0])
        axis = attribute_int(node, "axis", -1)
        if axis != -1 and (there is None or axis != there - 1):
            raise _Decline(f"{label(node)} normalises over several axes")
        for index in (1, 2):
            if given(node, index) is not None:
                self._constant(node, index)

    def _before_reshape(self, node: ir.Node, axes: tuple[int, ...]) -> tuple[int, ...]:
        """The axes before, where both shapes end with the channels, in one axis or in heads."""
        before, after = dims(node.inputs[0]), dims(node.outputs[0])
        if before is None or after is None or axes != tuple(range(len(after) - len(axes), len(after))):
            raise _Decline(f"{label(node)} moves channels")
        for count in (1, 2):
            ending = before[-count:]
            if all(isinstance(d, int) for d in ending) and np.prod([int(str(d)) for d in ending]) == self.channels:
                return tuple(range(len(before) - count, len(before)))
        raise _Decline(f"{label(node)} moves channels")

    def _through_attention(self, node: ir.Node, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Weights of attention times values: what scales a channel of the values scales it in the result."""
        left, right, whole = dims(node.inputs[0]), dims(node.inputs[1]), dims(node.outputs[0])
        if left is None or right is None or whole is None or not len(left) == len(right) == len(whole):
            raise _Decline(f"{label(node)}: the shapes of what it multiplies are not known")
        last = len(whole) - 1
        if axes[-1] != last or last - 1 in axes or any(right[axis] != whole[axis] for axis in axes):
            raise _Decline(f"{label(node)} mixes channels")
        return axes

    def carry_out(self, scope: Scope, scale: np.ndarray, names: Names) -> None:
        """Divides by ``scale`` [C]. Raises NotLinear, before anything is changed, where numbers would overflow."""
        constants = []
        for layer in self.layers:
            layer.scale_outputs(1 / scale)
            layer.check()
        for node, index in self.constants:
            data = array(node.inputs[index])
            assert data is not None
            with np.errstate(over="ignore"):
                divided = (data.astype(np.float64).reshape(-1) / scale).astype(data.dtype)
            if not np.isfinite(divided.astype(np.float64)).all():
                raise NotLinear(f"{label(node)}: its constant would leave the range of {data.dtype}")
            constants.append((node, index, divided))
        for layer in self.layers:
            layer.write(scope, names)
        for node, index, divided in constants:
            old = node.inputs[index]
            kind = {1: "scale", 2: "bias"}[index] if node.op_type in _NORMALIZATIONS else "constant"
            name = names.fresh(f"{node.outputs[0].name}_{kind}")
            node.replace_input_with(index, new_constant(scope, divided, name, before=node))
            drop_unused(old)
        for value in self.values:
            value.name = names.fresh(f"{value.name}_smoothed")


def _last(value: ir.Value) -> int:
    there = rank(value)
    if there is None:
        raise _Decline(f"the rank of {value.name!r} is not known")
    return there - 1


def _dtype(value: ir.Value) -> np.dtype:
    return value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
