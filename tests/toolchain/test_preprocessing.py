"""Preprocessing against transformers' own image processors, image for image, and its odd inputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from toolchain.errors import DataError
from toolchain.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImagePreprocessing,
    from_transformers,
    open_image,
    preprocess,
    to_rgb,
)
from toolchain.zoo import ZOO

Image = pytest.importorskip("PIL.Image")

# What the three makers' preprocessor_config.json on the hub say.
CONFIGS = {
    "resnet50": {
        "image_processor_type": "ConvNextImageProcessor",
        "crop_pct": 0.875,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "resample": 3,
        "size": {"shortest_edge": 224},
    },
    "vit_b_16": {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "size": {"height": 224, "width": 224},
    },
    "mobilenet_v2": {
        "image_processor_type": "MobileNetV2ImageProcessor",
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 256},
    },
}


def _processor(name: str, **changes: object) -> object:
    pytest.importorskip("transformers")
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
    from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    kinds = {
        "resnet50": ConvNextImageProcessorPil,
        "vit_b_16": ViTImageProcessorPil,
        "mobilenet_v2": MobileNetV2ImageProcessorPil,
    }
    config = {k: v for k, v in CONFIGS[name].items() if k != "image_processor_type"} | changes
    return kinds[name](**config)


def _image(height: int, width: int) -> Image.Image:
    """Noise over a gradient: every pixel matters, and the resize has edges to ring at."""
    generator = np.random.default_rng(height * 10_000 + width)
    ramp = np.linspace(0, 200, height * width * 3).reshape(height, width, 3)
    return Image.fromarray((ramp + generator.integers(0, 56, ramp.shape)).astype(np.uint8))


SIZES = [(300, 400), (400, 300), (224, 224), (256, 511), (257, 256), (33, 47), (1000, 260), (500, 375)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_is_equal_to_transformers_bit_for_bit(name: str, size: tuple[int, int]) -> None:
    image = _image(*size)
    theirs = _processor(name)(image, return_tensors="np")["pixel_values"][0]  # type: ignore[operator]
    spec = ZOO[name].preprocessing
    assert spec is not None
    ours = preprocess(image, spec)
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_is_equal_to_transformers_on_photographs(name: str, assets: Path) -> None:
    spec = ZOO[name].preprocessing
    processor = _processor(name)
    assert spec is not None
    for path in sorted((assets / "imagenet" / "calibration50").glob("*.JPEG"))[::6]:
        image = open_image(path)
        theirs = processor(image, return_tensors="np")["pixel_values"][0]  # type: ignore[operator]
        np.testing.assert_array_equal(preprocess(image, spec), theirs, err_msg=path.name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("resnet50", {}),
        ("resnet50", {"size": {"shortest_edge": 384}}),
        ("resnet50", {"size": {"shortest_edge": 288}, "crop_pct": 0.95}),
        ("vit_b_16", {}),
        ("vit_b_16", {"size": {"height": 96, "width": 160}, "resample": 3, "do_normalize": False}),
        ("mobilenet_v2", {}),
        # smaller than the crop on both sides: padded with black, an odd pixel more on one side
        ("mobilenet_v2", {"size": {"shortest_edge": 101}, "crop_size": {"height": 224, "width": 223}}),
        ("mobilenet_v2", {"do_rescale": False, "image_mean": [127.0] * 3, "image_std": [128.0] * 3}),
    ],
)
def test_a_preprocessor_config_is_read_as_transformers_reads_it(name: str, changes: dict[str, object]) -> None:
    spec = from_transformers(CONFIGS[name] | changes)
    assert spec is not None
    image = _image(301, 420)
    theirs = _processor(name, **changes)(image, return_tensors="np")["pixel_values"][0]  # type: ignore[operator]
    np.testing.assert_array_equal(preprocess(image, spec), theirs)


def test_the_zoo_says_what_the_makers_say() -> None:
    for name, config in CONFIGS.items():
        assert from_transformers(config) == ZOO[name].preprocessing
    old_spelling = {**CONFIGS["resnet50"], "size": 224, "feature_extractor_type": "ConvNextFeatureExtractor"}
    del old_spelling["image_processor_type"]
    assert from_transformers(old_spelling) == ZOO["resnet18"].preprocessing


@pytest.mark.parametrize(
    "config",
    [
        {"do_pad": True, "size": {"height": 4, "width": 4}},
        {"size": {"shortest_edge": 800, "longest_edge": 1333}},
        {"size": {"shortest_edge": 224}},  # no crop: sizes vary
        {"image_processor_type": "EfficientNetImageProcessor", "size": {"height": 4, "width": 4}},
        {"size": {"height": 4, "width": 4}, "resample": 17},
        {"size": "large"},
        {},
    ],
)
def test_what_cannot_be_said_is_not_guessed(config: dict[str, object]) -> None:
    assert from_transformers(config) is None


def test_efficientnet_lite_recipe_by_hand() -> None:
    image = _image(300, 451)
    spec = ZOO["efficientnet_lite0"].preprocessing
    assert spec is not None
    resized = np.asarray(image.resize((int(256 * 451 / 300), 256), Image.Resampling.BICUBIC), np.float32)
    left = round((resized.shape[1] - 224) / 2)
    wanted = (resized[16:240, left : left + 224] - 127) / 128
    np.testing.assert_array_equal(preprocess(image, spec), wanted.transpose(2, 0, 1))


@pytest.mark.parametrize(("crop", "start"), [("center", 1), ("center_round", 2)])
def test_the_two_centre_crops_differ_by_a_pixel(crop: str, start: int) -> None:
    # 7 - 4 = 3 surplus: floor(1.5) is 1, round(1.5) is 2.
    pixels = np.arange(7 * 7 * 3, dtype=np.uint8).reshape(7, 7, 3)
    spec = ImagePreprocessing(size=(4, 4), crop=crop, rescale=1.0)  # type: ignore[arg-type]
    wanted = pixels[start : start + 4, start : start + 4].transpose(2, 0, 1)
    np.testing.assert_array_equal(preprocess(Image.fromarray(pixels), spec), wanted)


def test_layout_and_channel_order() -> None:
    pixels = np.array([[[10, 20, 30]]], np.uint8)
    spec = ImagePreprocessing(size=(1, 1), rescale=1.0, mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0))
    image = Image.fromarray(pixels)
    assert preprocess(image, spec)[:, 0, 0].tolist() == [9, 9, 6.75]
    bgr = dataclasses.replace(spec, channel_order="BGR", layout="NHWC")
    assert preprocess(image, bgr)[0, 0].tolist() == [29, 9, 1.75]  # mean and std in the result's order


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_other_modes_become_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.array([[0, 0x12FF, 0xFFFF]], np.uint16))
        assert np.asarray(to_rgb(image)).tolist() == [[[0] * 3, [0x12] * 3, [255] * 3]]
        return
    source = _image(20, 30)
    if mode in ("RGBA", "LA"):
        source.putalpha(Image.fromarray(np.tile(np.arange(30, dtype=np.uint8) * 8, (20, 1))))
    image = source.convert(mode)
    transformers = pytest.importorskip("transformers.image_transforms")
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), transformers.convert_to_rgb(image, return_numpy=True))


def test_transparent_means_white() -> None:
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert np.asarray(to_rgb(image)).min() == 255
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = 0
    assert np.asarray(to_rgb(palette)).min() == 255


def test_a_file_is_turned_upright_and_an_image_is_not(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    image.save(tmp_path / "x.png", exif=exif)
    assert open_image(tmp_path / "x.png").size == (1, 2)
    with Image.open(tmp_path / "x.png") as raw:
        assert to_rgb(raw).size == (2, 1)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated.jpg", "truncated.png", "absent", "float"])
def test_an_unreadable_image_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / f"picture_{damage}"
    if damage == "text":
        path.write_text("this is not an image")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage.startswith("truncated"):
        _image(64, 64).save(path)
        path.write_bytes(path.read_bytes()[:-400])
    elif damage == "float":
        path = path.with_suffix(".tiff")
        Image.fromarray(np.zeros((4, 4), np.float32)).save(path)
    with pytest.raises(DataError) as caught:
        open_image(path)
    assert path.name in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"size": (0, 4)},
        {"size": [4, 4, 4]},
        {"layout": "NHCW"},
        {"resize": 5},  # without a crop
        {"resize": (5, 5)},  # not the size, without a crop
        {"resize": True, "crop": "center"},
        {"interpolation": "cubic"},
        {"crop": "centre"},
        {"rescale": 0},
        {"rescale": float("nan")},
        {"mean": (0.5, 0.5)},
        {"std": (1.0, 0.0, 1.0)},
        {"channel_order": "GBR"},
    ],
)
def test_contradictions_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(DataError) as caught:
        ImagePreprocessing(**({"size": (4, 4)} | change))  # type: ignore[arg-type]
    assert caught.value.where == next(iter(change))


def test_json_there_and_back_and_nothing_else() -> None:
    for entry in ZOO.values():
        if entry.preprocessing is not None:
            assert ImagePreprocessing.from_json(entry.preprocessing.to_json()) == entry.preprocessing
    tree = ImagePreprocessing(size=(4, 4)).to_json()
    with pytest.raises(DataError, match="unknown key 'sigma'"):
        ImagePreprocessing.from_json({**tree, "sigma": 1})
    del tree["std"]
    with pytest.raises(DataError, match="missing key 'std'"):
        ImagePreprocessing.from_json(tree)


def test_a_size_that_nothing_makes_right_is_an_error() -> None:
    with pytest.raises(DataError, match="5x6 pixels, not 4x4"):
        preprocess(_image(5, 6), ImagePreprocessing(size=(4, 4)))
