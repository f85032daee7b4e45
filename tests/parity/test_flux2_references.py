"""FLUX.2 follows reference pictures as its pipelines do, several and of different sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from numpy.random import default_rng
from PIL import Image
from reference import PROMPTS, SEEDS, STEPS
from tiny import cases
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.data.prepare import pixels_of
from burnish.families.registry import family_named
from burnish.family import ModelSource
from burnish.sampling.sampler import EncodedRequest, PictureRequest, draw_latents, encode_requests

TinyFolder = Callable[[str], Path]
SIZE, GUIDANCE = (64, 96), 3.0


def picture(seed: int, height: int, width: int) -> Image.Image:
    blobs = Image.fromarray(default_rng(seed).integers(0, 256, (4, 4, 3), dtype="uint8"))
    return blobs.resize((width, height), Image.Resampling.BICUBIC)


PICTURES = (picture(1, 64, 80), picture(2, 96, 64))


def loaded(folder: Path) -> Any:
    parts = frozenset(("denoiser", "vae", "text_encoders"))
    return family_named("flux2").load(ModelSource(str(folder)), parts, dtype=torch.float32, device="cpu")


def following(family: Any, one: EncodedRequest, pictures: Sequence[Image.Image]) -> EncodedRequest:
    """A request that follows pictures, with prompt and without."""
    about: Conditioning = family.encode_references([pixels_of(one)[None] for one in pictures])
    negative = None if one.negative is None else one.negative.merged(about)
    return replace(one, conditioning=one.conditioning.merged(about), negative=negative)


def drawn(family: Any, encoded: Sequence[EncodedRequest]) -> list[Tensor]:
    return draw_latents(family, encoded, device="cpu", dtype=torch.float32)


def requests(family: Any) -> list[EncodedRequest]:
    return encode_requests(
        family,
        [
            PictureRequest(prompt, "", seed, *SIZE, STEPS, GUIDANCE)
            for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
        ],
    )


@pytest.mark.parametrize("name", ["flux2", "flux2_klein", "flux2_klein_distilled"])
def test_with_references_the_latents_are_the_pipelines(tiny_folder: TinyFolder, name: str) -> None:
    folder = tiny_folder(name)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        prompt=list(PROMPTS),
        image=list(PICTURES),
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        guidance_scale=1.0 if name == "flux2_klein_distilled" else GUIDANCE,
    ).images
    family = loaded(folder)
    plain = requests(family)
    ours = torch.stack(drawn(family, [following(family, one, PICTURES) for one in plain]))
    torch.testing.assert_close(ours, cases()[name].unpack(pipeline, found.detach()), atol=1e-4, rtol=0)
    assert (torch.stack(drawn(family, plain)) - ours).abs().max() > 0.01, "the references have no effect"


def test_references_of_other_sizes_beside_it_change_nothing(tiny_folder: TinyFolder) -> None:
    family = loaded(tiny_folder("flux2_klein"))
    first, second = requests(family)
    first, second = following(family, first, PICTURES[:1]), following(family, second, PICTURES)
    alone = [*drawn(family, [first]), *drawn(family, [second])]
    for together, one in zip(drawn(family, [first, second]), alone, strict=True):
        torch.testing.assert_close(together, one, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("height", "width", "taken"), [(512, 700, (512, 688)), (2000, 1000, (1440, 720)), (20, 10, (16, 16))]
)
def test_references_keep_their_size_up_to_a_megapixel(
    tiny_folder: TinyFolder, height: int, width: int, taken: tuple[int, int]
) -> None:
    family = family_named("flux2").load(
        ModelSource(str(tiny_folder("flux2"))), frozenset(), dtype=torch.float32, device="cpu"
    )
    assert family.reference_size(height, width, (512, 512)) == taken
