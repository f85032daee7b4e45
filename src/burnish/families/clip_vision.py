"""CLIP's picture encoder (arXiv 2103.00020) as image-to-video models read it: its slot, its way of resizing.

Shape letters: B batch, S tokens, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from burnish.families.native import depth
from burnish.families.seen_pictures import through_pillow
from burnish.families.slots import Config, Slot
from burnish.families.text_slots import settings_of
from burnish.families.weights import Layout, below

SIDE = 224  # pixels of the square that it sees
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_SIGN = "embeddings.patch_embedding.weight"
_PREFIXES = ("", "vision_model.", "clip_vision.vision_model.")
HEAD_DIM = 80  # of ViT-H, the one that is read


def vision_slot(folder: str = "image_encoder") -> Slot:
    """The encoder of the first frame, which belongs to what the VAE's stage needs.

    As a separate file (ComfyUI's clip_vision_h) it is listed under `model.text_encoders`.
    """
    return Slot(
        folder,
        "vae",
        lambda config: CLIPVisionModel(CLIPVisionConfig(**settings_of(config))),
        _find,
        _config_from_shapes,
        tidy=_plain_names,
        unused=("visual_projection.*", "logit_scale", "*position_ids", "text_*"),
        optional=True,
        listed_under="text_encoders",
        file_hint="clip_vision_h.safetensors",
    )


def _plain_names(layout: Layout) -> Layout:
    """Releases put `vision_model.` before the names."""
    inside = below(layout, "vision_model.")
    return inside or layout


def _find(layout: Layout) -> Layout | None:
    for prefix in _PREFIXES:
        if prefix + _SIGN in layout and f"{prefix}encoder.layers.0.self_attn.q_proj.weight" in layout:
            return below(layout, prefix)
    return None


def _config_from_shapes(shipped: Config, layout: Layout) -> dict[str, Any]:
    width, _, patch, _ = layout[_SIGN].shape
    return {
        **shipped,
        "hidden_size": width,
        "patch_size": patch,
        "num_attention_heads": width // HEAD_DIM,
        "num_hidden_layers": depth(layout, "encoder.layers."),
        "intermediate_size": layout["encoder.layers.0.mlp.fc1.weight"].shape[0],
    }


def prepared(pixels_B3HW: Tensor, side: int = SIDE) -> Tensor:
    """Pixels in [-1, 1] as CLIP sees them: the shorter side made `side`, the middle square of it, normalised.

    As transformers' CLIPImageProcessor with Pillow: bicubic on 8-bit values.
    """
    return through_pillow(pixels_B3HW, side, partial(_prepared, square_side=side))


def _prepared(picture: Image.Image, square_side: int) -> Tensor:
    short = min(picture.size)
    width, height = (side * square_side // short for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - square_side) // 2, (height - square_side) // 2
    square = (
        np.asarray(picture.crop((left, top, left + square_side, top + square_side)), dtype=np.float32) / 255
    )
    normal = (torch.from_numpy(square) - torch.tensor(_MEAN)) / torch.tensor(_DEVIATION)
    return normal.permute(2, 0, 1)


@torch.no_grad()
def hidden_states(encoder: Any, pixels_B3HW: Tensor) -> Tensor:
    """The next-to-last hidden states (B, 257, 1280) of pictures in [-1, 1]."""
    seen = prepared(pixels_B3HW).to(encoder.device, encoder.dtype)
    states_BSD: Tensor = encoder(pixel_values=seen, output_hidden_states=True).hidden_states[-2]
    return states_BSD
