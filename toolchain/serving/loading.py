"""Loads a version, holds it against its self-test vectors and warms it; or says what it takes by its files alone.

All of it blocks, and runs in threads of its own pool. A version that raises here never gets a request. Where others
answer already, a new version is loaded and tested in a process of its own first: a runtime that crashes or hangs on it
takes nobody along.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import runtimes
from runtimes import _selftest, package
from runtimes._manifest import Variant
from runtimes.base import Error, InvalidArtifact, Session, Target, TensorSpec
from runtimes.model_file import check_model_file
from toolchain.errors import DataError
from toolchain.seeded import seeded_inputs
from toolchain.serving.base import ModelInfo
from toolchain.serving.independence import batch_axis, why_rows_depend
from toolchain.serving.options import ModelOptions, ServerOptions
from toolchain.serving.repository import Version

#: Rows at most where nothing is said.
DEFAULT_BATCH = 64
_MAX_LABELS = 16 << 20
#: How long a self-test in a process of its own may take.
_APART_S = 300.0
#: ONNX's numbers of element types, to numpy's and ml_dtypes' names.
_ELEMENTS = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16",
}  # fmt: skip
#: What the artifact says of itself that has a field of its own in ``ModelInfo``, or is of no use to a client.
_OWN = ("labels", "preprocessing", "build_key", "machine", "command", "selftest")


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """A version that may be served.

    Attributes:
        session: loaded, tested and warm.
        info: what it takes, by its session.
        selftest: the largest error against the stored vectors; None where there are none.
        remarks: what somebody should know.
        seconds: how long it took.
    """

    session: Session
    info: ModelInfo
    selftest: float | None
    remarks: tuple[str, ...]
    seconds: float


def describe(version: Version, options: ModelOptions, folder: Path | None) -> ModelInfo | None:
    """What a version takes, by its files alone, without a runtime; None where they do not tell.

    Args:
        version: which.
        options: how it is served.
        folder: where a file of labels lies.

    Raises:
        Error: it is damaged, or nothing of it runs here.
    """
    found = None
    picked = None
    if version.bare:
        file: Path | None = version.path
        target = Target.parse(options.target or "ort-cpu")
    else:
        found = package.read_package(version.path)
        picked = _choose(found, options)
        target = picked.target
        names = [name for name in (picked.model_file, picked.prepared_file) if name and name.endswith(".onnx")]
        file = found.root / picked.directory / names[0] if names else None
    if file is None:  # an engine
        return None
    model = check_model_file(file)
    if model.ir_version < 4 or any(name not in model.element_types for name in (*model.inputs, *model.outputs)):
        return None  # weights are among the inputs, or something is no tensor
    if any(model.element_types[name] not in _ELEMENTS for name in (*model.inputs, *model.outputs)):
        return None
    specs = {name: TensorSpec(name, _ELEMENTS[model.element_types[name]], model.shapes[name]) for name in model.shapes}
    inputs = tuple(specs[name] for name in model.inputs)
    outputs = tuple(specs[name] for name in model.outputs)
    return _info(version, options, folder, inputs, outputs, target, picked, found)


def make(
    version: Version, options: ModelOptions, folder: Path | None, *, server: ServerOptions, apart: bool = False
) -> Made:
    """Loads a version, tests and warms it.

    Args:
        version: which.
        options: how it is served.
        folder: where a file of labels lies.
        server: threads and trust.
        apart: test it in a process of its own before. Not done where there are no vectors, nor for native code that
            the caller vouches for, which only this process does.

    Raises:
        Error: it is damaged, does not run here, or computes something else than it should.
    """
    began = time.monotonic()
    found = None
    picked: Variant | None = None
    if version.bare:
        target = Target.parse(options.target or "ort-cpu")
        asked: dict[str, Any] | None = options.session_options and dict(options.session_options)
    else:
        found = package.read_package(version.path)
        if found.digest != version.digest:
            raise InvalidArtifact("it was replaced while it was being loaded", where=str(version.path))
        # All files, and not those alone that this machine opens: another one would open others. What was compared
        # before, by the build or by the last start, is not read again.
        found.verify()
        picked = _choose(found, options)
        target = picked.target
        asked = dict(picked.session_options if options.session_options is None else options.session_options)
        if apart and not server.trust and isinstance(found.metadata.get(_selftest.KEY), dict):
            some = _with_threads(target, asked, server)
            _selftest.selftest_apart(found.root, variant=picked.name, timeout_s=_APART_S, options=some)
    session = runtimes.load(
        version.path,
        target=str(target) if version.bare else None,
        variant=picked.name if picked else None,
        options=_with_threads(target, asked, server),
        trust=server.trust,
    )
    try:
        info = _info(version, options, folder, session.inputs, session.outputs, target, picked, found)
        remarks: list[str] = []
        tested: float | None = None
        feeds: list[dict[str, np.ndarray]] = []
        if found is not None and picked is not None:
            if isinstance(found.metadata.get(_selftest.KEY), dict):
                vectors = _selftest.read_vectors_of(found)
                tested = _selftest.compare(session, picked.name, vectors)
                feeds = vectors.inputs()
            else:
                remarks.append("the artifact has no self-test vectors: that it loads is the test")
        info = _warm(session, info, options, feeds, remarks)
    except BaseException:
        session.close()
        raise
    return Made(session, info, tested, tuple(remarks), time.monotonic() - began)


def _choose(found: package.Package, options: ModelOptions) -> Variant:
    if options.target is not None:
        runtimes.backend(Target.parse(options.target).runtime)  # a name that nobody knows is told as that
    picked, _ = package.choose_variant(
        found,
        variant=options.variant,
        target=options.target,
        can_run=lambda target: runtimes.backend(target.runtime).can_run(target),
    )
    return picked


def _with_threads(target: Target, asked: dict[str, Any] | None, server: ServerOptions) -> dict[str, Any] | None:
    """Session options with the server's number of threads, where the model has none of its own."""
    threads = server.threads
    if threads is None and server.workers > 1:
        threads = max(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 1)
        threads = max(threads // server.workers, 1)
    name = runtimes.backend(target.runtime).threads_option
    # An artifact says 0 where nobody said anything.
    if threads is None or name is None or (asked or {}).get(name):
        return asked
    return {**(asked or {}), name: threads}


def _info(
    version: Version,
    options: ModelOptions,
    folder: Path | None,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    target: Target,
    variant: Variant | None,
    found: package.Package | None,
) -> ModelInfo:
    metadata: Mapping[str, Any] = found.metadata if found else {}
    labels = metadata.get("labels")
    preprocessing = metadata.get("preprocessing")
    most = options.batching.max_batch_size
    rows = DEFAULT_BATCH if most is None else most
    return ModelInfo(
        name=version.model,
        version=str(version.number),
        inputs=inputs,
        outputs=outputs,
        max_batch_size=rows if batch_axis(inputs, outputs) else 0,
        platform=str(target),
        precision=variant.precision if variant else "",
        digest="" if version.bare else version.digest,
        labels=tuple(map(str, labels)) if isinstance(labels, list) else _read_labels(options, folder),
        preprocessing=preprocessing if isinstance(preprocessing, Mapping) else None,
        metadata={key: value for key, value in metadata.items() if key not in _OWN},
    )


def _read_labels(options: ModelOptions, folder: Path | None) -> tuple[str, ...]:
    """The classes, a line each. Raises InvalidArtifact."""
    if options.labels is None or folder is None:
        return ()
    path = folder / options.labels
    where = str(path)
    if os.path.basename(options.labels) != options.labels or path.is_symlink():
        raise InvalidArtifact("labels is the name of a file beside serving.yaml", where=f"{where}, key 'labels'")
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_LABELS + 1)
        if len(content) > _MAX_LABELS:
            raise InvalidArtifact(f"the file of labels is larger than {_MAX_LABELS >> 20} MiB", where=where)
        return tuple(content.decode("utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArtifact(f"the file of labels cannot be read: {error}", where=f"{where}, key 'labels'") from None


def _warm(
    session: Session, info: ModelInfo, options: ModelOptions, feeds: list[dict[str, np.ndarray]], remarks: list[str]
) -> ModelInfo:
    """Runs the model before the first request does. Returns ``info`` without batches where rows are not independent.

    A ``max_batch_size`` that was set is taken as somebody's word that they may be put together all the same.
    """
    explicit = options.batching.max_batch_size
    if explicit and not info.max_batch_size:
        remarks.append("max_batch_size is set, but the first axis is no batch axis that may vary")
    try:
        one = feeds[0] if feeds else seeded_inputs(session.inputs)
        session.run(one)
    except DataError:
        remarks.append("it was not warmed: no inputs can be made up")
        return info
    except Error as error:  # stored vectors have run already; what was made up may be none of what it takes
        remarks.append(f"it was not warmed: {error.what}")
        return info
    why = why_rows_depend(session, one) if info.max_batch_size > 1 else None
    if why is None:
        return info
    if explicit:
        remarks.append(f"{why}; put together all the same, because max_batch_size is set")
        return info
    remarks.append(f"requests are not put together: {why}")
    return dataclasses.replace(info, max_batch_size=0)
