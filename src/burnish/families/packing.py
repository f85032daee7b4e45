"""Latents as patches of 2x2, and where the patches are: what the denoisers that came after FLUX.1 share.

After https://github.com/black-forest-labs/flux (`src/flux/sampling.py`).

Shape letters: B batch, C channels, H W height and width of latents, N patches, D width of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(latents_BCHW: Tensor) -> Tensor:
    """Patches of 2x2 latents in reading order, (B, H/2 * W/2, 4C), channels outermost within a patch."""
    batch, channels, height, width = latents_BCHW.shape
    patches = latents_BCHW.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(patches_BND: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for latents of `height` x `width`."""
    batch, _, depth = patches_BND.shape
    patches = patches_BND.reshape(batch, height // 2, width // 2, depth // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, depth // 4, height, width)


def patch_positions(rows: int, columns: int, device: torch.device, picture: float = 0.0) -> Tensor:
    """(picture, row, column) of each patch in reading order, (N, 3) float32.

    Args:
        picture: tells the patches of several pictures in one sequence apart; 0 is the one that is drawn.
    """
    row = torch.arange(rows, device=device, dtype=torch.float32)
    column = torch.arange(columns, device=device, dtype=torch.float32)
    first = torch.full((1,), picture, device=device)
    return torch.stack(torch.meshgrid(first, row, column, indexing="ij"), -1).reshape(-1, 3)
