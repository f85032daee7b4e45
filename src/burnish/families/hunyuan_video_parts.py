"""HunyuanVideo's denoiser and VAE: how they are made, found in single files, and read off their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel

from burnish.families.hunyuan_names import ONE_STREAM, TWO_STREAMS, TimeTextGuidance, find_transformer
from burnish.families.native import depth
from burnish.families.slots import Config, Slot
from burnish.families.weights import Layout, below

HEAD_DIM = 128


def transformer_slot() -> Slot:
    return Slot("transformer", "denoiser", _make_transformer, find_transformer, _transformer_config)


def vae_slot() -> Slot:
    return Slot(
        "vae",
        "vae",
        AutoencoderKLHunyuanVideo.from_config,
        _find_vae,
        _vae_config,
        file_hint="hunyuan_video_vae_bf16.safetensors",
    )


def _make_transformer(config: Mapping[str, Any]) -> HunyuanVideoTransformer3DModel:
    """The denoiser, with a guidance embedding that can be bypassed where it has one."""
    transformer: HunyuanVideoTransformer3DModel = HunyuanVideoTransformer3DModel.from_config(dict(config))
    if transformer.config.guidance_embeds or transformer.config.image_condition_type:
        transformer.time_text_embed = TimeTextGuidance(transformer.time_text_embed)
    return transformer


def _transformer_config(shipped: Config, layout: Layout) -> dict[str, Any]:
    width, channels = layout["x_embedder.proj.weight"].shape[:2]
    head_dim = layout[f"{TWO_STREAMS}.0.attn.norm_q.weight"].shape[0]
    if head_dim != HEAD_DIM:  # how positions are spread over the heads is not written in a single file
        raise ValueError(f"heads of {HEAD_DIM}: they are of {head_dim}")
    return {
        **shipped,
        "in_channels": channels,
        "num_attention_heads": width // head_dim,
        "num_layers": depth(layout, f"{TWO_STREAMS}."),
        "num_single_layers": depth(layout, f"{ONE_STREAM}."),
        "num_refiner_layers": depth(layout, "context_embedder.token_refiner.refiner_blocks."),
        "text_embed_dim": layout["context_embedder.proj_in.weight"].shape[1],
        "pooled_projection_dim": layout["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in layout,
    }


def _find_vae(layout: Layout) -> Layout | None:
    """Diffusers kept the names of the release."""
    for prefix in ("", "vae.", "first_stage_model."):
        inside = below(layout, prefix)
        if {
            "encoder.down_blocks.0.resnets.0.conv1.conv.weight",
            "encoder.mid_block.attentions.0.to_q.weight",
            "post_quant_conv.weight",
        } <= set(inside):
            return inside
    return None


def _vae_config(shipped: Config, layout: Layout) -> dict[str, Any]:
    stages = depth(layout, "encoder.down_blocks.")
    return {
        **shipped,
        "latent_channels": layout["post_quant_conv.weight"].shape[0],
        "block_out_channels": [
            layout[f"encoder.down_blocks.{stage}.resnets.0.conv1.conv.weight"].shape[0]
            for stage in range(stages)
        ],
        "layers_per_block": depth(layout, "encoder.down_blocks.0.resnets."),
    }
