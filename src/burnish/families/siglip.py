"""SigLIP's picture encoder (arXiv 2303.15343), which image-to-video models show the first frame.

Shape letters: B batch, S tokens, D width, H W height and width in pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from burnish.families.seen_pictures import through_pillow
from burnish.families.slots import Slot
from burnish.families.text_slots import settings_of
from burnish.families.weights import below


def vision_slot(folder: str = "image_encoder") -> Slot:
    """The encoder of the first frame, which belongs to what the VAE's stage needs."""
    return Slot(
        folder,
        "vae",
        lambda config: SiglipVisionModel(SiglipVisionConfig(**settings_of(config))),
        # Releases put `vision_model.` before the names.
        tidy=lambda layout: below(layout, "vision_model.") or layout,
        unused=("*position_ids",),
        optional=True,
        listed_under="vae",  # but never in that file
    )


def prepared(pixels_B3HW: Tensor, side: int) -> Tensor:
    """Pixels in [-1, 1] as SigLIP sees them: the whole picture made a square, in [-1, 1].

    As transformers' SiglipImageProcessor with Pillow: bicubic on 8-bit values.
    """

    def see(picture: Image.Image) -> Tensor:
        square = picture.resize((side, side), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(square, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)

    return through_pillow(pixels_B3HW, side, see)


@torch.no_grad()
def last_states(encoder: Any, pixels_B3HW: Tensor) -> Tensor:
    """The last hidden states (B, S, D) of pictures in [-1, 1], normalised."""
    seen = prepared(pixels_B3HW, encoder.config.image_size).to(encoder.device, encoder.dtype)
    states_BSD: Tensor = encoder(pixel_values=seen).last_hidden_state
    return states_BSD
