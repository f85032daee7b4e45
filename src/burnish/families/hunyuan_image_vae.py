"""HunyuanImage's VAE in files: in diffusers' names or in Tencent's."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from diffusers import AutoencoderKLHunyuanImage

from burnish.families.slots import Slot
from burnish.families.weights import Layout, below


def vae_slot() -> Slot:
    return Slot(
        "vae",
        "vae",
        AutoencoderKLHunyuanImage.from_config,
        _find_vae,
        file_hint="hunyuan_image_2.1_vae_fp16.safetensors",
    )


def _find_vae(layout: Layout) -> Layout | None:
    """In diffusers' names or Tencent's, whose stages diffusers counts through block by block."""
    for prefix in ("", "vae.", "first_stage_model."):
        inside = below(layout, prefix)
        if "encoder.down_blocks.0.conv1.weight" in inside:
            return inside
        if "encoder.down.5.block.0.conv1.weight" in inside:
            return {vae_name(name): _flat(piece) for name, piece in inside.items()}
    return None


def vae_name(name: str) -> str:
    """Diffusers' name for one of Tencent's."""
    for theirs, ours, blocks in (
        ("encoder.down", "encoder.down_blocks", 2),
        ("decoder.up", "decoder.up_blocks", 3),
    ):
        found = re.fullmatch(rf"{re.escape(theirs)}\.(\d+)\.(?:block\.(\d+)|(?:up|down)sample)\.(.+)", name)
        if found:
            place = int(found[1]) * (blocks + 1) + int(found[2] or blocks)
            return f"{ours}.{place}.{found[3]}"
    for theirs, ours in (("mid.block_1", "mid_block.resnets.0"), ("mid.block_2", "mid_block.resnets.1")):
        name = name.replace(theirs, ours)
    name = name.replace(".proj_out.", ".proj.") if "mid.attn_1." in name else name
    name = re.sub(r"mid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1.", name)
    return name.replace("mid.attn_1.", "mid_block.attentions.0.")


def _flat(piece: Any) -> Any:
    """A convolution of one frame without its time axis."""
    return replace(piece, shape=(*piece.shape[:2], *piece.shape[3:])) if len(piece.shape) == 5 else piece
