"""Noise, time, target, weighting: what is learned.

An objective sees a batch and a family and gives one loss per sample. Noise and time are pure functions of
(seed, micro-step, sample id), so that workers, ranks and resumes cannot change them (law L1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from burnish.data.batch import Batch
from burnish.family import Conditioning, Family, Schedule, TokenShift
from burnish.hardware import sent
from burnish.randomness import torch_generator

TimestepLaw = Literal["uniform", "logit_normal"]
Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True, slots=True)
class Timesteps:
    """How training times are drawn before the shift."""

    law: TimestepLaw = "uniform"
    mean: float = 0.0  # of the normal whose sigmoid is taken
    std: float = 1.0
    low: float = 0.0  # the drawn times are squeezed into [low, high]
    high: float = 1.0


@dataclass(frozen=True, slots=True)
class Denoising:
    """Predict the velocity, the noise or v from noisy latents; mean squared error per sample."""

    schedule: Schedule
    timesteps: Timesteps = Timesteps()
    shift: float | TokenShift = 1.0
    sampler_steps: int = 50  # what a shift that depends on the number of steps is told
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    guidance: float | None = 1.0  # value fed to a guidance embedding; None bypasses it

    def losses(
        self, family: Family, batch: Batch, seed: int, predict: Predict | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss per sample in float32, shape (B,), and the times drawn, shape (B,).

        `predict` stands in for `family.predict` where a caller wraps it (autocast, adapters off).
        """
        noise_BCHW = self.draw_noise(batch, seed)
        t_B = self.draw_times(batch, seed, family.latents.tokens(batch.latents_BCHW.shape))
        audio_noise_BCLF = self.draw_audio_noise(batch, seed)
        return self.losses_at(family, batch, noise_BCHW, t_B, predict, audio_noise_BCLF), t_B

    def losses_at(
        self,
        family: Family,
        batch: Batch,
        noise_BCHW: Tensor,
        t_B: Tensor,
        predict: Predict | None = None,
        audio_noise_BCLF: Tensor | None = None,
    ) -> Tensor:
        """Loss per sample at given noise and times: what validation holds fixed.

        Times that are on the CPU stay there for all that is computed of them alone: no device is asked.
        """
        device = batch.latents_BCHW.device
        data_BCHW, noise_BCHW = batch.latents_BCHW.float(), sent(noise_BCHW, device)
        conditioning = batch.conditioning
        if family.capabilities.guidance_embedding and self.guidance is not None:
            guidance_B = torch.full(t_B.shape, self.guidance, dtype=t_B.dtype, device=device)
            conditioning = conditioning.merged({"guidance_B": guidance_B})
        if family.capabilities.picks_by_time:
            conditioning = conditioning.merged({"time_B": t_B})

        noisy_BCHW, target_BCHW = noisy_and_target(self.schedule, data_BCHW, noise_BCHW, t_B)
        if batch.audio_BCLF is not None:
            assert family.audio is not None, "a batch has sound for a family with sound"
            assert audio_noise_BCLF is not None, "sound has noise of its own"
            # As LTX-2's trainer does: frames and sound at one time, as in sampling, and their errors added up.
            noisy_BCLF, target_BCLF = noisy_and_target(
                self.schedule, batch.audio_BCLF.float(), sent(audio_noise_BCLF, device), t_B
            )
            both = family.audio.predict(noisy_BCHW, noisy_BCLF, sent(t_B, device), conditioning)
            loss_B = squared_error(both[0], target_BCHW) + squared_error(both[1], target_BCLF)
        else:
            predicted_BCHW = (predict or family.predict)(noisy_BCHW, sent(t_B, device), conditioning)
            loss_B = squared_error(predicted_BCHW, target_BCHW)
        return loss_B if self.min_snr_gamma is None else loss_B * sent(self.snr_weight(t_B), device)

    def draw_noise(self, batch: Batch, seed: int) -> Tensor:
        """Standard normal noise (B, C, H, W) on the CPU, plus the offset that lets pictures turn dark or bright.

        Noise offset: one normal value per sample and channel, Guttenberg 2023,
        https://www.crosslabs.org/blog/diffusion-with-offset-noise
        """
        shape = batch.latents_BCHW.shape[1:]
        rows = []
        for sample_id in batch.sample_ids:
            generator = torch_generator(seed, "noise", batch.position, sample_id)
            noise_CHW = torch.randn(shape, generator=generator)
            if self.noise_offset:
                offset = torch.randn((shape[0],) + (1,) * (len(shape) - 1), generator=generator)
                noise_CHW = noise_CHW + self.noise_offset * offset
            rows.append(noise_CHW)
        return torch.stack(rows)

    def draw_audio_noise(self, batch: Batch, seed: int) -> Tensor | None:
        """Standard normal noise (B, C, L, F) on the CPU; None without sound."""
        if batch.audio_BCLF is None:
            return None
        shape = batch.audio_BCLF.shape[1:]
        return torch.stack(
            [
                torch.randn(shape, generator=torch_generator(seed, "audio noise", batch.position, sample_id))
                for sample_id in batch.sample_ids
            ]
        )

    def draw_times(self, batch: Batch, seed: int, tokens: int) -> Tensor:
        """Times in [0, 1], shape (B,), float32 on the CPU."""
        draws = []
        for sample_id in batch.sample_ids:
            generator = torch_generator(seed, "time", batch.position, sample_id)
            if self.timesteps.law == "uniform":
                draws.append(torch.rand((), generator=generator))
            else:
                normal = torch.randn((), generator=generator) * self.timesteps.std + self.timesteps.mean
                draws.append(torch.sigmoid(normal))
        low, high = self.timesteps.low, self.timesteps.high
        t_B = torch.stack(draws)
        if self.schedule.is_flow:
            return low + (high - low) * shift_time(t_B, self.shift_at(tokens))
        # An older denoiser knows whole indices only: 0 to 999, as a rule.
        steps = self.schedule.steps
        return ((low + (high - low) * t_B) * steps).floor().clamp(max=steps - 1) / steps

    def shift_at(self, tokens: int) -> float:
        if isinstance(self.shift, float | int):
            return self.shift
        return self.shift.factor(tokens, self.sampler_steps)

    def snr_weight(self, t_B: Tensor) -> Tensor:
        """Min-SNR weight (arXiv 2303.09556, equation 6 and its v form); ones where it is off.

        The weight of an error in the data is min(snr, gamma). An error in epsilon is snr times as large, one in v
        snr + 1 times. A flow has snr = ((1 - t) / t)^2, and data = x_t - t * velocity makes it 1 / t^2 times.
        """
        if self.min_snr_gamma is None:
            return torch.ones_like(t_B)
        snr_B = signal_to_noise(self.schedule, t_B)
        clipped_B = snr_B.clamp(max=self.min_snr_gamma)
        match self.schedule.prediction:
            case "epsilon":
                return clipped_B / snr_B
            case "v":
                return clipped_B / (snr_B + 1)
            case "velocity":
                return clipped_B * t_B**2


def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over each sample, (B,) float32."""
    return (predicted.float() - target).square().flatten(1).mean(1)


def shift_time(t_B: Tensor, shift: float) -> Tensor:
    """Move training time toward the noisy end, as the sampler will at inference.

    `shift = 1` changes nothing; `shift = 3` sends t = 0.5 to 0.75. Stable Diffusion 3 paper
    (arXiv 2403.03206), equation 23.

    Raises:
        ValueError: `shift` is not positive.
    """
    if shift <= 0:
        raise ValueError(f"shift must be positive; got {shift}")
    return shift * t_B / (1 + (shift - 1) * t_B)


def signal_to_noise(schedule: Schedule, t_B: Tensor) -> Tensor:
    """Ratio of signal variance to noise variance at `t_B`, shape (B,), float32, kept off 0 and infinity."""
    signal_B, noise_B = _mixing(schedule, t_B)
    return ((signal_B / noise_B.clamp(min=1e-6)) ** 2).clamp(min=1e-8)


def noisy_and_target(
    schedule: Schedule, data_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The noisy latents at `t_B` and what the denoiser should say about them, both of the data's shape.

    The times may be on the CPU whatever the device of the data.
    """
    column = (-1,) + (1,) * (data_BCHW.dim() - 1)
    signal, sigma = (sent(factor_B, data_BCHW.device).view(column) for factor_B in _mixing(schedule, t_B))
    noisy_BCHW = signal * data_BCHW + sigma * noise_BCHW
    match schedule.prediction:
        case "velocity":
            return noisy_BCHW, noise_BCHW - data_BCHW
        case "epsilon":
            return noisy_BCHW, noise_BCHW
        case "v":
            return noisy_BCHW, signal * noise_BCHW - sigma * data_BCHW


def _mixing(schedule: Schedule, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of data and noise at `t_B`, each (B,) float32."""
    if schedule.alphas_cumprod is None:
        return 1 - t_B, t_B
    index_B = (t_B * schedule.steps).round().long().clamp(0, schedule.steps - 1)
    # On the CPU, in float64: not every device has that type.
    alpha_B = schedule.alphas_cumprod.cpu()[index_B.cpu()]
    return alpha_B.sqrt().float().to(t_B.device), (1 - alpha_B).sqrt().float().to(t_B.device)
