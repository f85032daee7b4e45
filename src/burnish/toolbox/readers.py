"""Who loads an adapter file with all of its effect."""

from __future__ import annotations

from collections.abc import Iterable

from burnish.export import kinds
from burnish.export_keys import AdapterFormat, ExportKeys


def who_reads(keys: ExportKeys, format: AdapterFormat, found: Iterable[str]) -> tuple[str, ...]:
    """Programs that read these kinds (`ModuleAdapter.told`) in a format of a family."""
    readers = [_of_kind(keys, format, kind) for kind in found]
    return tuple(one for one in readers[0] if all(one in other for other in readers)) if readers else ()


def best_format(keys: ExportKeys, kind: str) -> str:
    """The format that most programs read of a kind; `auto`, the family's own, for what has no such rule.

    Raises:
        AdapterError: no program reads it.
    """
    for known in kinds.SPOKEN:
        if kind == known:
            return kinds.format_for(known, keys)
    return "auto"


def _of_kind(keys: ExportKeys, format: AdapterFormat, kind: str) -> tuple[str, ...]:
    comfyui = ("ComfyUI",) if keys.comfyui else ()
    if kind in ("lora", "locon"):
        if format in keys.readers:
            return keys.readers[format]
        if format == "kohya" and keys.by_release(format):
            return keys.native_kohya
        if format == keys.default:
            return (*comfyui, "diffusers")
        return comfyui if format == "comfy" else ("diffusers",)
    for known in kinds.SPOKEN:
        if kind == known:
            return kinds.read_by(known, format, keys)
    # Whole differences, GLoRA, LyCORIS' lengths of rows for other kinds: ComfyUI's `weight_adapter` alone.
    return comfyui if format == keys.default or keys.by_release(format) else ()
