"""UMT5 as a tiny text encoder: a position bias in every layer, gated feed-forward, T5's kind of tokenizer."""

from __future__ import annotations

from tiny_pipelines import t5_settings
from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel


def umt5(tokenizer: PreTrainedTokenizerBase, width: int = 32) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**t5_settings(tokenizer, width)))
