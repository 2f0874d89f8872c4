"""TensorRT's calibration caches, read and written without TensorRT.

TensorRT 11 has no calibrator any more, and caches written by older ones are of use to none of its tools. The format is
text: a header such as ``TRT-8601-EntropyCalibration2``, then ``name: hex`` for every tensor, the hex digits being a
big-endian float32, the scale of a symmetric quantiser: its largest absolute value over 127. A name may hold colons; the
last one counts. (``IInt8Calibrator::readCalibrationCache`` in TensorRT's documentation; the values as its samples read
them.)
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from passes._quant import Calibration, TensorRange
from toolchain.errors import CalibrationError
from toolchain.observation import Plan, graph_digest, plan
from toolchain.storage import write_text

_HEADER = re.compile(r"TRT-\d+-(?P<algorithm>EntropyCalibration2?|MinMaxCalibration|LegacyCalibration)")
#: what readers of the format expect; the number is that of a TensorRT that wrote such files
DEFAULT_HEADER = "TRT-8601-EntropyCalibration2"
_ENTRY = re.compile(r"(?P<name>.+): (?P<hex>[0-9a-fA-F]{8})")
#: methods of the algorithms that TensorRT had
_METHODS = {"EntropyCalibration": "entropy", "EntropyCalibration2": "entropy", "MinMaxCalibration": "minmax"}


@dataclasses.dataclass(frozen=True, slots=True)
class Imported:
    """What a cache gave for a graph.

    Attributes:
        calibration: ranges of those of its tensors that the graph has; samples is 0.
        unknown: names in the cache that the graph has not. TensorRT's own, such as ``(Unnamed Layer* 3)``, are usual.
        uncovered: values of the graph that want a range and have none.
    """

    calibration: Calibration
    unknown: tuple[str, ...]
    uncovered: tuple[str, ...]


def read_scales(path: Path) -> tuple[str, dict[str, float]]:
    """The header of a cache, and the scale of every tensor.

    Raises:
        CalibrationError: no such file, another header, a line that is cut short, a name twice, or a scale that is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read the TensorRT cache: {error}", where=str(path)) from error
    header, *lines = text.split("\n")
    header = header.strip()
    if not _HEADER.fullmatch(header):
        raise CalibrationError(
            f"not a TensorRT calibration cache: it begins with {header[:60]!r}",
            where=f"{path}:1",
            hint=f"wanted: a line such as {DEFAULT_HEADER}",
        )
    scales: dict[str, float] = {}
    for number, line in enumerate(lines, start=2):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        entry = _ENTRY.fullmatch(line)
        if entry is None:
            raise CalibrationError(
                f"not an entry: {line[:80]!r}",
                where=f"{path}:{number}",
                hint="the file may be cut short: wanted NAME: and eight hexadecimal digits",
            )
        name = entry["name"]
        (scale,) = struct.unpack(">f", bytes.fromhex(entry["hex"]))
        if name in scales:
            raise CalibrationError(f"tensor {name!r} stands there twice", where=f"{path}:{number}")
        if not math.isfinite(scale) or scale < 0:
            raise CalibrationError(f"the scale of {name!r} is {scale:g}", where=f"{path}:{number}")
        scales[name] = scale
    if not scales:
        raise CalibrationError("the TensorRT cache holds no tensor", where=str(path), hint="it may be cut short")
    return header, scales


def read_tensorrt_cache(path: Path, model: ir.Model) -> Imported:
    """Ranges for a graph from a cache: symmetric, so low and high are -amax and amax, as are minimum and maximum.

    A value that can only be positive after a Relu or a Clip gets low 0, and no more than the bound as high. Values that
    the cache does not name take their range from others as in ``toolchain/observation.py``.

    Raises:
        CalibrationError: see ``read_scales``; or no tensor of the cache is in the graph.
    """
    header, scales = read_scales(path)
    found = _HEADER.fullmatch(header)
    assert found is not None
    method = _METHODS.get(found["algorithm"], "percentile")
    values = {v.name for v in model.graph.inputs} | {v.name for node in model.graph for v in node.outputs}
    wanted = plan(model)
    ranges = {
        name: _symmetric(scale * 127, wanted.bounds.get(name), method)
        for name, scale in scales.items()
        if name in values
    }
    if not ranges:
        raise CalibrationError(
            "no tensor of the TensorRT cache is in this graph",
            where=str(path),
            hint=f"the cache names {', '.join(list(scales)[:3])}, the graph {', '.join(wanted.observed[:3])}",
        )
    _spread(ranges, wanted)
    return Imported(
        Calibration(graph_digest(model), 0, ranges),
        unknown=tuple(name for name in scales if name not in values),
        uncovered=tuple(name for name in wanted.ranged() if name not in ranges),
    )


def write_tensorrt_cache(calibration: Calibration, path: Path, *, header: str = DEFAULT_HEADER) -> None:
    """Writes every range's amax as a cache for TensorRT 8 to 10.

    Raises:
        CalibrationError: a name that the format cannot hold, or a header that is none.
        StorageError: the file cannot be written.
    """
    if not _HEADER.fullmatch(header):
        raise CalibrationError(f"not a header: {header!r}", hint=f"write one such as {DEFAULT_HEADER}")
    lines = [header]
    for name, range_ in calibration.ranges.items():
        if "\n" in name or "\r" in name:
            raise CalibrationError(f"a TensorRT cache cannot hold the name {name!r}", hint="rename that value")
        lines.append(f"{name}: {struct.pack('>f', range_.amax / 127).hex()}")
    write_text(path, "\n".join(lines) + "\n")


def _symmetric(amax: float, bounds: tuple[float, float] | None, method: str) -> TensorRange:
    least, most = bounds or (-math.inf, math.inf)
    low, high = max(-amax, least), min(amax, most)
    low, high = min(low, high), max(low, high)
    return TensorRange(low, high, amax, low, high, method)


def _spread(ranges: dict[str, TensorRange], wanted: Plan) -> None:
    """Gives ranges to those that share one: TensorRT names some of a chain of equals, not always ours."""
    groups: dict[str, list[str]] = {}
    for name, carrier in wanted.same.items():
        groups.setdefault(carrier, [carrier]).append(name)
    for members in groups.values():
        known: Mapping[str, TensorRange] = {name: ranges[name] for name in members if name in ranges}
        if known:
            for name in members:
                ranges.setdefault(name, next(iter(known.values())))
