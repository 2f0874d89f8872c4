"""What the page shows, as JSON: models, their states, and counts from which it draws latency and throughput.

Only counts that grow are told, so that any number of pages can look, each as often as it likes: what happened between
two looks is their difference, also for the histogram of latencies, from which percentiles follow.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from toolchain.serving.base import Hosted
from toolchain.serving.statistics import SECONDS, Statistics

#: Of one version, summed over workers.
_SUMMED = ("success", "failed", "pending", "rows", "runs", "queue_ns", "compute_ns", "cache_hits")


def collect(hosted: Hosted) -> dict[str, Any]:
    """The numbers of this process."""
    counts = hosted.all_statistics()
    resources = hosted.resources()
    models = []
    for entry in hosted.index():
        s = counts.get((entry["name"], entry["version"])) or Statistics()
        models.append(
            {
                "name": entry["name"], "version": entry["version"], "state": entry["state"],
                "reason": entry["reason"],
                "success": s.success.count, "failed": sum(s.failures.values()), "pending": s.pending,
                "rows": s.inference_count, "runs": s.execution_count, "queue_ns": s.queue.ns,
                "compute_ns": s.infer.ns, "cache_hits": s.cache_hit.count, "seconds": list(s.request_seconds.counts),
            }
        )  # fmt: skip
    return {
        "time": time.time(),
        "workers": 1,
        "resident": resources["resident_bytes"],
        "cap": resources["cap_bytes"],
        "bounds": [float(f"{bound:.6g}") for bound in SECONDS],
        "models": models,
    }


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of several workers as those of one server. ``parts`` is not empty."""
    whole = dict(parts[0], models=[dict(model, seconds=list(model["seconds"])) for model in parts[0]["models"]])
    known = {(model["name"], model["version"]): model for model in whole["models"]}
    for part in parts[1:]:
        whole["workers"] += part["workers"]
        whole["resident"] += part["resident"]
        if whole["cap"] is not None and part["cap"] is not None:
            whole["cap"] += part["cap"]
        for model in part["models"]:
            mine = known.get((model["name"], model["version"]))
            if mine is None:
                known[model["name"], model["version"]] = mine = dict(model, seconds=list(model["seconds"]))
                whole["models"].append(mine)
                continue
            for name in _SUMMED:
                mine[name] += model[name]
            mine["seconds"] = [a + b for a, b in zip(mine["seconds"], model["seconds"], strict=True)]
            if mine["state"] == "READY":  # as ready as the worker that is least so
                mine["state"], mine["reason"] = model["state"], model["reason"]
    return whole
