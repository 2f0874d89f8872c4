"""ONNX Runtime in one thread: target ``ort-serial``.

For many worker processes side by side, which only get in each other's way with a thread pool each, and for
results that are the same to the last bit whatever the number of cores.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import runtimes
from runtimes.ort_cpu import OrtCpuOptions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SerialOptions:
    """Attributes: arena: keep freed memory for the next run, as in ``OrtCpuOptions``."""

    arena: bool = True


class OrtSerial(runtimes.Backend):
    """The backend of ``ort-serial``: the one of ``ort-cpu`` with settings of its own."""

    name: ClassVar[str] = "ort-serial"
    execution_provider: ClassVar[str | None] = "CPUExecutionProvider"
    device_class: ClassVar[str] = "cpu"
    options_type: ClassVar[type] = SerialOptions
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    def probe(self) -> runtimes.Availability:
        return runtimes.backend("ort-cpu").probe()

    def compile(self, model: Path, target: runtimes.Target, directory: Path, *, options: Any = None) -> Any:
        inner = runtimes.Target("ort-cpu", target.device)
        compiled = runtimes.backend("ort-cpu").compile(model, inner, directory, options=_settings(options))
        return dataclasses.replace(compiled, target=target)

    def load(self, compiled: runtimes.Compiled, *, options: Any = None) -> runtimes.Session:
        inner = dataclasses.replace(compiled, target=runtimes.Target("ort-cpu", compiled.target.device))
        session = runtimes.backend("ort-cpu").load(inner, options=_settings(options))
        session.target = compiled.target
        session.info = {**session.info, "target": str(compiled.target)}
        return session


def _settings(options: SerialOptions | None) -> OrtCpuOptions:
    return OrtCpuOptions(intra_op_threads=1, spinning=False, arena=options is None or options.arena)


BACKEND = OrtSerial()
