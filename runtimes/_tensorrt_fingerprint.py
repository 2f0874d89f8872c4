"""What an engine is bound to, compared before TensorRT sees a byte of it.

``tensorrt_engine.py`` lists the fields. Every complaint names the field, both values, and the command that builds the
engine again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtimes._driver import Gpu, driver
from runtimes._tensorrt_api import Api
from runtimes._tensorrt_options import SESSION_OPTIONS, TensorRTOptions, build_options
from runtimes.base import Compiled, InvalidInput, InvalidModel, Target, TargetUnavailable

_FIELDS = (
    "flavor",
    "version",
    "compute_capabilities",
    "os",
    "machine",
    "cuda",
    "options",
    "shapes",
    "plan_sha256",
    "plan_size",
)


def check_version(api: Api, compiled: Compiled, file: Path, command: str) -> None:
    """Compares what does not need a GPU to be known.

    Raises:
        InvalidModel: the fingerprint lacks a field, or one is not what a fingerprint holds.
        TargetUnavailable: the engine was built by another TensorRT or on another system.
    """
    built = compiled.fingerprint
    for field in _FIELDS:
        if field not in built:
            raise InvalidModel(
                f"the fingerprint of this engine has no {field}", where=str(file), hint=f"build it again: {command}"
            )
    if not built["plan_size"].isdecimal():
        raise InvalidModel(f"plan_size is {built['plan_size']!r}, no number of bytes", where=str(file))
    for field in ("options", "shapes"):
        if _object(built[field]) is None:
            raise InvalidModel(f"{field} are {built[field]!r}, no JSON object", where=str(file))
    options = _object(built["options"]) or {}
    here = {"flavor": api.flavor.target, "version": api.version, "machine": platform.machine()}
    if not api.flavor.any_os:
        here["os"] = sys.platform
    for field, value in here.items():
        if built[field] == value or (field == "machine" and processor(built[field]) == processor(value)):
            continue
        if field == "version" and options.get("version_compatible") and _later(value, built[field]):
            continue
        raise TargetUnavailable(
            f"built with {field} {built[field]!r}, here it is {value!r}",
            where=str(file),
            hint=f"build it here: {command}",
        )
    needed = built["cuda"]
    supported = driver().cuda
    if needed.isdecimal() and supported is not None and supported[0] < int(needed):
        raise TargetUnavailable(
            "built for CUDA {}, and the driver here supports {}.{}".format(needed, *supported),
            where=str(file),
            hint=f"install a driver for CUDA {needed}",
        )


def processor(machine: str) -> str:
    """One name for what ``platform.machine()`` calls differently on Linux, Windows and macOS."""
    name = machine.lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def _later(here: str, built: str) -> bool:
    """Whether a version is the same or a later one of the same major version, or of the next."""
    numbers = [[int(part) for part in text.split(".") if part.isdecimal()] for text in (here, built)]
    return all(numbers) and numbers[0] >= numbers[1] and numbers[0][0] - numbers[1][0] <= 1


def check_options(compiled: Compiled, options: TensorRTOptions, command: str) -> None:
    """A builder's option that is given to ``load`` has to be the one the engine was built with."""
    built = _object(compiled.fingerprint["options"]) or {}
    for name, value in build_options(options).items():
        if built.get(name) != value:
            raise InvalidInput(
                f"{name} is {value!r}, and the engine was built with "
                f"{repr(built[name]) if name in built else 'the default'}",
                where=f"option {name}",
                hint=f"it is fixed once an engine is built; options of a session are {', '.join(SESSION_OPTIONS)}. "
                f"To build it again: {command}",
            )


def check_capability(built_for: str, gpu: Gpu, *, where: str | None = None, command: str | None = None) -> None:
    """Raises TargetUnavailable where an engine for these compute capabilities does not run on the GPU."""
    if not built_for or gpu.capability_text in built_for.split():
        return
    if built_for.endswith("+"):
        major, _, minor = built_for[:-1].partition(".")
        if gpu.capability >= (int(major), int(minor)):
            return
    raise TargetUnavailable(
        f"built for compute capability {built_for}, and this GPU ({gpu.name}) has {gpu.capability_text}",
        where=where,
        hint=f"build it for this GPU: {command}" if command else None,
    )


def read_plan(file: Path, fingerprint: Mapping[str, str], command: str) -> bytes:
    """The bytes of a plan, which are those that were built: what is checked here is what is deserialised.

    Raises:
        InvalidModel: it is missing, no plain file, cut short or changed.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as opened:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InvalidModel("the engine is no plain file", where=str(file))
            content = opened.read(int(fingerprint["plan_size"]) + 1)
    except OSError as error:
        raise InvalidModel(f"the engine cannot be read: {error.strerror}", where=str(file), hint=command) from error
    size, wanted = len(content), int(fingerprint["plan_size"])
    if size != wanted:
        longer = "more than" if size > wanted else f"{size:,} bytes, not"
        raise InvalidModel(
            f"the engine is damaged: it has {longer} {wanted:,}", where=str(file), hint=f"build it again: {command}"
        )
    digest = hashlib.sha256(content).hexdigest()
    if digest != fingerprint["plan_sha256"]:
        raise InvalidModel(
            f"the engine is damaged: its SHA-256 is {digest}, not {fingerprint['plan_sha256']}",
            where=str(file),
            hint=f"build it again: {command}",
        )
    return content


def rebuild(model: Path, target: Target, options: TensorRTOptions) -> str:
    """The command that builds the same engine, for a person to run."""
    return command_to_build(model, target, build_options(options))


def rebuild_of(compiled: Compiled) -> str:
    """The command that builds a compiled engine again, of the graph beside it."""
    options = _object(compiled.fingerprint.get("options", "{}")) or {}
    return command_to_build(compiled.directory / (compiled.model_file or "model.onnx"), compiled.target, options)


def declared_shapes(fingerprint: Mapping[str, str]) -> dict[str, tuple[int | str | None, ...] | None]:
    """The shapes of inputs and outputs as the graph declares them; what is no shape is left out."""
    shapes = (_object(fingerprint["shapes"]) or {}).items()
    return {
        name: None if shape is None else tuple(shape)
        for name, shape in shapes
        if shape is None
        or (isinstance(shape, list) and all(one is None or isinstance(one, int | str) for one in shape))
    }


def _object(text: str) -> dict[str, Any] | None:
    """A JSON object; None where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def command_to_build(model: Path, target: Target, options: Mapping[str, Any]) -> str:
    arguments = [_literal(str(model)), _literal(str(target)), '"engine"']
    if options:
        arguments.append(f"options={_literal(options)}")
    return "python -c " + shlex.quote(f"import runtimes; runtimes.compile({', '.join(arguments)})")


def _literal(value: Any) -> str:
    """A value of JSON as Python, with double quotes, which a shell needs not quote again."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(one) for one in value) + "]"
    return repr(value)
