"""The Wan VAE in its original release's names gives the same module as diffusers' folder, and both ways invert."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from tiny_pipelines import drawn
from tiny_video_vae import qwen_image_vae, wan22_vae, wan_vae
from torch import Tensor

from burnish.families import video_vae
from burnish.families.weights import layout_of, load_module

SLOT = video_vae.wan_vae_slot(AutoencoderKLWan.from_config)


def original(state: dict[str, Tensor], *, staged: bool) -> dict[str, Tensor]:
    """Diffusers' names -> those of `wan/modules/vae2_1.py` and `vae2_2.py` of https://github.com/Wan-Video/Wan2.2."""
    rules = [
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"\.conv_in\.", ".conv1."),
        (r"\.norm_out\.", ".head.0."),
        (r"\.conv_out\.", ".head.2."),
        (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.mid_block\.resnets\.0\.", ".middle.0."),
        (r"\.mid_block\.resnets\.1\.", ".middle.2."),
        (r"\.norm1\.", ".residual.0."),
        (r"\.conv1\.(?=(weight|bias)$)(?<!coder\.conv1\.)", ".residual.2."),
        (r"\.norm2\.", ".residual.3."),
        (r"\.conv2\.", ".residual.6."),
        (r"\.conv_shortcut\.", ".shortcut."),
    ]
    if staged:
        rules += [
            (r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.downsamples.\1.downsamples."),
            (r"decoder\.up_blocks\.(\d+)\.resnets\.", r"decoder.upsamples.\1.upsamples."),
            (r"encoder\.down_blocks\.(\d+)\.downsampler\.", r"encoder.downsamples.\1.downsamples.2."),
            (r"decoder\.up_blocks\.(\d+)\.upsampler\.", r"decoder.upsamples.\1.upsamples.3."),
        ]
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if not staged:
            name = name.replace("encoder.down_blocks.", "encoder.downsamples.")
            name = re.sub(r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", _flat_number, name)
        renamed[name] = tensor
    return renamed


def _flat_number(match: re.Match[str]) -> str:
    place = int(match[3]) if match[2] == "resnets" else 3
    return f"upsamples.{4 * int(match[1]) + place}."


def of_released_depth(make: type[AutoencoderKLWan], tiny: AutoencoderKLWan) -> AutoencoderKLWan:
    """Two blocks per stage, as released; the numbers in the original's names depend on it."""
    return drawn(1, lambda: make.from_config({**tiny.config, "num_res_blocks": 2, "dim_mult": [1, 2, 4, 4]}))


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model.", "model."])
@pytest.mark.parametrize("residual", [False, True])
def test_original_names_give_the_same_weights(tmp_path: Path, residual: bool, prefix: str) -> None:
    vae = of_released_depth(AutoencoderKLWan, wan22_vae() if residual else wan_vae())
    native = original(vae.state_dict(), staged=residual)
    assert not native.keys() & {n for n in vae.state_dict() if "resnets" in n}
    if not residual:
        assert convert_wan_vae_to_diffusers(dict(native)).keys() == vae.state_dict().keys()
    file = tmp_path / "vae.safetensors"
    save_file({prefix + name: tensor.contiguous() for name, tensor in native.items()}, file)
    layout = SLOT.find(layout_of([file]))
    assert layout is not None
    shipped = {
        k: vae.config[k] for k in ("latents_mean", "latents_std", "patch_size", "scale_factor_spatial")
    }
    config = SLOT.config_of(shipped, layout)
    assert {k: v for k, v in config.items() if vae.config[k] != v and k != "decoder_base_dim"} == {}
    loaded = load_module(
        lambda: SLOT.make(config), layout, dtype=torch.float32, device="cpu", what="VAE", unused=()
    )
    expected = vae.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_file_without_a_wan_vae_has_none(tmp_path: Path) -> None:
    save_file({"decoder.conv_in.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert SLOT.find(layout_of([tmp_path / "other.safetensors"])) is None


@pytest.mark.parametrize(("make", "factor"), [(wan_vae, 8), (qwen_image_vae, 8), (wan22_vae, 16)])
def test_clips_and_pictures_are_scaled_as_the_config_says(make: Callable[[], Any], factor: int) -> None:
    vae = drawn(2, make)
    pixels_B3THW = torch.rand(1, 3, 5, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, deviation = (
        torch.tensor(vae.config[key])[:, None, None, None] for key in ("latents_mean", "latents_std")
    )
    with torch.no_grad():
        expected = (vae.encode(pixels_B3THW).latent_dist.mean - mean) / deviation
        decoded = vae.decode(expected * deviation + mean).sample
    latents = video_vae.encode(vae, pixels_B3THW)
    assert latents.shape == (1, vae.config.z_dim, 2, 64 // factor, 96 // factor)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(video_vae.decode(vae, latents), decoded)
    still_B3HW = pixels_B3THW[:, :, 0]
    torch.testing.assert_close(
        video_vae.encode(vae, still_B3HW), video_vae.encode(vae, still_B3HW[:, :, None])[:, :, 0]
    )
    torch.testing.assert_close(video_vae.decode(vae, latents[:, :, 0]), decoded[:, :, 0])
