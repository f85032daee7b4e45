"""FLUX.2 from ComfyUI's separate files: autoencoder and text encoders are, to the bit, those of the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original_layout import Weights, vae_in_original_names
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from burnish.errors import ModelError
from burnish.families.registry import family_named
from burnish.families.sources import weight_files
from burnish.family import ModelSource
from burnish.placement import Part

TinyFolder = Callable[[str], Path]
LAYERS_READ = {"flux2": 30, "flux2_klein": 27}


def load(source: ModelSource, part: Part) -> Any:
    return family_named("flux2").load(source, frozenset([part]), dtype=torch.float32, device="cpu")


def weights_in(folder: Path) -> Weights:
    return {k: v for file in weight_files(folder) for k, v in load_file(file).items()}


def transformer_file(folder: Path) -> str:
    """Under diffusers' names, as its own single file."""
    return str(weight_files(folder / "transformer")[0])


def assert_same(found: nn.Module, wanted: nn.Module) -> None:
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def native_vae(weights: Weights) -> Weights:
    """As released: the convolutions next to the latents lie inside the coders, the statistics beside them."""
    norm = {name: tensor for name, tensor in weights.items() if name.startswith("bn.")}
    rest = {name: tensor for name, tensor in weights.items() if name not in norm}
    out = vae_in_original_names(rest, stages=4, layers=1)
    moved = {"quant_conv.": "encoder.quant_conv.", "post_quant_conv.": "decoder.post_quant_conv."}
    for old, new in moved.items():
        out = {new + k[len(old) :] if k.startswith(old) else k: v for k, v in out.items()}
    return {**out, **norm}


@pytest.mark.parametrize("prefix", ["", "vae."])
def test_the_autoencoder_of_a_file(tiny_folder: TinyFolder, tmp_path: Path, prefix: str) -> None:
    folder = tiny_folder("flux2")
    native = native_vae(weights_in(folder / "vae"))
    assert "encoder.quant_conv.weight" in native
    file = tmp_path / "flux2-vae.safetensors"
    save_file({prefix + k: v for k, v in native.items()}, file)
    found = load(ModelSource(transformer_file(folder), vae=file), "vae")
    wanted = load(ModelSource(str(folder)), "vae")
    assert_same(found.module("vae"), wanted.module("vae"))
    pixels_B3HW = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(found.encode_pixels(pixels_B3HW), wanted.encode_pixels(pixels_B3HW))


def language_model(folder: Path) -> Weights:
    """Of either encoder, under the names that ComfyUI's files have."""
    weights = weights_in(folder / "text_encoder")
    old = "language_model.model." if any(k.startswith("language_model.") for k in weights) else "model."
    return {"model." + k.removeprefix(old): v for k, v in weights.items() if k.startswith(old)}


def states(encoder: nn.Module, layer: int) -> Tensor:
    ids_BS = torch.arange(20, 40)[None]
    answer: Any = encoder(ids_BS, output_hidden_states=True)
    found: Tensor = answer.hidden_states[layer]
    return found


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_a_klein_text_encoder_of_a_file(tiny_folder: TinyFolder, tmp_path: Path, pruned: bool) -> None:
    folder, read = tiny_folder("flux2_klein"), LAYERS_READ["flux2_klein"]
    file = tmp_path / "qwen.safetensors"
    save_file(
        without_what_is_not_read(language_model(folder), read) if pruned else language_model(folder), file
    )
    found = load(ModelSource(transformer_file(folder), text_encoders=(file,)), "text_encoders")
    wanted = load(ModelSource(str(folder)), "text_encoders")
    assert_same(found.module("text_encoder"), wanted.module("text_encoder"))
    encoders = found.module("text_encoder"), wanted.module("text_encoder")
    assert len(encoders[0].layers) == read
    assert torch.equal(states(encoders[0], read), states(encoders[1], read))


def without_what_is_not_read(weights: Weights, layers: int) -> Weights:
    """Neither the layers above nor the last norm, as in ComfyUI's file of Mistral."""
    return {
        name: tensor
        for name, tensor in weights.items()
        if name != "model.norm.weight" and not (".layers." in name and int(name.split(".")[2]) >= layers)
    }


def test_a_file_without_text_encoder_is_refused(tiny_folder: TinyFolder) -> None:
    with pytest.raises(ModelError, match=r"no text encoder of FLUX\.2: Mistral 3 for dev, Qwen3 for klein"):
        load(ModelSource(transformer_file(tiny_folder("flux2"))), "text_encoders")


def test_the_vae_of_flux1_is_refused(tiny_folder: TinyFolder) -> None:
    flux1 = weight_files(tiny_folder("sd3") / "vae")[0]
    with pytest.raises(ModelError, match=r"no vae of FLUX\.2"):
        load(ModelSource(transformer_file(tiny_folder("flux2")), vae=flux1), "vae")
