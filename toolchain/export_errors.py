"""What torch says while it exports: noise silenced, failures told with the user's line and a next step."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from toolchain.errors import ExportFailed
from toolchain.models import TorchModel

#: what to do about a failure, by what torch says
_HINTS = (
    (
        r"data.dependent|GuardOnDataDependent|Could not guard",
        "a branch or a size depends on values: use torch.where, torch.cond, or torch._check to bound it",
    ),
    (
        r"specialized it to be a constant|Constraints violated|marked .* as dynamic",
        "the module fixes that size: mend the line, or leave the axis out of dynamic_axes in a FILE.py:FACTORY",
    ),
    (
        r"No ONNX function found|No decompos|DispatchError|not supported in ONNX",
        "the operator has no translation: replace it by others in the module",
    ),
    (
        r"graph break|Unsupported|TorchDynamo|torch\.compile",
        "write that part without Python side effects",
    ),
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what torch and its exporter say on the way; warnings of other origin are shown afterwards."""
    # What they log on the way to an error is pages long; the error itself is told in export_failed.
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    for warning in caught:
        if not issubclass(warning.category, (FutureWarning, DeprecationWarning)) and not is_library(warning.filename):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def export_failed(error: BaseException, model: TorchModel) -> ExportFailed:
    """The typed error for whatever ``torch.onnx.export`` raised: the first cause, its line, what to do."""
    causes = list(_chain(error))
    root = causes[-1]
    text = "\n".join(f"{type(cause).__name__}: {cause}" for cause in causes)
    hint = next((hint for pattern, hint in _HINTS if re.search(pattern, text)), None)
    return ExportFailed(
        f"torch.export cannot take this model: {type(root).__name__}: {first_line(root)}",
        where=user_line(error, model.source_file) or model.provenance.get("source"),
        hint=hint or "try torch.export.export(module, example_inputs) alone; --debug shows the whole traceback",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, the cause of that, ...; the last one is where it came up first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def first_line(error: BaseException) -> str:
    """The first line of a message; torch's run to pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def user_line(error: BaseException, source_file: Path | None) -> str | None:
    """``file:line in function: code`` of the innermost line that is the module's own, not a library's."""
    found = None
    folder = str(source_file.resolve().parent) + os.sep if source_file else None
    for cause in _chain(error):
        for frame in traceback.extract_tb(cause.__traceback__):
            mine = os.path.realpath(frame.filename).startswith(folder) if folder else False
            if mine or not (is_library(frame.filename) or "importlib" in frame.filename):
                found = f"{frame.filename}:{frame.lineno} in {frame.name}" + (f": {frame.line}" if frame.line else "")
    return found


def is_library(filename: str) -> bool:
    """Whether a file of a traceback is torch's, an installed package's, Python's or ours."""
    import torch

    path = os.path.realpath(filename)
    ours = os.path.dirname(os.path.realpath(__file__)) + os.sep
    roots = (
        os.path.dirname(os.path.realpath(torch.__file__)),
        os.path.dirname(os.path.realpath(re.__file__)),
    )
    return path.startswith(ours) or "site-packages" in path or path.startswith(roots) or filename.startswith("<")
