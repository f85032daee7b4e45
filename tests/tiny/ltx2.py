"""LTX-2 and 2.3: video and audio streams, connectors with registers, Gemma 3 with eyes as its release has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from tiny_gemma import gemma_tokenizer
from tiny_pipelines import drawn
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GemmaTokenizer

from burnish.families.ltx2 import NAMES
from tiny import Case

WIDTH, LAYERS = 16, 3


class VideoAlone(LTX2Pipeline):
    """Whose streams never look at each other."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        forward = self.transformer.forward
        self.transformer.forward = lambda **given: forward(**{**given, "isolate_modalities": True})
        return super().__call__(*arguments, **named)


def gemma3(tokenizer: GemmaTokenizer) -> Gemma3ForConditionalGeneration:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "max_position_embeddings": 8192,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    return Gemma3ForConditionalGeneration(config)


def video_vae() -> AutoencoderKLLTX2Video:
    vae = AutoencoderKLLTX2Video(
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_block_out_channels=(8, 16, 32),
        decoder_layers_per_block=(1, 1, 1, 1),
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    vae.latents_mean.normal_(0, 0.2)
    vae.latents_std.uniform_(0.6, 1.4)
    return vae


def audio_vae() -> AutoencoderKLLTX2Audio:
    # One channel of 16 bins instead of eight, so that a token of audio is as wide as the base, as released.
    vae = AutoencoderKLLTX2Audio(
        base_channels=16, ch_mult=(1, 1, 1), num_res_blocks=1, resolution=32, latent_channels=1
    )
    vae.latents_mean.zero_()
    vae.latents_std.fill_(1.0)
    return vae


def _transformer(**later: Any) -> LTX2VideoTransformer3DModel:
    return LTX2VideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        audio_in_channels=16,
        audio_out_channels=16,
        num_layers=3,
        caption_channels=WIDTH,
        rope_type="split",
        **later,
    )


def _connectors(**later: Any) -> LTX2TextConnectors:
    return LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=LAYERS + 1,
        rope_type="split",
        **later,
    )


FIRST = {
    "transformer": {},
    "connectors": {
        "video_connector_num_attention_heads": 2,
        "video_connector_attention_head_dim": WIDTH // 2,
        "audio_connector_num_attention_heads": 2,
        "audio_connector_attention_head_dim": WIDTH // 2,
    },
}
# 2.3: each stream has its own projection of the captions, attention is gated, captions are modulated by time.
LATER = {
    "transformer": {
        "gated_attn": True,
        "cross_attn_mod": True,
        "audio_gated_attn": True,
        "audio_cross_attn_mod": True,
        "use_prompt_embeddings": False,
        "perturbed_attn": True,
    },
    "connectors": {
        "video_connector_num_attention_heads": 2,
        "video_connector_attention_head_dim": 16,
        "audio_connector_num_attention_heads": 2,
        "audio_connector_attention_head_dim": 8,
        "video_gated_attn": True,
        "audio_gated_attn": True,
        "per_modality_projections": True,
        "video_hidden_dim": 32,
        "audio_hidden_dim": 16,
        "proj_bias": True,
    },
}


def _vocoder() -> LTX2Vocoder:
    return LTX2Vocoder(
        hidden_channels=64,
        upsample_kernel_sizes=[16, 15, 8, 4, 4],
        upsample_factors=[6, 5, 2, 2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )


def _ltx2(seed: int, release: Mapping[str, Mapping[str, Any]]) -> LTX2Pipeline:
    tokenizer = gemma_tokenizer()
    return LTX2Pipeline(
        transformer=drawn(seed, lambda: _transformer(**release["transformer"])),
        vae=drawn(seed + 1, video_vae),
        text_encoder=drawn(seed + 2, lambda: gemma3(tokenizer)),
        tokenizer=tokenizer,
        connectors=drawn(seed + 3, lambda: _connectors(**release["connectors"])),
        audio_vae=drawn(seed + 4, audio_vae),
        vocoder=drawn(seed + 5, _vocoder),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
    )


def _normed(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    """The pipeline gives latents in the VAE's scale."""
    mean, deviation = (
        values.view(1, -1, 1, 1, 1) for values in (pipeline.vae.latents_mean, pipeline.vae.latents_std)
    )
    return torch.as_tensor((latents - mean) / deviation)


# Guidance by other means than the prompt is off.
PLAIN = {
    "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "spatio_temporal_guidance_blocks": None,
}
CASES = {
    # A scale of 0 between prediction with and without the other stream is the prediction without.
    "ltx2": Case(
        "ltx2",
        partial(_ltx2, release=FIRST),
        size=(64, 96),
        frames=17,
        guidance=(1.0,),
        call={**PLAIN, "modality_scale": 0.0, "audio_modality_scale": 3.0},
        unpack=_normed,
        native=NAMES,
        upstream="convert_ltx2_transformer_to_diffusers",
        learns=False,  # guided below
    ),
    "ltx2_guided_still": Case(
        "ltx2",
        partial(_ltx2, release=FIRST),
        size=(96, 64),
        guidance=(4.0,),
        call={**PLAIN, "modality_scale": 1.0, "audio_modality_scale": 1.0, "num_frames": 1},
        unpack=_normed,
        pipeline=VideoAlone,
    ),
}
# Its modules are not those of LTX-2's skeleton, so it is compared by itself.
LTX_2_3 = Case(
    "ltx2",
    partial(_ltx2, release=LATER),
    size=(64, 64),
    frames=9,
    guidance=(1.0,),
    call={**PLAIN, "modality_scale": 0.0, "audio_modality_scale": 3.0},
    unpack=_normed,
    learns=False,
)
# Both streams together, as released, drawn by tests/parity/test_ltx2_both_streams.py.
BOTH = Case(
    "ltx2",
    partial(_ltx2, release=FIRST),
    size=(64, 96),
    frames=17,
    call={**PLAIN, "modality_scale": 1.0, "audio_modality_scale": 1.0},
    unpack=_normed,
)
BOTH_2_3 = replace(BOTH, build=partial(_ltx2, release=LATER), frames=9)
