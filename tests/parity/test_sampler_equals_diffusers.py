"""From the same seed our sampler draws what the diffusers pipeline draws (fp32, CPU)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from reference import HEIGHT, NEGATIVES, PROMPTS, SEEDS, STEPS, WIDTH, pipeline_output, with_scheduler
from torch import Tensor

from burnish.families.registry import detect_family
from burnish.family import Family, ModelSource
from burnish.sampling.sampler import PictureRequest, draw_latents, encode_requests

TOLERANCE = 1e-4
TinyFolder = Callable[[str], Path]


def loaded(folder: Path) -> Family:
    source = ModelSource(str(folder))
    parts = frozenset(("denoiser", "vae", "text_encoders"))
    return detect_family(source).load(source, parts, dtype=torch.float32, device="cpu")


def our_latents(family: Family, guidance: float, *, true_guidance: float = 1.0) -> Tensor:
    requests = [
        PictureRequest(prompt, negative, seed, HEIGHT, WIDTH, STEPS, guidance, true_guidance=true_guidance)
        for prompt, negative, seed in zip(PROMPTS, NEGATIVES, SEEDS, strict=True)
    ]
    encoded = encode_requests(family, requests)
    return torch.stack(draw_latents(family, encoded, device="cpu", dtype=torch.float32))


def assert_same(ours: Tensor, reference: Tensor) -> None:
    assert ours.shape == reference.shape
    assert reference.std() > 0.1, "the reference is flat: it would not tell a wrong sampler from a right one"
    torch.testing.assert_close(ours, reference, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("scheduler", "guidance"),
    [
        (DDIMScheduler, 1.0),
        (DDIMScheduler, 6.5),
        (PNDMScheduler, 1.0),
        (PNDMScheduler, 6.5),
        (EulerDiscreteScheduler, 1.0),
        (EulerDiscreteScheduler, 6.5),
        (HeunDiscreteScheduler, 6.5),  # two turns per step
        (DPMSolverMultistepScheduler, 6.5),
        (EulerAncestralDiscreteScheduler, 6.5),  # draws noise on the way
    ],
)
def test_sd15(tiny_sd15: Path, tmp_path: Path, scheduler: type, guidance: float) -> None:
    changes = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    folder = with_scheduler(tiny_sd15, tmp_path / "model", scheduler, **changes)
    reference = pipeline_output(
        folder, output="latent", guidance_scale=guidance, negative_prompt=list(NEGATIVES)
    )
    assert_same(our_latents(loaded(folder), guidance), reference)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_sd15_that_predicts_v(tiny_sd15: Path, tmp_path: Path, zero_terminal_snr: bool) -> None:
    folder = with_scheduler(
        tiny_sd15,
        tmp_path / "model",
        DDIMScheduler,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero_terminal_snr,
        timestep_spacing="trailing",
    )
    family = loaded(folder)
    assert family.schedule.prediction == "v"
    reference = pipeline_output(folder, output="latent", guidance_scale=5.0, negative_prompt=list(NEGATIVES))
    assert_same(our_latents(family, 5.0), reference)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_sdxl(tiny_sdxl: Path, guidance: float) -> None:
    reference = pipeline_output(
        tiny_sdxl, output="latent", guidance_scale=guidance, negative_prompt=list(NEGATIVES)
    )
    assert_same(our_latents(loaded(tiny_sdxl), guidance), reference)


@pytest.mark.parametrize(("guidance", "true_guidance"), [(3.5, 1.0), (1.0, 1.0), (2.0, 4.0)])
def test_flux_dev(tiny_flux: Path, guidance: float, true_guidance: float) -> None:
    family = loaded(tiny_flux)
    reference = pipeline_output(
        tiny_flux,
        output="latent",
        guidance_scale=guidance,
        true_cfg_scale=true_guidance,
        negative_prompt=list(NEGATIVES),
        max_sequence_length=512,
    )
    assert_same(our_latents(family, guidance, true_guidance=true_guidance), unpacked(reference))


def test_flux_schnell(tiny_flux_schnell: Path) -> None:
    reference = pipeline_output(
        tiny_flux_schnell, output="latent", guidance_scale=0.0, max_sequence_length=256
    )
    assert_same(our_latents(loaded(tiny_flux_schnell), 0.0), unpacked(reference))


def unpacked(patches: Tensor) -> Tensor:
    """As diffusers' FluxPipeline._unpack_latents, for latents an eighth of the picture's size."""
    rows, columns = HEIGHT // 16, WIDTH // 16
    latents = patches.view(len(patches), rows, columns, patches.shape[2] // 4, 2, 2)
    return latents.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), -1, rows * 2, columns * 2)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "flux_schnell"])
def test_pixels(tiny_folder: TinyFolder, name: str) -> None:
    folder = tiny_folder(name)
    family = loaded(folder)
    longest = {"flux": 512, "flux_schnell": 256}
    more = {"max_sequence_length": longest[name]} if name in longest else {"negative_prompt": list(NEGATIVES)}
    reference = pipeline_output(folder, output="pt", guidance_scale=3.0, **more)
    latents = our_latents(family, 3.0)
    with torch.no_grad():
        pixels = torch.cat([family.decode_latents(one[None]) for one in latents])
    assert_same((pixels / 2 + 0.5).clamp(0, 1), reference)


def test_a_picture_does_not_depend_on_its_batch(tiny_sdxl: Path) -> None:
    """Requests of two sizes and step counts in one call, against each drawn alone."""
    family = loaded(tiny_sdxl)
    requests = [
        PictureRequest("a cat", seed=1, height=64, width=64, steps=2, guidance=4.0),
        PictureRequest("a dog", seed=2, height=64, width=96, steps=3, guidance=1.0),
        PictureRequest("a red chair", "blurry", seed=3, height=64, width=64, steps=2, guidance=9.0),
    ]
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    encoded = encode_requests(family, requests)
    together = draw_latents(family, encoded, device="cpu", dtype=torch.float32, progress=tell)
    for one, latents in zip(encoded, together, strict=True):
        (alone,) = draw_latents(family, [one], device="cpu", dtype=torch.float32)
        torch.testing.assert_close(latents, alone, atol=TOLERANCE, rtol=0)
    assert told == [(done, 5) for done in range(1, 6)]
