"""HunyuanImage 2.1, with its two rules of guidance, and the distilled release with mean flows."""

from __future__ import annotations

from functools import partial

from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanImage,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)
from tiny_pipelines import drawn
from tiny_qwen import qwen25_vl, qwen_tokenizer
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from burnish.families.hunyuan_image_names import NAMES
from tiny import Case


def _hunyuan_image(seed: int, *, distilled: bool) -> HunyuanImagePipeline:
    tokenizer = qwen_tokenizer()
    return HunyuanImagePipeline(
        transformer=drawn(
            seed,
            lambda: HunyuanImageTransformer2DModel(  # the network of the letters has a fixed width of 2048
                num_attention_heads=3,
                attention_head_dim=64,
                num_layers=4,
                num_single_layers=3,
                guidance_embeds=distilled,
                text_embed_dim=256,
                text_embed_2_dim=24,
                rope_axes_dim=(32, 32),
                use_meanflow=distilled,
            ),
        ),
        vae=drawn(seed + 1, _vae),
        text_encoder=drawn(seed + 2, lambda: qwen25_vl(tokenizer, layers=4)),
        tokenizer=tokenizer,
        text_encoder_2=drawn(seed + 3, _byt5),
        tokenizer_2=ByT5Tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0 if distilled else 5.0),
        # Of few steps some are to take either rule.
        guider=None
        if distilled
        else AdaptiveProjectedMixGuidance(
            adaptive_projected_guidance_start_step=0, adaptive_projected_guidance_rescale=1.0, eta=0.25
        ),
        ocr_guider=None
        if distilled
        else AdaptiveProjectedMixGuidance(
            adaptive_projected_guidance_start_step=1, adaptive_projected_guidance_rescale=1.0, eta=0.25
        ),
    )


def _vae() -> AutoencoderKLHunyuanImage:
    return AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=64,
        block_out_channels=(32, 32, 32, 32, 64, 128),
        layers_per_block=1,
        spatial_compression_ratio=32,
        sample_size=384,
        scaling_factor=0.75289,
    )


def _byt5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=384,
            d_model=24,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


CASES = {
    "hunyuan_image": Case(
        "hunyuan_image",
        partial(_hunyuan_image, distilled=False),
        guidance=(3.5,),  # that of the pipeline's rule
        guidance_argument="distilled_guidance_scale",
        native=NAMES,
        loads_adapters=False,
    ),
    "hunyuan_image_distilled": Case(
        "hunyuan_image",
        partial(_hunyuan_image, distilled=True),
        guidance=(1.0, 3.25),
        guidance_argument="distilled_guidance_scale",
        native=NAMES,
        loads_adapters=False,
    ),
}
