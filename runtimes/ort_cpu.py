"""ONNX Runtime on the CPU: target ``ort-cpu``.

``compile`` writes two forms of a model. ``model.onnx`` runs anywhere. ``prepared/`` is the graph as ONNX
Runtime itself optimises it here, with the weights laid out as its kernels want them, in a file that is
mapped and not read; it loads several times faster, but its layout belongs to the CPU features and to the
build of ONNX Runtime that made it. The fingerprint says which, and ``load`` takes ``prepared/`` only where
all of it is equal.

``load`` also takes a model in ORT format (``.ort``), as bundles for small devices have one. ONNX Runtime verifies the
flatbuffer, which refers to no other file.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import mmap
import platform
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar, Literal

from runtimes._options import check_choice, check_switches, check_whole, own_options
from runtimes._ort import OrtSession, clashing_wheels, make_session
from runtimes.base import (
    Availability,
    Backend,
    Compiled,
    Error,
    InvalidModel,
    Session,
    Target,
    TargetUnavailable,
)
from runtimes.model_file import check_model_file, copy_model

GraphLevel = Literal["disabled", "basic", "extended", "layout", "all"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OrtCpuOptions:
    """Session options of ``ort-cpu``.

    Attributes:
        graph_level: how far ONNX Runtime rewrites the graph when it loads it.
        intra_op_threads: threads inside one operator; 0 takes one for each physical core.
        inter_op_threads: operators that run at once; above 1 also switches to parallel execution, which only
            pays for graphs with wide branches.
        arena: keep freed memory for the next run. Off saves memory and costs time.
        memory_pattern: plan the memory of a run from the run before, for inputs of the same shapes.
        spinning: let idle threads spin for the next operator. Off frees the CPU for others between runs.
    """

    graph_level: GraphLevel = "all"
    intra_op_threads: int = 0
    inter_op_threads: int = 1
    arena: bool = True
    memory_pattern: bool = True
    spinning: bool = True

    def __post_init__(self) -> None:
        check_choice("ort-cpu", self, "graph_level", GraphLevel)
        check_whole("ort-cpu", self, "intra_op_threads", 0, 4096)
        check_whole("ort-cpu", self, "inter_op_threads", 1, 4096)
        check_switches("ort-cpu", self)


class OrtCpu(Backend):
    """The backend of ``ort-cpu``."""

    name: ClassVar[str] = "ort-cpu"
    execution_provider: ClassVar[str | None] = "CPUExecutionProvider"
    device_class: ClassVar[str] = "cpu"
    options_type: ClassVar[type] = OrtCpuOptions
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    threads_option: ClassVar[str | None] = "intra_op_threads"

    def probe(self) -> Availability:
        remedy = "pip install onnxruntime"
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(False, reason="onnxruntime is not installed", remedy=remedy)
        if clash := clashing_wheels("onnxruntime"):
            return clash
        try:
            import onnxruntime

            version = str(onnxruntime.__version__)
        except (ImportError, AttributeError, OSError) as error:
            # AttributeError: a folder that an uninstall left behind imports as an empty package.
            return Availability(
                False,
                reason=f"onnxruntime does not import: {error}",
                remedy="pip install --force-reinstall onnxruntime",
            )
        return Availability(True, version=version)

    def compile(self, model: Path, target: Target, directory: Path, *, options: Any = None) -> Compiled:
        self._require(target)
        options = own_options(self, options)
        copy_model(check_model_file(model), directory)
        portable = directory / "model.onnx"
        try:
            prepared, remark = _prepare(portable, directory / "prepared", options)
        except Error:
            shutil.rmtree(directory / "prepared", ignore_errors=True)
            raise
        if not prepared:
            shutil.rmtree(directory / "prepared", ignore_errors=True)
        return Compiled(
            target,
            directory,
            model_file="model.onnx",
            prepared_file="prepared/model.onnx" if prepared else None,
            fingerprint=fingerprint(options.graph_level) if prepared else {},
            remarks=(remark,) if remark else (),
        )

    def selects(self, compiled: Compiled, *, options: Any = None) -> str:
        file, _ = _select(compiled, own_options(self, options))
        return file

    def load(self, compiled: Compiled, *, options: Any = None) -> Session:
        self._require(compiled.target)
        options = own_options(self, options)
        file, why_not = _select(compiled, options)
        if why_not and why_not.startswith("made for"):
            warnings.warn(
                f"{compiled.directory}: loading the portable model, which takes longer: the prepared one was "
                f"{why_not}. Compile it again on this machine to have both.",
                RuntimeWarning,
                stacklevel=2,
            )
        path = compiled.directory / file
        unranked = frozenset() if path.suffix == ".ort" else check_model_file(path).unranked
        import onnxruntime

        prepared = file == compiled.prepared_file
        session_options = _session_options(options, "disabled" if prepared else options.graph_level)
        session = make_session(path, session_options, ["CPUExecutionProvider"])
        info = {
            "target": str(compiled.target),
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "file": file,
            "prepared": "used" if prepared else f"not used: {why_not}",
            "graph_level": options.graph_level,
            "intra_op_threads": str(options.intra_op_threads or "one per core"),
        }
        arena = "cpu:0" if options.arena else None
        return OrtSession(session, compiled.target, file=path, unranked=unranked, info=info, arena=arena)

    def _require(self, target: Target) -> None:
        if target.device is not None:
            raise TargetUnavailable(f"ort-cpu has no device {target.device!r}", hint="write ort-cpu")
        state = self.probe()
        if not state.available:
            raise TargetUnavailable(f"ort-cpu cannot run here: {state.reason}", hint=f"run: {state.remedy}")


def fingerprint(graph_level: str) -> dict[str, str]:
    """What a prepared file is bound to: ONNX Runtime's version and build, CPU, OS, and graph level."""
    import onnxruntime

    return {
        "onnxruntime": str(onnxruntime.__version__),
        "build": str(onnxruntime.get_build_info()),
        "machine": platform.machine(),
        "os": sys.platform,
        "cpu": _cpu_features(),
        "graph_level": graph_level,
    }


def _select(compiled: Compiled, options: OrtCpuOptions) -> tuple[str, str | None]:
    """The file to open, and why it is not the prepared one."""
    if compiled.prepared_file is None:
        why_not = "; ".join(compiled.remarks) or "there is none"
    else:
        here = fingerprint(options.graph_level)
        differs = [key for key in {**here, **compiled.fingerprint} if here.get(key) != compiled.fingerprint.get(key)]
        if not differs:
            return compiled.prepared_file, None
        if differs == ["graph_level"]:
            why_not = f"it has graph_level {compiled.fingerprint['graph_level']}, not {options.graph_level}"
        else:
            why_not = "made for " + "; ".join(
                _difference(key, compiled.fingerprint.get(key, ""), here.get(key, "")) for key in differs
            )
    if compiled.model_file is None:
        raise InvalidModel(f"nothing here can be loaded: {why_not}", where=str(compiled.directory))
    return compiled.model_file, why_not


def _difference(key: str, made_for: str, here: str) -> str:
    if key != "cpu":
        return f"{key} {made_for or 'unknown'!r}, here it is {here or 'unknown'!r}"
    had, have = set(made_for.split()), set(here.split())
    parts = [f"without {' '.join(sorted(have - had))}"] if have - had else []
    if had - have:
        parts.insert(0, f"with {' '.join(sorted(had - have))}")
    return f"a cpu {' and '.join(parts)}"


def _prepare(portable: Path, directory: Path, options: OrtCpuOptions) -> tuple[bool, str | None]:
    """Saves ONNX Runtime's own optimised graph. Returns whether it is there and, if not, why.

    Raises:
        InvalidModel, CompileFailed: ONNX Runtime does not take the model at all.
    """
    if options.graph_level == "disabled":
        make_session(portable, _session_options(options, "disabled"), ["CPUExecutionProvider"])
        return False, "graph_level disabled leaves nothing to prepare"
    file = directory / "model.onnx"
    try:
        for least in _EXTERNAL_FROM:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            saved = make_session(portable, _saving(options, file, least), ["CPUExecutionProvider"])
            if _kernels_find_their_weights(file):
                break
        else:
            return False, "ONNX Runtime packed weights for its kernels, but not where they could load them from"
    except Error as error:
        # Whose fault it is shows when nothing is saved: this raises if it is the model's.
        make_session(portable, _session_options(options, options.graph_level), ["CPUExecutionProvider"])
        return False, f"ONNX Runtime could not save its optimised graph: {error.what}"
    try:
        check_model_file(file)
        loaded = make_session(file, _session_options(options, "disabled"), ["CPUExecutionProvider"])
    except Error as error:
        return False, f"ONNX Runtime could not load its optimised graph again: {error.what}"
    for list_of in ("get_inputs", "get_outputs"):
        before, after = ([(a.name, a.type, a.shape) for a in getattr(s, list_of)()] for s in (saved, loaded))
        if before != after:
            return (
                False,
                f"its optimised graph has other {list_of.removeprefix('get_')}: {after}, not {before}",
            )
    if _mentions(file, str(directory.resolve())):
        return False, "its optimised graph names a folder of this machine"
    return True, None


#: Weights of so many bytes and more are written to the file that is mapped. ONNX Runtime begins those of a MiB and more
#: on a page and all others where the one before ends, so an odd one among them moves what follows off the cache lines.
_EXTERNAL_FROM = (1 << 10, 1 << 18, 1 << 20)
#: Where a kernel expects what it packed to begin: a cache line, and the widest vector register.
_LINE = 64


def _saving(options: OrtCpuOptions, file: Path, least: int) -> Any:
    """Session options that write ONNX Runtime's optimised graph, with the weights in the layout of the kernels."""
    saving = _session_options(options, options.graph_level)
    saving.optimized_model_filepath = str(file)
    for key, value in (
        # external, so that they are mapped and shared between processes
        ("session.optimized_model_external_initializers_file_name", "model.onnx.data"),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(least)),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        saving.add_session_config_entry(key, value)
    return saving


def _kernels_find_their_weights(file: Path) -> bool:
    """Whether all packed weights begin on a cache line. ONNX Runtime does not see to it, and kernels that load whole
    lines from elsewhere end the process."""
    # "prepacked_0": "MatMul+15048010837058499496|71155712;589824;0", one part with | for each buffer
    return all(int(offset) % _LINE == 0 for offset in re.findall(rb"\|(\d+);\d+;\d", file.read_bytes()))


def _mentions(file: Path, text: str) -> bool:
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(text.encode()) >= 0


def _session_options(options: OrtCpuOptions, graph_level: str) -> Any:
    import onnxruntime

    made = onnxruntime.SessionOptions()
    level = "DISABLE_ALL" if graph_level == "disabled" else f"ENABLE_{graph_level.upper()}"
    made.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    made.intra_op_num_threads = options.intra_op_threads
    if options.inter_op_threads > 1:
        made.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
        made.inter_op_num_threads = options.inter_op_threads
    made.enable_cpu_mem_arena = options.arena
    made.enable_mem_pattern = options.memory_pattern
    for pool in ("intra_op", "inter_op"):
        made.add_session_config_entry(f"session.{pool}.allow_spinning", "1" if options.spinning else "0")
    return made


#: Flags that choose between kernels; the others differ from kernel to kernel of the OS for no reason of ours.
_KERNEL_FLAGS = (
    "sse",
    "ssse",
    "avx",
    "fma",
    "f16c",
    "amx",
    "asimd",
    "sve",
    "sme",
    "bf16",
    "i8mm",
    "neon",
    "lsx",
    "lasx",
)


@functools.cache
def _cpu_features() -> str:
    """The vector extensions of this CPU, sorted, or the next best name for what it is."""
    if sys.platform == "linux":
        # Only the first core's block: with hundreds of cores the kernel takes milliseconds for all of it.
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features", "isa"):
                    return " ".join(sorted(f for f in set(value.split()) if f.startswith(_KERNEL_FLAGS)))
    if sys.platform == "darwin":
        import ctypes

        text = ctypes.create_string_buffer(256)
        size = ctypes.c_size_t(len(text))
        if ctypes.CDLL(None).sysctlbyname(b"machdep.cpu.brand_string", text, ctypes.byref(size), None, 0) == 0:
            return text.value.decode("utf-8", "replace")
    return platform.processor()


BACKEND = OrtCpu()
