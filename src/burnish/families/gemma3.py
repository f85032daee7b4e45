"""Gemma 3 by Google (arXiv 2503.19786) as a text encoder: the language model without its eyes, all hidden states read.

Shape letters: B batch, S tokens, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import Gemma3TextConfig, Gemma3TextModel

from burnish.families import gemma
from burnish.families.native import refuse_scaled
from burnish.families.slots import Slot
from burnish.families.text_slots import language_model_slot, settings_of
from burnish.families.weights import Layout, below

# Where releases keep the language model: two spellings of the model with eyes, and the one without.
_STEMS = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_LAST = "norm.weight"
_SIGNS = ("layers.0.self_attn.q_norm.weight", "layers.0.pre_feedforward_layernorm.weight")


def gemma3_slot(folder: str = "text_encoder", tokenizer: str = "tokenizer") -> Slot:
    """Gemma 3 without its head and its vision tower; its folder's config can be that of the whole model."""

    def config(**settings: Any) -> Gemma3TextConfig:
        return Gemma3TextConfig(**settings_of(settings.get("text_config", settings)))

    made = language_model_slot(
        folder,
        tokenizer,
        config=config,
        model=Gemma3TextModel,
        signs=_SIGNS,
        tidy=transformers_names,
        unused=(
            "lm_head.*",
            "*rotary_emb*inv_freq",
            "*vision_tower.*",
            "*multi_modal_projector.*",
            gemma.TOKENIZER,
        ),
        file_hint="gemma_3_12B_it.safetensors",
    )
    return replace(made, find=find_gemma3, tokenizer_in_file=gemma.tokenizer_in_file)


def find_gemma3(layout: Layout) -> Layout | None:
    """The language model inside a file, as Gemma3TextModel names it; None if there is none."""
    for stem in (*_STEMS, ""):
        if all(stem + sign in layout for sign in _SIGNS):
            return transformers_names(layout)
    return None


def transformers_names(layout: Layout) -> Layout:
    """Names as Gemma3TextModel has them.

    Raises:
        ModelError: 8-bit weights with scales beside them.
    """
    refuse_scaled(layout)
    return next((below(layout, stem) for stem in _STEMS if stem + _LAST in layout), layout)
