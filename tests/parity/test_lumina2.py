"""Lumina 2 beside what is checked for every family: layers without a reader, and the files of ComfyUI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from test_single_files import folder_weights, native_weights
from tiny_gemma import sentencepiece_model

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import adaptable_modules
from burnish.adapters.targeting import choose_modules
from burnish.config.method import Lora
from burnish.errors import AdapterError, ExportError
from burnish.export.adapter_file import write_adapter
from burnish.families import pipeline
from burnish.families.lumina2 import NAMES, Lumina2
from burnish.families.sources import read_json
from burnish.family import ModelSource
from burnish.placement import Part

TinyFolder = Callable[[str], Path]


def test_a_layer_that_no_reader_would_find_is_refused(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder("lumina2"))
    denoiser = pipeline.transformer.requires_grad_(False)
    method = Lora(rank=2, targets="attention", include=["x_embedder"])
    chosen = choose_modules(denoiser, Lumina2.targets, Lumina2.default_targets, method)
    adapter = AdapterSet.attach(denoiser, chosen, dropout=0.0, seed=5)
    with pytest.raises((AdapterError, ExportError), match="x_embedder"):
        write_adapter(
            tmp_path / "a.safetensors",
            adapter.weights(),
            part="transformer",
            keys=Lumina2.export,
            modules=adaptable_modules(denoiser),
            format="comfy",
            dtype=torch.float32,
            metadata={},
        )


def load(source: ModelSource) -> Lumina2:
    parts: frozenset[Part] = frozenset(("denoiser", "vae", "text_encoders"))
    return Lumina2.load(source, parts, dtype=torch.float32, device="cpu")


def test_files_of_comfyui_give_what_the_folder_gives(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder("lumina2")
    parts = ("transformer", "vae", "text_encoder")
    shipped = {part: read_json(folder / part / "config.json") for part in parts}
    shipped["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    monkeypatch.setattr(pipeline, "shipped_configs", lambda name: shipped)
    whole = load(ModelSource(str(folder)))
    native = native_weights(NAMES, folder_weights(folder, "transformer"))
    save_file(native, tmp_path / "lumina.safetensors")
    save_file(folder_weights(folder, "vae"), tmp_path / "ae.safetensors")
    gemma = {f"model.{name}": tensor for name, tensor in folder_weights(folder, "text_encoder").items()}
    pieces = sentencepiece_model(whole.tokenizer("text_encoder"))
    gemma["spiece_model"] = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
    save_file(gemma, tmp_path / "gemma.safetensors")
    apart = ModelSource(
        str(tmp_path / "lumina.safetensors"), tmp_path / "ae.safetensors", (tmp_path / "gemma.safetensors",)
    )
    files = load(apart)
    captions = ["a photo of a sks dog on a red chair, \u732b", "two people walking"]
    expected, found = whole.encode_prompts(captions), files.encode_prompts(captions)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    pixels_B3HW = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(files.encode_pixels(pixels_B3HW), whole.encode_pixels(pixels_B3HW))
    example = whole.example(64, 96, batch=2)
    assert torch.equal(files.predict(*example), whole.predict(*example))
