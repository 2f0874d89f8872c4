"""EfficientNet-Lite0 on real ImageNet images: the artifact's answers against PyTorch's, image for image.

    python benchmarks/accuracy.py --artifact artifacts/efficientnet_lite0 --images ../shared/assets/imagenet/val250

PyTorch runs the module that the artifact was exported from, on the same preprocessed images.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

import runtimes
from runtimes.package import read_package
from toolchain import models
from toolchain.data import open_dataset
from toolchain.preprocessing import ImagePreprocessing


def main() -> int:
    assets = Path(os.environ.get("ASSETS", "../shared/assets"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--artifact", default="artifacts/efficientnet_lite0")
    parser.add_argument("--images", default=str(assets / "imagenet" / "val250"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    package = read_package(options.artifact)
    preprocessing = ImagePreprocessing.from_json(package.metadata["preprocessing"])
    module = models.load_torch(models.resolve(options.model)).module
    right = {"pytorch": 0, "artifact": 0}
    same = count = 0
    worst = 0.0
    with runtimes.load(options.artifact) as session, torch.inference_mode():
        dataset = open_dataset(options.images, inputs=session.inputs, preprocessing=preprocessing, batch_size=25)
        for batch in dataset:
            assert batch.labels is not None, "the images need labels"
            ours = session.run(batch.inputs)["logits"]
            theirs = module(torch.from_numpy(batch.inputs["pixel_values"])).numpy()
            worst = max(worst, float(np.abs(ours - theirs).max()))
            same += int((ours.argmax(1) == theirs.argmax(1)).sum())
            right["pytorch"] += int((theirs.argmax(1) == batch.labels).sum())
            right["artifact"] += int((ours.argmax(1) == batch.labels).sum())
            count += len(batch.labels)
    print(f"{options.model} on {count} images of {Path(options.images).name}")
    print(f"top-1 PyTorch {100 * right['pytorch'] / count:.2f} %, artifact {100 * right['artifact'] / count:.2f} %")
    print(f"same class on {same} of {count} images; largest difference of a logit {worst:.2g}")
    result = {"benchmark": "accuracy", "model": options.model, "images": count, "same": same, **right}
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result))
    return 0 if same == count else 1


if __name__ == "__main__":
    sys.exit(main())
