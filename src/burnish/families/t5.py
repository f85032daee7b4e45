"""The T5 v1.1 text encoder (arXiv 1910.10683): its tokenizer, its names in files, its config from shapes.

Shape letters: B batch, S tokens, D width.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from burnish.errors import ModelError
from burnish.families.sources import read_json, weight_files
from burnish.families.token_words import written_out
from burnish.families.weights import Layout, below, layout_of, load_module

VOCABULARY = 32_128  # rows of the released embedding; the tokenizer knows 32,100 of them
_SIGN = "encoder.block.0.layer.0.SelfAttention.q.weight"
_PREFIXES = ("", "text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "transformer.")
UNUSED = ("decoder.*", "lm_head.*", "logit_scale", "spiece_model")


def shipped_tokenizer(max_length: int = 512) -> PreTrainedTokenizerBase:
    """T5's own tokenizer of 32,100 pieces: normalizes, splits by a unigram model, ends with `</s>`."""
    packed = files("burnish.families").joinpath("tokenizers", "t5.json.gz").read_bytes()
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(gzip.decompress(packed).decode("utf-8")),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )


def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a diffusers folder, such as `tokenizer_2`.

    Raises:
        ModelError: the folder is missing.
    """
    if not folder.is_dir():
        raise ModelError(f"The model lacks {folder}.", remedy="Fetch the model again.")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int) -> Tensor:
    """Token numbers (B, S) with S = `length`: the caption, cut where it is too long, its end, padding."""
    texts = [written_out(tokenizer, prompt) for prompt in prompts]
    encoded = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


def layout_in(layout: Layout) -> Layout | None:
    """The part of a file that is a T5 encoder, under transformers' names; None if there is none."""
    for prefix in _PREFIXES:
        if prefix + _SIGN in layout:
            return below(layout, prefix)
    return None


def load_from_folder(folder: Path, *, dtype: torch.dtype, device: torch.device | str) -> T5EncoderModel:
    """A text encoder of a diffusers folder, such as `text_encoder_2`."""
    return _load(read_json(folder / "config.json"), layout_of(weight_files(folder)), dtype, device)


def load_from_layout(
    layout: Layout, shipped: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device | str
) -> T5EncoderModel:
    """A text encoder of a single file (names of `layout_in`); widths and depth follow the weights.

    Raises:
        ModelError: tensors are missing, or it wants another tokenizer than T5's.
    """
    return _load(config_from_shapes(shipped, layout), layout, dtype, device)


def config_from_shapes(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The shipped config with the widths, heads and depth of `layout`."""
    try:
        embedding = layout.get("shared.weight") or layout["encoder.embed_tokens.weight"]
        inner_width = layout[_SIGN].shape[0]
        heads = layout["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape[1]
        buckets = layout["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape[0]
        feed_forward = layout["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0]
    except KeyError as error:
        raise ModelError(
            f"The T5 text encoder lacks {error}.", remedy="Use the encoder of T5 v1.1, such as t5xxl_fp16."
        ) from error
    vocabulary, width = embedding.shape
    if vocabulary not in (VOCABULARY, 32_100):
        raise ModelError(
            f"The T5 text encoder knows {vocabulary:,} pieces, T5's tokenizer {VOCABULARY:,}.",
            remedy="Use the diffusers folder of this model: it holds the tokenizer that belongs to it.",
        )
    depth = 1 + max(int(name.split(".")[2]) for name in layout if name.startswith("encoder.block."))
    return {
        **shipped,
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner_width // heads,
        "d_ff": feed_forward,
        "num_layers": depth,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def _load(
    config: Mapping[str, Any], layout: Layout, dtype: torch.dtype, device: torch.device | str
) -> T5EncoderModel:
    # Some files hold the embedding under its second name only, which transformers ties to the first.
    if "shared.weight" not in layout and "encoder.embed_tokens.weight" in layout:
        layout = {**layout, "shared.weight": layout["encoder.embed_tokens.weight"]}
    settings = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    return load_module(
        lambda: T5EncoderModel(T5Config(**settings)),
        layout,
        dtype=dtype,
        device=device,
        what="T5 text encoder",
        unused=UNUSED,
        # transformers does the same: this projection overflows in float16.
        keep_float32=("*.wo.weight",) if dtype == torch.float16 else (),
    )
