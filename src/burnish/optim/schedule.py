"""The learning rate as a pure function of the step: a resumed run needs no state to go on along the curve."""

from __future__ import annotations

import math

import torch

from burnish.config.schedules import (
    AnySchedule,
    Constant,
    Cosine,
    CosineRestarts,
    InverseSqrt,
    Polynomial,
    Rex,
    WarmupStableDecay,
)


def learning_rate_factor(section: AnySchedule, step: int, total: int) -> float:
    """What the peak learning rate is multiplied with in the update after `step` finished ones.

    Warm-up over W steps: (step + 1) / W, so that the first update moves something and the last of the warm-up has the
    full rate. After it the height h, from 1 to 0, is stretched to end + (1 - end) h with end = `end_factor`. With
    p = (step - W) / (total - W):

    - linear: h = 1 - p
    - cosine: h = (1 + cos(pi p)) / 2   (arXiv 1608.03983, equation 5, no restart)
    - cosine_restarts: h = (1 + cos(pi (c p mod 1))) / 2 with c = `cycles`, and 0 at p = 1   (the same with restarts)
    - polynomial: h = (1 - p)^power
    - rex: h = (1 - p) / (1 - p / 2)   (arXiv 2107.04197, section 4: (1 - p) / (1/2 + (1 - p) / 2))
    - warmup_stable_decay: h = min(1, (total - step) / (total d)) with d = `decay_share`; 1 - p where the warm-up
      leaves less than that   (arXiv 2404.06395, section 4; its linear fall is that of arXiv 2405.18392)
    - constant: 1, and inverse_sqrt: sqrt(T / (T + step - W)) with T = max(W, `timescale`), whatever `end_factor` says
      (arXiv 1706.03762, equation 3, whose peak is at T = W)

    Linear and cosine are `LinearLR` and `CosineAnnealingLR` of torch; transformers has the same shapes but rex.
    `end_factor` belongs to step `total`, the first that is not run; a step beyond keeps it.

    Args:
        section: shape, warm-up and end.
        step: optimizer steps done, from 0.
        total: optimizer steps of the whole run.
    """
    warmup = section.warmup(total)
    if step < warmup:
        return (step + 1) / warmup
    match section:
        case Constant():
            return 1.0
        case InverseSqrt(timescale=timescale):
            timescale = max(warmup, timescale)
            return math.sqrt(timescale / (timescale + step - warmup))
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return section.end_factor + (1.0 - section.end_factor) * _height(section, progress, warmup, total)


def _height(section: AnySchedule, progress: float, warmup: int, total: int) -> float:
    """From 1 at the end of the warm-up to 0 at the end of the run."""
    left = 1.0 - progress
    match section:
        case Cosine():
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case CosineRestarts(cycles=cycles):
            within = cycles * progress % 1.0 if progress < 1.0 else 1.0
            return 0.5 * (1.0 + math.cos(math.pi * within))
        case Polynomial(power=power):
            return math.pow(left, power)
        case Rex():
            return left / (0.5 + 0.5 * left)
        case WarmupStableDecay(decay_share=share):
            falling = min(share * total, total - warmup)
            return min(1.0, left * (total - warmup) / falling)
        case _:
            return left


def apply_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's rate to `factor` times its peak, `initial_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
