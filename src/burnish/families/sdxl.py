"""Stable Diffusion XL and its fine-tunes (arXiv 2307.01952).

A UNet over 4-channel latents that predicts epsilon (some fine-tunes: v) and reads two CLIPs of 77 tokens, the
pooled embedding of the second, and the picture's size, crop and target.

Shape letters: B batch, C channels, H W height and width, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import clip
from burnish.families.latent_diffusion import Layouts, TextEncoderPlace, plain_text_to_image, stage_count
from burnish.families.size_embedding import pooled_example, size_and_pooled, size_conditioning
from burnish.families.unet import native_module, native_tensors
from burnish.families.unet_family import UNetFamily
from burnish.latent_shape import PictureInfo
from burnish.noise_schedule import SamplerDefaults

LAYOUTS = Layouts(
    config_file="sdxl.json",
    text_encoders=(
        TextEncoderPlace(
            "text_encoder", "tokenizer", "conditioner.embedders.0.", projection=False, padding=clip.END
        ),
        TextEncoderPlace(
            "text_encoder_2",
            "tokenizer_2",
            "conditioner.embedders.1.",
            projection=True,
            padding="!",
        ),
    ),
)


class StableDiffusionXL(UNetFamily):
    """Conditioning, with the released widths:

    `tokens_BSD` (B, 77, 2048): the last but one hidden state of both CLIPs side by side;
    `pooled_BD` (B, 1280): the second CLIP's projected embedding of the end mark;
    `time_ids_B6` (B, 6), whole numbers of pixels: original size, crop's top and left, target size.
    """

    name: ClassVar[str] = "sdxl"
    title: ClassVar[str] = "Stable Diffusion XL"
    layouts: ClassVar[Layouts] = LAYOUTS
    export = ExportKeys(
        default="kohya",
        formats=("kohya", "diffusers"),
        modelspec="stable-diffusion-xl-v1-base",
        base_model_version="sdxl_base_v1-0",
        prefix={"kohya": "lora_unet_", "diffusers": "unet."},
        readers={"kohya": ("ComfyUI", "diffusers", "A1111 and Forge")},
        text_encoders={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
        native=partial(native_module, top_attends=True),
        native_kohya=("ComfyUI", "diffusers"),
        tensors=partial(native_tensors, top_attends=True),
        # diffusers 0.42 takes `lora_unet_add_embedding_linear_1` for `add.embedding.linear` (`_convert_unet_lora_key`).
        unreadable={"kohya": ("add_embedding.*",)},
    )
    defaults = SamplerDefaults(steps=30, guidance=5.0, size=(1024, 1024), negative_prompt=True)

    @classmethod
    def fits_config(cls, config: Mapping[str, Any]) -> bool:
        # The refiner has four stages and reads another size embedding.
        return plain_text_to_image(config, stages=3) and config.get("addition_embed_type") == "text_time"

    @classmethod
    def fits_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return stage_count(shapes) == 3 and "add_embedding.linear_1.weight" in shapes

    def example(
        self, height: int, width: int, batch: int, frames: int = 1
    ) -> tuple[Tensor, Tensor, Conditioning]:
        noisy_BCHW, t_B, conditioning = super().example(height, width, batch, frames)
        pooled_BD = pooled_example(self._parts.loaded_unet(), batch).to(noisy_BCHW)
        about_size = self.describe_pictures([PictureInfo.whole(height, width)] * batch).to(noisy_BCHW.device)
        return noisy_BCHW, t_B, conditioning.merged({"pooled_BD": pooled_BD, **about_size})

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """Captions beyond 75 tokens are cut.

        The empty caption is encoded like any other, as ComfyUI, A1111 and kohya's trainer do, and diffusers
        for `negative_prompt=""`. (For `negative_prompt=None` diffusers takes zeros instead.)
        """
        hidden_states = []
        for tokenizer, encoder in self._parts.loaded_text_encoders():
            ids_BS = clip.token_ids(tokenizer, prompts).to(encoder.device)
            encoded = encoder(ids_BS, output_hidden_states=True)
            hidden_states.append(encoded.hidden_states[-2])
        # `encoded` is now the second encoder's, the only one with a projection.
        return Conditioning({"tokens_BSD": torch.cat(hidden_states, -1), "pooled_BD": encoded.text_embeds})

    def describe_pictures(self, pictures: Sequence[PictureInfo]) -> Conditioning:
        return size_conditioning(pictures)

    def told_besides(self, conditioning: Conditioning) -> dict[str, Any]:
        return size_and_pooled(conditioning, self._dtype)
