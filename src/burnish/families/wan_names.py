"""Names of Wan's denoisers in files (arXiv 2503.20314), what their shapes tell, and what of them is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from burnish.families.native import NativeNames, depth
from burnish.families.weights import Layout
from burnish.family import TargetSet

HEAD_DIM = 128

_BLOCK = "blocks.#"
_ATTENTION = {
    **{f"{theirs}.{x}": f"{ours}.to_{x}" for theirs, ours in (("self_attn", "attn1"),) for x in "qkv"},
    **{f"cross_attn.{x}": f"attn2.to_{x}" for x in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    **{f"self_attn.norm_{x}": f"attn1.norm_{x}" for x in "qk"},
    **{f"cross_attn.norm_{x}": f"attn2.norm_{x}" for x in "qk"},
    **{f"cross_attn.{x}_img": f"attn2.add_{x}_proj" for x in "kv"},
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",  # the release counts the norm before the feed-forward, which has no weights, as the second
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
TABLE: Mapping[str, str] = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    **{f"{_BLOCK}.{theirs}": f"{_BLOCK}.{ours}" for theirs, ours in _ATTENTION.items()},
    **{f"vace_{_BLOCK}.{theirs}": f"vace_{_BLOCK}.{ours}" for theirs, ours in _ATTENTION.items()},
    f"vace_{_BLOCK}.before_proj": f"vace_{_BLOCK}.proj_in",
    f"vace_{_BLOCK}.after_proj": f"vace_{_BLOCK}.proj_out",
}
_SIGNS = (
    "blocks.0.self_attn.q.weight",
    "blocks.0.cross_attn.q.weight",
    "time_projection.1.weight",
    "head.modulation",
)
_VACE_SIGN = "vace_patch_embedding.weight"
_OUR_SIGNS = {"blocks.0.attn1.to_q.weight", "condition_embedder.time_proj.weight", "scale_shift_table"}
# Relatives with layers of their own: Fun Control's camera, Animate's face, S2V's audio, MultiTalk's speakers.
_RELATIVES = (
    "control_adapter.conv.weight",
    "face_adapter.k_norm.weight",
    "casual_audio_encoder.encoder.conv1.weight",
)
NAMES = NativeNames(table=TABLE, signs=_SIGNS, absent=(_VACE_SIGN, *_RELATIVES))
VACE_NAMES = NativeNames(table=TABLE, signs=(*_SIGNS, _VACE_SIGN))

_LAYERS = ("blocks.*.attn[12].*",)
_FEED_FORWARD = ("blocks.*.ffn.net.0.proj", "blocks.*.ffn.net.2")
TARGETS: Mapping[str, TargetSet] = {
    "attention": TargetSet(_LAYERS, "Query, key, value and output of both attentions."),
    "attention-out": TargetSet(("blocks.*.attn[12].to_out.0",), "Output of both attentions."),
    "attention+mlp": TargetSet((*_LAYERS, *_FEED_FORWARD), "Attention and feed-forward layers."),
    "all": TargetSet(
        (
            "blocks.*",
            "condition_embedder.text_embedder.*",
            "condition_embedder.time_proj",
            "proj_out",
        ),
        "Every layer of the blocks, the embedding of text, the modulations of time, and the last layer.",
    ),
}


def find_transformer(names: NativeNames, layout: Layout) -> Layout | None:
    """The denoiser under diffusers' names or those of `names`; None of a relative with layers of its own."""
    named = set(layout)
    if (
        named >= _OUR_SIGNS
        and (_VACE_SIGN in named) == (names is VACE_NAMES)
        and named.isdisjoint(_RELATIVES)
    ):
        return layout
    return names.denoiser(layout)


def config_from_shapes(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The shipped config with the widths and depths of a layout (diffusers' names)."""
    width, channels, *patch = layout["patch_embedding.weight"].shape
    image = layout.get("condition_embedder.image_embedder.norm1.weight")
    positions = layout.get("condition_embedder.image_embedder.pos_embed")
    has_image_keys = "blocks.0.attn2.add_k_proj.weight" in layout
    config = {
        **shipped,
        "num_layers": depth(layout, "blocks."),
        "num_attention_heads": width // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": channels,
        "out_channels": layout["proj_out.weight"].shape[0] // (patch[0] * patch[1] * patch[2]),
        "patch_size": patch,
        "text_dim": layout["condition_embedder.text_embedder.linear_1.weight"].shape[1],
        "ffn_dim": layout["blocks.0.ffn.net.0.proj.weight"].shape[0],
        "freq_dim": layout["condition_embedder.time_embedder.linear_1.weight"].shape[1],
        "image_dim": None if image is None else image.shape[0],
        "added_kv_proj_dim": width if has_image_keys else None,
        "pos_embed_seq_len": None if positions is None else positions.shape[1],
    }
    if _VACE_SIGN not in layout:
        return config
    # Every so many blocks one is steered: the release spaces them evenly, from the first.
    steered, layers = depth(layout, "vace_blocks."), int(config["num_layers"])
    return {
        **config,
        "vace_layers": list(range(0, layers, -(-layers // steered))),
        "vace_in_channels": layout[_VACE_SIGN].shape[1],
    }
