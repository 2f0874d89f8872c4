"""What prune_channels finds in networks of timm and torchvision that it was not written for.

    python benchmarks/pruning_zoo.py [--models timm:densenet121 torchvision:googlenet] [--ratio 0.3] [--json o.json]

Each network is built with random weights, exported by this toolchain's own line, optimised by the default passes, cut,
and compared with the whole graph with the weights masked that read what was cut. Columns are those of
``pruning_graphs.py``. Parameters that a network starts with as
zeros or ones (scales of residual branches, normalisations) get noise, or the comparison would be of nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pruning_graphs import concluded, line, measure, optimised

import runtimes
from passes.base import PassFailed
from toolchain.export import export
from toolchain.models import TorchModel, load_torch, resolve

if TYPE_CHECKING:
    import torch

#: one or two of each family, small ones
MODELS = """
    timm:botnet26t_256 timm:convnext_atto timm:convnextv2_atto timm:cspdarknet53 timm:densenet121 timm:dla34
    timm:dpn48b timm:edgenext_xx_small timm:efficientnet_b0 timm:ese_vovnet19b_dw timm:fastvit_t8 timm:ghostnet_050
    timm:hgnetv2_b0 timm:hrnet_w18_small timm:inception_next_atto timm:mixnet_s timm:mobilenetv2_050
    timm:mobilenetv3_small_050 timm:mobilenetv4_conv_small_050 timm:mobilevit_xxs timm:nf_regnet_b0
    timm:poolformer_s12 timm:regnety_002 timm:repvit_m0_9 timm:res2net50_26w_4s timm:resnest14d timm:seresnet18
    timm:skresnet18 timm:starnet_s050 timm:vgg11_bn timm:vit_tiny_patch16_224 timm:xcit_nano_12_p16_224
    torchvision:googlenet torchvision:shufflenet_v2_x0_5 torchvision:squeezenet1_1
""".split()


def randomised(module: torch.nn.Module) -> None:
    """Gives parameters that are all one number, and statistics of normalisations, numbers that differ."""
    import torch

    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=drawn) + 0.5)
            elif name.endswith("running_mean"):
                value.copy_(torch.randn(value.shape, generator=drawn) * 0.1)
            elif value.is_floating_point() and float(value.max() - value.min()) < 1e-4:
                value.add_(torch.randn(value.shape, generator=drawn) * 0.2)


def built(name: str, pixels: int | None) -> TorchModel:
    """The network, with images of this size in place of its own. Raises SourceError."""
    model = load_torch(resolve(name), weights="random")
    randomised(model.module)
    if pixels is None:
        return model
    examples = {key: value[..., :pixels, :pixels].contiguous() for key, value in model.example_inputs.items()}
    return dataclasses.replace(model, example_inputs=examples)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--pixels", type=int, help="height and width of images; default: the network's own")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'network':<40}nodes  analysis groups heads kept parameters    error    moved")
    for name in options.models:
        try:
            model = export(built(name, options.pixels)).model
            row = measure(optimised(model), options.ratio, {})
        except (runtimes.Error, PassFailed) as error:
            print(f"{name:<40}{error}", flush=True)
            rows.append({"network": name, "failed": str(error)})
            continue
        rows.append({"network": name, **row})
        print(f"{name:<40}{line(row)}", flush=True)
    return concluded("pruning_zoo", options.ratio, rows, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
