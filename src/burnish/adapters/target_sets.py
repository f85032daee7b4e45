"""Named sets of modules: a family's own, and those that follow from them and from its stacks of blocks.

A set's name may stand wherever patterns do: in `include`, `exclude` and `groups`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from burnish.errors import AdapterError
from burnish.family import TargetSet

Sets = Mapping[str, TargetSet]


def derived_sets(targets: Sets) -> Sets:
    """A family's sets with `mlp` and `attention-out`, where it does not tell these itself."""
    attention, both = targets.get("attention"), targets.get("attention+mlp")
    if attention is None or both is None:
        return targets
    found = {
        "attention-out": TargetSet(
            tuple(one for one in attention.patterns if "out" in one),
            "Output of attention.",
            tuple(one for one in attention.audio if "out" in one),
        ),
        "mlp": TargetSet(
            tuple(one for one in both.patterns if one not in attention.patterns),
            "Feed-forward layers.",
            tuple(one for one in both.audio if one not in attention.audio),
        ),
    }
    return {**{name: one for name, one in found.items() if one.patterns}, **targets}


def sets_of(targets: Sets, model: nn.Module) -> Sets:
    """Those, and each stack of blocks under its own name; of two kinds also `single-blocks` and `double-blocks`."""
    stacks = [
        name
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList) or name.endswith("_block")
    ]
    found = {name: TargetSet((f"{name}.*",), f"Every layer of {name}.") for name in stacks}
    single = [name for name in stacks if name.startswith("single_")]
    double = [name for name in stacks if name.endswith("_blocks") and name not in single]
    if single and double:
        found["single-blocks"] = TargetSet(
            found[single[0]].patterns, "Every layer of the blocks of one stream."
        )
        found["double-blocks"] = TargetSet(
            found[double[0]].patterns, "Every layer of the blocks of two streams."
        )
    return {**found, **derived_sets(targets)}


def named_set(sets: Sets, name: str) -> TargetSet:
    """Raises:
    AdapterError: no set is called so; names those there are.
    """
    if name not in sets:
        near = get_close_matches(name, sets, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        known = ", ".join(f"{key} ({target.description})" for key, target in sets.items())
        raise AdapterError(f"no target set is called {name!r}", remedy=f"{hint}There are: {known}.")
    return sets[name]


def expanded(patterns: Iterable[str], sets: Sets) -> list[str]:
    """Patterns, with those of a set in the place of its name."""
    return [one for entry in patterns for one in (sets[entry].patterns if entry in sets else (entry,))]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns fits."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
