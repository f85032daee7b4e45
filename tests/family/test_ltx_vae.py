"""LTX-Video's autoencoder out of single files: names as diffusers' converter turns them, the config from shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo
from diffusers.loaders.single_file_utils import convert_ltx_vae_checkpoint_to_diffusers
from safetensors.torch import save_file
from tiny.ltx import first_vae, later_vae, with_statistics
from tiny_pipelines import drawn
from torch import Tensor

from burnish.families import ltx_vae
from burnish.families.slots import shipped_configs
from burnish.families.weights import layout_of, load_module

Weights = dict[str, Tensor]
FIRST_DOWN = ["0", "0.downsamplers.0", "0.conv_out", "1", "1.downsamplers.0", "1.conv_out"]
FIRST_DOWN += ["2", "2.downsamplers.0", "3"]
FIRST_UP = [
    "0",
    "1.upsamplers.0",
    "1",
    "2.conv_in",
    "2.upsamplers.0",
    "2",
    "3.conv_in",
    "3.upsamplers.0",
    "3",
]
LATER_DOWN = [f"{n}{part}" for n in range(4) for part in ("", ".downsamplers.0")]
LATER_UP = [f"{n}{part}" for n in range(4) for part in (".upsamplers.0", "")]


def released(weights: Weights, down: list[str], up: list[str]) -> Weights:
    """Diffusers' weights in the flat lists of the release."""
    places = {f"encoder.down_blocks.{block}": f"encoder.down_blocks.{n}" for n, block in enumerate(down)}
    places |= {f"decoder.up_blocks.{block}": f"decoder.up_blocks.{n + 1}" for n, block in enumerate(up)}
    places |= {
        "encoder.mid_block": f"encoder.down_blocks.{len(down)}",
        "decoder.mid_block": "decoder.up_blocks.0",
    }
    found = {}
    for name, tensor in weights.items():
        block = max((one for one in places if name.startswith(one + ".")), key=len, default="")
        theirs = places[block] + name[len(block) :] if block else name
        for ours, renamed in (
            ("resnets", "res_blocks"),
            ("conv_shortcut.conv", "conv_shortcut"),
            ("norm3", "norm3.norm"),
            ("latents_mean", "per_channel_statistics.mean-of-means"),
            ("latents_std", "per_channel_statistics.std-of-means"),
        ):
            theirs = theirs.replace(ours, renamed)
        if name.startswith("decoder.time_embedder") or name == "decoder.scale_shift_table":
            theirs = theirs.replace("decoder.", "decoder.last_")
        found["vae." + theirs] = tensor
    found["vae.per_channel_statistics.channel"] = torch.arange(128.0)
    return found


@pytest.mark.parametrize(
    ("make", "down", "up"), [(first_vae, FIRST_DOWN, FIRST_UP), (later_vae, LATER_DOWN, LATER_UP)]
)
def test_a_file_of_the_release_gives_the_same_autoencoder(
    tmp_path: Path, make: Callable[[], AutoencoderKLLTXVideo], down: list[str], up: list[str]
) -> None:
    vae = drawn(0, lambda: with_statistics(make))
    weights = vae.state_dict()
    native = released(weights, down, up)
    wide = dict(native)
    if make is later_vae:  # by this width diffusers' converter tells the release
        wide["vae.encoder.conv_out.conv.weight"] = torch.zeros(1, 2048)
    converted = convert_ltx_vae_checkpoint_to_diffusers(wide)
    converted["encoder.conv_out.conv.weight"] = weights["encoder.conv_out.conv.weight"]
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in weights.items())

    save_file({name: tensor.contiguous() for name, tensor in native.items()}, tmp_path / "vae.safetensors")
    slot = ltx_vae.ltx_vae_slot()
    layout = slot.find(layout_of([tmp_path / "vae.safetensors"]))
    assert layout is not None
    config = slot.config_of(shipped_configs("ltx")["vae"], layout)
    for key, value in vae.config.items():
        if key in config:
            assert config[key] == (list(value) if isinstance(value, tuple) else value), key
    found = load_module(
        lambda: slot.make(config), layout, dtype=torch.float32, device="cpu", what="VAE", unused=slot.unused
    )
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in weights.items())
    latents = torch.randn(1, 128, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ltx_vae.decode(found, latents), ltx_vae.decode(vae, latents))
