"""Gemma 2 by Google (arXiv 2408.00118) as a text encoder: its slot, its names in files, its tokens.

The denoisers read hidden states of a causal model, so tokens behind a prompt's end change none before it: padding
stands on the right, although Gemma's own tokenizer pads on the left, and is dropped by a mask.

Shape letters: B batch, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from safetensors import safe_open
from tokenizers import AddedToken, processors
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer, PreTrainedTokenizerBase

from burnish.families.native import depth, refuse_scaled
from burnish.families.sentencepiece import Kind, merges_of, pieces_of
from burnish.families.slots import Config, Slot
from burnish.families.text_slots import language_model_slot
from burnish.families.token_words import written_out
from burnish.families.weights import Layout, below

# As ComfyUI saves it, with the name of the module before it or not.
_PREFIXES = ("model.", "text_encoders.gemma2_2b.transformer.model.", "gemma2_2b.transformer.model.")
_SIGN = "layers.0.pre_feedforward_layernorm.weight"  # Llama and Qwen have two norms in a block, not four
TOKENIZER = "spiece_model"


def slot(folder: str = "text_encoder", tokenizer: str = "tokenizer") -> Slot:
    """Gemma 2 without its head."""
    made = language_model_slot(
        folder,
        tokenizer,
        config=Gemma2Config,
        model=Gemma2Model,
        signs=(_SIGN,),
        tidy=without_model,
        prefixes=_PREFIXES,
        config_of=config_from_shapes,
        unused=("lm_head.*", "*rotary_emb.inv_freq", "logit_scale", TOKENIZER),
        file_hint="gemma_2_2b_fp16.safetensors",
    )
    return replace(made, tokenizer_in_file=tokenizer_in_file)


def without_model(layout: Layout) -> Layout:
    """Names as Gemma2Model has them: releases of the whole language model put `model.` in front.

    Raises:
        ModelError: 8-bit weights with scales beside them.
    """
    refuse_scaled(layout)
    return below(layout, "model.") or layout


def tokenizer_in_file(layout: Layout) -> PreTrainedTokenizerBase | None:
    """Gemma's tokenizer out of a file of ComfyUI, which holds a SentencePiece model; None if it holds none."""
    held = [piece for name, piece in layout.items() if name.rpartition(".")[2] == TOKENIZER]
    if not held:
        return None
    with safe_open(held[0].file, framework="pt") as file:
        return tokenizer_of(bytes(file.get_tensor(held[0].name).numpy()))


def tokenizer_of(model: bytes) -> GemmaTokenizer:
    """The tokenizer of a SentencePiece model of Gemma's kind: BPE with bytes to fall back on, a begin mark.

    Raises:
        ModelError: the bytes are no such model.
    """
    pieces = pieces_of(model)
    made = GemmaTokenizer(
        vocab={piece.text: number for number, piece in enumerate(pieces)}, merges=merges_of(pieces)
    )
    # Control marks stand in the text as they are written, words of the user's also where blanks make them up.
    made.add_tokens(
        [
            AddedToken(piece.text, special=piece.kind == Kind.CONTROL, normalized=piece.kind != Kind.CONTROL)
            for piece in pieces
            if piece.kind in (Kind.CONTROL, Kind.USER_DEFINED)
        ]
    )
    begin = (made.bos_token, made.bos_token_id)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos>:0 $A:0", pair="<bos>:0 $A:0 <bos>:1 $B:1", special_tokens=[begin]
    )
    return made


def config_from_shapes(shipped: Config, layout: Layout) -> dict[str, Any]:
    """The shipped config with the widths, heads and depth of `layout`."""
    vocabulary, width = layout["embed_tokens.weight"].shape
    head_dim = int(shipped["head_dim"])
    return {
        **shipped,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": layout["layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": depth(layout, "layers."),
        "num_attention_heads": layout["layers.0.self_attn.q_proj.weight"].shape[0] // head_dim,
        "num_key_value_heads": layout["layers.0.self_attn.k_proj.weight"].shape[0] // head_dim,
    }


def token_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int
) -> tuple[Tensor, Tensor]:
    """Token numbers (B, S) with S = `length`, and where they are no padding (B, S): begin mark, the caption cut where
    it is too long, padding."""
    encoded = tokenizer(
        [written_out(tokenizer, prompt) for prompt in prompts],
        padding="max_length",
        max_length=length,
        truncation=True,
        padding_side="right",
        return_tensors="pt",
    )
    return encoded.input_ids, encoded.attention_mask.bool()


def count_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """Tokens of a prompt with its begin mark, uncut."""
    text = written_out(tokenizer, prompt)
    return len(tokenizer(text, truncation=False, verbose=False)["input_ids"])
