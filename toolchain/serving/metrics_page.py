"""The metrics page: Triton's names and labels, and histograms of our own, as Prometheus text.

Format: Prometheus text 0.0.4. Names, units and the labels ``model``, ``version`` and ``reason`` are those of Triton's
metrics (https://github.com/triton-inference-server/server, docs/user_guide/metrics.md), so that dashboards made for it
show this server as well; what Triton does not have is named ``toolchain_…`` with Prometheus' own units.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from toolchain.serving import memory
from toolchain.serving.base import Hosted
from toolchain.serving.statistics import Histogram, Reason, Statistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_REASONS: tuple[Reason, ...] = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
_Value = Callable[[Statistics], float]

#: name, type, help, value of one version.
_OF_VERSIONS: tuple[tuple[str, str, str, _Value], ...] = (
    ("nv_inference_request_success", "counter", "Requests that were answered", lambda s: s.success.count),
    ("nv_inference_count", "counter", "Inferences: a request of n rows is n of them", lambda s: s.inference_count),
    ("nv_inference_exec_count", "counter", "Runs of the model, each of a batch", lambda s: s.execution_count),
    ("nv_inference_pending_request_count", "gauge", "Requests that wait to be run", lambda s: s.pending),
    (
        "nv_inference_request_duration_us", "counter", "Time of answered requests from first byte to answer",
        lambda s: s.success.ns / 1000,
    ),
    ("nv_inference_queue_duration_us", "counter", "Time that requests waited", lambda s: s.queue.ns / 1000),
    (
        "nv_inference_compute_input_duration_us", "counter", "Time to put inputs together",
        lambda s: s.input.ns / 1000,
    ),
    ("nv_inference_compute_infer_duration_us", "counter", "Time that the model ran", lambda s: s.infer.ns / 1000),
    (
        "nv_inference_compute_output_duration_us", "counter", "Time to take outputs apart",
        lambda s: s.output.ns / 1000,
    ),
    ("nv_cache_num_hits_per_model", "counter", "Answers out of the result cache", lambda s: s.cache_hit.count),
    ("nv_cache_num_misses_per_model", "counter", "Lookups that found nothing", lambda s: s.cache_miss.count),
    (
        "nv_cache_hit_duration_per_model", "counter", "Time of lookups that found something, microseconds",
        lambda s: s.cache_hit.ns / 1000,
    ),
    (
        "nv_cache_miss_duration_per_model", "counter", "Time of lookups that found nothing, microseconds",
        lambda s: s.cache_miss.ns / 1000,
    ),
)  # fmt: skip

_HISTOGRAMS: tuple[tuple[str, str, Callable[[Statistics], Histogram]], ...] = (
    ("toolchain_request_seconds", "Time of an answered request", lambda s: s.request_seconds),
    ("toolchain_queue_seconds", "Time that a request waited", lambda s: s.queue_seconds),
    ("toolchain_compute_seconds", "Time of a run of the model", lambda s: s.compute_seconds),
    ("toolchain_batch_rows", "Rows of a run of the model", lambda s: s.batch_rows),
)

#: Gauges that are the machine's and not a process's: of several workers the largest is told, not the sum.
_OF_MACHINE = ("nv_cpu_memory_total_bytes", "nv_model_load_duration_secs", "toolchain_model_ready")


def render(models: Hosted) -> str:
    """The page. Its lines are in the order of their names' tables, so that two pages differ in numbers only."""
    lines: list[str] = []
    versions = sorted(models.all_statistics().items())
    labels = [_labels(model=model, version=version) for (model, version), _ in versions]
    for name, kind, text, value in _OF_VERSIONS:
        _head(lines, name, kind, text)
        lines += [f"{name}{{{label}}} {_number(value(s))}" for label, (_, s) in zip(labels, versions, strict=True)]
    name = "nv_inference_request_failure"
    _head(lines, name, "counter", "Requests that were not answered with a result")
    for label, (_, statistics) in zip(labels, versions, strict=True):
        lines += [f'{name}{{{label},reason="{reason}"}} {statistics.failures[reason]}' for reason in _REASONS]
    for name, text, histogram in _HISTOGRAMS:
        _head(lines, name, "histogram", text)
        for label, (_, statistics) in zip(labels, versions, strict=True):
            lines += _histogram(name, label, histogram(statistics))
    _of_process(lines, models)
    return "\n".join(lines) + "\n"


def _of_process(lines: list[str], models: Hosted) -> None:
    resources = models.resources()
    cache = models.cache_statistics()
    ready = [
        (_labels(model=entry["name"], version=entry["version"]), float(entry["state"] == "READY"))
        for entry in models.index()
        if entry["version"]
    ]
    resident = resources.get("models", [])
    loads = [(_labels(model=one["model"], version=one["version"]), float(one["load_seconds"])) for one in resident]
    total = memory.machine_bytes()
    machine = [] if total is None else [("", float(total))]
    table: tuple[tuple[str, str, str, Iterable[tuple[str, float]]], ...] = (
        ("nv_model_load_duration_secs", "gauge", "Time that the model took to load", loads),
        ("toolchain_model_ready", "gauge", "1 where the version answers at once or after loading", ready),
        ("nv_cpu_memory_used_bytes", "gauge", "Resident memory of this server", [("", float(memory.resident_bytes()))]),
        ("nv_cpu_memory_total_bytes", "gauge", "Memory of the machine", machine),
        ("toolchain_sessions", "gauge", "Versions in memory", [("", float(len(resident)))]),
        ("toolchain_evictions", "counter", "Versions put out of memory", [("", float(resources.get("evictions", 0)))]),
        ("toolchain_cache_bytes", "gauge", "Bytes of the result cache", [("", float(cache.get("bytes", 0)))]),
        ("toolchain_cache_entries", "gauge", "Answers in the result cache", [("", float(cache.get("entries", 0)))]),
    )
    for name, kind, text, samples in table:
        _head(lines, name, kind, text)
        lines += [f"{name}{f'{{{label}}}' if label else ''} {_number(value)}" for label, value in samples]


def _head(lines: list[str], name: str, kind: str, text: str) -> None:
    lines.append(f"# HELP {name} {text}")
    lines.append(f"# TYPE {name} {kind}")


def _labels(**values: str) -> str:
    escaped = {k: v.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"") for k, v in values.items()}
    return ",".join(f'{name}="{value}"' for name, value in escaped.items())


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(round(value, 9))


def _histogram(name: str, label: str, histogram: Histogram) -> Iterable[str]:
    seen = 0
    for bound, count in zip((*map(_bound, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        seen += count
        yield f'{name}_bucket{{{label},le="{bound}"}} {seen}'
    yield f"{name}_sum{{{label}}} {_number(histogram.total)}"
    yield f"{name}_count{{{label}}} {seen}"


def _bound(value: float) -> str:
    return f"{value:.6g}"  # 5e-05 and not 4.9999999999999996e-05


_SAMPLE = re.compile(r"(?P<key>(?P<name>[a-zA-Z_:][\w:]*)(?:\{.*\})?) (?P<value>\S+)")


class Combined:
    """The pages of several workers as one.

    Counters and histograms are summed, and those of a worker that has gone stay in the sum, since a counter that falls
    is read as a restart of the whole server. Gauges are summed too, but for those of the machine.
    """

    def __init__(self) -> None:
        self._gone: dict[str, float] = {}

    def retire(self, page: str) -> None:
        """Keeps the counts of a worker's last page."""
        kinds: dict[str, str] = {}
        for name, key, value in _samples(page, kinds):
            if kinds.get(_family(name, kinds)) in ("counter", "histogram"):
                self._gone[key] = self._gone.get(key, 0.0) + value

    def page(self, pages: Iterable[str]) -> str:
        """One page of those of all workers that run."""
        heads: dict[str, list[str]] = {}
        kinds: dict[str, str] = {}
        values: dict[str, dict[str, float]] = {}
        for page in pages:
            for line in page.splitlines():
                if line.startswith("#"):
                    family = line.split(" ", 3)[2]
                    if line not in heads.setdefault(family, []):
                        heads[family].append(line)
            for name, key, value in _samples(page, kinds):
                found = values.setdefault(_family(name, kinds), {})
                found[key] = max(found.get(key, 0.0), value) if name in _OF_MACHINE else found.get(key, 0.0) + value
        for key, value in self._gone.items():
            family = _family(key.partition("{")[0], kinds)
            if family in heads:
                found = values.setdefault(family, {})
                found[key] = found.get(key, 0.0) + value
        lines = []
        for family, head in heads.items():
            lines += head
            lines += [f"{key} {_number(value)}" for key, value in values.get(family, {}).items()]
        return "\n".join(lines) + "\n" if lines else ""


def _samples(page: str, kinds: dict[str, str]) -> Iterable[tuple[str, str, float]]:
    """Name, name with labels, and value of each line; fills in which families there are."""
    for line in page.splitlines():
        if line.startswith("# TYPE "):
            _, _, family, kind = line.split(" ")
            kinds[family] = kind
        elif match := _SAMPLE.fullmatch(line):
            yield match["name"], match["key"], float(match["value"])


def _family(name: str, kinds: Mapping[str, str]) -> str:
    if name in kinds:
        return name
    for suffix in ("_bucket", "_sum", "_count"):
        if name.endswith(suffix) and name.removesuffix(suffix) in kinds:
            return name.removesuffix(suffix)
    return name
