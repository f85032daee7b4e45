"""The text encoders of pipelines as slots: CLIP, T5, and decoder-only language models.

A separate or all-in-one file holds a text encoder under its own names, or below the prefix that ComfyUI gives it
(`text_encoders.NAME.transformer.`). Which one it is follows from names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from burnish.families import clip, t5
from burnish.families.slots import Config, Slot, same_config
from burnish.families.weights import Layout, below

CLIP_L_LAYERS = 12  # the larger CLIPs have 24 (H) and 32 (bigG)
_COMFY_CLIP = ("text_encoders.clip_l.", "clip_l.", "text_encoders.clip_g.", "clip_g.")
_LAYER = re.compile(r"layers\.(\d+)\.")
_NO_SETTINGS = (
    "architectures",
    "model_type",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
)


def settings_of(config: Config) -> dict[str, Any]:
    """A config.json without what only says which class it belongs to."""
    return {k: v for k, v in config.items() if k not in _NO_SETTINGS}


def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a diffusers folder, of whatever class it names."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer


def clip_slot(
    folder: str, tokenizer: str, *, projection: bool, large: bool = False, padding: str = clip.END
) -> Slot:
    """CLIP-L, or with `large` the one of more layers beside it."""
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel

    def find(layout: Layout) -> Layout | None:
        for inside in [*(below(layout, prefix) for prefix in _COMFY_CLIP), layout]:
            if not any("token_embedding.weight" in name for name in inside):
                continue
            named = clip.transformers_names(inside)
            layers = {name.split(".")[2] for name in named if name.startswith("encoder.layers.")}
            if (len(layers) > CLIP_L_LAYERS) == large:
                return clip.as_transformers_spells(named, projection)
        return None

    return Slot(
        folder=folder,
        part="text_encoders",
        make=lambda config: kind(CLIPTextConfig(**settings_of(config))),
        find=find,
        config_of=lambda shipped, layout: clip.config_from_shapes(
            shipped, {name.removeprefix("text_model."): piece for name, piece in layout.items()}
        ),
        tidy=lambda layout: clip.as_transformers_spells(layout, projection),
        tokenizer=tokenizer,
        load_tokenizer=clip.tokenizer_in,
        ship_tokenizer=lambda: clip.shipped_tokenizer(padding),
        unused=clip.UNUSED if projection else (*clip.UNUSED, "text_projection*"),
        file_hint="clip_g.safetensors" if large else "clip_l.safetensors",
    )


def t5_slot(folder: str, tokenizer: str, *, optional: bool = False) -> Slot:
    """The T5 v1.1 encoder with T5's own tokenizer."""
    return Slot(
        folder=folder,
        part="text_encoders",
        make=lambda config: T5EncoderModel(T5Config(**settings_of(config))),
        find=lambda layout: _both_names(inside) if (inside := t5.layout_in(layout)) else None,
        config_of=t5.config_from_shapes,
        tidy=_both_names,
        tokenizer=tokenizer,
        load_tokenizer=t5.tokenizer_in,
        ship_tokenizer=t5.shipped_tokenizer,
        unused=t5.UNUSED,
        # transformers does the same: this projection overflows in float16.
        keep_float32=lambda dtype: ("*.wo.weight",) if dtype == torch.float16 else (),
        optional=optional,
        file_hint="t5xxl_fp16.safetensors",
    )


def _both_names(layout: Layout) -> Layout:
    # Some files hold T5's embedding under its second name only, which transformers ties to the first.
    if "shared.weight" not in layout and "encoder.embed_tokens.weight" in layout:
        return {**layout, "shared.weight": layout["encoder.embed_tokens.weight"]}
    return layout


def language_model_slot(
    folder: str,
    tokenizer: str,
    *,
    config: Callable[..., PreTrainedConfig],
    model: Callable[[Any], nn.Module],
    signs: Sequence[str],
    tidy: Callable[[Layout], Layout],
    prefixes: Sequence[str] = (),
    config_of: Callable[[Config, Layout], dict[str, Any]] = same_config,
    ship_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
    load_tokenizer: Callable[[Path], PreTrainedTokenizerBase] = tokenizer_in,
    unused: Sequence[str] = ("lm_head.*", "*rotary_emb.inv_freq"),
    file_hint: str = "",
) -> Slot:
    """A language model whose hidden states are the conditioning (Qwen, Gemma, Llama, Mistral, UMT5).

    Args:
        config: the config's class, called with the settings of config.json.
        model: makes the module from it.
        signs: names, as in the release, by which a file is known to hold this model.
        tidy: names of the release -> names of the module; the identity on the latter.
        prefixes: before the names in all-in-one files, besides none.
    """

    def find(layout: Layout) -> Layout | None:
        for prefix in ("", *prefixes):
            inside = below(layout, prefix)
            if all(sign in inside for sign in signs):
                return tidy(inside)
        return None

    def make(settings: Mapping[str, Any]) -> nn.Module:
        return model(config(**settings_of(settings)))

    return Slot(
        folder=folder,
        part="text_encoders",
        make=make,
        find=find,
        config_of=config_of,
        tidy=tidy,
        tokenizer=tokenizer,
        load_tokenizer=load_tokenizer,
        ship_tokenizer=ship_tokenizer,
        unused=tuple(unused),
        file_hint=file_hint,
    )


def first_layers(slot: Slot, layers: int) -> Slot:
    """The slot of a language model of which `layers` layers are read: those above stay on the disk.

    The state after the last layer read is as the layer gives it, where the release has layers above or leaves out its
    last norm, as some files of ComfyUI do; where it has just as many, it is normed, as transformers counts it.
    """

    def cut(layout: Layout) -> Layout:
        above = {name for name in layout if (match := _LAYER.match(name)) and int(match[1]) >= layers}
        return {k: v for k, v in layout.items() if k not in above and not (above and k == "norm.weight")}

    def find(layout: Layout) -> Layout | None:
        found = slot.find(layout)
        return None if found is None else cut(found)

    def make(config: dict[str, Any]) -> nn.Module:
        settings = {k: v for k, v in config.items() if k != "final_norm"}
        text = dict(settings.get("text_config", settings))
        stated = int(text["num_hidden_layers"])
        text |= {"num_hidden_layers": min(stated, layers), "layer_types": None}
        module = slot.make({**settings, "text_config": text} if "text_config" in settings else text)
        if stated > layers or not config.get("final_norm", True):
            module.norm = nn.Identity()
        return module

    return replace(
        slot,
        find=find,
        tidy=lambda layout: cut(slot.tidy(layout)),
        make=make,
        config_of=lambda shipped, layout: {
            **slot.config_of(shipped, layout),
            "final_norm": "norm.weight" in layout,
        },
    )
