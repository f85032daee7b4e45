"""Mistral 3 as a text encoder: the language model alone, without the eyes that it was released with.

The chat template is applied by the tokenizer; the processor around it is for pictures and not needed.

Shape letters: B batch, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Mistral3Config, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from burnish.families import tekken
from burnish.families.native import depth, refuse_scaled
from burnish.families.slots import Config, Slot
from burnish.families.text_slots import settings_of, tokenizer_in
from burnish.families.weights import Layout, below

# Before the language model's names: as transformers saved it in its version 4 and since 5, and ComfyUI.
_PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "model.", "")
_IN_FILES = ("", "text_encoders.mistral3_24b.transformer.")
_SIGN = "layers.0.self_attn.q_proj.weight"
_QWEN = "layers.0.self_attn.q_norm.weight"  # of Qwen3, which has the same names otherwise
UNUSED = ("*rotary_emb.inv_freq",)


def mistral_slot(folder: str, tokenizer: str) -> Slot:
    """Mistral 3 of any size; the module is transformers' `MistralModel`, or that of Ministral 3."""

    def find(layout: Layout) -> Layout | None:
        for outer in _IN_FILES:
            inside = below(layout, outer)
            if any(p + _SIGN in inside and p + _QWEN not in inside for p in _PREFIXES):
                return _language_model(inside)
        return None

    return Slot(
        folder=folder,
        part="text_encoders",
        make=_make,
        find=find,
        config_of=_config_from_shapes,
        tidy=_language_model,
        tokenizer=tokenizer,
        load_tokenizer=tokenizer_in,
        tokenizer_in_file=tekken.tokenizer_in_file,
        unused=UNUSED,
        file_hint="mistral_3_small_flux2_bf16.safetensors",
    )


def _language_model(layout: Layout) -> Layout:
    """The language model under its own names, without eyes and without the head that writes words."""
    refuse_scaled(layout)
    prefix = next((p for p in _PREFIXES if p + _SIGN in layout), "")
    inside = below(layout, prefix)
    return {k: piece for k, piece in inside.items() if k.startswith(("layers.", "embed_tokens.", "norm."))}


def _make(config: Mapping[str, Any]) -> nn.Module:
    text = Mistral3Config(**settings_of(config)).text_config
    model: nn.Module = MODEL_MAPPING[type(text)](text)
    return model


def _config_from_shapes(shipped: Config, layout: Layout) -> dict[str, Any]:
    """The shipped config with the widths, heads and depth of `layout`; heads are as wide as released."""
    text: Mapping[str, Any] = shipped["text_config"]
    vocabulary, width = layout["embed_tokens.weight"].shape
    return {
        **shipped,
        "text_config": {
            **text,
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_attention_heads": layout[_SIGN].shape[0] // text["head_dim"],
            "num_key_value_heads": layout["layers.0.self_attn.k_proj.weight"].shape[0] // text["head_dim"],
            "intermediate_size": layout["layers.0.mlp.gate_proj.weight"].shape[0],
            "num_hidden_layers": depth(layout, "layers."),
        },
    }


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], system: str, length: int
) -> tuple[Tensor, Tensor]:
    """Token numbers and mask (B, S) with S = `length` of each prompt as a user's message after `system`.

    A prompt cannot name a picture: the mark that stands for one is taken out, as in FLUX.2's own code.
    """
    encoded = tokenizer.apply_chat_template(
        [conversation(prompt, system) for prompt in prompts],
        add_generation_prompt=False,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=length,
    )
    return encoded["input_ids"], encoded["attention_mask"]


def conversation(prompt: str, system: str) -> list[dict[str, Any]]:
    """The messages of which a chat template makes a text."""
    return [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {"role": "user", "content": [{"type": "text", "text": prompt.replace("[IMG]", "")}]},
    ]


def stacked_states(encoder: nn.Module, ids_BS: Tensor, mask_BS: Tensor, layers: Sequence[int]) -> Tensor:
    """The hidden states after `layers` (0: the embedding) side by side, (B, S, len(layers) * D)."""
    answer: Any = encoder(
        input_ids=ids_BS, attention_mask=mask_BS, output_hidden_states=True, use_cache=False
    )
    states_BSD: Tensor = torch.cat([answer.hidden_states[layer] for layer in layers], dim=-1)
    return states_BSD
