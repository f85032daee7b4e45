"""Every family on a pretended accelerator: whatever it makes on the way is made where its modules are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from pretend_device import DEVICE, Far, move, moved, pretended
from tiny import cases
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource
from burnish.latent_shape import PictureInfo
from burnish.sampling.sampler import PictureRequest, draw_pictures

TinyFolder = Callable[[str], Path]
# A clip's pipeline drawn as a still is the same pipeline.
FAMILY_OF = {
    "sd15": "sd15",
    "sdxl": "sdxl",
    **{name: case.family for name, case in cases().items() if not name.endswith("_still")},
}
# One of each way to draw: schedulers and their steps, guides, references and masks, first frames, sound.
DRAWN = (
    "sd15",
    "sdxl",
    "sd15_inpainting",
    "flux",
    "flux_kontext",
    "flux_fill",
    "hidream",
    "omnigen2",
    "wan22",
    "wan21_i2v",
    "ltx2",
    "pixart_sigma",
)
SIDE = 128
PROMPTS = ["a photo of a sks dog", "a chair"]


def modules_of(value: object, depth: int = 4) -> list[nn.Module]:
    """Those in the attributes of a family, and of what holds its parts."""
    if isinstance(value, nn.Module):
        return [value]
    if depth == 0:
        return []
    names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
    inside = [getattr(value, name) for name in names]
    if isinstance(value, dict | list | tuple):
        inside = list(value.values() if isinstance(value, dict) else value)
    return [module for one in inside for module in modules_of(one, depth - 1)]


def on_the_device(folder: Path, name: str) -> Family:
    parts = frozenset(("denoiser", "vae", "text_encoders"))
    kind = family_named(FAMILY_OF[name])
    family = kind.load(ModelSource(str(folder)), parts, dtype=torch.float32, device="cpu")
    modules = modules_of(family)
    assert len(modules) >= 3
    for module in modules:
        move(module)
    return family


def cached(conditioning: Conditioning) -> Conditioning:
    """By way of the CPU, as from the cache."""
    return conditioning.to("cpu").to(DEVICE)


def test_operations_with_tensors_of_both_devices_are_refused() -> None:
    linear = nn.Linear(3, 3)
    move(linear)
    with pretended():
        assert isinstance(linear(torch.zeros(1, 3, device=DEVICE)), Far)
        with pytest.raises(RuntimeError, match="two devices"):
            linear(torch.zeros(1, 3))


@pytest.mark.parametrize("name", FAMILY_OF)
def test_what_a_family_makes_is_made_where_its_modules_are(tiny_folder: TinyFolder, name: str) -> None:
    family = on_the_device(tiny_folder(name), name)
    can = family.capabilities
    frames = 1 + (family.latents.frame_compression or 0) if can.video else 1
    with pretended():
        assert isinstance(family.predict(*family.example(SIDE, SIDE, batch=2, frames=frames)), Far)
        time = (frames,) if can.video else ()
        latents = family.encode_pixels(torch.zeros(1, 3, *time, SIDE, SIDE, device=DEVICE))
        assert isinstance(family.decode_latents(latents), Far)

        own = can.masks or can.first_frame
        references = [torch.zeros(3, SIDE, SIDE)] * min(2 if can.last_frame or not own else 1, can.references)
        seen = [references] * len(PROMPTS) if can.prompts_see_references else ()
        told = family.encode_prompts(PROMPTS, seen)
        told = told.merged(family.describe_pictures([PictureInfo.whole(SIDE, SIDE)] * len(PROMPTS)))
        noisy: Tensor = torch.zeros(2, *family.latents.of(SIDE, SIDE, frames), device=DEVICE)
        t_B = moved(torch.tensor([0.3, 0.9]), DEVICE)
        if not own:
            assert isinstance(family.predict(noisy, t_B, cached(told)), Far)
        if references:
            shown = family.encode_references(
                [moved(torch.stack([one] * 2), DEVICE) for one in references],
                mask_B1HW=torch.ones(2, 1, SIDE, SIDE, device=DEVICE) if can.masks else None,
                frames=frames,
            )
            assert isinstance(family.predict(noisy, t_B, cached(told.merged(shown))), Far)


@pytest.mark.parametrize("name", DRAWN)
def test_a_sample_is_drawn_there(tiny_folder: TinyFolder, name: str, tmp_path: Path) -> None:
    family = on_the_device(tiny_folder(name), name)
    can = family.capabilities
    shown = tmp_path / "shown.png"
    Image.new("RGB", (SIDE, SIDE), (200, 10, 10)).save(shown)
    own = can.masks or can.first_frame
    request = PictureRequest(
        "a cat",
        negative="ugly",
        height=SIDE,
        width=SIDE,
        steps=2,
        guidance=3.0,
        frames=1 + (family.latents.frame_compression or 0) if can.video else 1,
        references=(shown,) * min(2 if can.last_frame or not own else 1, can.references),
        mask=shown if can.masks else None,
    )
    with pretended():
        (drawn,) = draw_pictures(family, [request], device=DEVICE, dtype=torch.float32)
    assert drawn
