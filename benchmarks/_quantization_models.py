"""The models of ``quantization.py``: the float graph, its samples on the disk, and how well answers agree.

Everyone starts from the same file, the graph that the toolchain optimised, and reads the same batches.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from toolchain import models
from toolchain.data import open_dataset
from toolchain.evaluate import Feeds, input_specs
from toolchain.export import Exported, export_source
from toolchain.onnx_file import write_onnx
from toolchain.optimize import optimize
from toolchain.recipe import Recipe

#: samples for latency; the largest batch that is measured
LATENCY_SAMPLES = 8
#: how many samples the memory of a calibration is compared at
MEMORY_SAMPLES = (64, 512)
#: one in so many sentence pairs is for calibration, and is not scored
_HELD_OUT = 12
_SENTENCE_TOKENS = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A model that is measured.

    Attributes:
        name: as ``--models`` takes it.
        source: as the toolchain takes it; a path starts in the folder of assets.
        samples: makes the files below ``calibration``, ``even``, ``evaluation`` and ``truth.npz``.
        scored: whether its answers mean anything.
        transformer: whether it reads sentences, so that dynamic quantisation is an option and shapes vary.
        bounds: what is asked of ours, besides what is asked of every model; see ``_quantization_tables.py``.
    """

    name: str
    source: str
    samples: Callable[[Exported, Path, Path, bool], None]
    scored: bool = True
    transformer: bool = False
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)


def prepare(case: Case, assets: Path, folder: Path, *, quick: bool) -> None:
    """Writes into ``folder``: ``fp32.onnx``, the samples, ``latency.npz`` and a folder for each size of
    ``MEMORY_SAMPLES``. A folder of samples has one .npz a batch.

    Raises:
        runtimes.Error: the model cannot be had, or a sample does not fit.
        OSError: the assets are not there.
    """
    text = case.source.replace("$ASSETS", str(assets))
    exported = export_source(models.resolve(text))
    optimize(exported.model, Recipe(model=text).pipeline())
    write_onnx(exported.model, folder / "fp32.onnx")
    case.samples(exported, assets, folder, quick)
    batches = [*_read(folder / "even")]
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    _save(folder / "latency.npz", {name: array[:LATENCY_SAMPLES] for name, array in whole.items()})
    count, step = len(next(iter(whole.values()))), len(next(iter(batches[0].values())))
    for wanted in MEMORY_SAMPLES:
        order = np.arange(wanted) % count  # where there are fewer, samples come again
        parts = (order[i : i + step] for i in range(0, wanted, step))
        _write(folder / f"memory{wanted}", ({n: a[rows] for n, a in whole.items()} for rows in parts))


def _read(folder: Path) -> Iterator[Feeds]:
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            yield {name: file[name] for name in file.files}


def _write(folder: Path, batches: Iterable[Mapping[str, np.ndarray]]) -> None:
    folder.mkdir(exist_ok=True)
    for number, batch in enumerate(batches):
        _save(folder / f"{number:05}.npz", batch)


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # no array has the name of an option


def _split(name: str, array: np.ndarray, size: int) -> Iterator[Feeds]:
    for start in range(0, len(array), size):
        yield {name: np.ascontiguousarray(array[start : start + size])}


def _calibration(folder: Path, name: str, array: np.ndarray, size: int) -> None:
    """All samples, and beside them those that fill a batch: some tools want all batches alike."""
    _write(folder / "calibration", _split(name, array, size))
    _write(folder / "even", _split(name, array[: len(array) // size * size], size))


def _cifar(exported: Exported, assets: Path, folder: Path, quick: bool) -> None:
    from PIL import Image

    def images(file: str) -> np.ndarray:
        with Image.open(assets / "cifar10" / file) as image:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
        mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32).reshape(2, 3, 1, 1)
        scaled: np.ndarray = (pixels.astype(np.float32) / 255 - mean) / std
        return scaled

    name = input_specs(exported.model)[0].name
    tests = images("test_0_4999.png")[: 1000 if quick else None]
    _calibration(folder, name, images("train_0_999_calibration.png")[: 64 if quick else 256], 10)
    _write(folder / "evaluation", _split(name, tests, 100))
    labels = json.loads((assets / "cifar10" / "test_0_4999_labels.json").read_text())[: len(tests)]
    np.savez(folder / "truth.npz", labels=np.array(labels))


def _imagenet(exported: Exported, assets: Path, folder: Path, quick: bool) -> None:
    inputs = input_specs(exported.model)

    def batches(of: str, limit: int | None) -> list[tuple[np.ndarray, np.ndarray | None]]:
        dataset = open_dataset(
            str(assets / "imagenet" / of),
            inputs=inputs,
            preprocessing=exported.preprocessing,
            label_offset=exported.label_offset,
            batch_size=10,
            limit=limit,
        )
        return [(batch.inputs[inputs[0].name], batch.labels) for batch in dataset]

    samples = np.concatenate([array for array, _ in batches("calibration50", 20 if quick else None)])
    _calibration(folder, inputs[0].name, samples, 8)
    evaluation = batches("val250", 50 if quick else None)
    _write(folder / "evaluation", ({inputs[0].name: array} for array, _ in evaluation))
    np.savez(folder / "truth.npz", labels=np.concatenate([labels for _, labels in evaluation if labels is not None]))


def _sentences(exported: Exported, assets: Path, folder: Path, quick: bool) -> None:
    """STS-B dev. Every twelfth pair is for calibration; the others are scored, in batches of like length."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(assets / "models" / "minilm-l6-v2-fp16" / "tokenizer.json"))
    tokenizer.enable_truncation(_SENTENCE_TOKENS)
    names = [spec.name for spec in input_specs(exported.model)]

    def feeds(sentences: list[str], length: int | None = None) -> Feeds:
        tokenizer.enable_padding(length=length)
        found = tokenizer.encode_batch(sentences)
        columns = {
            "input_ids": [e.ids for e in found],
            "attention_mask": [e.attention_mask for e in found],
            "token_type_ids": [e.type_ids for e in found],
        }
        return {name: np.array(columns[name], np.int64) for name in names}

    lines = (assets / "text" / "stsb" / "sts-dev.csv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    held = rows[::_HELD_OUT][: 16 if quick else None]
    pairs = [row for i, row in enumerate(rows) if i % _HELD_OUT][: 200 if quick else None]
    sentences = [text for row in held for text in row[5:7]]
    _write(folder / "calibration", (feeds(sentences[i : i + 8]) for i in range(0, len(sentences), 8)))
    longest = feeds(sentences)[names[0]].shape[1]
    full = len(sentences) // 8 * 8
    _write(folder / "even", (feeds(sentences[i : i + 8], longest) for i in range(0, full, 8)))
    texts = [row[5] for row in pairs] + [row[6] for row in pairs]
    order = np.argsort([len(text) for text in texts], kind="stable")
    _write(folder / "evaluation", (feeds([texts[j] for j in order[i : i + 50]]) for i in range(0, len(order), 50)))
    np.savez(folder / "truth.npz", scores=np.array([float(row[4]) for row in pairs]), order=order)


def score(folder: Path, reference: Path, candidate: Path) -> dict[str, float]:
    """How good a file's answers are, and how near to the float model's.

    Args:
        folder: of the model, as ``prepare`` left it.
        reference, candidate: first outputs, an array a batch.

    Returns:
        Percentages ``top1`` and ``agreement``; or, of sentences, ``spearman`` in points (hundredths) against the
        people who scored the pairs, the mean ``cosine`` to the float embedding and the least one.
    """
    with np.load(folder / "truth.npz") as file:
        truth = {name: file[name] for name in file.files}
    with np.load(reference) as a, np.load(candidate) as b:
        theirs, mine = ([file[name] for name in file.files] for file in (a, b))
    if "labels" in truth:
        classes, same = np.concatenate(mine).argmax(1), np.concatenate(theirs).argmax(1)
        return {
            "top1": 100 * float((classes == truth["labels"]).mean()),
            "agreement": 100 * float((classes == same).mean()),
        }
    embedded = [_embedded(folder, states, truth["order"]) for states in (mine, theirs)]
    cosine = (embedded[0] * embedded[1]).sum(1)
    first, second = np.split(embedded[0], 2)
    return {
        "spearman": 100 * spearman((first * second).sum(1), truth["scores"]),
        "cosine": float(cosine.mean()),
        "least_cosine": float(cosine.min()),
    }


def _embedded(folder: Path, states: list[np.ndarray], order: np.ndarray) -> np.ndarray:
    """Mean over the tokens of each sentence, of length one, in the order before the sorting: [sentences, width]."""
    pooled = []
    for feeds, state in zip(_read(folder / "evaluation"), states, strict=True):
        mask = feeds["attention_mask"][..., None]
        mean = (state * mask).sum(1) / mask.sum(1)
        pooled.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    result = np.empty((len(order), pooled[0].shape[1]), np.float32)
    result[order] = np.concatenate(pooled)
    return result


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case("resnet20", "$ASSETS/models/cifar10-resnets/cifar_resnet20.onnx", _cifar, bounds={"drop": 0.1}),
        Case("resnet56", "$ASSETS/models/cifar10-resnets/cifar_resnet56.onnx", _cifar, bounds={"drop": 0.1}),
        Case("efficientnet_lite0", "efficientnet_lite0", _imagenet, bounds={"drop": 0.4, "agreement": 95}),
        Case("resnet50", "resnet50", _imagenet, scored=False, bounds={"latency": 0.33}),
        Case(
            "minilm",
            "hf:$ASSETS/models/minilm-l6-v2-fp16",
            _sentences,
            transformer=True,
            bounds={"drop": 0.5, "cosine": 0.99},
        ),
    )
}
