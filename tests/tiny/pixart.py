"""PixArt-Sigma; PixArt-Alpha of 1024 pixels, which is told the picture's size, and of 512."""

from __future__ import annotations

from functools import partial
from types import MappingProxyType

from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from tiny_pipelines import drawn, kl_vae, t5, t5_tokenizer

from tiny import Case


def _pixart(
    seed: int, kind: type[DiffusionPipeline], *, side: int, told: bool | None, scale: float
) -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    return kind(
        transformer=drawn(
            seed,
            lambda: PixArtTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                num_layers=2,
                cross_attention_dim=24,
                sample_size=side,
                use_additional_conditions=told,
                caption_channels=32,
            ),
        ),
        vae=drawn(seed + 1, lambda: kl_vae(latent_channels=4, scaling_factor=scale)),
        text_encoder=drawn(seed + 2, lambda: t5(tokenizer)),
        tokenizer=tokenizer,
        # With the released betas what a random denoiser draws grows to hundreds, where 1e-4 is no tolerance.
        scheduler=DPMSolverMultistepScheduler(beta_end=0.005),
    )


_CALL = MappingProxyType({"use_resolution_binning": False, "clean_caption": False})
CASES = {
    "pixart_sigma": Case(
        "pixart",
        partial(_pixart, kind=PixArtSigmaPipeline, side=128, told=False, scale=0.13025),
        call=_CALL,
        loads_adapters=False,  # diffusers has no loader; peft has: see parity/test_pixart.py
    ),
    "pixart_alpha": Case(
        "pixart",
        partial(_pixart, kind=PixArtAlphaPipeline, side=128, told=None, scale=0.18215),
        call=_CALL,
        loads_adapters=False,
    ),
    "pixart_alpha_512": Case(
        "pixart",
        partial(_pixart, kind=PixArtAlphaPipeline, side=64, told=None, scale=0.18215),
        call=_CALL,
        loads_adapters=False,
    ),
}
