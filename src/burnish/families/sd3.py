"""Stable Diffusion 3 and 3.5 by Stability AI (arXiv 2403.03206): medium, large, large turbo.

A transformer over 2x2 patches of 16-channel latents that predicts velocity. It reads both CLIPs' penultimate hidden
states, side by side and padded to T5's width, followed by T5's tokens; and both pooled embeddings. Padding is part of
what it was trained on, so there is no mask. The medium model of 3.5 has a second attention over the picture alone in
its first blocks.

Shape letters: B batch, C channels, H W height and width of latents, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys, NativeTensor
from burnish.families import clip, t5
from burnish.families.native import NativeNames, depth, with_halves_swapped
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Slot, vae_slot
from burnish.families.text_slots import clip_slot, t5_slot
from burnish.families.weights import Layout
from burnish.family import TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults

T5_TOKENS = 256  # what 3 and 3.5 were trained with; 154 positions besides come from the two CLIPs' 77
HEAD_DIM = 64

_ATTENTION = (
    "*.attn.to_[qkv]",
    "*.attn.to_out.0",
    "*.attn.add_[qkv]_proj",
    "*.attn.to_add_out",
    "*.attn2.to_[qkv]",
    "*.attn2.to_out.0",
)
_FEED_FORWARD = ("*.ff.net.0.proj", "*.ff.net.2", "*.ff_context.net.0.proj", "*.ff_context.net.2")
_BLOCK, _OURS = "joint_blocks.#", "transformer_blocks.#"
NAMES = NativeNames(
    table={
        "pos_embed": "pos_embed.pos_embed",
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        f"{_BLOCK}.x_block.attn.qkv": tuple(f"{_OURS}.attn.to_{x}" for x in "qkv"),
        f"{_BLOCK}.x_block.attn2.qkv": tuple(f"{_OURS}.attn2.to_{x}" for x in "qkv"),
        f"{_BLOCK}.context_block.attn.qkv": tuple(f"{_OURS}.attn.add_{x}_proj" for x in "qkv"),
        f"{_BLOCK}.x_block.attn.ln_q": f"{_OURS}.attn.norm_q",
        f"{_BLOCK}.x_block.attn.ln_k": f"{_OURS}.attn.norm_k",
        f"{_BLOCK}.x_block.attn2.ln_q": f"{_OURS}.attn2.norm_q",
        f"{_BLOCK}.x_block.attn2.ln_k": f"{_OURS}.attn2.norm_k",
        f"{_BLOCK}.context_block.attn.ln_q": f"{_OURS}.attn.norm_added_q",
        f"{_BLOCK}.context_block.attn.ln_k": f"{_OURS}.attn.norm_added_k",
        f"{_BLOCK}.x_block.attn.proj": f"{_OURS}.attn.to_out.0",
        f"{_BLOCK}.x_block.attn2.proj": f"{_OURS}.attn2.to_out.0",
        f"{_BLOCK}.context_block.attn.proj": f"{_OURS}.attn.to_add_out",
        f"{_BLOCK}.x_block.adaLN_modulation.1": f"{_OURS}.norm1.linear",
        f"{_BLOCK}.context_block.adaLN_modulation.1": f"{_OURS}.norm1_context.linear",
        f"{_BLOCK}.x_block.mlp.fc1": f"{_OURS}.ff.net.0.proj",
        f"{_BLOCK}.x_block.mlp.fc2": f"{_OURS}.ff.net.2",
        f"{_BLOCK}.context_block.mlp.fc1": f"{_OURS}.ff_context.net.0.proj",
        f"{_BLOCK}.context_block.mlp.fc2": f"{_OURS}.ff_context.net.2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    signs=("joint_blocks.0.x_block.attn.qkv.weight", "context_embedder.weight", "y_embedder.mlp.0.weight"),
    swapped=("norm_out.linear",),
)


def _find_transformer(layout: Layout) -> Layout | None:
    if {"pos_embed.pos_embed", "transformer_blocks.0.attn.add_q_proj.weight", "proj_out.weight"} <= set(
        layout
    ):
        return layout
    found = NAMES.denoiser(layout)
    if found is None:
        return None
    # The context leaves after the last block, whose modulation diffusers reads as scale, shift.
    last = depth(found, "transformer_blocks.") - 1
    return with_halves_swapped(found, [f"transformer_blocks.{last}.norm1_context.linear"])


def _native_tensors(shapes: Mapping[str, Sequence[int]]) -> dict[str, NativeTensor]:
    last = f"transformer_blocks.{depth(shapes, 'transformer_blocks.') - 1}.norm1_context.linear"
    return {
        name: replace(one, halves_swapped=True) if one.holds[0].rpartition(".")[0] == last else one
        for name, one in NAMES.tensors(shapes).items()
    }


def _transformer_config(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    width = layout["pos_embed.proj.weight"].shape[0]
    layers = depth(layout, "transformer_blocks.")
    return {
        **shipped,
        "num_layers": layers,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": width // HEAD_DIM,
        "joint_attention_dim": layout["context_embedder.weight"].shape[1],
        "caption_projection_dim": layout["context_embedder.weight"].shape[0],
        "pooled_projection_dim": layout["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        "pos_embed_max_size": round(layout["pos_embed.pos_embed"].shape[1] ** 0.5),
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in layout else None,
        "dual_attention_layers": [
            n for n in range(layers) if f"transformer_blocks.{n}.attn2.to_q.weight" in layout
        ],
    }


# SD3.5 Large, beside Medium, whose configs are shipped.
_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}


class StableDiffusion3(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, 77 + 256, 4096) and `pooled_BD` (B, 768 + 1280)."""

    name: ClassVar[str] = "sd3"
    title: ClassVar[str] = "Stable Diffusion 3"
    pipelines = ("StableDiffusion3Pipeline",)
    spacing = "scheduler"
    slots = (
        Slot(
            "transformer",
            "denoiser",
            SD3Transformer2DModel.from_config,
            _find_transformer,
            _transformer_config,
        ),
        vae_slot(),
        clip_slot("text_encoder", "tokenizer", projection=True),
        clip_slot("text_encoder_2", "tokenizer_2", projection=True, large=True, padding="!"),
        t5_slot("text_encoder_3", "tokenizer_3", optional=True),
    )
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "stabilityai/stable-diffusion-3.5-large": {"transformer": _LARGE},
        "stabilityai/stable-diffusion-3.5-large-turbo": {"transformer": _LARGE},
        "stabilityai/stable-diffusion-3-medium-diffusers": {
            "transformer": {"dual_attention_layers": [], "pos_embed_max_size": 192, "qk_norm": None}
        },
    }
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention."),
        "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            ("transformer_blocks.*", "context_embedder", "proj_out"),
            "Every layer of the blocks, modulations included, and the first and last of tokens.",
        ),
    }
    export = ExportKeys(
        default="diffusers",
        formats=("diffusers",),
        modelspec="stable-diffusion-3",
        base_model_version="sd3",
        prefix={"diffusers": "transformer."},
        text_encoders={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
        words={"text_encoder_3": "t5xxl"},
        tensors=_native_tensors,
    )
    latents = LatentShape(channels=16, compression=8, patch=2)
    defaults = SamplerDefaults(steps=28, guidance=4.5, size=(1024, 1024), negative_prompt=True)
    prompt_limit = T5_TOKENS

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        config = self.denoiser.config
        length = clip.TOKENS + T5_TOKENS
        return Conditioning(
            {
                "tokens_BSD": torch.randn(batch, length, config.joint_attention_dim, generator=generator),
                "pooled_BD": torch.randn(batch, config.pooled_projection_dim, generator=generator),
            }
        )

    def count_tokens(self, prompt: str) -> int:
        folder = "text_encoder_3" if "text_encoder_3" in self.modules else "text_encoder"
        return clip.count_tokens(self.tokenizer(folder), prompt)

    @classmethod
    def with_depth(cls, config: dict[str, Any], depth: int) -> dict[str, Any]:
        """SD3.5 medium has two kinds of blocks in one list: those with a second attention come first."""
        dual = len(config.get("dual_attention_layers") or ())
        first, plain = min(depth, dual), min(depth, int(config["num_layers"]) - dual)
        return {**config, "num_layers": first + plain, "dual_attention_layers": list(range(first))}

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """Each CLIP reads the first 75 tokens; without T5 its place is taken by zeros, as in the release."""
        hidden, pooled = [], []
        for folder in ("text_encoder", "text_encoder_2"):
            encoder = self.module(folder)
            ids = clip.token_ids(self.tokenizer(folder), prompts).to(encoder.device)
            answer = encoder(ids, output_hidden_states=True)
            hidden.append(answer.hidden_states[-2])
            pooled.append(answer.text_embeds)
        both_BSD = torch.cat(hidden, dim=-1)
        width = int(self.configs["transformer"]["joint_attention_dim"])
        tokens_BSD = nn.functional.pad(both_BSD, (0, width - both_BSD.shape[-1]))
        return Conditioning(
            {
                "tokens_BSD": torch.cat([tokens_BSD, self._t5_tokens(prompts, tokens_BSD)], dim=1),
                "pooled_BD": torch.cat(pooled, dim=-1),
            }
        )

    def _t5_tokens(self, prompts: Sequence[str], like_BSD: Tensor) -> Tensor:
        if "text_encoder_3" not in self.modules:
            return like_BSD.new_zeros(len(prompts), T5_TOKENS, like_BSD.shape[-1])
        encoder = self.module("text_encoder_3")
        ids = t5.token_ids(self.tokenizer("text_encoder_3"), prompts, T5_TOKENS).to(encoder.device)
        tokens_BSD: Tensor = encoder(ids).last_hidden_state.to(like_BSD.dtype)
        return tokens_BSD

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        predicted: Tensor = self.denoiser(
            hidden_states=noisy.to(self.dtype),
            timestep=t_B * 1000,
            encoder_hidden_states=conditioning["tokens_BSD"].to(self.dtype),
            pooled_projections=conditioning["pooled_BD"].to(self.dtype),
            return_dict=False,
        )[0]
        return predicted

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)
