"""LoKr (KronA, arXiv 2212.10650; LyCORIS, arXiv 2309.14859): W + s kron(w1, w2), a small matrix times a larger one.

With out = o1 o2 and in = i1 i2, w1 is (o1, i1) and w2 (o2, i2, *kernel); either may be a product of thin matrices of
the rank. s is alpha / rank where one is, and 1 where both are whole: readers ignore alpha then. A linear layer's
product is made of two small ones, on the two halves of each input's index, and never makes the delta. With DoRA
(`adapters/dora.py`) the changed weight's rows get trained lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from burnish.adapters.deltas import dora_weight, lokr_delta, lokr_factor, split_width, without_core
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
    weight_shape,
)
from burnish.config.method import Lokr
from burnish.randomness import torch_generator

WHOLE_1, A_1, B_1 = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
WHOLE_2, A_2, B_2, CORE_2 = "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"


@dataclass(frozen=True, slots=True)
class LokrWeights:
    """The adapter of one module, apart from the model.

    `pieces` are what a file holds, by the end of its keys; `shape` is that of the base weight; `magnitude` (out,) are
    DoRA's lengths of rows.
    """

    pieces: dict[str, Tensor]
    alpha: float
    shape: tuple[int, ...]
    magnitude: Tensor | None = None

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
        return replace(self, pieces={**rest, A_2: a, B_2: b})

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """What is added to the base weight: float32, in its shape.

        Raises:
            ValueError: DoRA without the weight.
        """
        delta = lokr_delta(*self.factors(), scale=self.scale, shape=self.shape)
        if self.magnitude is None:
            return delta
        if weight is None:
            raise ValueError("what DoRA adds depends on the base weight")
        return dora_weight(weight.float(), delta, self.magnitude.float()) - weight.float()

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
        if self.magnitude is not None and tuple(self.magnitude.shape) != shape[:1]:
            return f"has lengths of {self.magnitude.numel()} rows; the model's weight is {shape}"
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
        self.magnitude = None if weights.magnitude is None else nn.Parameter(placed(base, weights.magnitude))
        self.register_buffer("row_squares", None, persistent=False)
        if self.magnitude is not None:
            self.row_squares = own_lengths(base).square()

    row_squares: Tensor | None

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
        magnitude = own_lengths(base).cpu() if method.dora else None
        return LokrWeights(pieces, choice.alpha, weight_shape(base), magnitude)

    @classmethod
    def of(cls, base: nn.Module, weights: AdapterWeights, dropout: Dropout) -> Self:
        assert isinstance(weights, LokrWeights)
        return cls(base, weights, dropout)

    def factors(self) -> tuple[Tensor, ...]:
        """All but the lengths, which stay float32."""
        return tuple(getattr(self, name) for name in self._names)

    def added(self, x: Tensor, output: Tensor) -> Tensor:
        product = self.kept_outputs(self._changed(x))
        if self.magnitude is None:
            return product
        return lengthened(self, output, product, self.magnitude, self._lengths())

    def _changed(self, x: Tensor) -> Tensor:
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

    def _lengths(self) -> Tensor:
        """(out,) |W + dW| by row, float32 and constant for gradients; the weight meets the small factor first, by which
        what is left of it is as many times smaller."""
        assert self.row_squares is not None
        with torch.no_grad():
            first, second = _factors({name: getattr(self, name).detach() for name in self._names})
            first = first * self.scale
            weight = frozen_weight(self.base)
            blocks = weight.reshape(len(first), len(second), first.shape[1], -1)  # (o1, o2, i1, i2 * kernel)
            rows = first.to(weight.dtype)[:, None, None]
            crossed = (torch.matmul(rows, blocks)[:, :, 0].float() * second).sum(-1)  # (o1, o2)
            own = torch.outer(first.square().sum(1), second.square().sum(1))
            return added_lengths(self.row_squares, crossed.flatten(), own.flatten())

    def weights(self) -> LokrWeights:
        pieces = {name: getattr(self, name).detach().float().cpu().clone() for name in self._names}
        magnitude = None if self.magnitude is None else self.magnitude.detach().float().cpu().clone()
        return LokrWeights(pieces, self.alpha, self.shape, magnitude)

    def extra_repr(self) -> str:
        first, second = _factors({name: getattr(self, name) for name in self._names})
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
