"""Llama for tiny pipelines: pieces with bytes to fall back on; 32 heads of queries, 8 of keys and values."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tiny_pipelines import CORPUS
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlamaTokenizerFast,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

SPECIAL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
WORDS = ("Describe the video by detailing the following aspects: system user assistant",)


def llama_tokenizer(
    padding_side: str = "right", words: Sequence[str] = WORDS, marks: Sequence[str] = SPECIAL
) -> LlamaTokenizerFast:
    """Llama's BPE over pieces that carry their leading blank, with the marks of its chat template.

    Args:
        words: what it knows besides `CORPUS`.
        marks: tokens of the template.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokenizer.train_from_iterator([*CORPUS, *words], trainers.BpeTrainer(vocab_size=900, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    found = LlamaTokenizerFast(
        vocab={piece: number for number, piece in enumerate(dict.fromkeys(pieces))},
        merges=[tuple(merge) for merge in model["merges"]],
        pad_token="<pad>",
        add_bos_token=True,
        model_max_length=2048,
        padding_side=padding_side,
    )
    found.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return found


def llama_config(tokenizer: LlamaTokenizerFast, layers: int = 4, width: int = 64) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=layers,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=2048,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
    )


def llama(tokenizer: LlamaTokenizerFast, layers: int = 4, width: int = 64) -> LlamaModel:
    """As in HunyuanVideo."""
    return LlamaModel(llama_config(tokenizer, layers, width))


def llama_lm(tokenizer: LlamaTokenizerFast, layers: int = 4, width: int = 64) -> LlamaForCausalLM:
    """As in HiDream, which calls the whole language model."""
    return LlamaForCausalLM(llama_config(tokenizer, layers, width))


def llava(tokenizer: LlamaTokenizerFast, layers: int = 4, width: int = 64) -> LlavaForConditionalGeneration:
    """As in HunyuanVideo's image to video: with CLIP's eyes of 24 x 24 patches."""
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=llama_config(tokenizer, layers, width),
            vision_config=CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=336,
                patch_size=14,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
        )
    )
