"""Which modules get an adapter, and of which rank, alpha and learning rate.

Patterns are `fnmatch` patterns over the module names of the denoiser, case-sensitive; `*` also crosses dots.
The name of a set (`adapters/target_sets.py`) stands for its patterns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from burnish.adapters.layer import (
    Convolution,
    ModuleChoice,
    adaptable_modules,
    kernel_volume,
    largest_rank,
)
from burnish.adapters.target_sets import Sets, expanded, matches, named_set, sets_of
from burnish.config.method import AdapterMethod, LoraGroup, LowRank, Turning
from burnish.errors import AdapterError
from burnish.family import TargetSet

__all__ = ["ModuleChoice", "choose_modules"]


def choose_modules(
    denoiser: nn.Module, targets: Mapping[str, TargetSet], default: str, method: AdapterMethod
) -> dict[str, ModuleChoice]:
    """The modules to train, in module order: the named set plus `include`, less `exclude`.

    Convolutions larger than 1x1 take `conv_rank` and `conv_alpha`; without those they are treated like linear
    layers. The first group that matches a module overrides what it sets.

    Raises:
        AdapterError: an unknown set, a pattern without any effect, nothing left to train, or a rank above
            what a module can hold.
    """
    modules = adaptable_modules(denoiser)
    sets = sets_of(targets, denoiser)
    wanted = [*named_set(sets, method.targets or default).patterns, *expanded(method.include, sets)]
    unwanted = expanded(method.exclude, sets)
    for pattern in _plain_patterns(method.include, sets, "include", modules):
        _must_match("include", pattern, modules, denoiser)
    every_name = [name for name, _ in denoiser.named_modules()]
    for pattern in _plain_patterns(method.exclude, sets, "exclude", modules):
        # Leaving out what takes no adapter anyway, such as `*norm*`, is what was asked for.
        if not any(fnmatchcase(name, pattern) for name in every_name):
            _must_match("exclude", pattern, modules, denoiser)
    names = [name for name in modules if matches(name, wanted) and not matches(name, unwanted)]
    if not names:
        raise AdapterError(
            f"no module is left to train: targets {method.targets or default!r}, include {method.include}, "
            f"exclude {method.exclude}",
            remedy="Exclude less, or name modules in `method.include`.",
        )
    for group in method.groups:
        for pattern in _plain_patterns(group.match, sets, "groups", names):
            _must_match("groups", pattern, names, denoiser)

    choices = {name: _choice(name, modules[name], method, sets) for name in names}
    if isinstance(method, LowRank):
        _check_ranks({name: (choice.rank, largest_rank(modules[name])) for name, choice in choices.items()})
    return choices


def _choice(name: str, module: nn.Linear | Convolution, method: AdapterMethod, sets: Sets) -> ModuleChoice:
    group = next((one for one in method.groups if matches(name, expanded(one.match, sets))), None)
    rate = group.learning_rate if group is not None else None
    if isinstance(method, Turning):
        return ModuleChoice(method.block_size, 0.0, rate, method)
    rank, alpha = method.rank, method.alpha
    if isinstance(method, LowRank) and kernel_volume(module) > 1:
        if method.conv_rank is not None:
            rank, alpha = method.conv_rank, None
        alpha = method.conv_alpha if method.conv_alpha is not None else alpha
    if isinstance(group, LoraGroup):
        rank = group.rank if group.rank is not None else rank
        alpha = group.alpha if group.alpha is not None else alpha
    if alpha is None:
        alpha = rank
    elif isinstance(method, LowRank) and method.rs_scaling:
        alpha *= rank**0.5  # divided by the rank, as everywhere, it is alpha / sqrt(rank)
    return ModuleChoice(rank, float(alpha), rate, method)


def _plain_patterns(patterns: Sequence[str], sets: Sets, option: str, names: Iterable[str]) -> list[str]:
    """The patterns that are no set's name.

    Raises:
        AdapterError: a set has none of these modules.
    """
    among = list(names)
    for entry in patterns:
        if entry in sets and not any(matches(name, sets[entry].patterns) for name in among):
            raise AdapterError(
                f"method.{option}: the set {entry!r} has none of the modules"
                + (" that are trained" if option == "groups" else ""),
                remedy="Leave it out, or name others: " + ", ".join(sets),
            )
    return [entry for entry in patterns if entry not in sets]


def _must_match(option: str, pattern: str, names: Iterable[str], denoiser: nn.Module) -> None:
    if any(fnmatchcase(name, pattern) for name in names):
        return
    others = [name for name, _ in denoiser.named_modules() if name and fnmatchcase(name, pattern)]
    adaptable = [name for name in others if name in adaptable_modules(denoiser)]
    if adaptable:
        problem = f"matches only modules that are not trained, such as {adaptable[0]}"
        remedy = "Add them to `method.include`, or drop the pattern."
    elif others:
        kind = type(denoiser.get_submodule(others[0])).__name__
        problem = f"matches only modules that take no adapter, such as {others[0]} ({kind})"
        remedy = "Adapters go on linear and ungrouped convolution layers; try " + _near(
            f"{others[0]}.*", names
        )
    else:
        problem = "matches no module"
        remedy = "Patterns are matched against whole names; near ones: " + _near(pattern, names)
    raise AdapterError(f"method.{option}: the pattern {pattern!r} {problem}", remedy=remedy)


def _near(pattern: str, names: Iterable[str]) -> str:
    """Module names like `pattern`, with block numbers and everything before the last parts as `*`."""
    spellings: dict[str, None] = {}
    for name in names:
        general = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        parts = general.split(".")
        spellings[general] = None
        spellings.update(dict.fromkeys("*" + ".".join(parts[start:]) for start in range(1, len(parts))))
    near = get_close_matches(pattern, spellings, n=3, cutoff=0.5) or list(spellings)[:3]
    return ", ".join(near)


def _check_ranks(ranks: Mapping[str, tuple[int, int]]) -> None:
    """`ranks` holds each module's rank and the largest one it can use."""
    too_large = {name: pair for name, pair in ranks.items() if pair[0] > pair[1]}
    if not too_large:
        return
    shown = [f"{name} (rank {rank}, at most {most})" for name, (rank, most) in list(too_large.items())[:5]]
    more = f" and {len(too_large) - 5} more" if len(too_large) > 5 else ""
    least = min(most for _, most in too_large.values())
    raise AdapterError(
        f"the rank is larger than {len(too_large)} modules can use: {', '.join(shown)}{more}",
        remedy="Exclude them, or put a group before the others, such as "
        f"{{match: [{next(iter(too_large))!r}], rank: {least}}}.",
    )
