"""A graph and a target become files that the target's runtime loads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import runtimes
from toolchain.progress import Status, silent
from toolchain.storage import reported

#: Beside the compiled files, for whoever opens the folder before it is packed.
NOTE = "compiled.json"


def session_options(target: runtimes.Target, values: Mapping[str, Any]) -> Any:
    """The target's typed session options from plain values.

    Raises:
        InvalidInput: an option that this runtime does not have, or a value it does not take.
    """
    kind = runtimes.backend(target.runtime).options_type
    known = {field.name for field in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            raise runtimes.InvalidInput(
                f"target {target} has no session option {name!r}", hint=f"it has: {', '.join(sorted(known)) or 'none'}"
            )
    return kind(**values)


def compile_model(
    model: Path,
    target: runtimes.Target,
    directory: Path,
    *,
    options: Any = None,
    on_status: Status = silent,
) -> runtimes.Compiled:
    """Compiles an ONNX file into ``directory`` through the runtime's own compiler, and notes there what it made.

    Raises:
        TargetUnavailable, CompileFailed, InvalidModel: from the runtime.
        StorageError: the disk is full or not writable.
    """
    watched = runtimes.backend(target.runtime).watched(
        lambda what, share: on_status(f"compile {target}: {what}", share)
    )
    with reported(directory, "the compiled model"), watched:
        compiled = runtimes.compile(model, target, directory / "files", options=options)
        (directory / NOTE).write_text(json.dumps(compiled.to_json()), encoding="utf-8")
    return compiled


def read_compiled(directory: Path) -> runtimes.Compiled:
    """Reads back what ``compile_model`` wrote."""
    return runtimes.Compiled.from_json(directory / "files", json.loads((directory / NOTE).read_text(encoding="utf-8")))
