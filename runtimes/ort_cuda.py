"""ONNX Runtime on an NVIDIA GPU: targets ``ort-cuda`` and ``ort-cuda:N``.

The nodes run in ONNX Runtime's CUDA provider, or, with the option ``tensorrt``, in its TensorRT provider where that
takes them. A node that neither has a kernel for runs on the CPU, between two copies: ``session.info["on_cpu"]`` names
them, and ``cpu_nodes=False`` makes them an error. A model of which no node runs on the GPU is always one, and so is a
machine where the provider does not load: nothing falls back in silence.

``compile`` keeps the ONNX file. What ONNX Runtime makes of it for a GPU is not portable, and it makes it while loading.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from runtimes import _cuda
from runtimes._digests import cache_root
from runtimes._driver import driver
from runtimes._options import bad_option, check_choice, check_switches, own_options
from runtimes._ort import clashing_wheels, make_session
from runtimes._ort_device import OrtCudaSession
from runtimes.base import (
    Availability,
    Backend,
    Compiled,
    CompileFailed,
    Error,
    InvalidModel,
    Session,
    Target,
    TargetUnavailable,
)
from runtimes.model_file import check_model_file, copy_model

GraphLevel = Literal["disabled", "basic", "extended", "layout", "all"]
ArenaExtendStrategy = Literal["next-power-of-two", "same-as-requested"]
ConvAlgoSearch = Literal["exhaustive", "heuristic", "default"]

_INSTALL = "pip install 'onnxruntime-gpu[cuda,cudnn]' cuda-bindings"
_PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider"}
_STRATEGIES = {"next-power-of-two": "kNextPowerOfTwo", "same-as-requested": "kSameAsRequested"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OrtCudaOptions:
    """Session options of ``ort-cuda``; those of the providers are named as ONNX Runtime names them
    (https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html).

    Attributes:
        graph_level: how far ONNX Runtime rewrites the graph when it loads it.
        gpu_mem_limit: the most bytes of GPU memory that the session's arena takes; all there is where None.
        arena_extend_strategy: how much more than was asked for the arena takes when it grows.
        cudnn_conv_algo_search: how the kernel of a convolution is chosen at its first run: by trying all, by cuDNN's
            guess, or always the same one. Trying all makes the first run with each shape slow.
        cudnn_conv_use_max_workspace: let that choice fall on kernels that want much memory.
        use_tf32: let float32 be multiplied with 10 bits of mantissa. Off, so that float32 means that; ONNX Runtime
            itself has it on.
        prefer_nhwc: compute convolutions with channels last, where there is a kernel.
        cuda_graph: record a run with the same shapes once and replay it. Every node has to run on the GPU.
        tensorrt: give TensorRT what it takes; it builds engines while loading, or at the first run of a model with
            sizes that are not fixed, which can take minutes, and keeps them in the user's cache.
        cpu_nodes: allow nodes without a kernel for the GPU to run on the CPU.
    """

    graph_level: GraphLevel = "all"
    gpu_mem_limit: int | None = None
    arena_extend_strategy: ArenaExtendStrategy = "next-power-of-two"
    cudnn_conv_algo_search: ConvAlgoSearch = "exhaustive"
    cudnn_conv_use_max_workspace: bool = True
    use_tf32: bool = False
    prefer_nhwc: bool = False
    cuda_graph: bool = False
    tensorrt: bool = False
    cpu_nodes: bool = True

    def __post_init__(self) -> None:
        check_choice("ort-cuda", self, "graph_level", GraphLevel)
        check_choice("ort-cuda", self, "arena_extend_strategy", ArenaExtendStrategy)
        check_choice("ort-cuda", self, "cudnn_conv_algo_search", ConvAlgoSearch)
        limit = self.gpu_mem_limit
        if limit is not None and (type(limit) is not int or not 1 << 20 <= limit < 1 << 48):
            raise bad_option("ort-cuda", "gpu_mem_limit", limit, "a whole number of bytes from 1048576, or none")
        check_switches("ort-cuda", self)


class OrtCuda(Backend):
    """The backend of ``ort-cuda``."""

    name: ClassVar[str] = "ort-cuda"
    execution_provider: ClassVar[str | None] = "CUDAExecutionProvider"
    device_class: ClassVar[str] = "gpu"
    options_type: ClassVar[type] = OrtCudaOptions
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    def probe(self) -> Availability:
        return self.can_run(Target(self.name))

    def can_compile(self, target: Target) -> Availability:
        return self.can_run(target)

    def can_run(self, target: Target) -> Availability:
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(False, reason="onnxruntime-gpu is not installed", remedy=_INSTALL)
        if clash := clashing_wheels("'onnxruntime-gpu[cuda,cudnn]'"):
            return clash
        try:
            import onnxruntime

            version = str(onnxruntime.__version__)
            offered = onnxruntime.get_available_providers()
        except (ImportError, AttributeError, OSError) as error:
            # AttributeError: a folder that an uninstall left behind imports as an empty package.
            return Availability(False, reason=f"onnxruntime does not import: {error}", remedy=_INSTALL)
        if _PROVIDERS["cuda"] not in offered:
            return Availability(
                False,
                version,
                f"onnxruntime {version} is a build without CUDA",
                f"pip uninstall -y onnxruntime && {_INSTALL}",
            )
        built_for = _cuda_major(onnxruntime)
        try:
            _cuda.require_driver(cuda=built_for, who=f"onnxruntime-gpu {version}")
            _cuda.require_device(_ordinal(target))
        except Error as error:
            return Availability(False, version, error.what)
        if reason := library_missing("cuda"):
            return Availability(False, version, reason, _INSTALL)
        return Availability(True, version)

    def compile(self, model: Path, target: Target, directory: Path, *, options: Any = None) -> Compiled:
        self._require(target)
        options = own_options(self, options)
        copy_model(check_model_file(model), directory)
        compiled = Compiled(
            target, directory, "model.onnx", remarks=("ONNX Runtime prepares a model for the GPU while it loads it",)
        )
        self.load(compiled, options=options).close()  # what it refuses is told now
        return compiled

    def load(self, compiled: Compiled, *, options: Any = None) -> Session:
        self._require(compiled.target)
        options = own_options(self, options)
        ordinal = _ordinal(compiled.target)
        if options.tensorrt and (reason := library_missing("tensorrt")):
            raise TargetUnavailable(
                f"ONNX Runtime's TensorRT provider does not load: {reason}",
                where="option tensorrt of ort-cuda",
                hint="run: pip install 'tensorrt>=10,<11'",
            )
        if compiled.model_file is None:
            raise InvalidModel("there is no ONNX file to load", where=str(compiled.directory))
        checked = check_model_file(compiled.directory / compiled.model_file)
        if options.cuda_graph:
            _cuda.device(ordinal)  # says now that there is no package for the buffers that graphs need
        import onnxruntime

        session = make_session(
            checked.path, _session_options(options), [*provider_options(options, ordinal), "CPUExecutionProvider"]
        )
        check_providers(session.get_providers(), options, str(checked.path))
        nodes = assignment(session)
        check_assignment(nodes, options, str(checked.path))
        info = {
            "target": str(compiled.target),
            "runtime": f"onnxruntime-gpu {onnxruntime.__version__}",
            "file": compiled.model_file,
            "device": driver().gpus[ordinal].name,
            "providers": ", ".join(session.get_providers()),
            "graph_level": options.graph_level,
            "tf32": "on" if options.use_tf32 else "off",
            "cuda_graph": "on" if options.cuda_graph else "off",
            "on_cpu": ", ".join(nodes.on_cpu) or "nothing",
        }
        return OrtCudaSession(
            session,
            compiled.target,
            file=checked.path,
            unranked=checked.unranked,
            info=info,
            ordinal=ordinal,
            cuda_graph=options.cuda_graph,
        )

    def _require(self, target: Target) -> None:
        state = self.can_run(target)
        if not state.available:
            raise TargetUnavailable(
                f"{target} cannot run here: {state.reason}", hint=f"run: {state.remedy}" if state.remedy else None
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Assignment:
    """Where the nodes of a session run.

    Attributes:
        on_gpu: how many run in a provider other than the CPU's.
        on_cpu: those that do not, each as ``name (op type)``, or the op type where it has no name.
    """

    on_gpu: int
    on_cpu: tuple[str, ...]


def assignment(session: Any) -> Assignment:
    """Where ONNX Runtime put the nodes.

    Args:
        session: an ``InferenceSession`` made with ``session.record_ep_graph_assignment_info`` = "1".
    """
    on_gpu, on_cpu = 0, []
    for part in session.get_provider_graph_assignment_info():
        nodes = part.get_nodes()
        if part.ep_name == "CPUExecutionProvider":
            on_cpu += [f"{node.name} ({node.op_type})" if node.name else node.op_type for node in nodes]
        else:
            on_gpu += len(nodes)
    return Assignment(on_gpu, tuple(on_cpu))


def provider_options(options: OrtCudaOptions, ordinal: int) -> list[tuple[str, dict[str, str]]]:
    """The providers that ONNX Runtime is asked for, best first, with their options as it takes them."""
    cuda = {
        "device_id": str(ordinal),
        "arena_extend_strategy": _STRATEGIES[options.arena_extend_strategy],
        "cudnn_conv_algo_search": options.cudnn_conv_algo_search.upper(),
        "cudnn_conv_use_max_workspace": _switch(options.cudnn_conv_use_max_workspace),
        "use_tf32": _switch(options.use_tf32),
        "prefer_nhwc": _switch(options.prefer_nhwc),
        "enable_cuda_graph": _switch(options.cuda_graph and not options.tensorrt),
    }
    if options.gpu_mem_limit is not None:
        cuda["gpu_mem_limit"] = str(options.gpu_mem_limit)
    asked = [(_PROVIDERS["cuda"], cuda)]
    if options.tensorrt:
        tensorrt = {"device_id": str(ordinal), "trt_cuda_graph_enable": _switch(options.cuda_graph)}
        root = cache_root()
        if root is not None:
            folder = root / "ort-tensorrt"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # engines are native code: nobody else's
            tensorrt |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}
            tensorrt |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(folder)}
        asked.insert(0, (_PROVIDERS["tensorrt"], tensorrt))
    return asked


def nvidia_folders(site: Path) -> list[Path]:
    """Where NVIDIA's packages keep libraries, as far as ONNX Runtime does not look there by itself.

    It looks in the folder that it is installed in, and where torch brought CUDA, in torch. On a machine where it was
    unpacked beside what was there, as on one without a registry, torch's packages are somewhere else on the path.

    Args:
        site: the folder that holds ONNX Runtime's package.
    """
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or () if spec else ())]
    return [folder for root in roots if root.parent != site for folder in sorted(root.glob("*/lib"))]


@functools.cache
def library_missing(provider: str) -> str | None:
    """Why the library of a provider of ONNX Runtime does not load, in one line; None where it does.

    ONNX Runtime itself writes this to the log and goes on with the CPU.

    Args:
        provider: ``cuda`` or ``tensorrt``.
    """
    import onnxruntime

    # CUDA and cuDNN from their own packages or the system; what it prints, the load below says better.
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()
        for libraries in nvidia_folders(Path(onnxruntime.__file__).parent.parent):
            onnxruntime.preload_dlls(directory=str(libraries))
    if provider == "tensorrt" and importlib.util.find_spec("tensorrt"):
        # Loads the libraries that the provider is linked against.
        with contextlib.suppress(ImportError, OSError, RuntimeError):
            importlib.import_module("tensorrt")
    folder = os.path.join(os.path.dirname(onnxruntime.__file__), "capi")
    prefix, suffix = ("", ".dll") if os.name == "nt" else ("lib", ".so")
    try:
        for name in ("shared", provider):
            ctypes.CDLL(os.path.join(folder, f"{prefix}onnxruntime_providers_{name}{suffix}"))
    except OSError as error:
        return str(error)
    return None


def check_providers(providers: Sequence[str], options: OrtCudaOptions, where: str) -> None:
    """Raises TargetUnavailable where a provider that was asked for is not among those of a session."""
    for provider, wanted in (("cuda", True), ("tensorrt", options.tensorrt)):
        if wanted and _PROVIDERS[provider] not in providers:
            raise TargetUnavailable(
                f"ONNX Runtime fell back from {_PROVIDERS[provider]} to {', '.join(providers)}",
                where=where,
                hint="its log says why: onnxruntime.set_default_logger_severity(0), then load again",
            )


def check_assignment(nodes: Assignment, options: OrtCudaOptions, where: str) -> None:
    """Raises CompileFailed where nothing runs on the GPU, or something on the CPU that may not."""
    if nodes.on_cpu and not nodes.on_gpu:
        raise CompileFailed(
            f"no node of the model runs on the GPU: {_listed(nodes.on_cpu)}", where=where, hint="load it on ort-cpu"
        )
    if nodes.on_cpu and not options.cpu_nodes:
        raise CompileFailed(
            f"{len(nodes.on_cpu)} nodes run on the CPU: {_listed(nodes.on_cpu)}",
            where=where,
            hint="allow it with cpu_nodes=True, or change the graph there",
        )


def _listed(names: tuple[str, ...], most: int = 10) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _session_options(options: OrtCudaOptions) -> Any:
    import onnxruntime

    made = onnxruntime.SessionOptions()
    level = "DISABLE_ALL" if options.graph_level == "disabled" else f"ENABLE_{options.graph_level.upper()}"
    made.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    made.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return made


def _switch(on: bool) -> str:
    return "1" if on else "0"


def _cuda_major(onnxruntime: Any) -> int | None:
    text = str(getattr(onnxruntime, "cuda_version", None) or "").partition(".")[0]
    return int(text) if text.isdigit() else None


def _ordinal(target: Target) -> int:
    """Raises TargetUnavailable where the device is no number."""
    if target.device is None:
        return 0
    if not target.device.isdigit():
        raise TargetUnavailable(f"ort-cuda has no device {target.device!r}", hint="write ort-cuda:0, the GPU's number")
    return int(target.device)


BACKEND = OrtCuda()
