"""One number over the bits of many tensors, in one launch that reads them once."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK_WORDS = 1 << 14
"""32-bit words that one program reads (64 KiB)."""


@triton.jit
def _checksum(addresses, counts, sums, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    chunk = tl.program_id(0)
    words = tl.load(addresses + chunk).to(tl.pointer_type(tl.int32))
    count = tl.load(counts + chunk)
    total = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, CHUNK, BLOCK):
        index = start + tl.arange(0, BLOCK)
        word = tl.load(words + index, mask=index < count, other=0).to(tl.int64)
        # An odd weight for each place, so that no change of a single word goes unseen, nor words that change places.
        total += word * ((index * 40503 + 12345) * 2 + 1).to(tl.int64)
    tl.store(sums + chunk, tl.sum(total))


class Checksum:
    """Sums the words of tensors, weighted by where they stand.

    Args:
        tensors: on one CUDA device, contiguous, of a whole number of 4-byte words each; they must stay where they are.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        addresses, counts = [], []
        for tensor in tensors:
            words = tensor.numel() * tensor.element_size() // 4
            starts = np.arange(0, words, CHUNK_WORDS)
            addresses.append(tensor.data_ptr() + 4 * starts)
            counts.append(np.minimum(words - starts, CHUNK_WORDS))
        device = tensors[0].device
        self._addresses = torch.from_numpy(np.concatenate(addresses)).to(device)
        self._counts = torch.from_numpy(np.concatenate(counts).astype(np.int32)).to(device)
        self._weights = torch.arange(1, len(self._addresses) + 1, device=device) * 2654435761 * 2 + 1

    @staticmethod
    def takes(tensor: Tensor) -> bool:
        """Whether a tensor is one that it can read."""
        size = tensor.numel() * tensor.element_size()
        return tensor.is_cuda and tensor.is_contiguous() and size % 4 == 0 and tensor.data_ptr() % 4 == 0 and size > 0

    def read(self) -> int:
        """The checksum of what the tensors hold now. Waits for the device."""
        sums = torch.empty_like(self._addresses)
        with torch.cuda.device(sums.device):
            _checksum[(len(sums),)](self._addresses, self._counts, sums, CHUNK=CHUNK_WORDS, BLOCK=2048, num_warps=8)
        return int((sums * self._weights).sum())
