"""LoHa (FedPara, arXiv 2108.06098): W + alpha/rank (A1 B1) * (A2 B2), the second product entry by entry.

Two ranks of r make a matrix of rank up to r * r. Files and shapes are LyCORIS': w1_a, w2_a are (out, rank), w1_b, w2_b
(rank, in * kernel volume); in Tucker form of a convolution all are (rank, ...) with cores t1, t2 (rank, rank, *kernel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from burnish.adapters.deltas import loha_delta, without_core
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
    shape_problem,
    weight_shape,
)
from burnish.config.method import Loha
from burnish.randomness import torch_generator


@dataclass(frozen=True, slots=True)
class LohaWeights:
    """The adapter of one module, apart from the model; `shape` is that of the base weight."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    shape: tuple[int, ...]
    t1: Tensor | None = None
    t2: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def pieces(self) -> dict[str, Tensor]:
        """What a file holds, by the end of its keys."""
        named = {
            "hada_w1_a": self.w1_a,
            "hada_w1_b": self.w1_b,
            "hada_w2_a": self.w2_a,
            "hada_w2_b": self.w2_b,
        }
        cores = {"hada_t1": self.t1, "hada_t2": self.t2}
        return named | {name: core for name, core in cores.items() if core is not None}

    def untuckered(self) -> LohaWeights:
        """The same without cores, which become part of the matrices beside the inputs: exact, of the same rank."""
        if self.t1 is None or self.t2 is None:
            return self
        w1_a, w1_b = without_core(self.t1, self.w1_a, self.w1_b)
        w2_a, w2_b = without_core(self.t2, self.w2_a, self.w2_b)
        return LohaWeights(w1_a, w1_b, w2_a, w2_b, self.alpha, self.shape)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """What is added to the base weight: float32, in its shape."""
        parts = [self.w1_a, self.w1_b, self.w2_a, self.w2_b, self.t1, self.t2]
        floats = [None if one is None else one.float() for one in parts]
        return loha_delta(*floats, scale=self.scale, shape=self.shape)  # type: ignore[arg-type]

    def check(self, base: Adaptable) -> str | None:
        return shape_problem(self.pieces, _shapes(base, self.rank, self.t1 is not None))


class _ThinHadamard(torch.autograd.Function):
    """x (..., in) times the transpose of scale (a1 b1) * (a2 b2); keeps x and the thin matrices alone.

    Plain operations would keep three matrices of the weight's size for each layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, a1, b1, a2, b2)
        ctx.scale = scale
        return x @ ((a1 @ b1) * (a2 @ b2) * scale).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a1, b1, a2, b2 = ctx.saved_tensors
        first, second = a1 @ b1, a2 @ b2
        of_x = grad @ (first * second * ctx.scale) if ctx.needs_input_grad[0] else None
        of_delta = (grad.flatten(0, -2).T @ x.flatten(0, -2)) * ctx.scale
        of_first, of_second = of_delta * second, of_delta * first
        return of_x, of_first @ b1.T, a1.T @ of_first, of_second @ b2.T, a2.T @ of_second, None


class LohaLayer(AdapterLayer):
    """A LoHa over `base`, which stays frozen."""

    def __init__(self, base: nn.Module, weights: LohaWeights, dropout: Dropout) -> None:
        super().__init__(base, dropout)
        for name, piece in weights.pieces.items():
            self.register_parameter(name, nn.Parameter(placed(base, piece)))
        self.alpha, self.rank, self.shape = weights.alpha, weights.rank, weights.shape
        self._product = own_product(innermost(base))

    @classmethod
    def fresh(cls, base: Adaptable, choice: ModuleChoice, seed: int, name: str) -> LohaWeights:
        """As LyCORIS: normal with 0.1 for the first, 1 for those beside the inputs and 0.1 in cores, `w2_a` zero."""
        assert isinstance(choice.method, Loha)
        tucker = choice.method.tucker and kernel_volume(base) > 1
        deviations = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}
        deviations |= {"hada_t1": 0.1, "hada_t2": 0.1}
        pieces = {
            own: deviations[own] * torch.randn(shape, generator=torch_generator(seed, own, name))
            for own, shape in _shapes(base, choice.rank, tucker).items()
        }
        return loha_weights(pieces, choice.alpha, weight_shape(base))

    @classmethod
    def of(cls, base: nn.Module, weights: AdapterWeights, dropout: Dropout) -> Self:
        assert isinstance(weights, LohaWeights)
        return cls(base, weights, dropout)

    def added(self, x: Tensor, output: Tensor) -> Tensor:
        a1, b1, a2, b2, *cores = self.in_type(x.dtype)
        scale = self.alpha / self.rank
        if len(self.shape) == 2:
            product: Tensor = _ThinHadamard.apply(x, a1, b1, a2, b2, scale)  # type: ignore[no-untyped-call]
        else:
            product = self._product(x, loha_delta(a1, b1, a2, b2, *cores, scale=scale, shape=self.shape))
        return self.kept_outputs(product)

    def weights(self) -> LohaWeights:
        pieces = {
            name: one.detach().float().cpu().clone() for name, one in self.named_parameters(recurse=False)
        }
        return loha_weights(pieces, self.alpha, self.shape)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout.inputs:g}"


def loha_weights(pieces: dict[str, Tensor], alpha: float, shape: tuple[int, ...]) -> LohaWeights:
    """From what a file holds, by the end of its keys."""
    return LohaWeights(
        pieces["hada_w1_a"],
        pieces["hada_w1_b"],
        pieces["hada_w2_a"],
        pieces["hada_w2_b"],
        alpha,
        shape,
        pieces.get("hada_t1"),
        pieces.get("hada_t2"),
    )


def _shapes(base: Adaptable, rank: int, tucker: bool) -> dict[str, tuple[int, ...]]:
    out, into, *kernel = weight_shape(base)
    if tucker:
        return {
            "hada_w1_a": (rank, out),
            "hada_w1_b": (rank, into),
            "hada_w2_a": (rank, out),
            "hada_w2_b": (rank, into),
            "hada_t1": (rank, rank, *kernel),
            "hada_t2": (rank, rank, *kernel),
        }
    into *= kernel_volume(base)
    return {
        "hada_w1_a": (out, rank),
        "hada_w1_b": (rank, into),
        "hada_w2_a": (out, rank),
        "hada_w2_b": (rank, into),
    }
