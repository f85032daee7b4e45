"""Names that FLUX.1 and what was made from it share: blocks as Black Forest Labs and diffusers spell them, targets.

A native module can stack several of diffusers' modules along its rows, as `img_attn.qkv` does. Sources:
https://github.com/black-forest-labs/flux (`src/flux/model.py`, `modules/layers.py`) and diffusers'
`transformer_flux.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from burnish.families.weights import Layout
from burnish.family import TargetSet

_DOUBLE, _OURS = "double_blocks.#", "transformer_blocks.#"
_SINGLE, _OURS_SINGLE = "single_blocks.#", "single_transformer_blocks.#"
BLOCKS: dict[str, str | tuple[str, ...]] = {
    f"{_DOUBLE}.img_attn.qkv": tuple(f"{_OURS}.attn.to_{x}" for x in "qkv"),
    f"{_DOUBLE}.txt_attn.qkv": tuple(f"{_OURS}.attn.add_{x}_proj" for x in "qkv"),
    f"{_DOUBLE}.img_attn.norm.query_norm": f"{_OURS}.attn.norm_q",
    f"{_DOUBLE}.img_attn.norm.key_norm": f"{_OURS}.attn.norm_k",
    f"{_DOUBLE}.txt_attn.norm.query_norm": f"{_OURS}.attn.norm_added_q",
    f"{_DOUBLE}.txt_attn.norm.key_norm": f"{_OURS}.attn.norm_added_k",
    f"{_DOUBLE}.img_attn.proj": f"{_OURS}.attn.to_out.0",
    f"{_DOUBLE}.txt_attn.proj": f"{_OURS}.attn.to_add_out",
    f"{_DOUBLE}.img_mlp.0": f"{_OURS}.ff.net.0.proj",
    f"{_DOUBLE}.img_mlp.2": f"{_OURS}.ff.net.2",
    f"{_DOUBLE}.txt_mlp.0": f"{_OURS}.ff_context.net.0.proj",
    f"{_DOUBLE}.txt_mlp.2": f"{_OURS}.ff_context.net.2",
    f"{_SINGLE}.linear1": (*(f"{_OURS_SINGLE}.attn.to_{x}" for x in "qkv"), f"{_OURS_SINGLE}.proj_mlp"),
    f"{_SINGLE}.linear2": f"{_OURS_SINGLE}.proj_out",
    f"{_SINGLE}.norm.query_norm": f"{_OURS_SINGLE}.attn.norm_q",
    f"{_SINGLE}.norm.key_norm": f"{_OURS_SINGLE}.attn.norm_k",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
}
KINDS = {"scale": "weight"}
# As x-flux saves them (github.com/XLabs-AI/x-flux, `src/flux/modules/layers.py`): 1 for the picture, 2 for text.
XFLUX: Mapping[str, tuple[str, ...]] = {
    f"{_DOUBLE}.processor.qkv_lora1": tuple(f"{_OURS}.attn.to_{x}" for x in "qkv"),
    f"{_DOUBLE}.processor.qkv_lora2": tuple(f"{_OURS}.attn.add_{x}_proj" for x in "qkv"),
    f"{_DOUBLE}.processor.proj_lora1": (f"{_OURS}.attn.to_out.0",),
    f"{_DOUBLE}.processor.proj_lora2": (f"{_OURS}.attn.to_add_out",),
    f"{_SINGLE}.processor.qkv_lora": tuple(f"{_OURS_SINGLE}.attn.to_{x}" for x in "qkv"),
    f"{_SINGLE}.processor.proj_lora": (f"{_OURS_SINGLE}.proj_out",),
}

_ATTENTION = (
    "*.attn.to_[qkv]",
    "*.attn.to_out.0",
    "*.attn.add_[qkv]_proj",
    "*.attn.to_add_out",
)
_FEED_FORWARD = (
    "*.ff.net.0.proj",
    "*.ff.net.2",
    "*.ff_context.net.0.proj",
    "*.ff_context.net.2",
    "single_transformer_blocks.*.proj_mlp",
    "single_transformer_blocks.*.proj_out",
)
TARGETS: Mapping[str, TargetSet] = {
    "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention."),
    "attention+mlp": TargetSet(
        (*_ATTENTION, *_FEED_FORWARD),
        "Attention, feed-forward layers, and the single-stream blocks' shared input and output.",
    ),
    "all": TargetSet(
        (
            "transformer_blocks.*",
            "single_transformer_blocks.*",
            "x_embedder",
            "context_embedder",
            "proj_out",
        ),
        "Every layer of the blocks, and the first and last layer; not what makes or embeds the modulation.",
    ),
}

# diffusers' converter of sd-scripts' files loses layers outside the blocks, or their alpha
# (0.42, `_convert_kohya_flux_lora_to_diffusers`).
LOST_IN_KOHYA = ("x_embedder", "context_embedder", "proj_out", "norm_out.*", "time_text_embed.*")


def rows_of_stacks(native: Layout) -> Mapping[str, int]:
    """`linear1` stacks query, key and value of the model's width, and all the rest for the feed-forward layer."""
    return {"single_transformer_blocks.*.attn.to_[qkv]": native["img_in.weight"].shape[0]}
