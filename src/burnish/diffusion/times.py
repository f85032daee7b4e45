"""How training times are drawn: a law, the shift, the part of [0, 1], and parts that come more often."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from burnish.config.objective import (
    AnyTimesteps,
    BetaTimesteps,
    CosMapTimesteps,
    Emphasis,
    LogitNormalTimesteps,
    ModeTimesteps,
    SigmoidTimesteps,
    UniformTimesteps,
)
from burnish.noise_schedule import Schedule


@dataclass(frozen=True, slots=True)
class Timesteps:
    """How training times are drawn."""

    law: AnyTimesteps = field(default_factory=UniformTimesteps)
    low: float = 0.0  # the drawn times are squeezed into [low, high]
    high: float = 1.0
    emphasis: tuple[Emphasis, ...] = ()

    def draw(self, schedule: Schedule, shift: float, generators: Sequence[torch.Generator]) -> Tensor:
        """Times in [0, 1], one per generator, shape (B,), float32 on the CPU."""
        if not self.emphasis or all(part.drawn == 1 for part in self.emphasis):
            return self.placed(
                torch.stack([drawn(self.law, generator) for generator in generators]), schedule, shift
            )
        return torch.cat([self._accepted(schedule, shift, generator) for generator in generators])

    def _accepted(self, schedule: Schedule, shift: float, generator: torch.Generator) -> Tensor:
        """By rejection: a time is kept as often as its factor is of the largest one, so it takes few draws."""
        most = math.prod(max(1.0, part.drawn) for part in self.emphasis)
        while True:
            t_1 = self.placed(drawn(self.law, generator)[None], schedule, shift)
            share = math.prod(part.drawn for part in self.emphasis if _holds(part, float(t_1))) / most
            if float(torch.rand((), generator=generator)) < share:
                return t_1

    def placed(self, t_B: Tensor, schedule: Schedule, shift: float) -> Tensor:
        """Draws of the law as training takes them: shifted, within the range, for older models whole indices."""
        if schedule.is_flow:
            return self.low + (self.high - self.low) * shift_time(t_B, shift)
        # An older denoiser knows whole indices only: 0 to 999, as a rule.
        steps = schedule.steps
        return ((self.low + (self.high - self.low) * t_B) * steps).floor().clamp(max=steps - 1) / steps

    def weight(self, t_B: Tensor) -> Tensor:
        """What the parts say of the loss at `t_B`, (B,)."""
        weight_B = torch.ones_like(t_B)
        for part in self.emphasis:
            inside_B = (t_B >= part.times[0]) & (t_B <= part.times[1])
            weight_B = torch.where(inside_B, weight_B * part.weight, weight_B)
        return weight_B


def _holds(part: Emphasis, t: float) -> bool:
    return part.times[0] <= t <= part.times[1]


def drawn(law: AnyTimesteps, generator: torch.Generator) -> Tensor:
    """One time of a law, a float32 scalar in [0, 1]: of no shift, over the whole range."""
    match law:
        case UniformTimesteps():
            return torch.rand((), generator=generator)
        case LogitNormalTimesteps(mean=mean, std=std):
            return torch.sigmoid(torch.randn((), generator=generator) * std + mean)
        case SigmoidTimesteps(scale=scale):
            return torch.sigmoid(torch.randn((), generator=generator) * scale + 0.0)
        case BetaTimesteps(alpha=alpha, beta=beta):
            seed = int(torch.randint(2**62, (), generator=generator))
            return torch.tensor(random.Random(seed).betavariate(alpha, beta))
        case ModeTimesteps(scale=scale):
            # Equation 20 of the SD3 paper, whose u is 1 - u here and there alike.
            u = torch.rand((), generator=generator)
            return (1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)).clamp(0, 1)
        case CosMapTimesteps():
            # Equation 21: density 2 / (pi - 2 pi t + 2 pi t^2).
            u = torch.rand((), generator=generator)
            return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


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
