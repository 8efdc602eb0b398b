"""WeightWatch: did the weights change since the last look? Cached keys and values belong to one state of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

BLOCK = 64
"""Eight-byte words summed to one. What moves within such a block (512 bytes) and is otherwise the same goes unseen."""


class _StepCount:
    """Optimizer steps taken in this process, by whatever optimizer."""

    def __init__(self) -> None:
        self.value = 0
        register_optimizer_step_post_hook(self._step)

    def _step(self, *_: Any) -> None:
        self.value += 1


_optimizer_steps = _StepCount()


class WeightWatch:
    """Watches a model's parameters and buffers, and which adapters act on them.

    Cheap signs come first: storage pointers, shapes and version counters, PEFT's switches, optimizer steps. Fused
    optimizers and writes through `.data` leave none of these, so `changed` also reads every weight once, on its device,
    and compares a checksum.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._signs: tuple[Any, ...] | None = None
        self._checksum: int | None = None
        self._reader: tuple[tuple[Any, ...], Any] | None = None
        """For weights on a GPU: the kernel that reads them, and the signs it was made for."""
        self._steps = _optimizer_steps.value

    def changed(self) -> bool:
        """Whether anything differs from the last call; True at the first. Reads all weights unless a cheap sign says
        it."""
        signs, steps = self.signs(), _optimizer_steps.value
        checksum = self._read_checksum(signs)
        same = signs == self._signs and checksum == self._checksum
        self._signs, self._checksum, self._steps = signs, checksum, steps
        return not same

    def optimizer_stepped(self) -> bool:
        """Whether any optimizer in the process took a step since the last call of this or of `changed`. Costs
        nothing."""
        stepped = self._steps != _optimizer_steps.value
        self._steps = _optimizer_steps.value
        return stepped

    def _tensors(self) -> list[Tensor]:
        return [*self._model.parameters(), *self._model.buffers()]

    def forget(self) -> None:
        """Lets go of the weights' memory, where it holds on to it; the next `changed` is True."""
        self._signs = self._reader = None

    def signs(self) -> tuple[Any, ...]:
        """What tells cheaply that weights moved or that others act now: addresses, dtypes and shapes, adapters, hooks.
        What was captured or aliased holds only as long as this stays the same."""
        tensors = tuple((t.data_ptr(), t.dtype, t.shape) for t in self._tensors())
        adapters = tuple(
            (
                tuple(getattr(module, "active_adapters", ()) or ()),
                getattr(module, "disable_adapters", False),
                tuple(getattr(module, "merged_adapters", ())),
                tuple(sorted(scaling.items())),
            )
            for module in self._model.modules()
            if isinstance(scaling := getattr(module, "scaling", None), dict)
        )
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self._model.modules())
        return tensors, adapters, hooks

    @torch.no_grad()
    def _read_checksum(self, signs: tuple[Any, ...]) -> int:
        """One number over the bits of all weights."""
        tensors = [tensor.detach() for tensor in self._tensors()]
        if not any(tensor.is_cuda for tensor in tensors):
            return _sum_blocks(tensors)
        from hf_paged.kernels.triton.checksum import Checksum

        taken = [Checksum.takes(tensor) for tensor in tensors]
        if self._reader is None or self._reader[0] != signs:
            self._reader = signs, Checksum([t for t, takes in zip(tensors, taken, strict=True) if takes])
        rest = [t for t, takes in zip(tensors, taken, strict=True) if not takes]
        return hash((self._reader[1].read(), _sum_blocks(rest)))


def _sum_blocks(tensors: list[Tensor]) -> int:
    """One number over the bits of tensors: word sums per block, weighted by where the block stands."""
    totals: dict[torch.device, Tensor] = {}
    for index, tensor in enumerate(tensors):
        data = tensor.contiguous().view(-1)
        if not data.numel():
            continue
        octets = data.view(torch.uint8) if data.dtype != torch.bool else data.to(torch.uint8)
        whole = octets.numel() // (8 * BLOCK) * (8 * BLOCK)
        sums = [octets[whole:].sum(dtype=torch.int64)[None]]
        if whole:
            sums.append(octets[:whole].view(torch.int64).view(-1, BLOCK).sum(1))
        blocks = torch.cat(sums)
        places = torch.arange(1, blocks.numel() + 1, device=blocks.device).mul_(2654435761).add_(index * 40503) | 1
        total = (blocks * places).sum()
        totals[blocks.device] = totals[blocks.device] * 31 + total if blocks.device in totals else total
    return hash(tuple(int(total) for total in totals.values()))
