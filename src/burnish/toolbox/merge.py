"""Several adapters as one, or added to the weights of a checkpoint.

The plain sum of LoRAs is exact: the ranks are put side by side. Everything else is computed on whole matrices, one
module at a time, and decomposed again. In a checkpoint each tensor keeps its name, place and number type.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from burnish.adapters.lora import LoraWeights
from burnish.atomic import publish_folder, remove, temporary_name
from burnish.errors import AdapterError, UserError
from burnish.export_keys import NativeModule
from burnish.toolbox.base import Base, by_stored, put_back
from burnish.toolbox.check import reads_back
from burnish.toolbox.combine import Combination
from burnish.toolbox.convert import Carry, Outcome, model_of, weight_for
from burnish.toolbox.loading import common_alpha, groups, load, released_widths, type_of
from burnish.toolbox.low_rank import RankChoice, factored, reduced
from burnish.toolbox.models import Model, TextModule
from burnish.toolbox.pieces import ModuleAdapter
from burnish.toolbox.readers import who_reads
from burnish.toolbox.regroup import Targeted, added_up
from burnish.toolbox.source import AdapterSource, Entry
from burnish.toolbox.stream import Planned, refuse_existing, write_stream
from burnish.toolbox.writing import AdapterWriter, chosen_format

Progress = Callable[[int], None]  # bytes done since the last call


@dataclass(frozen=True, slots=True)
class Weighted:
    source: AdapterSource
    weight: float


def merge_adapters(
    adapters: Sequence[Weighted],
    path: Path,
    combination: Combination,
    carry: Carry,
    *,
    format: str = "auto",
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Outcome:
    """Write one adapter with the effect of several.

    Without `carry.rank` every module must be a plain LoRA and the combination a sum, which is exact; with it, what is
    combined is decomposed to that rank.

    Raises:
        AdapterError: the adapters are of different models, or cannot be combined without rounding off.
    """
    refuse_existing(path, force=force)
    model = _common_model(adapters, carry)
    if combination.method != "sum" and carry.rank is None:
        raise UserError(
            f"{combination.method} works on whole matrices, which no LoRA is",
            remedy="Add --rank or --energy, of the LoRA that is made of the result.",
        )
    union: dict[NativeModule, None] = {}
    for one in adapters:
        union |= dict.fromkeys(one.source.modules)
    chosen = chosen_format(format, model, [part for target in union for part in target.holds])
    outcome = Outcome(path, chosen)
    first = adapters[0].source
    with AdapterWriter(
        path, model, chosen, dtype=dtype or type_of(first), alpha=common_alpha(first)
    ) as writer:
        for native, found in _grouped(model, adapters):
            for name, weights in _combined_group(writer, native, found, combination, carry, outcome).items():
                writer.lora(name, weights)
                outcome.modules += 1
        if not carry.drop_text_encoders:
            _texts(writer, adapters, combination, carry, outcome)
        writer.complete(all(released_widths(model, one.source) for one in adapters))
        outcome.tensors = writer.finish({}, "networks.lora")
        outcome.readers = who_reads(model.keys, chosen, writer.kinds)
    reads_back(path, model).file.close()
    return outcome


Loaded = tuple[float, NativeModule, ModuleAdapter]


def _common_model(adapters: Sequence[Weighted], carry: Carry) -> Model:
    """The model of all, which one of a relative may be for as well.

    Raises:
        AdapterError: there is none.
    """
    first = model_of(adapters[0].source, carry)
    for one in adapters[1:]:
        other = model_of(one.source, carry)
        # Relatives, such as a model and its distilled form, may share all names.
        if any(first.find(entry.spelled) != target for target, entry in one.source.modules.items()):
            raise AdapterError(
                f"{adapters[0].source.path} is for {first.title}, {one.source.path} for {other.title}",
                remedy="Only adapters of one model can be merged. If one was taken for another, name it with --family.",
            )
    return first


def _grouped(
    model: Model, adapters: Sequence[Weighted]
) -> Iterator[tuple[NativeModule, list[tuple[Weighted, NativeModule, Entry]]]]:
    found: dict[str, tuple[NativeModule, list[tuple[Weighted, NativeModule, Entry]]]] = {}
    for one in adapters:
        for native, entries in groups(model, one.source.modules):
            rows = found.setdefault(native.name, (native, []))[1]
            rows += [(one, target, entry) for target, entry in entries]
    yield from found.values()


def _combined_group(
    writer: AdapterWriter,
    native: NativeModule,
    found: list[tuple[Weighted, NativeModule, Entry]],
    combination: Combination,
    carry: Carry,
    outcome: Outcome,
) -> dict[str, LoraWeights]:
    """LoRAs by the format's names."""
    loaded = [
        (one.weight, target, load(one.source, target, entry, carry.base)) for one, target, entry in found
    ]
    shapes = {target: adapter.shape for _, target, adapter in loaded}
    other = next(((t, a) for _, t, a in loaded if a.shape != shapes[t]), None)
    if other is not None:
        raise AdapterError(
            f"the adapters change {other[0].name} as a weight of {other[1].shape} and of {shapes[other[0]]}",
            remedy="Only adapters of models of one size can be merged.",
        )
    plain = [_plain(weight, target, adapter) for weight, target, adapter in loaded]
    exact = [one for one in plain if one is not None]
    if combination.method == "sum" and len(exact) == len(loaded):
        summed = writer.group(native, exact)
        if carry.rank is None:
            return summed
        return {name: _reduced(name, weights, carry.rank, outcome) for name, weights in summed.items()}
    if carry.rank is None:
        _, target, adapter = next(one for one, lora in zip(loaded, plain, strict=True) if lora is None)
        raise AdapterError(
            f"the {adapter.told} of {target.name} cannot be added to others exactly",
            remedy="Add --rank or --energy, of the LoRA that is made of the result.",
        )
    made: list[Targeted] = []
    for part, changes in _by_part(writer.model, loaded, carry.base).items():
        shape = changes[0].shape
        low = factored(combination.combined(part, changes).flatten(1), carry.rank)
        outcome.losses.add(part, low)
        made.append((NativeModule(part, (part,)), low.as_weights(tuple(shape))))
    return writer.group(native, made)


def _plain(weight: float, target: NativeModule, adapter: ModuleAdapter) -> Targeted | None:
    lora = adapter.times(weight).as_lora()
    return None if lora is None else (target, lora)


def _reduced(name: str, weights: LoraWeights, choice: RankChoice, outcome: Outcome) -> LoraWeights:
    smaller, found = reduced(weights, choice)
    outcome.losses.add(name, found)
    return smaller


def _by_part(model: Model, loaded: Sequence[Loaded], base: Base | None) -> dict[str, list[Tensor]]:
    """What each adapter adds to each of diffusers' modules, times its weight."""
    found: dict[str, list[Tensor]] = {}
    for weight, target, adapter in loaded:
        delta = weight * adapter.delta(weight_for(target, adapter, base))
        rows = (
            model.rows(target, delta.shape[0]) if base is None else [base.shape(p)[0] for p in target.holds]
        )
        if "diff_b" in adapter.pieces:
            raise AdapterError(f"{target.name} has a change of its bias, which no LoRA holds")
        if target.halves_swapped:
            delta = torch.cat(delta.chunk(2)[::-1])
        for part, own in zip(target.holds, torch.split(delta, rows), strict=True):
            found.setdefault(part, []).append(own)
    return found


def _texts(
    writer: AdapterWriter,
    adapters: Sequence[Weighted],
    combination: Combination,
    carry: Carry,
    outcome: Outcome,
) -> None:
    found: dict[TextModule, list[LoraWeights]] = {}
    for one in adapters:
        for module, entry in one.source.texts.items():
            told = entry.change_shape()
            plain = entry.load(told).times(one.weight).as_lora() if told is not None else None
            if plain is None or combination.method != "sum":
                raise AdapterError(
                    f"{module.module} of text encoder {module.encoder} can only be added up as a plain LoRA",
                    remedy="Add --drop-text-encoders to leave the text encoders' part out.",
                )
            found.setdefault(module, []).append(plain)
    for module, weights in found.items():
        summed = added_up(weights)
        writer.text(
            module, summed if carry.rank is None else _reduced(module.module, summed, carry.rank, outcome)
        )
        outcome.modules += 1


def merge_into(
    base: Base,
    adapters: Sequence[Weighted],
    path: Path,
    combination: Combination,
    carry: Carry,
    *,
    force: bool = False,
    progress: Progress = lambda count: None,
) -> Outcome:
    """Write the base with the adapters' effect in its weights: a file of a file, a folder of a folder.

    Raises:
        AdapterError: an adapter is of another model than the base, or changes text encoders.
        UserError: `path` exists.
    """
    _refuse_target(base, path, force=force)
    changes = _changes(base, adapters, carry)
    stored = by_stored(base.layout, changes)
    files = sorted({file for file, _ in stored})
    scaled = [base.layout[name] for name in changes if base.layout[name].scale]
    if scaled:
        raise AdapterError(
            f"{scaled[0].file} keeps {scaled[0].name} in 8 bits with scales, which would have to be found anew",
            remedy="Merge into the bfloat16 or float16 file of the same model.",
        )
    outcome = Outcome(path, "as the base", modules=sum(name.endswith(".weight") for name in changes))
    if not base.path.is_dir():
        outcome.tensors = _with_changes(base, base.path, path, stored, changes, combination, progress)
        return outcome
    temporary = path.parent / temporary_name(path.name)
    try:
        # What is not changed is copied; the changed files are left out, however large they are.
        shutil.copytree(base.path, temporary, ignore=lambda folder, names: _among(folder, names, files))
        for file in files:
            inside = temporary / file.relative_to(base.path)
            outcome.tensors += _with_changes(base, file, inside, stored, changes, combination, progress)
        if path.exists():
            raise UserError(f"{path} exists already", remedy="Name another folder.")
        publish_folder(temporary, path)
    finally:
        remove(temporary)
    return outcome


def _among(folder: str, names: list[str], files: Sequence[Path]) -> list[str]:
    return [name for name in names if Path(folder, name) in files]


def _refuse_target(base: Base, path: Path, *, force: bool) -> None:
    if not base.path.is_dir():
        refuse_existing(path, force=force)
    elif path.exists():
        raise UserError(f"{path} exists already", remedy="Name another folder for the merged model.")


Change = tuple[Weighted, NativeModule, Entry]


def _changes(base: Base, adapters: Sequence[Weighted], carry: Carry) -> dict[str, list[Change]]:
    """What is done to each of diffusers' tensors.

    Raises:
        AdapterError: an adapter does not fit the base, or does more than to change its denoiser.
    """
    found: dict[str, list[Change]] = {}
    for one in adapters:
        model_of(one.source, carry)
        if one.source.texts and not carry.drop_text_encoders:
            raise AdapterError(
                f"{one.source.path} changes text encoders as well, whose weights are not merged",
                remedy="Add --drop-text-encoders to merge its denoiser's part, or load the adapter beside the model.",
            )
        for target, entry in one.source.modules.items():
            told, shape = entry.change_shape(), base.target_shape(target)
            columns = 1
            for size in shape[1:]:
                columns *= size
            if told is not None and told != (shape[0], columns):
                raise AdapterError(
                    f"{one.source.path}: {entry.spelled} changes a weight of {told[0]} rows and {told[1]} columns; "
                    f"that of {base.path} has the shape {shape}",
                    remedy="The adapter is of another model, or of another size of it.",
                )
            kinds = ["weight"] * (entry.kind != "full" or "diff" in entry.keys) + ["bias"] * (
                "diff_b" in entry.keys
            )
            for name in (f"{part}.{kind}" for part in target.holds for kind in kinds):
                if name not in base.layout:
                    raise AdapterError(f"{one.source.path} changes {name}, which {base.path} does not have")
                found.setdefault(name, []).append((one, target, entry))
    return found


def _with_changes(
    base: Base,
    source: Path,
    path: Path,
    stored: Mapping[tuple[Path, str], list[str]],
    changes: Mapping[str, list[Change]],
    combination: Combination,
    progress: Progress,
) -> int:
    """Write a weight file of the base anew, one tensor after another; how many of them."""
    file = base.file(source)

    def made(name: str) -> Tensor:
        tensor = file.read(name)
        affected = stored.get((source, name), ())
        if affected:
            wide = tensor.float()
            for own in affected:
                put_back(base.layout[own], _change(base, own, changes[own], combination), wide)
            tensor = wide.to(tensor.dtype)
        progress(tensor.nbytes)
        return tensor

    plan = [Planned(name, one.dtype, one.shape) for name, one in file.tensors.items()]
    write_stream(path, plan, file.metadata, made)
    return len(plan)


def _change(base: Base, name: str, found: Sequence[Change], combination: Combination) -> Tensor:
    """What is added to the weight, or bias, of one of diffusers' modules."""
    deltas = []
    part, _, kind = name.rpartition(".")
    for one, target, entry in found:
        adapter = entry.load(base.target_shape(target))
        rows = [base.shape(held)[0] for held in target.holds]
        begin = sum(rows[: target.holds.index(part)])
        own = slice(begin, begin + base.shape(part)[0])
        if kind == "bias":
            bias = one.weight * adapter.pieces["diff_b"]
            deltas.append((torch.cat(bias.chunk(2)[::-1]) if target.halves_swapped else bias)[own])
            continue
        plain = adapter.as_lora()
        if plain is not None and not target.halves_swapped:  # the other parts' rows need not be multiplied
            deltas.append(one.weight * LoraWeights(plain.down, plain.up[own], plain.alpha).delta())
            continue
        delta = one.weight * adapter.delta(weight_for(target, adapter, base))
        deltas.append((torch.cat(delta.chunk(2)[::-1]) if target.halves_swapped else delta)[own])
    return combination.combined(name, deltas)
