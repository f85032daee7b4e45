"""ComfyUI's rules for LoRA files, written anew from their description, on models in their original layout.

A key is looked up by what stands before its ending. For every model, `diffusion_model.` plus the original name, and
`lora_unet_` plus that with underscores; for a UNet besides `lora_unet_` plus the diffusers name with
underscores; for FLUX, `transformer.` plus the diffusers name. What is found is a weight of the original layout,
or rows of one where that fuses several (FLUX's qkv), or halves swapped (FLUX's last modulation). The delta is
up @ down over flattened matrices times alpha / rank, or times 1 without alpha. What is not found, or does not fit, is
left out and logged.

The original layouts: CompVis' and Stability's `openaimodel.py`, Black Forest Labs' `flux/model.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

ENDINGS = {
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.weight": "down",
    ".alpha": "alpha",
}


@dataclass(frozen=True)
class Place:
    """Where a module's weight lies in the original layout: the rows `start` to `start + rows`, or all."""

    module: str
    start: int = 0
    rows: int | None = None
    halves_swapped: bool = False


def comfy_delta(
    file: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    places: Mapping[str, Place] | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """What ComfyUI adds to the native weights, and the keys that it does not load.

    Args:
        file: the tensors of an adapter file.
        shapes: of all native weights by name, without a prefix, as in `double_blocks.0.img_attn.qkv.weight`.
        places: what the family's own key map adds to the rules for every model.

    Returns:
        Deltas by native weight name, of its shape, for those that the file changes.
    """
    known = {**generic_places(shapes), **(places or {})}
    adapters: dict[str, dict[str, str]] = {}
    lost = []
    for key in file:
        ending = next((ending for ending in ENDINGS if key.endswith(ending)), None)
        if ending is None or key.removesuffix(ending) not in known:
            lost.append(key)
        else:
            adapters.setdefault(key.removesuffix(ending), {})[ENDINGS[ending]] = key
    deltas: dict[str, Tensor] = {}
    for prefix, pieces in adapters.items():
        place = known[prefix]
        name = f"{place.module}.weight"
        shape = (place.rows or shapes[name][0], *shapes[name][1:])
        delta = product({piece: file[key] for piece, key in pieces.items()}, shape)
        if delta is None:
            lost += pieces.values()
            continue
        if place.halves_swapped:
            delta = torch.cat(delta.chunk(2)[::-1])
        whole = deltas.setdefault(name, torch.zeros(*shapes[name]))
        whole[place.start : place.start + shape[0]] = delta
    return deltas, lost


def product(pieces: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor | None:
    """up @ down times alpha / rank, in `shape`; None where they do not give it."""
    if not {"up", "down"} <= pieces.keys():
        return None
    up, down = pieces["up"].float().flatten(1), pieces["down"].float().flatten(1)
    if up.shape[1] != down.shape[0] or up.shape[0] * down.shape[1] != prod(shape):
        return None
    scale = pieces["alpha"].item() / down.shape[0] if "alpha" in pieces else 1.0
    return (scale * (up @ down)).reshape(shape)


def generic_places(shapes: Mapping[str, Sequence[int]]) -> dict[str, Place]:
    """The rules for every model."""
    names = [key.removesuffix(".weight") for key in shapes if key.endswith(".weight")]
    dotted = {f"diffusion_model.{name}": Place(name) for name in names}
    return {**dotted, **{"lora_unet_" + name.replace(".", "_"): Place(name) for name in names}}


def hunyuan_video_places(shapes: Mapping[str, Sequence[int]]) -> dict[str, Place]:
    """`transformer.` plus Tencent's names, for weights that ComfyUI keeps under names like FLUX's."""
    renamed = (
        ("_mod.lin.", "_mod.linear."),
        ("_attn.qkv.", "_attn_qkv."),
        ("_attn.proj.", "_attn_proj."),
        ("mlp.0.", "mlp.fc1."),
        ("mlp.2.", "mlp.fc2."),
        (".modulation.lin.", ".modulation.linear."),
    )
    found = {}
    for key in shapes:
        if key.endswith(".weight"):
            spelled = key
            for comfy, tencent in renamed:
                spelled = spelled.replace(comfy, tencent)
            place = Place(key.removesuffix(".weight"))
            found["transformer." + spelled.removesuffix(".weight")] = place
            found["diffusion_model." + spelled.removesuffix(".weight")] = place
    return found


def loaded(
    file: Mapping[str, Tensor], places: Mapping[str, Place], native: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`native` weights with the file's adapters added; raises KeyError for a key that ComfyUI would skip."""
    deltas, lost = comfy_delta(file, {key: tensor.shape for key, tensor in native.items()}, places)
    if lost:
        raise KeyError(lost)
    return {key: tensor + deltas[key] if key in deltas else tensor.clone() for key, tensor in native.items()}


def unet_places(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Place]:
    return {
        "lora_unet_" + name.replace(".", "_"): Place(unet_module(name, config))
        for name in module_names(weights)
    }


def unet_native(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A diffusers UNet's weights in the original layout, which only names them differently."""
    native = {}
    for key, tensor in weights.items():
        module, _, parameter = key.rpartition(".")
        native[f"{unet_module(module, config)}.{parameter}"] = tensor
    return native


OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_module(name: str, config: Mapping[str, Any]) -> str:
    """The original name of a diffusers UNet module; every stage has the same number of layers."""
    layers = config["layers_per_block"]
    if name in OUTER:
        return OUTER[name]
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(?:\.(.+))?", name)
    if match is None:
        mid = re.fullmatch(r"(mid_block\.\w+\.\d)\.(.+)", name)
        assert mid is not None, name
        return f"{OUTER[mid[1]]}.{RESNET.get(mid[2], mid[2])}"
    way, stage, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(stage + 1) * (layers + 1)}.0.op"
    block = f"output_blocks.{stage * (layers + 1) + number}"
    if way == "down":
        block = f"input_blocks.{1 + stage * (layers + 1) + number}"
    if kind == "upsamplers":
        after_attention = config["up_block_types"][stage].startswith("CrossAttn")
        return f"output_blocks.{stage * (layers + 1) + layers}.{2 if after_attention else 1}.conv"
    return f"{block}.0.{RESNET[rest]}" if kind == "resnets" else f"{block}.1.{rest}"


FLUX_OUTER = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
FUSED = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")


def flux_place(name: str, width: int) -> Place:
    """The original place of a diffusers FLUX module; `width` is that of the model."""
    if name in FLUX_OUTER:
        return Place(FLUX_OUTER[name], halves_swapped=name == "norm_out.linear")
    match = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", name)
    assert match is not None, name
    names, stream = (FLUX_SINGLE, "single") if match[1] else (FLUX_DOUBLE, "double")
    module = f"{stream}_blocks.{match[2]}.{names[match[3]]}"
    like = re.sub(r"add_([qkv])_proj", r"to_\1", match[3])
    if like not in FUSED:
        return Place(module)
    return Place(module, FUSED.index(like) * width, 4 * width if like == "proj_mlp" else width)


def flux_places(weights: Mapping[str, Tensor], width: int) -> dict[str, Place]:
    return {f"transformer.{name}": flux_place(name, width) for name in module_names(weights)}


def flux_native(weights: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """A diffusers FLUX transformer's weights in the original layout."""
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for key, tensor in weights.items():
        module, _, parameter = key.rpartition(".")
        place = flux_place(module, width)
        if place.halves_swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if re.search(r"norm\.(query|key)_norm$", place.module):
            parameter = "scale"
        pieces.setdefault(f"{place.module}.{parameter}", []).append((place.start, tensor))
    return {
        key: torch.cat([one for _, one in sorted(found, key=lambda p: p[0])]) for key, found in pieces.items()
    }


def module_names(weights: Mapping[str, Tensor]) -> list[str]:
    """Modules with a matrix."""
    return [
        key.removesuffix(".weight")
        for key, one in weights.items()
        if key.endswith(".weight") and one.dim() > 1
    ]
