"""Diffusers has no loader for PixArt's adapters; peft reads the same file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers_rules
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import adaptable_modules
from burnish.adapters.targeting import choose_modules
from burnish.config.method import Lora
from burnish.export.adapter_file import write_adapter
from burnish.export.verify import verify_adapter
from burnish.families.pixart import PixArt
from burnish.family import ModelSource
from burnish.latent_shape import PictureInfo

TinyFolder = Callable[[str], Path]


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", "all"])
def test_peft_loads_all_of_an_adapter(tiny_folder: TinyFolder, tmp_path: Path, targets: str) -> None:
    folder, path = tiny_folder("pixart_sigma"), tmp_path / "a.safetensors"
    ours, theirs = (DiffusionPipeline.from_pretrained(folder).transformer for _ in range(2))
    ours.requires_grad_(False)
    method = Lora(rank=3, alpha=5.0, targets=targets)
    chosen = choose_modules(ours, PixArt.targets, PixArt.default_targets, method)
    adapter = AdapterSet.attach(ours, chosen, dropout=0.0, seed=5)
    for layer in adapter.layers.values():
        layer.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(6))
    write_adapter(
        path,
        adapter.weights(),
        part="transformer",
        keys=PixArt.export,
        modules=adaptable_modules(ours),
        format="auto",
        dtype=torch.float32,
        metadata={},
    )
    verify_adapter(path, adapter.weights(), ours, part="transformer", keys=PixArt.export)
    file = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}
    modules = [key.removesuffix(".lora_A.weight") for key in file if key.endswith(".lora_A.weight")]
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=3, target_modules=modules), theirs)
    left = set_peft_model_state_dict(theirs, file)
    assert left.unexpected_keys == []
    assert not any("lora_" in key for key in left.missing_keys)
    diffusers_rules.assert_same_deltas(diffusers_rules.deltas(theirs), adapter.weights())


def test_alpha_of_1024_pixels_is_told_the_size(tiny_folder: TinyFolder) -> None:
    def told(name: str) -> dict[str, torch.Tensor]:
        family = PixArt.load(
            ModelSource(str(tiny_folder(name))), frozenset(), dtype=torch.float32, device="cpu"
        )
        return dict(family.describe_pictures([PictureInfo((900, 500), (0, 4), (768, 1024))]))

    assert told("pixart_sigma") == told("pixart_alpha_512") == {}
    conditions = told("pixart_alpha")
    assert conditions["size_B2"].tolist() == [[768.0, 1024.0]]
    assert conditions["shape_B1"].tolist() == [[0.75]]
