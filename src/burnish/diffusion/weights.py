"""Weights of the loss by time.

A weight is defined by that of the error in the data, which a model may predict in one of three ways: an error in
epsilon is 1 / snr times as large in the data, one in v 1 / (snr + 1) times; a flow has snr = ((1 - t) / t)^2, and
data = x_t - t * velocity makes it t^2 times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from burnish.config.objective import P2, AnyWeighting, Bell, Debiased, MinSnr, SoftMinSnr
from burnish.diffusion.mixing import signal_to_noise
from burnish.noise_schedule import Schedule


def weight_at(weighting: AnyWeighting, schedule: Schedule, t_B: Tensor) -> Tensor:
    """The weight of the error in what the denoiser predicts, (B,) float32.

    min_snr: min(snr, gamma) of the error in the data (arXiv 2303.09556, equation 6 and its v form).
    soft_min_snr: snr * gamma / (snr + gamma) of it (arXiv 2401.11605, section 3).
    debiased: 1 / sqrt(snr) of the error in epsilon (arXiv 2310.08442), which is sqrt(snr) of that in the data.
    p2: 1 / (k + snr)^gamma of the error in epsilon (arXiv 2204.00227, equation 8).
    bell: exp(-2 (t - 1/2)^2) less its value at the ends, over its mean; of the prediction itself.
    """
    if isinstance(weighting, Bell):
        lowest = math.exp(-0.5)
        mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - lowest
        return (torch.exp(-2 * (t_B - 0.5) ** 2) - lowest) / mean
    snr_B = signal_to_noise(schedule, t_B)
    match weighting:
        case MinSnr(gamma=gamma):
            data_B = snr_B.clamp(max=gamma)
        case SoftMinSnr(gamma=gamma):
            data_B = gamma / (1 + gamma / snr_B)
        case Debiased():
            data_B = snr_B.sqrt()
        case P2(gamma=gamma, snr_offset=k):
            data_B = snr_B / (k + snr_B) ** gamma
    match schedule.prediction:
        case "epsilon":
            return data_B / snr_B
        case "v":
            return data_B / (snr_B + 1)
        case "velocity":
            return data_B * t_B**2
