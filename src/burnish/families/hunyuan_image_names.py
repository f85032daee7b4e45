"""HunyuanImage's transformer: Tencent's names of it, in two spellings, and its embedding of time and guidance.

Tencent's own files keep query, key, value apart, which the code of the release and ComfyUI stack; ComfyUI has names
like FLUX.1's. Files of each kind are read, adapters are written in the stacked names of Tencent, which ComfyUI takes.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from burnish.families.hunyuan_names import NAMES as VIDEO_NAMES
from burnish.families.hunyuan_names import in_tencents_names, rows_of_stacks
from burnish.families.native import PREFIXES, NativeNames
from burnish.families.weights import Layout, below

_OUR_TIMES = {
    "time_in": "timestep_embedder",
    "time_r_in": "timestep_embedder_r",
    "guidance_in": "guidance_embedder",
}
_OWN = {
    **{f"{theirs}.mlp.0": f"time_guidance_embed.{ours}.linear_1" for theirs, ours in _OUR_TIMES.items()},
    **{f"{theirs}.mlp.2": f"time_guidance_embed.{ours}.linear_2" for theirs, ours in _OUR_TIMES.items()},
    "byt5_in.layernorm": "context_embedder_2.norm",
    **{f"byt5_in.fc{n}": f"context_embedder_2.linear_{n}" for n in (1, 2, 3)},
}
_SIGNS = ("byt5_in.fc3.weight", "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight")
_OTHERS = ("vision_in.proj.0.weight", "cond_type_embedding.weight", "vector_in.in_layer.weight")  # of clips

NAMES = replace(
    VIDEO_NAMES,
    table={
        **{k: v for k, v in VIDEO_NAMES.table.items() if not k.startswith((*_OUR_TIMES, "vector_in"))},
        **_OWN,
    },
    signs=("double_blocks.0.img_attn_qkv.weight", *_SIGNS),
    absent=_OTHERS,
)


def _apart(names: NativeNames) -> NativeNames:
    """The same with the stacks of the blocks taken apart, as in Tencent's files."""
    parts = {
        "double_blocks.#.img_attn_qkv": [f"double_blocks.#.img_attn_{x}" for x in "qkv"],
        "double_blocks.#.txt_attn_qkv": [f"double_blocks.#.txt_attn_{x}" for x in "qkv"],
        "single_blocks.#.linear1": [f"single_blocks.#.linear1_{x}" for x in ("q", "k", "v", "mlp")],
        "single_blocks.#.linear2": ["single_blocks.#.linear2.fc"],
    }
    table: dict[str, tuple[str, ...] | str] = {}
    for native, held in names.table.items():
        ours = (held,) if isinstance(held, str) else held
        alone = parts.get(native)
        table |= {native: held} if alone is None else dict(zip(alone, ours, strict=True))
    return replace(names, table=table, signs=("double_blocks.0.img_attn_q.weight", *_SIGNS))


NAMES_APART = _apart(NAMES)


def find_transformer(layout: Layout) -> Layout | None:
    """The transformer of a file in Tencent's, ComfyUI's or diffusers' names; None if there is none."""
    ours = {
        "x_embedder.proj.weight",
        "context_embedder_2.linear_3.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
        "time_guidance_embed.timestep_embedder.linear_1.weight",
    }
    if ours <= set(layout):
        return layout
    for prefix in PREFIXES:
        if f"{prefix}double_blocks.0.img_attn.qkv.weight" in layout:
            return NAMES.denoiser(in_tencents_names(below(layout, prefix)), rows_of_stacks)
    return NAMES.denoiser(layout, rows_of_stacks) or NAMES_APART.denoiser(layout)


class TimeGuidance(nn.Module):
    """In place of diffusers' HunyuanImageCombinedTimeGuidanceEmbedding, with the same sub-modules.

    No guidance is the bypass of its embedding. Where the model was distilled to mean flows (arXiv 2505.13447), the
    time that the step goes to is embedded too.
    """

    def __init__(self, released: nn.Module) -> None:
        super().__init__()
        self.time_proj = released.get_submodule("time_proj")
        self.timestep_embedder = released.get_submodule("timestep_embedder")
        for name in ("timestep_embedder_r", "guidance_embedder"):
            self.register_module(name, getattr(released, name))

    def forward(
        self, timestep: Tensor, timestep_r: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """All (B,) and in thousandths; the embedding, (B, width of the transformer)."""
        embedded_BD = self._embedded("timestep_embedder", timestep)
        if timestep_r is not None:
            embedded_BD = (embedded_BD + self._embedded("timestep_embedder_r", timestep_r)) / 2
        if guidance is not None:
            embedded_BD = embedded_BD + self._embedded("guidance_embedder", guidance)
        return embedded_BD

    def _embedded(self, name: str, number_B: Tensor) -> Tensor:
        embedder = self.get_submodule(name)
        waves_BD = self.time_proj(number_B).to(next(embedder.parameters()).dtype)
        embedded_BD: Tensor = embedder(waves_BD)
        return embedded_BD
