"""Stable Diffusion 2 (v and base), and the inpainting models of 1, 2 and XL."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tiny_pipelines import BETAS, clip_g, clip_l, clip_tokenizer, drawn, kl_vae
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from burnish.conditioning import Conditioning
from burnish.family import Family
from tiny import Case

HEIGHT, WIDTH = 64, 96
INPAINTING = 9  # channels: latents, the mask, the picture without its hole


def _of_the_mode(pipeline: Any, *arguments: Any, **named: Any) -> Any:
    """The picture's latents as the mode of their posterior, where the pipelines draw from it."""
    mode = patch.object(
        DiagonalGaussianDistribution, "sample", lambda posterior, generator=None: posterior.mode()
    )
    with mode:
        return super(type(pipeline), pipeline).__call__(*arguments, **named)


class InpaintOfTheMode(StableDiffusionInpaintPipeline):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _of_the_mode(self, *arguments, **named)


class InpaintXLOfTheMode(StableDiffusionXLInpaintPipeline):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _of_the_mode(self, *arguments, **named)


def _unet(**changes: Any) -> UNet2DConditionModel:
    sd1 = {
        "block_out_channels": (8, 16, 32, 32),
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "attention_head_dim": 8,  # the number of heads, as in the released config
    }
    return UNet2DConditionModel(sample_size=8, **{**sd1, **changes})


SD2: dict[str, Any] = {
    "block_out_channels": (10, 20, 40, 40),
    "norm_num_groups": 2,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 32,
}
SDXL: dict[str, Any] = {
    "block_out_channels": (10, 20, 40),
    "norm_num_groups": 2,
    "cross_attention_dim": 24 + 40,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 40,
    "transformer_layers_per_block": (1, 2, 3),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}


def open_clip_h(tokenizer: CLIPTokenizer, layers: int = 3) -> CLIPTextModel:
    """Stable Diffusion 2's, without the projection that its release has and does not use."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=16,
            num_hidden_layers=layers,
            hidden_act="gelu",
            projection_dim=12,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _one_clip(
    seed: int, *, second: bool, prediction: str = "epsilon", channels: int = 4
) -> DiffusionPipeline:
    tokenizer = clip_tokenizer(padding="!") if second else clip_tokenizer()
    kind = StableDiffusionInpaintPipeline if channels == INPAINTING else StableDiffusionPipeline
    return kind(
        unet=drawn(seed, lambda: _unet(in_channels=channels, **(SD2 if second else {}))),
        vae=drawn(seed + 1, lambda: kl_vae(latent_channels=4, scaling_factor=0.18215)),
        text_encoder=drawn(seed + 2, lambda: open_clip_h(tokenizer) if second else clip_l(tokenizer)),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            **BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction
        ),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def _sdxl_inpainting(seed: int) -> StableDiffusionXLInpaintPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer(padding="!")
    return StableDiffusionXLInpaintPipeline(
        unet=drawn(seed, lambda: _unet(in_channels=INPAINTING, **SDXL)),
        vae=drawn(seed + 1, lambda: kl_vae(latent_channels=4, scaling_factor=0.13025, force_upcast=False)),
        text_encoder=drawn(seed + 2, lambda: clip_l(tokenizer)),
        text_encoder_2=drawn(seed + 3, lambda: clip_g(tokenizer_2)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
        image_encoder=None,
        feature_extractor=None,
        add_watermarker=False,
    )


def picture() -> Tensor:
    """(1, 3, H, W) in [0, 1], as diffusers takes it."""
    return torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))


def mask() -> Tensor:
    """(1, 1, H, W): a hole off the middle, its edges not at those of latents; some of it faint."""
    hole = torch.zeros(1, 1, HEIGHT, WIDTH)
    hole[..., 9:37, 21:70] = 1.0
    hole[..., 50:, :11] = 0.4
    return hole


def told(family: Family) -> Conditioning:
    return family.encode_references([picture() * 2 - 1], mask_B1HW=mask())


FILLS: dict[str, Any] = {
    "call": {"image": picture(), "mask_image": mask(), "strength": 1.0},
    "told": told,
}
CASES = {
    "sd2": Case("sd2", partial(_one_clip, second=True, prediction="v_prediction")),
    "sd2_base": Case("sd2", partial(_one_clip, second=True)),
    "sd15_inpainting": Case(
        "sd15", partial(_one_clip, second=False, channels=INPAINTING), pipeline=InpaintOfTheMode, **FILLS
    ),
    "sd2_inpainting": Case(
        "sd2", partial(_one_clip, second=True, channels=INPAINTING), pipeline=InpaintOfTheMode, **FILLS
    ),
    "sdxl_inpainting": Case("sdxl", _sdxl_inpainting, pipeline=InpaintXLOfTheMode, side=128, **FILLS),
}
