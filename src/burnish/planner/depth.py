"""Tracing a shallow model for a deep one: the middle blocks of a run of equal ones all cost the same.

The first and the last of a run can differ (nothing trains before the first, the last may not need its input again), so
a shallow model has three of each. Whether it stands for the deep one is checked, not assumed: its runs of equal blocks
must be those of the deep one, in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import nn

from burnish.family import Family
from burnish.planner.profile import Profile

SHALLOW = 3
Kind = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """So many equal blocks in a row."""

    kind: Kind
    length: int


def runs_of(family: Family, choices: Mapping[str, Mapping[str, object]]) -> list[Run]:
    """The family's blocks as runs; equal are blocks of one class, equal shapes, and equal adapters."""
    owners = {
        module: (part, name) for part, one in family.denoisers.items() for name, module in one.named_modules()
    }
    kinds = [_kind(block, *owners[block], choices) for block in family.blocks()]
    return [Run(kind, len(list(same))) for kind, same in groupby(kinds)]


def _kind(block: nn.Module, part: str, name: str, choices: Mapping[str, Mapping[str, object]]) -> Kind:
    inside = {
        key.removeprefix(f"{name}."): choice
        for key, choice in choices.get(part, {}).items()
        if key.startswith(f"{name}.")
    }
    shapes = tuple((key, tuple(value.shape), value.dtype) for key, value in block.named_parameters())
    return part, type(block).__name__, shapes, tuple(sorted(inside.items(), key=lambda one: one[0]))


def stands_for(shallow: Sequence[Run], deep: Sequence[Run]) -> bool:
    return [run.kind for run in shallow] == [run.kind for run in deep] and all(
        few.length == many.length or SHALLOW <= few.length <= many.length
        for few, many in zip(shallow, deep, strict=True)
    )


def deepened(profile: Profile, shallow: Sequence[Run], deep: Sequence[Run]) -> Profile:
    """The deep model's profile from the shallow one's."""
    sources: list[int] = []  # the shallow block that each deep one is like
    start = 0
    for few, many in zip(shallow, deep, strict=True):
        middle = start + few.length // 2
        before = list(range(start, middle))
        after = list(range(middle + 1, start + few.length))
        sources += [*before, *[middle] * (1 + many.length - few.length), *after]
        start += few.length
    order = [
        block
        for source in profile.backward_order
        for block in reversed(range(len(sources)))
        if sources[block] == source
    ]
    weights = tuple(profile.weights[source] for source in sources)
    trained = tuple(profile.trained[source] for source in sources)
    before_bytes = sum(profile.weights) + sum(profile.trained) + profile.trained_outside
    after_bytes = sum(weights) + sum(trained) + profile.trained_outside
    ratio = (sum(trained) + profile.trained_outside) / (sum(profile.trained) + profile.trained_outside)
    return replace(
        profile,
        blocks=tuple(profile.blocks[source] for source in sources),
        backward_order=tuple(order),
        weights=weights,
        trained=trained,
        resident=profile.resident + after_bytes - before_bytes,
        first_level=profile.first_level + after_bytes - before_bytes,
        head_peak=profile.head_peak + after_bytes - before_bytes,
        optimizer_peak=int(profile.optimizer_peak * (1 if profile.singly else ratio)),
        optimizer=profile.optimizer.times(ratio),
    )
