"""Krea 2 and its distilled release; the text encoder is as deep as the released one, which is read at twelve depths."""

from __future__ import annotations

from functools import partial

from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from tiny_pipelines import drawn
from tiny_qwen import qwen3_vl, qwen_tokenizer
from tiny_video_vae import qwen_image_vae
from torch import Tensor

from tiny import Case

LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)


def _krea2(seed: int, *, distilled: bool) -> Krea2Pipeline:
    tokenizer = qwen_tokenizer()
    return Krea2Pipeline(
        transformer=drawn(
            seed,
            lambda: Krea2Transformer2DModel(
                in_channels=64,
                num_layers=3,
                attention_head_dim=16,
                num_attention_heads=4,
                num_key_value_heads=1,
                intermediate_size=128,
                timestep_embed_dim=16,
                text_hidden_dim=32,
                num_text_layers=12,
                text_num_attention_heads=2,
                text_num_key_value_heads=2,
                text_intermediate_size=24,
                num_layerwise_text_blocks=2,
                num_refiner_text_blocks=2,
                axes_dims_rope=(4, 6, 6),
            ),
        ),
        vae=drawn(seed + 1, qwen_image_vae),
        text_encoder=drawn(seed + 2, lambda: qwen3_vl(tokenizer)),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400
        ),
        text_encoder_select_layers=LAYERS,
        is_distilled=distilled,
    )


def _unpacked(pipeline: Krea2Pipeline, latents: Tensor) -> Tensor:
    return pipeline._unpack_latents(latents, 64, 96)[:, :, 0]


CASES = {
    "krea2": Case("krea2", partial(_krea2, distilled=False), unpack=_unpacked, guidance=(0.0, 4.5)),
    "krea2_distilled": Case("krea2", partial(_krea2, distilled=True), unpack=_unpacked, guidance=(0.0,)),
}
