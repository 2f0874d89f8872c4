"""Requests as one batch: which may go together, their inputs in one array, and each one's rows of the outputs.

Without padding only requests go together whose inputs have equal shapes but for the batch axis. With it, symbolic axes
such as a sequence's length may differ: inputs are filled up to the longest, and outputs are cut back::

    [1, 5] and [3, 7], fill 0   →   [4, 7]   →   [1, 5, 384] and [3, 7, 384]

The longest of a batch sets the cost of all its rows, so lengths only go together where they are alike: all up to 16,
and from there on those of a class, which ends at 1.19 times its beginning. A sentence encoder of six layers on two
cores decides it: in a batch of eight a row of 16 tokens takes 0.56 of its time alone, less than one of 8 tokens alone;
a row of 64 takes 0.82 and one of 128 0.97, so more than some tenth of filling would cost more than the batch saves.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from runtimes import InvalidInput, TensorSpec
from toolchain.serving.base import ModelInfo

#: Up to here all lengths go together: what is filled in costs less than a run of its own.
SHORT = 16


class Layout:
    """How the requests of one model are laid out as a batch.

    Args:
        info: the model; where ``max_batch_size`` is 0, only ``key`` and a batch of one make sense.
        fill: input name → the number that fills up its symbolic axes; as ``Batching.padding``.

    Raises:
        InvalidInput: a padded input is not the model's or has no symbolic axis but the batch, or an axis of the same
            name is in an input that is not padded.
    """

    def __init__(self, info: ModelInfo, fill: Mapping[str, float] | None = None) -> None:
        fill = fill or {}
        self.names = tuple(spec.name for spec in info.inputs)
        self._fill = dict(fill)
        symbols = {name for spec in info.inputs if spec.name in fill for _, name in _symbolic(spec)}
        self._axes = {spec.name: tuple(a for a in _symbolic(spec) if a[1] in symbols) for spec in info.inputs}
        self._cuts = {spec.name: tuple(a for a in _symbolic(spec) if a[1] in symbols) for spec in info.outputs}
        self._padded = bool(symbols)
        for name in fill:
            if name not in self.names:
                raise InvalidInput(
                    f"padding names the input {name!r}, which model {info.name!r} does not have",
                    where="batching.padding",
                    hint=f"it takes: {'; '.join(map(str, info.inputs))}",
                )
            if not self._axes[name]:
                raise InvalidInput(
                    f"the input {name!r} has no symbolic axis but the batch, so there is nothing to fill up",
                    where="batching.padding",
                    hint="leave it out",
                )
        for spec in info.inputs:
            if spec.name not in fill and self._axes[spec.name]:
                raise InvalidInput(
                    f"the input {spec.name!r} has the axis {self._axes[spec.name][0][1]!r} too, and nothing to fill "
                    "it up with",
                    where="batching.padding",
                    hint="name every input that has this axis",
                )

    def key(self, inputs: Mapping[str, np.ndarray]) -> Hashable:
        """Requests with equal keys may go together."""
        if not self._padded:
            return tuple([inputs[name].shape[1:] for name in self.names])
        found = []
        for name in self.names:
            shape = list(inputs[name].shape)
            for axis, _ in self._axes[name]:
                shape[axis] = -_length_class(shape[axis])
            found.append(tuple(shape[1:]))
        return tuple(found)

    def gather(self, requests: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """One array for each input: the rows of all requests below each other, filled up to the longest."""
        if not self._padded:
            return {name: np.concatenate([inputs[name] for inputs in requests]) for name in self.names}
        found = {}
        for name in self.names:
            arrays = [inputs[name] for inputs in requests]
            if len({array.shape[1:] for array in arrays}) == 1:
                found[name] = np.concatenate(arrays)
                continue
            longest = np.max([array.shape[1:] for array in arrays], axis=0)
            whole = np.full((sum(map(len, arrays)), *longest), self._fill[name], arrays[0].dtype)
            row = 0
            for array in arrays:
                whole[(slice(row, row + len(array)), *map(slice, array.shape[1:]))] = array
                row += len(array)
            found[name] = whole
        return found

    def hand_out(
        self, outputs: Mapping[str, np.ndarray], requests: Sequence[Mapping[str, np.ndarray]], rows: Sequence[int]
    ) -> list[dict[str, np.ndarray]]:
        """Each request's own rows, cut back to its own lengths: views of the outputs of the batch.

        Args:
            outputs: name → array, with the rows of all requests below each other.
            requests: the inputs of each.
            rows: how many each has.
        """
        found = []
        row = 0
        for inputs, count in zip(requests, rows, strict=True):
            own = {name: array[row : row + count] for name, array in outputs.items()}
            if self._padded:
                sizes = {symbol: inputs[name].shape[axis] for name in self.names for axis, symbol in self._axes[name]}
                for name, axes in self._cuts.items():
                    cut = [slice(None)] * own[name].ndim
                    for axis, symbol in axes:
                        cut[axis] = slice(sizes[symbol])
                    own[name] = own[name][tuple(cut)]
            found.append(own)
            row += count
        return found


def _symbolic(spec: TensorSpec) -> list[tuple[int, str]]:
    """Axes behind the first that have a name instead of a size."""
    return [(axis, dim) for axis, dim in enumerate(spec.shape or ()) if axis and isinstance(dim, str)]


def _length_class(size: int) -> int:
    return 1 if size <= SHORT else 1 + math.ceil(4 * math.log2(size / SHORT))
