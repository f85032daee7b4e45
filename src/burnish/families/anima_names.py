"""Names of Anima's transformer and text conditioner in files, what their shapes tell, and what of it is trained.

Native names: diffusers' `scripts/convert_anima_to_diffusers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from burnish.families.native import PREFIXES, NativeNames, depth
from burnish.families.slots import Config
from burnish.families.weights import Layout, below
from burnish.family import TargetSet

PATCH = 2

_NET = "net."  # what the release puts before every name
_CONDITIONER = "llm_adapter."
_CONDITIONER_SIGN = f"{_CONDITIONER}blocks.0.cross_attn.q_proj.weight"
_OUR_SIGNS = {
    "patch_embed.proj.weight",
    "transformer_blocks.0.norm1.linear_1.weight",
    "time_embed.norm.weight",
}
_BUFFERS = ("pos_embedder.", "accum_")  # of the release's trainer, besides `_extra_state`

_BLOCK = {
    **{
        f"adaln_modulation_{theirs}.{number}": f"norm{place}.linear_{number}"
        for place, theirs in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
        for number in (1, 2)
    },
    **{
        f"{theirs}.{x}_proj": f"{ours}.to_{x}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for x in "qkv"
    },
    **{
        f"{theirs}.{x}_norm": f"{ours}.norm_{x}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for x in "qk"
    },
    "self_attn.output_proj": "attn1.to_out.0",
    "cross_attn.output_proj": "attn2.to_out.0",
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
}
NAMES = NativeNames(
    table={
        "x_embedder.proj.1": "patch_embed.proj",
        "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
        "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
        "t_embedding_norm": "time_embed.norm",
        "final_layer.adaln_modulation.1": "norm_out.linear_1",
        "final_layer.adaln_modulation.2": "norm_out.linear_2",
        "final_layer.linear": "proj_out",
        **{f"blocks.#.{theirs}": f"transformer_blocks.#.{ours}" for theirs, ours in _BLOCK.items()},
    },
    # Without the conditioner it is Cosmos-Predict2 itself.
    signs=("x_embedder.proj.1.weight", "blocks.0.adaln_modulation_self_attn.1.weight", _CONDITIONER_SIGN),
)

_ATTENTION = ("transformer_blocks.*.attn[12].to_[qkv]", "transformer_blocks.*.attn[12].to_out.0")
_FEED_FORWARD = ("transformer_blocks.*.ff.net.0.proj", "transformer_blocks.*.ff.net.2")
TARGETS: Mapping[str, TargetSet] = {
    "attention": TargetSet(_ATTENTION, "Query, key, value and output of both attentions."),
    "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
    "all": TargetSet(
        ("transformer_blocks.*", "patch_embed.proj", "time_embed.t_embedder.*", "norm_out.*", "proj_out"),
        "Every layer of the transformer, modulations and the embedding of time among them.",
    ),
}


def _release(layout: Layout) -> Layout | None:
    """The transformer and its conditioner under the names of the release; None if the file does not hold both."""
    for prefix in (*PREFIXES, *(before + _NET for before in PREFIXES)):
        inside = below(layout, prefix)
        if all(sign in inside for sign in NAMES.signs):
            return inside
    return None


def find_transformer(layout: Layout) -> Layout | None:
    """Under either set of names; None of another model."""
    if set(layout) >= _OUR_SIGNS:
        return layout
    found = _release(layout)
    if found is None:
        return None
    kept = {
        name: piece
        for name, piece in found.items()
        if not name.startswith((_CONDITIONER, *_BUFFERS)) and not name.endswith("_extra_state")
    }
    return NAMES.layout(kept)


def find_conditioner(layout: Layout) -> Layout | None:
    """Out of the file of the release; None of another model."""
    found = _release(layout)
    return None if found is None else below(found, _CONDITIONER)


def transformer_config(shipped: Config, layout: Layout) -> dict[str, Any]:
    """The shipped config with the widths and depth of `layout` (diffusers' names)."""
    head_dim = layout["transformer_blocks.0.attn1.norm_q.weight"].shape[0]
    patches = layout["patch_embed.proj.weight"].shape[1] // PATCH**2
    width = layout["transformer_blocks.0.attn1.to_q.weight"].shape[0]
    return {
        **shipped,
        "in_channels": patches - int(shipped["concat_padding_mask"]),
        "out_channels": layout["proj_out.weight"].shape[0] // PATCH**2,
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "num_layers": depth(layout, "transformer_blocks."),
        "mlp_ratio": layout["transformer_blocks.0.ff.net.0.proj.weight"].shape[0] / width,
        "text_embed_dim": layout["transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "adaln_lora_dim": layout["transformer_blocks.0.norm1.linear_1.weight"].shape[0],
    }


def conditioner_config(shipped: Config, layout: Layout) -> dict[str, Any]:
    """The same of the text conditioner."""
    vocabulary, target = layout["embed.weight"].shape
    width, source = layout["blocks.0.cross_attn.k_proj.weight"].shape
    return {
        **shipped,
        "source_dim": source,
        "target_dim": target,
        "model_dim": width,
        "num_layers": depth(layout, "blocks."),
        "num_attention_heads": width // layout["blocks.0.cross_attn.q_norm.weight"].shape[0],
        "target_vocab_size": vocabulary,
    }
