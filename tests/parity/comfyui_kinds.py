"""ComfyUI's arithmetic for every kind of adapter, written anew from `comfy/weight_adapter/*.py` and `comfy/lora.py`.

One module's tensors by the end of their keys, and its weight; strength 1. Where ComfyUI would log an error and leave
the weight as it is, so does this, by returning None.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Pieces = Mapping[str, Tensor]


def changed_weight(pieces: Pieces, weight: Tensor) -> Tensor | None:
    """The weight with the adapter, or None."""
    alpha = pieces["alpha"].item() if "alpha" in pieces else None
    try:
        if "lora_up.weight" in pieces or "lora_B.weight" in pieces:
            delta, scale = lora(pieces, alpha)
        elif "hada_w1_a" in pieces:
            delta, scale = loha(pieces, alpha)
        elif any(name.startswith("lokr_") for name in pieces):
            delta, scale = lokr(pieces, alpha)
        elif "oft_blocks" in pieces:
            return weight + turned(pieces["oft_blocks"], weight, alpha)
        else:
            return None
        delta = scale * delta.reshape(weight.shape)
    except RuntimeError:
        return None
    if "dora_scale" in pieces:
        return decomposed(pieces["dora_scale"], weight, delta)
    return weight + delta


def lora(pieces: Pieces, alpha: float | None) -> tuple[Tensor, float]:
    up = pieces.get("lora_up.weight", pieces.get("lora_B.weight"))
    down = pieces.get("lora_down.weight", pieces.get("lora_A.weight"))
    assert up is not None
    assert down is not None
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    mid = pieces.get("lora_mid.weight")
    if mid is not None:
        shape = [down.shape[1], down.shape[0], mid.shape[2], mid.shape[3]]
        down = (
            (down.transpose(0, 1).flatten(1) @ mid.transpose(0, 1).flatten(1)).reshape(shape).transpose(0, 1)
        )
    return up.flatten(1) @ down.flatten(1), scale


def loha(pieces: Pieces, alpha: float | None) -> tuple[Tensor, float]:
    sides = []
    for number in (1, 2):
        a, b = pieces[f"hada_w{number}_a"], pieces[f"hada_w{number}_b"]
        core = pieces.get(f"hada_t{number}")
        sides.append(a @ b if core is None else torch.einsum("i j k l, j r, i p -> p r k l", core, b, a))
    return sides[0] * sides[1], 1.0 if alpha is None else alpha / pieces["hada_w1_b"].shape[0]


def lokr(pieces: Pieces, alpha: float | None) -> tuple[Tensor, float]:
    rank = None
    first = pieces.get("lokr_w1")
    if first is None:
        rank = pieces["lokr_w1_b"].shape[0]
        first = pieces["lokr_w1_a"] @ pieces["lokr_w1_b"]
    second = pieces.get("lokr_w2")
    if second is None:
        a, b, core = pieces["lokr_w2_a"], pieces["lokr_w2_b"], pieces.get("lokr_t2")
        rank = b.shape[0]
        second = a @ b if core is None else torch.einsum("i j k l, j r, i p -> p r k l", core, b, a)
    if second.dim() == 4:
        first = first[..., None, None]
    scale = alpha / rank if alpha is not None and rank is not None else 1.0
    return torch.kron(first, second), scale


def turned(blocks: Tensor, weight: Tensor, alpha: float | None) -> Tensor:
    skew = blocks - blocks.transpose(-1, -2)
    if alpha and skew.norm() > alpha:
        skew = skew * alpha / skew.norm()
    one = torch.eye(blocks.shape[-1])
    turns = (one + skew) @ (one - skew).inverse()
    if blocks.dim() == 3:
        count, size, _ = blocks.shape
        parts = weight.view(count, size, *weight.shape[1:])
        return torch.einsum("k n m, k n ... -> k m ...", turns - one, parts).reshape(weight.shape)
    size, whole = blocks.shape[-1], weight
    for stage, turn in enumerate(turns):
        k = 2**stage * (size // 2)
        whole = whole.unflatten(0, (-1, 2, k)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        whole = torch.einsum("b i j, b j ... -> b i ...", turn, whole)
        whole = whole.flatten(0, 1).unflatten(0, (-1, k, 2)).transpose(1, 2).flatten(0, 2)
    return whole - weight


def decomposed(scale: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
    """By rows, with the length of the weight before the change."""
    if scale.shape[0] != weight.shape[0] or scale.dim() != weight.dim():
        raise RuntimeError("dora_scale is for inputs, or of a shape that would be broadcast otherwise")
    own = weight.reshape(weight.shape[0], -1).norm(dim=1).reshape(scale.shape)
    return (weight + delta) * (scale / own)
