"""An adapter file in another format.

LoRAs are carried exactly: taken apart and put together along the rows of fused modules, with the strength folded in or
beside them as the format has it. DoRA's lengths follow the rows. Other kinds keep their pieces where the other format
has the same module under another name; where it has not, or its readers do not know the kind, they become LoRAs of a
given rank by singular value decomposition, or nothing is written.

ComfyUI divides DoRA's lengths by those of the base weight's rows, peft and LyCORIS by those of the changed weight
(`comfy/weight_adapter/base.py`, `weight_decompose`; peft `tuners/lora/dora.py`): what peft trained is put for ComfyUI
as m ||W|| / ||W + dW||, which gives it the same weight, and which needs the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from burnish.adapters.deltas import row_norms
from burnish.adapters.lora import LoraWeights
from burnish.errors import AdapterError
from burnish.export_keys import AdapterFormat, NativeModule
from burnish.toolbox.base import Base
from burnish.toolbox.check import reads_back, same_effect
from burnish.toolbox.loading import common_alpha, groups, load, released_widths, type_of
from burnish.toolbox.low_rank import Losses, RankChoice, factored
from burnish.toolbox.models import Model
from burnish.toolbox.pieces import ModuleAdapter, by_columns
from burnish.toolbox.readers import best_format, who_reads
from burnish.toolbox.regroup import is_plain
from burnish.toolbox.source import AdapterSource, Entry
from burnish.toolbox.stream import refuse_existing
from burnish.toolbox.writing import AdapterWriter, chosen_format, same_name


@dataclass
class Outcome:
    """What a tool wrote."""

    path: Path
    format: str
    modules: int = 0
    tensors: int = 0
    readers: tuple[str, ...] | None = None  # who loads it; None where it stays as it was
    losses: Losses = field(default_factory=Losses)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Carry:
    """How modules come over into another file.

    Args:
        rank: of what other kinds than LoRA become; None to keep the kinds.
    """

    rank: RankChoice | None = None
    base: Base | None = None
    drop_unknown: bool = False
    drop_text_encoders: bool = False


def convert(
    source: AdapterSource,
    path: Path,
    carry: Carry,
    *,
    format: str = "auto",
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Outcome:
    """Write an adapter in another format.

    Raises:
        AdapterError: something of it would be lost; says what, and the way out.
        UserError: `path` exists.
    """
    refuse_existing(path, force=force)
    model = model_of(source, carry)
    kinds = {f"do{e.kind[-2:]}" if e.is_dora else e.kind for e in source.modules.values()} - {"lora"}
    if format == "auto" and carry.rank is None and len(kinds) == 1:
        format = best_format(model.keys, kinds.pop())
    chosen = chosen_format(format, model, [part for target in source.modules for part in target.holds])
    outcome = Outcome(path, chosen)
    with AdapterWriter(
        path, model, chosen, dtype=dtype or type_of(source), alpha=common_alpha(source)
    ) as writer:
        for native, entries in groups(model, source.modules):
            _carry_group(writer, source, native, entries, carry, outcome)
            outcome.modules += len(entries)
        if not carry.drop_text_encoders:
            _carry_texts(writer, source, outcome)
        added = writer.complete(released_widths(model, source))
        if added:
            outcome.notes.append(
                f"{added} modules without effect are in the file because its readers need them"
            )
        network = "lycoris.kohya" if writer.kinds - {"lora", "dora"} else "networks.lora"
        outcome.tensors = writer.finish(source.metadata, network)
        outcome.readers = who_reads(model.keys, chosen, writer.kinds)
        if writer.peft_lengths and "ComfyUI" in outcome.readers:
            outcome.readers = tuple(one for one in outcome.readers if one != "ComfyUI")
            outcome.notes.append(
                "ComfyUI would leave the lengths of rows (DoRA) out; name the base model with --base"
            )
    if carry.rank is None:
        same_effect(source, path, model)
    else:
        reads_back(path, model).file.close()
    return outcome


def model_of(source: AdapterSource, carry: Carry) -> Model:
    """The model of a source, all of whose modules can come over."""
    if carry.drop_unknown and source.model is not None:
        return source.model
    return source.known_model()


def _carry_group(
    writer: AdapterWriter,
    source: AdapterSource,
    native: NativeModule,
    entries: list[tuple[NativeModule, Entry]],
    carry: Carry,
    outcome: Outcome,
) -> None:
    loaded = [(target, load(source, target, entry, carry.base)) for target, entry in entries]
    if carry.rank is not None:
        made = [(target, as_lora(target, one, carry, outcome.losses)) for target, one in loaded]
    else:
        plain = [(target, one.as_lora()) for target, one in loaded]
        made = [(target, one) for target, one in plain if one is not None]
    if len(made) == len(loaded):
        for name, weights in writer.group(native, made).items():
            writer.lora(name, weights)
        return
    for target, adapter in loaded:
        _carry_as_it_is(writer, target, adapter, carry)


def as_lora(target: NativeModule, adapter: ModuleAdapter, carry: Carry, losses: Losses) -> LoraWeights:
    """Any adapter as a LoRA: exactly where that is what it is, else of the rank chosen."""
    exact = adapter.as_lora()
    if exact is not None:
        return exact
    if "diff_b" in adapter.pieces:
        raise AdapterError(f"{target.name} changes a bias, which no LoRA does")
    assert carry.rank is not None
    delta = adapter.delta(weight_for(target, adapter, carry.base))
    found = factored(delta.flatten(1), carry.rank)
    losses.add(target.name, found)
    return found.as_weights(adapter.shape)


def weight_for(target: NativeModule, adapter: ModuleAdapter, base: Base | None) -> Tensor | None:
    """The base's weight where the adapter's effect depends on it.

    Raises:
        AdapterError: it does, and no base was given.
    """
    if not adapter.needs_base:
        return None
    if base is None:
        raise AdapterError(
            f"{target.name} has a {adapter.told}, whose effect depends on the base model's weights",
            remedy="Name the base model, a folder or a file, with --base.",
        )
    return base.weight(target)


def _carry_as_it_is(
    writer: AdapterWriter, target: NativeModule, adapter: ModuleAdapter, carry: Carry
) -> None:
    """An adapter that is no plain LoRA under the format's name for the same module.

    Raises:
        AdapterError: there is no such name, or its readers do not know the kind.
    """
    name = same_name(writer.model, target, writer.format)
    if adapter.is_dora and adapter.kind == "lora":
        _carry_dora(writer, target, adapter, carry)
        return
    if (
        name is None
        and not writer.model.keys.by_release(writer.format)
        and not target.halves_swapped
        and adapter.splits_by_rows
    ):
        rows = writer.model.rows(target, adapter.shape[0])
        for part, own in zip(target.holds, accumulate(rows, initial=0), strict=False):
            count = rows[target.holds.index(part)]
            _carry_as_it_is(writer, NativeModule(part, (part,)), adapter.rows(own, own + count), carry)
        return
    if name is None:
        raise _cannot(
            adapter, target, f"the {writer.format} format has no module that is the same as {target.name}"
        )
    if not who_reads(writer.model.keys, writer.format, {adapter.told}):
        raise _cannot(adapter, target, f"no program loads it in the {writer.format} format")
    writer.raw(name, adapter)


def _cannot(adapter: ModuleAdapter, target: NativeModule, why: str) -> AdapterError:
    return AdapterError(
        f"the {adapter.told} of {target.name} cannot be carried over: {why}",
        remedy="Add --as lora with --rank N (or --energy), which rounds off and says by how much"
        + (", and --base." if adapter.needs_base else "."),
    )


def _carry_dora(writer: AdapterWriter, target: NativeModule, adapter: ModuleAdapter, carry: Carry) -> None:
    scale = adapter.pieces.get("dora_scale")
    if scale is not None and by_columns(scale, adapter.shape) and "magnitude" not in adapter.pieces:
        name = same_name(writer.model, target, writer.format)
        if name is None or writer.format == "diffusers":
            raise _cannot(adapter, target, "its lengths are of columns, which only ComfyUI and LyCORIS know")
        writer.raw(name, adapter)
        return
    for name, part, weights, lengths, told_scale in _dora_parts(writer, target, adapter):
        magnitude, comfy = _lengths(writer.format, part, weights, lengths, told_scale, carry.base)
        ones = (1,) * (len(adapter.shape) - 1)
        shaped = None if comfy is None else comfy.reshape(-1, *ones)
        if magnitude is not None and len(adapter.shape) > 2:  # as peft keeps those of a convolution
            magnitude = magnitude.reshape(1, -1, *ones[1:])
        writer.lora(name, weights, magnitude=magnitude, dora_scale=shaped)


def _dora_parts(
    writer: AdapterWriter, target: NativeModule, adapter: ModuleAdapter
) -> Iterator[tuple[str, NativeModule, LoraWeights, Tensor | None, Tensor | None]]:
    """Name, module, LoRA, lengths as trained and ComfyUI's for each module that the format has of a target."""
    plain = ModuleAdapter("lora", _without_lengths(adapter), adapter.shape, adapter.alpha).as_lora()
    assert plain is not None
    pieces = adapter.pieces
    magnitude = pieces["magnitude"].flatten() if "magnitude" in pieces else None
    scale = pieces["dora_scale"].flatten() if "dora_scale" in pieces else None
    name = same_name(writer.model, target, writer.format)
    if name is not None:
        yield name, target, plain, magnitude, scale
        return
    native = writer.model.native(target.holds[0])
    if writer.model.keys.by_release(writer.format) or (target.halves_swapped and not is_plain(target)):
        raise _cannot(
            adapter, target, f"{native.name} holds more modules, whose lengths the file does not tell"
        )
    rows = writer.model.rows(target, adapter.shape[0])
    if target.halves_swapped:
        raise _cannot(adapter, target, "its rows stand the other way round")
    begin = 0
    for part, count in zip(target.holds, rows, strict=True):
        own = slice(begin, begin + count)
        weights = LoraWeights(plain.down, plain.up[own], plain.alpha)
        cut = [None if one is None else one[own] for one in (magnitude, scale)]
        yield part, NativeModule(part, (part,)), weights, cut[0], cut[1]
        begin += count


def _without_lengths(adapter: ModuleAdapter) -> dict[str, Tensor]:
    return {piece: one for piece, one in adapter.pieces.items() if piece not in ("magnitude", "dora_scale")}


def _lengths(
    format: AdapterFormat,
    part: NativeModule,
    weights: LoraWeights,
    magnitude: Tensor | None,
    scale: Tensor | None,
    base: Base | None,
) -> tuple[Tensor | None, Tensor | None]:
    """What goes into the file as `lora_magnitude_vector` and as `dora_scale`; both where the source tells both."""
    if magnitude is not None and scale is not None:
        return magnitude, scale
    if format == "diffusers":
        magnitude = scale if magnitude is None else magnitude
        assert magnitude is not None
        return magnitude, None if base is None else _for_comfyui(magnitude, weights, base.weight(part))
    if magnitude is None:
        return None, scale
    if base is None:
        raise AdapterError(
            f"{part.name} has peft's lengths of rows; what ComfyUI needs in their place depends on the base model",
            remedy="Name the base model, a folder or a file, with --base.",
        )
    return magnitude, _for_comfyui(magnitude, weights, base.weight(part))


def _for_comfyui(magnitude: Tensor, weights: LoraWeights, weight: Tensor) -> Tensor:
    return magnitude * row_norms(weight) / row_norms(weight + weights.delta())


def _carry_texts(writer: AdapterWriter, source: AdapterSource, outcome: Outcome) -> None:
    for module, entry in source.texts.items():
        told = entry.change_shape()
        weights = entry.load(told).as_lora() if told is not None else None
        if weights is None:
            raise AdapterError(
                f"the {entry.kind} of {module.module} in text encoder {module.encoder} cannot be carried over",
                remedy="Add --drop-text-encoders to leave the text encoders' part out.",
            )
        writer.text(module, weights)
        outcome.modules += 1
