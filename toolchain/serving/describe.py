"""What a server tells of itself and its models, as JSON values: metadata, statistics, the index of the repository."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Awaitable, Callable
from typing import Any

from runtimes import TensorSpec
from toolchain.serving import wire
from toolchain.serving.base import Hosted, ModelInfo, NotFound
from toolchain.serving.statistics import Statistics, Sum

#: Triton's names of the parts of the protocol beyond its core, each of them served whole.
EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "parameters",
    "schedule_policy",
    "statistics",
)
NAME = "onnx-toolchain"
#: Gives the counts of all workers together, as ``statistics`` has them. Raises Unavailable.
Everywhere = Callable[[], Awaitable[list[dict[str, Any]]]]


def server(*, shared_memory: bool = False) -> dict[str, Any]:
    """Name, version and extensions of this server; with ``system_shared_memory`` where that is on."""
    shared = ["system_shared_memory"] if shared_memory else []
    try:
        version = importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return {"name": NAME, "version": version, "extensions": sorted([*EXTENSIONS, *shared])}


def model(served: Hosted, name: str, version: str = "") -> dict[str, Any]:
    """A model's inputs, outputs and versions. Raises NotFound, Unavailable."""
    info = served.info(name, version)
    return {
        "name": info.name,
        "versions": [version] if version else list(served.versions(name)),
        "platform": info.platform,
        "inputs": [_tensor(spec) for spec in info.inputs],
        "outputs": [_tensor(spec) for spec in info.outputs],
    }


async def statistics(
    served: Hosted, name: str = "", version: str = "", *, everywhere: Everywhere | None = None
) -> list[dict[str, Any]]:
    """The counts of every version of every model, or of what is asked for.

    Args:
        served: says which there are.
        name: of a model; "" is all.
        version: of that model; "" is all.
        everywhere: asked for the counts themselves; None: this process is the whole server.

    Raises:
        NotFound: there is no such model or version.
        Unavailable: other workers have counts, and cannot be asked.
    """
    known = served.all_statistics()
    found = []
    for each in (name,) if name else served.names():
        versions = served.versions(each)
        if version and version not in versions:
            raise NotFound(f"model {each!r} has no version {version!r}", hint=f"it has: {', '.join(versions)}")
        for number in (version,) if version else versions:
            found.append(_statistics(each, number, known.get((each, number)) or Statistics()))
    if everywhere is None:
        return found
    summed = {(entry["name"], entry["version"]): entry for entry in await everywhere()}
    return [summed.get((entry["name"], entry["version"]), entry) for entry in found]


def index(served: Hosted, *, ready: bool = False) -> list[dict[str, str]]:
    """Every version of every model with its state; only what is ready, if asked."""
    fields = ("name", "version", "state", "reason")
    entries = [{field: str(entry.get(field) or "") for field in fields} for entry in served.index()]
    return [entry for entry in entries if entry["state"] == "READY"] if ready else entries


def count_refused(served: Hosted, info: ModelInfo, received_ns: int) -> None:
    """Counts a request for a model that could not be read as one that failed."""
    counts = served.all_statistics().get((info.name, info.version))
    if counts is not None:
        counts.rejected("OTHER", total_ns=time.monotonic_ns() - received_ns)


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": wire.datatype(spec), "shape": wire.dims(spec)}


def _duration(sum_: Sum) -> dict[str, int]:
    return {"count": sum_.count, "ns": sum_.ns}


def _statistics(name: str, version: str, counts: Statistics) -> dict[str, Any]:
    return {
        "name": name,
        "version": version,
        "last_inference": counts.last_inference_ms,
        "inference_count": counts.inference_count,
        "execution_count": counts.execution_count,
        "inference_stats": {
            "success": _duration(counts.success),
            "fail": _duration(counts.failed),
            "queue": _duration(counts.queue),
            "compute_input": _duration(counts.input),
            "compute_infer": _duration(counts.infer),
            "compute_output": _duration(counts.output),
            "cache_hit": _duration(counts.cache_hit),
            "cache_miss": _duration(counts.cache_miss),
        },
        # Of models that answer several times to one request; there are none.
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": _duration(batch.input),
                "compute_infer": _duration(batch.infer),
                "compute_output": _duration(batch.output),
            }
            for rows, batch in sorted(counts.batches.items())
        ],
        "memory_usage": [],
    }
