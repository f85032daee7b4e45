"""From float32 to bfloat16 without losing what a step adds.

bfloat16 keeps 8 bits of a number. A step that moves a weight by less than 1/512 of it rounds to nothing, time and
again: a model that is trained in bfloat16 with rounding to nearest stands still once its steps are small.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DROPPED = 1 << 16  # the steps of float32 between two neighbours of bfloat16
_KEPT = -_DROPPED  # as bits of an int32: sign, exponent and the first 7 bits behind the point


def rounded_stochastically(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Each value as one of the two bfloat16 beside it, so that the mean over draws is the value itself.

    The upper neighbour in magnitude is taken with probability (exact - lower) / (upper - lower): a uniform number of
    16 bits is added below the bits that stay, the rest is cut off. (Gupta et al., arXiv 1502.02551, section 3.1; for
    bfloat16 weights arXiv 2010.06192, section 4.) NaN and infinities stay what they are.

    Args:
        exact: float32.
        generator: on the device of `exact`; it draws one number per value.

    Returns:
        bfloat16 of the same shape.
    """
    drawn = torch.randint(_DROPPED, exact.shape, generator=generator, dtype=torch.int32, device=exact.device)
    bits = drawn.add_(exact.contiguous().view(torch.int32)).bitwise_and_(_KEPT)
    return bits.view(torch.float32).to(torch.bfloat16)


def split(exact: Tensor) -> tuple[Tensor, Tensor]:
    """(nearest, compensation), both bfloat16, whose sum is `exact` to 16 bits: what Kahan's summation carries on.

    (arXiv 2010.06192, algorithm 3. The sum is formed in float32, so that the compensation is what rounding lost.)
    """
    nearest = exact.to(torch.bfloat16)
    return nearest, (exact - nearest.float()).to(torch.bfloat16)
