"""FLUX.2: dev (Mistral 3, embedded guidance), klein (Qwen3), and klein distilled to few steps."""

from __future__ import annotations

from functools import partial

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tiny_flux2_vae import flux2_vae
from tiny_mistral import mistral3, mistral_tokenizer
from tiny_pipelines import drawn
from tiny_qwen import qwen3_lm, qwen_tokenizer
from torch import Tensor

from burnish.families.flux2_names import NAMES
from tiny import Case

WIDTH = 16  # of the text encoders; the denoiser reads three of their states


def _transformer(*, guidance: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def _dev(seed: int) -> Flux2Pipeline:
    tokenizer = mistral_tokenizer()
    return Flux2Pipeline(
        transformer=drawn(seed, lambda: _transformer(guidance=True)),
        vae=drawn(seed + 1, flux2_vae),
        text_encoder=drawn(seed + 2, lambda: mistral3(tokenizer, WIDTH)),
        tokenizer=tokenizer,  # the released processor around it needs torchvision, for pictures that are not shown
        scheduler=_scheduler(),
    )


def _klein(seed: int, *, distilled: bool) -> Flux2KleinPipeline:
    tokenizer = qwen_tokenizer(qwen3=True)
    return Flux2KleinPipeline(
        transformer=drawn(seed, lambda: _transformer(guidance=False)),
        vae=drawn(seed + 1, flux2_vae),
        text_encoder=drawn(seed + 2, lambda: qwen3_lm(tokenizer, WIDTH, layers=29)),
        tokenizer=tokenizer,
        scheduler=_scheduler(),
        is_distilled=distilled,
    )


def _dev_latents(pipeline: DiffusionPipeline, packed_BND: Tensor) -> Tensor:
    return packed_BND.transpose(1, 2).unflatten(2, (4, 6))


def _klein_latents(pipeline: DiffusionPipeline, latents_BCHW: Tensor) -> Tensor:
    """What klein's pipeline gives is decoded as it is; ours are folded and normed."""
    folded_BCHW = pipeline._patchify_latents(latents_BCHW)
    norm = pipeline.vae.bn
    deviation = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + pipeline.vae.config.batch_norm_eps)
    normed: Tensor = (folded_BCHW - norm.running_mean.view(1, -1, 1, 1)) / deviation
    return normed


NATIVE = {"native": NAMES, "upstream": "convert_flux2_transformer_checkpoint_to_diffusers"}
CASES = {
    "flux2": Case("flux2", _dev, unpack=_dev_latents, negatives=False, **NATIVE),
    "flux2_klein": Case(
        "flux2", partial(_klein, distilled=False), unpack=_klein_latents, negatives=False, **NATIVE
    ),
    "flux2_klein_distilled": Case(
        "flux2", partial(_klein, distilled=True), unpack=_klein_latents, negatives=False, guidance=(1.0,)
    ),
}
