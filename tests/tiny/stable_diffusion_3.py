"""Stable Diffusion 3 (no norm of queries and keys) and 3.5 medium (norms, a second attention in some blocks)."""

from __future__ import annotations

from functools import partial

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny_pipelines import clip_g, clip_l_with_projection, clip_tokenizer, drawn, kl_vae, t5, t5_tokenizer

from burnish.families.sd3 import NAMES
from tiny import Case


def _sd3(seed: int, *, medium: bool) -> StableDiffusion3Pipeline:
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer(padding="!"), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=drawn(
            seed,
            lambda: SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=16,
                out_channels=16,
                num_layers=3,
                attention_head_dim=64,
                num_attention_heads=3,  # as many as layers: ComfyUI takes the width for depth * 64
                joint_attention_dim=72,  # wider than both CLIPs together, which are padded to it
                caption_projection_dim=192,
                pooled_projection_dim=24 + 40,
                pos_embed_max_size=24,
                dual_attention_layers=(0, 1) if medium else (),
                qk_norm="rms_norm" if medium else None,
            ),
        ),
        vae=drawn(
            seed + 1,
            lambda: kl_vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, quant=False),
        ),
        text_encoder=drawn(seed + 2, lambda: clip_l_with_projection(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=drawn(seed + 3, lambda: clip_g(tokenizer_2, layers=13)),
        tokenizer_2=tokenizer_2,
        text_encoder_3=drawn(seed + 4, lambda: t5(tokenizer_3, width=72)),
        tokenizer_3=tokenizer_3,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


# The context's tokens leave after the last block: their query there has no effect.
IDLE = ("transformer_blocks.2.attn.add_q_proj",)
SINGLE_FILE = {
    "native": NAMES,
    "swapped": ("transformer_blocks.2.norm1_context.linear",),
    "upstream": "convert_sd3_transformer_checkpoint_to_diffusers",
}
CASES = {
    "sd3": Case("sd3", partial(_sd3, medium=False), idle=IDLE, **SINGLE_FILE),
    "sd35_medium": Case("sd3", partial(_sd3, medium=True), idle=IDLE, **SINGLE_FILE),
}
