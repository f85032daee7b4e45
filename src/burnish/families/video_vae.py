"""Autoencoders with a time axis: pixels and latents both ways, and the Wan VAE's names in the original release.

Wan 2.1's VAE (arXiv 2503.20314, section 4.1) keeps the first frame by itself and takes four frames per latent frame
after it; Qwen-Image's has the same weights but for the decoder, under the same names. Wan 2.2's packs 2x2 pixels into
channels first and has residual shortcuts around each stage. Latents are scaled per channel by a mean and a deviation.

Shape letters: B batch, C channels, T frames, H W height and width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from burnish.families.slots import Config, Slot
from burnish.families.weights import Layout, below

_PREFIXES = ("", "vae.", "first_stage_model.", "model.")
_SIGN, _OUR_SIGN = "decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"
_RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
_PARTS = {**_RESIDUAL, "shortcut": "conv_shortcut", "resample.1": "resample.1", "time_conv": "time_conv"}
_ELSEWHERE = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "decoder.conv1": "decoder.conv_in",
    **{f"{side}.head.0": f"{side}.norm_out" for side in ("encoder", "decoder")},
    **{f"{side}.head.2": f"{side}.conv_out" for side in ("encoder", "decoder")},
    **{
        f"{side}.middle.1.{part}": f"{side}.mid_block.attentions.0.{part}"
        for side in ("encoder", "decoder")
        for part in ("norm", "to_qkv", "proj")
    },
    **{
        f"{side}.middle.{2 * number}.{theirs}": f"{side}.mid_block.resnets.{number}.{ours}"
        for side in ("encoder", "decoder")
        for number in (0, 1)
        for theirs, ours in _RESIDUAL.items()
    },
}
_FLAT = re.compile(r"(encoder\.downsamples|decoder\.upsamples)\.(\d+)\.(.+)")
_STAGED = re.compile(r"(encoder\.downsamples|decoder\.upsamples)\.(\d+)\.(?:down|up)samples\.(\d+)\.(.+)")


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> latents in the scale the denoiser sees: the posterior's mode.

    Pixels (B, 3, T, H, W) give (B, C, T', H', W'); a picture (B, 3, H, W), a clip of one frame, (B, C, H', W').
    """
    return _with_time_axis(lambda clip_B3THW: _encode(vae, clip_B3THW), pixels)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents in the scale the denoiser sees -> pixels in [-1, 1], not clamped, with a time axis or without."""
    return _with_time_axis(lambda latents_BCTHW: _decode(vae, latents_BCTHW), latents)


def _with_time_axis(code: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    return code(values) if values.dim() == 5 else code(values[:, :, None])[:, :, 0]


@torch.no_grad()
def _encode(vae: Any, pixels_B3THW: Tensor) -> Tensor:
    mode_BCTHW: Tensor = vae.encode(pixels_B3THW.to(vae.device, vae.dtype)).latent_dist.mode()
    mean, deviation = statistics(vae)
    return (mode_BCTHW - mean) / deviation


@torch.no_grad()
def _decode(vae: Any, latents_BCTHW: Tensor) -> Tensor:
    mean, deviation = statistics(vae)
    plain_BCTHW = latents_BCTHW.to(vae.device, vae.dtype) * deviation + mean
    pixels_B3THW: Tensor = vae.decode(plain_BCTHW, return_dict=False)[0]
    return pixels_B3THW


def statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents per channel, (1, C, 1, 1, 1), in the VAE's type and on its device.

    They are in the config (Wan, Qwen-Image), among the weights (LTX), or one scaling factor stands for all
    (HunyuanVideo); LTX's deviation is divided by the scaling factor besides.
    """
    config = vae.config
    factor = float(config.get("scaling_factor") or 1.0)
    like = {"device": vae.device, "dtype": vae.dtype}
    mean = config.get("latents_mean")
    deviation = config.get("latents_std")
    buffers = dict(vae.named_buffers(recurse=False))
    if "latents_mean" in buffers:
        mean, deviation = buffers["latents_mean"], buffers["latents_std"]
    if mean is None or deviation is None:
        return torch.zeros(1, 1, 1, 1, 1, **like), torch.full((1, 1, 1, 1, 1), 1 / factor, **like)
    shape = (1, -1, 1, 1, 1)
    mean_C, deviation_C = (torch.as_tensor(values, **like) for values in (mean, deviation))
    return mean_C.view(shape), deviation_C.view(shape) / factor


def wan_vae_slot(make: Callable[..., nn.Module], hint: str = "wan_2.1_vae.safetensors") -> Slot:
    """The VAE of Wan, or of Qwen-Image, whose original names are the same.

    Args:
        make: `AutoencoderKLWan.from_config` or `AutoencoderKLQwenImage.from_config`.
        hint: what the separate file is called in the wild.
    """
    return Slot("vae", "vae", make, find_wan_vae, config_from_shapes, file_hint=hint)


def find_wan_vae(layout: Layout) -> Layout | None:
    """A Wan VAE inside a file, under diffusers' names; None if there is none."""
    for prefix in _PREFIXES:
        inside = below(layout, prefix)
        if _OUR_SIGN in inside and "encoder.conv_in.weight" in inside:
            return inside
        if _SIGN in inside:
            return diffusers_names(inside)
    return None


def without_time(layout: Layout) -> Layout:
    """Convolutions over one frame, as files keep them that have a time axis everywhere, without that axis."""
    return {
        name: replace(piece, shape=(*piece.shape[:2], *piece.shape[3:])) if len(piece.shape) == 5 else piece
        for name, piece in layout.items()
    }


def diffusers_names(layout: Layout) -> Layout:
    """The original layout under diffusers' names."""
    stages = _flat_stages(layout)
    return {_diffusers_name(name, stages): piece for name, piece in layout.items()}


def _flat_stages(layout: Layout) -> Mapping[int, tuple[int, int]]:
    """Of the decoder's flat list of Wan 2.1: stage and place therein by number; an upsampler ends its stage."""
    numbers = sorted({int(m[2]) for name in layout if (m := _FLAT.match(name)) and m[1][0] == "d"})
    places: dict[int, tuple[int, int]] = {}
    stage = place = 0
    for number in numbers:
        places[number] = (stage, place)
        place += 1
        if f"decoder.upsamples.{number}.resample.1.weight" in layout:
            stage, place = stage + 1, 0
    return places


def _diffusers_name(name: str, stages: Mapping[int, tuple[int, int]]) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _ELSEWHERE:
        return f"{_ELSEWHERE[stem]}.{kind}"
    staged = _STAGED.fullmatch(stem)
    if staged:
        return f"{_block(staged[1], int(staged[2]), int(staged[3]), staged[4])}.{kind}"
    flat = _FLAT.fullmatch(stem)
    if flat is None or flat[3] not in _PARTS:
        return name
    if flat[1].startswith("encoder"):
        return f"encoder.down_blocks.{flat[2]}.{_PARTS[flat[3]]}.{kind}"
    block = _block(flat[1], *stages[int(flat[2])], flat[3])
    return f"{block.replace('.upsampler.', '.upsamplers.0.')}.{kind}"


def _block(side: str, stage: int, place: int, part: str) -> str:
    way = "down" if side.startswith("encoder") else "up"
    stem = f"{side.partition('.')[0]}.{way}_blocks.{stage}"
    if part in ("resample.1", "time_conv"):
        return f"{stem}.{way}sampler.{part}"
    return f"{stem}.resnets.{place}.{_PARTS[part]}"


def config_from_shapes(shipped: Config, layout: Layout) -> dict[str, Any]:
    """The shipped config with the widths and depths of `layout` (diffusers' names).

    Raises:
        KeyError: what every Wan VAE has is missing.
    """
    base = layout["encoder.conv_in.weight"].shape[0]
    staged = any(name.startswith("encoder.down_blocks.0.resnets.") for name in layout)
    widths, samplers = _staged(layout) if staged else _flat(layout)
    decoder = layout["decoder.norm_out.gamma"].shape[0]
    first = widths[0] // base
    depth = sum(
        name.startswith("decoder.up_blocks.0.resnets.") and name.endswith(".conv1.weight") for name in layout
    )
    config = {
        **shipped,
        "base_dim": base,
        "z_dim": layout["post_quant_conv.weight"].shape[0],
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": depth - 1,
        "temperal_downsample": samplers,
    }
    if not staged:
        return config
    return {
        **config,
        "is_residual": True,
        "in_channels": layout["encoder.conv_in.weight"].shape[1],
        "out_channels": layout["decoder.conv_out.weight"].shape[0],
        "decoder_base_dim": decoder // first,
    }


def _staged(layout: Layout) -> tuple[list[int], list[bool]]:
    """Width of each of the encoder's stages, and whether each downsampler goes along time too (Wan 2.2)."""
    widths: list[int] = []
    while (name := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in layout:
        widths.append(layout[name].shape[0])
    stems = [f"encoder.down_blocks.{number}.downsampler" for number in range(len(widths) - 1)]
    return widths, [f"{stem}.time_conv.weight" in layout for stem in stems]


def _flat(layout: Layout) -> tuple[list[int], list[bool]]:
    """As `_staged`, of Wan 2.1, whose encoder is one list of blocks."""
    widths: list[int] = []
    samplers: list[bool] = []
    number, begins = 0, True
    while True:
        stem = f"encoder.down_blocks.{number}"
        if f"{stem}.resample.1.weight" in layout:
            samplers.append(f"{stem}.time_conv.weight" in layout)
            begins = True
        elif f"{stem}.conv1.weight" in layout:
            if begins:
                widths.append(layout[f"{stem}.conv1.weight"].shape[0])
            begins = False
        else:
            return widths, samplers
        number += 1
