"""shard(): leaves each rank its part of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.distributed.groups import TensorParallel, check_expert_parallel
from hf_paged.distributed.layers import GatherOutput, Lookup, OwnExperts, SplitInput, SumOutput
from hf_paged.distributed.pipeline import cut_stage
from hf_paged.distributed.plan import LinearCut, PlanError, ShardPlan, make_plan
from hf_paged.quantization.fp8 import FP8Linear
from hf_paged.quantization.w4 import W4Linear, pack_codes, unpack_codes

ATTRIBUTE = "_hf_paged_parallel"
"""Where a sharded model keeps its `TensorParallel`."""
CUTS = "_hf_paged_cuts"
"""Where it keeps what of its linear layers this rank has."""


def parallel_of(lm: nn.Module) -> TensorParallel | None:
    """The group over which a model is sharded; None when it is whole."""
    return lm.__dict__.get(ATTRIBUTE)


def cuts_of(lm: nn.Module) -> dict[str, LinearCut]:
    """Which part of its linear layers this rank holds, by name, of those that are cut."""
    return lm.__dict__.get(CUTS, {})


@torch.no_grad()
def shard(lm: Any, parallel: TensorParallel, *, enable_expert_parallel: bool = False) -> Any:
    """Cuts a whole model down to this rank's part, in place, tensor by tensor; every rank does so.

    The model then computes what the whole one did, as long as all ranks compute together. It is for inference: sums
    across ranks have no gradient.

    Args:
        lm: a transformers causal LM with the same weights on every rank; or one that transformers has cut up itself
            (`tp_plan="auto"`), whose tensors are put together again one by one.
        enable_expert_parallel: leave each rank whole experts of a mixture, not a part of every one.

    Returns:
        the model.

    Raises:
        PlanError: it cannot be cut over so many ranks; it is unchanged then.
    """
    plan = plan_part(lm, parallel, expert_parallel=enable_expert_parallel)
    cut_model(lm, plan, parallel.rank)
    install(lm, plan, parallel)
    return lm


def plan_part(lm: Any, parallel: TensorParallel, *, expert_parallel: bool = False) -> ShardPlan:
    """Leaves a model, which may be on the meta device, the layers of this rank's stage, and says what this rank has of
    them.

    Raises:
        PlanError: it cannot be cut over so many ranks.
        ValueError: whole experts are to be spread over one rank.
    """
    check_expert_parallel(expert_parallel, parallel.size)

    def plan() -> ShardPlan:
        return make_plan(lm, parallel.rank, parallel.size, expert_parallel=expert_parallel)

    if parallel.pipeline is None:
        return plan()
    if parallel.size > 1:
        plan()  # refuses early
    cut_stage(lm, parallel.pipeline)
    return plan() if parallel.size > 1 else ShardPlan()


@torch.no_grad()
def cut_model(lm: Any, plan: ShardPlan, rank: int) -> None:
    """Leaves a model the tensors that a plan gives a rank; `install` makes them a model again.

    Raises:
        PlanError: a quantised layer cannot be cut so; the model is unchanged.
    """
    for name, linear in plan.linears.items():
        check_cut(name, lm.get_submodule(name), linear)
    made: dict[int, nn.Parameter] = {}  # a tied tensor stays one
    kept = []  # of tensors that were replaced, so that their ids stay theirs
    for name, parameter in list(lm.named_parameters(remove_duplicate=False)):
        module_name, _, leaf = name.rpartition(".")
        module = lm.get_submodule(module_name)
        if id(parameter) not in made:
            kept.append(parameter)
            made[id(parameter)] = _part(parameter, name, plan, rank)
        module._parameters[leaf] = made[id(parameter)]
    for name, cut in plan.linears.items():
        module = lm.get_submodule(name)
        if isinstance(module, W4Linear | FP8Linear):
            lm.set_submodule(name, cut_quantised(module, cut, rank))


def install(lm: Any, plan: ShardPlan, parallel: TensorParallel) -> None:
    """What happens around the modules of a model whose tensors are this rank's."""
    for module in lm.modules():  # transformers' own way of computing in parallel, where it has installed that
        if vars(module).pop("_is_hooked", False):
            vars(module).pop("forward", None)
    for name, cut in plan.linears.items():
        module = lm.get_submodule(name)
        if cut.outputs is not None:
            module.out_features = sum(end - start for start, end in cut.outputs)
        elif cut.inputs is not None:
            module.in_features = cut.inputs[1] - cut.inputs[0]
    for name, (start, end) in plan.experts.items():
        experts = lm.get_submodule(name)
        experts.num_experts, experts._is_expert_parallel = end - start, True
        experts.register_forward_pre_hook(OwnExperts(start, end))
    for name, groups in plan.key_value_groups.items():
        lm.get_submodule(name).num_key_value_groups = groups
    for name in plan.sums:
        lm.get_submodule(name).register_forward_hook(SumOutput(parallel.name))
    for name, widths in plan.gathers.items():
        lm.get_submodule(name).register_forward_hook(GatherOutput(widths, parallel.name))
    for name, (start, end) in plan.splits.items():
        lm.get_submodule(name).register_forward_pre_hook(SplitInput(start, end))
    for name, (start, end) in plan.lookups.items():
        embedding = lm.get_submodule(name)
        embedding.num_embeddings, embedding.padding_idx = end - start, None
        embedding.__dict__["forward"] = Lookup(embedding, start, end, parallel.name)
    lm.__dict__[ATTRIBUTE], lm.__dict__[CUTS] = parallel, plan.linears


def check_cut(name: str, module: nn.Module, cut: LinearCut) -> None:
    """Raises PlanError where a quantised layer cannot be cut so."""
    if isinstance(module, W4Linear) and cut.inputs is not None:
        if module.perm is not None:
            raise PlanError(
                f"{name} is quantised with an order of inputs of its own (act-order, desc_act), and its inputs are "
                "spread over the ranks: take a checkpoint without act-order, or quantization=None, or one GPU"
            )
        _need_whole_groups(name, "inputs", cut.inputs, module.group_size)
    if isinstance(module, FP8Linear):
        if cut.inputs is not None and module.block != (1, module.in_features):
            _need_whole_groups(name, "inputs", cut.inputs, module.block[1])
        for part in cut.outputs or ():
            _need_whole_groups(name, "outputs", part, module.block[0])


def cut_quantised(layer: W4Linear | FP8Linear, cut: LinearCut, rank: int) -> W4Linear | FP8Linear:
    """A rank's part of a quantised layer that was checked, in memory of its own."""
    columns = cut.outputs or ((0, layer.out_features),)
    start, end = cut.inputs or (0, layer.in_features)
    bias = None if layer.bias is None else _columns(layer.bias, columns, 0)
    if bias is not None and cut.inputs is not None and rank:
        bias.zero_()
    if isinstance(layer, W4Linear):
        groups = slice(start // layer.group_size, -(-end // layer.group_size))
        scales, zeros = (_columns(tensor[groups], columns, 1) for tensor in (layer.scales, layer.zeros))
        codes = _columns(layer.codes, columns, 1)
        if cut.inputs is not None:
            codes = pack_codes(unpack_codes(codes, layer.in_features)[:, start:end])
        size = min(layer.group_size, end - start)
        return W4Linear(codes, scales, zeros, size, perm=layer.perm, bias=bias)
    by_row = layer.block == (1, layer.in_features)
    rows, width = layer.block
    weight = _columns(layer.codes.view(torch.uint8)[:, start:end], columns, 0).view(layer.codes.dtype)
    scales = layer.scales if by_row else layer.scales[:, start // width : -(-end // width)]
    scales = _columns(scales, tuple((first // rows, -(-last // rows)) for first, last in columns), 0)
    return FP8Linear(weight, scales, None if by_row else layer.block, bias=bias)


def _part(parameter: Any, name: str, plan: ShardPlan, rank: int) -> nn.Parameter:
    whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.data
    cut = plan.cut_of(name)
    if cut is None and whole is parameter.data and not (rank and plan.empties(name)):
        return parameter
    part = whole if cut is None else cut.of(whole)
    if rank and plan.empties(name):
        part = torch.zeros_like(part)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def _columns(tensor: Tensor, ranges: tuple[tuple[int, int], ...], dim: int) -> Tensor:
    parts = [tensor.narrow(dim, start, end - start) for start, end in ranges]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


def _need_whole_groups(name: str, what: str, part: tuple[int, int], unit: int) -> None:
    """A share is some groups, or one of the equal parts of a group. Shares begin at multiples of their width, so that
    all ranks come to the same verdict."""
    width = part[1] - part[0]
    if width % unit and (not width or unit % width):
        raise PlanError(
            f"{name} is quantised in groups of {unit} {what}, and a rank's share is {width} of them: take a "
            "tensor_parallel_size that keeps groups whole"
        )
