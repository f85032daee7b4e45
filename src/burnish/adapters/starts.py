"""What A and B of a LoRA begin with where that is not zero: the part of the base weight that carries most.

Training moves along the weight's own main directions from the first step on, instead of having to find them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from burnish.randomness import torch_generator

_EXACT = 512  # below this smaller side an exact decomposition costs nothing
_SPARE, _ROUNDS = 8, 4  # of a randomized one (arXiv 0909.4061, algorithms 4.4 and 5.1)


def principal_factors(
    weight: Tensor, rank: int, kind: Literal["pissa", "olora"], scale: float, seed: int, name: str
) -> tuple[Tensor, Tensor]:
    """A (rank, in, *kernel) and B (out, rank, 1, ...) with `scale` B A the part of the weight (out, in, *kernel).

    PiSSA (arXiv 2404.02948) takes the largest `rank` singular values, shared evenly between A and B. OLoRA (arXiv
    2406.01775) takes the first `rank` columns of Q and rows of R of the weight's QR decomposition. On the CPU, float32.
    """
    matrix = weight.detach().float().flatten(1)
    if kind == "olora":
        q, r = torch.linalg.qr(matrix)
        up, down = q[:, :rank], r[:rank]
    else:
        left, values, right = _largest(matrix, rank, seed, name)
        root = values.sqrt()
        up, down = left * root, root[:, None] * right
    share = scale**0.5
    ones = (1 for _ in weight.shape[2:])
    return (
        (down / share).reshape(rank, *weight.shape[1:]).cpu().contiguous(),
        (up / share).reshape(weight.shape[0], rank, *ones).cpu().contiguous(),
    )


def _largest(matrix: Tensor, rank: int, seed: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values and their vectors: (out, r), (r,), (r, in)."""
    if min(matrix.shape) <= max(_EXACT, 2 * (rank + _SPARE)):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    drawn = torch.randn(matrix.shape[1], rank + _SPARE, generator=torch_generator(seed, "pissa", name))
    basis = torch.linalg.qr(matrix @ drawn.to(matrix.device)).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left[:, :rank], values[:rank], right[:rank]
