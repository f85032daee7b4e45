"""Adapter files: written in one piece or not at all, and read in the spellings that are in use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from burnish.adapters.layer import Adaptable, AdapterWeights, weight_shape
from burnish.atomic import atomic_write_bytes
from burnish.errors import AdapterError, NonFiniteLoss
from burnish.export.formats import key_prefix, resolve_format, to_tensors
from burnish.export.metadata import file_hashes
from burnish.export.reading import OTHER_PIECES, assembled, taken_apart
from burnish.export.stacking import native_module
from burnish.export.text_encoders import TextAdapter, text_keys
from burnish.export_keys import ExportKeys, NativeModule

# One matrix each: what sd-scripts, peft (with and without adapter name) and older diffusers call A and B.
_DOWN = ("lora_down.weight", "lora_A.weight", "lora_A.default.weight", "lora.down.weight")
_UP = ("lora_up.weight", "lora_B.weight", "lora_B.default.weight", "lora.up.weight")
_ENDINGS = {
    **dict.fromkeys(_DOWN, "down"),
    **dict.fromkeys(_UP, "up"),
    "lora_mid.weight": "mid",
    **dict.fromkeys(("lora_magnitude_vector", "lora_magnitude_vector.weight"), "magnitude"),
    "lokr_magnitude_vector": "magnitude",
    **{name: name for name in ("alpha", "dora_scale", *OTHER_PIECES)},
}
_TEXT_ENCODER = re.compile(r"(lora_te\d*_|text_encoders?(_\d)?\.)")


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """What a file holds; `notes` says what had to be assumed."""

    weights: dict[str, AdapterWeights]  # by module name, float32
    metadata: dict[str, str]
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Found:
    """The pieces of one module's adapter, as they turn up."""

    spelling: str
    matrices: dict[str, Tensor] = field(default_factory=dict)


def write_adapter(
    path: Path,
    weights: Mapping[str, AdapterWeights],
    *,
    part: str,
    keys: ExportKeys,
    modules: Mapping[str, Adaptable],
    format: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str],
    texts: Mapping[str, TextAdapter] | None = None,
) -> Path:
    """Write an adapter in `format`, with the hashes of its tensors added to `metadata`; the folder is made.

    `part` is the denoiser's name as diffusers spells it (`unet`, `transformer`), `modules` are all that could be
    trained of it; `texts` what goes with it of text encoders, by their parts.

    Raises:
        AdapterError: this family has no such format, or there is nothing to write.
        NonFiniteLoss: a weight is NaN or infinite, or would be in `dtype`; nothing is written (law L5).
        DiskFull: the file cannot be written; one that was there before is untouched.
    """
    if not weights:
        raise AdapterError(f"there is no adapter to write to {path.name}: no module was trained")
    chosen = resolve_format(format, keys, weights)
    tensors = to_tensors(weights, chosen, part=part, keys=keys, dtype=dtype, modules=modules)
    for encoder, one in (texts or {}).items():
        own = text_keys(keys, encoder)
        tensors |= to_tensors(one.weights, chosen, part=encoder, keys=own, dtype=dtype, modules=one.modules)
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise NonFiniteLoss(
            f"{path.name} was not written: {len(broken)} tensors are not finite in {dtype}: {broken[0]} ...",
            remedy="Go back to an earlier checkpoint and lower train.optimizer.learning_rate; with "
            "save.dtype: float16, values above 65504 need bfloat16 or float32.",
        )
    trained = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    hashes = file_hashes(safetensors.torch.save(tensors, trained))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, safetensors.torch.save(tensors, {**metadata, **hashes}))
    return path


def read_metadata(path: Path) -> dict[str, str]:
    """What an adapter file says about itself.

    Raises:
        AdapterError: the file is missing or damaged.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def read_adapter(
    path: Path,
    modules: Mapping[str, Adaptable],
    *,
    part: str,
    keys: ExportKeys,
    texts_apart: bool = False,
) -> AdapterFile:
    """Read an adapter of any kind for the modules named, whatever program wrote it.

    Module names may be diffusers' or those of the original release. Known spellings: sd-scripts (`lora_unet_`),
    diffusers (`unet.`, `transformer.`), bare names or those after `diffusion_model.`, peft (`base_model.model.`,
    alpha in the metadata). Without alpha the scale is 1. An adapter of several of diffusers' modules at once is
    taken apart; of these, and of modules in the original names, those without any effect are left out. Keys of text
    encoders that are read by `read_text_adapters` are passed over if `texts_apart`.

    Raises:
        AdapterError: the file is damaged, holds NaN, or holds keys that are no adapter of these modules.
    """
    tensors, metadata = _load(path)
    if texts_apart and keys.text_encoders:
        tensors = {key: one for key, one in tensors.items() if not _TEXT_ENCODER.match(key)}
    return _read(path, tensors, metadata, modules, _spellings(modules, part, keys), part, keys)


def read_text_adapters(
    path: Path, encoders: Mapping[str, Mapping[str, Adaptable]], keys: ExportKeys
) -> dict[str, AdapterFile]:
    """What a file holds for text encoders, by part; names of modules are those of files.

    Args:
        encoders: by part, what takes adapters, by names of files (`text_encoders.file_modules`).

    Raises:
        AdapterError: the file is damaged, or holds keys of text encoders that are no adapter of these.
    """
    tensors, metadata = _load(path)
    tensors = {key: one for key, one in tensors.items() if _TEXT_ENCODER.match(key)}
    left, found = dict(tensors), {}
    for part, modules in encoders.items():
        own = text_keys(keys, part)
        names = _text_spellings(modules, part, own)
        mine = {key: left.pop(key) for key in tensors if key in left and _split(key)[0] in names}
        if mine:
            found[part] = _read(path, mine, metadata, modules, names, part, own)
    if left:
        raise _unknown_keys(path, list(left), len(tensors), [])
    return found


def _read(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str],
    modules: Mapping[str, Adaptable],
    names: Mapping[str, NativeModule],
    part: str,
    keys: ExportKeys,
) -> AdapterFile:
    """The adapters of the modules that `names` spells."""
    found: dict[NativeModule, _Found] = {}
    unknown = []
    for key, tensor in tensors.items():
        spelling, piece = _split(key)
        name = names.get(spelling)
        if name is None or piece is None:
            unknown.append(key)
            continue
        entry = found.setdefault(name, _Found(spelling))
        if piece in entry.matrices:
            raise AdapterError(f"{path}: two spellings of {name.name} ({entry.spelling} and {spelling})")
        entry.matrices[piece] = tensor.float()
    if unknown:
        raise _unknown_keys(path, unknown, len(tensors), modules)

    alphas = metadata_alphas(path, metadata, part, [target.name for target in found])
    # Files in these spellings carry no alpha by rule: it is folded into the weights.
    folds = tuple(
        key_prefix(format, part, keys) for format in ("diffusers", "comfy") if format in keys.formats
    )
    folded = {entry.spelling for entry in found.values() if entry.spelling.startswith(folds)}
    assumed = 0
    read = {}
    shapes = {name: weight_shape(module) for name, module in modules.items()}
    for target, entry in found.items():
        parts = [shapes[part] for part in target.holds]
        shape = (sum(part[0] for part in parts), *parts[0][1:])
        where = f"{path}: the adapter of {target.name}"
        read[target], known = assembled(where, entry.matrices, alphas.get(target.name), shape)
        assumed += not known and entry.spelling not in folded
    notes = (f"{path.name}: no alpha for {assumed} modules; strength 1 is assumed",) if assumed else ()
    return AdapterFile(_by_module(path, read, modules, keys), metadata, notes)


def _by_module(
    path: Path,
    read: Mapping[NativeModule, AdapterWeights],
    modules: Mapping[str, Adaptable],
    keys: ExportKeys,
) -> dict[str, AdapterWeights]:
    """What was read by diffusers' names.

    Raises:
        AdapterError: two adapters of a file are for the same module, or none has any effect.
    """
    shapes = {name: weight_shape(module) for name, module in modules.items()}
    weights: dict[str, AdapterWeights] = {}
    for target, adapter in read.items():
        as_is = target.holds == (target.name,) and not target.halves_swapped
        filled = any(fnmatchcase(target.name, pattern) for pattern in keys.complete)
        parts = {target.name: adapter} if as_is and not filled else taken_apart(target, adapter, shapes)
        twice = [name for name in parts if name in weights]
        if twice:
            raise AdapterError(f"{path}: two adapters of {twice[0]}, one of them in {target.name}")
        weights |= parts
    if not weights:
        raise AdapterError(f"{path}: every adapter in it is zero; it was saved before its first step")
    return weights


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _opened(path) as file:
        names = file.keys()
        tensors = {key: file.get_tensor(key) for key in names}
        metadata = dict(file.metadata() or {})
    if not tensors:
        raise AdapterError(f"{path} holds no tensors")
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise AdapterError(
            f"{path}: {len(broken)} tensors hold NaN or infinity, such as {broken[0]}",
            remedy="The training that wrote it had broken down; use an earlier save.",
        )
    return tensors, metadata


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise AdapterError(f"there is no adapter file {path}") from error
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}", remedy=_why_unreadable(path)) from error


def _why_unreadable(path: Path) -> str:
    if not path.is_file():
        return "It is not a file."
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "It is a pointer of Git LFS, not the file itself; run `git lfs pull`."
    if start.startswith((b"PK", b"\x80")) and start[8:9] != b"{":
        return "It is a pickle under another name; Burnish reads safetensors only."
    return "It is not a whole safetensors file; download or copy it again."


def _spellings(modules: Iterable[str], part: str, keys: ExportKeys) -> dict[str, NativeModule]:
    """Every way in which a key may begin that means a module, diffusers' or a native one -> what it means."""
    dotted = {"", f"{part}.", "unet.", "transformer.", "diffusion_model.", "base_model.model."}
    dotted |= {key_prefix(format, part, keys) for format in ("diffusers", "comfy")}
    flat = {key_prefix("kohya", part, keys), "lora_unet_", f"lora_{part}_", "lycoris_"}
    known = set(modules)
    natives = [native_module(keys, module) for module in known]
    # Where a native name is also one of diffusers', of another module, diffusers' is meant.
    targets = [native for native in natives if known.issuperset(native.holds)]
    targets += [NativeModule(module, (module,)) for module in known]
    names: dict[str, NativeModule] = {}
    for target in targets:
        names.update({prefix + target.name: target for prefix in dotted})
        names.update({prefix + target.name.replace(".", "_"): target for prefix in flat})
    return names


def _text_spellings(modules: Iterable[str], part: str, keys: ExportKeys) -> dict[str, NativeModule]:
    """The same of a text encoder; with `text_model.` and without, and as the first CLIP also by sd-scripts' `lora_te1_`
    of models that have one."""
    flat = {keys.prefix["kohya"]} | ({"lora_te_", "lora_te1_"} if part == "text_encoder" else set())
    dotted = {keys.prefix["diffusers"], keys.prefix["comfy"]}
    names: dict[str, NativeModule] = {}
    for module in modules:
        target = NativeModule(module, (module,))
        for spelled in (module, module.removeprefix("text_model.")):
            names |= {prefix + spelled: target for prefix in dotted}
            names |= {prefix + spelled.replace(".", "_"): target for prefix in flat}
    return names


def _split(key: str) -> tuple[str, str | None]:
    """A key's beginning and which piece it is: "down", "up", "alpha" or nothing known."""
    for ending, piece in _ENDINGS.items():
        if key.endswith(f".{ending}"):
            return key[: -len(ending) - 1], piece
    return key, None


def metadata_alphas(
    path: Path, metadata: Mapping[str, str], part: str, names: Iterable[str]
) -> dict[str, float]:
    """Alpha per module from the peft config that diffusers keeps in the metadata; empty where there is none.

    The config is one flat JSON object under `lora_adapter_metadata`: `<part>.lora_alpha` for all, and exceptions
    under `<part>.alpha_pattern` by the end of the module's name (`get_pattern_key` in peft's `utils/other.py`).
    peft takes them for regular expressions; here a file gets no such power, plain names are what is in use.
    """
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        config = json.loads(text)
        if not isinstance(config, dict):
            raise TypeError("no JSON object")
        found = next((prefix for prefix in (f"{part}.", "") if f"{prefix}lora_alpha" in config), None)
        if found is None:
            return {}
        common = float(config[f"{found}lora_alpha"])
        exceptions = {
            pattern.strip("^$").replace("\\.", "."): float(alpha)
            for pattern, alpha in (config.get(f"{found}alpha_pattern") or {}).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path}: lora_adapter_metadata is not the config of a LoRA: {error}") from error

    alphas = {}
    used = set()
    for name in names:
        ending = next((end for end in exceptions if f".{name}".endswith(f".{end}")), None)
        alphas[name] = common if ending is None else exceptions[ending]
        used.add(ending)
    unused = [ending for ending in exceptions if ending not in used]
    if unused:
        raise AdapterError(f"{path}: alpha_pattern {unused[0]!r} in the metadata fits no module of the file")
    return alphas


def _unknown_keys(path: Path, unknown: list[str], count: int, modules: Iterable[str]) -> AdapterError:
    shown = ", ".join(unknown[:4]) + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
    text_encoder = [key for key in unknown if _TEXT_ENCODER.match(key)]
    if len(text_encoder) == len(unknown):
        return AdapterError(
            f"{path}: {len(unknown)} of {count} keys are for text encoders, which take none here: {shown}",
            remedy="Remove them from the file (`burnish adapter convert --drop-text-encoders`), or use one without.",
        )
    expected = ", ".join(modules)[:200]
    return AdapterError(
        f"{path}: {len(unknown)} of {count} keys are no adapter of this model's modules: {shown}",
        remedy=f"Is it for another family? Modules here are, for example: {expected}",
    )
