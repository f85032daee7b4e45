"""From the tensors of one module in a file to an adapter of any kind; and apart, where the release stacks layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from burnish.adapters.layer import AdapterWeights
from burnish.adapters.loha import LohaWeights, loha_weights
from burnish.adapters.lokr import LokrWeights
from burnish.adapters.lora import LoraWeights
from burnish.adapters.oft import OftWeights
from burnish.errors import AdapterError
from burnish.export.stacking import unstacked
from burnish.export_keys import NativeModule

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
OTHER_PIECES = (*_LOHA, *_LOKR, "oft_blocks")
_COMPLETE = (
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    set(_LOHA),
    *(
        {*first, *second}
        for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
        for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
    ),
    {"oft_blocks"},
)


def assembled(
    where: str, pieces: Mapping[str, Tensor], told: float | None, shape: tuple[int, ...]
) -> tuple[AdapterWeights, bool]:
    """The adapter of one module, and whether its alpha was told.

    Args:
        where: the module, for errors.
        told: alpha, if the file's metadata have it.
        shape: of the module's weight.

    Raises:
        AdapterError: tensors are missing or do not fit each other.
    """
    own = dict(pieces)
    lokr = any(name.startswith("lokr_") for name in own)
    magnitude = _lengths(where, own, shape) if lokr else None
    given = own.pop("alpha", None)
    if given is not None and given.numel() != 1:
        raise AdapterError(f"{where}: alpha is not one number but {tuple(given.shape)}")
    alpha = told if given is None else float(given)
    if not set(own) & set(OTHER_PIECES):
        return _lora(where, own, alpha), alpha is not None
    if set(own) not in _COMPLETE:
        raise AdapterError(
            f"{where} has {', '.join(sorted(own))}, which is no LoHa, LoKr or OFT of those that are read here",
            remedy="Scales of DoRA are read beside LoRA and LoKr alone.",
        )
    if "oft_blocks" in own:
        if alpha:
            raise AdapterError(f"{where} limits its turns (alpha {alpha:g}), which programs read differently")
        return OftWeights(own["oft_blocks"]), True
    if "hada_w1_a" in own:
        rank = own["hada_w1_b"].shape[0]
        return loha_weights(own, float(rank) if alpha is None else alpha, shape), alpha is not None
    found = LokrWeights(own, 1.0, shape, magnitude)
    rank_or_one = float(found.rank or 1)
    return replace(
        found, alpha=rank_or_one if alpha is None else alpha
    ), alpha is not None or found.rank is None


def _lora(where: str, pieces: Mapping[str, Tensor], alpha: float | None) -> LoraWeights:
    down, up, mid = (pieces.get(name) for name in ("down", "up", "mid"))
    if down is None or up is None:
        raise AdapterError(f"{where} has no {'down (A)' if down is None else 'up (B)'} matrix")
    if down.dim() < 2 or up.dim() < 2 or down.shape[0] != up.shape[1]:
        raise AdapterError(
            f"{where}: the matrices do not fit each other: {tuple(down.shape)} and {tuple(up.shape)}"
        )
    magnitude = _lengths(where, dict(pieces), up.shape)
    return LoraWeights(down, up, float(down.shape[0]) if alpha is None else alpha, mid, magnitude)


def _lengths(where: str, pieces: dict[str, Tensor], shape: Sequence[int]) -> Tensor | None:
    """DoRA's (out,), taken out of `pieces`; peft's where the file has both, which tells them as they were trained.

    Raises:
        AdapterError: they are of columns.
    """
    magnitude, scale = pieces.pop("magnitude", None), pieces.pop("dora_scale", None)
    if magnitude is not None or scale is None:
        return None if magnitude is None else magnitude.flatten()
    if scale.shape[0] != shape[0] or scale.numel() != len(scale):
        raise AdapterError(
            f"{where}: dora_scale {tuple(scale.shape)} is for inputs; it is read for outputs only"
        )
    return scale.flatten()


def taken_apart(
    native: NativeModule, adapter: AdapterWeights, shapes: Mapping[str, Sequence[int]]
) -> Mapping[str, AdapterWeights]:
    """The adapters of diffusers' modules that a native one holds; None of those that it does nothing to.

    Raises:
        AdapterError: it has another number of rows than these modules together, or is of a kind that has no parts.
    """
    if isinstance(adapter, LoraWeights):
        found = unstacked(native, adapter.untuckered(), shapes)
        if adapter.magnitude is None:
            return found
        lengths = torch.cat(adapter.magnitude.chunk(2)[::-1]) if native.halves_swapped else adapter.magnitude
        own = dict(
            zip(native.holds, torch.split(lengths, [shapes[part][0] for part in native.holds]), strict=True)
        )
        return {part: replace(one, magnitude=own[part]) for part, one in found.items()}
    heights = [shapes[part][0] for part in native.holds]
    if isinstance(adapter, LohaWeights) and adapter.t1 is None and len(adapter.w1_a) == sum(heights):
        sides = [
            torch.split(torch.cat(side.chunk(2)[::-1]) if native.halves_swapped else side, heights)
            for side in (adapter.w1_a, adapter.w2_a)
        ]
        return {
            part: replace(adapter, w1_a=first, w2_a=second, shape=tuple(shapes[part]))
            for part, first, second in zip(native.holds, *sides, strict=True)
            if first.any() and second.any()
        }
    if isinstance(adapter, OftWeights) and adapter.blocks.dim() == 3:
        size = adapter.blocks.shape[-1]
        blocks = torch.cat(adapter.blocks.chunk(2)[::-1]) if native.halves_swapped else adapter.blocks
        if len(blocks) * size == sum(heights) and not any(height % size for height in heights):
            parts = torch.split(blocks, [height // size for height in heights])
            return {part: OftWeights(one) for part, one in zip(native.holds, parts, strict=True) if one.any()}
    if len(native.holds) == 1 and not native.halves_swapped:
        return {native.holds[0]: adapter}
    raise AdapterError(
        f"the adapter of {native.name} cannot be taken apart for {', '.join(native.holds)}",
        remedy="Convert it to a LoRA with `burnish adapter convert`.",
    )
