"""Adapters cast to the number type of the run once per forward of the denoiser, not once per layer and pass.

Hundreds of thin matrices, each cast on its own in forward, again where a block is computed again, and back in backward,
are most of an adapter's kernels. Together they are a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from burnish.adapters.layer import AdapterLayer


class _CastTogether(torch.autograd.Function):
    """Copies of all matrices in one number type; backward casts their gradients back, and leaves out what has none."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(one, dtype=dtype) for one in masters]
        torch._foreach_copy_(copies, list(masters))
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [one for one in gradients if one is not None]
        widened = [torch.empty_like(one, dtype=torch.float32) for one in given]
        if given:
            torch._foreach_copy_(widened, given)
        left = iter(widened)
        return None, *(None if one is None else next(left) for one in gradients)


def cast_once(denoiser: nn.Module, layers: Sequence[AdapterLayer], dtype: torch.dtype) -> None:
    """Before each forward of `denoiser` that records gradients, cast its trained adapters for all uses until the next.

    Gradients still arrive in the float32 weights. Each backward has to come before the next forward. Does nothing for
    float32.
    """
    if dtype == torch.float32:
        return

    def cast(*_: object) -> None:
        if torch.is_grad_enabled():
            masters = [layer.factors() for layer in layers]
            copies = iter(_CastTogether.apply(dtype, *chain(*masters)))  # type: ignore[no-untyped-call]
            for layer, own in zip(layers, masters, strict=True):
                layer.cast = tuple(islice(copies, len(own)))

    denoiser.register_forward_pre_hook(cast)
