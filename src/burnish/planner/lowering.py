"""What CUDA would run where the CPU runs something else, for traces of tensors without data.

Fake tensors have to say that they are on the CPU: a CPU build of torch has no fake CUDA. Two operations are lowered
differently there and keep other tensors for backward: attention and RMS norm. Here they go to CUDA's own operators,
whose meta kernels save what CUDA saves. A third, group norm, is on another list of autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WIDEST_OF_FLASH = 256  # numbers per head
_GROUP_NORM = F.group_norm


@contextmanager
def cuda_lowering() -> Iterator[None]:
    """While it lasts, `F.scaled_dot_product_attention`, `F.rms_norm` and, within autocast, `F.group_norm` are CUDA's.

    Replaced by name: a TorchFunctionMode is off inside `torch.autograd.backward`, where blocks are recomputed.
    """
    replaced: tuple[tuple[Any, str, Any], ...] = (
        (F, "group_norm", _group_norm),
        (F, "scaled_dot_product_attention", _attention),
        (F, "rms_norm", _rms_norm),
        (torch, "rms_norm", _rms_norm),
    )
    before = [getattr(owner, name) for owner, name, _ in replaced]
    for owner, name, ours in replaced:
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(replaced, before, strict=True):
            setattr(owner, name, original)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """(B, heads, S, D) each, or (heads, S, D), as one sample's. Flash attention; the memory-efficient kernel with a
    mask, which it takes as a bias, or with heads wider than flash attention's 256."""
    if query.dim() == 3:
        mask = attn_mask if attn_mask is None or attn_mask.dim() < 3 else attn_mask[None]
        one = (query[None], key[None], value[None])
        return _attention(*one, mask, dropout_p, is_causal, scale, enable_gqa)[0]
    if enable_gqa and key.shape[1] != query.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    if attn_mask is None and query.shape[-1] <= WIDEST_OF_FLASH:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        flashed: Tensor = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return flashed
    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype) if attn_mask.dtype == torch.bool else attn_mask
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    attended: Tensor = efficient(
        query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]
    return attended


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """In float32 within autocast, as CUDA's list has it (torch's aten/src/ATen/autocast_mode.h); that of a CPU leaves
    it in the type of its input."""
    if not torch.is_autocast_enabled("cpu"):
        return _GROUP_NORM(input, num_groups, weight, bias, eps)
    with torch.autocast("cpu", enabled=False):
        return _GROUP_NORM(input.float(), num_groups, weight, bias, eps)


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if weight is not None and weight.dtype != input.dtype:
        weight = weight.to(input.dtype)
    normed: Tensor = FusedRmsNorm.apply(input, weight, len(normalized_shape))  # type: ignore[no-untyped-call]
    return normed


class FusedRmsNorm(torch.autograd.Function):
    """What `aten._fused_rms_norm` takes and keeps on CUDA: the input as it is, and a float32 for each row.

    On a CPU that operator is put together from others, and a float32 copy of the input is kept. What comes out has the
    right shape and type and no meaning.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, dimensions: int) -> Tensor:
        rows = input.shape[: input.dim() - dimensions]
        ctx.save_for_backward(input, weight, torch.empty(rows, dtype=torch.float32))
        return torch.neg(input)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, _ = ctx.saved_tensors
        for_weight = torch.empty_like(weight) if weight is not None and ctx.needs_input_grad[1] else None
        return torch.mul(gradients[0], input), for_weight, None
