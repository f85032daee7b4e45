"""Noise of one sample, from a generator of its own: plain, with an offset, with coarser noise on top."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.config.objective import Multires


def noise_of(
    shape: Sequence[int], generator: torch.Generator, offset: float = 0.0, multires: Multires | None = None
) -> Tensor:
    """Standard normal noise (C, H, W) or (C, T, H, W), on the CPU.

    Args:
        offset: lets pictures turn dark or bright: one normal value per sample and channel, so many times as strong.
            Guttenberg 2023, https://www.crosslabs.org/blog/diffusion-with-offset-noise
        multires: coarser noise, added before the offset.
    """
    noise_CHW = torch.randn(tuple(shape), generator=generator)
    if multires is not None:
        noise_CHW = with_coarser(noise_CHW, generator, multires)
    if offset:
        one_each = torch.randn((shape[0],) + (1,) * (len(shape) - 1), generator=generator)
        noise_CHW = noise_CHW + offset * one_each
    return noise_CHW


def with_coarser(noise_CHW: Tensor, generator: torch.Generator, multires: Multires) -> Tensor:
    """Noise at smaller and smaller sizes enlarged on top, level i by `discount^i`, then divided by the deviation.

    Each level is smaller by a factor drawn between 2 and 4 for the sample, as in its first description: Whitaker 2023,
    https://wandb.ai/johnowhitaker/multires_noise. A clip's frames get their own.
    """
    *_, height, width = noise_CHW.shape
    frames_1NHW = noise_CHW.reshape(1, -1, height, width)
    for level in range(1, multires.levels + 1):
        factor = (2 + 2 * float(torch.rand((), generator=generator))) ** level
        size = max(1, int(height / factor)), max(1, int(width / factor))
        coarse_1NHW = torch.randn(1, frames_1NHW.shape[1], *size, generator=generator)
        enlarged_1NHW = F.interpolate(coarse_1NHW, (height, width), mode="bilinear")
        frames_1NHW = frames_1NHW + multires.discount**level * enlarged_1NHW
        if 1 in size:
            break
    return (frames_1NHW / frames_1NHW.std()).reshape(noise_CHW.shape)
