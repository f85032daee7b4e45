"""Keys of text encoders as readers look them up. Shares nothing with the writer.

Sources: ComfyUI `comfy/lora.py` (`model_lora_keys_clip`: `lora_te_` and `lora_te1_` are its CLIP-L or CLIP-H, and
`lora_te2_` its CLIP-G beside a CLIP-L; dotted names by diffusers' folders; `text_encoders.` for all), diffusers
`loaders/lora_conversion_utils.py` (sd-scripts' names) and `loaders/lora_base.py` (which takes `text_model.` off again).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from burnish.adapters.layer import Adaptable, adaptable_modules
from burnish.export_keys import AdapterFormat, ExportKeys

_KEY = re.compile(r"(lora_te\d*_|text_encoders?(_\d+)?\.)")
# The linear layers of a block that ComfyUI has names for.
_KNOWN = re.compile(
    r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))"
)


def without_texts(
    tensors: Mapping[str, Tensor], keys: ExportKeys
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's tensors for the denoiser, and those for text encoders where the family has any that train."""
    if not keys.text_encoders:
        return dict(tensors), {}
    texts = {key: one for key, one in tensors.items() if _KEY.match(key)}
    return {key: one for key, one in tensors.items() if key not in texts}, texts


def as_in_files(name: str) -> str:
    """A module of a loaded CLIP; older transformers have `text_model.` in all names, newer in some."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def text_modules(encoder: nn.Module) -> dict[str, Adaptable]:
    """What readers find of a loaded CLIP, by names of files."""
    found = {as_in_files(name): module for name, module in adaptable_modules(encoder).items()}
    return {name: module for name, module in found.items() if _KNOWN.fullmatch(name)}


def text_names(modules: Iterable[str], part: str, format: AdapterFormat, keys: ExportKeys) -> dict[str, str]:
    """What stands before a key's ending -> module."""
    if format == "diffusers":
        return {f"{part}.{name}": name for name in modules}
    if format == "comfy":
        clip = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[part]
        return {f"text_encoders.{clip}.transformer.{name}": name for name in modules}
    start = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
    if keys.default == "kohya" and "text_encoder_2" not in keys.text_encoders:
        start = "lora_te_"
    return {start + name.replace(".", "_"): name for name in modules}
