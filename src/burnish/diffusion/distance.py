"""How far a prediction is from its target, place by place and as a mean over each sample."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.config.objective import (
    Absolute,
    AnyLoss,
    Huber,
    LogCosh,
    PseudoHuber,
    SmoothL1,
    Squared,
)
from burnish.diffusion.mixing import signal_to_noise
from burnish.hardware import sent
from burnish.noise_schedule import Schedule


def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over each sample, (B,) float32."""
    return (predicted.float() - target).square().flatten(1).mean(1)


def mean_distance(
    loss: AnyLoss,
    predicted: Tensor,
    target: Tensor,
    delta_B: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean over each sample, (B,) float32.

    Args:
        delta_B: `delta_at` the samples' times, of losses that have one.
        weight: of each place, to be broadcast over channels and frames.
    """
    error = _distance(loss, predicted.float() - target, delta_B)
    return (error if weight is None else error * weight).flatten(1).mean(1)


def delta_at(loss: AnyLoss, schedule: Schedule, t_B: Tensor) -> Tensor | None:
    """Where the loss goes from square to line at `t_B`, (B,); None of losses that do not.

    Scheduled Huber (arXiv 2403.16728, section 4): exponential, delta^t; by the ratio of signal to noise,
    (1 - delta) / (1 + sigma)^2 + delta with sigma = 1 / sqrt(snr).
    """
    if not isinstance(loss, Huber | PseudoHuber | SmoothL1):
        return None
    match loss.decay:
        case "none":
            return torch.full_like(t_B, loss.delta)
        case "exponential":
            return torch.exp(math.log(loss.delta) * t_B)
        case "snr":
            sigma_B = signal_to_noise(schedule, t_B).rsqrt()
            return (1 - loss.delta) / (1 + sigma_B) ** 2 + loss.delta


def _distance(loss: AnyLoss, error: Tensor, delta_B: Tensor | None) -> Tensor:
    """Near zero each is the squared error, but for `mae` and `smooth_l1`, whose slopes are one and two."""
    match loss:
        case Squared():
            return error.square()
        case Absolute():
            return error.abs()
        case LogCosh():
            size = error.abs()
            return 2 * (size + F.softplus(-2 * size) - math.log(2))
    assert delta_B is not None, "these have a delta"
    delta = sent(delta_B, error.device).view(-1, *(1 for _ in error.shape[1:]))
    if isinstance(loss, PseudoHuber):
        return 2 * delta * ((error.square() + delta**2).sqrt() - delta)
    size = error.abs()
    bent = torch.where(size < delta, error.square(), delta * (2 * size - delta))
    return bent if isinstance(loss, Huber) else bent / delta
