"""The UMT5 text encoder (arXiv 2304.09151): its slot, its tokenizer, its names in files.

T5 v1.1 with a relative position bias in every layer. Wan reads google/umt5-xxl, AuraFlow a smaller one with Llama's
tokenizer. Files name it as transformers does (ComfyUI's umt5_xxl), or as the release of Wan does (`blocks.0.attn.q`).

Shape letters: B batch, S tokens, D width.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from burnish.errors import ModelError
from burnish.families import t5
from burnish.families.native import NativeNames, depth, refuse_scaled
from burnish.families.slots import Config, Slot
from burnish.families.text_slots import settings_of
from burnish.families.weights import Layout, below

VOCABULARY = 256_384  # rows of umt5-xxl's embedding; its tokenizer knows 256,300 pieces
_SIGN = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"  # T5 has it in block 0 alone
_BLOCK, _OURS = "blocks.#", "encoder.block.#"
NAMES = NativeNames(
    table={
        "token_embedding": "shared",
        "norm": "encoder.final_layer_norm",
        f"{_BLOCK}.norm1": f"{_OURS}.layer.0.layer_norm",
        f"{_BLOCK}.norm2": f"{_OURS}.layer.1.layer_norm",
        **{f"{_BLOCK}.attn.{x}": f"{_OURS}.layer.0.SelfAttention.{x}" for x in "qkvo"},
        f"{_BLOCK}.pos_embedding.embedding": f"{_OURS}.layer.0.SelfAttention.relative_attention_bias",
        f"{_BLOCK}.ffn.gate.0": f"{_OURS}.layer.1.DenseReluDense.wi_0",
        f"{_BLOCK}.ffn.fc1": f"{_OURS}.layer.1.DenseReluDense.wi_1",
        f"{_BLOCK}.ffn.fc2": f"{_OURS}.layer.1.DenseReluDense.wo",
    },
    signs=("token_embedding.weight", "blocks.1.pos_embedding.embedding.weight", "blocks.0.ffn.gate.0.weight"),
)


def shipped_tokenizer() -> PreTrainedTokenizerBase:
    """umt5-xxl's own tokenizer of 256,300 pieces: a unigram model over words, ends with `</s>`."""
    packed = files("burnish.families").joinpath("tokenizers", "umt5.json.gz").read_bytes()
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(gzip.decompress(packed).decode("utf-8")),
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def umt5_slot(
    folder: str,
    tokenizer: str,
    *,
    prefixes: tuple[str, ...] = ("text_encoders.umt5xxl.transformer.", "umt5xxl.transformer."),
    vocabulary: int = VOCABULARY,
    ship_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = shipped_tokenizer,
    file_hint: str = "umt5_xxl_fp16.safetensors",
) -> Slot:
    """UMT5 as a slot; with the defaults umt5-xxl, which Wan and others read.

    Args:
        prefixes: before the names in all-in-one files, besides none.
        vocabulary: rows of the embedding that belong to the shipped tokenizer.
    """

    def find(layout: Layout) -> Layout | None:
        return _tidied(layout, prefixes)

    return Slot(
        folder=folder,
        part="text_encoders",
        make=lambda config: UMT5EncoderModel(UMT5Config(**settings_of(config))),
        find=find,
        config_of=partial(_config_from_shapes, vocabulary=vocabulary),
        tokenizer=tokenizer,
        load_tokenizer=t5.tokenizer_in,
        ship_tokenizer=ship_tokenizer,
        tidy=_with_embedding,
        unused=(*t5.UNUSED, "encoder.embed_tokens.weight"),
        # transformers does the same: this projection overflows in float16.
        keep_float32=lambda dtype: ("*.wo.weight",) if dtype == torch.float16 else (),
        file_hint=file_hint,
    )


def _tidied(layout: Layout, prefixes: tuple[str, ...]) -> Layout | None:
    for prefix in ("", *prefixes):
        inside = below(layout, prefix)
        if NAMES.prefix(inside) == "":
            return NAMES.layout(inside)
        if _SIGN in inside:
            refuse_scaled(inside)
            return _with_embedding(inside)
    return None


def _with_embedding(layout: Layout) -> Layout:
    # Some files hold the embedding under its second name only, which transformers ties to the first.
    if "shared.weight" not in layout and "encoder.embed_tokens.weight" in layout:
        return {**layout, "shared.weight": layout["encoder.embed_tokens.weight"]}
    return layout


def _config_from_shapes(shipped: Config, layout: Layout, *, vocabulary: int) -> dict[str, Any]:
    """The shipped config with the widths, heads and depth of `layout`.

    Raises:
        ModelError: it wants another tokenizer.
    """
    attention = "encoder.block.0.layer.0.SelfAttention"
    known, width = layout["shared.weight"].shape
    if known != vocabulary:
        raise ModelError(
            f"The UMT5 text encoder knows {known:,} pieces, its tokenizer {vocabulary:,}.",
            remedy="Use the diffusers folder of this model: it holds the tokenizer that belongs to it.",
        )
    buckets, heads = layout[f"{attention}.relative_attention_bias.weight"].shape
    return {
        **shipped,
        "vocab_size": known,
        "d_model": width,
        "d_kv": layout[f"{attention}.q.weight"].shape[0] // heads,
        "d_ff": layout["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "num_layers": depth(layout, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }
