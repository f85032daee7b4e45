"""The learning rate as a pure function of the step: a resumed run needs no state to go on along the curve."""

from __future__ import annotations

import math

import torch

from burnish.config.train import LearningRateSchedule


def learning_rate_factor(section: LearningRateSchedule, step: int, total: int) -> float:
    """What the peak learning rate is multiplied with in the update after `step` finished ones.

    Warm-up: (step + 1) / warmup_steps, so that the first update moves something and the last of the warm-up
    has the full rate. After it, with p = (step - warmup_steps) / (total - warmup_steps):

    - constant: 1
    - linear: 1 - (1 - end_factor) p
    - cosine: end_factor + (1 - end_factor) (1 + cos(pi p)) / 2   (arXiv 1608.03983, equation 5, no restart)

    That is `LinearLR` and `CosineAnnealingLR` of torch and `get_cosine_schedule_with_warmup` of transformers.
    `end_factor` belongs to step `total`, the first that is not run; a step beyond keeps it.

    Args:
        section: shape, warm-up and end.
        step: optimizer steps done, from 0.
        total: optimizer steps of the whole run.
    """
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    progress = min(1.0, (step - section.warmup_steps) / max(1, total - section.warmup_steps))
    match section.kind:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - (1.0 - section.end_factor) * progress
        case "cosine":
            return section.end_factor + (1.0 - section.end_factor) * 0.5 * (
                1.0 + math.cos(math.pi * progress)
            )


def apply_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's rate to `factor` times its peak, `initial_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
