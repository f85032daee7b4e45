"""Our losses against the formulas of diffusers' training examples, written with diffusers' own schedulers.

Sources: examples/text_to_image/train_text_to_image_lora.py (epsilon, v, min-SNR of `compute_snr`) and
examples/dreambooth/train_dreambooth_lora_flux.py (flow).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.config.objective import MinSnr
from burnish.data.batch import Batch
from burnish.diffusion.mixing import noisy_and_target
from burnish.diffusion.times import Timesteps, shift_time
from burnish.diffusion.weights import weight_at
from burnish.families.registry import detect_family
from burnish.family import Family, ModelSource
from burnish.latent_shape import PictureInfo
from burnish.noise_schedule import Prediction, Schedule
from burnish.objective import Denoising

TOLERANCE = 1e-6
TinyFolder = Callable[[str], Path]


def loaded(folder: Path, prediction: Prediction | None = None) -> Family:
    source = ModelSource(str(folder))
    parts = frozenset(("denoiser", "text_encoders"))
    return detect_family(source).load(source, parts, dtype=torch.float32, device="cpu", prediction=prediction)


def batch_of(family: Family, count: int) -> tuple[Batch, Tensor]:
    """Random latents with real prompts, and noise."""
    generator = torch.Generator().manual_seed(3)
    shape = (count, *family.latents.of(64, 64))
    prompts = ["a photo of a sks dog", "blue sky", "", "a red chair"][:count]
    with torch.no_grad():
        conditioning = family.encode_prompts(prompts)
    pictures = [PictureInfo((80, 96), (3, 5), (64, 64))] * count
    batch = Batch(
        latents_BCHW=torch.randn(shape, generator=generator),
        conditioning=conditioning.merged(family.describe_pictures(pictures)),
        weight_B=torch.ones(count),
        sample_ids=tuple(f"sample{number}" for number in range(count)),
        paths=tuple(f"{number}.png" for number in range(count)),
        position=0,
    )
    return batch, torch.randn(shape, generator=generator)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@torch.no_grad()
def test_epsilon_and_v(
    tiny_folder: TinyFolder, name: str, prediction: Prediction, gamma: float | None
) -> None:
    family = loaded(tiny_folder(name), prediction)
    batch, noise = batch_of(family, 4)
    timesteps = torch.tensor([1, 250, 700, 999])
    weighting = None if gamma is None else MinSnr(gamma=gamma)
    ours = Denoising(family.schedule, weighting=weighting).losses_at(family, batch, noise, timesteps / 1000)

    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction],
    )
    noisy = scheduler.add_noise(batch.latents_BCHW, noise, timesteps)
    target = (
        noise if prediction == "epsilon" else scheduler.get_velocity(batch.latents_BCHW, noise, timesteps)
    )
    predicted = unet_output(family, noisy, timesteps, batch.conditioning)
    loss = F.mse_loss(predicted.float(), target.float(), reduction="none")
    loss = loss.mean(dim=list(range(1, loss.dim())))
    if gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        weights = torch.stack([snr, gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
        loss = loss * (weights / snr if prediction == "epsilon" else weights / (snr + 1))
    torch.testing.assert_close(ours, loss, atol=TOLERANCE, rtol=TOLERANCE)


def unet_output(family: Family, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The UNet called as the example script calls it."""
    more = {}
    if "time_ids_B6" in conditioning:
        more["added_cond_kwargs"] = {
            "text_embeds": conditioning["pooled_BD"],
            "time_ids": conditioning["time_ids_B6"].float(),
        }
    unet = family.denoisers["unet"]
    output: Tensor = unet(noisy, timesteps, conditioning["tokens_BSD"], return_dict=False, **more)[0]
    return output


@pytest.mark.parametrize(("name", "guidance"), [("flux", 1.0), ("flux", 3.5), ("flux_schnell", 1.0)])
@torch.no_grad()
def test_flow(tiny_folder: TinyFolder, name: str, guidance: float) -> None:
    family = loaded(tiny_folder(name))
    batch, noise = batch_of(family, 3)

    # As the script: times are entries of the scheduler's own table of 1000 sigmas.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.manual_seed(0)
    density = compute_density_for_timestep_sampling("logit_normal", 3, logit_mean=0.0, logit_std=1.0)
    indices = (density * scheduler.config.num_train_timesteps).long()
    timesteps = scheduler.timesteps[indices]
    sigmas = scheduler.sigmas[indices].view(-1, 1, 1, 1)
    data = batch.latents_BCHW
    noisy = (1.0 - sigmas) * data + sigmas * noise

    transformer = family.denoisers["transformer"]
    embeds_guidance = family.capabilities.guidance_embedding
    tokens = batch.conditioning["tokens_BSD"]
    packed = transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, 3, 16, 8, 8),
        timestep=timesteps / 1000,
        guidance=torch.tensor([guidance]).expand(3) if embeds_guidance else None,
        pooled_projections=batch.conditioning["pooled_BD"],
        encoder_hidden_states=tokens,
        txt_ids=torch.zeros(tokens.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(3, 4, 4, "cpu", torch.float32),
        return_dict=False,
    )[0]
    predicted = FluxPipeline._unpack_latents(packed, 64, 64, 8)
    loss = torch.mean(((predicted - (noise - data)) ** 2).reshape(3, -1), 1)

    objective = Denoising(family.schedule, guidance=guidance)
    ours = objective.losses_at(family, batch, noise, sigmas.flatten())
    torch.testing.assert_close(ours, loss, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (1024, 1024), (832, 1216)])
def test_training_shift_is_the_one_the_sampler_uses(tiny_flux: Path, height: int, width: int) -> None:
    """Shifted times against the sigmas FlowMatchEuler makes with the mu of the FLUX pipeline."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    family = loaded(tiny_flux)
    objective = Denoising(family.schedule, Timesteps(), shift=family.schedule.shift)
    tokens = (height // 16) * (width // 16)
    assert family.latents.tokens((16, height // 8, width // 8)) == tokens
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    plain = torch.linspace(1.0, 0.1, 10, dtype=torch.float64)
    scheduler.set_timesteps(sigmas=plain.numpy(), mu=calculate_shift(tokens))
    shifted = shift_time(plain, objective.shift_at(tokens))
    torch.testing.assert_close(shifted.float(), scheduler.sigmas[:-1], atol=TOLERANCE, rtol=0)


def test_the_scheduler_undoes_what_the_objective_mixes(tiny_flux: Path) -> None:
    """diffusers' own step from t to 0 along our target gives the data back: signs and directions agree."""
    schedule = loaded(tiny_flux).schedule
    data, noise = torch.randn(2, 1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    noisy, velocity = noisy_and_target(schedule, data, noise, torch.tensor([0.7]))
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.7])
    restored = scheduler.step(velocity, scheduler.timesteps[0], noisy, return_dict=False)[0]
    torch.testing.assert_close(restored, data, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("t", [0.1, 0.3, 0.5, 0.9])
def test_min_snr_of_a_flow_weighs_the_error_in_the_data(t: float) -> None:
    """Equation 6 of arXiv 2303.09556 for x0: min(snr, gamma) * |x0 - x0'|^2, with x0' = x_t - t * velocity'."""
    gamma = 5.0
    draw = torch.Generator().manual_seed(0)
    data, noise, wrong = (torch.randn(1, 4, 2, 2, generator=draw) for _ in range(3))
    noisy = (1 - t) * data + t * noise
    schedule = Schedule("velocity", {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    weight = weight_at(MinSnr(gamma=gamma), schedule, torch.tensor([t]))
    error_in_velocity = (wrong - (noise - data)).square().mean()
    error_in_data = (noisy - t * wrong - data).square().mean()
    snr = ((1 - t) / t) ** 2
    assert float(weight * error_in_velocity) == pytest.approx(
        min(snr, gamma) * float(error_in_data), rel=1e-4
    )
