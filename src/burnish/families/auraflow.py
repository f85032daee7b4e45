"""AuraFlow by Fal (https://blog.fal.ai/auraflow/): 0.1 to 0.3, and the fine-tunes of it such as Pony 7.

A transformer over 2x2 patches of SDXL's latents that predicts velocity: a few blocks with weights of their own for
picture and caption, then many that share them. Captions are 256 tokens of a UMT5 trained on the Pile; padding is read,
as zeros. The release keeps the same layers under other names, none of them stacked.

Shape letters: B batch, C channels, H W height and width of latents, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AuraFlowTransformer2DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families.native import NativeNames, depth
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Slot, vae_slot
from burnish.families.token_words import written_out
from burnish.families.umt5 import umt5_slot
from burnish.families.weights import Layout
from burnish.family import TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults

PROMPT_TOKENS = 256
VOCABULARY = 32_128  # rows of Pile-T5's embedding
HEAD_DIM = 256

_ATTENTION = ("*.attn.to_[qkv]", "*.attn.to_out.0", "*.attn.add_[qkv]_proj", "*.attn.to_add_out")
_FEED_FORWARD = (
    "*.ff.linear_[12]",
    "*.ff.out_projection",
    "*.ff_context.linear_[12]",
    "*.ff_context.out_projection",
)


def _feed_forward(native: str, ours: str) -> dict[str, str]:
    return {
        f"{native}.c_fc1": f"{ours}.linear_1",
        f"{native}.c_fc2": f"{ours}.linear_2",
        f"{native}.c_proj": f"{ours}.out_projection",
    }


_DOUBLE, _JOINT = "double_layers.#", "joint_transformer_blocks.#"
_SINGLE, _SHARED = "single_layers.#", "single_transformer_blocks.#"

NAMES = NativeNames(
    table={
        "positional_encoding": "pos_embed.pos_embed",
        "init_x_linear": "pos_embed.proj",
        "t_embedder.mlp.0": "time_step_proj.linear_1",
        "t_embedder.mlp.2": "time_step_proj.linear_2",
        "cond_seq_linear": "context_embedder",
        "modF.1": "norm_out.linear",
        "final_linear": "proj_out",
        **{f"{_DOUBLE}.attn.w2{x}": f"{_JOINT}.attn.to_{x}" for x in "qkv"},
        **{f"{_DOUBLE}.attn.w1{x}": f"{_JOINT}.attn.add_{x}_proj" for x in "qkv"},
        f"{_DOUBLE}.attn.w2o": f"{_JOINT}.attn.to_out.0",
        f"{_DOUBLE}.attn.w1o": f"{_JOINT}.attn.to_add_out",
        f"{_DOUBLE}.modX.1": f"{_JOINT}.norm1.linear",
        f"{_DOUBLE}.modC.1": f"{_JOINT}.norm1_context.linear",
        **_feed_forward(f"{_DOUBLE}.mlpX", f"{_JOINT}.ff"),
        **_feed_forward(f"{_DOUBLE}.mlpC", f"{_JOINT}.ff_context"),
        **{f"{_SINGLE}.attn.w1{x}": f"{_SHARED}.attn.to_{x}" for x in "qkv"},
        f"{_SINGLE}.attn.w1o": f"{_SHARED}.attn.to_out.0",
        f"{_SINGLE}.modCX.1": f"{_SHARED}.norm1.linear",
        **_feed_forward(f"{_SINGLE}.mlp", f"{_SHARED}.ff"),
    },
    signs=("double_layers.0.attn.w1q.weight", "cond_seq_linear.weight", "positional_encoding"),
    swapped=("norm_out.linear",),
)


def _find_transformer(layout: Layout) -> Layout | None:
    if {"joint_transformer_blocks.0.attn.to_q.weight", "register_tokens"} <= set(layout):
        return layout
    return NAMES.denoiser(layout)


def _transformer_config(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    _, positions, width = layout["pos_embed.pos_embed"].shape
    return {
        **shipped,
        "num_mmdit_layers": depth(layout, "joint_transformer_blocks."),
        "num_single_dit_layers": depth(layout, "single_transformer_blocks."),
        "num_attention_heads": width // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "caption_projection_dim": width,
        "joint_attention_dim": layout["context_embedder.weight"].shape[1],
        "pos_embed_max_size": positions,
    }


class AuraFlow(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, 256, 2048), zeros where a caption is padded."""

    name: ClassVar[str] = "auraflow"
    title: ClassVar[str] = "AuraFlow"
    pipelines = ("AuraFlowPipeline",)
    spacing = "scheduler"
    slots = (
        Slot(
            "transformer",
            "denoiser",
            AuraFlowTransformer2DModel.from_config,
            _find_transformer,
            _transformer_config,
        ),
        vae_slot("sdxl_vae.safetensors"),
        umt5_slot(
            "text_encoder",
            "tokenizer",
            prefixes=("text_encoders.pile_t5xl.transformer.", "pile_t5xl.transformer."),
            vocabulary=VOCABULARY,
            ship_tokenizer=None,
            file_hint="pile_t5xl.safetensors",
        ),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention."),
        "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            ("joint_transformer_blocks.*", "single_transformer_blocks.*", "context_embedder", "proj_out"),
            "Every layer of the blocks, modulations included, and the first and last of tokens.",
        ),
    }
    export = ExportKeys(
        default="diffusers",
        formats=("diffusers", "comfy"),
        modelspec="auraflow",
        base_model_version="auraflow",
        prefix={"diffusers": "transformer.", "comfy": "diffusion_model."},
        native=NAMES.native_module,
        tensors=NAMES.tensors,
        words={"text_encoder": "pile_t5xl"},
    )
    latents = LatentShape(channels=4, compression=8, patch=2)
    defaults = SamplerDefaults(steps=50, guidance=3.5, size=(1024, 1024), negative_prompt=True)
    prompt_limit = PROMPT_TOKENS

    @classmethod
    def with_depth(cls, config: dict[str, Any], depth: int) -> dict[str, Any]:
        counts = ("num_mmdit_layers", "num_single_dit_layers")
        return {**config, **{name: min(depth, int(config[name])) for name in counts}}

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        width = self.denoiser.config.joint_attention_dim
        return Conditioning({"tokens_BSD": torch.randn(batch, PROMPT_TOKENS, width, generator=generator)})

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        encoder, tokenizer = self.module("text_encoder"), self.tokenizer("text_encoder")
        encoded = tokenizer(
            [written_out(tokenizer, str(prompt)) for prompt in prompts],
            padding="max_length",
            max_length=PROMPT_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        mask_BS = encoded.attention_mask.to(encoder.device)
        tokens_BSD = encoder(encoded.input_ids.to(encoder.device), attention_mask=mask_BS).last_hidden_state
        return Conditioning({"tokens_BSD": (tokens_BSD * mask_BS[..., None]).to(self.dtype)})

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        predicted: Tensor = self.denoiser(
            hidden_states=noisy.to(self.dtype),
            timestep=t_B,  # the model itself multiplies by 1000
            encoder_hidden_states=conditioning["tokens_BSD"].to(self.dtype),
            return_dict=False,
        )[0]
        return predicted

    def blocks(self) -> list[nn.Module]:
        return [*self.denoiser.joint_transformer_blocks, *self.denoiser.single_transformer_blocks]
