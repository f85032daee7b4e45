"""The KL autoencoder of latent diffusion (arXiv 2112.10752): names in files, config from shapes, both ways.

Shape letters: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from burnish.errors import ModelError
from burnish.families.sources import read_json, weight_files
from burnish.families.weights import Layout, below, layout_of, load_module

# Part of training the autoencoder; copies that some programs saved.
UNUSED = ("loss.*", "model_ema.*")

_RENAMED = {
    "norm_out": "conv_norm_out",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1": "mid_block.attentions.0",
    "nin_shortcut": "conv_shortcut",
    # The names diffusers itself used up to version 0.16; the released SD 1.5 still has them.
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
_STAGE = re.compile(r"(encoder|decoder)\.(down|up)\.(\d+)\.(block|downsample|upsample)\.")


def load_from_folder(folder: Path, *, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKL:
    """The VAE of a diffusers folder."""
    return _load(read_json(folder / "config.json"), layout_of(weight_files(folder)), dtype, device)


def load_from_layout(
    layout: Layout, shipped: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device | str
) -> AutoencoderKL:
    """The VAE of a single file, in original or diffusers names; widths and depths follow the weights.

    Raises:
        ModelError: these are no weights of such a VAE.
    """
    layout = diffusers_names(layout)
    return _load(config_from_shapes(shipped, layout), layout, dtype, device)


def _load(
    config: Mapping[str, Any], layout: Layout, dtype: torch.dtype, device: torch.device | str
) -> AutoencoderKL:
    if config.get("latents_mean") is not None:
        raise ModelError(
            "This VAE has its own mean and deviation per channel (as Playground 2.5); this is not supported.",
            remedy="Use a VAE of the family's own kind with `model.vae`.",
        )
    return load_module(
        lambda: AutoencoderKL.from_config(dict(config)),
        diffusers_names(layout),
        dtype=safe_dtype(config, dtype),
        device=device,
        what="VAE",
        unused=UNUSED,
    )


def safe_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """Float32 in place of float16, in which VAEs overflow unless `force_upcast` is off (as in diffusers)."""
    return torch.float32 if dtype == torch.float16 and config.get("force_upcast", True) else dtype


def layout_in(layout: Layout, prefixes: Sequence[str]) -> Layout | None:
    """The VAE inside a file, under diffusers' names: below a prefix, or the whole file; None if there is none."""
    for prefix in (*prefixes, ""):
        inside = below(layout, prefix)
        if "decoder.conv_in.weight" in inside:
            return diffusers_names(inside)
    return None


def diffusers_names(layout: Layout) -> Layout:
    """A VAE's layout under diffusers' present names, from those, older ones, or the original ones."""
    stages = 1 + max((int(match[3]) for name in layout if (match := _STAGE.match(name))), default=0)
    renamed: Layout = {}
    for name, piece in layout.items():
        new = _diffusers_name(name, stages)
        is_projection = ".attentions." in new and new.endswith(".weight") and ".to_" in new
        renamed[new] = piece.as_linear() if is_projection else piece
    return renamed


def _diffusers_name(name: str, stages: int) -> str:
    match = _STAGE.match(name)
    if match:
        side, way, number, kind = match.groups()
        # The original counts the decoder's stages from the picture, diffusers from the latents.
        index = int(number) if way == "down" else stages - 1 - int(number)
        inner = {"block": "resnets", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}[kind]
        name = f"{side}.{way}_blocks.{index}.{inner}.{name[match.end() :]}"
    elif ".mid.attn_1." in name:
        stem, _, kind = name.rpartition(".")
        head, _, last = stem.rpartition(".")
        name = f"{head}.{_ATTENTION.get(last, last)}.{kind}"
    for old, new in _RENAMED.items():
        name = re.sub(rf"(?<=\.){re.escape(old)}(?=\.)", new, name)
    return name


_ORIGINAL = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_BLOCK = re.compile(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers\.0|upsamplers\.0)\.")


def original_names(names: Iterable[str]) -> dict[str, str]:
    """The names of latent diffusion for diffusers' present ones: `diffusers_names` the other way round."""
    names = list(names)
    stages = 1 + max((int(match[3]) for name in names if (match := _BLOCK.match(name))), default=0)
    return {name: _original_name(name, stages) for name in names}


def _original_name(name: str, stages: int) -> str:
    match = _BLOCK.match(name)
    if match:
        side, way, number, kind = match.groups()
        index = int(number) if way == "down" else stages - 1 - int(number)
        inner = {"resnets": "block", "downsamplers.0": "downsample", "upsamplers.0": "upsample"}[kind]
        name = f"{side}.{way}.{index}.{inner}.{name[match.end() :]}"
    for old, new in _ORIGINAL.items():
        name = re.sub(rf"(?<=\.){re.escape(old)}(?=\.)", new, name)
    return name


def config_from_shapes(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The shipped config with the widths and depths of `layout` (names of `diffusers_names`).

    Group norm has 32 groups as released, or as many as divide every width where that is fewer.
    """
    try:
        latent_channels = layout["decoder.conv_in.weight"].shape[1]
        widths: list[int] = []
        while (name := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in layout:
            widths.append(layout[name].shape[0])
        depth = sum(name.startswith("encoder.down_blocks.0.resnets.") for name in layout if "conv1.w" in name)
        if not widths:
            raise KeyError("encoder.down_blocks.0")
    except KeyError as error:
        raise ModelError(
            f"No VAE among {len(layout)} tensors such as {', '.join(sorted(layout)[:3])}: it lacks {error}.",
            remedy="Name the VAE's file under `model.vae`.",
        ) from error
    return {
        **shipped,
        "latent_channels": latent_channels,
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": depth,
        "norm_num_groups": math.gcd(32, *widths),
        "use_quant_conv": "quant_conv.weight" in layout,
        "use_post_quant_conv": "post_quant_conv.weight" in layout,
    }


def shapes_tell(config: Mapping[str, Any]) -> bool:
    """Whether a single file, which has no config, is read as this VAE: groups of channels leave no trace in weights."""
    return int(config["norm_num_groups"]) == math.gcd(32, *config["block_out_channels"])


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels_B3HW: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> latents (B, C, H/8, W/8) in the scale the denoiser sees: the posterior's mode."""
    mode_BCHW: Tensor = vae.encode(pixels_B3HW.to(vae.device, vae.dtype)).latent_dist.mode()
    scaled_BCHW: Tensor = (mode_BCHW - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
    return scaled_BCHW


@torch.no_grad()
def decode(vae: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
    """Latents in the scale the denoiser sees -> pixels (B, 3, H, W) in [-1, 1], not clamped."""
    plain_BCHW = latents_BCHW.to(vae.device, vae.dtype) / vae.config.scaling_factor
    pixels_B3HW: Tensor = vae.decode(plain_BCHW + (vae.config.get("shift_factor") or 0.0), return_dict=False)[
        0
    ]
    return pixels_B3HW
