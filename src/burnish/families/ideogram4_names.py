"""Names of Ideogram 4's transformer in files, what its shapes tell, and what of it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from burnish.families.native import NativeNames, depth
from burnish.families.slots import Config
from burnish.families.weights import Layout
from burnish.family import TargetSet

_ATTENTION = ("layers.*.attention.to_[qkv]", "layers.*.attention.to_out.0")
_FEED_FORWARD = ("layers.*.feed_forward.w[123]",)
_MODULATION = "layers.*.adaln_modulation"
NAMES = NativeNames(
    table={
        "layers.#.attention.qkv": tuple(f"layers.#.attention.to_{x}" for x in "qkv"),
        "layers.#.attention.o": "layers.#.attention.to_out.0",
    },
    signs=("llm_cond_proj.weight", "embed_image_indicator.weight", "layers.0.attention.qkv.weight"),
)
TARGETS: Mapping[str, TargetSet] = {
    "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention."),
    "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
    "all": TargetSet(
        (*_ATTENTION, *_FEED_FORWARD, _MODULATION), "Every layer of the blocks, modulations included."
    ),
}


def find_transformer(layout: Layout) -> Layout | None:
    """Under either set of names; None of another model."""
    if {"llm_cond_proj.weight", "embed_image_indicator.weight", "layers.0.attention.to_q.weight"} <= set(
        layout
    ):
        return layout
    return NAMES.denoiser(layout)


def transformer_config(shipped: Config, layout: Layout) -> dict[str, Any]:
    """The shipped config with the widths and depth of `layout` (diffusers' names)."""
    width, channels = layout["input_proj.weight"].shape
    head = layout["layers.0.attention.norm_q.weight"].shape[0]
    return {
        **shipped,
        "in_channels": channels,
        "num_layers": depth(layout, "layers."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "intermediate_size": layout["layers.0.feed_forward.w1.weight"].shape[0],
        "adaln_dim": layout["adaln_proj.weight"].shape[0],
        "llm_features_dim": layout["llm_cond_proj.weight"].shape[1],
    }
