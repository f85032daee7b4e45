"""The UNet of Stable Diffusion 1 and XL: names in files, config from shapes, blocks, adapter targets.

Original names are those of `ldm/modules/diffusionmodules/openaimodel.py` (CompVis/latent-diffusion and
Stability-AI/generative-models).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from burnish.errors import ModelError
from burnish.export_keys import NativeModule, NativeTensor
from burnish.families.sources import read_json, weight_files
from burnish.families.tensor_info import TensorInfo
from burnish.families.weights import Layout, layout_of, load_module
from burnish.family import TargetSet
from burnish.placement import Place, Shrink

_ATTENTION = ("*.attn[12].to_[qkv]", "*.attn[12].to_out.0")
_FEED_FORWARD = ("*.ff.net.0.proj", "*.ff.net.2")
_CONVOLUTIONS = (
    "*.attentions.*.proj_in",
    "*.attentions.*.proj_out",
    "*.resnets.*.conv[12]",
    "*.resnets.*.conv_shortcut",
    "*.resnets.*.time_emb_proj",
    "*.downsamplers.0.conv",
    "*.upsamplers.0.conv",
)
TARGETS: Mapping[str, TargetSet] = {
    "attention": TargetSet(_ATTENTION, "Query, key, value and output of self- and cross-attention."),
    "attention+mlp": TargetSet(
        (*_ATTENTION, *_FEED_FORWARD), "Attention and the feed-forward layers of each transformer block."
    ),
    "all": TargetSet(
        (*_ATTENTION, *_FEED_FORWARD, *_CONVOLUTIONS),
        "Every layer of the repeated blocks, convolutions included; not the first and last convolution "
        "and the embeddings of time and size.",
    ),
}

_OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)")


def load_from_folder(
    folder: Path, *, dtype: torch.dtype, device: Place, shrink: Shrink | None = None
) -> UNet2DConditionModel:
    """The UNet of a diffusers folder."""
    return _load(read_json(folder / "config.json"), layout_of(weight_files(folder)), dtype, device, shrink)


def load_from_layout(
    layout: Layout,
    shipped: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: Place,
    shrink: Shrink | None = None,
) -> UNet2DConditionModel:
    """The UNet of a single file, in original or diffusers names; widths and depths follow the weights."""
    layout = diffusers_names(layout)
    return _load(config_from_shapes(shipped, layout), layout, dtype, device, shrink)


def _load(
    config: Mapping[str, Any],
    layout: Layout,
    dtype: torch.dtype,
    device: Place,
    shrink: Shrink | None,
) -> UNet2DConditionModel:
    return load_module(
        lambda: UNet2DConditionModel.from_config(dict(config)),
        layout,
        dtype=dtype,
        device=device,
        what="UNet",
        shrink=shrink,
        blocks=repeated_blocks,
    )


def diffusers_names(layout: Layout) -> Layout:
    """A UNet's layout under diffusers' names, from those or the original ones.

    Raises:
        ModelError: the input blocks do not divide into stages of equal length.
    """
    renaming = _renaming({name: TensorInfo("", piece.shape) for name, piece in layout.items()})
    return {renaming(name): piece for name, piece in layout.items()}


def diffusers_shapes(header: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Shapes of a UNet's header under diffusers' names; what `detect` looks at."""
    renaming = _renaming(header)
    return {renaming(name): info.shape for name, info in header.items()}


def _renaming(header: Mapping[str, TensorInfo]) -> Callable[[str], str]:
    inputs = 1 + max(
        (int(m[2]) for name in header if (m := _BLOCK.match(name)) and m[1] == "input"), default=-1
    )
    if not inputs:
        return str  # diffusers' names already
    stages = 1 + sum(name.endswith(".0.op.weight") for name in header)
    # The first input block is the first convolution; each stage but the last ends with a downsampler.
    layers, rest = divmod(inputs - stages, stages)
    if rest:
        raise ModelError(
            f"A UNet of {inputs} input blocks in {stages} stages is of no known kind.",
            remedy="Use the diffusers folder of this model.",
        )
    return lambda name: _diffusers_name(name, layers)


def _diffusers_name(name: str, layers: int) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    match = _BLOCK.fullmatch(name)
    if match:
        side, number, position, inner = match[1], int(match[2]), match[3], match[4]
        stage, layer = divmod(number - 1 if side == "input" else number, layers + 1)
        place = f"{'down' if side == 'input' else 'up'}_blocks.{stage}"
        if inner.startswith("op."):
            return f"{place}.downsamplers.0.conv.{kind}"
        if inner.startswith("conv."):
            return f"{place}.upsamplers.0.{inner}"
        if position == "1":
            return f"{place}.attentions.{layer}.{inner}"
        return f"{place}.resnets.{layer}.{_resnet_name(inner)}"
    for outer in ("middle_block.0", "middle_block.1", "middle_block.2"):
        if name.startswith(outer + "."):
            return f"{_OUTER[outer]}.{_resnet_name(name[len(outer) + 1 :])}"
    return name


def _resnet_name(inner: str) -> str:
    stem, _, kind = inner.rpartition(".")
    return f"{_RESNET.get(stem, stem)}.{kind}"


PREFIX = "model.diffusion_model."
_LAYERS = 2  # residual blocks of a stage on the way down, of every released UNet; one more on the way up
_OURS = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def native_module(ours: str, *, top_attends: bool) -> NativeModule:
    """Where the original release keeps one of diffusers' modules; each is a module there, too.

    `top_attends`: whether the first stage on the way up has attention, behind which its upsampler stands.
    """
    outer = {theirs: original for original, theirs in _OUTER.items()}
    if ours in outer:
        return NativeModule(outer[ours], (ours,))
    match = _OURS.fullmatch(ours)
    if match is None:
        middle, _, inner = ours.partition(".")
        middle = ".".join([middle, *inner.split(".")[:2]])
        rest = _original(ours[len(middle) + 1 :])
        return NativeModule(f"{outer[middle]}.{rest}" if middle in outer else ours, (ours,))
    side, stage, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return NativeModule(f"input_blocks.{(stage + 1) * (_LAYERS + 1)}.0.op", (ours,))
    if kind == "upsamplers":
        place = 1 + int(stage > 0 or top_attends)
        return NativeModule(f"output_blocks.{stage * (_LAYERS + 1) + _LAYERS}.{place}.{rest}", (ours,))
    number = stage * (_LAYERS + 1) + layer + (side == "down")
    block = f"{'input' if side == 'down' else 'output'}_blocks.{number}"
    inner = f"0.{_original(rest)}" if kind == "resnets" else f"1.{rest}"
    return NativeModule(f"{block}.{inner}", (ours,))


def native_tensors(shapes: Mapping[str, Sequence[int]], *, top_attends: bool) -> dict[str, NativeTensor]:
    """The tensors of a UNet's file in the original release's names, by name.

    With the prefix of whole checkpoints: diffusers' `from_single_file` knows UNets by it, and ComfyUI takes it off.
    """
    found = {}
    for name in shapes:
        module, _, kind = name.rpartition(".")
        found[f"{PREFIX}{native_module(module, top_attends=top_attends).name}.{kind}"] = NativeTensor((name,))
    return found


def _original(inner: str) -> str:
    return next((theirs for theirs, ours in _RESNET.items() if ours == inner), inner)


def config_from_shapes(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The shipped config with the widths and depths of `layout` (names of `diffusers_names`).

    What shapes do not tell stays as released: heads per stage, and 32 groups of group norm (or as many as
    divide every width where that is fewer). Transformer depths may differ per layer, as in pruned models.

    Raises:
        ModelError: tensors are missing that any such UNet has.
    """
    try:
        widths: list[int] = []
        while (name := f"down_blocks.{len(widths)}.resnets.0.conv1.weight") in layout:
            widths.append(layout[name].shape[0])
        down = [_depths(layout, f"down_blocks.{stage}") for stage in range(len(widths))]
        up = [_depths(layout, f"up_blocks.{stage}") for stage in range(len(widths))]
        context = next(p.shape[1] for name, p in layout.items() if name.endswith("attn2.to_k.weight"))
        mid = _depths(layout, "mid_block")[0]
        changes: dict[str, Any] = {
            "in_channels": layout["conv_in.weight"].shape[1],
            "out_channels": layout["conv_out.weight"].shape[0],
        }
        if shipped.get("addition_embed_type") == "text_time":
            size = layout["add_embedding.linear_1.weight"].shape[1]
            changes["projection_class_embeddings_input_dim"] = size
    except (KeyError, StopIteration, IndexError) as error:
        raise ModelError(
            f"No UNet of this family among {len(layout)} tensors such as {', '.join(sorted(layout)[:3])}.",
            remedy="Set `model.family`, or fetch the file again.",
        ) from error
    return {
        **shipped,
        **changes,
        "block_out_channels": widths,
        "layers_per_block": len(down[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in down],
        "up_block_types": ["CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in up],
        "cross_attention_dim": context,
        "norm_num_groups": math.gcd(32, *widths),
        **_transformer_depths(down, mid, up),
    }


def _depths(layout: Layout, place: str) -> list[int]:
    """Transformer blocks after each residual block of a stage; 0 where there is no attention."""
    resnets = sum(name.startswith(f"{place}.resnets.") and name.endswith("conv1.weight") for name in layout)
    depths = [0] * resnets
    for name in layout:
        match = re.match(rf"{place}\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.", name)
        if match:
            depths[int(match[1])] = max(depths[int(match[1])], int(match[2]) + 1)
    return depths


def _transformer_depths(down: list[list[int]], mid: int, up: list[list[int]]) -> dict[str, Any]:
    """One depth per stage where that says it all, as the released configs; else one per layer."""
    per_stage = [max(max(depths), 1) for depths in down]
    regular = (
        all(len(set(depths)) == 1 for depths in [*down, *up])
        and [depths[0] for depths in up] == [depths[0] for depths in reversed(down)]
        and mid == per_stage[-1]
    )
    if regular:
        return {"transformer_layers_per_block": per_stage}
    if mid != max(down[-1]):
        raise ModelError(
            f"The UNet's middle has {mid} transformer blocks, its last stage {max(down[-1])}: not supported.",
            remedy="Use the diffusers folder of this model.",
        )
    return {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up}


def with_depth(config: Mapping[str, Any], depth: int | None) -> dict[str, Any]:
    """A config of at most `depth` layers per stage and transformer blocks per layer; None changes nothing."""
    if depth is None:
        return dict(config)
    transformers = config.get("transformer_layers_per_block", 1)
    if isinstance(transformers, int):
        transformers = [transformers] * len(config["block_out_channels"])
    return {
        **config,
        "layers_per_block": min(depth, config["layers_per_block"]),
        "transformer_layers_per_block": [min(depth, number) for number in transformers],
    }


def repeated_blocks(unet: Any) -> list[nn.Module]:
    """Residual and transformer blocks in forward order; each takes and gives plain tensors."""
    blocks: list[nn.Module] = []
    for stage in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        attentions = stage.attentions if hasattr(stage, "attentions") else []
        # Every stage alternates, beginning with a residual block; the middle also ends with one.
        for resnet, attention in zip_longest(stage.resnets, attentions):
            blocks.append(resnet)
            blocks += attention.transformer_blocks if attention is not None else []
    return blocks
