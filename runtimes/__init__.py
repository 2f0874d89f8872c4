"""Loads and runs compiled models: numpy and one runtime, nothing else.

>>> session = runtimes.load("artifacts/resnet50")       # or an .onnx file
>>> outputs = session.run({"pixel_values": images})

``import runtimes`` itself imports numpy only; a runtime is imported when a session is made. Every error is
an ``Error``; their tree is in ``runtimes/base.py``.

ONNX Runtime's own telemetry is off: its packages send events from 1.29 on, on Linux and macOS too, and leave files in
the home and the temporary folder. ``ORT_DISABLE_TELEMETRY=0`` in the environment leaves it on.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

from runtimes import _options
from runtimes.base import (
    Availability,
    Backend,
    Binding,
    Compiled,
    CompileFailed,
    Error,
    InvalidArtifact,
    InvalidInput,
    InvalidModel,
    RunFailed,
    Session,
    SessionClosed,
    Target,
    TargetUnavailable,
    TensorSpec,
)

__all__ = [
    "Availability",
    "Backend",
    "Binding",
    "CompileFailed",
    "Compiled",
    "Error",
    "InvalidArtifact",
    "InvalidInput",
    "InvalidModel",
    "RunFailed",
    "Session",
    "SessionClosed",
    "Target",
    "TargetUnavailable",
    "TensorSpec",
    "available",
    "backend",
    "compile",
    "load",
]

#: Target name -> module, and the name of the backend in it. Other distributions add theirs as entry points.
_BACKENDS = {
    "ort-cpu": "runtimes.ort_cpu:BACKEND",
    "ort-cuda": "runtimes.ort_cuda:BACKEND",
    "openvino-cpu": "runtimes.openvino_cpu:BACKEND",
    "tensorrt": "runtimes.tensorrt_engine:BACKEND",
    "tensorrt-rtx": "runtimes.tensorrt_engine:RTX",
    "reference": "runtimes.reference:BACKEND",
}
_ENTRY_POINTS = "runtimes.backends"
#: What the probes of this process have said.
_states: dict[str, Availability] = {}

# Read once, when ONNX Runtime's environment is made. What is deployed tells nobody of its models unless its owner
# says so.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def backend(name: str) -> Backend:
    """The backend of a target's name, such as ``ort-cpu``.

    Raises:
        InvalidInput: nobody offers it; the message has the nearest names.
        TargetUnavailable: another distribution offers it, but it does not import.
    """
    if place := _BACKENDS.get(name):
        module, _, attribute = place.partition(":")
        found = getattr(importlib.import_module(module), attribute)
    else:
        offered = _entry_points()
        if name not in offered:
            raise _unknown(name, [*_BACKENDS, *offered])
        try:
            found = offered[name].load()
        except Exception as error:  # another distribution's code may raise anything
            raise TargetUnavailable(
                f"the backend {name!r} does not import: {error}",
                where=f"entry point {offered[name].value} of {_ENTRY_POINTS}",
            ) from error
    if not isinstance(found, Backend):
        raise TargetUnavailable(f"the backend {name!r} is no runtimes.Backend but {found!r}")
    return found


def available(*, refresh: bool = False) -> dict[str, Availability]:
    """Says of every backend whether it works here and, where not, why and which command mends it.

    Each is asked in a process of its own, so that a runtime that crashes is told and not suffered. That takes some
    tenths of a second, and this process remembers the answers.

    Args:
        refresh: ask again, after something was installed or a device was plugged in.
    """
    from runtimes import _probe  # subprocess and json, which a load does not need

    names = (*_BACKENDS, *(name for name in _entry_points() if name not in _BACKENDS))
    if refresh:
        _states.clear()
    here = [name for name in names if name in _BACKENDS and _probe.absent(backend(name))]
    asked = [name for name in names if name not in _states and name not in here]
    _states.update(_probe.probe_apart(asked))
    return {name: backend(name).probe() if name in here else _states[name] for name in names}


def compile(
    model: str | os.PathLike[str],
    target: str | Target,
    directory: str | os.PathLike[str],
    *,
    options: Any = None,
) -> Compiled:
    """Compiles an ONNX file for a target into a directory, which is made if needed and must be empty.

    Args:
        model: an ONNX file, with its external data beside it.
        target: such as ``ort-cpu``.
        directory: gets all that loading needs.
        options: the backend's options type, or a mapping with fields of it.

    Raises:
        InvalidInput: an unknown target or option, or a directory that is not empty.
        InvalidModel: the file is not a model, or refers to files outside its folder.
        CompileFailed: the runtime refused it.
        TargetUnavailable: the target does not work here.
    """
    parsed = target if isinstance(target, Target) else Target.parse(target)
    chosen = backend(parsed.runtime)
    typed = _options.read_options(chosen, options)
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InvalidInput("the directory to compile into is not empty", where=str(directory))
    return chosen.compile(Path(model), parsed, directory, options=typed)


def load(
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    variant: str | None = None,
    options: Any = None,
    verify: bool = True,
    trust: bool = False,
) -> Session:
    """Makes a session of an artifact or of an ONNX file.

    Of an artifact it takes the first variant that this machine can run; ``session.info`` says which and why.
    Before anything is parsed, the files that the variant needs are compared with their digests.

    Args:
        path: an artifact's directory, or an ONNX file.
        target: the target to run on. Of an artifact, only its variants for that target are considered; an
            ONNX file is loaded by ``ort-cpu`` where nothing is said.
        variant: the name of an artifact's variant.
        options: the backend's options type, or a mapping with fields of it. In place of those that the
            artifact carries.
        verify: compare digests. Without it a damaged or changed file goes unnoticed.
        trust: vouch for compiled code (TensorRT plans) that was not built on this machine. A plan is native code:
            whoever made it can do here what this process can.

    Raises:
        InvalidModel: the ONNX file is none, or refers to files outside its folder.
        InvalidArtifact: the artifact is damaged, unsafe, of a newer schema, or has no such variant.
        InvalidInput: an unknown target or option.
        TargetUnavailable: what was asked for does not work here.
        CompileFailed: the runtime refused the model.
    """
    try:
        path = Path(path)
    except TypeError:
        raise InvalidInput(f"a path is wanted, not {type(path).__name__}") from None
    from runtimes import package as packages

    if path.is_dir():
        return _load_package(
            packages, path, target=target, variant=variant, options=options, verify=verify, trust=trust
        )
    if variant is not None:
        raise InvalidInput("an ONNX file has no variants", where=str(path), hint="leave variant= out")
    parsed = Target.parse(target or "ort-cpu")
    chosen = backend(parsed.runtime)
    return chosen.load(
        Compiled(parsed, path.parent, model_file=path.name, remarks=("the file is a bare model",), trusted=trust),
        options=_options.read_options(chosen, options),
    )


def _load_package(
    packages: Any, path: Path, *, target: str | None, variant: str | None, options: Any, verify: bool, trust: bool
) -> Session:
    found = packages.read_package(path)
    try:
        return _load_variant(
            packages, found, target=target, variant=variant, options=options, verify=verify, trust=trust
        )
    except InvalidArtifact:
        # A rebuild may have put another artifact in its place between the manifest and the files: then once more.
        now = packages.read_package(path)
        if now.digest == found.digest:
            raise
        return _load_variant(packages, now, target=target, variant=variant, options=options, verify=verify, trust=trust)


def _load_variant(
    packages: Any, found: Any, *, target: str | None, variant: str | None, options: Any, verify: bool, trust: bool
) -> Session:
    if target is not None:
        backend(Target.parse(target).runtime)  # an unknown name is told with its nearest, whatever is offered
    picked, why = packages.choose_variant(
        found, variant=variant, target=target, can_run=lambda t: backend(t.runtime).can_run(t)
    )
    chosen = backend(picked.target.runtime)
    typed = _options.read_options(chosen, picked.session_options if options is None else options)
    compiled = dataclasses.replace(found.compiled(picked), trusted=trust)
    if verify:
        selected = chosen.selects(compiled, options=typed)
        found.verify(found.needed(picked, selected))
    session = chosen.load(compiled, options=typed)
    session.info = {
        "artifact": str(found.root),
        "variant": picked.name,
        "why": why,
        "precision": picked.precision,
        "digest": found.digest,
        "verified": "yes" if verify else "no",
        **session.info,
    }
    return session


def _entry_points() -> dict[str, Any]:
    from importlib.metadata import entry_points  # 15 ms that a known name does not need

    return {entry.name: entry for entry in entry_points(group=_ENTRY_POINTS)}


def _unknown(name: str, names: list[str]) -> InvalidInput:
    import difflib

    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return InvalidInput(
        f"there is no target {name!r}",
        hint=f"{'did you mean ' + ' or '.join(near) + '? ' if near else ''}known: {', '.join(sorted(names))}",
    )
