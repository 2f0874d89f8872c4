"""What a pass over samples gathers of a graph, to be kept, resumed, and turned into any method's ranges."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from passes._quant import Calibration
from toolchain.clipping import METHODS, PERCENTILE, Method, tensor_ranges
from toolchain.errors import CalibrationError
from toolchain.histogram import Distribution, Histograms, joined
from toolchain.observation import Plan
from toolchain.storage import write_bytes

#: elements of a tensor that go into its histogram for each sample
SAMPLED = 2048
_FORMAT = {"format": "toolchain-observed", "version": 1}


class Observed:
    """What a pass over samples gathered of a graph.

    Args:
        graph_plan: what was looked at.
        sampled: see ``observe``.
        data: a key of the samples, for resuming; "" where it is not known.

    Attributes:
        samples: how many were taken in (entries of axis 0 of the inputs).
    """

    def __init__(self, graph_plan: Plan, *, sampled: int | None = SAMPLED, data: str = "") -> None:
        self.plan = graph_plan
        self._index = {name: i for i, name in enumerate(graph_plan.observed)}
        bounds = {self._index[name]: limits for name, limits in graph_plan.bounds.items()}
        self._histograms = Histograms(len(self._index), sampled=sampled, bounds=bounds)
        self._amax: dict[str, np.ndarray] = {}
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, int] = {}
        # the samples may be read in other batches when a calibration is resumed, but not otherwise
        self._key = {**_FORMAT, "graph": graph_plan.graph, "sampled": sampled, "data": data}
        self._key["tensors"] = list(graph_plan.observed)
        self._key["channels"] = sorted(set(graph_plan.channel_inputs) | set(graph_plan.channel_outputs))

    @property
    def samples(self) -> int:
        return self._histograms.samples

    def add(self, values: dict[str, np.ndarray], samples: int) -> None:
        """Takes in one run, and empties ``values`` on the way: memory is free again as soon as it was read.

        Args:
            values: every observed value by name.
            samples: how many samples they are of.

        Raises:
            NonFinite: NaN or infinity; nothing of the run was taken in.
        """
        amax: dict[str, np.ndarray] = {}
        sums: dict[str, tuple[np.ndarray, int]] = {}

        def each() -> Iterator[np.ndarray]:
            for name in self.plan.observed:
                value = values.pop(name)
                if name in self.plan.channel_inputs and value.size:
                    amax[name] = _channel_amax(value)
                if name in self.plan.channel_outputs and value.size:
                    sums[name] = _channel_sums(value, self.plan.channel_outputs[name])
                yield value

        self._histograms.add(each(), samples)
        for name, array in amax.items():
            self._amax[name] = np.maximum(self._amax.get(name, 0.0), array)
        for name, (total, count) in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0) + count

    def distributions(self) -> Iterator[tuple[str, Distribution]]:
        """The distribution of every tensor that was looked at and ever had an element."""
        for name, index in self._index.items():
            found = self._histograms.distribution(index)
            if found is not None:
                yield name, found

    def calibration(self, *, method: Method = "auto", percentile: float = PERCENTILE) -> Calibration:
        """Derives the ranges; see ``toolchain/clipping.py`` for the methods.

        Args:
            method: one of METHODS.
            percentile: percent of the elements that the ``percentile`` method covers, above 50 to 100.

        Raises:
            CalibrationError: an unknown method or percentile, or no samples were seen.
        """
        check_method(method, percentile)
        if not self.samples:
            raise CalibrationError(
                "there are no samples to calibrate on", hint="give at least one; 50 to 500 are usual"
            )
        found = dict(self.distributions())
        for name, parts in self.plan.joined.items():
            if all(part in found for part in parts):
                found[name] = joined([(found[part], self._histograms.elements(self._index[part])) for part in parts])
        derived = tensor_ranges(list(found.values()), method=method, percentile=percentile)
        ranges = dict(zip(found, derived, strict=True))
        ranges |= {name: ranges[carrier] for name, carrier in self.plan.same.items() if carrier in ranges}
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        return Calibration(self.plan.graph, self.samples, ranges, dict(self._amax), means)

    def save(self, path: Path) -> None:
        """Writes everything to an .npz, whole or not at all. Raises StorageError."""
        arrays: dict[str, Any] = self._histograms.arrays()
        for kind, held in (("amax", self._amax), ("sum", self._sums)):
            arrays |= {f"{kind}/{name}": array for name, array in held.items()}
        arrays |= {f"count/{name}": np.array(count) for name, count in self._counts.items()}
        arrays["key"] = np.frombuffer(json.dumps(self._key).encode(), np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_bytes(path, buffer.getbuffer())

    def restore(self, path: Path) -> None:
        """Goes on from a file that ``save`` wrote for the same graph, tensors, options and data.

        Raises:
            CalibrationError: it is not such a file.
        """
        hint = "resume with the same model, data, limit and batch size, or delete it and calibrate from the start"
        try:
            with np.load(path, allow_pickle=False) as archive:
                key = json.loads(bytes(archive["key"]))
                differs = [k for k in self._key if key.get(k) != self._key[k]]
                if differs:
                    raise CalibrationError(
                        f"it was written for another {' and '.join(differs)}", where=str(path), hint=hint
                    )
                self._histograms.restore(archive)
                for name in archive.files:
                    kind, _, tensor = name.partition("/")
                    if kind == "amax" and tensor:
                        self._amax[tensor] = archive[name]
                    elif kind == "sum" and tensor:
                        self._sums[tensor] = archive[name]
                    elif kind == "count" and tensor:
                        self._counts[tensor] = int(archive[name])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
            raise CalibrationError(f"cannot go on from this state: {error}", where=str(path), hint=hint) from error


def check_method(method: str, percentile: float) -> None:
    """Raises CalibrationError unless both are allowed."""
    if method not in METHODS:
        raise CalibrationError(f"there is no method {method!r}", hint=f"one of {', '.join(METHODS)}")
    if not 50 < percentile <= 100:
        raise CalibrationError(f"percentile is {percentile:g}", hint="above 50, at most 100, such as 99.99")


def _channel_amax(value: np.ndarray) -> np.ndarray:
    rows = value.reshape(-1, value.shape[-1])
    return np.asarray(np.maximum(rows.max(axis=0), -rows.min(axis=0)), np.float64)


def _channel_sums(value: np.ndarray, axis: int) -> tuple[np.ndarray, int]:
    moved = np.moveaxis(value, axis, -1)
    total = moved.sum(axis=tuple(range(moved.ndim - 1)), dtype=np.float64)
    return total, value.size // moved.shape[-1]
