"""How the changes of several adapters to one weight become one change.

sum    each times its weight, added up (task arithmetic, arXiv 2212.04089)
ties   each trimmed to its largest entries; of each entry the sign that weighs more in sum, and the mean of those
       that have it (TIES, arXiv 2306.01708)
dare   of each, entries left out at random and the others enlarged, so that the mean stays (DARE, arXiv 2311.03099);
       then added up
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from burnish.errors import UserError
from burnish.randomness import torch_generator

Method = Literal["sum", "ties", "dare"]


@dataclass(frozen=True, slots=True)
class Combination:
    """Args:
    density: share of entries that TIES keeps and DARE draws.
    seed: of what DARE leaves out; with the module's name and the adapter's place it tells all.
    """

    method: Method = "sum"
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            known = ", ".join(get_args(Method))
            raise UserError(f"there is no method {self.method!r}", remedy=f"Give --method {known}.")
        if not 0 < self.density <= 1:
            raise UserError(
                f"a density of {self.density} is no share", remedy="Give --density above 0, up to 1."
            )

    def combined(self, name: str, changes: Sequence[Tensor]) -> Tensor:
        """One change of those of several adapters to the module `name`, each already times its weight."""
        if self.method == "sum":
            return _added(changes)
        if self.method == "dare":
            return _added([self._thinned(name, number, one) for number, one in enumerate(changes)])
        trimmed = [self._trimmed(one) for one in changes]
        sign = torch.where(_added(trimmed) >= 0, 1.0, -1.0)
        total, count = torch.zeros_like(sign), torch.zeros_like(sign)
        for one in trimmed:
            agrees = one.sign() == sign
            total += one * agrees
            count += agrees
        return total / count.clamp(min=1)

    def _trimmed(self, change: Tensor) -> Tensor:
        kept = int(self.density * change.numel())
        if kept >= change.numel():
            return change
        flat = torch.zeros(change.numel())
        places = change.abs().flatten().topk(kept).indices
        flat[places] = change.flatten()[places]
        return flat.reshape(change.shape)

    def _thinned(self, name: str, number: int, change: Tensor) -> Tensor:
        drawn = torch.rand(change.shape, generator=torch_generator(self.seed, "dare", name, number))
        return change * (drawn < self.density) / self.density


def _added(changes: Sequence[Tensor]) -> Tensor:
    total = changes[0].clone()
    for one in changes[1:]:
        total += one
    return total
