"""An engine's metrics in Prometheus' words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from hf_paged.observe.metrics import EngineMetrics
from hf_paged.observe.replicas import ReplicaMetrics


class EngineCollector:
    """What a Prometheus registry reads an engine's metrics from.

    Args:
        prefix: of the names, without the colon.
        labels: of every metric.
    """

    def __init__(self, metrics: EngineMetrics | ReplicaMetrics, prefix: str, labels: dict[str, str]) -> None:
        self._metrics, self._prefix, self._labels = metrics, prefix, labels

    def collect(self) -> Iterator[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        families: dict[str, Any] = {}
        for value in self._metrics.values():
            if value.name not in families:
                make = CounterMetricFamily if value.kind == "counter" else GaugeMetricFamily
                own = [name for name, _ in value.labels]
                families[value.name] = make(f"{self._prefix}:{value.name}", value.help, labels=names + own)
            families[value.name].add_metric(values + [label for _, label in value.labels], value.value)
        yield from families.values()
        buckets: dict[str, HistogramMetricFamily] = {}
        for histogram in self._metrics.histograms():
            if histogram.name not in buckets:
                own = [name for name, _ in histogram.labels]
                name = f"{self._prefix}:{histogram.name}"
                buckets[histogram.name] = HistogramMetricFamily(name, histogram.help, labels=names + own)
            bounds = [str(bound) for bound in histogram.bounds] + ["+Inf"]
            counts = list(zip(bounds, map(float, histogram.cumulative()), strict=True))
            labels = values + [label for _, label in histogram.labels]
            buckets[histogram.name].add_metric(labels, counts, histogram.sum)
        yield from buckets.values()


def exposition(metrics: EngineMetrics | ReplicaMetrics, prefix: str, labels: dict[str, str]) -> bytes:
    """All metrics as the text that Prometheus scrapes."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(metrics, prefix, labels))
    return generate_latest(registry)
