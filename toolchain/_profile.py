"""Child process of ``layer_latency.py``: runs a model under ONNX Runtime's profiler and says what each node took."""

from __future__ import annotations

import bisect
import collections
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

_WARMUP = 3


def main() -> int:
    job = json.load(sys.stdin)
    try:
        import onnxruntime
    except ImportError as error:
        sys.stderr.write(f"onnxruntime is not installed: {error}\n")
        return 1
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(job["folder"]) / "profile")
    options.optimized_model_filepath = str(Path(job["folder"]) / "optimised.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
    options.intra_op_num_threads = job["threads"]
    try:
        session = onnxruntime.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
        with np.load(job["inputs"]) as file:
            feeds = {name: file[name] for name in file.files}
        for _ in range(_WARMUP + job["runs"]):
            session.run(None, feeds)
        trace = session.end_profiling()
    except Exception as error:  # noqa: BLE001 - the runtime's classes share no base; the parent makes it a RunFailed
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 1
    sys.stdout.write(json.dumps(_summary(json.loads(Path(trace).read_text()))) + "\n")
    return 0


def _summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The median over runs of each node's time and of the run's; the profiler counts in microseconds."""
    whole = sorted((e["ts"], e["dur"]) for e in events if e["cat"] == "Session" and e["name"] == "model_run")
    starts = [start for start, _ in whole]
    taken: dict[tuple[str, str], dict[int, float]] = {}
    for event in events:
        if event["cat"] != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        run = bisect.bisect_right(starts, event["ts"]) - 1
        if run >= _WARMUP:  # a node in a loop runs several times in a run
            key = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
            taken.setdefault(key, collections.defaultdict(float))[run] += event["dur"]
    count = len(whole) - _WARMUP
    return {
        "nodes": [
            (name, op, statistics.median([*times.values(), *[0.0] * (count - len(times))]) / 1e3)
            for (name, op), times in taken.items()
        ],
        "total_ms": statistics.median(duration for _, duration in whole[_WARMUP:]) / 1e3,
        "runs": count,
    }


if __name__ == "__main__":
    sys.exit(main())
