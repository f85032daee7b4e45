"""What an optimizer is, and which values in its groups it has learned."""

from __future__ import annotations

import inspect

import torch

_NEVER = {"params", "lr", "initial_lr", "param_names", "decoupled_weight_decay"}


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """What its state belongs to: the class, or what it says of itself in an attribute `kind`."""
    told: str | None = getattr(optimizer, "kind", None)
    return told or type(optimizer).__name__


def learned_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Keys of its groups that no argument of its class sets: counters, estimates, modes. All else is an option.

    A class that knows better says so in an attribute `learned`.
    """
    told: tuple[str, ...] | None = getattr(optimizer, "learned", None)
    if told is not None:
        return told
    options = inspect.signature(type(optimizer)).parameters.keys() | _NEVER
    found = dict.fromkeys(key for group in optimizer.param_groups for key in group if key not in options)
    return tuple(key for key in found if not _holds_tensors(optimizer, key))


def _holds_tensors(optimizer: torch.optim.Optimizer, key: str) -> bool:
    """Sums within a step, as Prodigy's: nothing to keep between two."""
    return any(isinstance(group.get(key), torch.Tensor) for group in optimizer.param_groups)
