"""ComfyUI keeps a model in several files: the denoiser, the VAE, the text encoders. Together they are the folder.

The denoiser's file is that of `test_single_files.py`. A KL autoencoder is written in its original names, other
autoencoders and the text encoders in those of their folder, as such files have them, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_single_files import CASES, Weights, assert_same, family_of, folder_weights, written

from burnish.errors import ModelError
from burnish.families.slots import PipelineSource, Slot, shipped_configs
from burnish.families.weights import load_module
from burnish.family import ModelSource
from burnish.placement import Part

sys.path.insert(0, str(Path(__file__).parents[1] / "family"))
from original_layout import vae_in_original_names

TinyFolder = Callable[[str], Path]


def written_parts(
    folder: Path, family: Any, place: Path, part: Part, *, places_first: bool = False
) -> list[Path]:
    files = []
    for slot in family.slots:
        if (slot.listed_under or slot.part) != part or slot.folder in {file.stem for file in files}:
            continue
        if not (folder / slot.folder).is_dir():
            continue
        weights = folder_weights(folder, slot.folder)
        kl = ("encoder.down_blocks.0.resnets.0.conv1.weight", "encoder.conv_norm_out.weight")
        if all(name in weights for name in kl) and "bn.running_mean" not in weights:
            is_flat = weights["encoder.conv_in.weight"].dim() == 4
            weights = vae_in_original_names(weights, stages=4, layers=1) if is_flat else weights
        if "bn.running_mean" in weights and places_first:
            for name in ("bn.running_mean", "bn.running_var"):  # FLUX.2's order in its own file
                weights[name] = weights[name].reshape(4, -1).T.reshape(-1)
        files.append(place / f"{slot.folder}.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, files[-1])
    return files


def weights_of(source: PipelineSource, slot: Slot, config: dict[str, Any]) -> Weights:
    module = load_module(
        lambda: slot.make(config),
        source.layout(slot),
        dtype=torch.float32,
        device="cpu",
        what=slot.folder,
        unused=slot.unused,
    )
    return dict(module.state_dict())


@pytest.mark.parametrize("name", CASES)
def test_separate_files_give_the_weights_of_the_folder(
    tiny_folder: TinyFolder, tmp_path: Path, name: str
) -> None:
    folder, case = tiny_folder(name), CASES[name]
    family = family_of(case)
    vae = written_parts(folder, family, tmp_path, "vae", places_first=case.vae_places_first)
    encoders = written_parts(folder, family, tmp_path, "text_encoders")
    whole = PipelineSource(ModelSource(str(folder)), family.slots, shipped_configs(family.name), family.title)
    apart = PipelineSource(
        ModelSource(
            str(written(folder, case, tmp_path / "denoiser.safetensors", "")),
            vae=next(file for file in vae if file.stem == "vae"),
            text_encoders=tuple(encoders),
        ),
        family.slots,
        shipped_configs(family.name),
        family.title,
    )
    compared = 0
    for slot in family.slots:
        if not (folder / slot.folder).is_dir() or not whole.has(slot) or not apart.has(slot):
            continue
        config = whole.config(slot)
        assert_same(weights_of(apart, slot, config), weights_of(whole, slot, config))
        compared += 1
    assert compared == len(encoders) + 2


@pytest.mark.parametrize("name", CASES)
def test_a_part_that_no_file_holds_is_named(tiny_folder: TinyFolder, tmp_path: Path, name: str) -> None:
    folder, case = tiny_folder(name), CASES[name]
    file = written(folder, case, tmp_path / "denoiser.safetensors", "")
    family = family_of(case)
    source = PipelineSource(ModelSource(str(file)), family.slots, shipped_configs(family.name), family.title)
    options = {"vae": "model.vae", "text_encoders": "model.text_encoders"}
    for slot in family.slots:
        if slot.part in options and not slot.optional:
            with pytest.raises(ModelError) as error:
                source.layout(slot)
            assert f"holds no {slot.folder.replace('_', ' ')} of {family.title}" in error.value.message
            assert f"`{options[slot.part]}`" in error.value.remedy
