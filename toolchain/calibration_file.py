"""The calibration file: small, readable, versioned JSON; and whether it belongs to a graph.

One line a tensor::

    {
      "format": "toolchain-calibration",
      "version": 1,
      "graph": "5f0c...",
      "samples": 64,
      "asked": 64,
      "ranges": {
        "relu": {"low": 0.0, "high": 5.9, "amax": 5.2, "minimum": 0.0, "maximum": 6.5, "method": "mse"}
      }
    }
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from passes._quant import Calibration, TensorRange
from toolchain.errors import CalibrationError
from toolchain.observation import graph_digest, plan
from toolchain.storage import write_text

if TYPE_CHECKING:
    import onnx_ir as ir

_FORMAT, _VERSION = "toolchain-calibration", 1
_NUMBERS = ("low", "high", "amax", "minimum", "maximum")
#: what the name of an interrupted calibration's state has besides that of the file it was to become
STATE = ".state"
#: how an .npz begins
_ZIP = b"PK"
#: so that the width of a range is one too
_LARGEST = float(np.finfo(np.float32).max) / 2
_CHANNELS = ("channel_amax", "channel_mean")


@dataclasses.dataclass(frozen=True, slots=True)
class Mismatch:
    """How a calibration and a graph differ.

    Attributes:
        same_graph: whether the graph is the very one that was calibrated, weights (by sample) included.
        missing: values with a range that the graph has not.
        new: values of the graph that want a range and have none.
    """

    same_graph: bool
    missing: tuple[str, ...]
    new: tuple[str, ...]

    def require(self, *, where: str | None = None) -> None:
        """Raises CalibrationError where values of the graph have no range; what the graph lacks is only unused."""
        if not self.new:
            return
        lines = [
            "the calibration is of another graph, or not whole: "
            f"{_some(self.new)} {'has' if len(self.new) == 1 else 'have'} no range"
        ]
        if self.missing:
            lines.append(f"it has {_some(self.missing)}, which the graph has not")
        raise CalibrationError("; ".join(lines), where=where, hint="calibrate this graph")


def write(calibration: Calibration, path: Path) -> None:
    """Writes the file, whole or not at all. Raises StorageError."""
    write_text(path, dumps(calibration))


def dumps(calibration: Calibration) -> str:
    """The file's content: JSON with a line for each tensor."""
    lines = [f"    {json.dumps(name, ensure_ascii=False)}: {_line(r)}" for name, r in calibration.ranges.items()]
    head: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "graph": calibration.graph,
        "samples": calibration.samples,
        **({} if calibration.asked is None else {"asked": calibration.asked}),
    }
    parts = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    parts.append('  "ranges": {\n' + ",\n".join(lines) + "\n  }")
    for key in _CHANNELS:
        held = getattr(calibration, key)
        if held:
            rows = [
                f"    {json.dumps(name, ensure_ascii=False)}: {json.dumps([float(f'{x:.7g}') for x in array.tolist()])}"
                for name, array in held.items()
            ]
            parts.append(f'  "{key}": {{\n' + ",\n".join(rows) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read(path: Path) -> Calibration:
    """Reads a file that ``write`` wrote.

    Raises:
        CalibrationError: it is not there, damaged, of a newer version, or holds what is no range.
    """
    try:
        content = path.read_bytes()
        if content.startswith(_ZIP):
            raise CalibrationError(
                "not a calibration: a .state of one that was interrupted, or histograms",
                where=str(path),
                hint="toolchain calibrate with the same arguments and --resume goes on from a state",
            )
        tree = json.loads(content)
    except FileNotFoundError as error:
        raise CalibrationError(
            "no such calibration", where=str(path), hint=f"toolchain calibrate MODEL.onnx --data DATA -o {path.name}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrationError(f"not a calibration: {error}", where=str(path), hint="calibrate again") from error
    if not isinstance(tree, dict) or tree.get("format") != _FORMAT:
        raise CalibrationError(f"not a calibration: its format is not {_FORMAT!r}", where=str(path))
    if tree.get("version") != _VERSION:
        raise CalibrationError(
            f"it has version {tree.get('version')!r}, this program reads {_VERSION}",
            where=str(path),
            hint="update the toolchain, or calibrate again",
        )
    try:
        ranges = {str(name): _range(name, entry) for name, entry in tree["ranges"].items()}
        channels = {
            key: {str(name): np.asarray(row, np.float64) for name, row in tree.get(key, {}).items()}
            for key in _CHANNELS
        }
        asked = None if tree.get("asked") is None else _count(tree, "asked")
        return Calibration(str(tree["graph"]), _count(tree, "samples"), ranges, **channels, asked=asked)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CalibrationError(f"damaged: {error}", where=str(path), hint="calibrate again") from error


def match(calibration: Calibration, model: ir.Model) -> Mismatch:
    """Compares a calibration with a graph, by names and digest.

    A graph that passes have rewritten since keeps its ranges: a name that is still there stands for the same value.
    Names then tell whether every value that wants a range has one.
    """
    if graph_digest(model) == calibration.graph:
        return Mismatch(True, (), ())
    names = {v.name for v in model.graph.inputs} | {v.name for node in model.graph for v in node.outputs}
    return Mismatch(
        False,
        missing=tuple(name for name in calibration.ranges if name not in names),
        new=without_range(calibration, model),
    )


def require_match(calibration: Calibration, model: ir.Model, *, where: str | None = None) -> None:
    """Raises CalibrationError where values of the graph that want a range have none; the message names them.

    A TensorRT cache has only what TensorRT quantised: of one it is enough that some of its ranges are the graph's.
    """
    found = match(calibration, model)
    if calibration.samples or len(found.missing) == len(calibration.ranges):
        found.require(where=where)


def without_range(calibration: Calibration, model: ir.Model) -> tuple[str, ...]:
    """Values of the graph that want a range and have none, in the order of the graph."""
    return tuple(name for name in plan(model).ranged() if name not in calibration.ranges)


def _line(range_: TensorRange) -> str:
    # nine digits tell any two float32 apart
    numbers = {key: float(f"{getattr(range_, key):.9g}") for key in _NUMBERS}
    return json.dumps(
        {**numbers, "method": range_.method},
        allow_nan=False,
        ensure_ascii=False,
    )


def _count(tree: dict[str, Any], key: str) -> int:
    number = tree[key]
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{key} is {number!r}, which is no number of samples")
    return number


def _range(name: str, entry: dict[str, Any]) -> TensorRange:
    values = {key: entry[key] for key in _NUMBERS}
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= _LARGEST for v in values.values()):
        raise ValueError(f"the range of {name!r} holds something else than finite numbers of float32")
    found = TensorRange(**{key: float(value) for key, value in values.items()}, method=str(entry["method"]))
    if found.low > found.high or found.amax < 0 or found.minimum > found.maximum:
        raise ValueError(f"the range of {name!r} is empty: {entry}")
    return found


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
