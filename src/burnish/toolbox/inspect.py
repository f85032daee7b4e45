"""What an adapter file is: kind, ranks, strength, how much it changes where, what model it is for, who can load it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from burnish.adapters.lora import LoraWeights
from burnish.export.formats import key_start
from burnish.export.kinds import Kind
from burnish.export_keys import AdapterFormat, NativeModule
from burnish.toolbox.loading import load
from burnish.toolbox.models import Model
from burnish.toolbox.readers import who_reads
from burnish.toolbox.source import AdapterSource, Entry
from burnish.toolbox.writing import same_name

NATIVE_KOHYA = "sd-scripts' spelling of the release's names"
_BLOCK = re.compile(r"(?<![0-9A-Za-z])\d+(?![0-9A-Za-z])")


@dataclass(frozen=True, slots=True)
class Reader:
    """A program, whether it loads the file with all of its effect, and why not."""

    name: str
    loads: bool
    why: str = ""


@dataclass
class Inspection:
    """Everything that is told about a file."""

    path: str
    mib: float
    family: str | None
    title: str
    also: list[str]  # families whose adapters look the same
    kinds: dict[str, int]  # modules by kind
    modules: int
    text_encoder_modules: int
    unknown_keys: list[str]
    ranks: dict[str, int]  # modules by rank
    alphas: dict[str, int]  # modules by alpha; "none" where the file tells none
    dtypes: list[str]
    format: str  # of the spelling
    example: str
    norms: dict[str, float]  # Frobenius norm of the change by block; empty where the base is needed
    norm: float | None
    readers: list[Reader]
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


def inspect(source: AdapterSource) -> Inspection:
    """Look at a file; reads each tensor once."""
    entries = list(source.entries())
    norms, unmeasured = _norms(source)
    format, spelling = spelled_format(source)
    dtypes = sorted({str(s.dtype).removeprefix("torch.") for s in source.file.tensors.values() if s.shape})
    notes = [f"{unmeasured} modules change the weight by an amount that depends on it"] if unmeasured else []
    model = source.model
    return Inspection(
        path=str(source.path),
        mib=source.path.stat().st_size / 2**20,
        family=None if model is None else model.name,
        title="no model that is known here" if model is None else model.title,
        also=[one.name for one in source.alternatives()],
        kinds=dict(Counter(_kind(entry) for entry in entries).most_common()),
        modules=len(source.modules),
        text_encoder_modules=len(source.texts),
        unknown_keys=source.unknown,
        ranks=_counted("none" if one.rank is None else str(one.rank) for one in entries),
        alphas=_counted("none" if (alpha := one.alpha()) is None else f"{alpha:g}" for one in entries),
        dtypes=dtypes,
        format=spelling,
        example=next(iter(source.file.tensors)),
        norms=norms,
        norm=sum(one**2 for one in norms.values()) ** 0.5 if norms else None,
        readers=[] if model is None else readers(source, model, format, spelling),
        notes=notes,
        metadata=source.metadata,
    )


def _counted(values: object) -> dict[str, int]:
    return dict(Counter(values).most_common())  # type: ignore[call-overload]


def _kind(entry: Entry) -> str:
    kind = f"do{entry.kind[-2:]}" if entry.is_dora else entry.kind
    return "locon" if kind == "lora" and entry.is_convolution else kind


def _norms(source: AdapterSource) -> tuple[dict[str, float], int]:
    """Norm of the change by block, and how many modules have none without the base."""
    squares: dict[str, float] = {}
    unmeasured = 0
    for target, entry in source.modules.items():
        if entry.is_dora or entry.kind in ("oft", "boft", "glora"):
            unmeasured += 1
            continue
        adapter = load(source, target, entry)
        plain = adapter.as_lora()
        square = _squared(plain) if plain is not None else float(adapter.delta().double().square().sum())
        block = _block(target.holds[0] if len(target.holds) == 1 else target.name)
        squares[block] = squares.get(block, 0.0) + square
    for module, entry in source.texts.items():
        told = entry.change_shape()
        if told is not None and not entry.is_dora:
            plain = entry.load(told).as_lora()
            square = _squared(plain) if plain is not None else 0.0
            block = f"text encoder {module.encoder}"
            squares[block] = squares.get(block, 0.0) + square
    return {block: square**0.5 for block, square in squares.items()}, unmeasured


def _squared(weights: LoraWeights) -> float:
    """Squared norm of the product, by the small Gram matrices of both factors."""
    up, down = (weights.scale * weights.up).double().flatten(1), weights.down.double().flatten(1)
    return max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0)


def _block(name: str) -> str:
    """A module's name up to the number of its block."""
    match = _BLOCK.search(name)
    return name if match is None else name[: match.end()]


def spelled_format(source: AdapterSource) -> tuple[AdapterFormat | None, str]:
    """The format of the family's export table in which all keys are, and how they are spelled in words."""
    entries = list(source.modules.items())
    model = source.model
    if not entries or model is None:
        return None, "of text encoders alone" if source.texts else "unknown"
    for format in model.keys.formats:
        names = [(same_name(model, target, format), entry) for target, entry in entries]
        if all(_is_spelled(model, format, name, entry) for name, entry in names):
            return format, format
    if all(_is_native_kohya(model, target, entry) for target, entry in entries):
        return None, NATIVE_KOHYA
    return None, _in_words(entries)


def _is_spelled(model: Model, format: AdapterFormat, name: str | None, entry: Entry) -> bool:
    kind: Kind = "lora" if entry.kind != "lokr" else "dokr" if entry.is_dora else "lokr"
    if name is None or entry.spelled != key_start(format, kind, model.part, model.keys, name):
        return False
    return entry.kind != "lora" or ("lora_A" in entry.keys["down"]) == (format != "kohya")


def _is_native_kohya(model: Model, target: NativeModule, entry: Entry) -> bool:
    name = same_name(model, target, "comfy")
    spelled = None if name is None else f"lora_unet_{name.replace('.', '_')}"
    return entry.spelled == spelled and "lora_A" not in entry.keys.get("down", "")


def _in_words(entries: list[tuple[NativeModule, Entry]]) -> str:
    first = entries[0][1]
    plain = all(target.holds == (target.name,) for target, _ in entries)
    known = ("lora_unet_", "lycoris_", "transformer.", "unet.", "diffusion_model.", "base_model.")
    prefix = next((one for one in known if first.spelled.startswith(one)), "no prefix")
    whose = "diffusers'" if plain else "the release's"
    matrices = ""
    if "down" in first.keys:
        matrices = " with lora_A, lora_B" if "lora_A" in first.keys["down"] else " with down, up"
    return f"{whose} names after {prefix}{matrices}"


def readers(
    source: AdapterSource, model: Model, format: AdapterFormat | None, spelling: str = ""
) -> list[Reader]:
    """Who loads the file with all of its effect, by the family's export table and the known traits of readers."""
    entries = list(source.modules.values())
    if spelling == NATIVE_KOHYA and all(entry.kind == "lora" and not entry.is_dora for entry in entries):
        told = model.keys.native_kohya
        return [
            Reader(
                name, name in told, "" if name in told else f"it does not know these names for {model.title}"
            )
            for name in ("ComfyUI", "diffusers")
        ]
    if format is None:
        return [
            Reader(
                "ComfyUI, diffusers",
                False,
                "its spelling is none that is known to load in both; `burnish adapter convert` writes one that does",
            )
        ]
    told = who_reads(model.keys, format, {_kind(entry) for entry in entries})
    found = []
    for name in ("ComfyUI", "diffusers"):
        kinds = ", ".join(sorted({_kind(entry) for entry in entries}))
        problem = "" if name in told else f"it does not read {kinds} in this format for {model.title}"
        found.append(
            Reader(name, not (problem := problem or _problem(name, source, model, format, entries)), problem)
        )
    others = [one for one in told if one not in ("ComfyUI", "diffusers")]
    return found + [Reader(one, True) for one in others]


def _problem(
    reader: str, source: AdapterSource, model: Model, format: AdapterFormat, entries: list[Entry]
) -> str:
    """Why a program that reads the format does not load this file as it is meant; empty where it does."""
    has = {piece for entry in entries for piece in entry.keys}
    if reader == "ComfyUI":
        if any(entry.told_alpha is not None and entry.told_alpha != entry.rank for entry in entries):
            return "it ignores the alpha that is in the metadata, so that the strength is another"
        if "magnitude" in has and "dora_scale" not in has:
            return "it does not know peft's lengths of rows (DoRA) and would apply the LoRA without them"
        return ""
    if "dora_scale" in has and "magnitude" not in has:
        return "it drops `dora_scale` (DoRA) and would apply the LoRA without it"
    plain = all(entry.kind == "lora" for entry in entries)
    if format != "kohya" and plain and "alpha" in has:
        return "it takes no alpha from keys of this format"
    alphas = {entry.alpha() for entry in entries}
    if format == "kohya" and len(alphas) > 1:
        return "modules have different alphas, which it mixes up"
    if any("text_model." not in one.module for one in source.texts if one.is_clip):
        return "its text encoder's names lack `text_model.`"
    return ""
