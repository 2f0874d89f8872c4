"""Recipes as YAML: read with the line of every key, written, and the commented one of ``toolchain init``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import passes
from toolchain.errors import RecipeError
from toolchain.recipe import Recipe, from_dict
from toolchain.recipe_problems import Marks
from toolchain.storage import reported


def read(path: Path) -> Recipe:
    """Reads a YAML recipe.

    Raises:
        RecipeError: not readable, not YAML, or a key, type or value that is not allowed; with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe: {error}", where=str(path)) from error
    try:
        _refuse_aliases(text, str(path))
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        marks: Marks = {}
        _collect_marks(node, (), marks, str(path))
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "nested too deeply"
        raise RecipeError(f"not YAML: {problem}", where=f"{path}{line}") from error
    if not isinstance(tree, dict):
        raise RecipeError(
            "a recipe is a mapping of keys",
            where=str(path),
            hint="toolchain init resnet50 > recipe.yaml writes one",
        )
    return from_dict(tree, origin=str(path), marks=marks)


def _refuse_aliases(text: str, path: str) -> None:
    """An alias repeats a part of the document, and a few of them make it grow without bounds."""
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken):
            line = token.start_mark.line + 1
            raise RecipeError(f"alias *{token.value}: a recipe has none", where=f"{path}:{line}", hint="write it out")


def _collect_marks(node: yaml.Node | None, at: tuple[Any, ...], marks: Marks, path: str) -> None:
    """Notes the line of every key and item; a key that is written twice is an error, as YAML would keep the last."""
    if node is None:
        return
    marks.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, key.value)
            if here in marks:
                raise RecipeError(f"key {key.value!r} is written twice", where=f"{path}:{key.start_mark.line + 1}")
            marks[here] = key.start_mark.line + 1
            _collect_marks(value, here, marks, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _collect_marks(item, (*at, index), marks, path)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every key spelled out, for the artifact."""
    tree = recipe.model_dump()
    if recipe.passes != "default":
        tree["passes"] = [{s.name: s.options} if s.options else s.name for s in recipe.pipeline()]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def commented(model: str) -> str:
    """A recipe for ``toolchain init``: every key with its default and a word on what it does."""
    quoted = yaml.safe_dump(model, allow_unicode=True).removesuffix("\n").removesuffix("...").strip()
    pipeline = "\n".join(f"#   - {name}" for name in passes.DEFAULT_PIPELINE)
    return f"""\
# Build it with: toolchain build recipe.yaml
version: 1

# Where the model comes from: a zoo name, hf:ID, timm:NAME, torchvision:NAME, FILE.py:FACTORY, FILE.pt2 or FILE.onnx
model: {quoted}
# auto: pretrained where they can be had, else seeded random ones (and the report says so);
# random; or the path of a .safetensors, .pt or .pth file
weights: auto
seed: 0

# The artifact's name and folder; left out, they follow from the model
# name: my-model
# output: artifacts/my-model

# default is fp16 on TensorRT and fp32 elsewhere; fp32; int8, which needs data.calibration or
# quantize.calibration; int8-fp16: the same with the rest in 16 bits, for TensorRT;
# auto: both where int8 is faster and good enough;
# without calibration: int8-dynamic (activations quantised at run time, for transformers), int8-weights, fp16
precision: default
# One variant is built for each, and they are ranked by measured latency; `toolchain targets` lists them;
# [auto] takes every runtime that works here
targets: [ort-cpu]

# Sizes of symbolic dimensions where inputs are made up, such as {{sequence: 128}}
dims: {{}}

export:
  # The ONNX opset of a torch export, 18 to 25; null is the exporter's own choice
  opset: null

# "default", or a list: a name, or a name with options (`toolchain passes` lists both)
passes: default
# passes:
{pipeline}

data:
  # Labelled images (a folder a class), a .npz with `labels`, or FILE.py:FUNCTION; null measures no accuracy
  evaluation: null
  limit: null
  # Samples for INT8 calibration, spelled the same way; labels are not needed
  calibration: null
  calibration_limit: 512
  batch_size: 25
  # How images become the model's input: the name of a zoo model that is right, or a .json file; null: as the model's
  # source says, which a bare .onnx does not
  preprocessing: null

# Pruning, before calibration; null cuts nothing. Channels go, with all that depends on them, and every runtime is
# faster for it; recovered by least squares on data.calibration. One aim: ratio (0.3: three channels of ten),
# target_macs and target_latency (0.5: half is left), max_drop (the most that may be lost). method weights sets single
# weights to zero (ratio, pattern 2:4, masks), which makes files smaller and no dense runtime faster;
# low-rank replaces layers by two smaller ones (ratio). With exclude, importance, scope, round_to, min_channels, and
# blocks: whether the search may take out residual blocks as a whole. finetune: FILE.py:FUNCTION trains what was cut, in
# torch; with rounds, part by part
prune: null
# prune: {{method: channels, target_macs: 0.5}}

quantize:
  # A file from `toolchain calibrate` in place of data.calibration
  calibration: null
  # auto takes for each tensor the one with the least error of: minmax, moving-average, percentile, entropy, mse
  method: auto
  percentile: 99.99
  # Weights: balanced rounds so that the errors of a channel cancel; amax rounds to the nearest; mse clips the largest
  weights: balanced
  # Three tools for accuracy; auto tries each where max_drop is missed without, and keeps it if it helps.
  # Takes back what rounding shifts a layer's mean by: none, fast, sequential
  bias_correction: auto
  # Evens out channels between layers, for weights with one scale: none, on
  equalization: auto
  # Moves outliers of activations into weights, for transformers: none, on (the best for each), or how much, 0 to 1
  smooth_quant: auto
  # Nodes that stay in float, by name
  exclude: []
  # The most that may be lost, such as 0.005; the fewest layers are returned to float for it. null ships what comes out
  max_drop: null
  # What is lost: top1 (labels), agreement with float32, nmse of the outputs; auto is the first that the data allows
  metric: auto

verify:
  # Inputs on which the artifact is compared with the exported model
  samples: 2
  # Largest normalised mean squared error of any output; null is the bound of the precision
  max_nmse: null

benchmark:
  # Every batch size with every number of threads; 0 threads is the runtime's own choice
  batch_sizes: [1]
  threads: [0]
  warmup: 3
  # Runs until both are reached; a p90 needs 64 runs
  duration_s: 0.3
  count: 64

session:
  # What the artifact asks of the runtime; 0 threads inside an operator is the runtime's own choice
  intra_op_threads: 0
  inter_op_threads: 1
  graph_level: all
  arena: true
  spinning: true

# Options of single runtimes, over those of session, such as
#   tensorrt-rtx: {{optimization_level: 5}}
options: {{}}
"""


def write(recipe: Recipe, path: Path) -> None:
    """Writes ``dump(recipe)``. Raises StorageError."""
    with reported(path, "the recipe"):
        path.write_text(dump(recipe), encoding="utf-8")
