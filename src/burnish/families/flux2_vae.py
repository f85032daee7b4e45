"""The autoencoder of FLUX.2: 32 channels at 1/8, folded 2x2 into 128 at 1/16 and normed by its running statistics.

After https://github.com/black-forest-labs/flux2 (`src/flux2/autoencoder.py`).

Shape letters: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor

from burnish.families import autoencoder
from burnish.families.slots import Config, Slot
from burnish.families.weights import Layout, below

FOLD = 2  # latents per side of a fold
CHANNELS = 32 * FOLD * FOLD
COMPRESSION = 8 * FOLD
_PREFIXES = ("vae.", "first_stage_model.", "")
# The release keeps these inside the coder that they are next to.
_MOVED = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}


def flux2_vae_slot() -> Slot:
    return Slot(
        folder="vae",
        part="vae",
        make=AutoencoderKLFlux2.from_config,
        find=_find,
        config_of=_config_from_shapes,
        unused=autoencoder.UNUSED,
        file_hint="flux2-vae.safetensors",
    )


def _find(layout: Layout) -> Layout | None:
    for prefix in _PREFIXES:
        inside = below(layout, prefix)
        if "bn.running_mean" in inside and "decoder.conv_in.weight" in inside:
            return autoencoder.diffusers_names({_moved(name): piece for name, piece in inside.items()})
    return None


def _moved(name: str) -> str:
    old = next((old for old in _MOVED if name.startswith(old)), None)
    return name if old is None else _MOVED[old] + name[len(old) :]


def _config_from_shapes(shipped: Config, layout: Layout) -> dict[str, Any]:
    """As of any KL autoencoder; there is one with a narrower decoder."""
    config = autoencoder.config_from_shapes(shipped, layout)
    stages = len(config["block_out_channels"])
    decoder = [layout[f"decoder.up_blocks.{n}.resnets.0.conv1.weight"].shape[0] for n in range(stages)]
    return {**config, "decoder_block_out_channels": decoder[::-1]}


def fold(latents_BCHW: Tensor) -> Tensor:
    """2x2 neighbours become channels, innermost: (B, C, H, W) -> (B, 4C, H/2, W/2)."""
    return torch.nn.functional.pixel_unshuffle(latents_BCHW, FOLD)


def unfold(latents_BCHW: Tensor) -> Tensor:
    """The inverse of `fold`."""
    return torch.nn.functional.pixel_shuffle(latents_BCHW, FOLD)


def _statistics(vae: AutoencoderKLFlux2, like: Tensor, epsilon: float | None) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each folded channel, (1, C, 1, 1)."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    added = vae.config.batch_norm_eps if epsilon is None else epsilon
    deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + added)
    return mean.to(like.device, like.dtype), deviation.to(like.device, like.dtype)


@torch.no_grad()
def encode(vae: AutoencoderKLFlux2, pixels_B3HW: Tensor, epsilon: float | None = None) -> Tensor:
    """Pixels in [-1, 1] -> latents (B, 128, H/16, W/16) as the denoiser sees them: the posterior's mode.

    `epsilon` stands under the root of the variance, where a family was trained with another than the config says.
    """
    mode_BCHW = vae.encode(pixels_B3HW.to(vae.device, vae.dtype)).latent_dist.mode()
    folded_BCHW = fold(mode_BCHW)
    mean, deviation = _statistics(vae, folded_BCHW, epsilon)
    return (folded_BCHW - mean) / deviation


@torch.no_grad()
def decode(vae: AutoencoderKLFlux2, latents_BCHW: Tensor, epsilon: float | None = None) -> Tensor:
    """Latents as the denoiser sees them -> pixels (B, 3, H, W) in [-1, 1], not clamped."""
    latents_BCHW = latents_BCHW.to(vae.device)
    mean, deviation = _statistics(vae, latents_BCHW, epsilon)
    folded_BCHW = latents_BCHW * deviation + mean
    pixels_B3HW: Tensor = vae.decode(unfold(folded_BCHW).to(vae.dtype), return_dict=False)[0]
    return pixels_B3HW
