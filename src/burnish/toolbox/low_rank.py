"""The best approximation of a matrix by a product of two thin ones, and how much of it that leaves out.

Small matrices are decomposed exactly. Of large ones the leading directions are found by subspace iteration (Halko,
Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4), which goes on until another round makes the squared error smaller by
less than a thousandth; where it does not get there the decomposition is exact after all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.adapters.lora import LoraWeights
from burnish.errors import UserError

EXACT_UP_TO = 512  # the shorter side of a matrix that is decomposed as a whole
_SPARE = 16  # directions beside those that are wanted, for which iteration converges faster
_FIRST_GUESS = 32
_ROUNDS = 12
_NEGLIGIBLE = 1e-3  # of the squared error, by which one more round makes it smaller
_ROUNDING = 1e-7  # of the squared norm, below which float32 tells nothing


@dataclass(frozen=True, slots=True)
class RankChoice:
    """How many directions are kept; the largest number that any of what is given allows.

    Args:
        rank: at most so many.
        energy: as few as hold this share of the squared norm.
        threshold: those of singular values above this.
    """

    rank: int | None = None
    energy: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None and self.threshold is None:
            raise UserError("no rank was given", remedy="Add --rank, --energy or --threshold.")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"a rank of {self.rank} keeps nothing", remedy="Give --rank 1 or more.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(
                f"an energy of {self.energy} is no share", remedy="Give --energy between 0 and 1."
            )
        if self.threshold is not None and self.threshold < 0:
            raise UserError(f"a threshold of {self.threshold} is below 0")

    def count(self, singular_values: Tensor, total: float) -> int:
        """How many of the values, largest first, are kept; at least one."""
        kept = len(singular_values) if self.rank is None else min(self.rank, len(singular_values))
        if self.threshold is not None:
            kept = min(kept, int((singular_values > self.threshold).sum()))
        if self.energy is not None:
            held = singular_values.double().square().cumsum(0) >= self.energy * total * (1 - 1e-9)
            enough = int(held.nonzero()[0]) + 1 if held.any() else len(singular_values)
            kept = min(kept, enough)
        return max(kept, 1)

    def is_answered(self, singular_values: Tensor, total: float) -> bool:
        """Whether no value beyond these would be kept."""
        if self.rank is not None and self.rank <= len(singular_values):
            return True
        if self.threshold is not None and bool(singular_values[-1] <= self.threshold):
            return True
        held = float(singular_values.double().square().sum())
        return self.energy is not None and held >= self.energy * total

    def at_least(self, singular_values: Tensor, total: float) -> int:
        """How many values are needed if those that follow are as large as the last, which they are at most."""
        if self.energy is None or not singular_values[-1]:
            return 0
        missing = self.energy * total - float(singular_values.double().square().sum())
        return len(singular_values) + int(missing / float(singular_values[-1]) ** 2)


@dataclass(frozen=True, slots=True)
class Factored:
    """up (rows, rank) @ down (rank, columns), with the singular values shared out evenly between the two."""

    up: Tensor
    down: Tensor
    squared_norm: float  # of what was decomposed
    squared_error: float  # of what that leaves out

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def as_weights(self, shape: tuple[int, ...]) -> LoraWeights:
        """For a weight of that shape; scale 1."""
        ones = (1,) * (len(shape) - 2)
        return LoraWeights(
            self.down.reshape(-1, *shape[1:]), self.up.reshape(shape[0], -1, *ones), float(self.rank)
        )


def factored(matrix: Tensor, choice: RankChoice) -> Factored:
    """The best product of two thin matrices for a float32 `matrix`."""
    total = float(matrix.double().square().sum()) if matrix.numel() < 1 << 22 else _squared_norm(matrix)
    if total == 0.0:
        rows, columns = matrix.shape
        return Factored(matrix.new_zeros(rows, 1), matrix.new_zeros(1, columns), 0.0, 0.0)
    u, s, v = _leading(matrix, choice, total)
    kept = choice.count(s, total)
    root = s[:kept].sqrt()
    up, down = u[:, :kept] * root, root[:, None] * v[:, :kept].T
    return Factored(up, down, total, _squared_residual(matrix, up, down))


def _squared_norm(matrix: Tensor) -> float:
    """In float64, by parts that are small beside the matrix."""
    return sum(float(part.double().square().sum()) for part in torch.split(matrix.reshape(-1), 1 << 20))


def _squared_residual(matrix: Tensor, up: Tensor, down: Tensor) -> float:
    """Of the matrix less up @ down, by rows, so that no second matrix is in memory."""
    rows = max(1, (1 << 22) // matrix.shape[1])
    pairs = zip(torch.split(matrix, rows), torch.split(up, rows), strict=True)
    return sum(_squared_norm(torch.addmm(own, part, down, alpha=-1.0)) for own, part in pairs)


def _leading(matrix: Tensor, choice: RankChoice, total: float) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors, values and right vectors, at least as many as the choice asks for."""
    shorter = min(matrix.shape)
    wanted = min(choice.rank or _FIRST_GUESS, shorter)
    while shorter > EXACT_UP_TO and wanted + _SPARE < shorter // 3:
        found = _iterated(matrix, wanted, choice, total)
        if found is None:
            break
        if choice.is_answered(found[1], total):
            return found
        wanted = max(2 * wanted, choice.at_least(found[1], total))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh.T


def _iterated(
    matrix: Tensor, wanted: int, choice: RankChoice, total: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The `wanted` leading directions; None where the iteration does not settle."""
    rows, columns = matrix.shape
    if rows < columns:
        found = _iterated(matrix.T, wanted, choice, total)
        return None if found is None else (found[2], found[1], found[0])
    generator = torch.Generator().manual_seed(rows * 1_000_003 + columns)
    start = torch.randn(columns, wanted + _SPARE, generator=generator)
    basis, before = torch.linalg.qr(matrix @ start)[0], torch.zeros(wanted, dtype=torch.float64)
    for _ in range(_ROUNDS):
        small = basis.T @ matrix
        values, vectors = torch.linalg.eigh(small.double() @ small.double().T)
        order = torch.arange(len(values) - 1, len(values) - 1 - wanted, -1)
        now = values[order].clamp(min=0)
        # Directions beyond those that are kept may still turn.
        kept = choice.count(now.sqrt(), total)
        held, gained = float(now[:kept].sum()), float((now - before)[:kept].sum())
        if gained <= _NEGLIGIBLE * (total - held) + _ROUNDING * total:
            s = now.sqrt()
            u = basis @ vectors[:, order].float()
            # A direction without length has no right vector; its place does not matter.
            v = (small.T @ vectors[:, order].float()) / s.clamp(min=1e-30).float()
            return u, s.float(), v
        before = now
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(small.T)[0])[0]
    return None


def reduced(weights: LoraWeights, choice: RankChoice) -> tuple[LoraWeights, Factored]:
    """A LoRA of lower rank, by the exact decomposition of the product of its thin matrices."""
    up, down = weights.scale * weights.up.flatten(1).double(), weights.down.flatten(1).double()
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(left[1] @ right[1].T)
    total = float(s.square().sum())
    kept = choice.count(s, total) if total else 1
    root = s[:kept].sqrt()
    smaller = Factored(
        (left[0] @ u[:, :kept] * root).float(),
        (root[:, None] * (vh[:kept] @ right[0].T)).float(),
        total,
        float(s[kept:].square().sum()),
    )
    shape = (weights.up.shape[0], *weights.down.shape[1:])
    return smaller.as_weights(shape), smaller


@dataclass
class Losses:
    """What approximations left out, summed up over modules."""

    squared_norm: float = 0.0
    squared_error: float = 0.0
    worst: float = 0.0
    worst_module: str = ""

    def add(self, module: str, found: Factored) -> None:
        self.squared_norm += found.squared_norm
        self.squared_error += found.squared_error
        one = (found.squared_error / found.squared_norm) ** 0.5 if found.squared_norm else 0.0
        if one > self.worst:
            self.worst, self.worst_module = one, module

    @property
    def relative(self) -> float:
        """Norm of what is left out beside the norm of the whole."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0
