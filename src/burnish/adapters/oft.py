"""OFT (arXiv 2306.07280) and BOFT (arXiv 2311.06243): the outputs of a layer are turned, lengths and angles kept.

LyCORIS' form: `blocks` make skew matrices Q = blocks - blocks^T, and these turns R = (I + Q)(I - Q)^-1. OFT (n, b, b)
turns each of n groups of b outputs, W' = R^T W; BOFT (m, n, b, b) does so m times, each time in groups of entries
farther apart, W' = R W. As they act on rows of the weight, they act on the outputs less the bias: the weight is not
needed, however it is kept. Blocks of zero change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from burnish.adapters.deltas import boft_turned, oft_turned, turned_delta, turns_less_one
from burnish.adapters.layer import (
    Adaptable,
    AdapterLayer,
    AdapterWeights,
    Dropout,
    ModuleChoice,
    innermost,
    placed,
    weight_shape,
)
from burnish.config.method import Boft
from burnish.errors import AdapterError


@dataclass(frozen=True, slots=True)
class OftWeights:
    """The adapter of one module, apart from the model: (n, b, b) for OFT, (m, n, b, b) for BOFT."""

    blocks: Tensor

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """What is added to the base weight: float32, in its shape.

        Raises:
            ValueError: without the weight, which is what is turned.
        """
        if weight is None:
            raise ValueError("what OFT adds depends on the base weight")
        return turned_delta(weight.float(), self.blocks.float())

    def check(self, base: Adaptable) -> str | None:
        out = weight_shape(base)[0]
        count, rows, columns = self.blocks.shape[-3:]
        if rows == columns and count * rows == out:
            return None
        return f"has blocks {tuple(self.blocks.shape)}; the model's layer has {out} outputs"


class OftLayer(AdapterLayer):
    """Turns the outputs of `base`, which stays frozen."""

    def __init__(self, base: nn.Module, weights: OftWeights, dropout: Dropout) -> None:
        super().__init__(base, dropout)
        self.oft_blocks = nn.Parameter(placed(base, weights.blocks))
        self._turned = oft_turned if weights.blocks.dim() == 3 else boft_turned
        self._last = isinstance(innermost(base), nn.Linear)  # else outputs are on axis 1

    @classmethod
    def fresh(cls, base: Adaptable, choice: ModuleChoice, seed: int, name: str) -> OftWeights:
        """Zero.

        Raises:
            AdapterError: BOFT, and the outputs are no power of two times an even number of at most the block size.
        """
        out = weight_shape(base)[0]
        if not isinstance(choice.method, Boft):
            # Not LyCORIS' choice, which takes the smaller of size and count: layers side by side could not be stacked.
            size = max(one for one in range(1, choice.rank + 1) if out % one == 0)
            return OftWeights(torch.zeros(out // size, size, size))
        found = butterfly(out, choice.rank)
        if found is None:
            raise AdapterError(
                f"{name} has {out} outputs, which make no butterfly of blocks of {choice.rank} or fewer",
                remedy="Leave it out with method.exclude, raise method.block_size, or set method.kind: oft.",
            )
        size, count = found
        stages = count.bit_length()  # log2 + 1: then every output can move every other
        return OftWeights(torch.zeros(min(stages, choice.method.stages or stages), count, size, size))

    @classmethod
    def of(cls, base: nn.Module, weights: AdapterWeights, dropout: Dropout) -> Self:
        assert isinstance(weights, OftWeights)
        return cls(base, weights, dropout)

    def factors(self) -> tuple[Tensor, ...]:
        """The turns less the identity, made in float32: it is their distance from it that matters."""
        return (turns_less_one(self.oft_blocks),)

    def added(self, x: Tensor, output: Tensor) -> Tensor:
        (moves,) = self.in_type(output.dtype)
        if self.dropout.ranks and self.is_dropping:
            # Not scaled up: a block turns as it does or not at all.
            moves = moves * self.kept(moves.shape[:-2].numel(), moves).view(*moves.shape[:-2], 1, 1)
        rows = self.without_bias(output)
        if self._last:
            return self._turned(rows, moves)
        return self._turned(rows.movedim(1, -1), moves).movedim(-1, 1)

    def weights(self) -> OftWeights:
        return OftWeights(self.oft_blocks.detach().float().cpu().clone())

    def extra_repr(self) -> str:
        return f"blocks={tuple(self.oft_blocks.shape)}"


def butterfly(width: int, largest: int) -> tuple[int, int] | None:
    """Block size and number of blocks: an even size of at most `largest`, a power of two of them, as in LyCORIS."""
    for size in range(largest - largest % 2, 0, -2):
        count, rest = divmod(width, size)
        if not rest and count.bit_count() == 1:
            return size, count
    return None
