"""FLUX.1's names: as Black Forest Labs spells them (native) and as diffusers does, and its config from shapes.

A native module can stack several of diffusers' modules along its rows, as `img_attn.qkv` does. Sources:
https://github.com/black-forest-labs/flux (`src/flux/model.py`, `modules/layers.py`) and diffusers'
`transformer_flux.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from burnish.errors import ModelError
from burnish.families.weights import Layout, Piece, below
from burnish.family import NativeModule

NATIVE_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
HEAD_DIM = 128  # of every released FLUX.1 and of those pruned from it

_DOUBLE_BLOCK = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE_BLOCK = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
_REST = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_NATIVE_REST = {ours: native for native, ours in _REST.items()}
_DIFFUSERS_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
_SCALED = re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|comfy_quant)$")


@dataclass(frozen=True, slots=True)
class HalvesSwapped(Piece):
    """A tensor whose first and second half of rows trade places.

    The last modulation gives shift, then scale in the native layout and scale, then shift in diffusers'.
    """

    def taken_from(self, stored: Tensor) -> Tensor:
        shift, scale = stored.chunk(2)
        return torch.cat([scale, shift]).reshape(self.shape)


def diffusers_modules(native: str) -> tuple[str, ...]:
    """Diffusers' modules that a native module holds, in the order of its rows; empty where it is unknown.

    The rows of `final_layer.adaLN_modulation.1` besides have their halves swapped.
    """
    match = _BLOCK.fullmatch(native)
    if match is None:
        return (_REST[native],) if native in _REST else ()
    kind, number, inner = match.groups()
    table, stem = (
        (_DOUBLE_BLOCK, "transformer_blocks")
        if kind == "double"
        else (_SINGLE_BLOCK, "single_transformer_blocks")
    )
    return tuple(f"{stem}.{number}.{module}" for module in table.get(inner, ()))


def native_module(ours: str) -> NativeModule:
    """The native module that holds one of diffusers'; the same name where the release has no such module."""
    if ours in _NATIVE_REST:
        return NativeModule(_NATIVE_REST[ours], (ours,), halves_swapped=ours == "norm_out.linear")
    match = _DIFFUSERS_BLOCK.fullmatch(ours)
    if match is None:
        return NativeModule(ours, (ours,))
    single, number, inner = match.groups()
    table, kind = (_SINGLE_BLOCK, "single") if single else (_DOUBLE_BLOCK, "double")
    for native, modules in table.items():
        if inner in modules:
            name = f"{kind}_blocks.{number}.{native}"
            return NativeModule(name, diffusers_modules(name))
    return NativeModule(ours, (ours,))


def native_prefix(names: Iterable[str]) -> str | None:
    """What stands before FLUX.1's native names among `names`; None if these are of another model.

    Chroma and FLUX.2 share the block names but have no `vector_in`, HunyuanVideo has no plain `img_in`.
    """
    known = set(names)
    for prefix in NATIVE_PREFIXES:
        signs = ("double_blocks.0.img_attn.qkv.weight", "img_in.weight", "vector_in.in_layer.weight")
        if all(prefix + sign in known for sign in signs):
            return prefix
    return None


def is_diffusers_flux(names: Iterable[str]) -> bool:
    """Whether these are the names of diffusers' FluxTransformer2DModel for FLUX.1."""
    signs = (
        "x_embedder.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
        "transformer_blocks.0.norm1_context.linear.weight",
    )
    return set(signs) <= set(names)


def diffusers_names(layout: Layout) -> Layout:
    """The denoiser of a single file under diffusers' names; other parts of the file are left out.

    Raises:
        ModelError: the file holds no FLUX.1 denoiser.
    """
    if is_diffusers_flux(layout):
        return layout
    prefix = native_prefix(layout)
    if prefix is None:
        raise ModelError(
            f"No FLUX.1 denoiser among {len(layout)} tensors such as {', '.join(sorted(layout)[:3])}.",
            remedy="Set `model.path` to the diffusion model's file, or `model.family` to what it is.",
        )
    native = below(layout, prefix)
    width = native["img_in.weight"].shape[0]
    renamed: Layout = {}
    for name, piece in native.items():
        module, _, kind = name.rpartition(".")
        names = diffusers_modules(module)
        if not names:
            renamed[name] = piece  # unknown: the loader says that it is not used
            continue
        kind = "weight" if kind == "scale" else kind
        for target, part in zip(names, _parts(piece, len(names), width), strict=True):
            renamed[f"{target}.{kind}"] = part
    for kind in ("weight", "bias"):
        stacked = renamed.get(f"norm_out.linear.{kind}")
        if stacked is not None:
            renamed[f"norm_out.linear.{kind}"] = HalvesSwapped(stacked.file, stacked.name, stacked.shape)
    return renamed


def _parts(piece: Piece, count: int, width: int) -> list[Piece]:
    """Rows of a stacked tensor: query, key and value of the model's width each, then all the rest."""
    if count == 1:
        return [piece]
    edges = [index * width for index in range(count)] + [piece.shape[0]]
    return [
        replace(piece, rows=(begin, end), shape=(end - begin, *piece.shape[1:]))
        for begin, end in pairwise(edges)
    ]


def transformer_config(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The shipped config with the widths and depths of `layout` (diffusers' names).

    Raises:
        ModelError: a tensor is missing that the config follows from, or it is no text-to-image FLUX.1.
    """
    try:
        width, in_channels = layout["x_embedder.weight"].shape
        head_dim = layout["transformer_blocks.0.attn.norm_q.weight"].shape[0]
        text_width = layout["context_embedder.weight"].shape[1]
        pooled_width = layout["time_text_embed.text_embedder.linear_1.weight"].shape[1]
        out_channels = layout["proj_out.weight"].shape[0]
    except KeyError as error:
        raise ModelError(f"The FLUX.1 denoiser lacks {error}.", remedy="Fetch the file again.") from error
    if head_dim != HEAD_DIM:
        raise ModelError(
            f"This FLUX.1 has heads of {head_dim} instead of {HEAD_DIM}; how positions are spread over them "
            "(axes_dims_rope) is not written in a single file.",
            remedy="Use its diffusers folder, whose config says so.",
        )
    return {
        **shipped,
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": _depth(layout, "transformer_blocks."),
        "num_single_layers": _depth(layout, "single_transformer_blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": text_width,
        "pooled_projection_dim": pooled_width,
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in layout,
    }


def _depth(layout: Layout, stem: str) -> int:
    return 1 + max(
        (int(name[len(stem) :].split(".")[0]) for name in layout if name.startswith(stem)), default=-1
    )


def refuse_scaled(layout: Layout) -> None:
    """8-bit files that keep a scale beside each weight would load as noise.

    Raises:
        ModelError: it is such a file.
    """
    scaled = [name for name in layout if _SCALED.search(name)]
    if scaled:
        raise ModelError(
            f"{layout[scaled[0]].file} holds 8-bit weights with scales beside them ({scaled[0]}), "
            "which are not read.",
            remedy="Use the bfloat16 or float16 file, or the plain fp8_e4m3fn one, of the same model.",
        )
