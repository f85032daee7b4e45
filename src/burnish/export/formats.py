"""How adapter keys are spelled in the files of others.

    kohya       lora_unet_down_blocks_0_...to_q.lora_down.weight, .lora_up.weight, .alpha (0-d, float); for families
                without a UNet in the names of the original release
    diffusers   unet.down_blocks.0...to_q.lora_A.weight, .lora_B.weight; alpha / rank folded into B
    comfy       diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight, .lora_B.weight: as diffusers, but in the
                names of the original release, whose modules may stack several of diffusers'

Every module of a kohya file gets the same alpha, whatever it was trained with, and B takes up the difference:
diffusers loses the alphas of a UNet's attention layers where they differ from the commonest one, with a warning
at most (0.42, `utils/peft_utils.py`, keys of `alpha_pattern`).

A reader of the first computes up @ down * alpha / rank, a reader of the others B @ A. These write no
alpha because diffusers would take it from the file's metadata and ComfyUI only from a key that diffusers
refuses: folded, both agree. Convolutions: down (rank, in, *kernel), up (out, rank, 1, 1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import get_args

import torch
from torch import Tensor

from burnish.adapters.layer import Adaptable, AdapterWeights, ModuleChoice, weight_shape
from burnish.adapters.lora import LoraWeights
from burnish.errors import AdapterError
from burnish.export.kinds import (
    Kind,
    format_for,
    lengths,
    one_kind,
    pieces,
    read_by,
    refuse_modules,
    refuse_unread,
    stacked_lengths,
    stacked_others,
)
from burnish.export.stacking import native_module, stacked
from burnish.export_keys import AdapterFormat, ExportKeys


def resolve_format(
    requested: str,
    keys: ExportKeys,
    modules: Iterable[str] | Mapping[str, ModuleChoice] | Mapping[str, AdapterWeights] = (),
) -> AdapterFormat:
    """`auto` or one of the family's formats, able to hold `modules`; worth asking before training.

    Of names alone the adapters are LoRAs.

    Raises:
        AdapterError: this family's adapters, this kind, or one of the modules, cannot be written so that it is read.
    """
    kind = one_kind(modules) if isinstance(modules, Mapping) and modules else "lora"
    chosen = format_of_kind(requested, keys, kind)
    modules = list(modules)
    refuse_modules(kind, chosen, keys, modules)
    unreadable = keys.unreadable.get(chosen, ())
    lost = [name for name in modules if any(fnmatchcase(name, pattern) for pattern in unreadable)]
    if lost:
        others = [format for format in keys.formats if format != chosen]
        instead = f", or set save.format: {others[0]}, which fewer programs read" if others else ""
        raise AdapterError(
            f"{len(lost)} modules would not load from a file in the {chosen} format: {', '.join(lost[:4])}",
            remedy=f"Leave them out with method.exclude{instead}.",
        )
    return chosen


def format_of_kind(requested: str, keys: ExportKeys, kind: Kind) -> AdapterFormat:
    """`auto` or one of the family's formats, that some program reads this kind from.

    Raises:
        AdapterError: there is none, or no such format.
    """
    chosen = _named_format(requested, keys, kind)
    if kind != "lora":
        refuse_unread(kind, chosen, keys)
    return chosen


def _named_format(requested: str, keys: ExportKeys, kind: Kind) -> AdapterFormat:
    if requested == "auto":
        return keys.default if kind == "lora" else format_for(kind, keys)
    for known in keys.formats:
        if known == requested:
            return known
    kinds = get_args(AdapterFormat)
    reason = (
        f"{keys.modelspec} adapters have no {requested} spelling of the modules that are trained"
        if requested in kinds
        else f"there is no adapter format {requested!r}"
    )
    raise AdapterError(reason, remedy=f"Set save.format to one of: auto, {', '.join(keys.formats)}.")


def key_prefix(format: AdapterFormat, part: str, keys: ExportKeys) -> str:
    """What stands before the module name, such as `lora_unet_` or `transformer.`.

    Each of several denoisers (`transformer`, `transformer_2`) has a file of its own, with the same prefix in all.
    """
    if format in keys.prefix:
        return keys.prefix[format]
    if format == "comfy":
        return "diffusion_model."
    return "lora_unet_" if format == "kohya" else f"{part.partition('_')[0]}."


def spelled_name(format: AdapterFormat, name: str) -> str:
    """A module name as the format writes it."""
    return name.replace(".", "_") if format == "kohya" else name


def to_tensors(
    weights: Mapping[str, AdapterWeights],
    format: AdapterFormat,
    *,
    part: str,
    keys: ExportKeys,
    dtype: torch.dtype,
    modules: Mapping[str, Adaptable],
) -> dict[str, Tensor]:
    """The tensors of a file, by key, contiguous and of `dtype`.

    `modules` are those of the denoiser, trained or not: a file in the release's names needs the rows of both.

    Raises:
        AdapterError: two modules would get the same key, or do not stack as the release stacks them.
    """
    kind = one_kind(weights)
    if kind in ("lora", "dora"):
        loras = {name: one.untuckered() for name, one in weights.items() if isinstance(one, LoraWeights)}
        tensors = _lora_tensors(loras, format, part, keys, dtype, modules)
        if kind == "dora":
            tensors |= _length_tensors(loras, format, part, keys, modules)
        return tensors
    others = _stacked_by_release(weights, keys, modules) if keys.by_release(format) else weights
    tensors = _keyed(
        {key_start(format, kind, part, keys, name): pieces(one, dtype) for name, one in others.items()}
    )
    return tensors | (_length_tensors(weights, format, part, keys, modules) if kind == "dokr" else {})


def refuse_unstackable(
    weights: Mapping[str, AdapterWeights],
    format: AdapterFormat,
    keys: ExportKeys,
    modules: Mapping[str, Adaptable],
) -> None:
    """What a `comfy` file could not hold is known as soon as adapters have their shapes.

    Raises:
        AdapterError: layers that the release keeps in one have adapters that do not stack.
    """
    if keys.by_release(format) and one_kind(weights) not in ("lora", "dora"):
        _stacked_by_release(weights, keys, modules)


def _stacked_by_release(
    weights: Mapping[str, AdapterWeights], keys: ExportKeys, modules: Mapping[str, Adaptable]
) -> dict[str, AdapterWeights]:
    shapes = {name: weight_shape(module) for name, module in modules.items()}
    natives = {native.name: native for native in (native_module(keys, name) for name in weights)}
    return {name: stacked_others(native, weights, shapes) for name, native in natives.items()}


def key_start(format: AdapterFormat, kind: Kind, part: str, keys: ExportKeys, name: str) -> str:
    """What stands before the endings of a module's keys."""
    if kind == "lokr" and format == "diffusers" and keys.lokr is not None:
        return keys.lokr + (name.replace(".", "_") if keys.lokr.endswith("_") else name)
    return key_prefix(format, part, keys) + spelled_name(format, name)


def _keyed(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{start}.{ending}": one for start, own in found.items() for ending, one in own.items()}


def _length_tensors(
    weights: Mapping[str, AdapterWeights],
    format: AdapterFormat,
    part: str,
    keys: ExportKeys,
    modules: Mapping[str, Adaptable],
) -> dict[str, Tensor]:
    """DoRA's; a native module's are those of its parts, with the base's own lengths for parts without an adapter."""
    for_comfyui = "ComfyUI" in read_by(one_kind(weights), format, keys)
    if not keys.by_release(format):
        return _keyed(
            {
                key_start(format, "dora", part, keys, name): lengths(
                    one, modules[name], for_comfyui=for_comfyui
                )
                for name, one in weights.items()
            }
        )
    natives = {native.name: native for native in (native_module(keys, name) for name in weights)}
    return _keyed(
        {
            key_start(format, "dora", part, keys, name): stacked_lengths(native, weights, modules)
            for name, native in natives.items()
        }
    )


def _lora_tensors(
    weights: Mapping[str, LoraWeights],
    format: AdapterFormat,
    part: str,
    keys: ExportKeys,
    dtype: torch.dtype,
    modules: Mapping[str, Adaptable],
) -> dict[str, Tensor]:
    if keys.by_release(format):
        shapes = {name: weight_shape(module) for name, module in modules.items()}
        dora = any(one.magnitude is not None for one in weights.values())
        # diffusers reads no DoRA in these names, so that nothing has to be there for its sake.
        weights = stacked(weights, replace(keys, complete=()) if dora else keys, shapes)
    prefix = key_prefix(format, part, keys)
    common = Counter(adapter.alpha for adapter in weights.values()).most_common(1)[0][0]
    tensors: dict[str, Tensor] = {}
    for name, adapter in weights.items():
        key = prefix + spelled_name(format, name)
        if format == "kohya":
            down, up = f"{key}.lora_down.weight", f"{key}.lora_up.weight"
            scaled = adapter.up * (adapter.alpha / common)
        else:
            down, up = f"{key}.lora_A.weight", f"{key}.lora_B.weight"
            scaled = adapter.up * adapter.scale
        if down in tensors:
            raise AdapterError(f"two modules read as {key} in the {format} format; {name} is the second")
        tensors[down] = adapter.down.to("cpu", dtype).contiguous()
        tensors[up] = scaled.to("cpu", dtype).contiguous()
        if format == "kohya":
            # Always float32: bfloat16 would round an alpha such as 7.3 and with it the strength.
            tensors[f"{key}.alpha"] = torch.tensor(common, dtype=torch.float32)
    return tensors
