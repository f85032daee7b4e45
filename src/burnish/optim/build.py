"""An optimizer from its section of the config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from burnish.config.optimizers import AnyOptimizer
from burnish.errors import ConfigError
from burnish.optim.makers import make
from burnish.optim.one_by_one import OneByOne

_TRIED = 128  # rows and columns: as many numbers as optimizers in 8 bits begin with

Group = Mapping[str, Any]
"""`params`: the parameters; `lr`, if present: their own peak learning rate instead of the section's."""


def build_optimizer(
    section: AnyOptimizer, groups: Sequence[Group], *, seed: int = 0, one_by_one: bool = False
) -> torch.optim.Optimizer:
    """Build what moves the weights.

    Every group of the result has `initial_lr`, the peak that `apply_learning_rate` multiplies.

    Args:
        section: which optimizer, and its options.
        groups: parameters, and their own learning rate where it differs; other keys are left out.
        seed: of stochastic rounding.
        one_by_one: make a `OneByOne`, whose `step_one` steps a parameter as soon as its gradient is there.

    Raises:
        ConfigError: there is nothing to train; one parameter at a time is not for this kind; or arguments that a class
            by path does not take.
        MissingPackage: the optimizer's library is not here, or not for this device.
    """
    rated: list[dict[str, Any]] = []
    for group in groups:
        parameters, rate = list(group["params"]), group.get("lr")
        if parameters:
            rated.append({"params": parameters, "lr": section.learning_rate if rate is None else rate})
    if not rated:
        raise ConfigError(
            "there is nothing to train: no parameter was handed to the optimizer",
            remedy="Check `method.targets`, `method.include` and `method.exclude`.",
        )
    if one_by_one and section.together:
        raise ConfigError(
            f"train.optimizer.kind: {section.kind} steps all weights together: none can be stepped before the others",
            remedy="Use another kind, such as adamw, adafactor or came.",
        )
    if one_by_one or _needs_rounding(section, rated):
        optimizer: torch.optim.Optimizer = OneByOne(
            rated, partial(make, section), rounding=section.rounding, seed=seed, together=section.together
        )
    else:
        optimizer = make(section, rated)
    for built in optimizer.param_groups:
        built["initial_lr"] = built["lr"]
    return optimizer


def check_optimizer(section: AnyOptimizer, device: torch.device | str = "cpu") -> None:
    """Build it for a single small weight: what is wrong shows before anything loads.

    Raises:
        ConfigError, MissingPackage: as `build_optimizer`.
    """
    build_optimizer(section, [{"params": [Parameter(torch.zeros(2, 2, device=device))]}])


def state_bytes(section: AnyOptimizer, dtype: torch.dtype, device: torch.device | str) -> float:
    """Bytes of state that a weight of this type costs, from a step of a small matrix."""
    weight = Parameter(torch.ones(_TRIED, _TRIED, dtype=dtype, device=device))
    optimizer = build_optimizer(section, [{"params": [weight]}])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    leaves = [one for one in tree_leaves(optimizer.state[weight]) if isinstance(one, torch.Tensor)]
    return sum(one.nbytes for one in leaves) / weight.numel()


def what_is_lost(section: AnyOptimizer, parameters: Iterable[Parameter]) -> str:
    """What rounding to nearest does to weights that train in bfloat16, in words; empty where nothing is lost."""
    if section.rounding != "nearest" or not any(one.dtype == torch.bfloat16 for one in parameters):
        return ""
    return (
        "train.optimizer.rounding: nearest: the weights train in bfloat16, where steps of less than 1/512 of a weight "
        "round to nothing; stochastic and kahan keep them"
    )


def _needs_rounding(section: AnyOptimizer, groups: Sequence[Group]) -> bool:
    return section.rounding != "nearest" and any(
        one.dtype == torch.bfloat16 for group in groups for one in group["params"]
    )
