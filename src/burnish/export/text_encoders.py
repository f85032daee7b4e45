"""Adapters of CLIP text encoders beside a denoiser's: in the same file, under names of their own.

    kohya       lora_te_text_model_encoder_layers_0_self_attn_q_proj; lora_te1_ and lora_te2_ beside another encoder
    diffusers   text_encoder.text_model.encoder.layers.0.self_attn.q_proj, text_encoder_2. the second
    comfy       text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj

`text_model.` is in all of them, whether the installed transformers has it in its names or not: no reader finds a file
without. ComfyUI knows six linear layers of each block (`LORA_CLIP_MAP` in `comfy/lora.py`), nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from burnish.adapters.layer import Adaptable, AdapterWeights, adaptable_modules
from burnish.export_keys import AdapterFormat, ExportKeys
from burnish.family import TargetSet

_INNER = "text_model."
TARGETS: Mapping[str, TargetSet] = {
    "attention": TargetSet(("*encoder.layers.*.self_attn.*_proj",), "attention of every block"),
    "attention+mlp": TargetSet(
        ("*encoder.layers.*.self_attn.*_proj", "*encoder.layers.*.mlp.fc?"), "attention and feed-forward"
    ),
}


@dataclass(frozen=True, slots=True)
class TextAdapter:
    """What was trained of one text encoder, and all that could have been, by names of files."""

    weights: Mapping[str, AdapterWeights]
    modules: Mapping[str, Adaptable]


def file_name(module: str) -> str:
    """A module's name in files, from that in the loaded text encoder."""
    return _INNER + module.removeprefix(_INNER)


def whole_name(weight: str) -> str:
    """A weight's name in files of whole text encoders, as every version of transformers reads it."""
    return weight if weight.startswith("text_projection") else file_name(weight)


def config_of(encoder: nn.Module) -> dict[str, Any]:
    """What its config.json says."""
    assert isinstance(encoder, PreTrainedModel)
    told: dict[str, Any] = json.loads(encoder.config.to_json_string())
    return {key: value for key, value in told.items() if key not in ("dtype", "torch_dtype")}


def file_modules(encoder: nn.Module) -> dict[str, Adaptable]:
    """What of a text encoder takes adapters, by names of files."""
    found = {file_name(name): module for name, module in adaptable_modules(encoder).items()}
    return {name: module for name, module in found.items() if name.startswith(f"{_INNER}encoder.layers.")}


def text_adapter(weights: Mapping[str, AdapterWeights], encoder: nn.Module) -> TextAdapter:
    """Of adapters by the loaded text encoder's own names."""
    return TextAdapter({file_name(name): one for name, one in weights.items()}, file_modules(encoder))


def own_names(weights: Mapping[str, AdapterWeights], encoder: nn.Module) -> dict[str, AdapterWeights]:
    """The other way round: by the names of the loaded text encoder."""
    names = {file_name(name): name for name in adaptable_modules(encoder)}
    return {names[name]: one for name, one in weights.items()}


def text_keys(keys: ExportKeys, part: str) -> ExportKeys:
    """How the keys of one text encoder are spelled, as an `ExportKeys` of its own."""
    number = part.rpartition("_")[2] if part[-1].isdigit() else "1"
    # sd-scripts counts where there is more than one, such as FLUX.1's T5; of these Stable Diffusion 1 and 2 have one.
    alone = len(keys.text_encoders) == 1 and not keys.by_release("kohya")
    prefix: dict[AdapterFormat, str] = {
        "kohya": "lora_te_" if alone else f"lora_te{number}_",
        "diffusers": f"{part}.",
        "comfy": f"text_encoders.{keys.text_encoders[part]}.transformer.",
    }
    return replace(keys, prefix=prefix, native=None, unreadable={}, complete=(), lokr=None, spellings={})
