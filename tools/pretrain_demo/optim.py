"""bfloat16 training with float32 master weights, Muon for the matrices, and an average of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

LOW: Final = torch.bfloat16
_MUON_MOMENTUM: Final = 0.95
_NEWTON_SCHULZ: Final = (3.4445, -4.7750, 2.0315)  # Keller Jordan's quintic, 5 rounds
_LARGE_ROWS: Final = 800  # vocabularies and other tables with as many rows are not decayed
_AVERAGE_EVERY: Final = 5


def cosine_rate(step: int, steps: int, *, warmup: int, floor: float = 0.0) -> float:
    """Factor on the peak rate for step `step` (from 0) of `steps`: linear warm-up, then cosine to `floor`."""
    falling = 0.5 + 0.5 * math.cos(math.pi * (step + 1) / steps)
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * falling)


class Muon:
    """Momentum whose update is orthogonalised, for 2-D weights (Jordan et al., 2024).

    Matrices of the same size go through the iteration together. The update is scaled to the root mean square
    of AdamW's (Liu et al., 2025), so both can share one learning rate.
    """

    def __init__(self, weights: Sequence[Tensor], weight_decay: float) -> None:
        self._weights = list(weights)
        self._momentum = [torch.zeros_like(weight) for weight in self._weights]
        self._decay = weight_decay
        self._groups: dict[tuple[int, int], list[int]] = {}
        for number, weight in enumerate(self._weights):
            self._groups.setdefault((min(weight.shape), max(weight.shape)), []).append(number)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move every weight by its gradient's momentum."""
        for (_, longer), numbers in self._groups.items():
            updates = _orthogonalize(torch.stack([self._wide_update(number) for number in numbers]))
            for number, update in zip(numbers, updates * (0.2 * math.sqrt(longer)), strict=True):
                weight = self._weights[number]
                weight.mul_(1 - rate * self._decay).add_(_wide(update, weight), alpha=-rate)

    def _wide_update(self, number: int) -> Tensor:
        """Nesterov momentum, turned so that it is at least as wide as it is high."""
        gradient = self._weights[number].grad
        if gradient is None:
            raise RuntimeError("Muon.step was called before a backward pass")
        momentum = self._momentum[number].lerp_(gradient, 1 - _MUON_MOMENTUM)
        return _wide(gradient.lerp(momentum, _MUON_MOMENTUM), self._weights[number])


def _wide(update: Tensor, weight: Tensor) -> Tensor:
    return update if weight.shape[0] <= weight.shape[1] else update.mT


def _orthogonalize(updates: Tensor) -> Tensor:
    """The nearest matrices with all singular values near 1; shape (count, rows, columns), rows <= columns."""
    x = updates.to(LOW)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(LOW)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.float()


class MasterWeights:
    """A module that computes in bfloat16 while its weights are kept, stepped and averaged in float32."""

    def __init__(
        self,
        module: nn.Module,
        *,
        rate: float,
        weight_decay: float,
        muon_names: frozenset[str],
        slow_prefixes: tuple[str, ...] = (),
        slow_factor: float = 1.0,
        average_limit: float = 0.99,
    ) -> None:
        """Turn `module` to bfloat16 and remember its weights.

        Args:
            module: trained in place; call `finish` to get float32 back.
            rate: peak learning rate, of AdamW and of Muon.
            weight_decay: for matrices; vectors and large tables are not decayed.
            muon_names: parameters that Muon moves; AdamW moves the others.
            slow_prefixes: parameters with a rate of their own, undecayed.
            slow_factor: their rate, as a share of `rate`.
            average_limit: most of the old average that one averaging keeps (every 5 steps).
        """
        named = list(module.named_parameters())
        self._module = module
        self._names = [name for name, _ in named]
        self._masters = [weight.detach().float().clone() for _, weight in named]
        module.to(LOW).requires_grad_(True)
        self._weights = list(module.parameters())
        for master in self._masters:
            master.grad = torch.zeros_like(master)
        self._rate, self._limit, self._steps = rate, average_limit, 0
        by_name = dict(zip(self._names, self._masters, strict=True))
        self._muon = Muon([by_name[name] for name in self._names if name in muon_names], weight_decay)
        rest = {name: master for name, master in by_name.items() if name not in muon_names}
        self._adamw = _adamw(rest, rate, weight_decay, slow_prefixes, slow_factor)
        self._average = [master.clone() for master in self._masters]
        self.dtype = LOW

    def step(self, loss: Tensor, *, rate_factor: float) -> None:
        """Backward, clip to norm 1, one step of both optimizers, and now and then the average."""
        loss.backward()
        self._steps += 1
        with torch.no_grad():
            for master, weight in zip(self._masters, self._weights, strict=True):
                if weight.grad is not None and master.grad is not None:
                    master.grad.copy_(weight.grad)
                    weight.grad = None
            nn.utils.clip_grad_norm_(self._masters, 1.0)
            for group in self._adamw.param_groups:
                group["lr"] = self._rate * rate_factor * group["factor"]
            self._adamw.step()
            self._muon.step(self._rate * rate_factor)
            torch._foreach_copy_(self._weights, self._masters)
            if self._steps % _AVERAGE_EVERY == 0:
                kept = min(self._limit, (self._steps + 10) / (self._steps + 100))
                torch._foreach_lerp_(self._average, self._masters, 1 - kept)

    def average(self) -> dict[str, Tensor]:
        """The averaged weights by name, in float32: what a checkpoint stores."""
        return dict(zip(self._names, self._average, strict=True))

    def finish(self) -> None:
        """Leave the averaged weights in the module, in float32 and ready for use."""
        self._module.float()
        with torch.no_grad():
            torch._foreach_copy_(list(self._module.parameters()), self._average)
        self._module.eval().requires_grad_(False)


def _adamw(
    named: dict[str, Tensor],
    rate: float,
    weight_decay: float,
    slow_prefixes: tuple[str, ...],
    slow_factor: float,
) -> torch.optim.AdamW:
    slow = [weight for name, weight in named.items() if name.startswith(slow_prefixes or "\0")]
    fast = [weight for name, weight in named.items() if not name.startswith(slow_prefixes or "\0")]
    tables = [weight for weight in fast if weight.ndim > 1 and weight.shape[0] < _LARGE_ROWS]
    plain = [weight for weight in fast if not (weight.ndim > 1 and weight.shape[0] < _LARGE_ROWS)]
    groups = [
        {"params": tables, "weight_decay": weight_decay, "factor": 1.0},
        {"params": plain, "weight_decay": 0.0, "factor": 1.0},
        {"params": slow, "weight_decay": 0.0, "factor": slow_factor},
    ]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=rate, betas=(0.9, 0.99), eps=1e-8)
