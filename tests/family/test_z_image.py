"""Z-Image in a single file: Turbo is told from the base model by the file's name alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.families.registry import detect_family
from burnish.family import ModelSource


@pytest.mark.parametrize(
    ("name", "shift", "steps", "guidance"),
    [("z_image_turbo_bf16", 3.0, 9, 0.0), ("z_image_bf16", 6.0, 50, 4.0)],
)
def test_a_single_file_is_turbo_by_its_name(
    tiny_folder: Callable[[str], Path], tmp_path: Path, name: str, shift: float, steps: int, guidance: float
) -> None:
    weights = load_file(tiny_folder("z_image") / "transformer" / "diffusion_pytorch_model.safetensors")
    file = tmp_path / f"{name}.safetensors"
    save_file(weights, file)
    source = ModelSource(str(file))
    family = detect_family(source).load(source, frozenset(), dtype=torch.float32, device="cpu")
    assert family.name == "z_image"
    assert family.schedule.shift == shift
    assert (family.defaults.steps, family.defaults.guidance) == (steps, guidance)
