"""First frames of clips that the denoiser takes in clean, in place of noisy ones.

Shape letters: B batch, C channels, T frames, H W height and width of latents.
"""

from __future__ import annotations

import torch
from torch import Tensor


def put_in(first_BC1HW: Tensor, noisy_BCTHW: Tensor) -> Tensor:
    """Noisy latents with the first frame's in place of their own."""
    return torch.cat([first_BC1HW.to(noisy_BCTHW), noisy_BCTHW[:, :, 1:]], dim=2)


def leading_to(first_BC1HW: Tensor, velocity_BCTHW: Tensor, noisy_BCTHW: Tensor, t_B: Tensor) -> Tensor:
    """A velocity that at the first frame leads straight to it: (noisy - data) / t is noise - data."""
    t_B1111 = t_B.view(-1, 1, 1, 1, 1).clamp_min(1e-6)
    # Apple's GPUs lack float64.
    precise = torch.float32 if noisy_BCTHW.device.type == "mps" else torch.float64
    kept = (noisy_BCTHW[:, :, :1].to(precise) - first_BC1HW.to(precise)) / t_B1111
    return torch.cat([kept.to(velocity_BCTHW), velocity_BCTHW[:, :, 1:]], dim=2)
