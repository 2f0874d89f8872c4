"""Graph passes: each takes an ``onnx_ir.Model``, changes it in place, and says what it did.

To add one: a file with one frozen dataclass on ``passes.base.Pass``, a line in ``PASSES`` below, a line in
``DEFAULT_PIPELINE`` if every model should have it, and a test file of the same name.

Measured on ONNX Runtime 1.31 (CPU time of one thread, interleaved medians) and left out because it gave
nothing: ReduceMean over the spatial axes as GlobalAveragePool (0.99 to 1.01 on ResNet-50,
EfficientNet-Lite0 and MobileNetV2), the Reshape, Transpose, Reshape by which torch transposes the keys
of attention as one Transpose (1.00 on ViT), and the MatMuls of queries, keys and values as one with a Split (MiniLM,
one and eight sentences: 0.99 and 1.02 in float32, 0.99 and 1.05 in INT8; with one Transpose for the three 0.99 and
1.03, 0.99 and 1.03).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passes.base import Declined, InvalidOption, Outcome, Pass, PassFailed, UnknownPass

__all__ = [
    "DEFAULT_PIPELINE",
    "PASSES",
    "Declined",
    "InvalidOption",
    "Option",
    "Outcome",
    "Pass",
    "PassFailed",
    "UnknownPass",
    "make",
    "options",
    "summary",
]


class _Passes(Mapping[str, "type[Pass]"]):
    """Name of a pass and of its module to its class, which is imported when it is asked for: who only wants
    ``passes._quant`` is spared onnx_ir and the sympy that comes with it, 45 MB and a third of a second."""

    def __init__(self, classes: dict[str, str]) -> None:
        self._classes = classes

    def __getitem__(self, name: str) -> type[Pass]:
        class_name = self._classes[name]
        found: type[Pass] = getattr(importlib.import_module(f"passes.{name}"), class_name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)

    def __contains__(self, name: object) -> bool:
        return name in self._classes


#: every pass, by the name that recipes and the command line use
PASSES: Mapping[str, type[Pass]] = _Passes(
    {
        "convert_float16": "ConvertFloat16",
        "correct_bias": "CorrectBias",
        "eliminate_dead_code": "EliminateDeadCode",
        "eliminate_noops": "EliminateNoops",
        "equalize_layers": "EqualizeLayers",
        "factorize_low_rank": "FactorizeLowRank",
        "fold_constants": "FoldConstants",
        "freeze_initializers": "FreezeInitializers",
        "fuse_conv_bn": "FuseConvBn",
        "fuse_hard_sigmoid": "FuseHardSigmoid",
        "fuse_pad": "FusePad",
        "prune_channels": "PruneChannels",
        "prune_weights": "PruneWeights",
        "quantize_dynamic": "QuantizeDynamic",
        "quantize_int8": "QuantizeInt8",
        "quantize_weights": "QuantizeWeights",
        "shield_layer_norm": "ShieldLayerNorm",
        "simplify": "Simplify",
        "smooth_quant": "SmoothQuant",
        "strip_metadata": "StripMetadata",
        "unpack_sequences": "UnpackSequences",
    }
)

DEFAULT_PIPELINE: tuple[str, ...] = (
    "strip_metadata",  # first: what comes after has less to carry
    "freeze_initializers",  # before anything that looks for constants
    "fold_constants",  # gives the biases, pads, Clip bounds and targets that the rest must read
    "unpack_sequences",  # no pass follows a tensor through a sequence
    "eliminate_noops",  # brings BatchNormalization and Pad next to the layer that they fuse with
    "fuse_conv_bn",
    "fuse_hard_sigmoid",
    "fuse_pad",
    "eliminate_dead_code",  # what folding and fusing left behind must not start simplify's child process
    "simplify",
    "fold_constants",  # what simplify found, followed to its end
    "eliminate_noops",
    "eliminate_dead_code",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """An option of a pass.

    Attributes:
        name: the keyword.
        type: its type, as Python writes it.
        default: the value without it.
        doc: what it does, one sentence.
    """

    name: str
    type: str
    default: Any
    doc: str


def make(name: str, /, **given: Any) -> Pass:
    """Makes a pass from its name and options.

    Raises:
        UnknownPass: there is no such pass; the message names the nearest.
        InvalidOption: the pass has no such option, or the value is not of its type.
    """
    from passes.base import InvalidOption, UnknownPass

    if name not in PASSES:
        near = difflib.get_close_matches(name, PASSES, n=3, cutoff=0.5)
        raise UnknownPass(
            f"no pass is called {name!r}",
            hint=f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(PASSES)}",
        )
    cls = PASSES[name]
    types_of = _types(cls)
    for key, value in given.items():
        if key not in types_of:
            has = ", ".join(f"{o.name}: {o.type}" for o in options(name)) or "none"
            raise InvalidOption(f"pass {name} has no option {key!r}", hint=f"its options: {has}")
        if not _fits(value, types_of[key]):
            raise InvalidOption(
                f"option {key} of pass {name} is {_text(types_of[key])}, not {type(value).__name__} {value!r}"
            )
    return cls(**given)


def options(name: str) -> tuple[Option, ...]:
    """The options of a pass, in their order. Raises UnknownPass."""
    cls = type(make(name))
    docs = _attribute_docs(cls)
    types_of = _types(cls)
    return tuple(
        Option(f.name, _text(types_of[f.name]), f.default, docs.get(f.name, "")) for f in dataclasses.fields(cls)
    )


def summary(name: str) -> str:
    """What a pass does, in one sentence. Raises UnknownPass."""
    return (inspect.getdoc(type(make(name))) or "").split("\n\n")[0].replace("\n", " ")


def _types(cls: type[Pass]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _text(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items()
        )
    if kind is float:  # 60 is a fine number of seconds; True is not
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _attribute_docs(cls: type[Pass]) -> dict[str, str]:
    """The entries of the class's ``Attributes:`` section."""
    docs: dict[str, str] = {}
    _, _, section = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    current = ""
    for line in section.splitlines():
        if line.startswith("    ") and not line.startswith("     ") and ": " in line:
            current, _, text = line.strip().partition(": ")
            docs[current] = text
        elif line.strip() and current:
            docs[current] += " " + line.strip()
    return docs


def __getattr__(name: str) -> Any:
    if name in __all__:  # the names of ``passes.base``, which imports onnx_ir
        return getattr(importlib.import_module("passes.base"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
