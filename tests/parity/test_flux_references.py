"""FLUX.1 Kontext's references and Fill's holes, beyond what is compared for every family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from reference import NEGATIVES, PROMPTS, SEEDS, STEPS
from safetensors.torch import load_file, save_file
from tiny.flux import HEIGHT, WIDTH, mask, picture, unpack
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.families.flux import Flux
from burnish.family import ModelSource
from burnish.sampling.sampler import PictureRequest, draw_latents, encode_requests

TinyFolder = Callable[[str], Path]
SIZES = ((48, 80), (32, 32))


def loaded(path: Path, *parts: str) -> Flux:
    wanted = frozenset(parts or ("denoiser", "vae", "text_encoders"))
    return Flux.load(ModelSource(str(path)), wanted, dtype=torch.float32, device="cpu")  # type: ignore[arg-type]


@pytest.fixture
def kontext(tiny_folder: TinyFolder) -> Flux:
    return loaded(tiny_folder("flux_kontext"))


def drawn(family: Flux, told: Sequence[Conditioning], true_guidance: float) -> Tensor:
    requests = [
        PictureRequest(prompt, negative, seed, HEIGHT, WIDTH, STEPS, 2.5, true_guidance=true_guidance)
        for prompt, negative, seed in zip(PROMPTS, NEGATIVES, SEEDS, strict=True)
    ]
    encoded = [
        replace(
            one,
            conditioning=one.conditioning.merged(more),
            negative=None if one.negative is None else one.negative.merged(more),
        )
        for one, more in zip(encode_requests(family, requests), told, strict=True)
    ]
    return torch.stack(draw_latents(family, encoded, device="cpu", dtype=torch.float32))


def test_pictures_of_one_batch_follow_references_of_different_sizes(
    tiny_folder: TinyFolder, kontext: Flux
) -> None:
    """With classifier-free guidance on top; diffusers draws each alone."""
    pipeline = FluxKontextPipeline.from_pretrained(tiny_folder("flux_kontext"))
    pipeline.set_progress_bar_config(disable=True)
    references = [picture(*size, seed=5) for size in SIZES]
    expected = [
        pipeline(
            image=reference,
            prompt=prompt,
            negative_prompt=negative,
            true_cfg_scale=3.0,
            guidance_scale=2.5,
            height=HEIGHT,
            width=WIDTH,
            max_area=HEIGHT * WIDTH,
            _auto_resize=False,
            num_inference_steps=STEPS,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
        ).images
        for reference, prompt, negative, seed in zip(references, PROMPTS, NEGATIVES, SEEDS, strict=True)
    ]
    told = [kontext.encode_references([reference * 2 - 1]) for reference in references]
    ours = drawn(kontext, told, 3.0)
    torch.testing.assert_close(ours, unpack(pipeline, torch.cat(expected)), atol=1e-4, rtol=0)


def test_the_reference_changes_the_picture(kontext: Flux) -> None:
    one, other = (kontext.encode_references([picture(48, 80, seed)]) for seed in (1, 2))
    without = drawn(kontext, [Conditioning({})] * 2, 1.0)
    with_one, with_other = (drawn(kontext, [told] * 2, 1.0) for told in (one, other))
    assert (with_one - without).abs().max() > 1e-3
    assert (with_one - with_other).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(800, 800), (1000, 640), (300, 2000), (1999, 1000)])
def test_references_have_the_size_that_diffusers_gives_them(kontext: Flux, size: tuple[int, int]) -> None:
    height, width = size
    _, their_width, their_height = min(
        (abs(width / height - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS
    )
    assert kontext.reference_size(height, width, (1024, 1024)) == (their_height, their_width)
    small = kontext.reference_size(height, width, (512, 512))
    assert all(side % 16 == 0 for side in small)
    assert 0.8 < small[0] * small[1] / 512**2 < 1.2
    assert 0.9 < small[1] / small[0] * their_height / their_width < 1.1


def test_what_each_release_can_follow(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    for name, references, masks in (("flux", 0, False), ("flux_kontext", 1, False), ("flux_fill", 1, True)):
        found = loaded(tiny_folder(name), "vae").capabilities
        assert (found.references, found.masks) == (references, masks)
    plain = loaded(tiny_folder("flux"))
    assert dict(plain.encode_references([picture(HEIGHT, WIDTH, 1)])) == {}
    assert plain.reference_size(100, 200, (64, 96)) == (64, 96)


@torch.no_grad()
def test_fill_without_a_picture_fills_everything(tiny_folder: TinyFolder) -> None:
    family = loaded(tiny_folder("flux_fill"))
    noisy, t_B, conditioning = family.example(HEIGHT, WIDTH, batch=2)
    whole = torch.cat([torch.zeros(2, 16, 8, 12), torch.ones(2, 64, 8, 12)], dim=1)
    told = conditioning.merged({"hole_BCHW": whole})
    assert torch.equal(family.predict(noisy, t_B, conditioning), family.predict(noisy, t_B, told))


@torch.no_grad()
def test_what_is_in_the_hole_is_not_seen(tiny_folder: TinyFolder) -> None:
    family = loaded(tiny_folder("flux_fill"), "vae")
    one, hole = picture(HEIGHT, WIDTH, 1), mask()
    other = torch.where(hole >= 0.5, picture(HEIGHT, WIDTH, 2), one)
    first, second = (family.encode_references([shown], mask_B1HW=hole)["hole_BCHW"] for shown in (one, other))
    assert not torch.equal(one, other)
    assert torch.equal(first, second)
    assert first.shape == (1, 16 + 64, 8, 12)
    assert first[:, 16:].sum() == (hole >= 0.5).sum()


def test_a_reference_survives_a_file(kontext: Flux, tmp_path: Path) -> None:
    told = kontext.encode_references([picture(48, 80, 1)])
    save_file(dict(told), tmp_path / "told.safetensors")
    read = Conditioning(load_file(tmp_path / "told.safetensors"))
    padded = Conditioning.collate([read, kontext.encode_references([picture(64, 96, 2)])])
    assert padded["tokens_reference_BND"].shape == (2, 24, 64)
    assert padded["reference_grid_B2"].tolist() == [[3, 5], [4, 6]]
