"""CogView4 by Zhipu AI: a transformer over 2x2 patches of 16-channel latents that predicts velocity.

It reads GLM-4's hidden states before the last layer and the picture's size and crop. A caption is filled up at the left
to a multiple of 16 tokens, padding included in what the transformer reads; it is told the time before the shift. It
cannot leave tokens out (diffusers 0.42 adds its mask instead of applying it), so that captions of different length go
through it one after the other.

Shape letters: B batch, C channels, H W height and width of latents, S prompt tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import CogView4Transformer2DModel
from torch import Tensor, nn
from transformers import GlmConfig, GlmModel

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import clip
from burnish.families.masked import lengths
from burnish.families.native import depth
from burnish.families.pipeline import PipelineFamily
from burnish.families.rows import by_kind
from burnish.families.shifts import RootShift
from burnish.families.slots import Config, Slot, vae_slot
from burnish.families.text_slots import language_model_slot
from burnish.families.token_words import written_out
from burnish.families.weights import Layout
from burnish.family import TargetSet
from burnish.latent_shape import LatentShape, PictureInfo
from burnish.noise_schedule import SamplerDefaults, Schedule

LONGEST_PROMPT = 1024
MULTIPLE = 16  # of tokens
READ_STATE = -2  # of the text encoder: before its last layer

_ATTENTION = ("transformer_blocks.*.attn1.to_[qkv]", "transformer_blocks.*.attn1.to_out.0")
_FEED_FORWARD = ("transformer_blocks.*.ff.net.0.proj", "transformer_blocks.*.ff.net.2")


def _find_transformer(layout: Layout) -> Layout | None:
    signs = {
        "patch_embed.text_proj.weight",
        "time_condition_embed.condition_embedder.linear_1.weight",
        "transformer_blocks.0.attn1.to_q.weight",
    }
    return layout if signs <= set(layout) else None


def _without_model(layout: Layout) -> Layout:
    return {name.removeprefix("model."): piece for name, piece in layout.items()}


def _transformer_config(shipped: Config, layout: Layout) -> dict[str, Any]:
    width = layout["transformer_blocks.0.attn1.to_q.weight"].shape[0]
    return {
        **shipped,
        "num_attention_heads": width // shipped["attention_head_dim"],
        "num_layers": depth(layout, "transformer_blocks."),
        "text_embed_dim": layout["patch_embed.text_proj.weight"].shape[1],
    }


class CogView4(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, S, 4096) and its `mask_BS`; `sizes_B6`, the picture's original size, crop and
    size in pixels, each as height and width.
    """

    name: ClassVar[str] = "cogview4"
    title: ClassVar[str] = "CogView4"
    pipelines = ("CogView4Pipeline",)
    spacing = "thousandths"
    slots = (
        Slot(
            "transformer",
            "denoiser",
            CogView4Transformer2DModel.from_config,
            _find_transformer,
            _transformer_config,
        ),
        vae_slot("the VAE of the diffusers folder"),
        language_model_slot(
            "text_encoder",
            "tokenizer",
            config=GlmConfig,
            model=GlmModel,
            signs=("layers.0.mlp.gate_up_proj.weight", "layers.0.self_attn.o_proj.weight"),
            tidy=_without_model,
            prefixes=("model.",),
        ),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention."),
        "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            ("transformer_blocks.*", "patch_embed.proj", "patch_embed.text_proj", "proj_out"),
            "Every layer of the blocks, modulations included, and the first and last layer.",
        ),
    }
    export = ExportKeys(
        default="diffusers",
        formats=("diffusers",),
        modelspec="cogview-4",
        base_model_version="cogview4",
        prefix={"diffusers": "transformer."},
        comfyui=False,
        words={"text_encoder": "glm"},
    )
    latents = LatentShape(channels=16, compression=8, patch=2)
    defaults = SamplerDefaults(steps=50, guidance=5.0, size=(1024, 1024), negative_prompt=True)
    prompt_limit = LONGEST_PROMPT

    def make_schedule(self, config: Config) -> Schedule:
        shift = RootShift(config["base_image_seq_len"], config["base_shift"], config["max_shift"])
        return replace(super().make_schedule(config), shift=shift)

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        shape = (batch, 4 * MULTIPLE, self.denoiser.config.text_embed_dim)
        whole = PictureInfo.whole(
            latents[-2] * self.latents.compression, latents[-1] * self.latents.compression
        )
        return Conditioning(
            {
                "tokens_BSD": torch.randn(shape, generator=generator),
                "mask_BS": torch.ones(shape[:2], dtype=torch.bool),
                **self.describe_pictures([whole] * batch),
            }
        )

    def count_tokens(self, prompt: str) -> int:
        return clip.count_tokens(self.tokenizer("text_encoder"), prompt)

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        encoder, tokenizer = self.module("text_encoder"), self.tokenizer("text_encoder")
        rows = []
        for prompt in prompts:
            text = written_out(tokenizer, prompt)
            ids = tokenizer(text, truncation=True, max_length=LONGEST_PROMPT).input_ids
            ids = [tokenizer.pad_token_id] * (-len(ids) % MULTIPLE) + ids
            ids_BS = torch.tensor([ids], device=encoder.device)
            tokens_BSD = encoder(ids_BS, output_hidden_states=True).hidden_states[READ_STATE]
            mask_BS = torch.ones(ids_BS.shape, dtype=torch.bool, device=encoder.device)
            rows.append(Conditioning({"tokens_BSD": tokens_BSD, "mask_BS": mask_BS}))
        return Conditioning.collate(rows)

    def describe_pictures(self, pictures: Sequence[PictureInfo]) -> Conditioning:
        sizes = [[*picture.original, *picture.crop, *picture.target] for picture in pictures]
        return Conditioning({"sizes_B6": torch.tensor(sizes, dtype=torch.float32)})

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        return by_kind(lengths(conditioning), noisy, t_B, conditioning, self._predict)

    def _predict(self, length: int, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Of captions that have the same length."""
        factor = self._shift().factor(self.latents.tokens(noisy.shape), 0)
        before_shift_B = t_B / (factor - (factor - 1) * t_B)
        original_B2, crop_B2, target_B2 = conditioning["sizes_B6"].to(self.dtype).chunk(3, dim=1)
        predicted: Tensor = self.denoiser(
            hidden_states=noisy.to(self.dtype),
            encoder_hidden_states=conditioning["tokens_BSD"][:, :length].to(self.dtype),
            timestep=before_shift_B * 1000,
            original_size=original_B2,
            target_size=target_B2,
            crop_coords=crop_B2,
            return_dict=False,
        )[0]
        return predicted

    def _shift(self) -> RootShift:
        assert isinstance(self.schedule.shift, RootShift)
        return self.schedule.shift

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)
