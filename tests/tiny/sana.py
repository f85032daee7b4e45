"""Sana: linear attention, a convolution in the feed-forward, a deep autoencoder of 32 pixels to a latent."""

from __future__ import annotations

from functools import partial
from types import MappingProxyType

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from tiny_gemma import gemma2, gemma_tokenizer
from tiny_pipelines import drawn

from tiny import Case


def _sana(seed: int, *, normed: bool) -> SanaPipeline:
    tokenizer = gemma_tokenizer()
    return SanaPipeline(
        transformer=drawn(
            seed,
            lambda: SanaTransformer2DModel(
                num_attention_heads=4,
                attention_head_dim=8,
                num_layers=2,
                num_cross_attention_heads=2,
                cross_attention_head_dim=16,
                cross_attention_dim=32,
                caption_channels=32,
                sample_size=32,
                qk_norm="rms_norm_across_heads" if normed else None,
            ),
        ),
        vae=drawn(seed + 1, _deep_autoencoder),
        text_encoder=drawn(seed + 2, lambda: gemma2(tokenizer)),
        tokenizer=tokenizer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _deep_autoencoder() -> AutoencoderDC:
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    widths, scales = (8, 8, 8, 32, 32, 32), ((), (), (), (5,), (5,), (5,))
    return AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.41407,
    )


_CALL = MappingProxyType({"use_resolution_binning": False})
CASES = {
    "sana": Case("sana", partial(_sana, normed=False), call=_CALL, side=128),
    "sana15": Case("sana", partial(_sana, normed=True), call=_CALL, side=128),
}
