"""How an image becomes a model's input: a frozen description, and the one function that carries it out.

The order is fixed: to RGB, resize, crop or pad with black, rescale, normalise, channel order, layout.
The arithmetic is that of transformers' PIL image processors (uint8 resize by Pillow; the rescale in
float64, rounded to float32; mean and std in float32), so the result is equal to theirs, bit for bit.

What happens to images that are not plain RGB:

* grayscale is repeated three times; 16-bit grayscale keeps its upper byte; palettes are looked up;
* transparency is laid over white, as transformers does: the colour of a transparent pixel is arbitrary;
* CMYK is converted by Pillow without a colour profile;
* an EXIF orientation is applied when a *file* is opened (``open_image``), never by ``preprocess``;
* of an animation the first frame is taken; 32-bit integer and float images have no defined range: DataError.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, get_args

import numpy as np

from toolchain.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

Layout = Literal["NCHW", "NHWC"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Crop = Literal["center", "center_round"]
ChannelOrder = Literal["RGB", "BGR"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, slots=True)
class ImagePreprocessing:
    """What is done to an image before the model sees it. Says everything; nothing is implied by a name.

    Attributes:
        size: (height, width) of the result, in pixels.
        layout: axes of the model's input; ``preprocess`` gives one image of it, without the N.
        resize: an int scales the shorter edge to it and keeps the aspect ratio (the longer edge is
            rounded down); (height, width) stretches; None leaves the image.
        interpolation: Pillow's filter of that name, antialiased.
        crop: ``center`` starts at floor((have - want) / 2), as transformers does; ``center_round``
            rounds that half to even, as torchvision does. They differ by a pixel where have - want
            is odd. A side that is too short is padded with black. None: the resize gives the size.
        rescale: factor on the 0..255 pixels; 1.0 leaves them.
        mean: one value a channel, subtracted after the rescale, in the order of ``channel_order``.
        std: one value a channel, divided by after that.
        channel_order: order of the channels in the result.

    Raises:
        DataError: the fields contradict each other.
    """

    size: tuple[int, int]
    layout: Layout = "NCHW"
    resize: int | tuple[int, int] | None = None
    interpolation: Interpolation = "bilinear"
    crop: Crop | None = None
    rescale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channel_order: ChannelOrder = "RGB"

    def __post_init__(self) -> None:
        _check_pair("size", self.size)
        if self.resize is not None and not _is_positive_int(self.resize):
            _check_pair("resize", self.resize)
        for name, value, kinds in (
            ("layout", self.layout, get_args(Layout)),
            ("interpolation", self.interpolation, get_args(Interpolation)),
            ("crop", self.crop, (*get_args(Crop), None)),
            ("channel_order", self.channel_order, get_args(ChannelOrder)),
        ):
            if value not in kinds:
                raise _bad(name, value, "one of " + ", ".join(str(kind) for kind in kinds))
        for name, triple in (("mean", self.mean), ("std", self.std)):
            if not (isinstance(triple, tuple) and len(triple) == 3 and all(_is_number(v) for v in triple)):
                raise _bad(name, triple, "three finite numbers, one a channel")
        if 0 in self.std:
            raise _bad("std", self.std, "no zero: it is divided by")
        if not _is_number(self.rescale) or self.rescale <= 0:
            raise _bad("rescale", self.rescale, "a positive number, such as 1/255")
        if self.crop is None and isinstance(self.resize, int):
            raise _bad("resize", self.resize, "(height, width) where there is no crop: sizes would vary")
        if self.crop is None and self.resize is not None and self.resize != self.size:
            raise _bad("resize", self.resize, f"{self.size}, the size, where there is no crop")

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; tuples become lists."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> ImagePreprocessing:
        """Reads what ``to_json`` wrote.

        Raises:
            DataError: a key is missing or unknown, or a value is not allowed.
        """
        if not isinstance(tree, Mapping):
            raise _bad("preprocessing", tree, "an object")
        names = [field.name for field in dataclasses.fields(cls)]
        if odd := sorted(set(tree) ^ set(names)):
            raise DataError(
                f"preprocessing has {'unknown' if odd[0] in tree else 'missing'} key {odd[0]!r}",
                hint="the keys are " + ", ".join(names),
            )
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in tree.items()}
        return cls(**fields)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_pair(name: str, value: object) -> None:
    if not (isinstance(value, tuple) and len(value) == 2 and all(_is_positive_int(v) for v in value)):
        raise _bad(name, value, "(height, width), two positive integers")


def _bad(name: str, value: object, wanted: str) -> DataError:
    return DataError(f"preprocessing: {name} is {value!r}", where=name, hint=f"wanted: {wanted}")


def missing_pillow(error: ImportError) -> DataError:
    """The error for a machine without Pillow."""
    return DataError(f"images need Pillow: {error}", hint="pip install 'onnx-toolchain[images]'")


def open_image(
    source: Path | BinaryIO, *, formats: tuple[str, ...] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Decodes an image file whole, upright (its EXIF orientation applied), in RGB.

    Args:
        source: the file, by its path or open.
        formats: those of Pillow's names that may be decoded, such as "JPEG"; None: all.
        max_pixels: width times height that may be decoded; None leaves it at what Pillow finds absurd.

    Raises:
        DataError: the file is not an image, is truncated, or claims absurd dimensions; Pillow is missing.
    """
    where = str(source) if isinstance(source, Path) else None
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise missing_pillow(error) from error
    try:
        with Image.open(source, formats=formats) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise DataError(
                    f"image refused: {image.width}x{image.height} pixels, more than {max_pixels}", hint="scale it down"
                )
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise DataError("not an image that Pillow knows", where=where, hint="remove or replace it") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"image refused: {error}", where=where, hint="scale it down") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        # Pillow's decoders raise any of these on damaged files (SyntaxError is its word for a broken PNG).
        raise DataError(f"unreadable image: {error}", where=where, hint="remove or replace it") from error
    except DataError as error:
        raise DataError(error.what, where=where, hint=error.hint) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB, as the module's docstring says. Raises DataError for modes without a range."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        upper = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(upper).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(
            f"an image of mode {image.mode} has no defined range of brightness",
            hint="save it with 8 or 16 bits a channel",
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def preprocess(image: Image.Image, spec: ImagePreprocessing) -> np.ndarray:
    """Turns one image into one row of the model's input.

    Args:
        image: any PIL image; its EXIF orientation is not looked at.
        spec: what to do.

    Returns:
        float32, [3, height, width] for NCHW, [height, width, 3] for NHWC.

    Raises:
        DataError: no defined range (see ``to_rgb``), or no resize and no crop and another size.
    """
    image = to_rgb(image)
    if spec.resize is not None:
        height, width = _resized(image.height, image.width, spec.resize)
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), resample=_filter(spec.interpolation))
    pixels = np.asarray(image)
    if spec.crop is not None:
        pixels = _crop(pixels, spec.size, spec.crop)
    if pixels.shape[:2] != spec.size:
        raise DataError(
            f"an image of {pixels.shape[0]}x{pixels.shape[1]} pixels, not {spec.size[0]}x{spec.size[1]}",
            hint="resize it, or give the preprocessing a resize",
        )
    if spec.channel_order == "BGR":
        pixels = pixels[..., ::-1]
    # A product in float64 rounded once to float32, then float32 throughout: what transformers computes.
    values: np.ndarray = (pixels.astype(np.float64) * spec.rescale).astype(np.float32)
    values = (values - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1) if spec.layout == "NCHW" else values)


def _resized(height: int, width: int, resize: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(resize, tuple):
        return resize
    if height < width:
        return resize, int(resize * width / height)
    return int(resize * height / width), resize


def _filter(interpolation: Interpolation) -> Image.Resampling:
    from PIL import Image

    return Image.Resampling[interpolation.upper()]


def _crop(pixels: np.ndarray, size: tuple[int, int], crop: Crop) -> np.ndarray:
    for axis, want in enumerate(size):
        have = pixels.shape[axis]
        start = _start(have - want, crop)
        if have < want:
            before = -start
            pad = [(0, 0)] * pixels.ndim
            pad[axis] = (before, want - have - before)
            pixels = np.pad(pixels, pad)
        else:
            pixels = pixels[(slice(None),) * axis + (slice(start, start + want),)]
    return pixels


def _start(surplus: int, crop: Crop) -> int:
    """Where the crop begins; negative where the image is short and begins inside the result."""
    if crop == "center":
        return surplus // 2
    return round(surplus / 2) if surplus >= 0 else -(-surplus // 2)


def from_transformers(config: Mapping[str, Any]) -> ImagePreprocessing | None:
    """Reads a model's ``preprocessor_config.json``, old spellings included.

    Returns:
        None where it asks for something that ``ImagePreprocessing`` has no word for (padding,
        a cap on the longer edge, an offset): better no preprocessing than a wrong one.
    """
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    if config.get("do_pad") or config.get("rescale_offset") or kind.startswith("EfficientNet"):
        return None
    filters = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers 0..5
    fields: dict[str, Any] = {}
    try:
        fields |= _geometry(config, kind)
        fields["interpolation"] = filters[int(config.get("resample", 2))]
        fields["rescale"] = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
        if config.get("do_normalize", True):
            fields["mean"] = tuple(config.get("image_mean") or (0.5,) * 3)
            fields["std"] = tuple(config.get("image_std") or (0.5,) * 3)
        return ImagePreprocessing(**fields)
    except (DataError, IndexError, KeyError, TypeError, ValueError):
        return None


def _geometry(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The fields size, resize and crop. Raises KeyError where the configuration has another way to say it."""
    size = config.get("size")
    if isinstance(size, int):
        size = {"height": size, "width": size} if kind.startswith("ViT") else {"shortest_edge": size}
    resize: Any = None
    if config.get("do_resize", True) and size is not None:
        if set(size) == {"shortest_edge"}:
            resize = int(size["shortest_edge"])
        elif set(size) == {"height", "width"}:
            resize = (int(size["height"]), int(size["width"]))
        else:
            raise KeyError(", ".join(size))
    if kind.startswith("ConvNext") and isinstance(resize, int):
        # These crop a share of the resized image below 384 pixels and stretch from there on.
        square = (resize, resize)
        if resize >= 384:
            return {"size": square, "resize": square}
        return {
            "size": square,
            "resize": int(resize / float(config.get("crop_pct") or 224 / 256)),
            "crop": "center",
        }
    crop_size = config.get("crop_size")
    if crop_size is not None and config.get("do_center_crop", True):
        if isinstance(crop_size, int):
            crop_size = {"height": crop_size, "width": crop_size}
        return {
            "size": (int(crop_size["height"]), int(crop_size["width"])),
            "resize": resize,
            "crop": "center",
        }
    return {"size": resize, "resize": resize}


def read_transformers(folder: Path) -> ImagePreprocessing | None:
    """``from_transformers`` of the file in a model's folder; None where it is absent or not JSON."""
    try:
        tree = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return from_transformers(tree) if isinstance(tree, dict) else None
