"""TensorRT calibration caches: read, written, and every way in which one is broken."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from toolchain_support import conv_net

from passes._quant import Calibration, TensorRange
from toolchain.calibration import calibrate
from toolchain.errors import CalibrationError
from toolchain.tensorrt_cache import read_scales, read_tensorrt_cache, write_tensorrt_cache

#: as TensorRT 8.6 wrote it for a small network: 1/127, 6/127 ...
CACHE = """TRT-8601-EntropyCalibration2
image: 3c010a14
relu: 3d418f1e
(Unnamed Layer* 3) [Constant]_output: 3c010a14
tower: left:0: 3f800000
"""


@pytest.fixture(scope="module")
def net() -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(conv_net()))


def written(folder: Path, text: str) -> Path:
    path = folder / "net.cache"
    path.write_bytes(text.encode())
    return path


def test_scales_are_big_endian_floats_and_names_may_hold_colons(tmp_path: Path) -> None:
    header, scales = read_scales(written(tmp_path, CACHE))
    assert header == "TRT-8601-EntropyCalibration2"
    assert scales["image"] == pytest.approx(1 / 127, rel=1e-3)
    assert scales["relu"] == pytest.approx(6 / 127, rel=1e-3)
    assert scales["tower: left:0"] == 1.0
    assert read_scales(written(tmp_path, CACHE.replace("\n", "\r\n")))[1] == scales


def test_ranges_are_symmetric_but_for_what_an_activation_stops(net: ir.Model, tmp_path: Path) -> None:
    imported = read_tensorrt_cache(written(tmp_path, CACHE), net)
    ranges = imported.calibration.ranges
    image, relu = ranges["image"], ranges["relu"]
    assert image.low == -image.high == -image.amax
    assert image.amax == pytest.approx(1.0, rel=1e-3)
    assert (relu.low, relu.high) == (0, relu.amax)
    assert relu.amax == pytest.approx(6.0, rel=1e-3)
    assert ranges["bn"] == relu  # only the Relu reads it
    assert image.method == "entropy"
    assert imported.unknown == ("(Unnamed Layer* 3) [Constant]_output", "tower: left:0")
    assert set(imported.uncovered) == {"pool", "flat", "logits"}
    assert imported.calibration.samples == 0


def test_what_was_written_is_read_back(net: ir.Model, tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32)
    found = calibrate(net, [{"image": data}], method="entropy")
    path = tmp_path / "net.cache"
    write_tensorrt_cache(found, path)
    imported = read_tensorrt_cache(path, net)
    assert imported.unknown == imported.uncovered == ()
    assert imported.calibration.graph == found.graph
    for name, range_ in found.ranges.items():
        assert imported.calibration.ranges[name].amax == pytest.approx(range_.amax, rel=1e-6)
    lines = path.read_text().splitlines()
    assert lines[0] == "TRT-8601-EntropyCalibration2"
    assert all(re.fullmatch(r".+: [0-9a-f]{8}", line) for line in lines[1:])


@pytest.mark.parametrize(
    "header", ["TRT-7000-MinMaxCalibration", "TRT-100300-EntropyCalibration", "TRT-5102-LegacyCalibration"]
)
def test_other_algorithms_are_read(net: ir.Model, tmp_path: Path, header: str) -> None:
    text = CACHE.replace("TRT-8601-EntropyCalibration2", header)
    method = read_tensorrt_cache(written(tmp_path, text), net).calibration.ranges["image"].method
    assert method == {"MinMax": "minmax", "Entropy": "entropy", "Legacy": "percentile"}[header.split("-")[2][:-11]]


def entry(scale: float) -> str:
    return struct.pack(">f", scale).hex()


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("", "not a TensorRT calibration cache", 1),
        ("image: 3c010a14\n", "not a TensorRT calibration cache", 1),
        ("TRT-8601-EntropyCalibration3\nimage: 3c010a14\n", "not a TensorRT calibration cache", 1),
        ("TRT-8601-EntropyCalibration2\n", "holds no tensor", None),
        (CACHE[: CACHE.index("418f1e")], "not an entry: 'relu: 3d'", 3),
        (CACHE[: CACHE.index("lu: 3d")], "not an entry: 're'", 3),
        (CACHE + "image: 3c010a14\n", "'image' stands there twice", 6),
        (CACHE + "x: 3c010a1g\n", "not an entry", 6),
        (CACHE + "x: 3c010a140\n", "not an entry", 6),
        (CACHE + f"x: {entry(math.nan)}\n", "the scale of 'x' is nan", 6),
        (CACHE + f"x: {entry(math.inf)}\n", "the scale of 'x' is inf", 6),
        (CACHE + f"x: {entry(-1.0)}\n", "the scale of 'x' is -1", 6),
    ],
)
def test_a_damaged_cache_is_refused_with_its_line(tmp_path: Path, text: str, message: str, line: int | None) -> None:
    path = written(tmp_path, text)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_scales(path)
    assert caught.value.where == (str(path) if line is None else f"{path}:{line}")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.cache"
    path.write_bytes(b"TRT-8601-EntropyCalibration2\n\xff\xfe: 3c010a14\n")
    with pytest.raises(CalibrationError, match="cannot read the TensorRT cache"):
        read_scales(path)


def test_a_cache_of_another_model_is_refused(net: ir.Model, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no tensor of the TensorRT cache is in this graph") as caught:
        read_tensorrt_cache(written(tmp_path, "TRT-8601-EntropyCalibration2\nother: 3c010a14\n"), net)
    assert "other" in str(caught.value.hint)
    assert "image" in str(caught.value.hint)


def test_names_and_headers_that_the_format_cannot_hold_are_refused(tmp_path: Path) -> None:
    range_ = TensorRange(low=0.0, high=1.0, amax=1.0, minimum=0.0, maximum=1.0, method="minmax")
    with pytest.raises(CalibrationError, match="cannot hold the name"):
        write_tensorrt_cache(Calibration("", 1, {"a\nb": range_}), tmp_path / "x")
    with pytest.raises(CalibrationError, match="not a header"):
        write_tensorrt_cache(Calibration("", 1, {"a": range_}), tmp_path / "x", header="cache")
    assert not list(tmp_path.iterdir())
