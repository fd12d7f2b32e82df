"""Metrics of several processes are added up, and those of ended ones kept."""

from __future__ import annotations

import pytest

pytest.importorskip("msgspec")
pytest.importorskip("prometheus_client")

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from compiledllm.remote.shared_wire import MetricFamily, MetricsReport
from compiledllm.server.metrics import Metrics
from compiledllm.server.process_metrics import ProcessMetrics, families_of


def shown_by(metrics: ProcessMetrics) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(metrics)
    text = generate_latest(registry).decode()
    return {
        sample.name + str(sample.labels.get("le", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of_requests(num_tokens: int, seconds: float) -> Metrics:
    """The metrics of a process without an engine of its own."""
    found = Metrics("x:", "model", _NoEngine())  # type: ignore[arg-type]
    found.prompt_tokens.inc(num_tokens)
    found.e2e.observe(seconds)
    found.itl.observe(seconds, times=3)
    return found


class _NoEngine:
    """No engine, neither of this process nor of another."""


def sent(metrics: Metrics) -> list[MetricFamily]:
    """Its metrics, as they come out of a message."""
    raw = msgspec.msgpack.encode(MetricsReport(0, families_of(metrics.registry)))
    return msgspec.msgpack.decode(raw, type=MetricsReport).families


def test_metrics_are_added_up() -> None:
    metrics = ProcessMetrics()
    first, second = of_requests(10, 0.4), of_requests(5, 70.0)
    metrics.put("1", sent(first))
    metrics.put("2", sent(second))
    metrics.put("2", sent(second))  # again, in place of the one before
    shown = shown_by(metrics)
    assert shown["x:prompt_tokens_total"] == 15
    assert shown["x:e2e_request_latency_seconds_bucket0.5"] == 1
    assert shown["x:e2e_request_latency_seconds_bucket+Inf"] == 2
    assert shown["x:e2e_request_latency_seconds_sum"] == pytest.approx(70.4)
    assert shown["x:inter_token_latency_seconds_count"] == 6
    created = [shown_by(one)["x:prompt_tokens_created"] for one in (_only(first), _only(second))]
    assert shown["x:prompt_tokens_created"] == min(created)


def _only(metrics: Metrics) -> ProcessMetrics:
    only = ProcessMetrics()
    only.put("1", families_of(metrics.registry))
    return only


def test_counts_of_ended_processes_stay() -> None:
    metrics = ProcessMetrics()
    for name in "12":
        metrics.put(name, families_of(of_requests(10, 1.0).registry))
        metrics.retire(name)
    metrics.retire("a process that ended before it reported")
    assert shown_by(metrics)["x:prompt_tokens_total"] == 20
    metrics.put("3", families_of(of_requests(1, 1.0).registry))
    assert shown_by(metrics)["x:prompt_tokens_total"] == 21
