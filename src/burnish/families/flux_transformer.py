"""What FLUX.1 and the models pruned from it do alike: the transformer in files, and its two text encoders.

T5's padding is part of what the transformer was trained on, so there is no mask. Without `guidance_B` the guidance
embedding, where there is one, is bypassed.

Shape letters: B batch, C channels, H W height and width of latents, S prompt tokens, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.errors import ModelError
from burnish.export_keys import ExportKeys
from burnish.families import clip, t5
from burnish.families.flux_embedding import TimeGuidanceText
from burnish.families.flux_names import BLOCKS, KINDS, LOST_IN_KOHYA, XFLUX, rows_of_stacks
from burnish.families.native import NativeNames, depth
from burnish.families.packing import pack, patch_positions
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Slot, vae_slot
from burnish.families.text_slots import clip_slot, t5_slot
from burnish.families.weights import Layout
from burnish.latent_shape import LatentShape

LATENTS = LatentShape(channels=16, compression=8, patch=2)
HEAD_DIM = 128  # of every released FLUX.1 and of those pruned from it
PRUNED_DEPTH = 8  # two-stream blocks of the models pruned from it, which has 19
FLEX2_CHANNELS = 196  # of a patch that Flex.2 takes
_DOUBLE, _OURS = "double_blocks.#", "transformer_blocks.#"
_EMBEDDINGS = {
    "time_in": "timestep_embedder",
    "guidance_in": "guidance_embedder",
    "vector_in": "text_embedder",
}
NAMES = NativeNames(
    table={
        **BLOCKS,
        f"{_DOUBLE}.img_mod.lin": f"{_OURS}.norm1.linear",
        f"{_DOUBLE}.txt_mod.lin": f"{_OURS}.norm1_context.linear",
        "single_blocks.#.modulation.lin": "single_transformer_blocks.#.norm.linear",
        **{f"{n}.in_layer": f"time_text_embed.{d}.linear_1" for n, d in _EMBEDDINGS.items()},
        **{f"{n}.out_layer": f"time_text_embed.{d}.linear_2" for n, d in _EMBEDDINGS.items()},
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    # Chroma and FLUX.2 share the blocks' names but have no `vector_in`, HunyuanVideo has no plain `img_in`.
    signs=("double_blocks.0.img_attn.qkv.weight", "img_in.weight", "vector_in.in_layer.weight"),
    kinds=KINDS,
    swapped=("norm_out.linear",),
)
_OUR_SIGNS = {
    "x_embedder.weight",
    "time_text_embed.text_embedder.linear_1.weight",
    "transformer_blocks.0.attn.add_q_proj.weight",
    "transformer_blocks.0.norm1_context.linear.weight",
}


def export_keys(modelspec: str, version: str) -> ExportKeys:
    """diffusers' names, which ComfyUI reads as well; those of the release only ComfyUI reads."""
    return ExportKeys(
        default="diffusers",
        formats=("diffusers", "comfy", "kohya"),
        modelspec=modelspec,
        base_model_version=version,
        prefix={"diffusers": "transformer.", "comfy": "diffusion_model.", "kohya": "lora_unet_"},
        spellings=XFLUX,
        native=NAMES.native_module,
        native_kohya=("ComfyUI", "diffusers"),
        tensors=NAMES.tensors,
        unreadable={"kohya": LOST_IN_KOHYA},
        words={"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    )


def _find(layout: Layout) -> Layout | None:
    return layout if set(layout) >= _OUR_SIGNS else NAMES.denoiser(layout, rows_of_stacks)


def _config_of(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The shipped config with the widths and depths of `layout` (diffusers' names)."""
    width, in_channels = layout["x_embedder.weight"].shape
    head_dim = layout["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    out_channels = layout["proj_out.weight"].shape[0]
    if head_dim != HEAD_DIM:
        raise ModelError(
            f"This FLUX.1 has heads of {head_dim} instead of {HEAD_DIM}; how positions are spread over them "
            "(axes_dims_rope) is not written in a single file.",
            remedy="Use its diffusers folder, whose config says so.",
        )
    return {
        **shipped,
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": depth(layout, "transformer_blocks."),
        "num_single_layers": depth(layout, "single_transformer_blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": layout["context_embedder.weight"].shape[1],
        "pooled_projection_dim": layout["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in layout,
    }


def _make(config: Mapping[str, Any]) -> FluxTransformer2DModel:
    """The denoiser, with a guidance embedding that can be bypassed where it has one."""
    transformer: FluxTransformer2DModel = FluxTransformer2DModel.from_config(dict(config))
    if transformer.config.guidance_embeds:
        transformer.time_text_embed = TimeGuidanceText(transformer.time_text_embed)
    return transformer


SLOTS = (
    Slot("transformer", "denoiser", _make, _find, _config_of),
    vae_slot(),
    clip_slot("text_encoder", "tokenizer", projection=False),
    t5_slot("text_encoder_2", "tokenizer_2"),
)


def shape_of(layout: Layout) -> dict[str, Any]:
    """What tells the models apart, under the names of the config."""
    return {
        "num_layers": depth(layout, "transformer_blocks."),
        "in_channels": layout["x_embedder.weight"].shape[1],
    }


def is_flex2(config: Mapping[str, Any]) -> bool:
    """Whether this takes what Flex.2 takes."""
    return int(config.get("in_channels", 64)) == FLEX2_CHANNELS


def is_pruned(config: Mapping[str, Any]) -> bool:
    """Whether this is of Flex (or FLUX.1-lite): FLUX.1 with fewer two-stream blocks."""
    return int(config.get("num_layers", 19)) == PRUNED_DEPTH or is_flex2(config)


def channels(config: Mapping[str, Any]) -> tuple[int, int]:
    """Channels of a patch that the transformer takes, and that it gives."""
    taken = int(config.get("in_channels", 64))
    return taken, int(config.get("out_channels") or taken)


def encode_prompts(family: PipelineFamily, prompts: Sequence[str]) -> Conditioning:
    """T5's last hidden state `tokens_BSD`, padding included, as long as the family's limit; CLIP's `pooled_BD`.

    CLIP reads the first 75 tokens of a caption, T5 as many as the limit less its end mark.
    """
    clip_encoder, t5_encoder = family.module("text_encoder"), family.module("text_encoder_2")
    clip_ids = clip.token_ids(family.tokenizer("text_encoder"), prompts).to(clip_encoder.device)
    t5_ids = t5.token_ids(family.tokenizer("text_encoder_2"), prompts, family.prompt_limit).to(
        t5_encoder.device
    )
    pooled_BD = clip_encoder(clip_ids).pooler_output
    tokens_BSD = t5_encoder(t5_ids).last_hidden_state.to(pooled_BD.dtype)
    return Conditioning({"tokens_BSD": tokens_BSD, "pooled_BD": pooled_BD})


def count_tokens(family: PipelineFamily, prompt: str) -> int:
    """Of T5, which reads the whole caption; CLIP's pooled embedding is of its beginning in any case."""
    return clip.count_tokens(family.tokenizer("text_encoder_2"), prompt)


def example_conditioning(family: PipelineFamily, batch: int, generator: torch.Generator) -> Conditioning:
    """Random conditioning of the shapes of `encode_prompts`."""
    config = family.denoiser.config
    tokens_BSD = torch.randn(batch, family.prompt_limit, config.joint_attention_dim, generator=generator)
    pooled_BD = torch.randn(batch, config.pooled_projection_dim, generator=generator)
    return Conditioning({"tokens_BSD": tokens_BSD, "pooled_BD": pooled_BD})


def predict(
    transformer: FluxTransformer2DModel,
    latents_BCHW: Tensor,
    t_B: Tensor,
    conditioning: Conditioning,
    dtype: torch.dtype,
    *,
    more_BND: Tensor | None = None,
    more_positions_N3: Tensor | None = None,
) -> Tensor:
    """What the transformer gives for the patches of the latents, (B, N, D).

    Args:
        latents_BCHW: noisy latents, with any that stand beside them in further channels.
        dtype: of the transformer.
        more_BND: patches that follow in the sequence, at `more_positions_N3`; nothing is predicted for them.
    """
    height, width = latents_BCHW.shape[-2:]
    patches_BND = pack(latents_BCHW).to(dtype)
    positions_N3 = patch_positions(height // 2, width // 2, latents_BCHW.device)
    count = patches_BND.shape[1]
    if more_BND is not None and more_positions_N3 is not None:
        patches_BND = torch.cat([patches_BND, more_BND.to(dtype)], dim=1)
        positions_N3 = torch.cat([positions_N3, more_positions_N3])
    tokens_BSD = conditioning["tokens_BSD"].to(dtype)
    predicted_BND: Tensor = transformer(
        hidden_states=patches_BND,
        timestep=t_B,
        guidance=conditioning.get("guidance_B") if transformer.config.guidance_embeds else None,
        pooled_projections=conditioning["pooled_BD"].to(dtype),
        encoder_hidden_states=tokens_BSD,
        txt_ids=torch.zeros(tokens_BSD.shape[1], 3, device=latents_BCHW.device),
        img_ids=positions_N3,
        return_dict=False,
    )[0]
    return predicted_BND[:, :count]


def blocks(transformer: FluxTransformer2DModel) -> list[nn.Module]:
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
