"""The Wan VAE, and Qwen-Image's of the same layout, with the released factors and channels; only widths are small."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLQwenImage21, AutoencoderKLWan

# Eight times smaller, four frames per latent frame after the first, along time in the last two of three stages.
_SMALL: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 16,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}


def wan_vae() -> AutoencoderKLWan:
    """Wan 2.1's, with its released mean and deviation of the 16 channels."""
    return AutoencoderKLWan(**_SMALL)


def wan22_vae() -> AutoencoderKLWan:
    """Wan 2.2's of the 5B model: 2x2 pixels packed first, residual stages, 48 channels, sixteen times smaller."""
    generator = torch.Generator().manual_seed(0)
    vae = AutoencoderKLWan(
        **{**_SMALL, "z_dim": 48},
        decoder_base_dim=4,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=(torch.randn(48, generator=generator) * 0.2).tolist(),
        latents_std=(torch.rand(48, generator=generator) + 0.4).tolist(),
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(3)  # random weights draw grey pictures, which tell little apart
    return vae


def qwen_image_vae() -> AutoencoderKLQwenImage:
    """Qwen-Image's, of Wan 2.1's layout."""
    return AutoencoderKLQwenImage(**_SMALL)


def qwen_image21_vae() -> AutoencoderKLQwenImage21:
    """Qwen-Image 2.1's, of Wan 2.2's layout without its time: four channels with the alpha, sixteen times smaller.

    With the released means and deviations of the 64 channels.
    """
    vae = AutoencoderKLQwenImage21(base_dim=4, decoder_base_dim=6, num_res_blocks=1)
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(3)  # as Wan 2.2's
    return vae
