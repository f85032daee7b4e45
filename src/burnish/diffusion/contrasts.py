"""Learning a difference: what a slider is to say, and the loss of a preference, of whatever is predicted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def slider_target(
    before: Tensor, positive: Tensor, negative: Tensor, guidance_B: Tensor, strength: float
) -> Tensor:
    """What the adapter at `strength` is to make of the target prompt, float32.

    Concept sliders (arXiv 2311.12092, equation 8), where all three are said by the untrained model about the same
    noisy latents: of the target prompt, and of the prompts that its direction lies between.
    """
    guidance = guidance_B.view(-1, *(1 for _ in before.shape[1:]))
    return before.float() + strength * guidance * (positive.float() - negative.float())


def guided(target: Tensor, without: Tensor, scale: float) -> Tensor:
    """What classifier-free guidance (arXiv 2207.12598) of a scale makes of the target, float32.

    A model with guidance built in is to say this, where `without` is what it says without a caption; on average it is
    the guidance of what the caption stands for.
    """
    return without.float() + scale * (target - without.float())


def preference_margin(error_B: Tensor, before_B: Tensor, beta_B: Tensor) -> Tensor:
    """By how much the preferred of each pair gained more than the other, times beta, (B / 2,).

    Diffusion-DPO (arXiv 2311.12908), all times of one weight, with errors that are means over a sample as in its code;
    Flow-DPO (arXiv 2501.13918), where they are errors in the velocity. Both of a pair have the same noise and time.

    Args:
        error_B: of what the trained model says, (B,): of the preferred, and then of the others in the same order.
        before_B: the same of the untrained model.
        beta_B: of each pair, (B / 2,).
    """
    gained_B = before_B - error_B
    preferred_B, rejected_B = gained_B.chunk(2)
    return 0.5 * beta_B * (preferred_B - rejected_B)


def preference_loss(margin_B: Tensor) -> Tensor:
    """Minus the log-probability, by Bradley and Terry's model, of what was preferred: ln 2 where nothing is learned."""
    return -F.logsigmoid(margin_B)


def told_apart(margin_B: Tensor) -> Tensor:
    """1 where the model has come to favour what is preferred, 0 where not, one half where it favours neither."""
    return (torch.sign(margin_B) + 1) / 2
