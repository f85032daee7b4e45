"""Rules of guidance besides the usual one (`family.classifier_free_guidance`), shared by families.

Shape letters: B batch; the rest is the shape of latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.families.packing import pack, unpack
from burnish.noise_schedule import classifier_free_guidance


def beyond_the_prompt(with_prompt: Tensor, without: Tensor, scale: Tensor) -> Tensor:
    """The usual rule counted from the prediction with prompt: a scale of 0 is no guidance (Z-Image, Krea 2)."""
    return with_prompt + scale * (with_prompt - without)


def renormalized_patches(with_prompt_BCHW: Tensor, without_BCHW: Tensor, scale: Tensor) -> Tensor:
    """The usual rule, each 2x2 patch then as long as with the prompt alone (Qwen-Image, `QwenImagePipeline`)."""
    guided_BND = pack(classifier_free_guidance(with_prompt_BCHW, without_BCHW, scale))
    length_BN1 = pack(with_prompt_BCHW).norm(dim=-1, keepdim=True)
    height, width = with_prompt_BCHW.shape[2:]
    return unpack(guided_BND * (length_BN1 / guided_BND.norm(dim=-1, keepdim=True)), height, width)


def no_longer_than_prompted(with_prompt_BCHW: Tensor, without_BCHW: Tensor, scale: Tensor) -> Tensor:
    """The usual rule, at each place no longer over the channels than with the prompt alone (HiDream-E1's
    `clip_cfg_norm`)."""
    guided_BCHW = classifier_free_guidance(with_prompt_BCHW, without_BCHW, scale)
    longest_B1HW, length_B1HW = (
        torch.linalg.vector_norm(one, dim=1, keepdim=True) for one in (with_prompt_BCHW, guided_BCHW)
    )
    held_BCHW: Tensor = guided_BCHW * (longest_B1HW / (length_B1HW + 1e-8)).clamp(max=1.0)
    return held_BCHW


class AdaptiveProjection:
    """Adaptive projected guidance with momentum (arXiv 2410.02416) after some steps of the usual rule.

    As HunyuanImage 2.1 runs it: the difference of the predictions is averaged over the steps with a momentum that can
    be negative, held to a length, and what of it points along the prediction with prompt is scaled down. For one run.
    """

    def __init__(
        self,
        usual_steps_B: Tensor,
        *,
        scale: float = 10.0,
        momentum: float | None = -0.5,
        longest: float = 10.0,
        along: float = 0.0,
    ) -> None:
        """`scale` takes the place of the scale asked for, which holds in the usual steps; `longest` 0 is no limit.

        Args:
            usual_steps_B: the last step of each row, counted from 0, that takes the usual rule.
            along: what remains of the part that points along the prediction.
        """
        # Read once: a run's steps ask no device.
        self.usual_steps_B, self.all_usual = usual_steps_B.cpu(), int(usual_steps_B.min())
        self.scale, self.momentum, self.longest, self.along = scale, momentum, longest, along
        self.step = -1
        self.average: Tensor | float = 0.0

    def __call__(self, with_prompt: Tensor, without: Tensor, scale: Tensor) -> Tensor:
        self.step += 1
        difference = with_prompt - without
        self.average = difference + self.average * (self.momentum or 0.0)
        usual = without + scale * difference
        if self.step <= self.all_usual:
            return usual
        is_usual_B = (self.step <= self.usual_steps_B).to(usual.device)
        projected = without + self.scale * self._projected(self.average, with_prompt)
        return torch.where(is_usual_B.view(-1, *(1 for _ in usual.shape[1:])), usual, projected)

    def _projected(self, difference: Tensor, prediction: Tensor) -> Tensor:
        every = list(range(1, difference.dim()))
        if self.longest > 0:
            length = torch.linalg.vector_norm(difference, dim=every, keepdim=True)
            difference = difference * (self.longest / length).clamp(max=1.0)
        # Apple's GPUs lack float64.
        precise = torch.float32 if difference.device.type == "mps" else torch.float64
        direction = prediction.to(precise)
        length = torch.linalg.vector_norm(direction, dim=every, keepdim=True)
        direction = direction / length.clamp(min=1e-12)
        parallel = (difference.to(precise) * direction).sum(dim=every, keepdim=True) * direction
        projected: Tensor = difference.to(precise) + (self.along - 1) * parallel
        return projected.to(difference.dtype)
