"""The recipe: everything that a build is asked to do, typed and versioned.

It is read from YAML (``recipe_file.py``), or built by the command line, which also overrides single keys of one that
was read. Unknown keys and wrong types are refused with the line they stand on.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

import passes
from runtimes import InvalidInput, Target
from toolchain.recipe_problems import Marks, explained

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
    preprocessing: Annotated[str, pydantic.Field(min_length=1)] | None = None


#: What prune's aims are, of which one is given.
AIMS = ("ratio", "target_macs", "target_latency", "max_drop", "pattern", "masks")
_Share = Annotated[float, pydantic.Field(gt=0, lt=1)]
#: By method: the aims that it has, what its ``importance`` and its ``scope`` may be, and which keys it does not take.
_PRUNING: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "channels": (
        ("ratio", "target_macs", "target_latency", "max_drop"),
        ("auto", "l1", "l2", "batch-norm", "activation", "taylor", "random"),
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
    importance: Literal["auto", "l1", "l2", "batch-norm", "activation", "taylor", "wanda", "random"] = "auto"
    scope: Literal["auto", "layer", "channel", "global"] = "auto"
    round_to: Annotated[int, pydantic.Field(ge=1)] | None = None
    min_channels: Annotated[int, pydantic.Field(ge=1)] = 1
    exclude: list[str] = []
    blocks: bool = True
    reconstruct: Literal["auto"] | bool = "auto"
    finetune: Annotated[str, pydantic.Field(min_length=1)] | None = None
    rounds: Annotated[int, pydantic.Field(ge=1, le=100)] = 1

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
        if self.rounds > 1:
            self._rounds_agree(given[0])
        return self

    def _rounds_agree(self, aim: str) -> None:
        if self.finetune is None:
            raise InvalidInput(
                f"rounds {self.rounds} trains after each cut, and there is no training loop",
                hint="set finetune (--finetune FILE.py:FUNCTION), or leave rounds out",
            )
        if self.method == "low-rank" or aim not in ("ratio", "target_macs"):
            what = "method low-rank" if self.method == "low-rank" else aim
            raise InvalidInput(
                f"rounds go from nothing to a ratio or to target_macs, which {what} does not",
                hint="leave rounds out: training follows the one cut then",
            )

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
            if value in ("activation", "taylor", "wanda", True)
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
                        "preprocessing": _without_folder(self.data.preprocessing),
                    }
                ),
                "prune": self.prune
                and self.prune.model_copy(
                    update={
                        "masks": _without_folder(self.prune.masks),
                        "finetune": _without_folder(self.prune.finetune),
                    }
                ),
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


def from_dict(tree: Any, *, origin: str, marks: Marks | None = None) -> Recipe:
    """Checks a tree of plain values. ``marks`` gives the lines, where they come from a file. Raises RecipeError."""
    try:
        return Recipe.model_validate(tree)
    except pydantic.ValidationError as error:
        raise explained(error, Recipe, origin, marks or {}) from error
