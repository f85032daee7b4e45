"""LoRA (arXiv 2106.09685): a frozen layer plus a trained product of two thin matrices, W + alpha/rank B A.

Shapes: A is (rank, in) for a linear layer and (rank, in, *kernel) for a convolution; B is (out, rank) or
(out, rank, 1, ...). A starts random and B at zero, so that an adapter changes nothing before its first step.

Of the same matrices also:
- LoCon's Tucker form of a convolution (arXiv 2309.14859): A is (rank, in, 1, ...) and a core (rank, rank, *kernel)
  stands between A and B.
- DoRA (`adapters/dora.py`).
- A start other than zero (`adapters/starts.py`): B0 A0 is taken off again, so that the base weight stays as it is. The
  difference B A - B0 A0 = B0 (A - A0) + (B - B0) A is a LoRA of twice the rank, computed from float32 differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from burnish.adapters.deltas import dora_weight, lora_delta
from burnish.adapters.dora import added_lengths, frozen_weight, lengthened, own_lengths
from burnish.adapters.layer import (
    Adaptable,
    AdapterLayer,
    AdapterWeights,
    Dropout,
    ModuleChoice,
    innermost,
    kernel_volume,
    own_product,
    placed,
    plain_product,
    weight_shape,
)
from burnish.adapters.starts import principal_factors
from burnish.config.method import Lora
from burnish.randomness import torch_generator


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """The adapter of one module, apart from the model: `down` is A, `up` is B, on the CPU.

    `mid` is the core of a Tucker form, `magnitude` (out,) DoRA's lengths of rows, `start` what A and B began with where
    that is taken off again.
    """

    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None
    magnitude: Tensor | None = None
    start: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def untuckered(self) -> LoraWeights:
        """The same without a core, which becomes part of A: exact, of the same rank, and read by every program."""
        if self.mid is None:
            return self
        down = torch.einsum("mn...,nc->mc...", self.mid, self.down.flatten(1)).contiguous()
        return replace(self, down=down, mid=None)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """What is added to the base weight: float32, in the shape of that weight, which DoRA asks for.

        Raises:
            ValueError: DoRA without the weight.
        """
        mid = None if self.mid is None else self.mid.float()
        delta = lora_delta(self.up.float(), self.down.float(), mid, scale=self.scale)
        if self.start is not None:
            down, up = self.start
            delta = delta - lora_delta(up.float(), down.float(), scale=self.scale)
        if self.magnitude is None:
            return delta
        if weight is None:
            raise ValueError("what DoRA adds depends on the base weight")
        return dora_weight(weight.float(), delta, self.magnitude.float()) - weight.float()

    def check(self, base: Adaptable) -> str | None:
        out, into, *kernel = weight_shape(base)
        ones = [1 for _ in kernel]
        wanted = [(self.rank, into, *(kernel if self.mid is None else ones)), (out, self.rank, *ones)]
        found = [tuple(self.down.shape), tuple(self.up.shape)]
        if self.mid is not None:
            wanted, found = [*wanted, (self.rank, self.rank, *kernel)], [*found, tuple(self.mid.shape)]
        if self.magnitude is not None:
            wanted, found = [*wanted, (out,)], [*found, tuple(self.magnitude.shape)]
        if wanted == found:
            return None
        return f"has shapes {_listed(found)}; this model needs {_listed(wanted)}"


class LoraLayer(AdapterLayer):
    """A LoRA over `base`, which stays frozen."""

    faster: ClassVar[frozenset[str]] = frozenset({"lora_B"})

    def __init__(self, base: nn.Module, weights: LoraWeights, dropout: Dropout) -> None:
        super().__init__(base, dropout)
        self.lora_A = nn.Parameter(placed(base, weights.down))
        self.lora_B = nn.Parameter(placed(base, weights.up))
        self.lora_mid = None if weights.mid is None else nn.Parameter(placed(base, weights.mid))
        self.magnitude = None if weights.magnitude is None else nn.Parameter(placed(base, weights.magnitude))
        self.alpha = weights.alpha
        self.rank = weights.rank
        layer = innermost(base)
        own, plain = own_product(layer), plain_product(layer)
        self._down, self._up = (own if self.lora_mid is None else plain), plain
        self._mid = own
        self.register_buffer("row_squares", None, persistent=False)
        if self.magnitude is not None:
            self.row_squares = own_lengths(base).square()
        for name, tensor in zip(("start_A", "start_B"), weights.start or (None, None), strict=True):
            self.register_buffer(name, None if tensor is None else placed(base, tensor), persistent=False)

    row_squares: Tensor | None
    start_A: Tensor | None
    start_B: Tensor | None

    @classmethod
    def fresh(cls, base: Adaptable, choice: ModuleChoice, seed: int, name: str) -> LoraWeights:
        """A is Kaiming-uniform as in the reference code of the paper, B zero."""
        method, (out, into, *kernel) = choice.method, weight_shape(base)
        assert isinstance(method, Lora)
        ones = [1 for _ in kernel]
        magnitude = own_lengths(base).cpu() if method.dora else None
        if method.start != "zero":
            down, up = principal_factors(
                frozen_weight(base), choice.rank, method.start, choice.alpha / choice.rank, seed, name
            )
            return LoraWeights(down, up, choice.alpha, magnitude=magnitude, start=(down, up))
        tucker = method.tucker and kernel_volume(base) > 1
        down = torch.empty(choice.rank, into, *(ones if tucker else kernel))
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=torch_generator(seed, "lora_A", name))
        mid = None
        if tucker:
            mid = torch.empty(choice.rank, choice.rank, *kernel)
            nn.init.kaiming_uniform_(mid, a=math.sqrt(5), generator=torch_generator(seed, "lora_mid", name))
        up = torch.zeros(out, choice.rank, *ones)
        return LoraWeights(down, up, choice.alpha, mid, magnitude)

    @classmethod
    def of(cls, base: nn.Module, weights: AdapterWeights, dropout: Dropout) -> Self:
        assert isinstance(weights, LoraWeights)
        return cls(base, weights, dropout)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def factors(self) -> tuple[Tensor, ...]:
        down, up = self._difference()
        return (down, up) if self.lora_mid is None else (down, up, self.lora_mid)

    def added(self, x: Tensor, output: Tensor) -> Tensor:
        down, up, *mid = self.in_type(x.dtype)
        middle = self._down(x, down)
        if mid:
            middle = self._mid(middle, mid[0])
        if self.scale != 1.0:
            # Scaling the thin middle touches `rank` numbers per token instead of the output's whole width.
            middle = middle * self.scale
        if self.dropout.ranks and self.is_dropping:
            middle = middle * self._kept_ranks(middle)
        product = self._up(middle, up)
        if self.magnitude is None:
            return product
        return lengthened(self, output, product, self.magnitude, self._lengths())

    def _difference(self) -> tuple[Tensor, Tensor]:
        """A and B, of twice the rank where a start is taken off."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        down = torch.cat([self.lora_A - self.start_A, self.lora_A])
        return down, torch.cat([self.start_B, self.lora_B - self.start_B], dim=1)

    def _kept_ranks(self, middle: Tensor) -> Tensor:
        """One draw for all rows of a call; what is left is scaled up, as in any dropout."""
        drawn = self.kept(self.lora_B.shape[1], middle) / (1 - self.dropout.ranks)
        if self.start_A is not None:
            drawn = torch.cat([drawn, drawn])
        return self.by_row(drawn)

    def _lengths(self) -> Tensor:
        """(out,) |W + dW| by row, float32 and constant for gradients."""
        assert self.row_squares is not None
        with torch.no_grad():
            down, up = (one.detach() for one in self._difference())
            if self.lora_mid is not None:
                down = torch.einsum("mn...,nc->mc...", self.lora_mid.detach(), down.flatten(1))
            thin, tall = down.flatten(1), up.flatten(1) * self.scale
            weight = frozen_weight(self.base).flatten(1)
            crossed = (weight @ thin.T.to(weight.dtype)).float()
            own = ((tall @ (thin @ thin.T)) * tall).sum(1)
            return added_lengths(self.row_squares, (crossed * tall).sum(1), own)

    def weights(self) -> LoraWeights:
        """A float32 copy of the adapter on the CPU; of twice the rank where a start is taken off."""
        down, up = (one.detach().float().cpu().clone() for one in self._difference())
        mid, magnitude = (
            None if one is None else one.detach().float().cpu().clone()
            for one in (self.lora_mid, self.magnitude)
        )
        return LoraWeights(down, up, self.alpha * down.shape[0] / self.rank, mid, magnitude)

    def constants(self) -> dict[str, Tensor]:
        pairs = {"start_A": self.start_A, "start_B": self.start_B}
        return {name: tensor for name, tensor in pairs.items() if tensor is not None}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout.inputs:g}"


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes))
