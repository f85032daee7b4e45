"""FLUX.2's reference pictures as further tokens, and where all tokens are.

Shape letters: B batch, C channels, H W height and width of latents, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from burnish.conditioning import Conditioning

TOKENS, POSITIONS = "tokens_reference_BND", "tokens_reference_at_BN4"
PICTURE_STEP = 10  # references are at 10, 20, ... in the first position number


class Places(NamedTuple):
    """Where the references of one row are: how many tokens, and their positions as bytes."""

    tokens: int
    positions: bytes


def described(references_BCHW: Sequence[Tensor]) -> Conditioning:
    """Latents of references as tokens (B, N, 128), and their positions (B, N, 4); empty where there are none."""
    if not references_BCHW:
        return Conditioning({})
    at = []
    for number, latents_BCHW in enumerate(references_BCHW, start=1):
        height, width = latents_BCHW.shape[2:]
        at_N4 = positions(height, width, latents_BCHW.device, picture=PICTURE_STEP * number)
        at.append(at_N4.expand(len(latents_BCHW), -1, -1))
    tokens = [latents_BCHW.flatten(2).transpose(1, 2) for latents_BCHW in references_BCHW]
    return Conditioning({TOKENS: torch.cat(tokens, dim=1), POSITIONS: torch.cat(at, dim=1)})


def places(conditioning: Conditioning, batch: int) -> list[Places]:
    """Of each row of the batch, without padding, which is at zero."""
    at_BN4 = conditioning.on_host(POSITIONS) if POSITIONS in conditioning else None
    if at_BN4 is None:
        return [Places(0, b"")] * batch
    there = [at_N4[at_N4[:, 0] > 0] for at_N4 in at_BN4]
    return [Places(len(at_N4), at_N4.numpy().tobytes()) for at_N4 in there]


def positions(rows: int, columns: int, device: torch.device, picture: int = 0) -> Tensor:
    """(picture, row, column, 0) of each token in reading order, (N, 4)."""
    numbers = (
        torch.full((1,), picture, device=device),
        torch.arange(rows, device=device),
        torch.arange(columns, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    return torch.cartesian_prod(*numbers)
