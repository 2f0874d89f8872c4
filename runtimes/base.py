"""The types that every runtime shares, and the root of the one exception tree.

This module imports numpy and nothing else, so that it can be shipped alone.

Errors::

    Error                       what happened, where, what to do next
    ├── InvalidInput            an array that the model does not take
    ├── InvalidModel            a file that is not a model, or one that may not be opened
    ├── InvalidArtifact         a package that is damaged, unsafe or of a newer schema
    │   └── InvalidSignature    its signature is missing, not of the signer asked for, or of something else
    ├── TargetUnavailable       the target asked for cannot run on this machine
    │   ├── NoDriver            there is no NVIDIA driver, or it finds no GPU
    │   ├── DriverTooOld        the driver supports an older CUDA than is wanted
    │   ├── NoSuchDevice        there is no GPU of that number
    │   └── NoCudaPackage       neither pycuda nor cuda-bindings can be imported
    ├── CompileFailed           the runtime refused the graph
    ├── RunFailed               the runtime failed while it ran
    │   ├── CudaFailed          a call of the CUDA driver failed
    │   └── OutOfDeviceMemory   the GPU has too little free memory
    ├── SessionClosed           a session was used after close()
    └── InstallFailed           a version could not be put into service; the one before still is

Those that are not in this module stand where they are raised. The toolchain's own errors (``toolchain/errors.py``) grow
on the same root.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

#: Where ``Session.run`` leaves its results.
Place = Literal["host", "device"]


class Error(Exception):
    """Root of every error that this project raises on purpose.

    Args:
        what: what is wrong, in one sentence.
        where: the file, node, option or variant it is wrong at.
        hint: what to do next.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  at:   {self.where}")
        if self.hint:
            lines.append(f"  next: {self.hint}")
        return "\n".join(lines)


class InvalidInput(Error, ValueError):
    """An input that the model does not take; the message shows what was given and what is wanted."""


class InvalidModel(Error):
    """A file that is not a model, is damaged, or points outside its own folder."""


class InvalidArtifact(Error):
    """An artifact that is damaged, unsafe, or written to a schema that this version does not know."""


class TargetUnavailable(Error):
    """The target asked for cannot run here; the message says why and how to mend it."""


class CompileFailed(Error):
    """The runtime refused the graph."""


class RunFailed(Error):
    """The runtime failed while it ran."""


class SessionClosed(Error):
    """A session was used after ``close()``."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a model.

    Attributes:
        name: the graph's name for it.
        dtype: numpy's name of the element type ("float32", "int64", "bool"), "string", or ml_dtypes' name of
            one that numpy lacks ("bfloat16", "float8_e4m3fn").
        shape: one entry a dimension: an int where it is fixed, a str where it is symbolic
            (equal names are equal sizes), None where nothing is known. None in place of the
            tuple when even the rank is unknown.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        dims = "?" if self.shape is None else ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {self.dtype}[{dims}]"


_TARGET = re.compile(r"(?P<runtime>[a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?::(?P<device>[A-Za-z0-9_.]+(?:,[A-Za-z0-9_.]+)*))?")


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A runtime and, where it has several, the device: ``ort-cpu``, ``ort-cuda:0``, ``tensorrt-rtx:sm86,sm89``."""

    runtime: str
    device: str | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """Reads ``runtime[:device]``. Raises InvalidInput on anything else."""
        match = _TARGET.fullmatch(text)
        if match is None:
            raise InvalidInput(f"not a target: {text!r}", hint="write RUNTIME or RUNTIME:DEVICE, such as ort-cpu")
        return cls(match["runtime"], match["device"])

    def __str__(self) -> str:
        return self.runtime if self.device is None else f"{self.runtime}:{self.device}"


@dataclasses.dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend works on this machine.

    Attributes:
        available: whether a session can be made here.
        version: the runtime's version, when it could be asked.
        reason: why not, in one line. None when it is available.
        remedy: the one command that mends it. None when it is available or nothing would.
    """

    available: bool
    version: str | None = None
    reason: str | None = None
    remedy: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """What a backend made of a graph, as files under one directory.

    Attributes:
        target: what it was compiled for.
        directory: the folder that holds it; nothing in it refers to anything outside.
        model_file: the portable ONNX, relative to the folder (POSIX). Runs wherever the runtime does.
            None where the backend has no portable form.
        prepared_file: the form that loads fastest but is bound to the machine and the runtime that
            made it, relative to the folder. None when there is none.
        fingerprint: what ``prepared_file`` is bound to, each as text. It is used only where all of
            it is equal on the machine that loads.
        remarks: what a person should know, such as why there is no prepared file.
        trusted: the caller vouches for files that are native code, wherever they were made. Never written down.
    """

    target: Target
    directory: Path
    model_file: str | None
    prepared_file: str | None = None
    fingerprint: Mapping[str, str] = dataclasses.field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    trusted: bool = False

    def to_json(self) -> dict[str, Any]:
        """Everything but the folder and the trust, as JSON values; ``from_json`` with the folder reads it back."""
        return {
            "target": str(self.target),
            "model_file": self.model_file,
            "prepared_file": self.prepared_file,
            "fingerprint": dict(self.fingerprint),
            "remarks": list(self.remarks),
        }

    @classmethod
    def from_json(cls, directory: Path, tree: Mapping[str, Any]) -> Compiled:
        """Reads ``to_json``. Raises KeyError where an entry is missing, InvalidInput on a bad target."""
        target = Target.parse(tree["target"])
        remarks = tuple(tree.get("remarks", ()))
        return cls(target, directory, tree["model_file"], tree["prepared_file"], dict(tree["fingerprint"]), remarks)


class Binding(abc.ABC):
    """Preallocated buffers for one set of shapes: write into ``inputs``, ``run()``, read ``outputs``.

    The arrays stay the same objects for the life of the binding. One binding serves one thread.
    """

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    @abc.abstractmethod
    def run(self) -> None:
        """Runs the model from ``inputs`` to ``outputs`` without a copy."""


class Session(abc.ABC):
    """A model that is ready to run. Made by ``runtimes.load``. Safe to use from many threads."""

    target: Target
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    #: what was chosen when this was loaded and why: variant, file, runtime version, remarks.
    info: Mapping[str, str]

    @abc.abstractmethod
    def run(self, feeds: Mapping[str, Any], /, *, outputs: Place = "host") -> dict[str, Any]:
        """Runs the model once.

        Args:
            feeds: an array for each of ``inputs``, of exactly its dtype; nothing is cast. A session on a GPU also
                takes arrays that are there already (DLPack or ``__cuda_array_interface__``), and does not copy them.
            outputs: where the results are left: "host" gives numpy arrays; "device" gives arrays in the memory of
                the session's device, with DLPack where that is a GPU. On a CPU both are the same.

        Returns:
            A new array for each of ``outputs``, in their order.

        Raises:
            InvalidInput: a name, dtype, rank or fixed dimension is not the model's.
            RunFailed: the runtime failed.
            SessionClosed: after ``close()``.
        """

    @abc.abstractmethod
    def bind(self, shapes: Mapping[str, Sequence[int]], /) -> Binding:
        """Allocates inputs and outputs for one set of input shapes.

        Raises:
            InvalidInput: a shape that the model does not take, or outputs whose shape depends on data.
        """

    def trim(self) -> None:  # noqa: B027 - a runtime that keeps nothing has nothing to do
        """Gives back the memory that is kept for later runs, as far as the runtime is able to.

        Runtimes keep what their largest run so far took. The next run takes anew what it needs, which costs time: not
        for between two runs. Threads may run the model meanwhile; what they use is kept, and by some all else.

        Raises:
            SessionClosed: after ``close()``, where there is something to give back.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Frees the model. Later calls raise SessionClosed; closing twice is fine."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Backend(abc.ABC):
    """A runtime. One file each; the module's ``BACKEND`` is an instance. Heavy imports go inside methods."""

    #: the name that targets use
    name: ClassVar[str]
    #: ONNX Runtime's execution provider and device class, for the package manifest
    execution_provider: ClassVar[str | None]
    device_class: ClassVar[str]
    #: a frozen dataclass: the typed session options
    options_type: ClassVar[type]
    #: the runtime's own packages, any of which will do; where none is installed, asking is safe in any process
    packages: ClassVar[tuple[str, ...]] = ()
    #: the option that sets the number of threads; None where there is none
    threads_option: ClassVar[str | None] = None

    @abc.abstractmethod
    def probe(self) -> Availability:
        """Says whether this backend works here, cheaply and without raising."""

    def can_compile(self, target: Target) -> Availability:
        """Says whether ``compile`` works here for a target. Some compile for devices that are not here."""
        return self.probe()

    def watched(self, progress: Callable[[str, float | None], None]) -> contextlib.AbstractContextManager[None]:
        """Within the block, ``progress`` is told what a long ``compile`` is at and, where it is known, which share is
        done, 0..1. By default nothing is told."""
        return contextlib.nullcontext()

    def can_run(self, target: Target) -> Availability:
        """Says whether ``load`` works here for a target, without raising."""
        return self.probe()

    @abc.abstractmethod
    def compile(self, model: Path, target: Target, directory: Path, *, options: Any = None) -> Compiled:
        """Compiles an ONNX file into ``directory`` (made if needed; empty).

        Raises:
            InvalidModel: the file is not a model.
            CompileFailed: the runtime refused it.
            TargetUnavailable: this backend does not work here.
        """

    def selects(self, compiled: Compiled, *, options: Any = None) -> str:
        """Says which file ``load`` will open here, relative to the folder, without opening it.

        A package checks the digests of that file and of those that belong to it, and of no others.
        """
        return compiled.model_file or compiled.prepared_file or ""

    @abc.abstractmethod
    def load(self, compiled: Compiled, *, options: Any = None) -> Session:
        """Makes a session of what ``compile`` wrote, here or elsewhere.

        Raises:
            InvalidModel, TargetUnavailable, CompileFailed.
        """
