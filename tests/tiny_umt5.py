"""UMT5 as a tiny text encoder: a position bias in every layer, gated feed-forward, T5's kind of tokenizer."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel


def umt5(tokenizer: PreTrainedTokenizerBase, width: int = 32) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            tie_word_embeddings=False,
        )
    )
