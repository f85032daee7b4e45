"""HunyuanVideo: two-stream, one-stream and refiner blocks, Llama with the released template and CLIP."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tiny_llama import llama, llama_tokenizer
from tiny_pipelines import clip_l, clip_tokenizer, drawn

from burnish.families.hunyuan_names import NAMES
from tiny import Case

WIDTH = 32


def _hunyuan_video(seed: int) -> HunyuanVideoPipeline:
    # Knows so much of the template that a little more than the released 95 tokens stand before the caption.
    instruction = str(DEFAULT_PROMPT_TEMPLATE["template"]).split("4.")[0]
    tokenizer, tokenizer_2 = llama_tokenizer(words=(instruction,)), clip_tokenizer()
    return HunyuanVideoPipeline(
        transformer=drawn(
            seed,
            lambda: HunyuanVideoTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=WIDTH // 2,
                num_layers=2,
                num_single_layers=3,
                num_refiner_layers=2,
                text_embed_dim=64,
                pooled_projection_dim=24,
                rope_axes_dim=(4, 6, 6),
            ),
        ),
        vae=drawn(
            seed + 1,
            lambda: AutoencoderKLHunyuanVideo(
                block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=2
            ),
        ),
        text_encoder=drawn(seed + 2, lambda: llama(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=drawn(seed + 3, lambda: clip_l(tokenizer_2)),
        tokenizer_2=tokenizer_2,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


CASES = {
    "hunyuan_video": Case(
        "hunyuan_video",
        _hunyuan_video,
        size=(32, 48),
        frames=9,
        guidance=(1.0, 6.0),
        negatives=False,
        native=NAMES,
        upstream="convert_hunyuan_video_transformer_to_diffusers",
        upstream_widths={3072: WIDTH},
        loader_widths={"_convert_hunyuan_video_lora_to_diffusers": {3072: WIDTH}},
    ),
    "hunyuan_video_still": Case(
        "hunyuan_video",
        _hunyuan_video,
        size=(48, 32),
        call={"num_frames": 1},
        guidance=(6.0,),
        negatives=False,
        loader_widths={"_convert_hunyuan_video_lora_to_diffusers": {3072: WIDTH}},
        learns=False,
    ),
}
