"""Adapters between diffusers' modules and those of the original release, which may stack several along their rows.

Exact both ways. Parts with A_i (r_i, in) and B_i (out_i, r_i) stack to A = [A_1; A_2; ...] of rank r_1 + r_2 + ...
and to B with s_i B_i in the rows of part i and the columns of its rank, zero elsewhere; s_i is alpha_i / r_i. The other
way each part takes the whole A and its own rows of B, less the columns that are zero there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from burnish.adapters.lora import LoraWeights
from burnish.errors import AdapterError
from burnish.export_keys import ExportKeys, NativeModule


def native_module(keys: ExportKeys, name: str) -> NativeModule:
    """Where the original release keeps one of diffusers' modules."""
    return NativeModule(name, (name,)) if keys.native is None else keys.native(name)


def stacked(
    weights: Mapping[str, LoraWeights], keys: ExportKeys, shapes: Mapping[str, Sequence[int]]
) -> dict[str, LoraWeights]:
    """The adapters of native modules, those that a reader cannot do without included; scale 1.

    Args:
        shapes: of the weights of all modules of the denoiser, trained or not, by diffusers' names.

    Raises:
        AdapterError: a part is no module of the denoiser, or has other inputs than its neighbours.
    """
    wanted = dict.fromkeys(weights)
    wanted |= dict.fromkeys(name for name in shapes if _is_one_of(name, keys.complete))
    natives = {native.name: native for native in (native_module(keys, name) for name in wanted)}
    return {name: _stack(native, weights, shapes) for name, native in natives.items()}


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _stack(
    native: NativeModule, weights: Mapping[str, LoraWeights], shapes: Mapping[str, Sequence[int]]
) -> LoraWeights:
    unknown = [part for part in native.holds if part not in shapes]
    if unknown:
        raise AdapterError(
            f"{native.name} of the original release holds {unknown[0]}, which this model does not have",
            remedy="Set save.format: auto.",
        )
    inputs = {tuple(shapes[part][1:]) for part in native.holds}
    if len(inputs) > 1:
        raise AdapterError(f"{native.name} cannot hold {', '.join(native.holds)}: inputs {sorted(inputs)}")
    down, up = _products(native.holds, weights, shapes)
    if native.halves_swapped:
        up = _swapped(up)
    return LoraWeights(down, up, float(down.shape[0]))


def _products(
    parts: Sequence[str], weights: Mapping[str, LoraWeights], shapes: Mapping[str, Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """A and B, with the strengths in B; zeros of rank 1 where no part was trained."""
    trained = [weights[part] for part in parts if part in weights]
    first = shapes[parts[0]]
    rank = sum(one.rank for one in trained)
    up = torch.zeros(sum(shapes[part][0] for part in parts), max(rank, 1), *(1 for _ in first[2:]))
    if not trained:
        return torch.zeros(1, *first[1:]), up
    row = column = 0
    for part in parts:
        if part in weights:
            one = weights[part]
            up[row : row + shapes[part][0], column : column + one.rank] = one.up * one.scale
            column += one.rank
        row += shapes[part][0]
    return torch.cat([one.down for one in trained]), up


def _swapped(up: Tensor) -> Tensor:
    first, second = up.chunk(2)
    return torch.cat([second, first])


def unstacked(
    native: NativeModule, adapter: LoraWeights, shapes: Mapping[str, Sequence[int]]
) -> dict[str, LoraWeights]:
    """The adapters of diffusers' modules that a native one holds; None of those that it does nothing to.

    Raises:
        AdapterError: B has another number of rows than these modules together.
    """
    rows = [shapes[part][0] for part in native.holds]
    if adapter.up.shape[0] != sum(rows):
        raise AdapterError(
            f"the adapter of {native.name} has {adapter.up.shape[0]} rows; this model's has {sum(rows)}",
            remedy="The adapter was trained on a model of another size or family.",
        )
    up = _swapped(adapter.up) if native.halves_swapped else adapter.up
    found = {}
    for part, own in zip(native.holds, torch.split(up, rows), strict=True):
        used = own.flatten(2).abs().sum(dim=(0, 2)) > 0 if own.dim() > 2 else own.abs().sum(0) > 0
        if used.any():
            down, own = adapter.down[used].contiguous(), own[:, used].contiguous()
            found[part] = LoraWeights(down, own, adapter.scale * int(used.sum()))
    return found
