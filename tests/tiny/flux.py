"""FLUX.1: dev (Krea's shape too), schnell, Kontext with a reference picture, Fill with a picture that has a hole."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tiny_pipelines import clip_l, clip_tokenizer, drawn, kl_vae, t5, t5_tokenizer
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.families.flux_transformer import NAMES
from burnish.family import Family
from tiny import Case

HEIGHT, WIDTH = 64, 96


class FillOfTheMode(FluxFillPipeline):
    """FluxFillPipeline draws the picture's latents from their posterior; here they are its mode, as in training."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with patch.object(
            DiagonalGaussianDistribution, "sample", lambda posterior, generator=None: posterior.mode()
        ):
            return super().__call__(*arguments, **named)


def flux(
    seed: int,
    kind: type[DiffusionPipeline] = FluxPipeline,
    *,
    guidance: bool = True,
    **changes: Any,
) -> DiffusionPipeline:
    """A FLUX.1, with `changes` to the transformer's config."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    scheduler = (
        FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        )
        if guidance
        else FlowMatchEulerDiscreteScheduler(shift=1.0)
    )
    config = {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "guidance_embeds": guidance,
        "axes_dims_rope": (4, 6, 6),
        **changes,
    }
    without = {} if kind is FluxFillPipeline else {"image_encoder": None, "feature_extractor": None}
    return kind(
        transformer=drawn(seed, lambda: FluxTransformer2DModel(**config)),
        vae=drawn(
            seed + 1,
            lambda: kl_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant=False),
        ),
        text_encoder=drawn(seed + 2, lambda: clip_l(tokenizer)),
        text_encoder_2=drawn(seed + 3, lambda: t5(tokenizer_2)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=scheduler,
        **without,
    )


def unpack(pipeline: DiffusionPipeline, patches: Tensor) -> Tensor:
    """As diffusers' FluxPipeline._unpack_latents, for latents an eighth of the picture's size."""
    rows, columns = HEIGHT // 16, WIDTH // 16
    latents = patches.view(len(patches), rows, columns, patches.shape[2] // 4, 2, 2)
    return latents.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), -1, rows * 2, columns * 2)


def picture(height: int, width: int, seed: int) -> Tensor:
    """(1, 3, H, W) in [0, 1], as diffusers takes it."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def mask() -> Tensor:
    """(1, 1, H, W): a hole off the middle, its edges not at those of latents; some of it faint."""
    hole = torch.zeros(1, 1, HEIGHT, WIDTH)
    hole[..., 9:37, 21:70] = 1.0
    hole[..., 50:, :11] = 0.4
    return hole


def told_kontext(family: Family) -> Conditioning:
    return family.encode_references([picture(48, 80, 1) * 2 - 1])


def told_fill(family: Family) -> Conditioning:
    return family.encode_references([picture(HEIGHT, WIDTH, 2) * 2 - 1], mask_B1HW=mask())


COMMON: dict[str, Any] = {"unpack": unpack, "negatives": False, "native": NAMES}
CONVERTER = "convert_flux_transformer_checkpoint_to_diffusers"
UPSTREAM: dict[str, Any] = {"upstream": CONVERTER, "upstream_widths": {3072: 32}}
KONTEXT = {"max_area": HEIGHT * WIDTH, "_auto_resize": False}
CASES = {
    "flux": Case("flux", flux, **COMMON, **UPSTREAM),
    "flux_schnell": Case(
        "flux",
        partial(flux, guidance=False),
        call={"max_sequence_length": 256},
        guidance=(0.0,),
        **COMMON,
    ),
    "flux_kontext": Case(
        "flux",
        partial(flux, kind=FluxKontextPipeline),
        call={"image": picture(48, 80, 1), **KONTEXT},
        told=told_kontext,
        guidance=(2.5,),
        **COMMON,
    ),
    "flux_kontext_alone": Case(
        "flux", partial(flux, kind=FluxKontextPipeline), call=KONTEXT, guidance=(2.5,), learns=False, **COMMON
    ),
    "flux_fill": Case(
        "flux",
        partial(flux, kind=FluxFillPipeline, in_channels=384, out_channels=64),
        call={"image": picture(HEIGHT, WIDTH, 2), "mask_image": mask()},
        told=told_fill,
        pipeline=FillOfTheMode,
        guidance=(30.0,),
        **COMMON,
        **UPSTREAM,
    ),
}
