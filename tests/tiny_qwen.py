"""Qwen2.5-VL and Qwen3 of a few hundred kilobytes, with Qwen's kind of tokenizer trained on a corpus of sentences."""

from __future__ import annotations

import json
from typing import Any

import torch
from tiny_pipelines import CORPUS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    BatchFeature,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from burnish.families.qwen import CHAT_OF_QWEN3, CHAT_OF_QWEN25, END_OF_TEXT, add_chat_tokens

INSTRUCTIONS = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background: system user assistant Describe the key features of the input image Picture 1: Picture 2:",
) * 4
MROPE = [16, 24, 24]  # as released: half a head's width, by time, height and width


def qwen_tokenizer(*, qwen3: bool = False) -> Qwen2Tokenizer:
    """A byte-level BPE with the tokens and the chat template of the release, those of Qwen3 if so."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, *INSTRUCTIONS], trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    made = Qwen2Tokenizer(
        vocab={**model["vocab"], END_OF_TEXT: len(model["vocab"])},
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token=None,
        model_max_length=4096,
        chat_template=CHAT_OF_QWEN3 if qwen3 else CHAT_OF_QWEN25,
    )
    add_chat_tokens(made, qwen3=qwen3)
    return made


def qwen25_vl(
    tokenizer: Qwen2Tokenizer, width: int = 256, layers: int = 2
) -> Qwen2_5_VLForConditionalGeneration:
    """Heads as wide as released (128, and 80 in the eyes), two queries per key; full attention in every eighth layer.

    Made under `drawn`, which also randomises what a release initialises to zero.
    """
    number = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": width,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "max_window_layers": layers,
            "num_attention_heads": width // 128,
            "num_key_value_heads": max(width // 256, 1),
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_section": MROPE, "rope_type": "default", "type": "default"},
            "rope_theta": 1_000_000.0,
            "bos_token_id": None,
            "eos_token_id": number("<|im_end|>"),
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 8,
            "hidden_size": 160,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "fullatt_block_indexes": [7],
            "window_size": 112,
            "tokens_per_second": 2,
        },
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_config(tokenizer: Qwen2Tokenizer, width: int = 32, layers: int = 3) -> Qwen3Config:
    """Two heads of 32 that share one key, so that together they are wider than the model, as released."""
    return Qwen3Config(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        max_window_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        rope_theta=1_000_000,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def qwen3(tokenizer: Qwen2Tokenizer, width: int = 32, layers: int = 3) -> Qwen3Model:
    return Qwen3Model(qwen3_config(tokenizer, width, layers))


def qwen3_lm(tokenizer: Qwen2Tokenizer, width: int = 32, layers: int = 3) -> Qwen3ForCausalLM:
    """With the head that writes words, as some pipelines name it."""
    return Qwen3ForCausalLM(qwen3_config(tokenizer, width, layers))


class Processor:
    """What `Qwen2_5_VLProcessor` gives for pictures and text, with transformers' own processor of pictures on Pillow.

    The processor itself needs torchvision for its videos.
    """

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        self.tokenizer = tokenizer
        # As released with Qwen-Image-Edit.
        self.pictures = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12_845_056)

    def __call__(
        self, text: list[str], images: Any, padding: bool = True, return_tensors: str = "pt"
    ) -> BatchFeature:
        seen = self.pictures(images=images, return_tensors=return_tensors)
        counts = (seen["image_grid_thw"].prod(-1) // 4).tolist()
        texts = []
        for one in text:
            parts = one.split("<|image_pad|>")
            tokens = ["<|image_pad|>" * count for count in counts]
            texts.append("".join(a + b for a, b in zip(parts, [*tokens, ""], strict=True)))
        return BatchFeature({**self.tokenizer(texts, padding=padding, return_tensors=return_tensors), **seen})


def tell_kinds_of_tokens(encoder: Qwen2_5_VLForConditionalGeneration) -> None:
    """Make an encoder see for itself which tokens are pictures.

    Processors of transformers 5 say it, and diffusers 0.42 does not pass it on, by which pictures would be counted as
    words (https://github.com/huggingface/diffusers/issues/14194).
    """
    forward = encoder.forward

    def with_kinds(input_ids: Tensor, **options: Any) -> Any:
        kinds = (input_ids == encoder.config.image_token_id).int()
        return forward(input_ids=input_ids, mm_token_type_ids=kinds, **options)

    encoder.forward = with_kinds


def qwen3_vl_config(tokenizer: Qwen2Tokenizer, width: int, layers: int) -> Qwen3VLConfig:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {
            "rope_theta": 5e6,
            "rope_type": "default",
            "mrope_interleaved": True,
            "mrope_section": [4, 2, 2],
        },
        "pad_token_id": tokenizer.pad_token_id,
    }
    eyes = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    number = tokenizer.convert_tokens_to_ids
    return Qwen3VLConfig(
        text_config=text,
        vision_config=eyes,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )


def qwen3_vl(tokenizer: Qwen2Tokenizer, width: int = 32, layers: int = 36) -> Qwen3VLModel:
    """As deep as the released one, which denoisers read at many depths, with the smallest eyes."""
    return Qwen3VLModel(qwen3_vl_config(tokenizer, width, layers))


def qwen3_vl_lm(
    tokenizer: Qwen2Tokenizer, width: int = 32, layers: int = 3
) -> Qwen3VLForConditionalGeneration:
    """With the head that writes words, as some pipelines hold it, and a last norm that is no mere scaling."""
    made = Qwen3VLForConditionalGeneration(qwen3_vl_config(tokenizer, width, layers))
    torch.nn.init.uniform_(made.model.language_model.norm.weight, 0.2, 2.0)
    return made


class Qwen3VLProcessorWithoutVideos(Qwen3VLProcessor):
    """The released processor but for its part for videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "video_processor"]


# The folder of a pipeline says what the released one says.
Qwen3VLProcessorWithoutVideos.__name__ = Qwen3VLProcessor.__name__
Qwen3VLProcessorWithoutVideos.__module__ = Qwen3VLProcessor.__module__
# What the released chat template makes of a turn whose content is a list of texts.
TURN_OF_TEXTS = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- for part in message.content %}{{- part.text }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
)


def qwen3_vl_processor(
    tokenizer: Qwen2Tokenizer, *, fewest_pixels: int = 65_536
) -> Qwen3VLProcessorWithoutVideos:
    pictures = Qwen2VLImageProcessorPil(
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        min_pixels=fewest_pixels,
        max_pixels=16_777_216,
    )
    return Qwen3VLProcessorWithoutVideos(
        image_processor=pictures, tokenizer=tokenizer, chat_template=TURN_OF_TEXTS
    )
