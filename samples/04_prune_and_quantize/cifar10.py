"""CIFAR-10 for the recipe: images as the network takes them, from the folder of real data in $ASSETS."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

BATCH = 50
MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1)
STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)


def calibration() -> Iterator[dict[str, np.ndarray]]:
    """Training images, without labels."""
    images = read("train_0_999_calibration.png")
    for start in range(0, len(images), BATCH):
        yield {"input": images[start : start + BATCH]}


def evaluation() -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Test images, and their classes."""
    images = read("test_0_4999.png")
    labels = np.array(json.loads((folder() / "test_0_4999_labels.json").read_text()))
    for start in range(0, len(images), BATCH):
        yield {"input": images[start : start + BATCH]}, labels[start : start + BATCH]


def read(name: str) -> np.ndarray:
    """Each row of the PNG is one image: float32 [images, 3, 32, 32]."""
    with Image.open(folder() / name) as rows:
        pixels = np.asarray(rows.convert("RGB")).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
    return (pixels.astype(np.float32) / 255 - MEAN) / STD


def folder() -> Path:
    """Where the images are."""
    return Path(os.environ["ASSETS"]) / "cifar10"
