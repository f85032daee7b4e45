"""LoRAs between the modules of a file and those of another naming: put together, taken apart, added up; all exact.

The sum of LoRAs of one module is a LoRA again, of the ranks together: [s_1 B_1, s_2 B_2, ...] [A_1; A_2; ...].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from burnish.adapters.lora import LoraWeights
from burnish.errors import AdapterError
from burnish.export.stacking import stacked, unstacked
from burnish.export_keys import NativeModule
from burnish.toolbox.models import Model

Targeted = tuple[NativeModule, LoraWeights]


def added_up(adapters: Sequence[LoraWeights]) -> LoraWeights:
    """Their sum, of the ranks together; scale 1 unless there is only one."""
    if len(adapters) == 1:
        return adapters[0]
    down = torch.cat([one.down for one in adapters])
    up = torch.cat([one.up * one.scale for one in adapters], dim=1)
    return LoraWeights(down, up, float(down.shape[0]))


def is_plain(target: NativeModule) -> bool:
    """Whether it means one module whose rows are in their order."""
    return len(target.holds) == 1 and not target.halves_swapped


def taken_apart(model: Model, adapters: Sequence[Targeted]) -> dict[str, LoraWeights]:
    """What adapters of one group do to each of diffusers' modules; modules without effect are left out."""
    parts: dict[str, list[LoraWeights]] = {}
    for target, weights in adapters:
        if is_plain(target):
            parts.setdefault(target.holds[0], []).append(weights)
            continue
        rows = model.rows(target, weights.up.shape[0])
        shapes = {
            name: (count, *weights.down.shape[1:]) for name, count in zip(target.holds, rows, strict=True)
        }
        for name, part in unstacked(target, weights, shapes).items():
            parts.setdefault(name, []).append(part)
    return {name: added_up(found) for name, found in parts.items()}


def put_together(model: Model, native: NativeModule, adapters: Sequence[Targeted]) -> LoraWeights:
    """One adapter of the native module that holds all that `adapters` change."""
    alike = [one for target, one in adapters if _is_same(target, native)]
    if len(alike) == len(adapters):
        return added_up(alike)
    parts = taken_apart(model, adapters)
    if not parts:  # none has any effect
        inputs = adapters[0][1].down.shape[1:]
        released = model.shape(native.holds[0])
        shapes = {part: (model.shape(part)[0] * inputs[0] // released[1], *inputs) for part in native.holds}
        parts = {native.holds[0]: _nothing(shapes[native.holds[0]])}
    else:
        shapes = part_shapes(model, native, parts)
    return stacked(parts, model.keys, shapes)[native.name]


def _is_same(target: NativeModule, native: NativeModule) -> bool:
    return target.holds == native.holds and target.halves_swapped == native.halves_swapped


def _nothing(shape: tuple[int, ...]) -> LoraWeights:
    ones = (1,) * (len(shape) - 2)
    return LoraWeights(torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1, *ones), 1.0)


def part_shapes(
    model: Model, native: NativeModule, parts: Mapping[str, LoraWeights]
) -> dict[str, tuple[int, ...]]:
    """Of the weights of all that a native module holds, from those that are known, in a release of any width.

    Raises:
        AdapterError: widths are no multiple of the released ones.
    """
    name, known = next(iter(parts.items()))
    rows, inputs = known.up.shape[0], tuple(known.down.shape[1:])
    released = model.shape(name)[0]
    shapes = {}
    for part in native.holds:
        own, rest = divmod(model.shape(part)[0] * rows, released)
        if rest:
            raise AdapterError(
                f"{native.name}: {part} would have {model.shape(part)[0] * rows / released} rows"
            )
        shapes[part] = (own, *inputs)
    return shapes
