"""Batches whose rows the denoiser cannot take together: other positions, another length, another denoiser."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from burnish.conditioning import Conditioning, chosen_rows

Kind = TypeVar("Kind", bound=Hashable)


def by_kind(
    kinds: Sequence[Kind],
    noisy: Tensor,
    t_B: Tensor,
    conditioning: Conditioning,
    predict: Callable[[Kind, Tensor, Tensor, Conditioning], Tensor],
) -> Tensor:
    """Predictions of rows of one kind at a time, in the order of the batch.

    Args:
        kinds: of each row, known on the host: what is alike goes together.
        predict: kind, noisy latents, times and conditioning of its rows -> their prediction.
    """
    if len(set(kinds)) == 1:
        return predict(kinds[0], noisy, t_B, conditioning)
    placed: dict[int, Tensor] = {}
    for kind in dict.fromkeys(kinds):
        rows = [row for row, one in enumerate(kinds) if one == kind]
        predicted = predict(kind, chosen_rows(noisy, rows), chosen_rows(t_B, rows), conditioning.rows(rows))
        placed.update(zip(rows, predicted, strict=True))
    return torch.stack([placed[row] for row in range(len(noisy))])
