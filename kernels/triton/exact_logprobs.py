"""Log-probabilities of chosen tokens, in the arithmetic of the trainer that will compute them again.

TRL's fused language-model head keeps a running maximum and a running sum of exponentials over blocks of 1,024 logits in
float32, and multiplies logits by the inverse of the temperature. The same operations in the same order, by as many
threads, over the same logits give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_paged.kernels.triton.sampling import sample_tokens
from hf_paged.sampling.fused import SamplingRows

BLOCK = 1024
WARPS = 4
ALIGNED = 16
"""Logits that a row's place in memory must be a multiple of: by it Triton decides which thread sums what."""


@triton.jit
def _fold(logits, row_stride, tokens, scales, peaks, sums, chosen, vocab, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = logits + program * row_stride
    scale = tl.load(scales + program)
    peak = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        real = offsets < vocab
        x = tl.load(row + offsets, mask=real, other=0.0).to(tl.float32) * scale
        x = tl.where(real, x, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(x, axis=0))
        shrink = tl.exp(peak - new_peak)
        total = total * shrink + tl.sum(tl.where(real, tl.exp(x - new_peak), 0.0), axis=0)
        peak = new_peak
    tl.store(peaks + program, peak)
    tl.store(sums + program, total)
    token = tl.load(tokens + program)
    tl.store(chosen + program, tl.load(row + tl.maximum(token, 0)).to(tl.float32) * scale)


def exact_logprobs(logits: Tensor, tokens: Tensor, scales: Tensor) -> Tensor:
    """Log-probabilities of one token per row, under the softmax of the row times its scale.

    Args:
        logits: `[R, V]`, bfloat16, float16 or float32, as the model computed them.
        tokens: int64 `[R]`; scales: float32 `[R]`, inverse temperatures.

    Returns:
        float32 `[R]`; NaN where the token is negative, or a logit is NaN or +inf.
    """
    count, vocab = logits.shape
    if count == 0:
        return torch.empty(0, dtype=torch.float32, device=logits.device)
    if logits.stride(1) != 1 or logits.stride(0) % ALIGNED or logits.data_ptr() % ALIGNED:
        padded = logits.new_empty(count, triton.cdiv(vocab, ALIGNED) * ALIGNED)
        logits = padded[:, :vocab].copy_(logits)
    peaks, sums, chosen = torch.empty(3, triton.cdiv(count, 4) * 4, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _fold[(count,)](
            logits, logits.stride(0), tokens, scales, peaks, sums, chosen, vocab, BLOCK=BLOCK, num_warps=WARPS
        )
    log_z = peaks[:count] + torch.log(sums[:count])
    return (chosen[:count] - log_z).masked_fill_(tokens < 0, float("nan"))


def sample_tokens_exactly(
    logits: Tensor,
    rows: SamplingRows,
    *,
    tokens: Tensor,
    logprobs: Tensor,
    ranks: Tensor,
    mask: Tensor | None = None,
) -> None:
    """`sample_tokens` with log-probabilities by `exact_logprobs`."""
    sample_tokens(logits, rows, tokens=tokens, logprobs=logprobs, ranks=ranks, mask=mask)
    logprobs.copy_(exact_logprobs(logits, tokens, rows.logprob_scale))
