"""What a bundle can be made for, as a literal table, and what of an artifact runs there.

A variant goes along whole where its runtime exists on the platform. Its prepared form is bound to a system and to a
processor and goes along only where both can be right. A TensorRT engine is nothing but such a form: where the one that
is there cannot fit, its graph goes along with the recipe to build it on the device.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from runtimes import InvalidInput
from runtimes._manifest import Variant
from runtimes._tensorrt_fingerprint import processor

#: What happens to a variant: it goes as it is, without its prepared form, as a graph to be built, or not at all.
Fate = Literal["whole", "portable", "to compile", "left out"]

_ENGINES = ("tensorrt", "tensorrt-rtx")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """A kind of device.

    Attributes:
        name: as ``--for`` takes it.
        system: ``sys.platform`` there.
        machine: its processor, as Linux names it.
        runtimes: the backends that exist there, as their makers publish them.
        ort_format: whether reduced builds of ONNX Runtime, which read ORT format only, are usual there.
        arm: whether ORT format is written for ARM kernels.
        note: what a user should know.
    """

    name: str
    system: str
    machine: str
    runtimes: tuple[str, ...]
    ort_format: bool = False
    arm: bool = False
    note: str | None = None


PLATFORMS: Mapping[str, Platform] = {
    p.name: p
    for p in (
        Platform(
            name="linux-x86_64",
            system="linux",
            machine="x86_64",
            runtimes=("ort-cpu", "ort-cuda", "openvino-cpu", "tensorrt", "tensorrt-rtx"),
        ),
        # PyPI has OpenVINO for ARM, and neither onnxruntime-gpu nor TensorRT-RTX; TensorRT is there for servers (SBSA).
        Platform(
            name="linux-aarch64",
            system="linux",
            machine="aarch64",
            runtimes=("ort-cpu", "openvino-cpu", "tensorrt"),
            ort_format=True,
            arm=True,
        ),
        # JetPack brings TensorRT 10, bound to its GPU: an engine from elsewhere never fits.
        Platform(
            name="jetson",
            system="linux",
            machine="aarch64",
            runtimes=("ort-cpu", "tensorrt"),
            ort_format=True,
            arm=True,
        ),
        Platform(
            name="android",
            system="android",
            machine="aarch64",
            runtimes=("ort-cpu",),
            ort_format=True,
            arm=True,
            note="there is no Python to install it with: unpack it with tar, and open model.ort through ONNX Runtime",
        ),
        Platform(
            name="windows-x86_64",
            system="win32",
            machine="x86_64",
            runtimes=("ort-cpu", "ort-cuda", "openvino-cpu", "tensorrt", "tensorrt-rtx"),
        ),
    )
}


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """What happens to one variant of an artifact, and why not more."""

    variant: Variant
    fate: Fate
    why: str | None = None


def platform_named(name: str) -> Platform:
    """The platform of a name. Raises InvalidInput."""
    if name not in PLATFORMS:
        raise InvalidInput(f"there is no platform {name!r}", where="--for", hint=f"there are: {', '.join(PLATFORMS)}")
    return PLATFORMS[name]


def choose(variant: Variant, platform: Platform) -> Choice:
    """What happens to a variant on a platform."""
    runtime = variant.target.runtime
    if runtime not in platform.runtimes:
        return Choice(variant, "left out", f"there is no {runtime} on {platform.name}")
    if variant.prepared_file is None:
        return Choice(variant, "whole")
    misfit = _misfit(variant, platform)
    if misfit is None:
        return Choice(variant, "whole")
    if variant.model_file is None:
        return Choice(variant, "left out", f"it has no portable form, and {misfit}")
    if runtime in _ENGINES:
        return Choice(variant, "to compile", misfit)
    return Choice(variant, "portable", misfit)


def build_options(variant: Variant) -> dict[str, Any]:
    """The options that a TensorRT engine was built with, which its recipe asks for again."""
    found = json.loads(variant.fingerprint.get("options", "{}"))
    return found if isinstance(found, dict) else {}


def _misfit(variant: Variant, platform: Platform) -> str | None:
    """Why a prepared form cannot be loaded there; None where it may be, which the device then says for sure."""
    bound = variant.fingerprint
    machine = processor(bound.get("machine", ""))
    if machine and machine != platform.machine:
        return f"it was made on {machine}"
    # TensorRT-RTX's engines run on Windows and on Linux, says its documentation of portability.
    if "os" in bound and bound["os"] != platform.system and variant.target.runtime != "tensorrt-rtx":
        return f"it was made on {bound['os']}"
    if platform.name == "jetson" and variant.target.runtime == "tensorrt":
        return "an engine fits the module that built it only"
    return None
