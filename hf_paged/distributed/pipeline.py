"""Pipeline stages: a rank holds some of a model's layers, and hidden states travel from stage to stage.

The modules that are elsewhere have stand-ins in their places, so that a model's own forward is what every stage runs
(GPipe, arXiv 1811.06965, with the micro-batches that the scheduler makes). Outside steps of all stages nothing travels,
and a stage computes its layers over made-up hidden states: enough to look at them, and to check them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_paged.distributed.plan import PlanError, StandIn
from hf_paged.engine.batch import Batch
from hf_paged.engine.request import Hooks

ATTRIBUTE = "_hf_paged_stage"
"""Where a model keeps its `Stage`."""


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A rank's place among stages.

    Args:
        stage, size: which, of how many.
        group: of the ranks that hidden states pass through on their way past this one, by stage.
    """

    stage: int
    size: int
    group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.size - 1

    def receive(self, like: Tensor) -> Tensor:
        """What the stage before sends, of the shape of `like`."""
        hidden = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(hidden, dist.get_global_rank(self.group, self.stage - 1), group=self.group)
        return hidden

    def send(self, hidden: Tensor) -> None:
        """To the stage after."""
        dist.send(hidden.contiguous(), dist.get_global_rank(self.group, self.stage + 1), group=self.group)


class Stage:
    """One stage's layers.

    Args:
        layers: which of the model's are here.
    """

    def __init__(self, pipeline: Pipeline, layers: range) -> None:
        self.pipeline, self.layers = pipeline, layers
        self.live = False
        """Whether hidden states travel."""
        self._rehearses = False

    @contextmanager
    def living(self) -> Iterator[None]:
        """Around what all stages compute together."""
        self.live = True
        try:
            yield
        finally:
            self.live = False

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Around what a stage computes for itself, to look at its layers."""
        self._rehearses = True
        try:
            yield
        finally:
            self._rehearses = False

    def refuse_alone(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: a stage's layers are no model."""
        if not (self.live or self._rehearses) and kwargs.get("paged") is None:
            raise RuntimeError(
                f"this process has {len(self.layers)} of the model's layers, and only what goes through the engine "
                "passes all of them: a forward of the model's own, or a generate() that needs one, is not possible "
                "with pipeline parallelism"
            )


def stage_of(lm: nn.Module) -> Stage | None:
    """What a model that was cut into stages has of it here; None when it has all layers."""
    return lm.__dict__.get(ATTRIBUTE)


class _Elsewhere(StandIn):
    """A layer or norm that another stage has: hands on what it gets."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # A model's forward may ask a layer of what type it is.
        self.__dict__ |= {name: value for name, value in vars(layer).items() if isinstance(value, str | int)}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class _Arrival(_Elsewhere):
    """The last of the layers before this stage's."""

    def __init__(self, layer: nn.Module, stage: Stage) -> None:
        super().__init__(layer)
        self._stage = stage

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._stage.pipeline.receive(hidden_states) if self._stage.live else hidden_states


class _Departure(_Elsewhere):
    """The first of the layers after this stage's."""

    def __init__(self, layer: nn.Module, stage: Stage) -> None:
        super().__init__(layer)
        self._stage = stage

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._stage.live:
            self._stage.pipeline.send(hidden_states)
        return hidden_states


class _NoEmbedding(StandIn):
    """Rows of the right shape, no two tokens' alike, for a stage that gets its own from another one."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._width, self._dtype = width, dtype

    def forward(self, input: Tensor) -> Tensor:
        phase = torch.arange(1, self._width + 1, device=input.device) * (1 + input[..., None])
        return torch.sin(phase.float()).to(self._dtype)


class _NoHead(StandIn):
    """Where another stage makes the logits: hands on what it gets.

    Args:
        num_logits: the size of the vocabulary.
    """

    def __init__(self, num_logits: int) -> None:
        super().__init__()
        self.num_logits = num_logits

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def share_layers(costs: Sequence[float], last: float, stages: int) -> list[range]:
    """Layers over stages in order, so that the stage with the most has as little as possible.

    Args:
        costs: of each layer.
        last: what the last stage has beside layers.

    Raises:
        PlanError: there are fewer layers than stages.
    """
    count, before = len(costs), [0.0, *accumulate(costs)]
    if count < stages:
        raise PlanError(f"pipeline_parallel_size={stages}, and the model has {count} layers: every stage needs one")
    # Of the first n layers, over as many stages as were gone through: (what the dearest stage has, where they end).
    best: dict[int, tuple[float, list[int]]] = {n: (before[n], [n]) for n in range(1, count + 1)}
    for stage in range(2, stages + 1):
        beside = last if stage == stages else 0.0
        best = {
            n: min(
                (max(best[cut][0], before[n] - before[cut] + beside), [*best[cut][1], n]) for cut in range(stage - 1, n)
            )
            for n in range(stage, count + 1)
        }
    ends = best[count][1]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def cut_stage(lm: Any, pipeline: Pipeline) -> Stage:
    """Leaves a model, which may be on the meta device, the modules of one stage, in place.

    Layers are shared out by what a decode step reads of them, the head included.

    Raises:
        PlanError: the model has no plan for stages, or too few layers; it is unchanged then.
    """
    name, embedding, norms = _parts(lm)
    layers = lm.get_submodule(name)
    head = lm.get_output_embeddings()
    own = share_layers([_num_bytes(layer) for layer in layers], _num_bytes(head), pipeline.size)[pipeline.stage]
    stage = Stage(pipeline, own)
    dtype = next(parameter.dtype for parameter in layers.parameters() if parameter.is_floating_point())
    ties: dict[str, str] = getattr(lm, "all_tied_weights_keys", {})
    if not pipeline.is_first:
        for place in range(own.start):
            arrives = place == own.start - 1
            layers[place] = _Arrival(layers[place], stage) if arrives else _Elsewhere(layers[place])
        if not (pipeline.is_last and ties):  # a tied head is the embedding
            lm.set_submodule(embedding, _NoEmbedding(lm.config.get_text_config().hidden_size, dtype))
    if not pipeline.is_last:
        for place in range(own.stop, len(layers)):
            departs = place == own.stop
            layers[place] = _Departure(layers[place], stage) if departs else _Elsewhere(layers[place])
        for norm in norms:
            lm.set_submodule(norm, _Elsewhere(lm.get_submodule(norm)))
        names = {id(module): path for path, module in lm.named_modules()}
        lm.set_submodule(names[id(head)], _NoHead(head.out_features))
    kept = lm.state_dict().keys()
    if ties:
        lm.all_tied_weights_keys = {one: other for one, other in ties.items() if {one, other} <= kept}
    lm.__dict__[ATTRIBUTE] = stage
    lm.register_forward_pre_hook(stage.refuse_alone, with_kwargs=True)
    return stage


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _parts(lm: Any) -> tuple[str, str, list[str]]:
    """Names of the list of layers, of the embedding before it, and of what comes after it."""
    plan = getattr(lm, "_pp_plan", None) or {}
    modules = dict(lm.named_modules())
    head = lm.get_output_embeddings()
    lists = [name for name in plan if isinstance(modules.get(name), nn.ModuleList)]
    embedding = lm.get_input_embeddings()
    names = [name for name in plan if modules.get(name) is embedding]
    if len(lists) != 1 or len(names) != 1 or head is None:
        raise PlanError(
            f"{type(lm).__name__} has no plan for pipeline stages (base_model_pp_plan in its config class), so its "
            "layers cannot be cut into stages"
        )
    trunk, planned = modules[lists[0].rpartition(".")[0]], {id(modules[name]) for name in plan if name in modules}
    beside = [
        name
        for name, child in trunk.named_children()
        if id(child) not in planned and any(True for _ in child.parameters())
    ]
    if beside:
        raise PlanError(
            f"{type(lm).__name__} computes more than its layers one after the other ({', '.join(beside)}), and its "
            "plan does not say on which stage: take tensor_parallel_size instead of pipeline_parallel_size"
        )
    after = [name for name in plan if name in modules and name not in (*lists, *names) and modules[name] is not head]
    return lists[0], names[0], after


def kept_rows(batch: Batch) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Logits and scores that a stage that draws has kept for `generate`, of the tokens that a step has sampled."""
    return [
        ([row.cpu() for row in hooks.logits[place:]], [row.cpu() for row in hooks.scores[place:]])
        for hooks, place in _hooks(batch)
    ]


def keep_rows(batch: Batch, kept: list[tuple[list[Tensor], list[Tensor]]], device: torch.device) -> None:
    """Has another stage keep them too: criteria look at them, and callers get them."""
    for (hooks, place), (logits, scores) in zip(_hooks(batch), kept, strict=True):
        hooks.logits[place:] = [row.to(device) for row in logits]
        hooks.scores[place:] = [row.to(device) for row in scores]


def _hooks(batch: Batch) -> Iterator[tuple[Hooks, int]]:
    """What is kept for which requests of a step, and as which token's."""
    for sequence in batch.sampled():
        if sequence.request.hooks is not None:
            yield sequence.request.hooks, sequence.num_generated
