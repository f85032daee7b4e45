"""PixArt-Alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692).

A transformer over 2x2 patches of Stable Diffusion's latents (Sigma: of SDXL's) that predicts epsilon, and beside it a
variance that is not read. Captions are T5's tokens in lower case, 120 of them for Alpha, 300 for Sigma, with a mask.
Alpha of 1024 pixels is also told the picture's size and shape.

Shape letters: B batch, C channels, H W height and width of latents, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import clip, t5
from burnish.families.masked import trimmed
from burnish.families.noise_schedule import schedule_of
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Config, Slot, vae_slot
from burnish.families.text_slots import t5_slot
from burnish.family import TargetSet
from burnish.latent_shape import LatentShape, PictureInfo
from burnish.noise_schedule import SamplerDefaults, Schedule

ALPHA_TOKENS, SIGMA_TOKENS = 120, 300
_ALPHA = "PixArtAlphaPipeline"
_LARGE = 128  # latents a side of the models that were trained at 1024 pixels

_ATTENTION = ("*.attn[12].to_[qkv]", "*.attn[12].to_out.0")
_FEED_FORWARD = ("*.ff.net.0.proj", "*.ff.net.2")


class PixArt(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, S, 4096) and `mask_BS`, S the longest caption; for Alpha of 1024 pixels also
    `size_B2` (height, width) and `shape_B1` (height / width)."""

    name: ClassVar[str] = "pixart"
    title: ClassVar[str] = "PixArt"
    pipelines = ("PixArtSigmaPipeline", _ALPHA)
    slots = (
        Slot("transformer", "denoiser", PixArtTransformer2DModel.from_config),
        vae_slot("sdxl_vae.safetensors"),
        t5_slot("text_encoder", "tokenizer"),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention."),
        "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            ("transformer_blocks.*", "caption_projection.*", "adaln_single.linear", "proj_out"),
            "The blocks, the modulation that they share, and the first and last of tokens.",
        ),
    }
    export = ExportKeys(
        default="diffusers",
        formats=("diffusers",),
        modelspec="pixart",
        base_model_version="pixart",
        words={"text_encoder": "t5xxl"},
        prefix={"diffusers": "transformer."},
        readers={"diffusers": ("ComfyUI", "peft")},
    )
    latents = LatentShape(channels=4, compression=8, patch=2)
    defaults = SamplerDefaults(steps=20, guidance=4.5, size=(1024, 1024), negative_prompt=True)

    def configure(self) -> None:
        is_alpha = self.configs["model_index"].get("_class_name") == _ALPHA
        self.prompt_limit = ALPHA_TOKENS if is_alpha else SIGMA_TOKENS
        config = self.configs["transformer"]
        side = int(config.get("sample_size") or _LARGE)
        stated = config.get("use_additional_conditions")
        self.told_size = side == _LARGE if stated is None else bool(stated)
        self.defaults = replace(self.defaults, size=(side * 8, side * 8))

    def make_schedule(self, config: Config) -> Schedule:
        return schedule_of(config, None)

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        shape = (batch, self.prompt_limit, self.denoiser.config.caption_channels)
        height, width = (side * self.latents.compression for side in latents[-2:])
        return Conditioning(
            {
                "tokens_BSD": torch.randn(shape, generator=generator),
                "mask_BS": torch.ones(shape[:2], dtype=torch.bool),
            }
        ).merged(self.describe_pictures([PictureInfo.whole(height, width)] * batch))

    def count_tokens(self, prompt: str) -> int:
        return clip.count_tokens(self.tokenizer("text_encoder"), _read(prompt))

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """Captions are read in lower case, and otherwise as they are written."""
        encoder, tokenizer = self.module("text_encoder"), self.tokenizer("text_encoder")
        ids_BS = t5.token_ids(tokenizer, [_read(prompt) for prompt in prompts], self.prompt_limit)
        mask_BS = (ids_BS != tokenizer.pad_token_id).to(encoder.device)
        states_BSD = encoder(ids_BS.to(encoder.device), attention_mask=mask_BS.long()).last_hidden_state
        tokens_BSD, mask_BS = trimmed(states_BSD.to(self.dtype), mask_BS)
        return Conditioning({"tokens_BSD": tokens_BSD, "mask_BS": mask_BS})

    def describe_pictures(self, pictures: Sequence[PictureInfo]) -> Conditioning:
        if not self.told_size:
            return Conditioning({})
        sizes_B2 = torch.tensor([picture.target for picture in pictures], dtype=torch.float32)
        return Conditioning({"size_B2": sizes_B2, "shape_B1": sizes_B2[:, :1] / sizes_B2[:, 1:]})

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        told = {"resolution": conditioning.get("size_B2"), "aspect_ratio": conditioning.get("shape_B1")}
        predicted: Tensor = self.denoiser(
            hidden_states=noisy.to(self.dtype),
            timestep=t_B * 1000,
            encoder_hidden_states=conditioning["tokens_BSD"].to(self.dtype),
            encoder_attention_mask=conditioning["mask_BS"].to(self.dtype),
            added_cond_kwargs=told,
            return_dict=False,
        )[0]
        return predicted[:, : noisy.shape[1]]  # behind it the variance

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)


def _read(prompt: str) -> str:
    return str(prompt).lower().strip()
