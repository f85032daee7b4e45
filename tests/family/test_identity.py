"""What the cache's keys hold besides weights: releases and families that use one encoder each in their own way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from burnish.families.registry import family_named
from burnish.family import Family, ModelSource

TinyFolder = Callable[[str], Path]


def opened(family: str, source: ModelSource) -> Family:
    return family_named(family).load(source, frozenset(), dtype=torch.float32, device="cpu")


def test_releases_with_templates_of_their_own_share_no_captions(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """The first Qwen-Image-Edit and that of 2509 have the same text encoder."""
    later, first = tiny_folder("qwen_image_edit_2509"), tmp_path / "first"
    shutil.copytree(later, first)
    index = json.loads((first / "model_index.json").read_text())
    (first / "model_index.json").write_text(json.dumps({**index, "_class_name": "QwenImageEditPipeline"}))
    one, other = (opened("qwen_image_edit", ModelSource(str(folder))) for folder in (later, first))
    assert one.identity("text_encoders") != other.identity("text_encoders")
    assert one.identity("denoiser") == other.identity("denoiser")


def test_families_that_read_other_layers_of_one_encoder_share_no_captions(tiny_folder: TinyFolder) -> None:
    """FLUX.2 klein and Z-Image read the same file of Qwen3."""
    file = tiny_folder("z_image") / "text_encoder" / "model.safetensors"
    identities = {
        opened(family, ModelSource(str(tiny_folder(name)), text_encoders=(file,))).identity("text_encoders")
        for name, family in (("flux2_klein", "flux2"), ("z_image", "z_image"))
    }
    assert len(identities) == 2


def test_families_that_scale_one_vae_otherwise_share_no_latents(tiny_folder: TinyFolder) -> None:
    """Stable Diffusion 1 and XL, given the same file of a VAE, as ComfyUI keeps it apart."""
    vae = tiny_folder("sd15") / "vae" / "diffusion_pytorch_model.safetensors"
    one, other = (opened(name, ModelSource(str(tiny_folder(name)), vae=vae)) for name in ("sd15", "sdxl"))
    assert one.identity("vae") != other.identity("vae")
