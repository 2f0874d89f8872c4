"""The names of ImageNet's 1,000 classes, for weights that come without them."""

from __future__ import annotations

from pathlib import Path


def class_names() -> tuple[str, ...]:
    """The classes of ILSVRC 2012 in the order of their synsets, each the lemmas of its synset in WordNet 3.0.

    Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", 2015. The lemmas are those that models
    with ``id2label`` carry, such as "tench, Tinca tinca".
    """
    text = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())
