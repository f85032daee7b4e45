"""Kinds of adapters beyond plain LoRA in the files of others: who reads which, under which names, as which tensors.

Tensors are LyCORIS', which ComfyUI reads (`hada_*`, `lokr_*`, `oft_blocks`), each with a float
`.alpha`: the scale stands in a factor and alpha is the rank, so that it is 1 for who reads alpha and for who does not.
diffusers reads LoKr for two families only (`ExportKeys.lokr`), the others not at all.

DoRA is written twice over: `lora_magnitude_vector` m for diffusers, and `dora_scale` (out, 1) for ComfyUI, which
divides by the lengths of the base weight's rows where the paper divides by those of W + dW. Hence dora_scale =
m |W| / |W + dW|, which gives ComfyUI the trained weight exactly at strength 1. Around a LoKr, which diffusers does not
read with lengths, m is `lokr_magnitude_vector`. Both are float32: they scale the whole
weight, and what bfloat16 would round off is more than most adapters change. A file in names that diffusers reads
without DoRA has m as well, so that diffusers refuses it instead of applying the rest of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from burnish.adapters.deltas import row_norms
from burnish.adapters.layer import Adaptable, AdapterWeights, ModuleChoice, weight_shape
from burnish.adapters.loha import LohaWeights
from burnish.adapters.lokr import A_1, WHOLE_1, WHOLE_2, LokrWeights
from burnish.adapters.lora import LoraWeights
from burnish.adapters.oft import OftWeights
from burnish.config.method import AdapterMethod, Lokr, Lora
from burnish.errors import AdapterError
from burnish.export_keys import AdapterFormat, ExportKeys, NativeModule

Kind = Literal["lora", "dora", "loha", "lokr", "dokr", "oft", "boft"]
SPOKEN: Mapping[Kind, str] = {
    "lora": "LoRA",
    "dora": "DoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "dokr": "LoKr with DoRA",
    "oft": "OFT",
    "boft": "BOFT",
}
INSTEAD = "train with method.kind: lora, or convert what was trained to a LoRA with `burnish adapter convert`"


def kind_of_method(method: AdapterMethod) -> Kind:
    """What is trained by a method."""
    if isinstance(method, Lora | Lokr) and method.dora:
        return "dora" if isinstance(method, Lora) else "dokr"
    return method.kind


def kind_of(weights: AdapterWeights) -> Kind:
    """What weights are."""
    match weights:
        case LoraWeights(magnitude=None):
            return "lora"
        case LoraWeights():
            return "dora"
        case LohaWeights():
            return "loha"
        case LokrWeights(magnitude=magnitude):
            return "lokr" if magnitude is None else "dokr"
        case OftWeights(blocks=blocks):
            return "oft" if blocks.dim() == 3 else "boft"
    raise TypeError(f"{type(weights).__name__} has no place in a file")


def one_kind(adapters: Mapping[str, AdapterWeights] | Mapping[str, ModuleChoice]) -> Kind:
    """The kind of all of them, trained or to be trained.

    Raises:
        AdapterError: they are of several kinds.
    """
    kinds = {
        kind_of_method(one.method) if isinstance(one, ModuleChoice) else kind_of(one)
        for one in adapters.values()
    }
    if len(kinds) > 1:
        raise AdapterError(f"one file holds one kind of adapter, not {' and '.join(sorted(kinds))}")
    return kinds.pop()


def read_by(kind: Kind, format: AdapterFormat, keys: ExportKeys) -> tuple[str, ...]:
    """Who reads a kind in a format of this family with its whole effect; empty where nobody does."""
    comfyui = ("ComfyUI",) if keys.comfyui and (format == keys.default or keys.by_release(format)) else ()
    match kind:
        case "lora" if format == "kohya" and keys.by_release(format):
            return keys.native_kohya
        case "lora":
            return (*comfyui, "diffusers")
        case "dora":
            return (*comfyui, "diffusers") if format == "diffusers" else comfyui
        case "lokr" | "dokr" if format == "diffusers" and keys.lokr is not None:
            # Names of these families that ComfyUI reads as well; its lengths of rows diffusers would leave out.
            return (*(("ComfyUI",) if keys.comfyui else ()), *(("diffusers",) if kind == "lokr" else ()))
    return comfyui


def format_for(kind: Kind, keys: ExportKeys) -> AdapterFormat:
    """What `auto` is for a kind: the format that most programs read, the family's own where all alike.

    Raises:
        AdapterError: nothing reads this kind for this family.
    """
    # A LoKr does not stack as modules of the release do.
    first = "diffusers" if kind == "dokr" and keys.lokr is not None else keys.default
    order = [first, *(format for format in keys.formats if format != first)]
    found = max(order, key=lambda format: len(read_by(kind, format, keys)))
    if not read_by(kind, found, keys):
        raise AdapterError(
            f"no program loads {SPOKEN[kind]} for {keys.modelspec} models: ComfyUI does not have this family, and "
            "diffusers reads LoRA alone",
            remedy=f"To use it, {INSTEAD}.",
        )
    return found


def refuse_unread(kind: Kind, format: AdapterFormat, keys: ExportKeys) -> None:
    """Raises:
    AdapterError: no program reads this kind in this format; says which formats are read.
    """
    if read_by(kind, format, keys):
        return
    readable = [one for one in keys.formats if read_by(kind, one, keys)]
    told = [f"save.format: {one} (for {' and '.join(read_by(kind, one, keys))})" for one in readable]
    ways = f"Set {' or '.join(told)}, or " if told else "To use it, "
    raise AdapterError(
        f"no program loads {SPOKEN[kind]} of {keys.modelspec} models from a file in the {format} format",
        remedy=f"{ways}{INSTEAD}.",
    )


def refuse_modules(kind: Kind, format: AdapterFormat, keys: ExportKeys, modules: Sequence[str]) -> None:
    """Raises:
    AdapterError: a module that this kind cannot be written for in this format.
    """
    if keys.native is None or kind in ("lora", "loha"):
        return
    natives = {name: keys.native(name) for name in modules}
    if keys.by_release(format):
        lost = [
            name
            for name, native in natives.items()
            if kind in ("lokr", "dokr") and (len(native.holds) > 1 or native.halves_swapped)
        ]
        why = "the release keeps several layers in one, whose Kronecker products are no such product together"
    else:
        turned = kind != "lokr" and format == "diffusers" and keys.comfyui
        lost = [name for name, native in natives.items() if turned and native.halves_swapped]
        why = "ComfyUI reads the halves of these layers the other way round"
    if lost:
        raise AdapterError(
            f"{len(lost)} modules cannot be {SPOKEN[kind]} in the {format} format: {', '.join(lost[:4])}; {why}",
            remedy=f"Leave them out with method.exclude, or {INSTEAD}.",
        )


def pieces(weights: AdapterWeights, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one module, by the end of their keys, of `dtype`; alpha is always float32.

    For LoHa, LoKr, OFT and BOFT.
    """
    match weights:
        case LohaWeights():
            found = dict(weights.untuckered().pieces)
            found["hada_w1_a"] = found["hada_w1_a"] * weights.scale
            alpha = float(weights.rank)
        case LokrWeights():
            plain = weights.untuckered()  # ComfyUI fails at a core: its product is not contiguous
            found = {name: _flat_kernel(name, piece) for name, piece in plain.pieces.items()}
            scaled = WHOLE_1 if WHOLE_1 in found else A_1
            found[scaled] = found[scaled] * weights.scale
            alpha = float(weights.rank or 1)
        case OftWeights(blocks=blocks):
            found, alpha = {"oft_blocks": blocks}, 0.0  # alpha is a limit on the turn there, 0 is none
        case _:
            raise TypeError(f"{type(weights).__name__} is written otherwise")
    made = {name: piece.to("cpu", dtype).contiguous() for name, piece in found.items()}
    return {**made, "alpha": torch.tensor(alpha, dtype=torch.float32)}


def _flat_kernel(name: str, piece: Tensor) -> Tensor:
    """ComfyUI's Kronecker product takes a whole second factor with no kernel or one of two axes."""
    return piece.flatten(1) if name == WHOLE_2 and piece.dim() not in (2, 4) else piece


def lengths(weights: AdapterWeights, base: Adaptable, *, for_comfyui: bool) -> dict[str, Tensor]:
    """DoRA's tensors beside those of the LoRA or LoKr, by the end of their keys."""
    made = _length_tensors(*_rows(weights, base), len(weight_shape(base)), for_comfyui)
    return _named_for(weights, made)


def stacked_lengths(
    native: NativeModule, weights: Mapping[str, AdapterWeights], modules: Mapping[str, Adaptable]
) -> dict[str, Tensor]:
    """Those of a module of the release; the base's own lengths for parts without an adapter."""
    rows = [_rows(weights.get(part), modules[part]) for part in native.holds]
    magnitude, scale = (torch.cat(side) for side in zip(*rows, strict=True))
    if native.halves_swapped:
        magnitude, scale = (torch.cat(side.chunk(2)[::-1]) for side in (magnitude, scale))
    made = _length_tensors(magnitude, scale, len(weight_shape(modules[native.holds[0]])), for_comfyui=True)
    return _named_for(next(weights[part] for part in native.holds if part in weights), made)


def _named_for(weights: AdapterWeights, lengths: dict[str, Tensor]) -> dict[str, Tensor]:
    """m of a LoKr under a name of its own: at `lora_` diffusers takes a file for a LoRA, and makes one up."""
    if not isinstance(weights, LokrWeights):
        return lengths
    return {ending.replace("lora_", "lokr_"): one for ending, one in lengths.items()}


def _rows(weights: AdapterWeights | None, base: Adaptable) -> tuple[Tensor, Tensor]:
    """(out,) m, and what ComfyUI is to multiply with, on the CPU."""
    weight = base.weight.detach().float()
    own = row_norms(weight)
    if weights is None:
        return own.cpu(), own.cpu()
    assert isinstance(weights, LoraWeights | LokrWeights)
    assert weights.magnitude is not None
    changed = row_norms(weight + replace(weights, magnitude=None).delta().to(weight.device))
    return weights.magnitude, weights.magnitude * (own / changed).cpu()


def _length_tensors(magnitude: Tensor, scale: Tensor, axes: int, for_comfyui: bool) -> dict[str, Tensor]:
    """From (out,) each: m as peft keeps it, and with an axis for each of the weight's what ComfyUI multiplies."""
    ones = (1 for _ in range(axes - 2))
    found = {
        "lora_magnitude_vector": magnitude.float().reshape(1, -1, *ones) if axes > 2 else magnitude.float()
    }
    if for_comfyui:
        found["dora_scale"] = scale.float().reshape(-1, *(1 for _ in range(axes - 1)))
    return {name: one.cpu().contiguous() for name, one in found.items()}


def stacked_others(
    native: NativeModule, weights: Mapping[str, AdapterWeights], shapes: Mapping[str, Sequence[int]]
) -> AdapterWeights:
    """The adapter of a native module that holds several of diffusers' modules, or one with its halves swapped.

    Raises:
        AdapterError: this kind does not stack; a LoKr never does, blocks have to be of one size.
    """
    parts = [weights.get(part) for part in native.holds]
    if len(parts) == 1 and not native.halves_swapped and parts[0] is not None:
        return parts[0]
    rows = [shapes[part][0] for part in native.holds]
    present = [part for part in parts if part is not None]
    if all(isinstance(part, LohaWeights) for part in present):
        return _stacked_loha(native, parts, rows)  # type: ignore[arg-type]
    if all(isinstance(part, OftWeights) for part in present):
        return _stacked_oft(native, parts, rows)  # type: ignore[arg-type]
    raise AdapterError(
        f"{native.name} of the release cannot hold a LoKr of {native.holds[0]}", remedy=INSTEAD
    )


def _stacked_loha(
    native: NativeModule, parts: Sequence[LohaWeights | None], rows: Sequence[int]
) -> LohaWeights:
    """Each part has its own rows and its own ranks, in both products."""
    present = [part for part in parts if part is not None]
    rank = sum(part.rank for part in present)
    sides = [torch.zeros(sum(rows), rank) for _ in range(2)]
    row = column = 0
    for part, height in zip(parts, rows, strict=True):
        if part is not None:
            own = (slice(row, row + height), slice(column, column + part.rank))
            sides[0][own], sides[1][own] = part.w1_a * part.scale, part.w2_a
            column += part.rank
        row += height
    if native.halves_swapped:
        sides = [torch.cat(side.chunk(2)[::-1]) for side in sides]
    first, second = (torch.cat([getattr(part, name) for part in present]) for name in ("w1_b", "w2_b"))
    shape = (sum(rows), *present[0].shape[1:])
    return LohaWeights(sides[0], first, sides[1], second, float(rank), shape)


def _stacked_oft(native: NativeModule, parts: Sequence[OftWeights | None], rows: Sequence[int]) -> OftWeights:
    """Blocks below one another; zero, which turns nothing, where a part was not trained."""
    present = [part.blocks for part in parts if part is not None]
    size = present[0].shape[-1]
    alike = all(blocks.dim() == 3 and blocks.shape[-1] == size for blocks in present)
    if not alike or any(height % size for height in rows):
        raise AdapterError(
            f"{native.name} of the release holds {', '.join(native.holds)}, whose blocks are not of one size",
            remedy=f"Set method.block_size to a divisor of {rows} with method.kind: oft, or {INSTEAD}.",
        )
    whole = [
        part.blocks if part is not None else torch.zeros(height // size, size, size)
        for part, height in zip(parts, rows, strict=True)
    ]
    blocks = torch.cat(whole)
    if native.halves_swapped:
        if len(blocks) % 2:
            raise AdapterError(
                f"{native.name} of the release has its halves swapped, which cut a block in two"
            )
        blocks = torch.cat(blocks.chunk(2)[::-1])
    return OftWeights(blocks)
