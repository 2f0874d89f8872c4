"""The recipe: everything that a build is asked to do, typed and versioned, in YAML.

The command line builds the same object, or overrides single keys of one that was read. Unknown keys and
wrong types are refused with the line they stand on.
"""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

import passes
from runtimes import Error, InvalidInput, Target
from toolchain.errors import RecipeError
from toolchain.storage import reported

Precision = Literal["default", "fp32", "int8", "int8-fp16", "auto", "int8-dynamic", "int8-weights", "fp16"]

#: In place of targets: every runtime that works here.
AUTO = "auto"


class _Section(pydantic.BaseModel):
    # strict: "8" is not 8 and 1 is not true; frozen: a recipe is a value
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class PassStep(_Section):
    """One pass and its options. In YAML: ``fuse_conv_bn``, or ``simplify: {timeout: 60}``."""

    name: str
    options: dict[str, Any] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and len(value) == 1 and "name" not in value:
            ((name, options),) = value.items()
            return {"name": name, "options": {} if options is None else options}
        return value

    @pydantic.model_validator(mode="after")
    def _exists(self) -> PassStep:
        passes.make(self.name, **self.options)  # raises ValueError with the nearest names or the options
        return self


class Export(_Section):
    """How a torch model becomes ONNX."""

    opset: Annotated[int, pydantic.Field(ge=18, le=25)] | None = None


class Data(_Section):
    """Samples: labelled ones that accuracy is measured on, and those that INT8 ranges are measured on."""

    evaluation: str | None = None
    limit: Annotated[int, pydantic.Field(ge=1)] | None = None
    calibration: str | None = None
    calibration_limit: Annotated[int, pydantic.Field(ge=1)] | None = 512
    batch_size: Annotated[int, pydantic.Field(ge=1)] = 25


#: What prune's aims are, of which one is given.
AIMS = ("ratio", "target_macs", "target_latency", "max_drop", "pattern", "masks")
_Share = Annotated[float, pydantic.Field(gt=0, lt=1)]
#: By method: the aims that it has, what its ``importance`` and its ``scope`` may be, and which keys it does not take.
_PRUNING: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "channels": (
        ("ratio", "target_macs", "target_latency", "max_drop"),
        ("auto", "l1", "l2", "batch-norm", "activation", "random"),
        ("auto", "layer", "global"),
        (),
    ),
    "weights": (
        ("ratio", "pattern", "masks"),
        ("auto", "l1", "l2", "wanda", "random"),
        ("auto", "layer", "channel", "global"),
        ("round_to", "min_channels", "blocks"),
    ),
    "low-rank": (("ratio",), ("auto", "activation"), ("auto",), ("round_to", "min_channels", "blocks")),
}


class Prune(_Section):
    """What is cut from the graph before it is calibrated and lowered, and how far.

    ``ratio`` is how much goes: of each layer's channels, of the weights, of each layer's multiply-accumulates.
    """

    method: Literal["channels", "weights", "low-rank"] = "channels"
    ratio: _Share | None = None
    target_macs: _Share | None = None
    target_latency: _Share | None = None
    max_drop: Annotated[float, pydantic.Field(ge=0)] | None = None
    pattern: Annotated[str, pydantic.Field(pattern=r"^\d{1,3}:\d{1,3}$")] | None = None
    masks: str | None = None
    importance: Literal["auto", "l1", "l2", "batch-norm", "activation", "wanda", "random"] = "auto"
    scope: Literal["auto", "layer", "channel", "global"] = "auto"
    round_to: Annotated[int, pydantic.Field(ge=1)] | None = None
    min_channels: Annotated[int, pydantic.Field(ge=1)] = 1
    exclude: list[str] = []
    blocks: bool = True
    reconstruct: Literal["auto"] | bool = "auto"

    @pydantic.model_validator(mode="after")
    def _agrees(self) -> Prune:
        aims, importances, scopes, foreign = _PRUNING[self.method]
        given = [name for name in AIMS if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} exclude each other" if given else "how much is to be cut?"
            raise InvalidInput(said, hint=f"method {self.method} takes one of: {', '.join(aims)}")
        if given[0] not in aims:
            raise InvalidInput(f"method {self.method} knows no {given[0]}", hint=f"it takes one of: {', '.join(aims)}")
        for key, allowed in (("importance", importances), ("scope", scopes)):
            if getattr(self, key) not in allowed:
                raise InvalidInput(
                    f"method {self.method} knows no {key} {getattr(self, key)}", hint=f"wanted: {', '.join(allowed)}"
                )
        if self.method == "channels" and self.scope != "auto" and self.ratio is None:
            raise InvalidInput(
                f"{given[0]} is spread over the layers by what each loses: scope says nothing then",
                hint="leave scope out, or give ratio",
            )
        if self.method == "weights" and self.ratio is None and self.scope != "auto":
            raise InvalidInput(f"{given[0]} says by itself which weights compete", hint="leave scope out")
        if self.masks is not None and self.importance != "auto":
            raise InvalidInput("masks say by themselves which weights go", hint="leave importance out")
        defaults = type(self).model_fields
        for key in foreign:
            if getattr(self, key) != defaults[key].default:
                raise InvalidInput(f"method {self.method} knows no {key}", hint="leave it out")
        if self.reconstruct is True and self.method == "low-rank":
            raise InvalidInput("low-rank is not reconstructed: with data it keeps what matters to the outputs")
        return self

    @property
    def aim(self) -> tuple[str, float | str]:
        """The one aim that is given, and its value."""
        return next((name, value) for name in AIMS if (value := getattr(self, name)) is not None)


class Quantize(_Section):
    """How INT8 is reached, and what it may cost."""

    calibration: str | None = None
    method: Literal["auto", "minmax", "moving-average", "percentile", "entropy", "mse"] = "auto"
    percentile: Annotated[float, pydantic.Field(gt=50, le=100)] = 99.99
    weights: Literal["balanced", "amax", "mse"] = "balanced"
    bias_correction: Literal["none", "fast", "sequential", "auto"] = "auto"
    equalization: Literal["none", "on", "auto"] = "auto"
    smooth_quant: Literal["none", "on", "auto"] | Annotated[float, pydantic.Field(ge=0, le=1)] = "auto"
    exclude: list[str] = []
    max_drop: Annotated[float, pydantic.Field(ge=0)] | None = None
    metric: Literal["auto", "top1", "agreement", "nmse"] = "auto"

    @pydantic.field_validator("bias_correction", "equalization", "smooth_quant", mode="before")
    @classmethod
    def _unquoted(cls, value: Any) -> Any:
        # YAML reads on and off as true and false
        return ("on" if value else "none") if isinstance(value, bool) else value


class Verify(_Section):
    """How far the artifact may be from the exported model."""

    samples: Annotated[int, pydantic.Field(ge=1)] = 2
    max_nmse: Annotated[float, pydantic.Field(ge=0)] | None = None


class Benchmark(_Section):
    """How long and at what sizes the artifact is measured."""

    batch_sizes: Annotated[list[Annotated[int, pydantic.Field(ge=1)]], pydantic.Field(min_length=1)] = [1]
    threads: Annotated[list[Annotated[int, pydantic.Field(ge=0)]], pydantic.Field(min_length=1)] = [0]
    warmup: Annotated[int, pydantic.Field(ge=0)] = 3
    duration_s: Annotated[float, pydantic.Field(ge=0)] = 0.3
    count: Annotated[int, pydantic.Field(ge=1)] = 64


class SessionConfig(_Section):
    """What the artifact asks of the runtime when it is loaded; the loader may override it."""

    intra_op_threads: Annotated[int, pydantic.Field(ge=0)] = 0
    inter_op_threads: Annotated[int, pydantic.Field(ge=1)] = 1
    graph_level: Literal["disabled", "basic", "extended", "layout", "all"] = "all"
    arena: bool = True
    spinning: bool = True


class Recipe(_Section):
    """A whole build. ``model`` is the only key that has no default."""

    version: Literal[1] = 1
    model: Annotated[str, pydantic.Field(min_length=1)]
    weights: Annotated[str, pydantic.Field(min_length=1)] = "auto"
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**32)] = 0
    name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    output: str | None = None
    precision: Precision = "default"
    targets: Annotated[list[str], pydantic.Field(min_length=1)] = ["ort-cpu"]
    dims: dict[str, Annotated[int, pydantic.Field(ge=1)]] = {}
    export: Export = Export()
    passes: Literal["default"] | list[PassStep] = "default"
    data: Data = Data()
    prune: Prune | None = None
    quantize: Quantize = Quantize()
    verify: Verify = Verify()
    benchmark: Benchmark = Benchmark()
    session: SessionConfig = SessionConfig()
    options: dict[str, dict[str, Any]] = {}

    @pydantic.field_validator("export", "data", "quantize", "verify", "benchmark", "session", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value  # `verify:` with nothing below it

    @pydantic.field_validator("targets")
    @classmethod
    def _targets_parse(cls, value: list[str]) -> list[str]:
        for text in value:
            Target.parse(text)  # an InvalidInput is a ValueError: pydantic reports it at this key
        if AUTO in value and len(value) > 1:
            raise ValueError("auto stands alone: it is every runtime that works here")
        if len(set(value)) != len(value):
            raise ValueError("a target is listed twice")
        for text in value:
            devices = (Target.parse(text).device or "").split(",")
            if len(set(devices)) != len(devices):
                raise ValueError(f"{text} names a device twice")
        return value

    @pydantic.model_validator(mode="after")
    def _pruning_has_data(self) -> Recipe:
        prune, data = self.prune, self.data
        if prune is None:
            return self
        needs = [
            f"{key} {value}"
            for key, value in (("importance", prune.importance), ("reconstruct", prune.reconstruct))
            if value in ("activation", "wanda", True)
        ]
        if needs and data.calibration is None:
            raise InvalidInput(f"prune: {needs[0]} needs samples", hint="set data.calibration (--data)")
        if self.quantize.calibration is not None:
            raise InvalidInput(
                "quantize.calibration holds the ranges of a graph that was not pruned",
                hint="set data.calibration: the pruned graph is calibrated on it",
            )
        if prune.max_drop is not None and data.calibration is None and data.evaluation is None:
            raise InvalidInput(
                "prune: max_drop needs samples to judge on",
                hint="set data.evaluation or data.calibration (--eval-data, --data)",
            )
        return self

    def pipeline(self) -> tuple[PassStep, ...]:
        """The passes in order, with ``default`` spelled out."""
        if self.passes == "default":
            return tuple(PassStep(name=name) for name in passes.DEFAULT_PIPELINE)
        return tuple(self.passes)

    def portable(self) -> Recipe:
        """The recipe as others may read it: of every file only its name, not where it lay on this machine."""
        return self.model_copy(
            update={
                "model": _without_folder(self.model),
                "weights": _without_folder(self.weights),
                "output": None,
                "data": self.data.model_copy(
                    update={
                        "evaluation": _without_folder(self.data.evaluation),
                        "calibration": _without_folder(self.data.calibration),
                    }
                ),
                "prune": self.prune and self.prune.model_copy(update={"masks": _without_folder(self.prune.masks)}),
                "quantize": self.quantize.model_copy(
                    update={"calibration": _without_folder(self.quantize.calibration)}
                ),
            }
        )

    def override(self, **changes: Any) -> Recipe:
        """The recipe with keys replaced; ``section__key`` reaches into a section, None leaves a key alone.

        Raises:
            RecipeError: a value is not allowed; the message says where.
        """
        tree = self.model_dump()
        for path, value in changes.items():
            if value is None:
                continue
            *sections, key = path.split("__")
            place = tree
            for section in sections:
                place = place[section]
            place[key] = value
        return from_dict(tree, origin="command line")


def _without_folder(text: str | None) -> Any:
    if text is None or text.startswith(("hf:", "timm:", "torchvision:")):
        return text
    return text.rstrip("/").rsplit("/", 1)[-1]


def from_dict(tree: Any, *, origin: str, marks: dict[tuple[Any, ...], int] | None = None) -> Recipe:
    """Checks a tree of plain values. ``marks`` gives the line of each key. Raises RecipeError."""
    try:
        return Recipe.model_validate(tree)
    except pydantic.ValidationError as error:
        raise _explain(error, origin, marks or {}) from error


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
        marks: dict[tuple[Any, ...], int] = {}
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


def _collect_marks(node: yaml.Node | None, at: tuple[Any, ...], marks: dict[tuple[Any, ...], int], path: str) -> None:
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


def _explain(error: pydantic.ValidationError, origin: str, marks: dict[tuple[Any, ...], int]) -> RecipeError:
    """The first problem, as one error with file, line, key and what is allowed there."""
    # A key of one of several forms has a problem for each: the deepest is of the form that was meant.
    problems = sorted(error.errors(), key=lambda problem: -len(_place(problem)))
    problem = problems[0]
    place = _place(problem)
    key = ".".join(str(part) for part in place) or "recipe"
    line = marks.get(place) or marks.get(place[:-1])
    where = f"{origin}:{line}, key {key}" if line else f"{origin}, key {key}"
    if problem["type"] == "extra_forbidden":
        allowed = sorted(_section_at(place[:-1]).model_fields)
        close = difflib.get_close_matches(str(place[-1]), allowed, n=1)
        hint = (f"did you mean {close[0]}? " if close else "") + "allowed here: " + ", ".join(allowed)
        return RecipeError(f"unknown key {str(place[-1])!r}", where=where, hint=hint)
    if problem["type"] == "missing":
        return RecipeError(f"key {str(place[-1])!r} is missing", where=where)
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, (Error, passes.PassFailed)):
        what = cause.what if isinstance(cause, Error) else str(cause)
        return RecipeError(what, where=where, hint=cause.hint)
    same = [p["msg"] for p in problems if _place(p) == place]
    if all(message.startswith("Input should be ") for message in same):
        wanted = " or ".join(message.removeprefix("Input should be ") for message in same)
        return RecipeError(f"{problem['input']!r} is not allowed here: it should be {wanted}", where=where)
    return RecipeError(problem["msg"].removeprefix("Value error, "), where=where)


def _place(problem: Any) -> tuple[Any, ...]:
    """The keys that lead to it, without what pydantic adds to name the form of a key that has several."""
    return tuple(p for p in problem["loc"] if isinstance(p, int) or not p.startswith(("list[", "literal[")))


def _section_at(place: tuple[Any, ...]) -> type[pydantic.BaseModel]:
    section: type[pydantic.BaseModel] = Recipe
    for part in place:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        kinds = typing.get_args(field.annotation) or (field.annotation,) if field is not None else ()
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)]
        if models:  # `prune` is a section or nothing
            section = models[0]
        elif isinstance(part, int):
            section = PassStep
    return section


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

# Pruning, before calibration; null cuts nothing. Channels go, with all that depends on them, and every runtime is
# faster for it; recovered by least squares on data.calibration. One aim: ratio (0.3: three channels of ten),
# target_macs and target_latency (0.5: half is left), max_drop (the most that may be lost). method weights sets single
# weights to zero (ratio, pattern 2:4, masks), which makes files smaller and no dense runtime faster;
# low-rank replaces layers by two smaller ones (ratio). With exclude, importance, scope, round_to, min_channels, and
# blocks: whether the search may take out residual blocks as a whole
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
