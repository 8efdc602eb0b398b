"""exact_arithmetic: a forward whose numbers for a row do not depend on how many rows there are.

Element by element, torch computes a row the same way in any company. What does not is everything that sums: matrix
products, means, softmax, norms. Within `exact_arithmetic` these operators are our own kernels, with one order of
summation for all shapes; the model's code, autograd and autocast above them see no difference, and a backward pass,
whose sums run over rows by their nature, is left as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

aten = torch.ops.aten


def why_inexact(lm: Any) -> str | None:
    """Why a transformers model cannot be computed exactly, as far as its config tells; None when nothing speaks against
    it."""
    config = lm.config.get_text_config()
    if getattr(lm, "hf_quantizer", None) is not None or getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized, and their kernels choose by the number of rows"
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any(getattr(config, name, None) for name in experts):
        return "it is a mixture of experts, whose products group whatever tokens are there"
    if next(lm.parameters()).dtype == torch.float64:
        return "its weights are float64"
    return None


class InexactOperator(NotImplementedError):
    """A model computes something whose result for a row may depend on the other rows, and exact mode knows no kernel
    for it."""


def exact_arithmetic() -> AbstractContextManager[Any]:
    """Within it, in this thread, floating-point sums over a row or a product's inner dimension are independent of the
    number of rows. Needs Triton; tensors must be bfloat16, float16 or float32.

    Raises (from the operators inside):
        InexactOperator: an operator that this cannot do; the message names it.
    """
    if any(isinstance(mode, _ExactArithmetic) for mode in _get_current_dispatch_mode_stack()):
        return nullcontext()
    return _ExactArithmetic()


class _ExactArithmetic(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):  # in inference mode these arrive whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        packet = func.overloadpacket
        if packet not in _SUMS or not _floating(args):
            return func(*args, **kwargs)
        replacement = _REPLACEMENTS.get(func)
        if replacement is None:
            raise InexactOperator(
                f"exact mode cannot compute {func}: its result for a token may depend on the other tokens in the "
                "batch. Leave exact mode off for this model"
            )
        return replacement(*args, **kwargs)


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _floating(args: tuple[Any, ...]) -> bool:
    first = next((arg for arg in args if isinstance(arg, Tensor)), None)
    return first is not None and first.is_floating_point()


# ---- products ----------------------------------------------------------------------------------------------


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    from hf_paged.kernels.triton.exact import DTYPES, matmul

    if a.dtype not in DTYPES or a.dtype != b.dtype:
        raise InexactOperator(f"exact mode multiplies bfloat16, float16 or float32, got {a.dtype} and {b.dtype}")
    return matmul(a, b, bias, out=out)


def _mm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    if out.stride(-1) == 1 and out.dtype == a.dtype and out.shape == (a.shape[0], b.shape[1]):
        return _product(a, b, out=out)
    return out.copy_(_product(a, b))


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if bias.ndim == 1 and bias.shape[0] == b.shape[-1] and bias.dtype == a.dtype and beta == alpha == 1:
        return _product(a, b, bias.contiguous())
    return bias * beta + _product(a, b) * alpha


# ---- sums --------------------------------------------------------------------------------------------------


def _sum(x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """As `aten.sum.dim_IntList`."""
    return _total(x, dim, keepdim).to(dtype or x.dtype)


def _mean(x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """As `aten.mean.dim`."""
    total = _total(x, dim, keepdim)
    return (total / (x.numel() // max(total.numel(), 1))).to(dtype or x.dtype)


def _total(x: Tensor, dim: Sequence[int] | None, keepdim: bool) -> Tensor:
    """float32, the sums over some dimensions; None, or none of them, is all."""
    from hf_paged.kernels.triton.exact import DTYPES, row_sum

    if x.dtype not in DTYPES:
        raise InexactOperator(f"exact mode sums bfloat16, float16 or float32, got {x.dtype}")
    gone = {d % x.ndim for d in dim} if dim else set(range(x.ndim))
    kept = [d for d in range(x.ndim) if d not in gone]
    sizes = [x.shape[d] for d in kept]
    rows = x.permute(*kept, *sorted(gone)).reshape(torch.Size(sizes).numel(), -1)
    shape = [1 if d in gone else size for d, size in enumerate(x.shape)] if keepdim else sizes
    return row_sum(rows).view(shape)


def _shifted(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """In float32: x less its maximum, the exponentials of that, and their sum."""
    x = x.float()
    shifted = x - x.amax(dim, keepdim=True)
    weights = shifted.exp()
    return shifted, weights, _total(weights, [dim], True)


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    _, weights, total = _shifted(x, dim)
    return (weights / total).to(torch.float32 if half_to_float else x.dtype)


def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    shifted, _, total = _shifted(x, dim)
    return (shifted - total.log()).to(torch.float32 if half_to_float else x.dtype)


def _layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `aten.native_layer_norm`: with the mean and the inverse deviation, float32, for the backward pass."""
    dims, wide = list(range(x.ndim - len(normalized_shape), x.ndim)), x.float()
    mean = _mean(wide, dims, True)
    centered = wide - mean
    inverse = (_mean(centered * centered, dims, True) + eps).rsqrt()
    out = centered * inverse
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return out.to(x.dtype), mean, inverse


def _rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """As `aten._fused_rms_norm`: with the inverse root, float32, for the backward pass."""
    dims, wide = list(range(x.ndim - len(normalized_shape), x.ndim)), x.float()
    inverse = (_mean(wide * wide, dims, True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    out = wide * inverse
    return (out if weight is None else out * weight).to(x.dtype), inverse


_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _product,
    aten.mm.out: _mm_out,
    aten.bmm.default: _product,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.mean.dim: _mean,
    aten.mean.default: _mean,
    aten.sum.dim_IntList: _sum,
    aten.sum.default: _sum,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax,
    aten.native_layer_norm.default: _layer_norm,
    aten._fused_rms_norm.default: _rms_norm,
}

_UNCOVERED = (
    "mv addmv dot vdot addbmm addr _grouped_mm _scaled_mm _scaled_grouped_mm _int_mm _weight_int4pack_mm "
    "_weight_int8pack_mm convolution _convolution native_group_norm var var_mean std std_mean norm linalg_vector_norm "
    "logsumexp prod cumsum cumprod logcumsumexp index_add index_add_ scatter_add scatter_add_ scatter_reduce "
    "_embedding_bag _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention_for_cpu _fused_sdp_choice "
    "_scaled_dot_product_attention_math"
)
"""Names of further operators that sum."""

_SUMS = {func.overloadpacket for func in _REPLACEMENTS} | {
    getattr(aten, name) for name in _UNCOVERED.split() if hasattr(aten, name)
}
