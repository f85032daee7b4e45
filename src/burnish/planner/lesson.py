"""What a batch teaches beside its pictures, by which an objective asks the model more than once in a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.data.batch import Batch, Direction, Opposites, Preference
from burnish.data.samples import Teaches
from burnish.objective import Predict


@dataclass(frozen=True, slots=True)
class Lesson:
    """All that decides how often a step asks the model."""

    teaches: Teaches = ""
    counted: bool = False  # places count for more or less
    kept: bool = False  # some are to stay as the model had them before training
    unprompted: bool = False  # the target is guided away from the empty caption

    def rows(self, batch: int) -> int:
        """Of a micro-batch, where `batch` are seen at once: both ends of a slider are, one after the other."""
        return 2 * batch if self.teaches == "opposites" else batch

    def taught(self, batch: Batch) -> Batch:
        """The batch with what is taught by it, without data. To be called under FakeTensorMode."""
        latents, told = batch.latents_BCHW, batch.conditioning
        weights = (len(latents),) + (1,) * (latents.dim() - 3) + tuple(latents.shape[-2:])
        return replace(
            batch,
            counted=torch.empty(weights) if self.counted or self.kept else None,
            kept=torch.empty(weights) if self.kept else None,
            contrast=self._contrast(batch),
            unprompted=like(told) if self.unprompted else None,
        )

    def _contrast(self, batch: Batch) -> Direction | Opposites | Preference | None:
        rows = len(batch.latents_BCHW)
        if self.teaches == "direction":
            return Direction(like(batch.conditioning), like(batch.conditioning), torch.empty(rows))
        if self.teaches == "preference":
            return Preference(torch.empty(rows // 2), torch.empty(rows // 2))
        return Opposites() if self.teaches == "opposites" else None


PICTURES = Lesson()


def like(told: Conditioning) -> Conditioning:
    """As much again, of another prompt; what has values stays as it is."""
    return Conditioning(
        {name: torch.empty_like(one) if one.is_floating_point() else one for name, one in told.items()}
    )


class Asked:
    """Answers an objective's questions: with what the family says to those without gradients and to the last turn's; to
    others, which take what those take, with something of the same shape.

    Args:
        alike: the first answer without gradients stands for all.
    """

    def __init__(self, predict: Predict, turns: int, *, alike: bool) -> None:
        self._predict, self._turns, self._alike = predict, turns, alike
        self._dtype: torch.dtype | None = None
        self.turn = 1  # that is asked for now
        self.skipped = 0  # without gradients

    @property
    def is_last(self) -> bool:
        return self.turn == self._turns

    def __call__(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        if torch.is_grad_enabled():
            if self.is_last:
                return self._predict(noisy, t_B, conditioning)
            return torch.empty_like(noisy, dtype=self._dtype).requires_grad_()
        if self._alike and self._dtype is not None:
            self.skipped += 1
            return torch.empty_like(noisy, dtype=self._dtype)
        said = self._predict(noisy, t_B, conditioning)
        self._dtype = said.dtype
        return said


def passes_in_words(passes: int, turns: int) -> str:
    """What a micro-step does besides one pass forward and backward; empty where that is all."""
    numbers = {1: "one", 2: "two", 3: "three", 4: "four"}
    told = []
    if passes:
        plural = "es" if passes > 1 else ""
        told.append(f"{numbers.get(passes, passes)} more pass{plural} without gradients")
    if turns > 1:
        told.append(f"{numbers.get(turns, turns)} passes with gradients, one after the other")
    return " and ".join(told)
