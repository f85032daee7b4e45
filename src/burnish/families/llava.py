"""LLaVA (arXiv 2304.08485) as a text encoder: Llama that is shown a picture as CLIP sees it.

The picture's patches stand in the prompt in place of one mark. Only hidden states are wanted, so the module is the
model without its language head. Models of text alone keep the same Llama by itself; which one a folder holds follows
from its config.

Shape letters: B batch, S tokens, D width, H W height and width in pixels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaModel

from burnish.families import clip_vision
from burnish.families.llama import llama_slot
from burnish.families.slots import Slot
from burnish.families.text_slots import settings_of
from burnish.families.weights import Layout

SIDE = 336  # of the square that CLIP sees
PATCHES = 576
_SIGN = "multi_modal_projector.linear_1.weight"
# Spellings of releases -> the installed library's, the longer ones first.
_RESPELLED = (
    ("model.language_model.", "language_model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("language_model.model.", "language_model."),
    ("vision_tower.vision_model.", "vision_tower."),
)


def llava_or_llama_slot(folder: str, tokenizer: str) -> Slot:
    """Llama, with eyes where the config in the folder has them; a single file holds Llama alone."""
    llama = llama_slot(folder, tokenizer)

    def make(config: dict[str, Any]) -> nn.Module:
        if "vision_config" not in config:
            return llama.make(config)
        model: nn.Module = LlavaModel(LlavaConfig(**settings_of(config)))
        return model

    return replace(
        llama,
        make=make,
        tidy=lambda layout: (
            _in_library_names(layout) if any(name.endswith(_SIGN) for name in layout) else llama.tidy(layout)
        ),
        unused=(*llama.unused, "language_model.lm_head.*", "*position_ids"),
    )


def _in_library_names(layout: Layout) -> Layout:
    renamed: Layout = {}
    for name, piece in layout.items():
        for theirs, ours in _RESPELLED:
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        renamed[name] = piece
    return renamed


def hidden_states(
    encoder: Any, ids_BS: Tensor, mask_BS: Tensor, pixels_B3HW: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Every hidden state (B, S + 575, D) of prompts with one mark each, and the mask of what is no padding.

    Args:
        ids_BS: with `image_token_index` at the same place in each row; padding stands on the right.
        pixels_B3HW: pictures in [-1, 1].
    """
    mark = int(encoder.config.image_token_index)
    places = (ids_BS == mark).nonzero()
    place = int(places[0, 1])
    if len(places) != len(ids_BS) or not bool((places[:, 1] == place).all()):
        raise ValueError(
            f"each prompt takes one mark of a picture at the same place; found {places.tolist()}"
        )
    marks = ids_BS.new_full((len(ids_BS), PATCHES), mark)
    ids = torch.cat([ids_BS[:, :place], marks, ids_BS[:, place + 1 :]], dim=1)
    seen = mask_BS.new_ones(len(ids_BS), PATCHES)
    mask = torch.cat([mask_BS[:, :place], seen, mask_BS[:, place + 1 :]], dim=1)
    pixels = clip_vision.prepared(pixels_B3HW, SIDE).to(encoder.device, encoder.dtype)
    states: tuple[Tensor, ...] = encoder(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, output_hidden_states=True
    ).hidden_states
    return states, mask
