"""TensorRT engines: targets ``tensorrt`` (10 and 11) and ``tensorrt-rtx``.

``compile`` keeps the graph as ``model.onnx`` and writes the engine as ``prepared/model.plan``. What the engine is
bound to stands in the fingerprint, and all of it is compared before TensorRT sees a byte of the plan::

    flavor, version             tensorrt or tensorrt-rtx, such as 1.7.1.116
    compute_capabilities        of the GPUs that it runs on: "8.6 8.9", "8.9", or "8.0+" for all from there on
    os, machine                 sys.platform and platform.machine()
    cuda                        the major version of CUDA that the driver has to support
    options                     the builder's options that are not the default, as JSON
    graph_sha256                of model.onnx
    shapes                      of inputs and outputs as the graph declares them, as JSON: engines forget names of sizes
    plan_sha256, plan_size      of the plan: a cut or changed one is refused unread

Devices: ``tensorrt:1`` builds for the GPU of that number and runs there. ``tensorrt-rtx`` without a device builds for
every GPU since Ampere, and ``tensorrt-rtx:sm86,sm89`` for those that are named, both on machines with no GPU at all.

A plan is native code: ``_trust.py`` says when one may be loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from runtimes import _cuda, _cuda_packages, _trust
from runtimes._digests import cache_root
from runtimes._driver import Driver, Gpu, driver
from runtimes._options import own_options
from runtimes._tensorrt_api import FLAVORS, Api, require_api
from runtimes._tensorrt_build import Engine, Progress, build_engine, watch_builds
from runtimes._tensorrt_fingerprint import (
    check_capability,
    check_options,
    check_version,
    command_to_build,
    declared_shapes,
    read_plan,
    rebuild,
    rebuild_of,
)
from runtimes._tensorrt_graph import NetworkReport, Unsupported, inspect_graph
from runtimes._tensorrt_options import TensorRTOptions, build_options
from runtimes.base import (
    Availability,
    Backend,
    Compiled,
    Error,
    InvalidInput,
    InvalidModel,
    Session,
    Target,
    TargetUnavailable,
)
from runtimes.model_file import check_model_file, copy_model

__all__ = [
    "BACKEND",
    "RTX",
    "NetworkReport",
    "Progress",
    "TensorRTOptions",
    "Unsupported",
    "inspect_network",
    "watch_builds",
]

_PLAN = "prepared/model.plan"
#: What every engine of TensorRT-RTX runs on where no GPU was named, says its documentation of CPU-only builds.
_SINCE_AMPERE = "8.0+"


def inspect_network(model: Path, target: Target) -> NetworkReport:
    """Says which nodes of a graph TensorRT takes, and which not and why. Builds nothing and needs no GPU.

    Args:
        model: an ONNX file.
        target: ``tensorrt`` or ``tensorrt-rtx``; the device makes no difference.

    Raises:
        TargetUnavailable: that TensorRT is not installed.
        InvalidInput: the target is another runtime.
        InvalidModel: the file is no ONNX model.
    """
    names = (BACKEND.name, RTX.name)
    if target.runtime not in names:
        raise InvalidInput(f"{target} does not say which nodes it takes", hint=f"these do: {', '.join(names)}")
    return inspect_graph(require_api(target.runtime), model)


class TensorRT(Backend):
    """The backend of ``tensorrt``."""

    name: ClassVar[str] = "tensorrt"
    packages: ClassVar[tuple[str, ...]] = ("tensorrt",)
    execution_provider: ClassVar[str | None] = None
    device_class: ClassVar[str] = "gpu"
    options_type: ClassVar[type] = TensorRTOptions

    def probe(self) -> Availability:
        return self.can_run(Target(self.name))

    def can_compile(self, target: Target) -> Availability:
        return self._state(target, self._device)

    def watched(self, progress: Progress) -> contextlib.AbstractContextManager[None]:
        return watch_builds(progress)

    def can_run(self, target: Target) -> Availability:
        return self._state(target, self._require_runnable)

    def _state(self, target: Target, require: Callable[[Api, Target], object]) -> Availability:
        version = None
        try:
            api = self._api(target)
            version = api.version
            require(api, target)
        except Error as error:
            remedy = error.hint.removeprefix("run: ") if error.hint and error.hint.startswith("run: ") else None
            return Availability(False, version, error.what, remedy)
        return Availability(True, version)

    def _api(self, target: Target) -> Api:
        """This backend's TensorRT. Raises TargetUnavailable where it is not here, or has no such devices at all."""
        named = target.device is not None and not target.device.isdigit()
        if named and not any(flavor.cross_compiles for flavor in FLAVORS if flavor.target == self.name):
            raise TargetUnavailable(
                f"{self.name} builds on the GPU that is to run it, not for {target.device}",
                where=f"target {target}",
                hint=f"{self.name} on a machine with that GPU, or tensorrt-rtx:{target.device}, which needs none",
            )
        return require_api(self.name)

    def _require_runnable(self, api: Api, target: Target) -> None:
        """Raises TargetUnavailable where an engine built for this target cannot run here."""
        capabilities = self._named(api, target)
        gpu = _gpu(api, None if capabilities else _ordinal(target))
        if capabilities:
            check_capability(" ".join(_dotted(name) for name in capabilities), gpu)
        elif api.flavor.cross_compiles and target.device is None:
            check_capability(_SINCE_AMPERE, gpu)
        if _cuda_packages.name() is None:
            raise TargetUnavailable(
                "neither cuda-bindings nor pycuda is installed", hint="run: pip install cuda-bindings"
            )

    def compile(self, model: Path, target: Target, directory: Path, *, options: Any = None) -> Compiled:
        """Builds an engine. ``watch_builds`` tells how far it is; Ctrl-C ends it within a step of the builder."""
        api = self._api(target)
        options = own_options(self, options)
        _refuse_foreign_options(api, options)
        device = self._device(api, target)
        model = Path(model)
        engine = build_engine(
            api,
            model,
            capabilities=device.capabilities,
            ordinal=device.ordinal,
            options=options,
            timing_cache=_timing_cache(api, device) if options.timing_cache else None,
            command=rebuild(model, target, options),
        )
        checked = check_model_file(model)
        copy_model(checked, directory)
        sha256, size = _write_plan(engine, directory / _PLAN)
        fingerprint = {
            "flavor": api.flavor.target,
            "version": api.version,
            "compute_capabilities": device.runs_on(options),
            "os": sys.platform,
            "machine": platform.machine(),
            "cuda": str(api.cuda or ""),
            "options": json.dumps(build_options(options), sort_keys=True),
            "shapes": json.dumps(checked.shapes),
            "graph_sha256": _sha256(directory / "model.onnx"),
            "plan_sha256": sha256,
            "plan_size": str(size),
        }
        remarks = engine.remarks
        if not _trust.note_built(sha256, f"{target}, {api.flavor.title} {api.version}"):
            remarks += ("there is no cache to note in that this engine was built here: load it with trust=True",)
        return Compiled(target, directory, "model.onnx", _PLAN, fingerprint, remarks)

    def selects(self, compiled: Compiled, *, options: Any = None) -> str:
        if compiled.prepared_file is None:
            raise _not_compiled(compiled)
        return compiled.prepared_file

    def load(self, compiled: Compiled, *, options: Any = None) -> Session:
        """Loads an engine. What is wrong with it is said before what this machine lacks."""
        if compiled.prepared_file is None:
            raise _not_compiled(compiled)
        api = self._api(compiled.target)
        options = own_options(self, options)
        file = compiled.directory / compiled.prepared_file
        command = rebuild_of(compiled)
        check_version(api, compiled, file, command)
        check_options(compiled, options, command)
        plan = read_plan(file, compiled.fingerprint, command)
        if refused := _trust.refusal(compiled.fingerprint["plan_sha256"], trusted=compiled.trusted):
            raise InvalidModel(
                f"this engine is not loaded: {refused}",
                where=str(file),
                hint=f"trust=True, if you know who built it; or build it here: {command}",
            )
        ordinal = None if self._named(api, compiled.target) else _ordinal(compiled.target)
        gpu = _gpu(api, ordinal)
        check_capability(compiled.fingerprint["compute_capabilities"], gpu, where=str(file), command=command)
        from runtimes import _tensorrt_session

        info = {
            "target": str(compiled.target),
            "runtime": f"{api.flavor.target} {api.version}",
            "file": compiled.prepared_file,
            "device": f"{gpu.name}, compute capability {gpu.capability_text}",
            "built_for": compiled.fingerprint["compute_capabilities"],
            "build_options": compiled.fingerprint["options"],
        }
        shapes = declared_shapes(compiled.fingerprint)
        sha256 = compiled.fingerprint["plan_sha256"]
        return _tensorrt_session.make_session(
            api, plan, compiled.target, options=options, info=info, plan_sha256=sha256, shapes=shapes
        )

    def _named(self, api: Api, target: Target) -> tuple[str, ...]:
        """The compute capabilities that a target names; none where it names a GPU by number, or nothing.

        Raises:
            TargetUnavailable: this TensorRT does not know one.
        """
        if target.device is None or target.device.isdigit():
            return ()
        known = api.capabilities()
        names = target.device.lower().split(",")
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
                raise TargetUnavailable(
                    f"{api.flavor.title} {api.version} builds for no {name!r}: "
                    f"{_meant(near)}it knows {', '.join(known)}",
                    where=f"target {target}",
                    hint=f"{self.name} without a device builds for all GPUs since sm80",
                )
        return tuple(sorted(set(names), key=known.index))

    def _device(self, api: Api, target: Target) -> _Device:
        """What to build for. Raises TargetUnavailable where that cannot be done here."""
        capabilities = self._named(api, target)
        if capabilities:
            return _Device(capabilities, None, None)
        if api.flavor.cross_compiles and target.device is None:
            return _Device((), None, None)
        ordinal = _ordinal(target)
        gpu = _gpu(api, ordinal)
        return _Device(("current",) if api.flavor.cross_compiles else (), ordinal, gpu)


@dataclasses.dataclass(frozen=True, slots=True)
class _Device:
    """What an engine is built for: named capabilities, or a GPU that is here, or neither: all since Ampere."""

    capabilities: tuple[str, ...]
    ordinal: int | None
    gpu: Gpu | None

    def runs_on(self, options: TensorRTOptions) -> str:
        """The compute capabilities on which the engine runs, as the fingerprint has them."""
        if self.gpu is not None:
            ampere = options.hardware_compatibility == "ampere-plus"
            return _SINCE_AMPERE if ampere else self.gpu.capability_text
        return " ".join(_dotted(name) for name in self.capabilities) or _SINCE_AMPERE


def _meant(near: list[str]) -> str:
    return f"did you mean {' or '.join(near)}? " if near else ""


def _dotted(name: str) -> str:
    """``sm120`` as people write it: 12.0."""
    return f"{name[2:-1]}.{name[-1]}"


def _ordinal(target: Target) -> int | None:
    return None if target.device is None else int(target.device)


def _gpu(api: Api, ordinal: int | None, state: Driver | None = None) -> Gpu:
    """The GPU of that number, the first where none is given.

    Raises:
        TargetUnavailable: no driver, one that is too old, or no such GPU.
    """
    state = state or driver()
    _cuda.require_driver(cuda=api.cuda, who=api.flavor.title, state=state)
    _cuda.require_device(ordinal or 0, state)
    return state.gpus[ordinal or 0]


def _refuse_foreign_options(api: Api, options: TensorRTOptions) -> None:
    """Raises InvalidInput for options that this TensorRT has no equivalent of."""
    wanted = {
        "version_compatible": options.version_compatible and not api.flavor.version_compatible,
        "hardware_compatibility": options.hardware_compatibility != "none" and not api.flavor.hardware_compatible,
    }
    instead = {
        "version_compatible": "an engine of TensorRT-RTX is bound to its version; building it again takes seconds",
        "hardware_compatibility": "name GPUs in the target: tensorrt-rtx:sm86,sm89, or none for all since Ampere",
    }
    for name, bad in wanted.items():
        if bad:
            raise InvalidInput(f"{api.flavor.title} has no {name}", where=f"option {name}", hint=instead[name])


def _timing_cache(api: Api, device: _Device) -> Path | None:
    """Where timings are kept, one file for each TensorRT and kind of GPU; None where there are none to keep."""
    root = cache_root()
    if root is None or not api.flavor.timing_cache or device.gpu is None:
        return None
    gpu = "".join(letter if letter.isalnum() else "-" for letter in device.gpu.name)
    return root / "timings" / f"{api.flavor.target}-{api.version}-{gpu}-{device.gpu.capability_text}"


def _write_plan(engine: Engine, file: Path) -> tuple[str, int]:
    """Writes the plan. Returns its SHA-256 in hex and its size in bytes. Raises OSError."""
    file.parent.mkdir(parents=True)
    content = memoryview(engine.plan)
    with open(file, "wb") as opened:
        opened.write(content)
    return hashlib.sha256(content).hexdigest(), content.nbytes


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _not_compiled(compiled: Compiled) -> InvalidModel:
    model = compiled.directory / (compiled.model_file or "model.onnx")
    return InvalidModel(
        f"there is no engine for {compiled.target} here, only a graph, and loading builds nothing",
        where=str(model),
        hint=f"compile it first: {command_to_build(model, compiled.target, {})}",
    )


class TensorRTRtx(TensorRT):
    """The backend of ``tensorrt-rtx``."""

    name: ClassVar[str] = "tensorrt-rtx"
    packages: ClassVar[tuple[str, ...]] = ("tensorrt_rtx",)


BACKEND = TensorRT()
RTX = TensorRTRtx()
