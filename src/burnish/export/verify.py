"""A written adapter is read back as ComfyUI and diffusers read it, and compared with what was trained.

ComfyUI logs a key that it does not know, or a shape that does not fit, and goes on: such a file seems to work
and does less than it should. So each save is checked here. Nothing in `verify*.py` is shared with the writer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from burnish.adapters.deltas import row_norms
from burnish.adapters.layer import Adaptable, AdapterWeights, adaptable_modules, weight_shape
from burnish.adapters.lokr import LokrWeights
from burnish.adapters.lora import LoraWeights
from burnish.errors import ExportError
from burnish.export.verify_file import (
    expect,
    format_of,
    module_start,
    names_of,
    natives_of,
    read_tensors,
)
from burnish.export.verify_kinds import (
    FileKind,
    difference,
    is_idle,
    kind_in,
    lengths_problem,
    unswapped,
    wrong_pieces,
)
from burnish.export.verify_lora import check_loras
from burnish.export.verify_text import as_in_files, text_modules, text_names, without_texts
from burnish.export_keys import AdapterFormat, ExportKeys, NativeModule

_LENGTHS = (".lora_magnitude_vector", ".lokr_magnitude_vector", ".dora_scale")


@dataclass(frozen=True, slots=True)
class Verification:
    """A file that reads back as trained."""

    format: AdapterFormat
    keys: int
    modules: int
    dtype: str
    max_relative_difference: float  # of a module's delta, in the Frobenius norm; rounding to `dtype` only

    def facts(self) -> dict[str, object]:
        """For status files and reports."""
        return asdict(self)


def verify_adapter(
    path: Path,
    trained: Mapping[str, AdapterWeights],
    denoiser: nn.Module,
    *,
    part: str,
    keys: ExportKeys,
    texts: Mapping[str, tuple[Mapping[str, AdapterWeights], nn.Module]] | None = None,
) -> Verification:
    """Check that an adapter file reads back as trained.

    Each key belongs to a module of `denoiser`, each trained module is there, shapes fit, and the delta that a
    reader computes is the trained one within the rounding of the file's number type. What was not trained is
    exactly zero, and there only where its format needs it. `trained` is float32; `denoiser` may have adapters
    attached, its own names count. `texts` are adapters of text encoders by part, by the encoder's own names, and the
    encoders.

    Raises:
        ExportError: anything of this is not so; names the keys or modules.
    """
    every, metadata = read_tensors(path)
    tensors, of_texts = without_texts(every, keys)
    modules = adaptable_modules(denoiser)
    kind = kind_in(tensors)
    format = format_of(path, tensors, part, keys, modules, kind)
    if format not in keys.formats:
        raise ExportError(
            f"{path.name} is in the {format} format, which {keys.modelspec} files are not read in"
        )
    if "lora_adapter_metadata" in metadata:
        raise ExportError(f"{path.name}: lora_adapter_metadata holds an alpha that ComfyUI does not read")

    natives = {name: NativeModule(name, (name,)) for name in modules}
    if keys.by_release(format):
        natives = natives_of(modules, keys)
    names = names_of(natives, format, part, keys, kind)
    largest = _check(path, tensors, trained, modules, natives, names, format, keys, kind)
    for encoder, (own, module) in (texts or {}).items():
        layers = text_modules(module)
        named = text_names(layers, encoder, format, keys)
        mine = {key: of_texts.pop(key) for key in every if module_start(key) in named}
        as_named = {as_in_files(name): one for name, one in own.items()}
        alone = {name: NativeModule(name, (name,)) for name in layers}
        plain = replace(keys, native=None, complete=())
        largest = max(largest, _check(path, mine, as_named, layers, alone, named, format, plain, kind))
    expect(path, "for text encoders that were not trained", list(of_texts))
    told = {one.dtype for key, one in every.items() if not key.endswith((".alpha", *_LENGTHS))}
    dtypes = sorted(str(one).removeprefix("torch.") for one in told)
    count = len(trained) + sum(len(own) for own, _ in (texts or {}).values())
    return Verification(format, len(every), count, ", ".join(dtypes), largest)


def _check(
    path: Path,
    tensors: Mapping[str, Tensor],
    trained: Mapping[str, AdapterWeights],
    modules: Mapping[str, Adaptable],
    natives: Mapping[str, NativeModule],
    names: Mapping[str, str],
    format: AdapterFormat,
    keys: ExportKeys,
    kind: FileKind,
) -> float:
    """The largest relative difference.

    Raises:
        ExportError: what is in the file is not what was trained.
    """
    lengths = {key: one for key, one in tensors.items() if key.endswith(_LENGTHS)}
    rest = {key: one for key, one in tensors.items() if key not in lengths}
    if kind in ("lora", "dora"):
        loras = {name: one.untuckered() for name, one in trained.items() if isinstance(one, LoraWeights)}
        expect(path, "trained as another kind of adapter", [name for name in trained if name not in loras])
        largest = check_loras(path, rest, loras, modules, natives, names, format, keys)
    else:
        largest = _check_others(path, rest, trained, modules, natives, names, kind)
    for_comfyui = keys.comfyui and (
        format == keys.default or keys.by_release(format) or (kind == "dokr" and keys.lokr is not None)
    )
    _check_lengths(path, lengths, trained, modules, natives, names, for_comfyui=for_comfyui)
    return largest


def _check_lengths(
    path: Path,
    tensors: Mapping[str, Tensor],
    trained: Mapping[str, AdapterWeights],
    modules: Mapping[str, Adaptable],
    natives: Mapping[str, NativeModule],
    names: Mapping[str, str],
    *,
    for_comfyui: bool,
) -> None:
    """DoRA's: each trained module has them, as both readers need them.

    Raises:
        ExportError: not so.
    """
    if not tensors and all(_trained_lengths(one) is None for one in trained.values()):
        return
    pieces = _by_module(path, tensors, names)
    wrong = [f"{name} (trained as DoRA, or not)" for name in pieces if not _any_in(natives[name], trained)]
    for name, native in natives.items():
        if not _any_in(native, trained):
            continue
        parts = [trained.get(part) for part in native.holds]
        magnitudes = [_trained_lengths(part) for part in parts]
        norms = [_row_lengths(modules[one], part) for one, part in zip(native.holds, parts, strict=True)]
        own = pieces.get(name, {})
        if native.halves_swapped:
            own = {
                ending: torch.cat(one.flatten().chunk(2)[::-1]).reshape(one.shape)
                for ending, one in own.items()
            }
        prefix = "lokr" if any(isinstance(part, LokrWeights) for part in parts) else "lora"
        problem = lengths_problem(own, magnitudes, norms, for_comfyui, prefix)
        if problem is not None:
            wrong.append(f"{name} ({problem})")
    expect(path, "with wrong lengths of rows", wrong)


def _trained_lengths(trained: AdapterWeights | None) -> Tensor | None:
    return trained.magnitude if isinstance(trained, LoraWeights | LokrWeights) else None


def _row_lengths(base: Adaptable, trained: AdapterWeights | None) -> tuple[Tensor, Tensor]:
    """(out,) |W| and |W + dW| by row."""
    weight = base.weight.detach().double().flatten(1)
    own = row_norms(weight)
    if isinstance(trained, LokrWeights):
        first, second = (one.to(weight) for one in trained.factors())
        return own.cpu(), row_norms(weight + trained.scale * torch.kron(first, second)).cpu()
    if not isinstance(trained, LoraWeights):
        return own.cpu(), own.cpu()
    trained = trained.untuckered()
    up, down = (one.to(weight).flatten(1) for one in (trained.up, trained.down))
    crossed = ((weight @ down.T) * up).sum(1) * trained.scale
    squared = ((up @ (down @ down.T)) * up).sum(1) * trained.scale**2
    return own.cpu(), (own.square() + 2 * crossed + squared).clamp(min=0).sqrt().cpu()


def _check_others(
    path: Path,
    tensors: Mapping[str, Tensor],
    trained: Mapping[str, AdapterWeights],
    modules: Mapping[str, Adaptable],
    natives: Mapping[str, NativeModule],
    names: Mapping[str, str],
    kind: FileKind,
) -> float:
    """The largest relative difference.

    Raises:
        ExportError: a module is missing or too many, cannot be read, or has another effect than was trained.
    """
    found = _by_module(path, tensors, names)
    broken = {name: wrong_pieces(kind, pieces) for name, pieces in found.items()}
    for problem in sorted({one for one in broken.values() if one is not None}):
        expect(path, problem, [name for name, one in broken.items() if one == problem])
    present = {part for name in found for part in natives[name].holds}
    expect(path, "trained but not in the file", [name for name in trained if name not in present])
    idle = [name for name in found if not _any_in(natives[name], trained)]
    expect(path, "in the file but not trained", idle)

    largest, wrong, stray = 0.0, [], []
    for name, pieces in found.items():
        native = natives[name]
        if native.halves_swapped:
            pieces = unswapped(kind, pieces)
        for part, rows in _rows(native, modules).items():
            if part not in trained:
                if rows is not None and not is_idle(kind, pieces, rows):
                    stray.append(part)
                continue
            off, allowed, norm = difference(kind, pieces, trained[part], rows)
            if not off <= allowed:
                wrong.append(f"{part} (by {off / norm if norm else off:.2g})")
            largest = max(largest, off / norm if norm else 0.0)
    expect(path, "affected by what was trained for others", stray)
    expect(path, "with another effect than was trained", wrong)
    return largest


def _rows(native: NativeModule, modules: Mapping[str, Adaptable]) -> dict[str, slice | None]:
    """The outputs of each layer in a module; None where it is the only one."""
    if len(native.holds) == 1:
        return {native.holds[0]: None}
    found: dict[str, slice | None] = {}
    first = 0
    for part in native.holds:
        height = weight_shape(modules[part])[0]
        found[part] = slice(first, first + height)
        first += height
    return found


def _by_module(
    path: Path, tensors: Mapping[str, Tensor], names: Mapping[str, str]
) -> dict[str, dict[str, Tensor]]:
    """Tensors by module and by the end of their keys.

    Raises:
        ExportError: a key belongs to no module.
    """
    expect(
        path,
        "that belong to no module of the model",
        [key for key in tensors if module_start(key) not in names],
    )
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        start = module_start(key)
        found.setdefault(names[start], {})[key[len(start) + 1 :]] = tensor
    return found


def _any_in(native: NativeModule, trained: Mapping[str, object]) -> bool:
    return any(part in trained for part in native.holds)
