"""What a plan is told of references is what each family makes of them, in shapes and types, without its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import cases

from burnish.conditioning import Conditioning
from burnish.families.registry import family_named
from burnish.family import ModelSource
from burnish.planner.recipe import Shape
from burnish.planner.references import shown

TinyFolder = Callable[[str], Path]
SIDE = 128
SEEING = (
    "flux_kontext",
    "flux_fill",
    "flex2_both",
    "flux2",
    "hidream_e1",
    "hunyuan_video_i2v",
    "hunyuan_video_i2v_concat",
    "hunyuan_video15_i2v",
    "ltx_first_frame",
    "omnigen2",
    "qwen_image_edit",
    "qwen_image_edit_2511",
    "qwen_image21",
    "sd15_inpainting",
    "wan21_i2v",
    "wan21_flf2v",
    "wan22_i2v",
    "wan_vace_control",
)


def described(told: Conditioning) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(one.shape), one.dtype) for name, one in told.items()}


@pytest.mark.parametrize("name", SEEING)
def test_a_plan_sees_what_a_run_sees(tiny_folder: TinyFolder, name: str) -> None:
    kind = family_named(cases()[name].family)
    source = ModelSource(str(tiny_folder(name)))
    loaded = kind.load(source, frozenset({"vae"}), dtype=torch.float32, device="cpu")
    can = loaded.capabilities
    assert can.references
    frames = 1 + (loaded.latents.frame_compression or 0) if can.video else 1
    count = max(1, can.own_references)
    target = (SIDE, SIDE)
    sizes = [
        target if number < can.own_references else loaded.reference_size(*target, target)
        for number in range(count)
    ]
    pictures = [torch.zeros(1, 3, *size) for size in sizes]
    mask = torch.ones(1, 1, *target) if can.masks else None
    real = loaded.encode_references(pictures, mask_B1HW=mask, frames=frames)
    skeleton = kind.skeleton(of=loaded, parts=frozenset({"vae"}), dtype=torch.float32)
    planned = shown(skeleton, Shape(SIDE, SIDE, frames, references=count, masked=can.masks))
    assert described(planned) == described(real)
