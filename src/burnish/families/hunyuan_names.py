"""HunyuanVideo's transformer (arXiv 2412.03603): Tencent's names of it, and its embedding of time and guidance.

ComfyUI keeps the same weights under names like FLUX.1's; files of either kind are read, adapters are written in
Tencent's, which ComfyUI and diffusers both take.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from burnish.families.native import PREFIXES, NativeNames
from burnish.families.weights import Layout, below

_DOUBLE, _OUR_DOUBLE = "double_blocks.#", "transformer_blocks.#"
_SINGLE, _OUR_SINGLE = "single_blocks.#", "single_transformer_blocks.#"
_REFINER = "txt_in.individual_token_refiner.blocks.#"
_OUR_REFINER = "context_embedder.token_refiner.refiner_blocks.#"
_OUR_EMBEDDINGS = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder"}
_SIGN = "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight"
# Targets of adapters in the blocks of two streams and of one, for every model of these blocks.
TWO_STREAMS, ONE_STREAM = "transformer_blocks", "single_transformer_blocks"
ATTENTION = (
    f"{TWO_STREAMS}.*.attn.to_[qkv]",
    f"{TWO_STREAMS}.*.attn.to_out.0",
    f"{TWO_STREAMS}.*.attn.add_[qkv]_proj",
    f"{TWO_STREAMS}.*.attn.to_add_out",
    f"{ONE_STREAM}.*.attn.to_[qkv]",
)
FEED_FORWARD = (
    f"{TWO_STREAMS}.*.ff.net.0.proj",
    f"{TWO_STREAMS}.*.ff.net.2",
    f"{TWO_STREAMS}.*.ff_context.net.0.proj",
    f"{TWO_STREAMS}.*.ff_context.net.2",
    f"{ONE_STREAM}.*.proj_mlp",
    f"{ONE_STREAM}.*.proj_out",
)
NAMES = NativeNames(
    table={
        "img_in.proj": "x_embedder.proj",
        **{f"{n}.mlp.0": f"time_text_embed.{ours}.linear_1" for n, ours in _OUR_EMBEDDINGS.items()},
        **{f"{n}.mlp.2": f"time_text_embed.{ours}.linear_2" for n, ours in _OUR_EMBEDDINGS.items()},
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        f"{_DOUBLE}.img_attn_qkv": tuple(f"{_OUR_DOUBLE}.attn.to_{x}" for x in "qkv"),
        f"{_DOUBLE}.txt_attn_qkv": tuple(f"{_OUR_DOUBLE}.attn.add_{x}_proj" for x in "qkv"),
        **{f"{_DOUBLE}.img_attn_{x}_norm": f"{_OUR_DOUBLE}.attn.norm_{x}" for x in "qk"},
        **{f"{_DOUBLE}.txt_attn_{x}_norm": f"{_OUR_DOUBLE}.attn.norm_added_{x}" for x in "qk"},
        f"{_DOUBLE}.img_attn_proj": f"{_OUR_DOUBLE}.attn.to_out.0",
        f"{_DOUBLE}.txt_attn_proj": f"{_OUR_DOUBLE}.attn.to_add_out",
        f"{_DOUBLE}.img_mod.linear": f"{_OUR_DOUBLE}.norm1.linear",
        f"{_DOUBLE}.txt_mod.linear": f"{_OUR_DOUBLE}.norm1_context.linear",
        f"{_DOUBLE}.img_mlp.fc1": f"{_OUR_DOUBLE}.ff.net.0.proj",
        f"{_DOUBLE}.img_mlp.fc2": f"{_OUR_DOUBLE}.ff.net.2",
        f"{_DOUBLE}.txt_mlp.fc1": f"{_OUR_DOUBLE}.ff_context.net.0.proj",
        f"{_DOUBLE}.txt_mlp.fc2": f"{_OUR_DOUBLE}.ff_context.net.2",
        f"{_SINGLE}.linear1": (
            *(f"{_OUR_SINGLE}.attn.to_{x}" for x in "qkv"),
            f"{_OUR_SINGLE}.proj_mlp",
        ),
        f"{_SINGLE}.linear2": f"{_OUR_SINGLE}.proj_out",
        **{f"{_SINGLE}.{x}_norm": f"{_OUR_SINGLE}.attn.norm_{x}" for x in "qk"},
        f"{_SINGLE}.modulation.linear": f"{_OUR_SINGLE}.norm.linear",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "txt_in.input_embedder": "context_embedder.proj_in",
        "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
        "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
        **{
            f"txt_in.c_embedder.linear_{n}": f"context_embedder.time_text_embed.text_embedder.linear_{n}"
            for n in (1, 2)
        },
        f"{_REFINER}.self_attn_qkv": tuple(f"{_OUR_REFINER}.attn.to_{x}" for x in "qkv"),
        f"{_REFINER}.self_attn_proj": f"{_OUR_REFINER}.attn.to_out.0",
        f"{_REFINER}.mlp.fc1": f"{_OUR_REFINER}.ff.net.0.proj",
        f"{_REFINER}.mlp.fc2": f"{_OUR_REFINER}.ff.net.2",
        f"{_REFINER}.adaLN_modulation.1": f"{_OUR_REFINER}.norm_out.linear",
        **{f"{_REFINER}.norm{n}": f"{_OUR_REFINER}.norm{n}" for n in (1, 2)},
    },
    signs=("double_blocks.0.img_attn_qkv.weight", "vector_in.in_layer.weight", _SIGN),
    swapped=("norm_out.linear",),
)
# ComfyUI's spelling -> Tencent's; the longer ones first.
_RESPELLED = (
    ("txt_in.t_embedder.in_layer.", "txt_in.t_embedder.mlp.0."),
    ("txt_in.t_embedder.out_layer.", "txt_in.t_embedder.mlp.2."),
    ("txt_in.c_embedder.in_layer.", "txt_in.c_embedder.linear_1."),
    ("txt_in.c_embedder.out_layer.", "txt_in.c_embedder.linear_2."),
    ("self_attn.qkv.", "self_attn_qkv."),
    ("self_attn.proj.", "self_attn_proj."),
    ("_attn.norm.query_norm.scale", "_attn_q_norm.weight"),
    ("_attn.norm.key_norm.scale", "_attn_k_norm.weight"),
    (".norm.query_norm.scale", ".q_norm.weight"),
    (".norm.key_norm.scale", ".k_norm.weight"),
    ("_attn.qkv.", "_attn_qkv."),
    ("_attn.proj.", "_attn_proj."),
    ("_mod.lin.", "_mod.linear."),
    (".modulation.lin.", ".modulation.linear."),
    ("_mlp.0.", "_mlp.fc1."),
    ("_mlp.2.", "_mlp.fc2."),
    ("time_in.in_layer.", "time_in.mlp.0."),
    ("time_in.out_layer.", "time_in.mlp.2."),
    ("guidance_in.in_layer.", "guidance_in.mlp.0."),
    ("guidance_in.out_layer.", "guidance_in.mlp.2."),
    ("time_r_in.in_layer.", "time_r_in.mlp.0."),
    ("time_r_in.out_layer.", "time_r_in.mlp.2."),
)


def find_transformer(layout: Layout) -> Layout | None:
    """The transformer of a file in Tencent's, ComfyUI's or diffusers' names; None if there is none."""
    ours = {
        "x_embedder.proj.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
        f"{_OUR_REFINER.replace('#', '0')}.attn.to_q.weight",
        "time_text_embed.text_embedder.linear_1.weight",
    }
    if ours <= set(layout):
        return layout
    for prefix in PREFIXES:
        if f"{prefix}double_blocks.0.img_attn.qkv.weight" in layout:
            return NAMES.denoiser(in_tencents_names(below(layout, prefix)), rows_of_stacks)
    return NAMES.denoiser(layout, rows_of_stacks)


def in_tencents_names(layout: Layout) -> Layout:
    """A layout in ComfyUI's names, its prefix taken off."""
    renamed: Layout = {}
    for name, piece in layout.items():
        for theirs, ours in _RESPELLED:
            name = name.replace(theirs, ours)
        if name.startswith("txt_in.individual_token_refiner."):
            name = name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.2.", ".mlp.fc2.")
        renamed[name] = piece
    return renamed


def rows_of_stacks(native: Layout) -> Mapping[str, int]:
    """Query, key and value of a single block are as wide as the transformer; the rest is the feed-forward layer."""
    return {f"{_OUR_SINGLE.replace('#', '*')}.attn.to_[qkv]": native["img_in.proj.weight"].shape[0]}


class TimeTextGuidance(nn.Module):
    """In place of diffusers' HunyuanVideoConditionEmbedding, with the same sub-modules; no guidance is the bypass.

    Where the model takes a clip's first frame in clean (`token_replace`), that frame is told time 0 while
    `first_is_clean`, else the time of all others.
    """

    def __init__(self, released: nn.Module) -> None:
        super().__init__()
        self.time_proj = released.get_submodule("time_proj")
        self.timestep_embedder = released.get_submodule("timestep_embedder")
        self.text_embedder = released.get_submodule("text_embedder")
        has_guidance = getattr(released, "guidance_embedder", None) is not None
        self.guidance_embedder = released.get_submodule("guidance_embedder") if has_guidance else None
        self.tells_first = getattr(released, "image_condition_type", None) == "token_replace"
        self.first_is_clean = False

    def forward(
        self, timestep_B: Tensor, pooled_BD: Tensor, guidance_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Time and guidance in thousandths; the embedding, (B, width of the transformer), and the first frame's."""
        text_BD: Tensor = self.text_embedder(pooled_BD)
        embedded_BD = self._time(timestep_B, pooled_BD)
        if guidance_B is not None and self.guidance_embedder is not None:
            embedded_BD = embedded_BD + self.guidance_embedder(self.time_proj(guidance_B).to(pooled_BD.dtype))
        embedded_BD = embedded_BD + text_BD
        if not self.tells_first:
            return embedded_BD, None
        if not self.first_is_clean:
            return embedded_BD, embedded_BD
        return embedded_BD, self._time(torch.zeros_like(timestep_B), pooled_BD) + text_BD

    def _time(self, timestep_B: Tensor, pooled_BD: Tensor) -> Tensor:
        embedded_BD: Tensor = self.timestep_embedder(self.time_proj(timestep_B).to(pooled_BD.dtype))
        return embedded_BD
