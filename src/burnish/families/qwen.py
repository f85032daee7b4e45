"""Qwen's language models as text encoders: Qwen2.5-VL (arXiv 2502.13923), Qwen3 (arXiv 2505.09388) and Qwen3-VL.

They share one byte-level tokenizer. Of those with eyes only what is asked for is loaded: the language model, and the
eyes where the prompts see pictures; never the head that writes words. Hidden states are counted as transformers counts
them: 0 is the embedding, -1 comes after the last norm.

Shape letters: B batch, S tokens, D width.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.resources import files
from typing import Any

from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from burnish.families.clip import byte_letters
from burnish.families.native import depth, refuse_scaled
from burnish.families.slots import Config, Slot
from burnish.families.text_slots import language_model_slot
from burnish.families.weights import Layout, below

END_OF_TEXT = "<|endoftext|>"  # pads
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
# Read as one token each, but not left out when text is decoded.
PLAIN = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
PLAIN_OF_QWEN3 = ("<tool_response>", "</tool_response>", "<think>", "</think>")
CONTEXT = 131_072  # tokens
HEAD_DIM = 128  # of Qwen2.5-VL's language model, at 3B and at 7B
EYE_HEAD_DIM = 80

_TURN = "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
_DEFAULT_SYSTEM = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
)
_NO_THINKING = (
    "{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)


def _template(before: str = "", after: str = "") -> str:
    return (
        f"{before}{{%- for message in messages %}}{_TURN}{{%- endfor %}}"
        f"{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n' }}}}{after}{{%- endif %}}"
    )


# What the released templates come to for conversations of plain text without tools.
CHAT_OF_QWEN25 = _template(before=_DEFAULT_SYSTEM)
CHAT_OF_QWEN3 = _template(after=_NO_THINKING)


def shipped_tokenizer(*, qwen3: bool = False) -> Qwen2Tokenizer:
    """The tokenizer that every Qwen of the second and third generation has; Qwen3 adds four tokens.

    The vocabulary follows from the merges: each byte, each merge, then the tokens of the chat.
    """
    packed = files("burnish.families").joinpath("tokenizers", "qwen_merges.txt.gz").read_bytes()
    merges = [tuple(line.split(" ")) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    letters = [*byte_letters(), *("".join(pair) for pair in merges)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate([*letters, END_OF_TEXT])},
        merges=merges,
        unk_token=None,
        model_max_length=CONTEXT,
        chat_template=CHAT_OF_QWEN3 if qwen3 else CHAT_OF_QWEN25,
    )
    add_chat_tokens(tokenizer, qwen3=qwen3)
    return tokenizer


def add_chat_tokens(tokenizer: Qwen2Tokenizer, *, qwen3: bool) -> None:
    """Number the tokens of the chat after the vocabulary, in the order of the release."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.add_tokens([*PLAIN, *(PLAIN_OF_QWEN3 if qwen3 else ())])
    tokenizer.eos_token = "<|im_end|>"


def qwen25_vl_slot(
    folder: str = "text_encoder", tokenizer: str = "tokenizer", *, eyes: bool = False, optional: bool = False
) -> Slot:
    """Qwen2.5-VL of any size, by default for text alone.

    The module is transformers' `Qwen2_5_VLTextModel`, or with `eyes` its `Qwen2_5_VLModel`. Its shipped config is one
    with `text_config` and `vision_config`.
    """

    def tidy(layout: Layout) -> Layout:
        refuse_scaled(layout)
        named = {_name_in_vl(name): piece for name, piece in layout.items()}
        return named if eyes else below(named, "language_model.")

    def model(config: Qwen2_5_VLConfig) -> nn.Module:
        made: nn.Module = Qwen2_5_VLModel(config) if eyes else Qwen2_5_VLTextModel(config.text_config)
        return made

    return _slot(
        folder,
        tokenizer,
        # Qwen's own, transformers' of old, transformers' of today.
        signs=(
            ("visual.patch_embed.proj.weight", "model.layers.0.self_attn.q_proj.bias"),
            ("visual.patch_embed.proj.weight", "model.language_model.layers.0.self_attn.q_proj.bias"),
            ("model.visual.patch_embed.proj.weight", "model.language_model.layers.0.self_attn.q_proj.bias"),
        ),
        prefixes=("text_encoders.qwen25_7b.transformer.", "text_encoders.qwen25_3b.transformer."),
        config=Qwen2_5_VLConfig,
        model=model,
        tidy=tidy,
        config_of=_config_of_vl,
        ship_tokenizer=shipped_tokenizer,
        optional=optional,
        file_hint="qwen_2.5_vl_7b.safetensors",
    )


def qwen3_slot(
    folder: str = "text_encoder",
    tokenizer: str = "tokenizer",
    *,
    file_hint: str = "qwen_3_4b.safetensors",
    optional: bool = False,
) -> Slot:
    """Qwen3 of any size; the module is transformers' `Qwen3Model`."""
    return _slot(
        folder,
        tokenizer,
        signs=tuple(
            (f"{stem}layers.0.self_attn.q_norm.weight", f"{stem}layers.0.mlp.gate_proj.weight")
            for stem in ("model.", "")
        ),
        # Gemma3's
        absent=tuple(f"{stem}layers.0.pre_feedforward_layernorm.weight" for stem in ("model.", "")),
        prefixes=("text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_8b.transformer."),
        config=Qwen3Config,
        model=Qwen3Model,
        tidy=_names_of_qwen3,
        config_of=_config_of_qwen3,
        ship_tokenizer=lambda: shipped_tokenizer(qwen3=True),
        optional=optional,
        file_hint=file_hint,
    )


def qwen3_vl_slot(
    folder: str = "text_encoder",
    tokenizer: str = "tokenizer",
    *,
    eyes: bool = False,
    last_norm: bool = True,
    file_hint: str = "qwen3vl_4b.safetensors",
) -> Slot:
    """Qwen3-VL of any size, by default for text alone.

    The module is transformers' `Qwen3VLTextModel`, or with `eyes` its `Qwen3VLModel`. Its shipped config is one with
    `text_config`, with `eyes` with `vision_config` besides.

    Args:
        last_norm: without it the last states come as the last layer gives them.
    """

    def tidy(layout: Layout) -> Layout:
        refuse_scaled(layout)
        named = {_name_in_vl(name): piece for name, piece in layout.items()}
        return named if eyes else below(named, "language_model.")

    def model(config: Qwen3VLConfig) -> nn.Module:
        made: Any = Qwen3VLModel(config) if eyes else Qwen3VLTextModel(config.text_config)
        if not last_norm:
            (made.language_model if eyes else made).norm = nn.Identity()
        module: nn.Module = made
        return module

    sign, visual = "layers.0.self_attn.q_norm.weight", "visual.deepstack_merger_list.0.norm.weight"
    slot = _slot(
        folder,
        tokenizer,
        # With the head that writes words, Qwen's own, and without that head.
        signs=(
            (f"model.language_model.{sign}", f"model.{visual}"),
            (f"model.{sign}", visual),
            (f"language_model.{sign}", visual),
        ),
        prefixes=("text_encoders.qwen3vl_4b.transformer.", "text_encoders.qwen3vl_8b.transformer."),
        config=Qwen3VLConfig,
        model=model,
        tidy=tidy,
        config_of=_config_of_qwen3_vl,
        ship_tokenizer=lambda: shipped_tokenizer(qwen3=True),
        optional=False,
        file_hint=file_hint,
    )
    unused = () if last_norm else ("norm.weight", "language_model.norm.weight")
    return replace(slot, unused=(*slot.unused, *unused))


def _slot(
    folder: str,
    tokenizer: str,
    *,
    signs: tuple[tuple[str, ...], ...],
    prefixes: tuple[str, ...],
    config: Callable[..., Any],
    model: Callable[[Any], nn.Module],
    tidy: Callable[[Layout], Layout],
    config_of: Callable[[Config, Layout], dict[str, Any]],
    ship_tokenizer: Callable[[], PreTrainedTokenizerBase],
    optional: bool,
    file_hint: str,
    absent: tuple[str, ...] = (),
) -> Slot:
    """A language model's slot that knows several spellings of its names."""

    def find(layout: Layout) -> Layout | None:
        for prefix in ("", *prefixes):
            inside = below(layout, prefix)
            if any(all(name in inside for name in spelling) for spelling in signs) and not any(
                name in inside for name in absent
            ):
                return tidy(inside)
        return None

    slot = language_model_slot(
        folder,
        tokenizer,
        config=config,
        model=model,
        signs=signs[0],
        tidy=tidy,
        config_of=config_of,
        ship_tokenizer=ship_tokenizer,
        file_hint=file_hint,
    )
    return replace(slot, find=find, optional=optional)


def _name_in_vl(name: str) -> str:
    """A name of any release as `Qwen2_5_VLModel` spells it; the head's stays."""
    inner = name.removeprefix("model.")
    if inner.startswith(("visual.", "language_model.", "lm_head.")):
        return inner
    return f"language_model.{inner}"


def _names_of_qwen3(layout: Layout) -> Layout:
    refuse_scaled(layout)
    return {name.removeprefix("model."): piece for name, piece in layout.items()}


def _config_of_vl(shipped: Config, layout: Layout) -> dict[str, Any]:
    text = {**shipped["text_config"], **_sizes(below(layout, "language_model.") or layout, HEAD_DIM)}
    config: dict[str, Any] = {**shipped, "text_config": text}
    if "visual.patch_embed.proj.weight" in layout:
        width, _, _, patch, _ = layout["visual.patch_embed.proj.weight"].shape
        config["vision_config"] = {
            **shipped["vision_config"],
            "depth": depth(layout, "visual.blocks."),
            "hidden_size": width,
            "num_heads": width // EYE_HEAD_DIM,
            "intermediate_size": layout["visual.blocks.0.mlp.gate_proj.weight"].shape[0],
            "out_hidden_size": layout["visual.merger.mlp.2.weight"].shape[0],
            "patch_size": patch,
        }
    return config


def _config_of_qwen3(shipped: Config, layout: Layout) -> dict[str, Any]:
    head_dim = layout["layers.0.self_attn.q_norm.weight"].shape[0]
    return {**shipped, "head_dim": head_dim, **_sizes(layout, head_dim)}


def _config_of_qwen3_vl(shipped: Config, layout: Layout) -> dict[str, Any]:
    language = below(layout, "language_model.") or layout
    config: dict[str, Any] = {**shipped, "text_config": _config_of_qwen3(shipped["text_config"], language)}
    if "visual.patch_embed.proj.weight" in layout:
        width, _, _, patch, _ = layout["visual.patch_embed.proj.weight"].shape
        config["vision_config"] = {
            **shipped["vision_config"],
            "depth": depth(layout, "visual.blocks."),
            "hidden_size": width,
            "intermediate_size": layout["visual.blocks.0.mlp.linear_fc1.weight"].shape[0],
            "out_hidden_size": layout["visual.merger.linear_fc2.weight"].shape[0],
            "num_position_embeddings": layout["visual.pos_embed.weight"].shape[0],
            "patch_size": patch,
        }
    return config


def _sizes(layout: Layout, head_dim: int) -> Mapping[str, Any]:
    """The sizes of a language model that follow from its weights; `layer_types` follow from the depth."""
    vocabulary, width = layout["embed_tokens.weight"].shape
    layers = depth(layout, "layers.")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "layer_types": None,
        "max_window_layers": layers,
        "num_attention_heads": layout["layers.0.self_attn.q_proj.weight"].shape[0] // head_dim,
        "num_key_value_heads": layout["layers.0.self_attn.k_proj.weight"].shape[0] // head_dim,
        "intermediate_size": layout["layers.0.mlp.gate_proj.weight"].shape[0],
    }
