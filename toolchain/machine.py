"""What this machine is: processor, memory, system and package versions, for reports and provenance."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import re
from pathlib import Path

#: What a build's result can depend on; absent ones are left out.
PACKAGES = (
    "numpy", "onnx", "onnx-ir", "onnxscript", "onnxsim", "onnxruntime", "onnxruntime-gpu", "onnx-toolchain",
    "openvino", "tensorrt", "tensorrt-rtx-cu13", "torch", "transformers",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """This machine. ``memory`` in bytes; ``packages`` maps distribution to version."""

    cpu: str
    cores: int
    memory: int
    system: str
    python: str
    packages: dict[str, str]


def cpu_model() -> str:
    """The processor's name as it states it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        text = info.read_text(errors="replace")
        match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def package_versions() -> dict[str, str]:
    """The installed versions of PACKAGES."""
    import importlib.metadata  # 4 MB, with its email and zipfile, which who only counts cores does without

    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def this_machine() -> Machine:
    """Reads it off the running system."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return Machine(
        cpu_model(), usable_cores(), memory, f"{platform.system()} {platform.machine()}", platform.python_version(),
        dict(package_versions()),
    )  # fmt: skip
