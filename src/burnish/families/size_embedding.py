"""The size conditioning of Stable Diffusion XL (arXiv 2307.01952, section 2.2), which Kolors has, too.

Shape letters: B batch, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.latent_shape import PictureInfo
from burnish.randomness import torch_generator


def size_conditioning(pictures: Sequence[PictureInfo]) -> Conditioning:
    """`time_ids_B6`: original size, crop, target. Integers, so that a cast to bfloat16 rounds none."""
    rows = [(*picture.original, *picture.crop, *picture.target) for picture in pictures]
    return Conditioning({"time_ids_B6": torch.tensor(rows, dtype=torch.int64)})


def size_and_pooled(conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Any]:
    """`time_ids_B6` and `pooled_BD` as the UNet takes them."""
    return {
        "added_cond_kwargs": {
            "text_embeds": conditioning["pooled_BD"].to(dtype),
            "time_ids": conditioning["time_ids_B6"].float(),
        }
    }


def pooled_example(unet: UNet2DConditionModel, batch: int) -> Tensor:
    """A random pooled embedding (B, D) as wide as the UNet takes it beside six embedded sizes."""
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return torch.randn(batch, width, generator=torch_generator(0, "example", "pooled"))
