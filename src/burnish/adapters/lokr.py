"""LoKr (KronA, arXiv 2212.10650; LyCORIS, arXiv 2309.14859): W + s kron(w1, w2), a small matrix times a larger one.

With out = o1 o2 and in = i1 i2, w1 is (o1, i1) and w2 (o2, i2, *kernel); either may be a product of thin matrices of
the rank. s is alpha / rank where one is, and 1 where both are whole: readers ignore alpha then. A linear layer's
product is made of two small ones, on the two halves of each input's index, and never makes the delta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from burnish.adapters.deltas import lokr_delta, lokr_factor, split_width, without_core
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
    weight_shape,
)
from burnish.config.method import Lokr
from burnish.randomness import torch_generator

WHOLE_1, A_1, B_1 = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
WHOLE_2, A_2, B_2, CORE_2 = "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"


@dataclass(frozen=True, slots=True)
class LokrWeights:
    """The adapter of one module, apart from the model.

    `pieces` are what a file holds, by the end of its keys; `shape` is that of the base weight.
    """

    pieces: dict[str, Tensor]
    alpha: float
    shape: tuple[int, ...]

    @property
    def rank(self) -> int | None:
        """None where both factors are whole."""
        for name in (B_2, B_1):
            if name in self.pieces:
                return self.pieces[name].shape[0]
        return None

    @property
    def scale(self) -> float:
        return 1.0 if self.rank is None else self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """w1 (o1, i1) and w2 (o2, i2 * kernel volume), float32, without the scale."""
        return _factors({name: piece.float() for name, piece in self.pieces.items()})

    def untuckered(self) -> LokrWeights:
        """The same without a core, which becomes part of the larger factor's second matrix: exact, of the same rank."""
        if CORE_2 not in self.pieces:
            return self
        rest = {name: piece for name, piece in self.pieces.items() if name != CORE_2}
        a, b = without_core(self.pieces[CORE_2], self.pieces[A_2], self.pieces[B_2])
        return LokrWeights({**rest, A_2: a, B_2: b}, self.alpha, self.shape)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """What is added to the base weight: float32, in its shape."""
        return lokr_delta(*self.factors(), scale=self.scale, shape=self.shape)

    def check(self, base: Adaptable) -> str | None:
        shape = weight_shape(base)
        try:
            first, second = self.factors()
        except (ValueError, RuntimeError, KeyError) as error:
            return f"has factors that do not fit each other: {error}"
        out, into = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
        if (out, into) != (shape[0], math.prod(shape[1:])):
            return (
                f"has factors {tuple(first.shape)} and {tuple(second.shape)}; the model's weight is {shape}"
            )
        return None


class LokrLayer(AdapterLayer):
    """A LoKr over `base`, which stays frozen."""

    def __init__(self, base: nn.Module, weights: LokrWeights, dropout: Dropout) -> None:
        super().__init__(base, dropout)
        for name, piece in weights.pieces.items():
            self.register_parameter(name, nn.Parameter(placed(base, piece)))
        self.alpha, self.scale, self.shape = weights.alpha, weights.scale, weights.shape
        self._product = own_product(innermost(base))
        self._names = tuple(weights.pieces)

    @classmethod
    def fresh(cls, base: Adaptable, choice: ModuleChoice, seed: int, name: str) -> LokrWeights:
        """Kaiming-uniform but for what makes w2 zero: all of it, or its second factor."""
        method = choice.method
        assert isinstance(method, Lokr)
        pieces = {}
        for own, shape in _shapes(base, choice.rank, method).items():
            pieces[own] = torch.zeros(shape)
            if own not in (WHOLE_2, B_2):
                nn.init.kaiming_uniform_(
                    pieces[own], a=math.sqrt(5), generator=torch_generator(seed, own, name)
                )
        return LokrWeights(pieces, choice.alpha, weight_shape(base))

    @classmethod
    def of(cls, base: nn.Module, weights: AdapterWeights, dropout: Dropout) -> Self:
        assert isinstance(weights, LokrWeights)
        return cls(base, weights, dropout)

    def added(self, x: Tensor, output: Tensor) -> Tensor:
        pieces = dict(zip(self._names, self.in_type(x.dtype), strict=True))
        if len(self.shape) > 2:
            return self._product(x, lokr_delta(*_factors(pieces), scale=self.scale, shape=self.shape))
        first = _first(pieces)
        parts = x.reshape(*x.shape[:-1], first.shape[1], -1)
        if WHOLE_2 in pieces:
            inner = parts @ pieces[WHOLE_2].T
        else:
            inner = (parts @ pieces[B_2].T) @ pieces[A_2].T
        if self.scale != 1.0:
            first = first * self.scale
        return torch.matmul(first, inner).flatten(-2)

    def weights(self) -> LokrWeights:
        pieces = {
            name: one.detach().float().cpu().clone() for name, one in self.named_parameters(recurse=False)
        }
        return LokrWeights(pieces, self.alpha, self.shape)

    def extra_repr(self) -> str:
        first, second = _factors(dict(self.named_parameters(recurse=False)))
        return f"factors={tuple(first.shape)} x {tuple(second.shape)}, scale={self.scale:g}"


def _first(pieces: dict[str, Tensor]) -> Tensor:
    return lokr_factor(pieces.get(WHOLE_1), pieces.get(A_1), pieces.get(B_1))


def _factors(pieces: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    second = lokr_factor(pieces.get(WHOLE_2), pieces.get(A_2), pieces.get(B_2), pieces.get(CORE_2))
    return _first(pieces), second


def _shapes(base: Adaptable, rank: int, method: Lokr) -> dict[str, tuple[int, ...]]:
    """Of each piece; a factor is whole where its thin matrices would hold no fewer numbers, as in LyCORIS."""
    out, into, *kernel = weight_shape(base)
    (o1, o2), (i1, i2) = split_width(out, method.factor), split_width(into, method.factor)
    shapes: dict[str, tuple[int, ...]] = {}
    if method.decompose_both and rank < max(o1, i1) / 2:
        shapes |= {A_1: (o1, rank), B_1: (rank, i1)}
    else:
        shapes[WHOLE_1] = (o1, i1)
    if method.full_rank or rank >= max(o2, i2) / 2:
        shapes[WHOLE_2] = (o2, i2, *kernel)
    elif method.tucker and kernel_volume(base) > 1:
        shapes |= {CORE_2: (rank, rank, *kernel), A_2: (rank, o2), B_2: (rank, i2)}
    else:
        shapes |= {A_2: (o2, rank), B_2: (rank, i2 * kernel_volume(base))}
    return shapes
