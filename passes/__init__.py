"""Graph passes: each takes an ``onnx_ir.Model``, changes it in place, and says what it did.

To add one: a file with one frozen dataclass on ``passes.base.Pass``, a line in ``PASSES`` below, a line in
``DEFAULT_PIPELINE`` if every model should have it, and a test file of the same name.

Measured on ONNX Runtime 1.31 (CPU time of one thread, interleaved medians) and left out because it gave
nothing: ReduceMean over the spatial axes as GlobalAveragePool (0.99 to 1.01 on ResNet-50,
EfficientNet-Lite0 and MobileNetV2), and the Reshape, Transpose, Reshape by which torch transposes the keys
of attention as one Transpose (1.00 on ViT).
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from passes.base import Declined, InvalidOption, Outcome, Pass, PassFailed, UnknownPass
from passes.convert_float16 import ConvertFloat16
from passes.correct_bias import CorrectBias
from passes.eliminate_dead_code import EliminateDeadCode
from passes.eliminate_noops import EliminateNoops
from passes.equalize_layers import EqualizeLayers
from passes.fold_constants import FoldConstants
from passes.freeze_initializers import FreezeInitializers
from passes.fuse_conv_bn import FuseConvBn
from passes.fuse_hard_sigmoid import FuseHardSigmoid
from passes.fuse_pad import FusePad
from passes.quantize_dynamic import QuantizeDynamic
from passes.quantize_int8 import QuantizeInt8
from passes.quantize_weights import QuantizeWeights
from passes.simplify import Simplify
from passes.smooth_quant import SmoothQuant
from passes.strip_metadata import StripMetadata

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

#: every pass, by the name that recipes and the command line use
PASSES: Mapping[str, type[Pass]] = types.MappingProxyType(
    {
        "convert_float16": ConvertFloat16,
        "correct_bias": CorrectBias,
        "eliminate_dead_code": EliminateDeadCode,
        "eliminate_noops": EliminateNoops,
        "equalize_layers": EqualizeLayers,
        "fold_constants": FoldConstants,
        "freeze_initializers": FreezeInitializers,
        "fuse_conv_bn": FuseConvBn,
        "fuse_hard_sigmoid": FuseHardSigmoid,
        "fuse_pad": FusePad,
        "quantize_dynamic": QuantizeDynamic,
        "quantize_int8": QuantizeInt8,
        "quantize_weights": QuantizeWeights,
        "simplify": Simplify,
        "smooth_quant": SmoothQuant,
        "strip_metadata": StripMetadata,
    }
)

DEFAULT_PIPELINE: tuple[str, ...] = (
    "strip_metadata",  # first: what comes after has less to carry
    "freeze_initializers",  # before anything that looks for constants
    "fold_constants",  # gives the biases, pads, Clip bounds and targets that the rest must read
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
