"""Kolors by Kuaishou (https://github.com/Kwai-Kolors/Kolors): Stable Diffusion XL's UNet behind ChatGLM3.

A UNet over 4-channel latents that predicts epsilon on a noise schedule of 1100 steps. It reads ChatGLM3's last but one
hidden state, the last one's last token, and the picture's size, crop and target. Padding tokens are part of what it
was trained on, so there is no mask.

Shape letters: B batch, C channels, H W height and width of latents, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import chatglm
from burnish.families.noise_schedule import schedule_of
from burnish.families.pipeline import PipelineFamily
from burnish.families.size_embedding import pooled_example, size_and_pooled, size_conditioning
from burnish.families.slots import Config, Slot, vae_slot
from burnish.families.unet import TARGETS, native_module, repeated_blocks, with_depth
from burnish.family import TargetSet
from burnish.latent_shape import LatentShape, PictureInfo
from burnish.noise_schedule import SamplerDefaults, Schedule

PROMPT_TOKENS = 256


class Kolors(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, 256, 4096), `pooled_BD` (B, 4096), `time_ids_B6` as of Stable Diffusion XL."""

    name: ClassVar[str] = "kolors"
    title: ClassVar[str] = "Kolors"
    pipelines = ("KolorsPipeline", "KolorsImg2ImgPipeline")
    slots = (
        Slot("unet", "denoiser", UNet2DConditionModel.from_config),
        vae_slot(),
        chatglm.chatglm_slot("text_encoder", "tokenizer"),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = TARGETS
    export = ExportKeys(
        default="kohya",
        formats=("kohya", "diffusers"),
        modelspec="kolors",
        base_model_version="kolors",
        prefix={"kohya": "lora_unet_", "diffusers": "unet."},
        native=partial(native_module, top_attends=True),
        # diffusers 0.42 takes `lora_unet_add_embedding_linear_1` for `add.embedding.linear` (`_convert_unet_lora_key`).
        unreadable={"kohya": ("add_embedding.*",)},
        comfyui=False,
        words={"text_encoder": "chatglm3"},
    )
    latents = LatentShape(channels=4, compression=8)
    defaults = SamplerDefaults(steps=50, guidance=5.0, size=(1024, 1024), negative_prompt=True)
    prompt_limit = PROMPT_TOKENS

    @classmethod
    def accepts(cls, index: Config, config: Config) -> bool:
        return config.get("in_channels") == cls.latents.channels  # not its inpainting model

    @classmethod
    def with_depth(cls, config: dict[str, Any], depth: int) -> dict[str, Any]:
        return with_depth(config, depth)

    def make_schedule(self, config: Config) -> Schedule:
        return schedule_of(config, None)

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        config, multiple = self.denoiser.config, self.latents.compression
        tokens_BSD = torch.randn(batch, PROMPT_TOKENS, config.encoder_hid_dim, generator=generator)
        size = PictureInfo.whole(latents[-2] * multiple, latents[-1] * multiple)
        return Conditioning(
            {"tokens_BSD": tokens_BSD, "pooled_BD": pooled_example(self.denoiser, batch)}
        ).merged(self.describe_pictures([size] * batch))

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """Captions are cut at 254 tokens. The empty one is encoded like any other."""
        tokens_BSD, pooled_BD = chatglm.last_states(
            self.module("text_encoder"), self.tokenizer("text_encoder"), prompts, PROMPT_TOKENS
        )
        return Conditioning({"tokens_BSD": tokens_BSD, "pooled_BD": pooled_BD})

    def describe_pictures(self, pictures: Sequence[PictureInfo]) -> Conditioning:
        return size_conditioning(pictures)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        # Scaled in the precision given: a sampler passes float64, so that whole steps stay whole.
        index_B = (t_B * self.schedule.steps).float()
        predicted_BCHW: Tensor = self.denoiser(
            noisy.to(self.dtype),
            index_B,
            encoder_hidden_states=conditioning["tokens_BSD"].to(self.dtype),
            return_dict=False,
            **size_and_pooled(conditioning, self.dtype),
        )[0]
        return predicted_BCHW

    def blocks(self) -> list[nn.Module]:
        return repeated_blocks(self.denoiser)
