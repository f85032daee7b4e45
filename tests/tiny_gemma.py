"""A tiny Gemma 2 with Gemma's own tokenizer class, for the families that read its hidden states."""

from __future__ import annotations

import json
import string
import struct
from typing import Any

from tiny_pipelines import CORPUS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer, PreTrainedTokenizerBase

from burnish.families.sentencepiece import Kind

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's BPE with a word's space in front of it and a fall-back to bytes, trained on `CORPUS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    letters = [*string.printable.strip(), "\u2581"]
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)

    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    gemma = GemmaTokenizer(
        vocab={token: number for number, token in enumerate(dict.fromkeys(tokens))},
        merges=[tuple(merge) for merge in model["merges"]],
        model_max_length=8192,
    )
    # As in the released tokenizer.json: a text begins with its mark.
    begin = ("<bos>", gemma.bos_token_id)
    gemma.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos>:0 $A:0", pair="<bos>:0 $A:0 <bos>:1 $B:1", special_tokens=[begin]
    )
    return gemma


def sentencepiece_model(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Gemma's pieces as SentencePiece stores them: text, score (the sooner merged, the higher), kind."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merged = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(model["merges"])))}
    kinds = {"<unk>": Kind.UNKNOWN, **dict.fromkeys(("<pad>", "<eos>", "<bos>"), Kind.CONTROL)}
    message = b""
    for text in sorted(model["vocab"], key=model["vocab"].get):
        kind = Kind.BYTE if text.startswith("<0x") else kinds.get(text, Kind.NORMAL)
        name, score = text.encode(), struct.pack("<f", merged.get(text, -1e6))
        piece = b"\x0a" + bytes([len(name)]) + name + b"\x15" + score + b"\x18" + bytes([kind])
        message += b"\x0a" + bytes([len(piece)]) + piece
    return message


def gemma2(tokenizer: GemmaTokenizer, width: int = 32) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=64,
            max_position_embeddings=8192,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )
