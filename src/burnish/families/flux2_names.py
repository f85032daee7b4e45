"""FLUX.2's transformer: its names in single files, its config from shapes, and what of it is trained.

After https://github.com/black-forest-labs/flux2 (`src/flux2/model.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from burnish.families.native import NativeNames, depth
from burnish.families.slots import Config
from burnish.families.weights import Layout
from burnish.family import TargetSet

_DOUBLE, _SINGLE = "double_blocks.#", "single_blocks.#"
_OUR_DOUBLE, _OUR_SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
NAMES = NativeNames(
    table={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        f"{_DOUBLE}.img_attn.qkv": tuple(f"{_OUR_DOUBLE}.attn.to_{x}" for x in "qkv"),
        f"{_DOUBLE}.txt_attn.qkv": tuple(f"{_OUR_DOUBLE}.attn.add_{x}_proj" for x in "qkv"),
        f"{_DOUBLE}.img_attn.norm.query_norm": f"{_OUR_DOUBLE}.attn.norm_q",
        f"{_DOUBLE}.img_attn.norm.key_norm": f"{_OUR_DOUBLE}.attn.norm_k",
        f"{_DOUBLE}.txt_attn.norm.query_norm": f"{_OUR_DOUBLE}.attn.norm_added_q",
        f"{_DOUBLE}.txt_attn.norm.key_norm": f"{_OUR_DOUBLE}.attn.norm_added_k",
        f"{_DOUBLE}.img_attn.proj": f"{_OUR_DOUBLE}.attn.to_out.0",
        f"{_DOUBLE}.txt_attn.proj": f"{_OUR_DOUBLE}.attn.to_add_out",
        f"{_DOUBLE}.img_mlp.0": f"{_OUR_DOUBLE}.ff.linear_in",
        f"{_DOUBLE}.img_mlp.2": f"{_OUR_DOUBLE}.ff.linear_out",
        f"{_DOUBLE}.txt_mlp.0": f"{_OUR_DOUBLE}.ff_context.linear_in",
        f"{_DOUBLE}.txt_mlp.2": f"{_OUR_DOUBLE}.ff_context.linear_out",
        f"{_SINGLE}.linear1": f"{_OUR_SINGLE}.attn.to_qkv_mlp_proj",
        f"{_SINGLE}.linear2": f"{_OUR_SINGLE}.attn.to_out",
        f"{_SINGLE}.norm.query_norm": f"{_OUR_SINGLE}.attn.norm_q",
        f"{_SINGLE}.norm.key_norm": f"{_OUR_SINGLE}.attn.norm_k",
    },
    signs=("double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight"),
    kinds={"scale": "weight"},
    swapped=("norm_out.linear",),
)
_ATTENTION = (
    "*.attn.to_[qkv]",
    "*.attn.to_out.0",
    "*.attn.add_[qkv]_proj",
    "*.attn.to_add_out",
    "single_transformer_blocks.*.attn.to_qkv_mlp_proj",
    "single_transformer_blocks.*.attn.to_out",
)
_FEED_FORWARD = ("*.ff.linear_in", "*.ff.linear_out", "*.ff_context.linear_in", "*.ff_context.linear_out")
TARGETS: Mapping[str, TargetSet] = {
    "attention": TargetSet(
        _ATTENTION,
        "Attention; of single-stream blocks the layers that it shares with the feed-forward layers.",
    ),
    "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
    "all": TargetSet(
        (
            "transformer_blocks.*",
            "single_transformer_blocks.*",
            "*_modulation*.linear",
            "x_embedder",
            "context_embedder",
            "proj_out",
        ),
        "Every layer of the blocks, the modulations that they share, and the first and last layer; not the "
        "embeddings of time and guidance, nor the last modulation.",
    ),
}


def find_transformer(layout: Layout) -> Layout | None:
    if {"double_stream_modulation_img.linear.weight", "transformer_blocks.0.attn.to_q.weight"} <= set(layout):
        return layout
    return NAMES.denoiser(layout)


def transformer_config(shipped: Config, layout: Layout) -> dict[str, Any]:
    width, channels = layout["x_embedder.weight"].shape
    head = layout["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    return {
        **shipped,
        "in_channels": channels,
        "num_layers": depth(layout, "transformer_blocks."),
        "num_single_layers": depth(layout, "single_transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": layout["context_embedder.weight"].shape[1],
        "mlp_ratio": layout["transformer_blocks.0.ff.linear_out.weight"].shape[1] / width,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in layout,
    }
