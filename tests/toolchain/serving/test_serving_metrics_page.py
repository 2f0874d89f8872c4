"""The metrics page: Triton's names, what Prometheus' own parser reads out of it, and the sum over workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families

from toolchain.serving import metrics_page
from toolchain.serving.base import Hosted
from toolchain.serving.statistics import Statistics

#: From Triton's documentation of its metrics.
TRITON = {
    "nv_inference_request_success", "nv_inference_request_failure", "nv_inference_count", "nv_inference_exec_count",
    "nv_inference_pending_request_count", "nv_inference_request_duration_us", "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us", "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us", "nv_cache_num_hits_per_model", "nv_cache_num_misses_per_model",
    "nv_cache_hit_duration_per_model", "nv_cache_miss_duration_per_model", "nv_model_load_duration_secs",
    "nv_cpu_memory_used_bytes", "nv_cpu_memory_total_bytes",
}  # fmt: skip


class Models:
    """As much of the models as the page asks for."""

    def __init__(self, counts: dict[tuple[str, str], Statistics]) -> None:
        self.counts = counts

    def all_statistics(self) -> Mapping[tuple[str, str], Statistics]:
        return self.counts

    def index(self) -> list[dict[str, Any]]:
        return [{"name": name, "version": version, "state": "READY", "reason": ""} for name, version in self.counts] + [
            {"name": "broken", "version": "", "state": "UNAVAILABLE", "reason": "no manifest"}
        ]

    def resources(self) -> dict[str, Any]:
        models = [{"model": name, "version": version, "load_seconds": 1.25} for name, version in self.counts]
        return {"models": models, "evictions": 3}

    def cache_statistics(self) -> dict[str, Any]:
        return {"bytes": 10, "entries": 2}


def page(counts: dict[tuple[str, str], Statistics]) -> str:
    return metrics_page.render(cast(Hosted, Models(counts)))


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What the parser reads; it puts ``_total`` behind the name of every counter, whether it is there or not."""
    return {
        (sample.name.removesuffix("_total"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def counted() -> Statistics:
    s = Statistics()
    s.executed(3, input_ns=1_000, infer_ns=2_000_000, output_ns=3_000)
    s.executed(8, input_ns=1_000, infer_ns=4_000_000, output_ns=3_000)
    for _ in range(4):
        s.succeeded(total_ns=6_000_000, queue_ns=500_000, input_ns=500, infer_ns=1_500_000, output_ns=1_500)
    s.answered_from_cache(total_ns=20_000, lookup_ns=7_000)
    s.cache_miss.add(9_000)
    s.rejected("REJECTED")
    s.rejected("BACKEND")
    s.rejected("BACKEND")
    s.pending = 5
    return s


def test_every_number_is_what_was_counted() -> None:
    found = samples(page({("resnet", "3"): counted()}))

    def of(name: str, **more: str) -> float:
        return found[name, frozenset({"model": "resnet", "version": "3", **more}.items())]

    assert of("nv_inference_request_success") == 5
    assert of("nv_inference_request_failure", reason="BACKEND") == 2
    assert of("nv_inference_request_failure", reason="REJECTED") == 1
    assert of("nv_inference_request_failure", reason="CANCELED") == 0
    assert of("nv_inference_count") == 11
    assert of("nv_inference_exec_count") == 2
    assert of("nv_inference_pending_request_count") == 5
    assert of("nv_inference_request_duration_us") == 4 * 6000 + 20
    assert of("nv_inference_queue_duration_us") == 2000
    assert of("nv_inference_compute_input_duration_us") == 2
    assert of("nv_inference_compute_infer_duration_us") == 6000
    assert of("nv_inference_compute_output_duration_us") == 6
    assert of("nv_cache_num_hits_per_model") == 1
    assert of("nv_cache_hit_duration_per_model") == 7
    assert of("nv_cache_miss_duration_per_model") == 9
    assert of("nv_model_load_duration_secs") == 1.25
    assert of("toolchain_batch_rows_bucket", le="2") == 0
    assert of("toolchain_batch_rows_bucket", le="4") == 1
    assert of("toolchain_batch_rows_bucket", le="8") == 2
    assert of("toolchain_batch_rows_sum") == 11
    assert of("toolchain_compute_seconds_sum") == pytest.approx(0.006)
    assert of("toolchain_request_seconds_bucket", le="0.005") == 1
    assert of("toolchain_request_seconds_bucket", le="0.01") == 5
    assert of("toolchain_request_seconds_bucket", le="+Inf") == of("toolchain_request_seconds_count") == 5
    assert found["toolchain_evictions", frozenset()] == 3
    assert found["nv_cpu_memory_used_bytes", frozenset()] > 1 << 20


def test_all_names_of_triton_are_there() -> None:
    families = {family.name for family in text_string_to_metric_families(page({("m", "1"): counted()}))}
    assert families >= TRITON
    lines = page({("m", "1"): counted()}).splitlines()
    for name in TRITON:
        assert any(line.startswith((f'{name}{{model="m",version="1"', f"{name} ")) for line in lines), name


def test_names_of_models_cannot_break_the_page() -> None:
    name = 'a"} 7\nnv_inference_count{model="b\\'
    found = samples(page({(name, "1"): counted()}))
    assert found["nv_inference_count", frozenset({("model", name), ("version", "1")})] == 11


def test_bounds_are_written_short() -> None:
    text = page({("m", "1"): Statistics()})
    assert 'le="5e-05"' in text
    assert "000000" not in text.split("# HELP toolchain_model_ready")[0]


def test_workers_are_summed_and_a_dead_one_keeps_its_counts() -> None:
    combined = metrics_page.Combined()
    one, two = {("m", "1"): counted()}, {("m", "1"): counted(), ("n", "1"): counted()}
    both = samples(combined.page([page(one), page(two)]))
    m = frozenset({("model", "m"), ("version", "1")})
    n = frozenset({("model", "n"), ("version", "1")})
    assert both["nv_inference_count", m] == 22
    assert both["nv_inference_count", n] == 11
    assert both["nv_inference_pending_request_count", m] == 10
    assert both["toolchain_request_seconds_bucket", m | {("le", "0.01")}] == 10
    assert both["nv_model_load_duration_secs", m] == 1.25, "not a sum"
    total = both["nv_cpu_memory_total_bytes", frozenset()]
    assert total == samples(page(one))["nv_cpu_memory_total_bytes", frozenset()]

    combined.retire(page(two))  # it died; another one begins at nothing
    after = samples(combined.page([page(one), page({("m", "1"): Statistics()})]))
    assert after["nv_inference_count", m] == 22
    assert after["nv_inference_count", n] == 11
    assert after["toolchain_request_seconds_count", m] == 10
    assert after["nv_inference_pending_request_count", m] == 5, "what waited in a dead worker waits no more"


def test_no_worker_is_an_empty_page() -> None:
    assert metrics_page.Combined().page([]) == ""
