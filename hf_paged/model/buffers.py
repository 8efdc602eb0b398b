"""Arrays that travel together between host and device: one copy for all of them, at fixed addresses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16
_NUMPY: dict[torch.dtype, type[np.generic]] = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32}


class PackedBuffer:
    """Named one-dimensional arrays in one piece of device memory, and two or more such pieces in (pinned) host memory.

    More than one, because a copy may still be under way when the next step's arrays are written. With two of them, the
    step before the last one must have ended by then.

    Args:
        fields: dtype (int32, int64 or float32) and length of each array.
        copies: pieces of host memory.
    """

    def __init__(self, fields: dict[str, tuple[torch.dtype, int]], device: torch.device, copies: int = 2) -> None:
        offsets, end = {}, 0
        for name, (dtype, length) in fields.items():
            offsets[name] = end
            end += -(-length * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self._device = torch.zeros(end, dtype=torch.uint8, device=device)
        self._hosts = [
            torch.zeros(end, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda") for _ in range(copies)
        ]
        self._turn = 0
        self.device: dict[str, Tensor] = {}
        """The arrays on the device."""
        self._arrays: list[dict[str, np.ndarray]] = [{} for _ in range(copies)]
        for name, (dtype, length) in fields.items():
            piece = slice(offsets[name], offsets[name] + length * dtype.itemsize)
            self.device[name] = self._device[piece].view(dtype)
            for host, arrays in zip(self._hosts, self._arrays, strict=True):
                arrays[name] = host[piece].numpy().view(_NUMPY[dtype])

    def next(self) -> dict[str, np.ndarray]:
        """The host's arrays to write, or to read into, next."""
        self._turn = (self._turn + 1) % len(self._hosts)
        return self._arrays[self._turn]

    def upload(self) -> None:
        """Enqueues the copy of the current host arrays to the device."""
        self._device.copy_(self._hosts[self._turn], non_blocking=True)

    def download(self) -> None:
        """Enqueues the copy of the device's arrays to the current host arrays."""
        self._hosts[self._turn].copy_(self._device, non_blocking=True)
