"""How data and noise are mixed at a time, and what a denoiser is to say about the mixture."""

from __future__ import annotations

from torch import Tensor

from burnish.hardware import sent
from burnish.noise_schedule import Schedule


def noisy_and_target(
    schedule: Schedule,
    data_BCHW: Tensor,
    noise_BCHW: Tensor,
    t_B: Tensor,
    mixed_BCHW: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The noisy latents at `t_B` and what the denoiser should say about them, both of the data's shape.

    The times may be on the CPU whatever the device of the data.

    Args:
        mixed_BCHW: noise that is mixed in, where it is another than the one that is learned.
    """
    column = (-1,) + (1,) * (data_BCHW.dim() - 1)
    signal, sigma = (sent(factor_B, data_BCHW.device).view(column) for factor_B in mixing(schedule, t_B))
    noisy_BCHW = signal * data_BCHW + sigma * (noise_BCHW if mixed_BCHW is None else mixed_BCHW)
    match schedule.prediction:
        case "velocity":
            return noisy_BCHW, noise_BCHW - data_BCHW
        case "epsilon":
            return noisy_BCHW, noise_BCHW
        case "v":
            return noisy_BCHW, signal * noise_BCHW - sigma * data_BCHW


def signal_to_noise(schedule: Schedule, t_B: Tensor) -> Tensor:
    """Ratio of signal variance to noise variance at `t_B`, shape (B,), float32, kept off 0 and infinity."""
    signal_B, noise_B = mixing(schedule, t_B)
    return ((signal_B / noise_B.clamp(min=1e-6)) ** 2).clamp(min=1e-8)


def mixing(schedule: Schedule, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of data and noise at `t_B`, each (B,) float32."""
    if schedule.alphas_cumprod is None:
        return 1 - t_B, t_B
    index_B = (t_B * schedule.steps).round().long().clamp(0, schedule.steps - 1)
    # On the CPU, in float64: not every device has that type.
    alpha_B = schedule.alphas_cumprod.cpu()[index_B.cpu()]
    return alpha_B.sqrt().float().to(t_B.device), (1 - alpha_B).sqrt().float().to(t_B.device)
