"""Llama (arXiv 2407.21783) as a text encoder: HunyuanVideo reads one hidden state of it, HiDream all of them.

Only hidden states are wanted, so the module is the model without its language head whichever class the release names;
templates and the choice of layers stay with the family. Files are those of transformers, with or without `model.`
before the names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import LlamaConfig, LlamaModel

from burnish.families.native import depth, refuse_scaled
from burnish.families.slots import Config, Slot
from burnish.families.text_slots import language_model_slot
from burnish.families.weights import Layout, below

_STEM = "model."
_LAYER = "layers.0.self_attn.q_proj.weight"


def llama_slot(
    folder: str,
    tokenizer: str,
    *,
    prefixes: Sequence[str] = ("text_encoders.llama.transformer.", "text_encoders.llama3_8b.transformer."),
    file_hint: str = "llava_llama3_fp16.safetensors",
) -> Slot:
    """The Llama text encoder of a pipeline; a call gives `hidden_states` of which the last is normalised."""
    made = language_model_slot(
        folder,
        tokenizer,
        config=LlamaConfig,
        model=LlamaModel,
        signs=(_STEM + _LAYER, f"{_STEM}embed_tokens.weight"),
        tidy=transformers_names,
        prefixes=prefixes,
        config_of=config_from_shapes,
        file_hint=file_hint,
    )

    def find(layout: Layout) -> Layout | None:
        found = made.find(layout)
        return layout if found is None and _is_llama(layout) else found

    return replace(made, find=find)


def _is_llama(layout: Layout) -> bool:
    """Whether these are LlamaModel's own names: Qwen has biases or norms of queries besides, Gemma more norms."""
    layer = "layers.0."
    others = ("self_attn.q_proj.bias", "self_attn.q_norm.weight", "pre_feedforward_layernorm.weight")
    return {_LAYER, "embed_tokens.weight"} <= set(layout) and not any(layer + o in layout for o in others)


def transformers_names(layout: Layout) -> Layout:
    """Names of LlamaModel out of those of LlamaForCausalLM; its own stay as they are.

    Raises:
        ModelError: 8-bit weights with scales beside them.
    """
    refuse_scaled(layout)
    if _STEM + _LAYER not in layout:
        return layout
    return below(layout, _STEM)


def config_from_shapes(shipped: Config, layout: Layout) -> dict[str, Any]:
    """The shipped config with the vocabulary, widths and depth of `layout`; the number of heads is the released one."""
    vocabulary, width = layout["embed_tokens.weight"].shape
    head_width = layout[_LAYER].shape[0] // int(shipped["num_attention_heads"])
    return {
        **shipped,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "head_dim": head_width,
        "num_key_value_heads": layout["layers.0.self_attn.k_proj.weight"].shape[0] // head_width,
        "num_hidden_layers": depth(layout, "layers."),
        "intermediate_size": layout["layers.0.mlp.gate_proj.weight"].shape[0],
    }
