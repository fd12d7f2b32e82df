"""Adds up the Prometheus metrics of several processes.

The last report of a process that has ended still counts, since counters must not fall.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from compiledllm.remote.shared_wire import MetricFamily

_Sample = tuple[str, tuple[tuple[str, str], ...]]  # name, labels


def families_of(registry: CollectorRegistry) -> list[MetricFamily]:
    """The metrics of a registry, as plain data."""
    return [
        MetricFamily(
            metric.name,
            metric.documentation,
            metric.type,  # type: ignore[arg-type]  # the kinds in use
            [(sample.name, sample.labels, sample.value) for sample in metric.samples],
        )
        for metric in registry.collect()
    ]


class ProcessMetrics(Collector):
    """The sum of the latest metrics of all processes."""

    def __init__(self) -> None:
        self._latest: dict[str, list[MetricFamily]] = {}  # by process
        self._ended: list[MetricFamily] = []  # of all processes that have ended

    def put(self, process: str, families: list[MetricFamily]) -> None:
        """Replace a process's metrics."""
        self._latest[process] = families

    def retire(self, process: str) -> None:
        """Note that a process has ended. Its metrics still count."""
        of_process = self._latest.pop(process, [])
        self._ended = added_up([self._ended, of_process])

    def collect(self) -> Iterator[Metric]:
        for family in added_up([self._ended, *self._latest.values()]):
            metric = Metric(family.name, family.text, family.kind)
            for sample in family.samples:
                metric.add_sample(*sample)
            yield metric


def added_up(reports: Iterable[list[MetricFamily]]) -> list[MetricFamily]:
    """The sums of reports, as one report; of creation times (`_created`), the earliest."""
    first: dict[str, MetricFamily] = {}
    sums: dict[str, dict[_Sample, float]] = {}
    for families in reports:
        for family in families:
            first.setdefault(family.name, family)
            of_family = sums.setdefault(family.name, {})
            for name, labels, value in family.samples:
                key = name, tuple(labels.items())
                if name.endswith("_created"):
                    of_family[key] = min(value, of_family.get(key, value))
                else:
                    of_family[key] = of_family.get(key, 0.0) + value
    return [
        MetricFamily(
            name,
            family.text,
            family.kind,
            [(sample, dict(labels), value) for (sample, labels), value in sums[name].items()],
        )
        for name, family in first.items()
    ]
