"""Which TensorRT is here, and all that differs between TensorRT 10, TensorRT 11 and TensorRT-RTX.

The rest of the code uses only names that all three have. What one of them lacks stands in ``FLAVORS`` and is asked
for there; a test holds both against the name lists of the real bindings.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import re
from typing import Any

from runtimes.base import Availability, TargetUnavailable


@dataclasses.dataclass(frozen=True, slots=True)
class Flavor:
    """One line of TensorRT, as far as it differs from the others.

    Attributes:
        target: the runtime's name in targets.
        major: of the version.
        title: for people.
        module: what is imported.
        install: the command that installs it.
        strongly_typed_flag: whether a strongly typed network has to be asked for; the others know no other.
        cross_compiles: whether engines are built for compute capabilities that are named, without a GPU.
        timing_cache: whether the builder times kernels, and keeps what it timed. TensorRT-RTX chooses kernels when
            an engine is first run.
        version_compatible: whether an engine can be made to run on later versions.
        hardware_compatible: whether an engine can be made to run on other GPUs than the one it was built on.
        records_graphs: whether it records runs as CUDA graphs itself, as the runtime configuration says; and keeps the
            kernels that it compiles when an engine is first run in a runtime cache.
        any_os: whether an engine built on Linux runs on Windows and the reverse.
        names: those that our code uses and not all flavors have: ``Class`` or ``Class.member``.
    """

    target: str
    major: int
    title: str
    module: str
    install: str
    strongly_typed_flag: bool
    cross_compiles: bool
    timing_cache: bool
    version_compatible: bool
    hardware_compatible: bool
    records_graphs: bool
    any_os: bool
    names: tuple[str, ...] = ()


_TENSORRT_10 = Flavor(
    target="tensorrt",
    major=10,
    title="TensorRT",
    module="tensorrt",
    install="pip install 'tensorrt>=10,<12'",
    strongly_typed_flag=True,
    cross_compiles=False,
    timing_cache=True,
    version_compatible=True,
    hardware_compatible=True,
    records_graphs=False,
    any_os=False,
)
FLAVORS = (
    _TENSORRT_10,
    dataclasses.replace(_TENSORRT_10, major=11, strongly_typed_flag=False),
    Flavor(
        target="tensorrt-rtx",
        major=1,
        title="TensorRT-RTX",
        module="tensorrt_rtx",
        install="pip install tensorrt-rtx-cu13",
        strongly_typed_flag=False,
        cross_compiles=True,
        timing_cache=False,
        version_compatible=False,
        hardware_compatible=False,
        records_graphs=True,
        any_os=True,
        names=(
            "ComputeCapability",
            "CudaGraphStrategy",
            "IRuntimeCache",
            "IBuilderConfig.num_compute_capabilities",
            "IBuilderConfig.set_compute_capability",
            "IRuntimeConfig.create_runtime_cache",
            "IRuntimeConfig.cuda_graph_strategy",
            "IRuntimeConfig.set_runtime_cache",
        ),
    ),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Api:
    """A TensorRT that imports.

    Attributes:
        flavor: what is particular about it.
        trt: the module.
        version: its version, such as ``1.7.1.116``.
        cuda: the major version of CUDA that it was built for; the driver has to support it. None where unknown.
    """

    flavor: Flavor
    trt: Any
    version: str
    cuda: int | None

    def network_flags(self) -> int:
        """What ``create_network`` takes for a strongly typed network with explicit batch."""
        if not self.flavor.strongly_typed_flag:
            return 0
        return 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def logger(self) -> Any:
        """A new logger that keeps what it is told, in ``messages``, and prints nothing."""
        return _collector(self.trt)()

    def capabilities(self) -> tuple[str, ...]:
        """The compute capabilities that can be named, such as ``sm89``; none where it does not cross-compile."""
        if not self.flavor.cross_compiles:
            return ()
        found = (re.fullmatch(r"SM(\d+)", name) for name in self.trt.ComputeCapability.__members__)
        return tuple(sorted((match[0].lower() for match in found if match), key=lambda name: int(name[2:])))


@functools.cache
def _collector(trt: Any) -> type:
    class Collector(trt.ILogger):
        """Keeps the last messages that say more than what is going on."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: collections.deque[tuple[str, str]] = collections.deque(maxlen=400)

        def log(self, severity: Any, msg: str) -> None:
            if severity != trt.ILogger.VERBOSE:
                self.messages.append((severity.name, msg))

    return Collector


@functools.cache
def find_api(target: str) -> Api | Availability:
    """The TensorRT of a runtime's name; where there is none, why not.

    Args:
        target: ``tensorrt`` or ``tensorrt-rtx``.
    """
    flavors = [flavor for flavor in FLAVORS if flavor.target == target]
    first = flavors[0]
    if importlib.util.find_spec(first.module) is None:
        return Availability(False, reason=f"{first.module} is not installed", remedy=first.install)
    try:
        trt = importlib.import_module(first.module)
        version = str(trt.__version__)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        # AttributeError: a folder that an uninstall left behind imports as an empty package.
        # RuntimeError: the wheels raise it where their own libraries are missing.
        return Availability(False, reason=f"{first.module} does not import: {error}", remedy=first.install)
    major = int(version.partition(".")[0])
    for flavor in flavors:
        if flavor.major == major:
            return Api(flavor, trt, version, _cuda_major(first.module))
    known = " and ".join(str(flavor.major) for flavor in flavors)
    return Availability(
        False, version, f"{first.module} {version} is installed, but {known} are known here", first.install
    )


def require_api(target: str) -> Api:
    """The TensorRT of a runtime's name. Raises TargetUnavailable where there is none."""
    found = find_api(target)
    if isinstance(found, Availability):
        raise TargetUnavailable(
            found.reason or f"{target} is not here", where=f"target {target}", hint=f"run: {found.remedy}"
        )
    return found


def _cuda_major(module: str) -> int | None:
    """From the name of the distribution, such as tensorrt_rtx_cu13: the module itself does not say."""
    prefix = module.replace("_", "-") + "-cu"
    for distribution in importlib.metadata.packages_distributions().get(module, ()):
        name = distribution.replace("_", "-").lower()
        if name.startswith(prefix) and name.removeprefix(prefix).isdigit():
            return int(name.removeprefix(prefix))
    return None
