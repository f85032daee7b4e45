"""LTX-Video's autoencoder (arXiv 2501.00103, section 2.1): 32 x 32 pixels and 8 frames per latent, 128 channels.

Three releases differ: the first (0.9.0) decodes as it encodes; from 0.9.1 on the decoder also takes the last step of
denoising and is told a time; from 0.9.5 on the encoder has residual downsampling. Mean and deviation of the latents are
among the weights. In the files of the release the stages are one flat list, here the blocks of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo
from torch import Tensor

from burnish.families import video_vae
from burnish.families.slots import Config, Slot
from burnish.families.weights import Layout, below

_PREFIXES = ("", "vae.")
_SIGNS = ("per_channel_statistics.std-of-means", "encoder.down_blocks.0.res_blocks.0.conv1.conv.weight")
_STATISTICS = {
    "per_channel_statistics.mean-of-means": "latents_mean",
    "per_channel_statistics.std-of-means": "latents_std",
}
_STAGE = re.compile(r"(encoder\.down_blocks|decoder\.up_blocks)\.(\d+)\.(.+)")
_RESIDUAL_DOWN = "encoder.down_blocks.1.conv.conv.weight"  # the first release has a plain convolution there
_EARLY_UP = "decoder.up_blocks.1.conv.conv.weight"  # there it has a stage of layers

# By place in the flat list: what the release keeps there, in diffusers' blocks.
_PLAIN_ENCODER = {
    0: "down_blocks.0",
    1: "down_blocks.0.downsamplers.0",
    2: "down_blocks.0.conv_out",
    3: "down_blocks.1",
    4: "down_blocks.1.downsamplers.0",
    5: "down_blocks.1.conv_out",
    6: "down_blocks.2",
    7: "down_blocks.2.downsamplers.0",
    8: "down_blocks.3",
    9: "mid_block",
}
_RESIDUAL_ENCODER = {
    **{2 * stage: f"down_blocks.{stage}" for stage in range(4)},
    **{2 * stage + 1: f"down_blocks.{stage}.downsamplers.0" for stage in range(4)},
    8: "mid_block",
}
_PLAIN_DECODER = {
    0: "mid_block",
    1: "up_blocks.0",
    2: "up_blocks.1.upsamplers.0",
    3: "up_blocks.1",
    4: "up_blocks.2.conv_in",
    5: "up_blocks.2.upsamplers.0",
    6: "up_blocks.2",
    7: "up_blocks.3.conv_in",
    8: "up_blocks.3.upsamplers.0",
    9: "up_blocks.3",
}
_LATER_DECODER = {
    0: "mid_block",
    **{2 * stage + 1: f"up_blocks.{stage}.upsamplers.0" for stage in range(4)},
    **{2 * stage + 2: f"up_blocks.{stage}" for stage in range(4)},
}


def ltx_vae_slot(hint: str = "ltx-video VAE") -> Slot:
    return Slot(
        "vae",
        "vae",
        AutoencoderKLLTXVideo.from_config,
        find_ltx_vae,
        config_from_shapes,
        unused=("per_channel_statistics.*",),
        file_hint=hint,
    )


def find_ltx_vae(layout: Layout) -> Layout | None:
    """An LTX-Video VAE inside a file, under diffusers' names; None if there is none."""
    for prefix in _PREFIXES:
        inside = below(layout, prefix)
        if all(sign in inside for sign in _SIGNS):
            return diffusers_names(inside)
        if "latents_std" in inside and "encoder.down_blocks.0.resnets.0.conv1.conv.weight" in inside:
            return inside
    return None


def diffusers_names(layout: Layout) -> Layout:
    """The layout of the release under diffusers' names."""
    encoder = _RESIDUAL_ENCODER if _RESIDUAL_DOWN in layout else _PLAIN_ENCODER
    decoder = _LATER_DECODER if _EARLY_UP in layout else _PLAIN_DECODER
    return {_diffusers_name(name, encoder, decoder): piece for name, piece in layout.items()}


def _diffusers_name(name: str, encoder: Mapping[int, str], decoder: Mapping[int, str]) -> str:
    if name in _STATISTICS:
        return _STATISTICS[name]
    stage = _STAGE.fullmatch(name)
    if stage:
        places = encoder if stage[1].startswith("encoder") else decoder
        if int(stage[2]) in places:
            side, rest = stage[1].partition(".")[0], stage[3]
            name = f"{side}.{places[int(stage[2])]}.{rest}"
    for theirs, ours in (
        ("res_blocks", "resnets"),
        ("conv_shortcut", "conv_shortcut.conv"),
        ("norm3.norm", "norm3"),
        ("last_time_embedder", "time_embedder"),
        ("last_scale_shift_table", "scale_shift_table"),
    ):
        name = name.replace(theirs, ours)
    return name


def config_from_shapes(shipped: Config, layout: Layout) -> dict[str, Any]:
    """The shipped config, which is that of 0.9.0, turned into that of the release that `layout` is of.

    Raises:
        KeyError: what every such VAE has is missing.
    """
    config = {**shipped, "latent_channels": layout["latents_std"].shape[0]}
    if "encoder.down_blocks.0.downsamplers.0.conv.conv.weight" in layout:
        config |= {
            "down_block_types": ["LTXVideo095DownBlock3D"] * 4,
            "spatio_temporal_scaling": [True] * 4,
            "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
            "spatial_compression_ratio": 32,
            "temporal_compression_ratio": 8,
        }
    stages = len(config["down_block_types"])
    widths = [_width(layout, f"encoder.down_blocks.{stage}") for stage in range(stages)]
    residual = "downsample_type" in config and "spatial" in config["downsample_type"]
    config["block_out_channels"] = [*widths, _width(layout, "encoder.mid_block")] if residual else widths
    config["layers_per_block"] = [
        *(_depth(layout, f"encoder.down_blocks.{stage}") for stage in range(stages)),
        _depth(layout, "encoder.mid_block"),
    ]
    return {**config, **_decoder_config(layout)}


def _decoder_config(layout: Layout) -> dict[str, Any]:
    stages = 0
    while f"decoder.up_blocks.{stages}.resnets.0.conv1.conv.weight" in layout:
        stages += 1
    blocks = ["decoder.mid_block", *(f"decoder.up_blocks.{stage}" for stage in range(stages))]
    # Diffusers counts from the last block to the first.
    depths = [_depth(layout, block) for block in reversed(blocks)]
    found: dict[str, Any] = {"decoder_layers_per_block": depths}
    if "decoder.time_embedder.timestep_embedder.linear_1.weight" not in layout:
        widths = [_width(layout, block) for block in reversed(blocks[1:])]
        return {**found, "decoder_block_out_channels": widths}
    widths = [_width(layout, block) for block in blocks[:-1]]
    noisy = [f"{block}.resnets.0.per_channel_scale1" in layout for block in reversed(blocks)]
    return {
        **found,
        "decoder_block_out_channels": widths[::-1],
        "decoder_spatio_temporal_scaling": [True] * stages,
        "decoder_inject_noise": noisy,
        "upsample_residual": [True] * stages,
        "upsample_factor": [2] * stages,
        "timestep_conditioning": True,
    }


def _width(layout: Layout, block: str) -> int:
    return layout[f"{block}.resnets.0.conv1.conv.weight"].shape[0]


def _depth(layout: Layout, block: str) -> int:
    stem, end = f"{block}.resnets.", ".conv1.conv.weight"
    return sum(name.startswith(stem) and name.endswith(end) for name in layout)


@torch.no_grad()
def decode(vae: Any, latents_BCTHW: Tensor) -> Tensor:
    """Latents in the scale the denoiser sees -> pixels in [-1, 1], not clamped: the same ones at every call.

    A decoder that takes the last step is told that the latents are clean; what noise 0.9.1's draws is fixed.
    """
    mean, deviation = video_vae.statistics(vae)
    plain_BCTHW = latents_BCTHW.to(vae.device, vae.dtype) * deviation + mean
    clean_B = plain_BCTHW.new_zeros(len(plain_BCTHW)) if vae.config.timestep_conditioning else None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pixels_B3THW: Tensor = vae.decode(plain_BCTHW, clean_B, return_dict=False)[0]
    return pixels_B3THW
