"""A denoiser's own weights as what is trained: all of them, or those that patterns name.

Patterns are `fnmatch` patterns, case-sensitive, over names of modules and of parameters; one that matches a module
stands for every weight within it. The name of a set (`adapters/target_sets.py`) stands for its patterns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Self

from torch import nn

from burnish.adapters.target_sets import Sets, expanded, named_set, sets_of
from burnish.config.method import Full
from burnish.errors import ConfigError
from burnish.family import TargetSet

Rates = Mapping[str, float | None]
"""By parameter, its own peak learning rate; None means the optimizer's."""


class OwnWeights:
    """The weights of one denoiser that train, in place; the others stay frozen."""

    def __init__(self, denoiser: nn.Module, rates: Rates) -> None:
        self.denoiser = denoiser
        self._rates = dict(rates)

    @classmethod
    def unfreeze(cls, denoiser: nn.Module, rates: Rates) -> Self:
        """Let the named parameters record gradients; to be called once the denoiser has its number types."""
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(name in rates)
        return cls(denoiser, rates)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Those that train, by the denoiser's own names and in its order."""
        return {name: one for name, one in self.denoiser.named_parameters() if name in self._rates}

    def parameter_groups(self, default_lr: float) -> list[dict[str, Any]]:
        """Optimizer groups, one per learning rate: `params`, `lr` and the parameters' `names`."""
        groups: dict[float, dict[str, Any]] = {}
        for name, parameter in self.named_parameters().items():
            chosen = self._rates[name]
            rate = default_lr if chosen is None else chosen
            group = groups.setdefault(rate, {"params": [], "lr": rate, "names": []})
            group["params"].append(parameter)
            group["names"].append(name)
        return list(groups.values())


def choose_weights(
    denoiser: nn.Module, targets: Mapping[str, TargetSet], method: Full
) -> dict[str, float | None]:
    """The parameters to train, in the denoiser's order, each with its own learning rate or None.

    All, or those of the named set and of `include`; less those of `exclude`.

    Raises:
        AdapterError: an unknown set.
        ConfigError: a pattern without any effect, or nothing left to train.
    """
    names = [name for name, one in denoiser.named_parameters() if one.is_floating_point()]
    sets = sets_of(targets, denoiser)
    for option, patterns in (("include", method.include), ("exclude", method.exclude)):
        for pattern in patterns:
            _must_match(option, pattern, names, sets)
    wanted = expanded(method.include, sets)
    if method.targets is not None:
        wanted += named_set(sets, method.targets).patterns
    chosen = [name for name in names if not wanted or _matches(name, wanted)]
    unwanted = expanded(method.exclude, sets)
    chosen = [name for name in chosen if not _matches(name, unwanted)]
    if not chosen:
        raise ConfigError(
            f"no weight is left to train: targets {method.targets}, include {method.include}, exclude {method.exclude}",
            remedy="Exclude less, or name modules in `method.include`.",
        )
    for group in method.groups:
        for pattern in group.match:
            _must_match("groups", pattern, chosen, sets)
    groups = [(one.learning_rate, expanded(one.match, sets)) for one in method.groups]
    return {name: next((rate for rate, match in groups if _matches(name, match)), None) for name in chosen}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits a parameter or one of the modules that it is in."""
    parts = name.split(".")
    places = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(place, pattern) for pattern in patterns for place in places)


def _must_match(option: str, pattern: str, names: Sequence[str], sets: Sets) -> None:
    patterns = expanded([pattern], sets)
    if any(_matches(name, patterns) for name in names):
        return
    near = get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
    raise ConfigError(
        f"method.{option}: the pattern {pattern!r} matches no weight"
        + (" that trains" if option == "groups" else ""),
        remedy=f"Patterns are matched against whole names of modules and weights; near ones: {', '.join(near)}",
    )
