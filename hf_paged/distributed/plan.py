"""What each rank holds of a model: its own tensor-parallel plan, worked out in numbers and checked.

transformers' models say by style what becomes of which module ("colwise", "rowwise", ...). Here that becomes index
ranges per tensor and what is done around which module, so that a loaded model is cut, and a checkpoint read, by the
same plan.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.quantization.fp8 import FP8Linear
from hf_paged.quantization.w4 import W4Linear

Range = tuple[int, int]

WHOLE = {"replicated_with_grad_allreduce", "replicate", "mla_kv_a_proj", "local_params", "ep_router"}
"""Styles of what every rank has whole, and computes whole, in a forward."""
KINDS = (nn.Linear, W4Linear, FP8Linear)


class PlanError(ValueError):
    """A model that cannot be cut as was asked; the message names the module."""


class StandIn(nn.Module):
    """In the place of a module that another pipeline stage has."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of a tensor a rank holds."""

    dim: int
    ranges: tuple[Range, ...]
    """Along `dim`, side by side in what the rank holds."""

    def of(self, tensor: Tensor) -> Tensor:
        """The part, in memory of its own."""
        parts = [tensor.narrow(self.dim, start, end - start) for start, end in self.ranges]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)

    @property
    def width(self) -> int:
        return sum(end - start for start, end in self.ranges)


@dataclass(frozen=True, slots=True)
class LinearCut:
    """Which part of a linear layer a rank holds: of its outputs, or of its inputs. A layer cut by inputs gives a part
    of a sum, so its bias is rank 0's."""

    whole: tuple[int, int]
    """Inputs and outputs of the layer on all ranks."""
    outputs: tuple[Range, ...] | None = None
    inputs: Range | None = None

    def of(self, leaf: str) -> Cut | None:
        """The cut of an ordinary layer's "weight" or "bias"."""
        if self.outputs is not None:
            return Cut(0, self.outputs)
        assert self.inputs is not None
        return Cut(1, (self.inputs,)) if leaf == "weight" else None


@dataclass(slots=True)
class ShardPlan:
    """One rank's part of a model, by names of modules and parameters."""

    linears: dict[str, LinearCut] = field(default_factory=dict)
    tensors: dict[str, Cut] = field(default_factory=dict)
    """Of parameters that are no linear layer's."""
    sums: list[str] = field(default_factory=list)
    """Modules whose outputs are parts of a sum."""
    gathers: dict[str, list[int]] = field(default_factory=dict)
    """Modules whose outputs are columns of something: the columns of every rank."""
    splits: dict[str, Range] = field(default_factory=dict)
    """Modules that are given more columns than they take: which."""
    lookups: dict[str, Range] = field(default_factory=dict)
    """Embeddings: the token ids that this rank holds."""
    experts: dict[str, Range] = field(default_factory=dict)
    """Modules of experts that are whole, each on one rank: those of this one."""
    key_value_groups: dict[str, int] = field(default_factory=dict)
    """Attention modules: query heads per key head, as they are on a rank."""

    def cut_of(self, name: str) -> Cut | None:
        """What of a tensor this rank holds; None is all of it."""
        module, _, leaf = name.rpartition(".")
        if module in self.linears:
            return self.linears[module].of(leaf)
        return self.tensors.get(name)

    def empties(self, name: str) -> bool:
        """Whether a tensor is a bias that is added on rank 0, and nothing elsewhere."""
        module, _, leaf = name.rpartition(".")
        return leaf == "bias" and module in self.linears and self.linears[module].inputs is not None


def spread(total: int, size: int) -> list[Range]:
    """`total` things over `size` ranks in order, the last ones having fewer where it does not come out even."""
    each = -(-total // size)
    return [(min(rank * each, total), min((rank + 1) * each, total)) for rank in range(size)]


def make_plan(lm: Any, rank: int, size: int, *, expert_parallel: bool = False) -> ShardPlan:
    """What a rank holds of a transformers model, which may be on the meta device.

    Args:
        expert_parallel: a rank has whole experts of a mixture, not a part of every one.

    Raises:
        PlanError: the model has no plan, or one that cannot be followed with so many ranks.
    """
    styles = getattr(lm, "_tp_plan", None) or {}
    if expert_parallel:
        plan = _Planner(lm, rank, size).plan(_with_whole_experts(lm, styles))
        if not plan.experts and not any(isinstance(module, StandIn) for module in lm.modules()):
            raise PlanError(f"this {type(lm).__name__} has no experts: leave enable_expert_parallel out")
        return plan
    if not any(style in ("colwise", "rowwise", "rowwise_split_input", "packed_colwise") for style in styles.values()):
        raise PlanError(
            f"{type(lm).__name__} has no tensor-parallel plan (base_model_tp_plan in its config class), so its layers "
            "cannot be spread over GPUs"
        )
    return _Planner(lm, rank, size).plan(styles)


def _with_whole_experts(lm: Any, styles: dict[str, str]) -> dict[str, str]:
    """A model's tensor-parallel plan with its expert-parallel one in the place of what both speak of.

    Raises:
        PlanError: there is no such plan.
    """
    # Older plans give a module of whole experts the style of one that has a part of each.
    own = {
        name: "ep_dispatch_experts" if style == "moe_tp_experts" else style
        for name, style in (getattr(lm, "_ep_plan", None) or {}).items()
    }
    if "grouped_gemm" not in own.values():
        raise PlanError(
            f"{type(lm).__name__} has no expert-parallel plan (base_model_ep_plan in its config class): it is no "
            "mixture of experts, or one whose experts cannot be spread whole; leave enable_expert_parallel out"
        )
    others = {name: style for name, style in styles.items() if not any(f"{name}.".startswith(f"{one}.") for one in own)}
    return others | own


class _Planner:
    def __init__(self, lm: Any, rank: int, size: int) -> None:
        self._lm, self._rank, self._size = lm, rank, size
        self._modules = dict(lm.named_modules())
        self._parameters = dict(lm.named_parameters(remove_duplicate=False))
        self._plan = ShardPlan()

    def plan(self, styles: dict[str, str]) -> ShardPlan:
        patterns = {re.compile(re.escape(name).replace(r"\*", r"\d+")): style for name, style in styles.items()}
        for name in [*self._modules, *self._parameters]:
            style = next((style for pattern, style in patterns.items() if pattern.fullmatch(name)), None)
            if style is not None and style not in WHOLE:
                self._place(name, style)
        self._vocabulary()
        return self._plan

    def _place(self, name: str, style: str) -> None:
        module = self._modules.get(name)
        if module is None:
            self._parameter(name, style)
        elif isinstance(module, StandIn):
            return
        elif isinstance(module, nn.Embedding) and style == "embedding_rowwise":
            self._embedding(name, module)
        elif style in ("moe_tp_experts", "all_reduce"):
            self._sum_experts(name, module)
        elif style == "ep_dispatch_experts":
            self._whole_experts(name, module)
        elif isinstance(module, KINDS) and style in _LINEAR:
            _LINEAR[style](self, name, module)
        else:
            raise PlanError(
                f"{name} ({type(module).__name__}): the style {style!r} of its tensor-parallel plan is not known here"
            )

    # ---- linear layers ---------------------------------------------------------------------------------------------

    def _columns(self, name: str, module: Any) -> None:
        self._plan.linears[name] = _cut(module, outputs=(self._heads(name, module) or self._even(name, module),))

    def _packed(self, name: str, module: Any) -> None:
        self._plan.linears[name] = _cut(module, outputs=self._halves(name, module.out_features))

    def _gathered(self, name: str, module: Any) -> None:
        ranges = spread(module.out_features, self._size)
        self._plan.linears[name] = _cut(module, outputs=(ranges[self._rank],))
        self._plan.gathers[name] = [end - start for start, end in ranges]

    def _rows(self, name: str, module: Any) -> None:
        self._plan.linears[name] = _cut(module, inputs=self._share(name, "inputs", module.in_features))
        self._plan.sums.append(name)

    def _rows_of_whole(self, name: str, module: Any) -> None:
        self._rows(name, module)
        inputs = self._plan.linears[name].inputs
        assert inputs is not None
        self._plan.splits[name] = inputs

    def _even(self, name: str, module: Any) -> Range:
        return self._share(name, "outputs", module.out_features)

    def _heads(self, name: str, module: Any) -> Range | None:
        """A projection to attention heads is cut between them; a key head is on several ranks where there are fewer
        than ranks. None for other layers."""
        parent_name = name.rpartition(".")[0]
        parent: Any = self._modules[parent_name]
        per_key = getattr(parent, "num_key_value_groups", None)
        if per_key is None:
            return None
        heads = self._lm.config.get_text_config().num_attention_heads
        dim = getattr(parent, "head_dim", None)
        count = module.out_features // dim if dim and module.out_features % dim == 0 else heads
        if module.out_features % count:
            return None
        width = module.out_features // count
        if count % self._size == 0:
            return self._share(name, "outputs", module.out_features)
        if count < heads and self._size % count == 0 and heads % self._size == 0:
            head = self._rank * count // self._size
            self._plan.key_value_groups[parent_name] = heads // self._size
            return head * width, (head + 1) * width
        raise PlanError(
            f"{name} has {count} heads, which {self._size} ranks cannot share: take a tensor_parallel_size that "
            f"divides the {heads} attention heads, and that the number of key heads divides or is divided by"
        )

    def _share(self, name: str, what: str, total: int) -> Range:
        if total % self._size:
            raise PlanError(
                f"{name} has {total} {what}, which {self._size} ranks cannot share evenly: take a "
                "tensor_parallel_size that divides them"
            )
        each = total // self._size
        return self._rank * each, (self._rank + 1) * each

    def _halves(self, name: str, total: int) -> tuple[Range, ...]:
        """Of two layers in one, the first's outputs before the second's: a part of each."""
        if total % 2:
            raise PlanError(f"{name} has {total} outputs, which are not those of two layers")
        start, end = self._share(name, "outputs of each of two layers", total // 2)
        return (start, end), (start + total // 2, end + total // 2)

    # ---- other things ----------------------------------------------------------------------------------------------

    def _parameter(self, name: str, style: str) -> None:
        """A parameter with an entry of its own: the weights of experts `[experts, out, in]`, or one number per head."""
        shape = self._parameters[name].shape
        if style == "packed_colwise" and len(shape) == 3:
            self._plan.tensors[name] = Cut(1, self._halves(name, shape[1]))
        elif style == "grouped_gemm":
            self._plan.tensors[name] = Cut(0, (self._share(name, "experts", shape[0]),))
        elif style == "rowwise" and len(shape) == 3:
            self._plan.tensors[name] = Cut(2, (self._share(name, "inputs", shape[2]),))
        elif style == "colwise" and len(shape) in (1, 3):
            dim = len(shape) // 2
            self._plan.tensors[name] = Cut(dim, (self._share(name, "outputs", shape[dim]),))
        else:
            raise PlanError(
                f"{name} (a parameter of shape {list(shape)}): the style {style!r} of its tensor-parallel plan is not "
                "known here"
            )

    def _sum_experts(self, name: str, module: Any) -> None:
        if getattr(module, "has_bias", False) or getattr(module, "is_transposed", False):
            raise PlanError(
                f"{name}: experts with biases, or with transposed weights, cannot be cut: leave each of them whole on "
                "one rank with enable_expert_parallel=True"
            )
        self._plan.sums.append(name)

    def _whole_experts(self, name: str, module: Any) -> None:
        stacked = [parameter.shape[0] for parameter in module.parameters(recurse=False)]
        if not hasattr(module, "num_experts") or len(set(stacked)) != 1:
            raise PlanError(f"{name} ({type(module).__name__}) is not made of stacked experts, as its plan has it")
        if getattr(module, "has_bias", False) and module.config._experts_implementation == "eager":
            raise PlanError(  # it knows of no number for an expert that is elsewhere
                f'{name}: experts_implementation="eager" cannot be had with experts that have biases and are on '
                'several ranks: take "grouped_mm"'
            )
        self._plan.experts[name] = self._share(name, "experts", stacked[0])
        self._plan.sums.append(name)

    def _embedding(self, name: str, module: nn.Embedding) -> None:
        own = spread(module.num_embeddings, self._size)[self._rank]
        self._plan.tensors[f"{name}.weight"] = Cut(0, (own,))
        self._plan.lookups[name] = own

    def _vocabulary(self) -> None:
        """Embedding and head are spread over the vocabulary, whatever the plan says: they are large, may be one tensor,
        and gathered logits have the same bits on all ranks."""
        names = {id(module): name for name, module in self._modules.items()}
        embedding, head = self._lm.get_input_embeddings(), self._lm.get_output_embeddings()
        if isinstance(embedding, nn.Embedding) and names[id(embedding)] not in self._plan.lookups:
            self._embedding(names[id(embedding)], embedding)
        if isinstance(head, StandIn):
            return
        if not isinstance(head, KINDS):
            raise PlanError(f"{type(self._lm).__name__} has no linear layer that makes its logits")
        if names[id(head)] not in self._plan.gathers:
            self._gathered(names[id(head)], head)


def _cut(module: Any, outputs: tuple[Range, ...] | None = None, inputs: Range | None = None) -> LinearCut:
    return LinearCut((module.in_features, module.out_features), outputs, inputs)


_LINEAR: dict[str, Any] = {
    "colwise": _Planner._columns,
    "packed_colwise": _Planner._packed,
    "colwise_gather_output": _Planner._gathered,
    "colwise_rep": _Planner._gathered,
    "rowwise": _Planner._rows,
    "rowwise_split_input": _Planner._rows_of_whole,
    "rowwise_rep": _Planner._rows_of_whole,
}
