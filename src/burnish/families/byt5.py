"""ByT5 (arXiv 2105.13626), a T5 that reads bytes, for what is to be written letter by letter."""

from __future__ import annotations

import torch
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from burnish.families import t5
from burnish.families.slots import Slot
from burnish.families.text_slots import settings_of, tokenizer_in
from burnish.families.weights import Layout


def _find_byt5(layout: Layout) -> Layout | None:
    """A T5 of bytes is known by its few pieces."""
    found = t5.layout_in(layout)
    embedding = (found or {}).get("shared.weight") or (found or {}).get("encoder.embed_tokens.weight")
    if found is None or embedding is None or embedding.shape[0] >= t5.VOCABULARY // 2:
        return None
    return {**found, "shared.weight": embedding}


def byt5_slot(file_hint: str) -> Slot:
    """The second text encoder; `file_hint` is what messages call its separate file."""
    return Slot(
        "text_encoder_2",
        "text_encoders",
        lambda config: T5EncoderModel(T5Config(**settings_of(config))),
        _find_byt5,
        lambda shipped, layout: {**shipped, "vocab_size": layout["shared.weight"].shape[0]},
        tokenizer="tokenizer_2",
        load_tokenizer=tokenizer_in,
        ship_tokenizer=ByT5Tokenizer,
        unused=t5.UNUSED,
        keep_float32=lambda dtype: ("*.wo.weight",) if dtype == torch.float16 else (),  # overflows
        file_hint=file_hint,
    )
