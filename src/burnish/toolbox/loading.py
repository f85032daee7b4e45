"""The modules of an adapter file in groups and in memory, and what most of them have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch

from burnish.errors import AdapterError
from burnish.export_keys import NativeModule
from burnish.toolbox.base import Base
from burnish.toolbox.models import Model
from burnish.toolbox.pieces import ModuleAdapter
from burnish.toolbox.source import AdapterSource, Entry


def type_of(source: AdapterSource) -> torch.dtype:
    """Of most of its tensors, the scalars aside."""
    counts: dict[torch.dtype, int] = {}
    for stored in source.file.tensors.values():
        if stored.shape and stored.dtype.is_floating_point:
            counts[stored.dtype] = counts.get(stored.dtype, 0) + stored.nbytes
    return max(counts, key=lambda one: counts[one])


def common_alpha(source: AdapterSource) -> float:
    """The one that most modules of a file have, else their rank."""
    counts: dict[float, int] = {}
    for entry in source.entries():
        alpha = entry.alpha() or entry.rank
        if alpha:
            counts[float(alpha)] = counts.get(float(alpha), 0) + 1
    return max(counts, key=lambda one: counts[one]) if counts else 1.0


def groups(
    model: Model, modules: Mapping[NativeModule, Entry]
) -> Iterator[tuple[NativeModule, list[tuple[NativeModule, Entry]]]]:
    """Entries by the native module that holds what they change."""
    found: dict[str, tuple[NativeModule, list[tuple[NativeModule, Entry]]]] = {}
    for target, entry in modules.items():
        native = model.native(target.holds[0])
        found.setdefault(native.name, (native, []))[1].append((target, entry))
    yield from found.values()


def load(
    source: AdapterSource, target: NativeModule, entry: Entry, base: Base | None = None
) -> ModuleAdapter:
    """A module's adapter in memory, for the base's shape where there is one."""
    return entry.load(shape_for(source, target, entry, base))


def shape_for(
    source: AdapterSource, target: NativeModule, entry: Entry, base: Base | None
) -> tuple[int, ...]:
    """Of the weight that an adapter changes: the base's, else what its own pieces tell."""
    if base is not None:
        return base.target_shape(target)
    assert source.model is not None
    released = source.model.shape_of(target)
    told = entry.change_shape()
    if told is None or told == (released[0], prod(released[1:])):
        return released
    kernel = released[2:]
    if told[1] % prod(kernel):
        raise AdapterError(
            f"{source.path}: {entry.spelled} changes {told}, which is no weight with a kernel {kernel}"
        )
    return told[0], told[1] // prod(kernel), *kernel


def released_widths(model: Model, source: AdapterSource) -> bool:
    """Whether all that is known of the file is of the released model's size."""
    told = {target: entry.change_shape() for target, entry in source.modules.items()}
    shapes = {target: model.shape_of(target) for target in told}
    return all(one is None or one == (shapes[t][0], prod(shapes[t][1:])) for t, one in told.items())
