"""HiDream-I1 and -E1: experts, four text encoders, another hidden state of Llama for each block."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchLCMScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    UniPCMultistepScheduler,
)
from hidream_e1_reference import HiDreamImageEditingPipeline
from tiny_llama import llama_lm, llama_tokenizer
from tiny_pipelines import clip_tokenizer, drawn, kl_vae, t5, t5_tokenizer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from burnish.conditioning import Conditioning
from burnish.families.hidream_model import NAMES
from burnish.family import Family
from tiny import Case

POSITIONS = 248


class SmallPictures(HiDreamImagePipeline):
    """The pipeline scales every size to a million pixels; this one to 64 x 64."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.default_sample_size = 8
        return super().__call__(*arguments, **named)


def hidream(seed: int, *, distilled: bool = False) -> HiDreamImagePipeline:
    scheduler = FlowMatchLCMScheduler(shift=6.0) if distilled else _unipc()
    return HiDreamImagePipeline(**_parts(seed, (40, 40)), scheduler=scheduler)


def hidream_e1(seed: int) -> HiDreamImageEditingPipeline:
    """Told of two pictures side by side, as the release is."""
    return HiDreamImageEditingPipeline(**_parts(seed, (16, 64)), scheduler=_unipc())


def _unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _parts(seed: int, resolution: tuple[int, int]) -> dict[str, Any]:
    """All but the scheduler."""
    clip, clip_2, of_t5, of_llama = (
        long_clip_tokenizer(),
        long_clip_tokenizer(),
        t5_tokenizer(),
        llama_tokenizer(),
    )
    return {
        "transformer": drawn(seed, lambda: _transformer(resolution)),
        "vae": drawn(
            seed + 1,
            lambda: kl_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant=False),
        ),
        "text_encoder": drawn(
            seed + 2, lambda: _clip(clip, width=24, heads=12, layers=2, activation="quick_gelu")
        ),
        "tokenizer": clip,
        "text_encoder_2": drawn(
            seed + 3, lambda: _clip(clip_2, width=40, heads=20, layers=13, activation="gelu")
        ),
        "tokenizer_2": clip_2,
        "text_encoder_3": drawn(seed + 4, lambda: t5(of_t5)),
        "tokenizer_3": of_t5,
        "text_encoder_4": drawn(seed + 5, lambda: llama_lm(of_llama, layers=3)),
        "tokenizer_4": of_llama,
    }


def _transformer(resolution: tuple[int, int]) -> nn.Module:
    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[32, 64],
        text_emb_dim=24 + 40,
        axes_dims_rope=(8, 4, 4),
        max_resolution=resolution,
        llama_layers=[0, 1, 2, 2],
    )


def long_clip_tokenizer() -> CLIPTokenizer:
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = POSITIONS
    return tokenizer


def _clip(
    tokenizer: CLIPTokenizer, *, width: int, heads: int, layers: int, activation: str
) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width * 2,
            num_attention_heads=heads,
            num_hidden_layers=layers,  # by more than 12 the larger is told in single files
            hidden_act=activation,
            projection_dim=width,
            max_position_embeddings=POSITIONS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


SHOWN = torch.rand(3, 48, 96, generator=torch.Generator().manual_seed(4)) * 2 - 1


def _told(family: Family) -> Conditioning:
    seen: Tensor = SHOWN[None]
    return family.encode_references([seen])


CASES = {
    # 2 x 8 patches: as many pixels as 64 x 64, so that the pipeline keeps the size, and no square.
    "hidream": Case("hidream", hidream, size=(32, 128), native=NAMES, pipeline=SmallPictures),
    # The pass without the picture, which a scale of 1 leaves without effect, is compared in test_hidream_e1.py.
    "hidream_e1": Case(
        "hidream_e1",
        hidream_e1,
        size=(48, 96),
        call={"image": SHOWN, "image_guidance_scale": 1.0},
        told=_told,
        pipeline=HiDreamImageEditingPipeline,
    ),
}
