"""What the loop is given for one micro-step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.hardware import sent


@dataclass(frozen=True, slots=True)
class Direction:
    """What a slider learns at the batch's latents: from what the one prompt says towards what the other does."""

    positive: Conditioning
    negative: Conditioning
    guidance_B: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None) -> Direction:
        told = self.positive.to(device, dtype), self.negative.to(device, dtype)
        return Direction(*told, sent(self.guidance_B, device))


@dataclass(frozen=True, slots=True)
class Opposites:
    """The second half of the rows are the other ends of a slider, in the order of the first."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None) -> Opposites:
        return self


@dataclass(frozen=True, slots=True)
class Preference:
    """The second half of the rows are the pictures that those of the first are preferred to."""

    beta_B: Tensor  # of each pair
    decays_B: Tensor  # 1 where beta falls with the time, else 0

    def to(self, device: torch.device | str, dtype: torch.dtype | None) -> Preference:
        return self  # small, and used with the times, on the host


@dataclass(frozen=True, slots=True)
class Batch:
    """Cached latents and conditioning of one micro-step; everything but `weight_B` is as the cache gave it.

    Latents of video families have a time axis: (B, C, T, H, W). Where the VAE trains they are pixels in [-1, 1].
    `position` is the micro-step since the run began: with the seed it decides noise and time (law L1).
    """

    latents_BCHW: Tensor
    conditioning: Conditioning
    weight_B: Tensor  # loss weight of each sample's source, float32
    sample_ids: tuple[str, ...]  # stable across runs: source and relative path, plus the repeat
    paths: tuple[str, ...]  # for messages: the file behind each sample
    position: int
    audio_BCLF: Tensor | None = None  # latents of the clips' sound; of a batch all rows have it, or none
    # Weights of the loss by place, with one channel and, of clips, one frame; None: everything counts alike.
    counted: Tensor | None = None  # of the error against the sample
    kept: Tensor | None = (
        None  # of the error against what the model said before training; only with `counted`
    )
    captions: tuple[str, ...] = ()  # as drawn, for methods that encode them in the step
    contrast: Direction | Opposites | Preference | None = None  # the difference that is learned, if any
    unprompted: Conditioning | None = None  # as `conditioning`, of the empty caption; where that is asked for

    def rows(self, index: slice) -> Batch:
        """Some of the rows, without what they were to be compared with."""
        return replace(
            self,
            latents_BCHW=self.latents_BCHW[index],
            conditioning=self.conditioning.rows(index),
            weight_B=self.weight_B[index],
            sample_ids=self.sample_ids[index],
            paths=self.paths[index],
            audio_BCLF=None if self.audio_BCLF is None else self.audio_BCLF[index],
            counted=None if self.counted is None else self.counted[index],
            kept=None if self.kept is None else self.kept[index],
            captions=self.captions[index],
            contrast=None,
            unprompted=None if self.unprompted is None else self.unprompted.rows(index),
        )

    def parts(self, count: int) -> list[Batch]:
        """The rows in at most so many parts of one size, the last may be smaller; whole where rows are compared with
        each other."""
        rows = len(self.sample_ids)
        if count == 1 or self.contrast is not None:
            return [self]
        size = ceil(rows / count)
        return [self.rows(slice(first, first + size)) for first in range(0, rows, size)]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        return replace(
            self,
            latents_BCHW=sent(self.latents_BCHW, device, dtype),
            conditioning=self.conditioning.to(device, dtype),
            weight_B=sent(self.weight_B, device),
            audio_BCLF=None if self.audio_BCLF is None else sent(self.audio_BCLF, device, dtype),
            counted=None if self.counted is None else sent(self.counted, device),
            kept=None if self.kept is None else sent(self.kept, device),
            contrast=None if self.contrast is None else self.contrast.to(device, dtype),
            unprompted=None if self.unprompted is None else self.unprompted.to(device, dtype),
        )
