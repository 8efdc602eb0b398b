"""Metrics of an engine, or of several replicas of one."""

from __future__ import annotations

from dataclasses import replace

from hf_paged.distributed.replicated import ReplicatedEngine
from hf_paged.engine.engine import Engine
from hf_paged.llm.worker import Worker
from hf_paged.observe.metrics import EngineMetrics, Histogram, Value

PATIENCE_S = 5.0
"""How long replicas may take to say what they have counted."""

Told = tuple[list[Value], list[Histogram]]


class ReplicaMetrics:
    """As `EngineMetrics`, with a label `engine` that has the replica's number. What a lost one had counted is gone."""

    def __init__(self, engine: ReplicatedEngine) -> None:
        self._engine = engine
        engine.call(_watch)

    def close(self) -> None:
        """The replicas count on until they end."""

    def values(self) -> list[Value]:
        labelled = []
        for number, (values, _) in self._told():
            labelled += [replace(value, labels=(("engine", number), *value.labels)) for value in values]
        return labelled

    def histograms(self) -> list[Histogram]:
        labelled = []
        for number, (_, histograms) in self._told():
            for histogram in histograms:
                histogram.labels = (("engine", number),)
                labelled.append(histogram)
        return labelled

    def _told(self) -> list[tuple[str, Told]]:
        return [(str(number), told) for number, told in self._engine.call(_read, PATIENCE_S, long=False)]


def metrics_of(engine: Engine | ReplicatedEngine) -> EngineMetrics | ReplicaMetrics:
    """Begins to count what an engine does."""
    return ReplicaMetrics(engine) if isinstance(engine, ReplicatedEngine) else EngineMetrics(engine)


def _watch(worker: Worker) -> None:
    worker.metrics = EngineMetrics(worker.engine)


def _read(worker: Worker) -> Told:
    assert worker.metrics is not None
    return worker.metrics.values(), worker.metrics.histograms()
