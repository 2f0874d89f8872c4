"""Half the multiply-accumulates of CIFAR ResNet-56: the cut, reconstruction, fine-tuning, beside Torch-Pruning.

    python benchmarks/pruning.py [--assets FOLDER] [--steps N] [--seeds 0 1] [--only ours peer] [--json o.json]
    python benchmarks/pruning.py --cut inside          # ours as the peer cuts: half of the channels inside all blocks
    python benchmarks/pruning.py --only peer --ratio 0.7    # the peer as small as it has to be to be as fast as ours
    python benchmarks/pruning.py --measure 20

Ours: half of the channels inside the blocks of the second and third stage, and the five blocks of the first that change
the logits least; then ``toolchain/reconstruct.py`` on the 1,000 training images; then fine-tuning, with
BatchNormalization put back behind the convolutions meanwhile (``toolchain/batch_norm.py``). The peer is
Torch-Pruning's MagnitudePruner (L2) on the same network in torch with the same weights, half of the channels inside all
blocks: it cannot take out blocks, nor cut the residual streams behind shortcuts of padding. Both get the same loop:
distillation from the dense network's logits (Hinton et al. 2015, arXiv 1503.02531), images shifted, mirrored and mixed.

The budget is a number of steps, the same for both: as many as fit into ten minutes of two cores on the slower side.
What a step takes is measured once, with ``--measure SECONDS``, on a machine with nothing else to do; so the comparison
does not depend on what else a machine does. Learning rate and weight decay are chosen for each side by the same search:
short runs on 800 of the training images, judged by the distance to the dense network's answers on the other 200. No
test image is looked at before the end. Needs torch, and torch-pruning for the peer.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import passes
import runtimes
from passes._channel_blocks import find_blocks
from passes._channel_cut import masked
from passes._channel_groups import find_groups
from passes.prune_channels import PruneChannels, cut_of, prepared_copy
from toolchain.batch_norm import fold_back, with_batch_norm
from toolchain.evaluate import run_reference
from toolchain.metrics import tensor_error
from toolchain.model_cost import cost_of
from toolchain.onnx_file import temporary_onnx
from toolchain.reconstruct import reconstruct
from toolchain.torch_module import to_torch, write_back

Row = dict[str, Any]

BATCH, TEMPERATURE = 64, 4.0
#: what the search chooses from; images that it judges on; its steps over those of the run
RATES, DECAYS = (2e-4, 5e-4, 1e-3, 2e-3), (1e-4, 1e-2)
HELD, SHARE = 200, 0.05
#: see ``--measure``
STEPS = 3360
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(folder: Path, name: str) -> np.ndarray:
    """Images of a file, [N, 3, 32, 32], as the network takes them."""
    from PIL import Image

    rows = np.asarray(Image.open(folder / name).convert("RGB")).reshape(-1, 32, 32, 3)
    return np.ascontiguousarray(((rows / 255 - MEAN) / DEVIATION).transpose(0, 3, 1, 2), dtype=np.float32)


def augmented(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shifted by up to four pixels, mirrored, and every second one mixed with another: no label is needed."""
    n = len(x)
    padded = F.pad(x, (4, 4, 4, 4), mode="reflect")
    down, right = torch.randint(0, 9, (2, n), generator=generator)
    span = torch.arange(32)
    rows, columns = (down[:, None] + span)[:, None, :, None], (right[:, None] + span)[:, None, None, :]
    y = padded[torch.arange(n)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]
    mirrored, share, mixed = (torch.rand(n, generator=generator)[:, None, None, None] for _ in range(3))
    y = torch.where(mirrored < 0.5, y.flip(-1), y)
    y = torch.where(mixed < 0.5, share * y + (1 - share) * y[torch.randperm(n, generator=generator)], y)
    return y.contiguous(memory_format=torch.channels_last)


def distil(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    data: torch.Tensor,
    *,
    steps: int,
    rate: float,
    decay: float,
    seed: int,
    seconds: float = math.inf,
) -> int:
    """The one loop for both. Returns how many steps were taken: ``steps``, or fewer where ``seconds`` were over."""
    generator = torch.Generator().manual_seed(seed)
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=decay)
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / (0.03 * steps))
            group["lr"] = rate * warm * (1 + math.cos(math.pi * step / steps)) / 2
        x = augmented(data[torch.randint(0, len(data), (BATCH,), generator=generator)], generator)
        with torch.no_grad():
            wanted = F.softmax(teacher(x) / TEMPERATURE, dim=1)
        optimizer.zero_grad()
        distance(student(x), wanted).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        if time.perf_counter() - started > seconds:
            return step + 1
    student.eval()
    return steps


def distance(scores: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """What is trained and judged by: the divergence of two answers, softened, in nats times T squared (scalar)."""
    found = F.log_softmax(scores / TEMPERATURE, dim=1)
    return F.kl_div(found, wanted, reduction="batchmean") * TEMPERATURE**2


def chosen_rate(student: torch.nn.Module, teacher: torch.nn.Module, data: torch.Tensor, steps: int) -> Row:
    """Learning rate and weight decay of one side: what comes nearest to the teacher on images not trained on. First the
    rate with the usual decay, then the decay."""
    part, held = data[:-HELD], data[-HELD:]
    with torch.no_grad():
        wanted = F.softmax(teacher(held) / TEMPERATURE, dim=1)
    tried: dict[tuple[float, float], float] = {}

    def told(rate: float, decay: float) -> float:
        if (rate, decay) not in tried:
            copy_ = copy.deepcopy(student)
            distil(copy_, teacher, part, steps=steps, rate=rate, decay=decay, seed=0)
            with torch.no_grad():
                tried[rate, decay] = float(distance(copy_(held), wanted))
            print(f"              rate {rate:g}, decay {decay:g}: {tried[rate, decay]:.4f}", flush=True)
        return tried[rate, decay]

    rate = min(RATES, key=lambda each: told(each, DECAYS[0]))
    decay = min(DECAYS, key=lambda each: told(rate, each))
    return {"rate": rate, "decay": decay, "tried": [[*key, value] for key, value in tried.items()]}


def top1(scores: Callable[[np.ndarray], np.ndarray], x: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose class is found."""
    found = np.concatenate([scores(x[i : i + 250]).argmax(axis=1) for i in range(0, len(x), 250)])
    return float((found == labels).mean())


def on_ort(model: ir.Model) -> Callable[[np.ndarray], np.ndarray]:
    """The logits of a graph on ONNX Runtime."""
    with temporary_onnx(model) as path:
        session = runtimes.load(path, target="ort-cpu")
    (name,) = (spec.name for spec in session.outputs)
    return lambda x: session.run({"input": x})[name]


def in_torch(module: torch.nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """The logits of a module."""

    def run(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = module(torch.from_numpy(x)).numpy()
        return found

    return run


def latency_ratio(model: ir.Model, dense: ir.Model, x: np.ndarray, *, turns: int = 400) -> tuple[float, float]:
    """Time of one image over that of the dense graph, turn by turn: of the quickest runs, and of the quartiles."""
    sides = (on_ort(model), on_ort(dense))
    times: list[list[float]] = [[], []]
    for _ in range(turns):
        for side, run in enumerate(sides):
            started = time.perf_counter()
            run(x)
            times[side].append(time.perf_counter() - started)
    return min(times[0]) / min(times[1]), float(np.quantile(times[0], 0.25) / np.quantile(times[1], 0.25))


def least_blocks(dense: ir.Model, x: np.ndarray, count: int) -> tuple[str, ...]:
    """The blocks of the first stage without which the logits change least, each alone."""
    wanted = on_ort(dense)(x)
    harm = {}
    for block in find_blocks(dense)[:9]:
        model = prepared_copy(dense)
        PruneChannels(ratio=0.0, blocks=(block.name,))(model)
        harm[block.name] = float(np.square(on_ort(model)(x) - wanted).mean())
    return tuple(sorted(harm, key=lambda name: harm[name])[:count])


def ours(dense: ir.Model, data: np.ndarray, cut: str) -> ir.Model:
    """Cut at half the MACs, not recovered: ``fast`` as the module says, or ``inside`` all blocks, as the peer cuts."""
    fast = cut == "fast"
    kept = [g.name for g in find_groups(dense) if len(g.layers) > 1 or (fast and g.count == 16)]
    model = prepared_copy(dense)
    blocks = least_blocks(dense, data[:500], 5) if fast else ()
    PruneChannels(ratio=0.5, importance="l2", exclude=tuple(kept), blocks=blocks)(model)
    return model


class _Shortcut(torch.nn.Module):
    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class _Block(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(outputs)
        self.conv2 = torch.nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(outputs)
        self.shortcut = _Shortcut(outputs // 4) if stride != 1 else torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet56(torch.nn.Module):
    """He et al. 2015, section 4.2, shortcut A."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16)
        inputs = 16
        for stage, outputs in enumerate((16, 32, 64), start=1):
            strides = (1 if stage == 1 else 2, *[1] * 8)
            blocks = [_Block(inputs if i == 0 else outputs, outputs, stride) for i, stride in enumerate(strides)]
            setattr(self, f"layer{stage}", torch.nn.Sequential(*blocks))
            inputs = outputs
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def peer(weights: Path, ratio: float) -> tuple[torch.nn.Module, float]:
    """Torch-Pruning's network, not recovered, and its share of the MACs."""
    import torch_pruning

    network = ResNet56().eval()
    state = torch.load(weights, weights_only=True, map_location="cpu")["state_dict"]
    network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    example = torch.randn(1, 3, 32, 32)
    before, _ = torch_pruning.utils.count_ops_and_params(network, example)
    whole = [m for n, m in network.named_modules() if n in ("conv1", "linear") or n.endswith("conv2")]
    torch_pruning.pruner.MagnitudePruner(
        network,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=whole,
    ).step()
    after, _ = torch_pruning.utils.count_ops_and_params(network, example)
    return network, after / before


def on_ort_from_torch(network: torch.nn.Module) -> ir.Model:
    """The graph of a network, optimised as ours is: for its latency."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peer.onnx"
        batch = ({0: torch.export.Dim("batch", min=1)},)
        torch.onnx.export(
            network, (torch.randn(2, 3, 32, 32),), path, dynamo=True, input_names=["input"], dynamic_shapes=batch,
            external_data=False, verbose=False,
        )  # fmt: skip
        model = ir.load(path)
    for name in passes.DEFAULT_PIPELINE:
        passes.make(name)(model)
    return model


def cut_ours(dense: ir.Model, data: np.ndarray, test: np.ndarray, cut: str) -> tuple[ir.Model, Row]:
    """Ours, not recovered, with the proof of the cut, what it saves, and latency over that of the dense graph."""
    model = ours(dense, data, cut)
    twin = run_reference(masked(prepared_copy(dense), cut_of(model)), [{"input": test[:50]}])
    (expected,), (found,) = twin[0].values(), run_reference(model, [{"input": test[:50]}])[0].values()
    costs = cost_of(model), cost_of(dense)
    quick, quartile = latency_ratio(model, dense, test[:1])
    return model, {
        "macs": costs[0].macs / costs[1].macs,
        "parameters": costs[0].parameters / costs[1].parameters,
        "masked_error": tensor_error(expected, found).nmse,
        "latency": quick,
        "latency_quartile": quartile,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(__file__).resolve().parent.parent.parent / "shared/assets")
    parser.add_argument("--steps", type=int, default=STEPS, help="of fine-tuning, for both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, help="do not search: this learning rate")
    parser.add_argument("--decay", type=float, default=DECAYS[0], help="with --rate")
    parser.add_argument("--cut", choices=("fast", "inside"), default="fast", help="of ours")
    parser.add_argument("--ratio", type=float, default=0.5, help="of the peer")
    parser.add_argument("--measure", type=float, help="only how many steps of each side fit into ten minutes")
    parser.add_argument("--only", nargs="*", choices=("ours", "peer"), default=["ours", "peer"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pixels, resnets = options.assets / "cifar10", options.assets / "models" / "cifar10-resnets"
    test, data = images(pixels, "test_0_4999.png"), images(pixels, "train_0_999_calibration.png")
    labels = np.array(json.loads((pixels / "test_0_4999_labels.json").read_text()))
    dense = ir.load(resnets / "cifar_resnet56.onnx")
    for name in passes.DEFAULT_PIPELINE:
        passes.make(name)(dense)
    teacher, pixels_ = to_torch(dense), torch.from_numpy(data)
    rows: list[Row] = []

    def told(side: str, what: str, accuracy: float, **more: Any) -> None:
        rows.append({"side": side, "what": what, "top1": accuracy, **more})
        print(f"{side:<14}{what:<34}{100 * accuracy:6.2f} %  {more or ''}", flush=True)

    def measured(module: torch.nn.Module) -> None:
        steps = distil(module, teacher, pixels_, steps=10**6, rate=1e-6, decay=0.0, seed=0, seconds=options.measure)
        print(f"{600 * steps / options.measure:.0f} steps of {BATCH} images in ten minutes", flush=True)

    def trained(side: str, make: Callable[[], torch.nn.Module], done: Callable[[torch.nn.Module], float]) -> None:
        """Searches once, and trains for each seed."""
        if options.rate is None:
            found = chosen_rate(make(), teacher, pixels_, max(int(SHARE * options.steps), 1))
        else:
            found = {"rate": options.rate, "decay": options.decay}
        for seed in options.seeds:
            module = make()
            chosen = {key: found[key] for key in ("rate", "decay")}
            distil(module, teacher, pixels_, steps=options.steps, seed=seed, **chosen)
            told(side, f"{options.steps} steps, seed {seed}", done(module), seed=seed, **found)

    if options.measure is not None:
        measured(to_torch(with_batch_norm(ours(dense, data, options.cut), [{"input": data[:100]}])))
        measured(peer(resnets / "resnet56-4bfd9763.th", options.ratio)[0])
        return 0
    told("dense", "as it came", top1(on_ort(dense), test, labels))
    if "ours" in options.only:
        model, saved = cut_ours(dense, data, test, options.cut)
        told("ours", "cut alone", top1(on_ort(model), test, labels), **saved)
        started = time.process_time()
        batches = [{"input": data[i : i + 100]} for i in range(0, len(data), 100)]
        reconstruct(dense, model, batches)
        told("ours", "reconstructed", top1(on_ort(model), test, labels), seconds=time.process_time() - started)

        normalized = with_batch_norm(model, batches)

        def as_graph(module: torch.nn.Module) -> float:
            tuned, found = model.clone(), normalized.clone()
            write_back(module, found)  # type: ignore[arg-type]
            fold_back(found, tuned)
            return top1(on_ort(tuned), test, labels)

        if options.steps:
            trained("ours", lambda: to_torch(normalized), as_graph)
    if "peer" in options.only:
        network, share = peer(resnets / "resnet56-4bfd9763.th", options.ratio)
        quick, quartile = latency_ratio(on_ort_from_torch(network), dense, test[:1])
        saved = {"macs": share, "latency": quick, "latency_quartile": quartile}
        told("torch-pruning", "cut alone", top1(in_torch(network), test, labels), **saved)
        if options.steps:
            trained(
                "torch-pruning",
                lambda: copy.deepcopy(network),
                lambda module: top1(in_torch(module), test, labels),
            )
    text = json.dumps({"benchmark": "pruning", "steps": options.steps, "rows": rows})
    if options.json is not None:
        options.json.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
