"""StepTrace: what the engine did step by step, and a picture of it."""

from __future__ import annotations

from pathlib import Path

from hf_paged.engine.engine import Engine
from hf_paged.engine.stats import StepRecord

_Spans = dict[tuple[str, int], list[tuple[int, int]]]
"""By (request id, sample index): (step, number of steps)."""


class StepTrace:
    """Records every step of an engine while it is open: `with StepTrace(engine) as trace`."""

    def __init__(self, engine: Engine) -> None:
        self.records: list[StepRecord] = []
        self._engine = engine

    def __enter__(self) -> StepTrace:
        self._engine.observers.append(self.records.append)
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.observers.remove(self.records.append)

    @property
    def peak_pages(self) -> int:
        """The most pages that running sequences held at once."""
        return max((record.active_pages for record in self.records), default=0)

    def _spans(self, first: int) -> tuple[_Spans, _Spans]:
        """Per sequence, its runs of steps of decode and of prefill, as (step, number of steps) from step `first`."""
        decode: _Spans = {}
        prefill: _Spans = {}
        for record in self.records:
            step = record.step - first
            for spans, lanes in ((decode, record.decodes), (prefill, [(i, s) for i, s, _ in record.chunks])):
                for lane in lanes:
                    runs = spans.setdefault(lane, [])
                    if runs and sum(runs[-1]) == step:
                        runs[-1] = (runs[-1][0], runs[-1][1] + 1)
                    else:
                        runs.append((step, 1))
        return decode, prefill

    def plot(self, path: str | Path, *, title: str = "") -> None:
        """Draws which sequence ran in which step, and the page pool over the same steps, as a PNG.

        Raises:
            ImportError: matplotlib is missing; the message names the extra to install.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("drawing a trace needs matplotlib: pip install 'hf_paged[demo]'") from error

        first = self.records[0].step - 1 if self.records else 0
        decode, prefill = self._spans(first)
        order = list(dict.fromkeys(request for request, _ in [*prefill, *decode]))
        lanes = sorted({*prefill, *decode}, key=lambda lane: (order.index(lane[0]), lane[1]))

        figure = Figure(figsize=(12, 8), layout="constrained")
        FigureCanvasAgg(figure)
        timeline, pool = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for row, lane in enumerate(lanes):
            timeline.broken_barh(decode.get(lane, []), (row - 0.4, 0.8), color=f"C{order.index(lane[0]) % 10}")
            timeline.broken_barh(prefill.get(lane, []), (row - 0.4, 0.8), color="black")
        timeline.set_ylim(len(lanes), -1)
        timeline.set_ylabel("sequence (a colour per request, prefill in black)")
        timeline.set_title(title or "Which sequence ran in which step")
        where = [record.step - first for record in self.records]
        active = [record.active_pages for record in self.records]
        cached = [record.cached_pages for record in self.records]
        pool.stackplot(where, active, cached, labels=("held by running sequences", "cached prefixes"), alpha=0.8)
        pool.set_xlabel("step")
        pool.set_ylabel("pages")
        pool.legend(loc="upper left")
        figure.savefig(path, dpi=130)
