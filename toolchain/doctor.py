"""What this machine can run, and why not."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil

import runtimes
from runtimes import Availability
from toolchain.cache import cache_root
from toolchain.machine import Machine, this_machine


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """Something a user should know. ``remedy`` is the one command or step that mends it."""

    what: str
    remedy: str


@dataclasses.dataclass(frozen=True, slots=True)
class Diagnosis:
    """The machine, each runtime's state, and what is wrong."""

    machine: Machine
    runtimes: dict[str, Availability]
    sources: dict[str, Availability]
    cache: str
    cache_free: int
    findings: tuple[Finding, ...]


#: Where models come from, beside .onnx, which always works: the package that each kind needs.
_SOURCES = {
    "torch (zoo, file.py:factory, .pt2)": ("torch", "pip install 'onnx-toolchain[export]'"),
    "transformers (zoo, hf:)": ("transformers", "pip install 'onnx-toolchain[export]'"),
    "timm:": ("timm", "pip install timm (it needs a torchvision that fits the installed torch)"),
    "torchvision:": ("torchvision", "pip install a torchvision that fits the installed torch"),
    "image folders": ("pillow", "pip install 'onnx-toolchain[images]'"),
}


def diagnose() -> Diagnosis:
    """Asks every backend and looks for what is known to go wrong. Imports no torch."""
    findings = []
    installed = {name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)}
    if len(installed) == 2:
        findings.append(
            Finding(
                "onnxruntime and onnxruntime-gpu are both installed; they overwrite each other's files",
                "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install the one that you want",
            )
        )
    sources = {}
    for name, (package, remedy) in _SOURCES.items():
        version = _version(package)
        sources[name] = (
            Availability(True, version) if version else Availability(False, None, f"{package} is not installed", remedy)
        )
    root = cache_root()
    place = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < 2e9:
        findings.append(
            Finding(
                f"only {free / 1e9:.1f} GB are free where the cache is",
                "toolchain cache clear, or set TOOLCHAIN_CACHE",
            )
        )
    return Diagnosis(this_machine(), runtimes.available(), sources, str(root), free, tuple(findings))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
