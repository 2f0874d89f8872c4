"""Classifies images with an artifact: python classify.py ARTIFACT IMAGE [IMAGE ...]"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import runtimes
from runtimes.package import read_package
from toolchain.preprocessing import ImagePreprocessing, open_image, preprocess


def main(artifact: str, *images: str) -> None:
    metadata = read_package(artifact).metadata
    for warning in metadata["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    recipe = ImagePreprocessing.from_json(metadata["preprocessing"])
    labels = metadata["labels"]
    with runtimes.load(artifact) as session:
        (name,) = (spec.name for spec in session.inputs)
        for image in images:
            pixels = preprocess(open_image(Path(image)), recipe)
            logits = session.run({name: pixels[np.newaxis]})["logits"][0].astype(np.float64)
            odds = np.exp(logits - logits.max())
            odds /= odds.sum()
            print(Path(image).name)
            for index in np.argsort(-odds)[:5]:
                print(f"  {100 * odds[index]:5.1f} %  {labels[index] if labels else f'class {index}'}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
