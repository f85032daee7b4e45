"""CLIP's picture encoder sees what transformers' processor shows it, and is found in files of others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from numpy.random import default_rng
from PIL import Image
from safetensors.torch import save_file
from tiny.wan import clip_vision
from tiny_pipelines import drawn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from burnish.data.prepare import pixels_of
from burnish.families.clip_vision import hidden_states, prepared, vision_slot
from burnish.families.weights import layout_of, load_module

SLOT = vision_slot()


@pytest.mark.parametrize("size", [(224, 224), (480, 832), (97, 64), (250, 251), (1031, 300)])
def test_pictures_are_prepared_as_by_transformers(size: tuple[int, int]) -> None:
    height, width = size
    blobs = Image.fromarray(default_rng(1).integers(0, 256, (9, 9, 3), dtype="uint8"))
    picture = blobs.resize((width, height), Image.Resampling.BICUBIC)
    reference = CLIPImageProcessorPil()(picture, return_tensors="pt").pixel_values
    torch.testing.assert_close(prepared(pixels_of(picture)[None]), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_names_with_and_without_prefix(tmp_path: Path, prefix: str) -> None:
    encoder = drawn(0, clip_vision)
    tensors = {prefix + name: tensor for name, tensor in encoder.state_dict().items()}
    tensors["visual_projection.weight"] = torch.zeros(4, 16)
    file = tmp_path / "clip_vision_h.safetensors"
    save_file(tensors, file)
    layout = SLOT.find(layout_of([file]))
    assert layout is not None
    settings = encoder.config.to_dict()
    config = {**SLOT.config_of({**settings, "num_hidden_layers": 1}, layout), "num_attention_heads": 2}
    assert config["num_hidden_layers"] == 3
    for found in (layout, SLOT.tidy(layout_of([file]))):
        loaded = load_module(
            lambda: SLOT.make(config),
            found,
            dtype=torch.float32,
            device="cpu",
            what="CLIP",
            unused=SLOT.unused,
        )
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    seen = hidden_states(encoder, torch.zeros(2, 3, 64, 96))
    assert seen.shape == (2, 257, 16)
